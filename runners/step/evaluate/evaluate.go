// Package evaluate is the step that measures a model, clean and under attack,
// and puts the report before the gate.
package evaluate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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

// Job is one evaluation: of a model, or of the parts that its shards measured.
type Job struct {
	Model    string // a reference, or an ONNX file
	Dataset  string
	Threat   attack.Threat
	Attacks  []string
	Suite    string
	Checks   bool
	Certify  bool
	Transfer string // another model to make examples on: a reference, or an ONNX file; "" for none
	Samples  int
	Drawn    bool // the samples, by the seed
	Seed     uint64
	Shard    string   // "2/8" for the second of eight parts; "" for all
	Parts    []string // of an evaluation that was measured in shards: references or files

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

// Part is what the step prints of a shard.
type Part struct {
	Reference string  `json:"reference"`
	Digest    string  `json:"digest"`
	Shard     int     `json:"shard"`
	Shards    int     `json:"shards"`
	Samples   int     `json:"samples"` // of this shard
	Seconds   float64 `json:"seconds"`
}

// Run measures, decides, writes what was asked for and says what it found.
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
	parts, m, err := j.parts(ctx, s)
	if err != nil {
		return err
	}
	if j.Shard != "" {
		return j.keep(ctx, s, parts[0], started)
	}
	thresholds := models.DefaultThresholds()
	if j.Policy != nil && j.Policy.Checks != nil {
		thresholds = *j.Policy.Checks
	}
	r, err := models.Reduce(parts, thresholds)
	if err != nil {
		return step.BadInput(err)
	}
	if m != nil && r.ModelDigest != m.Digest {
		return step.BadInput(fmt.Errorf("the parts are about the model %s, not about %s", r.ModelDigest, m.Reference))
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
	if j.Output != "" {
		if m == nil {
			m = &artifact.Model{} // attached to none
		}
		if result.Reference, result.Digest, err = artifact.PushReport(ctx, j.Output, r, page.Bytes(), m); err != nil {
			return err
		}
	}
	if j.Page != "" { // last: a folder that is not there loses nothing
		if err := step.WriteFile(j.Page, page.Bytes(), 0o644); err != nil {
			return err
		}
	}
	timed := *r
	timed.Seconds = time.Since(started).Seconds()
	result.Report = &timed
	return result.tell(s)
}

// parts measures the model, or its shard, or reads what shards measured; the
// model is nil where only the parts were named.
func (j *Job) parts(ctx context.Context, s *step.Step) (parts []*models.Part, m *artifact.Model, err error) {
	if j.Model != "" {
		if m, err = artifact.ReadModel(ctx, j.Model); err != nil {
			return nil, nil, err
		}
	}
	if len(j.Parts) > 0 {
		for _, ref := range j.Parts {
			p, err := artifact.ReadPart(ctx, ref)
			if err != nil {
				return nil, nil, err
			}
			parts = append(parts, p)
		}
		return parts, m, nil
	}
	o := models.Options{
		Threat: j.Threat, Attacks: j.Attacks, Suite: j.Suite, Checks: j.Checks, Certify: j.Certify, Samples: j.Samples, Drawn: j.Drawn, Seed: j.Seed,
		CurvePoints: curvePoints, Examples: examples,
		ModelDigest: m.Digest, Progress: s.Progress,
		Made: func(t models.Trial, tried, left int, took time.Duration) {
			if t.For != "curve" {
				s.Log.Info("made", "attack", t.Attack, "for", t.For, "epsilon", t.Epsilon, "on", tried, "left", left, "seconds", took.Seconds())
			}
		},
	}
	if j.Shard != "" {
		if o.Shard, o.Shards, err = parseShard(j.Shard); err != nil {
			return nil, nil, step.BadInput(err)
		}
	}
	splits, err := artifact.OpenDataset(ctx, j.Dataset)
	if err != nil {
		return nil, nil, err
	}
	o.Train = splits.Train
	target, err := graph.NewAttack(m.Network, batch)
	if err != nil {
		return nil, nil, err
	}
	if j.Transfer != "" {
		source, err := artifact.ReadModel(ctx, j.Transfer)
		if err != nil {
			return nil, nil, err
		}
		o.SourceDigest = source.Digest
		if o.Source, err = graph.NewAttack(source.Network, batch); err != nil {
			return nil, nil, err
		}
	}
	s.Log.Info("evaluating", "model", m.Reference, "dataset", splits.Name, "suite", j.Suite, "attacks", strings.Join(j.Attacks, ","), "epsilon", j.Threat.Epsilon, "samples", j.Samples)
	p, err := models.Measure(ctx, target, splits.Test, o)
	if err != nil {
		return nil, nil, step.BadInput(err)
	}
	return []*models.Part{p}, m, nil
}

// keep pushes a shard's part and tells of it.
func (j *Job) keep(ctx context.Context, s *step.Step, p *models.Part, started time.Time) error {
	ref, digest, err := artifact.PushPart(ctx, j.Output, p)
	if err != nil {
		return err
	}
	s.Log.Info("measured", "shard", j.Shard, "samples", len(p.Labels), "part", ref)
	if err := s.Results(map[string]string{"reference": ref, "digest": digest}); err != nil {
		return err
	}
	return s.Print(ref, Part{ref, digest, p.Shard, p.Shards, len(p.Labels), time.Since(started).Seconds()})
}

// parseShard reads "2/8".
func parseShard(text string) (shard, shards int, err error) {
	first, second, ok := strings.Cut(text, "/")
	if ok {
		shard, err = strconv.Atoi(first)
		if err == nil {
			shards, err = strconv.Atoi(second)
		}
	}
	if !ok || err != nil || shard < 1 || shard > shards || shards > maxShards {
		return 0, 0, fmt.Errorf("--shard %q: write SHARD/SHARDS, such as 2/8, from 1 to at most %d", text, maxShards)
	}
	return shard, shards, nil
}

// maxShards is far above what a cluster runs at once.
const maxShards = 10_000

// partsOf reads the parts' references: one an argument, or all of them as the
// JSON list in which Argo passes on what its steps made.
func partsOf(args []string) ([]string, error) {
	var all []string
	for _, arg := range args {
		if !strings.HasPrefix(strings.TrimSpace(arg), "[") {
			all = append(all, arg)
			continue
		}
		var list []string
		if err := json.Unmarshal([]byte(arg), &list); err != nil {
			return nil, step.BadInput(fmt.Errorf("--reduce: the list of parts %.100q: %w", arg, err))
		}
		all = append(all, list...)
	}
	if len(all) == 0 || len(all) > maxShards {
		return nil, step.BadInput(fmt.Errorf("--reduce: %d parts: name each part that a shard made, at most %d", len(all), maxShards))
	}
	return all, nil
}

// tell narrates the figures and gives the results.
func (r *Result) tell(s *step.Step) error {
	s.Log.Info("clean", "accuracy", r.CleanAccuracy, "at_least", r.CleanAccuracyLowerBound)
	for _, a := range r.Attacks {
		s.Log.Info("attacked", "attack", a.Name, "accuracy", a.Accuracy, "at_least", a.AccuracyLowerBound)
	}
	for _, c := range r.Checks {
		if c.Pass {
			s.Log.Info("check passed", "check", c.String())
		} else {
			s.Log.Warn("check failed", "check", c.String())
		}
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
		reduce              bool
		minClean, minRobust float64
		normalise           artifact.Normalisation
	)
	cmd := &cobra.Command{
		Use:   "evaluate --model REF",
		Short: "Measure a model, clean and under attack",
		Long: `Measure how often a model is right on the first test images, clean, under each
attack, and under the worst attack for each image, with 95% lower bounds. The
attacker has the model's weights. Prints the report's reference with --output,
and all figures with -o json.

--suite standard is AutoAttack's ensemble: APGD-CE, APGD-T, FAB-T and Square,
each on what the ones before it left. With it come the checks without which no
figure is to be believed, unless --checks=false. Single attacks: fgsm, pgd-STEPS,
pgd-STEPSxRESTARTS, noise, apgd-ce, apgd-dlr, apgd-t, fab-t, square.

The images are the first ones, or drawn by --seed, and with --samples 0 all.

--shard measures one of several equal parts and pushes it to --output; --reduce
counts the parts, named as arguments or as one JSON list, to the very figures of
one run.

With --policy the gate decides: the verdict is pass or fail, and the exit code 0
in either case.`,
		Example: `  temper evaluate --model model.onnx --suite standard --epsilon 0.3 --samples 1000 -o json
  temper evaluate --model oci:out:robust --output oci:out:report
  temper evaluate --model model.onnx --epsilon 0.15 --attacks fgsm,pgd-50x10 --samples 500 -o json
  temper evaluate --model mine.onnx --mean 0.491,0.482,0.447 --std 0.247,0.243,0.262 --dataset ./cifar --epsilon 0.03
  temper evaluate --model oci:out:robust --policy wong --against oci:out:report-before --report-html report.html
  temper evaluate --model oci:out:robust --suite standard --shard 1/2 --output oci:out:part-1
  temper evaluate --reduce oci:out:part-1 oci:out:part-2 --output oci:out:report`,
		RunE: func(cmd *cobra.Command, args []string) error {
			given := cmd.Flags().Changed
			refuse := func(flags []string, why string) error {
				for _, flag := range flags {
					if given(flag) {
						return step.BadInput(fmt.Errorf("--%s %s", flag, why))
					}
				}
				return nil
			}
			switch {
			case reduce:
				if err := refuse([]string{"shard", "attacks", "suite", "checks", "certify", "transfer-from", "norm", "epsilon", "samples", "seed", "dataset"}, "is of the measuring: the parts to reduce have it"); err != nil {
					return err
				}
				var err error
				if j.Parts, err = partsOf(args); err != nil {
					return err
				}
			case len(args) > 0:
				return step.BadInput(fmt.Errorf("argument %q: only --reduce takes arguments", args[0]))
			case j.Model == "":
				return step.BadInput(errors.New("--model is missing: name a reference, a folder or an ONNX file"))
			}
			j.Model = normalise.Of(j.Model)
			if j.Shard != "" {
				if err := refuse([]string{"against", "report-html", "min-clean-accuracy", "min-robust-accuracy"}, "is of the whole: give it with --reduce"); err != nil {
					return err
				}
				if j.Output == "" {
					return step.BadInput(errors.New("--shard needs --output, which gets the part"))
				}
			}
			j.Drawn = j.Seed != 0
			j.Seed = max(j.Seed, 1)
			if j.Suite != "" && !given("attacks") {
				j.Attacks = nil
			}
			if !given("checks") {
				j.Checks = j.Suite != ""
			}
			if policy == "" {
				if err := refuse([]string{"min-clean-accuracy", "min-robust-accuracy", "against"}, "is for the gate: give a --policy too"); err != nil {
					return err
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
			if !given("epsilon") && !given("norm") {
				j.Threat = j.Policy.Threat
			}
			if !given("attacks") {
				j.Attacks = j.Policy.Attacks
			}
			if j.Suite == "" {
				j.Suite = j.Policy.Suite
			}
			if !given("checks") {
				j.Checks = j.Policy.Checks != nil
			}
			if !given("samples") {
				j.Samples = max(j.Samples, j.Policy.MinSamples)
			}
			return j.Run(cmd.Context(), step.From(cmd))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&j.Model, "model", "", "the model: a reference, a folder of an artifact, or an ONNX file")
	normalise.Flags(flags)
	flags.StringVar(&j.Dataset, "dataset", "mnist", "mnist, a folder of IDX files, of images or of CIFAR-10, URL#sha256:..., or a reference")
	flags.StringVar(&j.Threat.Norm, "norm", "linf", "norm of the perturbation: "+strings.Join(attack.Norms(), " or "))
	step.Float(flags, &j.Threat.Epsilon, "epsilon", 0.3, 0, 1000, "size of the perturbation, in pixels of [0,1]; the policy's where there is one")
	flags.StringSliceVar(&j.Attacks, "attacks", []string{"fgsm", "pgd-20"}, "attacks, separated by commas; the policy's where there is one; none beside a --suite")
	flags.StringVar(&j.Suite, "suite", "", "ensemble of attacks: "+strings.Join(models.Suites(), " or ")+"; empty for the policy's, if there is one")
	flags.BoolVar(&j.Checks, "checks", false, "check whether the figures are to be believed (default: with a suite, and as the policy asks)")
	flags.StringVar(&j.Transfer, "transfer-from", "", "another model, a reference or an ONNX file, that examples are made on too")
	step.Int(flags, &j.Samples, "samples", 1000, 0, 1_000_000, "how many test images, 0 for all; at least the policy's where there is one")
	flags.Uint64Var(&j.Seed, "seed", 0, "draws the images and the attacks' random starts; 0 for the first images, and starts drawn by 1")
	flags.BoolVar(&j.Certify, "certify", false, "also prove, by interval bounds, how many answers no attack can change; on where the policy asks for it")
	flags.StringVar(&j.Shard, "shard", "", "measure one part only, such as 2/8 for the second of eight, and push it to --output")
	flags.BoolVar(&reduce, "reduce", false, "count the parts that shards measured: the arguments")
	flags.StringVar(&policy, "policy", "", "model of the zoo, YAML file or reference of one, whose gate policy decides")
	step.Fraction(flags, &minClean, "min-clean-accuracy", 0, "least lower bound of the clean accuracy, instead of the policy's")
	step.Fraction(flags, &minRobust, "min-robust-accuracy", 0, "least lower bound of the robust accuracy, instead of the policy's")
	flags.StringVar(&j.Against, "against", "", "report of the model in service, a reference or JSON file: the gate then refuses a step back")
	flags.StringVar(&j.Page, "report-html", "", "file for the report as an HTML page")
	flags.StringVar(&j.Output, "output", "", "reference to push the report to; in the model's repository it is attached to the model")
	return cmd
}
