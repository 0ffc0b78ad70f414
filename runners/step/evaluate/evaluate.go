// Package evaluate is the step that measures a model, clean and under attack,
// and puts the report before the gate.
package evaluate

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/attack"
	models "github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/report"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
)

const (
	// batch is how many images go through the network at a time.
	batch = 250
	// curvePoints and examples are for the page: enough to see the shape of
	// the curve, and one image of each of ten classes.
	curvePoints = 8
	examples    = 10
)

// Job is one evaluation.
type Job struct {
	Model   string // a reference, or an ONNX file
	Dataset string
	Threat  attack.Threat
	Attacks []string
	Samples int
	Seed    uint64
	Certify bool
	Policy  *gate.Policy // nil for no verdict
	Against string       // report of the model in service: a reference or file; "" for none
	Page    string       // file for the HTML page, "" for none
	Output  string       // reference for the report, "" for none
}

// Result is what the step prints: the report without its images, and the
// verdict.
type Result struct {
	*models.Report
	Examples  []models.Example `json:"examples,omitempty"` // hides the report's
	Reference string           `json:"reference,omitempty"`
	Digest    string           `json:"digest,omitempty"`
	Verdict   string           `json:"verdict,omitempty"` // pass or fail
	Reasons   []gate.Reason    `json:"reasons,omitempty"`
}

// Run evaluates, decides, writes what was asked for and says what it found.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	started := time.Now()
	if j.Policy != nil {
		if err := j.Policy.Validate(); err != nil {
			return step.BadInput(err)
		}
	}
	if j.Output != "" {
		if err := artifact.Reachable(ctx, j.Output); err != nil {
			return err
		}
	}
	var inService *models.Report
	if j.Against != "" {
		r, err := artifact.ReadReport(ctx, j.Against)
		if err != nil {
			return err
		}
		inService = r.Report
	}
	m, err := artifact.ReadModel(ctx, j.Model)
	if err != nil {
		return err
	}
	splits, err := artifact.OpenDataset(ctx, j.Dataset)
	if err != nil {
		return err
	}
	target, err := graph.NewAttack(m.Network, batch)
	if err != nil {
		return err
	}
	s.Log.Info("evaluating", "model", m.Reference, "dataset", splits.Name, "attacks", strings.Join(j.Attacks, ","), "epsilon", j.Threat.Epsilon, "samples", j.Samples)
	r, err := models.Run(ctx, target, splits.Test, models.Options{
		Threat: j.Threat, Attacks: j.Attacks, Samples: j.Samples, Seed: j.Seed,
		CurvePoints: curvePoints, Examples: examples,
		ModelDigest: m.Digest, Progress: s.Progress, Certify: j.Certify,
	})
	if err != nil {
		return step.BadInput(err)
	}
	result := Result{}
	var verdict *gate.Verdict
	if j.Policy != nil {
		v, err := gate.Decide(*j.Policy, r, inService)
		if err != nil {
			return step.BadInput(err)
		}
		verdict, result.Verdict, result.Reasons = &v, v.String(), v.Reasons
	}
	var page bytes.Buffer
	if err := report.Render(&page, report.Evaluation(r, verdict)); err != nil {
		return err
	}
	if j.Page != "" {
		if err := step.WriteFile(j.Page, page.Bytes(), 0o644); err != nil {
			return err
		}
	}
	if j.Output != "" {
		if result.Reference, result.Digest, err = artifact.PushReport(ctx, j.Output, r, page.Bytes(), m); err != nil {
			return err
		}
	}
	timed := *r
	timed.Seconds = time.Since(started).Seconds()
	result.Report = &timed
	return result.tell(s)
}

// tell narrates the figures and gives the results.
func (r *Result) tell(s *step.Step) error {
	s.Log.Info("clean", "accuracy", r.CleanAccuracy, "at_least", r.CleanAccuracyLowerBound)
	for _, a := range r.Attacks {
		s.Log.Info("attacked", "attack", a.Name, "accuracy", a.Accuracy, "at_least", a.AccuracyLowerBound)
	}
	s.Log.Info("worst case", "accuracy", r.RobustAccuracy, "at_least", r.RobustAccuracyLowerBound)
	if c := r.Certified; c != nil {
		s.Log.Info("certified", "accuracy", c.CertifiedAccuracy, "at_least", c.CertifiedAccuracyLowerBound)
	}
	for _, reason := range r.Reasons {
		s.Log.Info("gate: " + reason.String())
	}
	results := map[string]string{
		"model_digest":                r.ModelDigest,
		"clean_accuracy":              number(r.CleanAccuracy),
		"robust_accuracy":             number(r.RobustAccuracy),
		"robust_accuracy_lower_bound": number(r.RobustAccuracyLowerBound),
	}
	if r.Verdict != "" {
		s.Log.Info("verdict", "verdict", r.Verdict)
		results["verdict"] = r.Verdict
	}
	if r.Reference != "" {
		results["reference"], results["digest"] = r.Reference, r.Digest
	}
	if err := s.Results(results); err != nil {
		return err
	}
	return s.Print(r.Reference, r)
}

func number(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }

// Command is the step.
func Command() *cobra.Command {
	var (
		j                   = Job{Threat: attack.Threat{Norm: "linf"}}
		policy              string
		minClean, minRobust float64
	)
	cmd := &cobra.Command{
		Use:   "evaluate --model REF",
		Short: "Measure a model, clean and under attack",
		Long: `Measure how often a model is right on the first test images, clean, under each
attack, and under the worst attack for each image, with 95% lower bounds. The
attacker has the model's weights. Prints the report's reference with --output,
and all figures with -o json.

With --policy the gate decides: the verdict is pass or fail, and the exit code 0
in either case. Attacks: fgsm, pgd-STEPS, pgd-STEPSxRESTARTS, noise.`,
		Example: `  temper evaluate --model oci:out:robust --output oci:out:report
  temper evaluate --model model.onnx --epsilon 0.15 --attacks fgsm,pgd-50x10 --samples 500 -o json
  temper evaluate --model oci:out:robust --policy wong --against oci:out:report-before --report-html report.html`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			given := cmd.Flags().Changed
			if policy == "" {
				for _, flag := range []string{"min-clean-accuracy", "min-robust-accuracy", "against"} {
					if given(flag) {
						return step.BadInput(fmt.Errorf("--%s is for the gate: give a --policy too", flag))
					}
				}
				return j.Run(cmd.Context(), step.From(cmd))
			}
			model, err := artifact.Definition(cmd.Context(), policy)
			if err != nil {
				return fmt.Errorf("policy: %w", err)
			}
			j.Policy = &model.Policy
			if given("min-clean-accuracy") {
				j.Policy.MinCleanAccuracy = minClean
			}
			if given("min-robust-accuracy") {
				j.Policy.MinRobustAccuracy = minRobust
			}
			if !given("certify") {
				j.Certify = j.Policy.MinCertified > 0
			}
			if !given("epsilon") {
				j.Threat = j.Policy.Threat
			}
			if !given("attacks") {
				j.Attacks = j.Policy.Attacks
			}
			if !given("samples") {
				j.Samples = max(j.Samples, j.Policy.MinSamples)
			}
			return j.Run(cmd.Context(), step.From(cmd))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&j.Model, "model", "", "the model: a reference, or an ONNX file")
	flags.StringVar(&j.Dataset, "dataset", "mnist", "mnist, a folder of IDX files, URL#sha256:..., or a reference")
	step.Float(flags, &j.Threat.Epsilon, "epsilon", 0.3, 0, 1, "size of the perturbation, in pixels of [0,1]; the policy's where there is one")
	flags.StringSliceVar(&j.Attacks, "attacks", []string{"fgsm", "pgd-20"}, "attacks, separated by commas; the policy's where there is one")
	step.Int(flags, &j.Samples, "samples", 1000, 1, 1_000_000, "how many test images; at least the policy's where there is one")
	flags.Uint64Var(&j.Seed, "seed", 1, "seed of the attacks' random starts")
	flags.BoolVar(&j.Certify, "certify", false, "also prove, by interval bounds, how many answers no attack can change; on where the policy asks for it")
	flags.StringVar(&policy, "policy", "", "model of the zoo, YAML file or reference of one, whose gate policy decides")
	step.Fraction(flags, &minClean, "min-clean-accuracy", 0, "least lower bound of the clean accuracy, instead of the policy's")
	step.Fraction(flags, &minRobust, "min-robust-accuracy", 0, "least lower bound of the robust accuracy, instead of the policy's")
	flags.StringVar(&j.Against, "against", "", "report of the model in service, a reference or JSON file: the gate then refuses a step back")
	flags.StringVar(&j.Page, "report-html", "", "file for the report as an HTML page")
	flags.StringVar(&j.Output, "output", "", "reference to push the report to; in the model's repository it is attached to the model")
	cmd.MarkFlagRequired("model")
	return cmd
}
