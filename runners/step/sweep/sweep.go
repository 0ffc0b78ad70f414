// Package sweep is the step that trains several candidates and shows how each
// trades accuracy on clean images for accuracy under attack.
package sweep

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/report"
	models "github.com/temper-ml/temper/models/train"
	"github.com/temper-ml/temper/models/unknown"
	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/retrain"
	"github.com/temper-ml/temper/runners/step/train"
)

const (
	// maxCandidates keeps a mistyped list from asking for a month.
	maxCandidates = 100
	// batch is how many images go through a network at a time.
	batch = 250
)

// Job is one sweep: every recipe with every clean share and every seed.
type Job struct {
	Network     string // trained from random weights: a model of the zoo or a YAML file
	Model       string // or the model to train further: a reference or a file
	Dataset     string // "" for the network's own, or mnist
	Recipes     []string
	CleanShares []string // as numbers; none for each recipe's own
	Seeds       []string // as numbers
	Epochs      float64  // 0 for each recipe's own
	Threat      attack.Threat
	Attacks     []string
	Suite       string // ensemble of attacks, "" for none
	Samples     int
	Checkpoints string // a folder, "" for none
	Page        string // file for the HTML page, "" for none
	Output      string // repository of the candidates, without a tag
}

// Candidate is one training and what came of it.
type Candidate struct {
	Name       string   `json:"name"` // its tag in the repository
	Recipe     string   `json:"recipe"`
	CleanShare *float64 `json:"clean_share,omitempty"` // absent: the recipe's own
	Seed       uint64   `json:"seed"`

	Reference string `json:"reference,omitempty"`
	Digest    string `json:"digest,omitempty"`
	Error     string `json:"error,omitempty"` // why there is no model: the training diverged

	CleanAccuracy            float64           `json:"clean_accuracy"`
	RobustAccuracy           float64           `json:"robust_accuracy"` // worst case over the attacks
	RobustAccuracyLowerBound float64           `json:"robust_accuracy_lower_bound"`
	Attacks                  []evaluate.Attack `json:"attacks,omitempty"`
	// Efficient: no other candidate is better in one accuracy and at least as
	// good in the other.
	Efficient bool    `json:"efficient"`
	Seconds   float64 `json:"seconds"` // of training
}

// Result is what the step prints.
type Result struct {
	Threat        attack.Threat `json:"threat"`
	Samples       int           `json:"samples"` // of the validation split
	DatasetDigest string        `json:"dataset_digest"`
	Candidates    []Candidate   `json:"candidates"` // the most robust first
}

var tagPattern = regexp.MustCompile(`[^A-Za-z0-9_.-]+`)

// candidates lists what to train. Every recipe is checked with every clean
// share before anything is trained.
func (j *Job) candidates() ([]Candidate, error) {
	shares := []*float64{nil}
	if len(j.CleanShares) > 0 {
		shares = nil
	}
	for _, text := range j.CleanShares {
		v, err := strconv.ParseFloat(text, 64)
		if err != nil || !(v >= 0 && v < 1) {
			return nil, fmt.Errorf("clean share %q: must be a number from 0, below 1", text)
		}
		shares = append(shares, &v)
	}
	var seeds []uint64
	for _, text := range j.Seeds {
		v, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("seed %q: must be a whole number from 0", text)
		}
		seeds = append(seeds, v)
	}
	if n := len(j.Recipes) * len(shares) * len(seeds); n < 1 || n > maxCandidates {
		return nil, fmt.Errorf("%d candidates (recipes x clean shares x seeds): must be 1 to %d", n, maxCandidates)
	}
	var all []Candidate
	for _, ref := range j.Recipes {
		for _, share := range shares {
			r, err := zoo.LoadRecipe(ref)
			if err != nil {
				return nil, err
			}
			base := strings.TrimSuffix(filepath.Base(ref), filepath.Ext(ref))
			name := tagPattern.ReplaceAllString(base, "-")
			if share != nil {
				r.CleanShare = *share
				name += fmt.Sprintf("-clean-%v", *share)
			}
			if err := r.Validate(); err != nil {
				return nil, fmt.Errorf("recipe %s: %w", ref, err)
			}
			for _, seed := range seeds {
				c := Candidate{Name: fmt.Sprintf("sweep-%s-seed-%d", name, seed), Recipe: ref, CleanShare: share, Seed: seed}
				if slices.ContainsFunc(all, func(o Candidate) bool { return o.Name == c.Name }) {
					return nil, fmt.Errorf("candidate %s is there twice: list each recipe, clean share and seed once, and give recipe files different names", c.Name)
				}
				all = append(all, c)
			}
		}
	}
	return all, nil
}

// parts of a candidate's progress: training takes nearly all of the time.
const (
	trainParts = 900
	allParts   = 1000
)

// Run trains and measures every candidate, one after the other. The validation
// split judges them: the test split is for the one that is chosen.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	all, err := j.candidates()
	if err != nil {
		return step.BadInput(err)
	}
	if j.Suite != "" && !slices.Contains(evaluate.Suites(), j.Suite) {
		return step.BadInput(unknown.Name("suite", j.Suite, evaluate.Suites()))
	}
	for _, spec := range j.Attacks {
		if _, err := attack.Parse(spec, j.Threat); err != nil {
			return step.BadInput(err)
		}
	}
	if err := artifact.Reachable(ctx, j.Output+":"+all[0].Name); err != nil {
		return err
	}
	splits, err := artifact.OpenDataset(ctx, j.Dataset)
	if err != nil {
		return err
	}
	if splits.Validation.Len() == 0 {
		return step.BadInput(fmt.Errorf("dataset %s has no validation images to judge candidates by", splits.Name))
	}
	samples := min(j.Samples, splits.Validation.Len())
	if j.Checkpoints != "" {
		if err := os.MkdirAll(j.Checkpoints, 0o777); err != nil {
			return err
		}
	}
	for i := range all {
		tell := func(done, total int) { s.Progress(i*allParts+done*trainParts/max(total, 1), len(all)*allParts) }
		if err := j.train(ctx, s, &all[i], tell); err != nil {
			return fmt.Errorf("candidate %s: %w", all[i].Name, err)
		}
		if all[i].Error == "" {
			if err := j.measure(ctx, &all[i], splits.Validation, samples); err != nil {
				return fmt.Errorf("candidate %s: %w", all[i].Name, err)
			}
		}
		c := all[i]
		s.Log.Info("candidate", "name", c.Name, "clean_accuracy", c.CleanAccuracy, "robust_accuracy", c.RobustAccuracy, "seconds", c.Seconds, "error", c.Error)
		s.Progress((i+1)*allParts, len(all)*allParts)
	}
	markEfficient(all)
	slices.SortStableFunc(all, func(a, b Candidate) int {
		return cmp.Or(cmp.Compare(b.RobustAccuracy, a.RobustAccuracy), cmp.Compare(b.CleanAccuracy, a.CleanAccuracy))
	})
	if all[0].Error != "" {
		return step.BadInput(fmt.Errorf("every candidate diverged: %s: %s", all[0].Name, all[0].Error))
	}
	result := Result{Threat: j.Threat, Samples: samples, DatasetDigest: splits.Digest(), Candidates: all}
	if j.Page != "" {
		var page bytes.Buffer
		if err := report.Render(&page, result.page(splits.Name)); err != nil {
			return err
		}
		if err := step.WriteFile(j.Page, page.Bytes(), 0o644); err != nil {
			return err
		}
	}
	var efficient []string
	for _, c := range all {
		if c.Efficient {
			efficient = append(efficient, c.Reference)
		}
	}
	err = s.Results(map[string]string{"reference": all[0].Reference, "digest": all[0].Digest, "robust_accuracy": strconv.FormatFloat(all[0].RobustAccuracy, 'g', -1, 64)})
	if err != nil {
		return err
	}
	return s.Print(strings.Join(efficient, "\n"), result)
}

// train runs the training step for a candidate. A training that diverges is an
// outcome, not a failure of the sweep.
func (j *Job) train(ctx context.Context, s *step.Step, c *Candidate, tell func(done, total int)) error {
	args := []string{
		"--recipe", c.Recipe, "--seed", strconv.FormatUint(c.Seed, 10), "--dataset", j.Dataset,
		"--epsilon", strconv.FormatFloat(j.Threat.Epsilon, 'g', -1, 64), "--output", j.Output + ":" + c.Name,
		"--epochs", strconv.FormatFloat(j.Epochs, 'g', -1, 64),
	}
	if c.CleanShare != nil {
		args = append(args, "--clean-share", strconv.FormatFloat(*c.CleanShare, 'g', -1, 64))
	}
	if j.Checkpoints != "" {
		args = append(args, "--checkpoint", filepath.Join(j.Checkpoints, c.Name+".checkpoint"))
	}
	cmd := train.Command()
	if j.Model != "" {
		cmd = retrain.Command()
		args = append(args, "--model", j.Model)
	} else {
		args = append(args, "--network", j.Network)
	}
	var made train.Result
	started := time.Now()
	err := s.Call(ctx, cmd, &made, tell, args...)
	c.Seconds = time.Since(started).Seconds()
	if errors.Is(err, models.ErrDiverged) {
		c.Error = err.Error()
		return nil
	}
	c.Reference, c.Digest = made.Reference, made.Digest
	return err
}

// measure attacks a candidate on the first images of the validation split.
func (j *Job) measure(ctx context.Context, c *Candidate, validation *dataset.Set, samples int) error {
	m, err := artifact.ReadModel(ctx, c.Reference)
	if err != nil {
		return err
	}
	target, err := graph.NewAttack(m.Network, batch)
	if err != nil {
		return err
	}
	r, err := evaluate.Run(ctx, target, validation, evaluate.Options{Threat: j.Threat, Attacks: j.Attacks, Suite: j.Suite, Samples: samples, Seed: 1, ModelDigest: m.Digest})
	if err != nil {
		return step.BadInput(err)
	}
	c.CleanAccuracy, c.RobustAccuracy, c.RobustAccuracyLowerBound, c.Attacks = r.CleanAccuracy, r.RobustAccuracy, r.RobustAccuracyLowerBound, r.Attacks
	return nil
}

// markEfficient marks the candidates that no other one beats.
func markEfficient(all []Candidate) {
	for i := range all {
		c := &all[i]
		c.Efficient = c.Error == "" && !slices.ContainsFunc(all, func(o Candidate) bool {
			return o.Error == "" && o.CleanAccuracy >= c.CleanAccuracy && o.RobustAccuracy >= c.RobustAccuracy &&
				(o.CleanAccuracy > c.CleanAccuracy || o.RobustAccuracy > c.RobustAccuracy)
		})
	}
}

// page shows the candidates.
func (r *Result) page(data string) *report.Page {
	best := r.Candidates[0]
	p := &report.Page{
		Title: "Clean against robust accuracy",
		Lead: fmt.Sprintf("%d candidates, judged on the first %d validation images of %s against an attacker who may change an image by up to %v (%s). The test images are untouched.",
			len(r.Candidates), r.Samples, step.RedactURLs(data), r.Threat.Epsilon, r.Threat.Norm),
		Figures: []report.Figure{
			{Label: "Most robust", Value: report.Percent(best.RobustAccuracy), Note: best.Name},
			{Label: "its clean accuracy", Value: report.Percent(best.CleanAccuracy)},
		},
		Facts: []report.Fact{{Name: "Data set", Value: r.DatasetDigest}},
	}
	for _, c := range r.Candidates {
		if c.Error != "" {
			p.Facts = append(p.Facts, report.Fact{Name: c.Name, Value: c.Error})
			continue
		}
		p.Tradeoff = append(p.Tradeoff, report.Tradeoff{
			Group: c.Recipe, Name: c.Name, Clean: c.CleanAccuracy, Robust: c.RobustAccuracy,
			RobustLowerBound: c.RobustAccuracyLowerBound, Efficient: c.Efficient, Training: time.Duration(c.Seconds * float64(time.Second)),
		})
		p.Facts = append(p.Facts, report.Fact{Name: c.Name, Value: c.Reference})
	}
	return p
}

// Command is the step.
func Command() *cobra.Command {
	j := Job{Threat: attack.Threat{Norm: "linf"}}
	cmd := &cobra.Command{
		Use:   "sweep [NETWORK] --output REPOSITORY",
		Short: "Train candidates and show clean against robust accuracy",
		Long: `Train every recipe with every clean share and every seed, one after the other:
NETWORK from random weights, or --model further. Each candidate is pushed to the
output repository under its name, and judged on the validation split, clean and
under the attacks. Prints the references of the efficient candidates, which no
other beats in both accuracies, the most robust first; all figures with -o json,
and a plot with --report-html. Evaluate the one you choose on the test split.

With --checkpoints, SIGTERM keeps the state and exits with code 5; the same
command goes on.`,
		Example: `  temper sweep wong --recipes fast,n-fgsm --seeds 1,2,3 --output oci:out --report-html sweep.html
  temper sweep --model oci:out:standard --recipes fast --clean-shares 0,0.2,0.5 --output oci:out -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == (j.Model != "") {
				return step.BadInput(errors.New("give either a NETWORK to train or a --model to train further"))
			}
			given := cmd.Flags().Changed
			if len(args) == 1 {
				j.Network = args[0]
				definition, err := artifact.Definition(cmd.Context(), j.Network)
				if err != nil {
					return err
				}
				if j.Dataset == "" {
					j.Dataset = definition.Dataset
				}
				j.Threat.Norm = definition.Threat.Norm
				if !given("epsilon") {
					j.Threat.Epsilon = definition.Threat.Epsilon
				}
			}
			if j.Dataset == "" {
				j.Dataset = "mnist"
			}
			if j.Suite != "" && !given("attacks") {
				j.Attacks = nil
			}
			return j.Run(cmd.Context(), step.From(cmd))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&j.Model, "model", "", "the model to train further: a reference, or an ONNX file")
	flags.StringVar(&j.Dataset, "dataset", "", "mnist, a folder, URL#sha256:..., or a reference (default: the network's, or mnist)")
	flags.StringSliceVar(&j.Recipes, "recipes", []string{"fast"}, "recipes of the zoo or paths of YAML files, separated by commas")
	flags.StringSliceVar(&j.CleanShares, "clean-shares", nil, "shares of each batch that stay clean, separated by commas (default: each recipe's own)")
	flags.StringSliceVar(&j.Seeds, "seeds", []string{"1"}, "seeds, separated by commas")
	step.Float(flags, &j.Epochs, "epochs", 0, 0, train.MaxEpochs, "stretch or shrink the recipes to this many epochs; 0 keeps their own")
	step.Float(flags, &j.Threat.Epsilon, "epsilon", 0.3, 0, 1, "size of the attacker's perturbation, in pixels of [0,1] (the network's where there is one)")
	flags.StringSliceVar(&j.Attacks, "attacks", []string{"pgd-20", "apgd-ce"}, "attacks, separated by commas; none beside a --suite")
	flags.StringVar(&j.Suite, "suite", "", "ensemble of attacks: "+strings.Join(evaluate.Suites(), " or "))
	step.Int(flags, &j.Samples, "samples", 1000, 1, 1_000_000, "how many validation images, at most")
	flags.StringVar(&j.Checkpoints, "checkpoints", "", "folder that keeps the trainings' states, and that they go on from")
	flags.StringVar(&j.Page, "report-html", "", "file for the plot as an HTML page")
	flags.StringVar(&j.Output, "output", "", "repository for the candidates, without a tag: HOST/REPOSITORY or oci:FOLDER")
	cmd.MarkFlagRequired("output")
	return cmd
}
