// Package summary is the step that says how a workflow went: on its exit,
// whatever the end.
package summary

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/report"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/signing/store"
)

// Type is the artifact's.
const Type = "application/vnd.temper.summary.v1"

// Names of the files in it.
const (
	File     = "summary.json"
	PageFile = "summary.html"
)

// Limits on what a workflow may have left: candidates are tens.
const (
	maxReports  = 64
	maxFailures = 1 << 20 // what a Kubernetes object can hold
)

// partTag is the tag of what a shard measured: a part, not a report.
var partTag = regexp.MustCompile(`-part-[0-9]+$`)

// Summary is how a workflow went.
type Summary struct {
	Workflow string       `json:"workflow"`
	Status   string       `json:"status"` // Succeeded, Failed or Error
	Failures []Failure    `json:"failures"`
	Reports  []Evaluation `json:"reports"`
}

// Failure is a step that failed, in Argo's words.
type Failure struct {
	DisplayName string `json:"displayName"`
	Message     string `json:"message"`
	Phase       string `json:"phase"`
}

// Evaluation is a report that the workflow made.
type Evaluation struct {
	Tag       string `json:"tag"`
	Reference string `json:"reference"`

	CleanAccuracy  float64 `json:"clean_accuracy"`
	RobustAccuracy float64 `json:"robust_accuracy"`

	report *evaluate.Report
}

// Job is one summary.
type Job struct {
	Workflow   string // its artifacts' tags begin with its name and a dash
	Status     string
	Failures   string // Argo's {{workflow.failures}}: JSON, quoted once or twice; "" for none
	Repository string
	Output     string // a reference
}

// failures reads what Argo says failed. Where nothing did it leaves its
// variable as it stands.
func (j *Job) failures() ([]Failure, error) {
	text := strings.TrimSpace(j.Failures)
	if text == "" || text == "{{workflow.failures}}" {
		return nil, nil
	}
	if len(text) > maxFailures {
		return nil, fmt.Errorf("failures: %d bytes, at most %d", len(text), maxFailures)
	}
	if strings.HasPrefix(text, `"`) {
		var inner string
		if err := json.Unmarshal([]byte(text), &inner); err != nil {
			return nil, fmt.Errorf("failures: %w", err)
		}
		text = inner
	}
	var all []Failure
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		return nil, fmt.Errorf("failures: %w", err)
	}
	return all, nil
}

// Run collects the workflow's reports and pushes the summary.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	sum := Summary{Workflow: j.Workflow, Status: j.Status, Failures: []Failure{}, Reports: []Evaluation{}}
	failed, err := j.failures()
	if err != nil {
		s.Log.Warn("what failed cannot be read", "error", err) // the rest is still worth telling
	}
	sum.Failures = append(sum.Failures, failed...)
	r, err := store.Open(ctx, j.Repository)
	if err != nil {
		return step.BadInput(err)
	}
	defer r.Close()
	tags, err := r.Tags(ctx)
	if err != nil {
		return err
	}
	for _, tag := range tags {
		name, ours := strings.CutPrefix(tag, j.Workflow+"-")
		if !ours || name != "before" && !strings.HasPrefix(name, "report") || partTag.MatchString(name) || len(sum.Reports) == maxReports {
			continue
		}
		e, err := artifact.ReadReport(ctx, j.Repository+":"+tag)
		if err != nil {
			return err
		}
		sum.Reports = append(sum.Reports, Evaluation{name, e.Reference, e.CleanAccuracy, e.RobustAccuracy, e.Report})
	}
	var page bytes.Buffer
	if err := report.Render(&page, sum.page()); err != nil {
		return err
	}
	data, err := json.MarshalIndent(sum, "", "  ")
	if err != nil {
		return err
	}
	reference, err := store.Push(ctx, j.Output, &store.Artifact{Type: Type, Files: []store.File{
		{Name: File, MediaType: "application/json", Data: append(data, '\n')},
		{Name: PageFile, MediaType: "text/html", Data: page.Bytes()},
	}})
	if err != nil {
		return fmt.Errorf("push: %w", err)
	}
	s.Log.Info("summary", "workflow", j.Workflow, "status", j.Status, "failures", len(sum.Failures), "reports", len(sum.Reports), "reference", reference)
	if err := s.Results(map[string]string{"reference": reference, "digest": artifact.DigestOf(reference)}); err != nil {
		return err
	}
	return s.Print(reference, sum)
}

// page shows the evaluations beside one another.
func (sum *Summary) page() *report.Page {
	p := &report.Page{
		Title:   sum.Workflow,
		Lead:    fmt.Sprintf("The workflow ended as %s, with %d evaluations.", sum.Status, len(sum.Reports)),
		Figures: []report.Figure{{Label: "Workflow", Value: sum.Status, Tone: report.Bad}},
	}
	if sum.Status == "Succeeded" {
		p.Figures[0].Tone = report.Good
	}
	for _, f := range sum.Failures {
		p.Facts = append(p.Facts, report.Fact{Name: f.DisplayName, Value: f.Phase + ": " + f.Message})
	}
	for _, e := range sum.Reports {
		p.Accuracies = append(p.Accuracies, report.Accuracies(e.Tag, e.report)...)
		p.Facts = append(p.Facts, report.Fact{Name: e.Tag, Value: e.Reference})
	}
	return p
}

// Command is the step.
func Command() *cobra.Command {
	var j Job
	cmd := &cobra.Command{
		Use:   "summary --workflow NAME --status STATUS --repository REPOSITORY --output REF",
		Short: "Say how a workflow went, as a page and as JSON",
		Long: `Collect the evaluation reports that a workflow left, by the tags that begin with
its name, and push them as one page beside how it ended and what failed. It is
the exit handler of the workflows. Prints the reference.`,
		Example: `  temper summary --workflow robustify-x7k2p --status Succeeded --repository localhost:5000/mnist --output localhost:5000/mnist:robustify-x7k2p-summary`,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return j.Run(cmd.Context(), step.From(cmd)) },
	}
	flags := cmd.Flags()
	flags.StringVar(&j.Workflow, "workflow", "", "name of the workflow")
	flags.StringVar(&j.Status, "status", "", "how it ended")
	flags.StringVar(&j.Failures, "failures", "", "what failed: Argo's {{workflow.failures}}")
	flags.StringVar(&j.Repository, "repository", "", "where its artifacts are, HOST/REPOSITORY")
	flags.StringVar(&j.Output, "output", "", "reference to push the summary to")
	for _, name := range []string{"workflow", "status", "repository", "output"} {
		cmd.MarkFlagRequired(name)
	}
	return cmd
}
