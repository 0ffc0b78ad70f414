package report

import (
	"fmt"
	"strconv"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
)

// Evaluation is the page of one evaluation report; verdict may be nil.
func Evaluation(r *evaluate.Report, verdict *gate.Verdict) *Page {
	p := &Page{
		Title: fmt.Sprintf("%s on %s", r.Network, r.Dataset),
		Lead: fmt.Sprintf("Accuracy on %s, clean and against an attacker who may change %s %v. Bounds are one-sided, at %v%% confidence.",
			samples(r, "test examples"), map[bool]string{true: "an image by a distance of up to", false: "every pixel by up to"}[r.Threat.Norm == "l2"], r.Threat.Epsilon, 100*r.Confidence),
		Figures: []Figure{
			{Label: "Clean accuracy", Value: Percent(r.CleanAccuracy), Note: "at least " + Percent(r.CleanAccuracyLowerBound)},
			{Label: "Robust accuracy", Value: Percent(r.RobustAccuracy), Note: "worst case over all attacks, at least " + Percent(r.RobustAccuracyLowerBound)},
		},
		Accuracies: Accuracies(r.Network, r),
		Curve:      &Curve{Epsilon: r.Threat.Epsilon, Series: CurveSeries(r.Network, r)},
		Examples:   Examples(r.Network, r),
		Confusions: []Confusion{
			{"Clean", ClassNames(r), r.Confusion.Clean},
			{"Under attack", ClassNames(r), r.Confusion.Adversarial},
		},
		Checks:  r.Checks,
		Verdict: verdict,
		Facts:   Provenance(r),
	}
	if c := r.Certified; c != nil {
		p.Figures = append(p.Figures, Figure{Label: "Certified accuracy", Value: Percent(c.CertifiedAccuracy), Note: "proven against every attack, at least " + Percent(c.CertifiedAccuracyLowerBound)})
	}
	if verdict != nil {
		f := Figure{Label: "Gate", Value: verdict.String(), Note: fmt.Sprintf("%d rules", len(verdict.Reasons)), Tone: Bad}
		if verdict.Pass {
			f.Tone = Good
		}
		p.Figures = append(p.Figures, f)
	}
	return p
}

// Accuracies are the report's figures: clean, each attack, the worst case.
func Accuracies(model string, r *evaluate.Report) []Accuracy {
	all := []Accuracy{{model, "none", r.CleanCorrect, r.Samples, r.CleanAccuracy, r.CleanAccuracyLowerBound}}
	after := false // the suite's first attack
	for _, a := range r.Attacks {
		name := a.Name
		if a.MadeOn != "" {
			name += ", made on " + short(a.MadeOn)
		}
		if after && a.Tried > 0 {
			name = "then " + name
		}
		after = after || a.Tried > 0
		all = append(all, Accuracy{model, name, a.Correct, r.Samples, a.Accuracy, a.AccuracyLowerBound})
	}
	return append(all, Accuracy{model, "worst case", r.RobustCorrect, r.Samples, r.RobustAccuracy, r.RobustAccuracyLowerBound})
}

// CurveSeries are the report's lines of the security curve.
func CurveSeries(model string, r *evaluate.Report) []Series {
	var all []Series
	for _, s := range r.Curve {
		all = append(all, Series{model, s.Attack, s.Points})
	}
	return all
}

// Examples are the report's images with the model's predictions.
func Examples(model string, r *evaluate.Report) []Example {
	names := ClassNames(r)
	var all []Example
	for _, e := range r.Examples {
		all = append(all, Example{
			Shape: r.Shape, Clean: e.Clean, Adversarial: e.Adversarial, Label: names[e.Label],
			Predictions: []Prediction{{model, names[e.Prediction], names[e.AdversarialPrediction]}},
		})
	}
	return all
}

// ClassNames are the names of the report's classes, in order.
func ClassNames(r *evaluate.Report) []string {
	var names []string
	for _, c := range r.Classes {
		names = append(names, c.Name)
	}
	return names
}

// Provenance is what the report's figures rest on.
func Provenance(r *evaluate.Report) []Fact {
	return []Fact{
		{"Threat model", fmt.Sprintf("%s, ε = %v, pixels in [0, 1]", r.Threat.Norm, r.Threat.Epsilon)},
		{"Preprocessing", r.Preprocessing},
		{"Samples", samples(r, "of "+r.Dataset)},
		{"Data set", r.DatasetDigest},
		{"Model", r.ModelDigest},
		{"Seed", strconv.FormatUint(r.Seed, 10)},
	}
}

// samples says which examples were measured.
func samples(r *evaluate.Report, what string) string {
	if r.Drawn {
		return fmt.Sprintf("%s %s drawn by the seed", count(r.Samples), what)
	}
	return fmt.Sprintf("the first %s %s", count(r.Samples), what)
}
