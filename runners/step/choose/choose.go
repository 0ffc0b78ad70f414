// Package choose is the step that takes the best of several evaluated models
// and puts it before the gate.
package choose

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
)

// maxCandidates is far above what anybody trains at a time, and bounds the
// reports that are read.
const maxCandidates = 256

// Candidate is a model with its evaluation report, both references by digest.
type Candidate struct {
	Model  string `json:"model"`
	Report string `json:"report"`
}

// Result is what the step prints.
type Result struct {
	Candidate
	Verdict string        `json:"verdict"` // pass or fail
	Reasons []gate.Reason `json:"reasons"`
}

// better orders candidates: one that passes before one that does not, then by
// robust and clean accuracy. All were measured on the same samples.
func better(a, b *judged) int {
	pass := func(j *judged) int {
		if j.verdict.Pass {
			return 1
		}
		return 0
	}
	return cmp.Or(
		cmp.Compare(pass(a), pass(b)),
		cmp.Compare(a.report.RobustAccuracyLowerBound, b.report.RobustAccuracyLowerBound),
		cmp.Compare(a.report.CleanAccuracyLowerBound, b.report.CleanAccuracyLowerBound),
	)
}

type judged struct {
	Candidate
	report  *evaluate.Report
	verdict gate.Verdict
}

// Choose judges every candidate by the policy, and against the report of the
// model in service where there is one ("" for none), and returns the best;
// among equals the first. A candidate that cannot be judged is an error.
func Choose(ctx context.Context, policy gate.Policy, candidates []Candidate, against string) (*Result, error) {
	if len(candidates) == 0 || len(candidates) > maxCandidates {
		return nil, step.BadInput(fmt.Errorf("%d candidates: must be 1 to %d", len(candidates), maxCandidates))
	}
	var inService *evaluate.Report
	if against != "" {
		r, err := artifact.ReadReport(ctx, against)
		if err != nil {
			return nil, err
		}
		inService = r.Report
	}
	var best *judged
	for _, c := range candidates {
		r, err := artifact.ReadReport(ctx, c.Report)
		if err != nil {
			return nil, err
		}
		v, err := gate.Decide(policy, r.Report, inService)
		if err != nil {
			return nil, step.BadInput(fmt.Errorf("%s: %w", c.Report, err))
		}
		if j := (&judged{c, r.Report, v}); best == nil || better(j, best) > 0 {
			best = j
		}
	}
	return &Result{best.Candidate, best.verdict.String(), best.verdict.Reasons}, nil
}

// Parse reads candidates from JSON: a list of objects with model and report.
// Other keys are let be: Argo lists all outputs of a step.
func Parse(text string) ([]Candidate, error) {
	var list []Candidate
	decoder := json.NewDecoder(strings.NewReader(text))
	if err := decoder.Decode(&list); err != nil {
		return nil, fmt.Errorf(`candidates: write a JSON list of {"model": ..., "report": ...}: %w`, err)
	}
	if decoder.More() {
		return nil, errors.New("candidates: something follows the JSON list")
	}
	for i, c := range list {
		if c.Model == "" || c.Report == "" {
			return nil, fmt.Errorf("candidate %d: model and report are needed", i)
		}
	}
	return list, nil
}

// Command is the step.
func Command() *cobra.Command {
	var policy, candidates, against string
	cmd := &cobra.Command{
		Use:   "choose --policy NAME --candidates JSON",
		Short: "Take the best of several evaluated models",
		Long: `Put each candidate before the gate and take the best: one that passes before one
that does not, then the most robust, then the most accurate. The verdict is that
on the chosen one, pass or fail, and the exit code 0 in either case. Prints the
chosen model's reference.`,
		Example: `  temper choose --policy wong --candidates '[{"model": "oci:out@sha256:...", "report": "oci:out@sha256:..."}]'`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, s := cmd.Context(), step.From(cmd)
			definition, err := artifact.Definition(ctx, policy)
			if err != nil {
				return fmt.Errorf("policy: %w", err)
			}
			list, err := Parse(candidates)
			if err != nil {
				return step.BadInput(err)
			}
			r, err := Choose(ctx, definition.Policy, list, against)
			if err != nil {
				return err
			}
			for _, reason := range r.Reasons {
				s.Log.Info("gate: " + reason.String())
			}
			s.Log.Info("chosen", "of", len(list), "model", r.Model, "verdict", r.Verdict)
			if err := s.Results(map[string]string{"model": r.Model, "report": r.Report, "verdict": r.Verdict}); err != nil {
				return err
			}
			return s.Print(r.Model, r)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&policy, "policy", "", "model of the zoo, YAML file or reference of one, whose gate policy decides")
	flags.StringVar(&candidates, "candidates", "", `JSON list of {"model": REF, "report": REF}`)
	flags.StringVar(&against, "against", "", "report of the model in service, a reference or JSON file: the gate then refuses a step back")
	cmd.MarkFlagRequired("policy")
	cmd.MarkFlagRequired("candidates")
	return cmd
}
