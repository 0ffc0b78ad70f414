package signing_test

import (
	"reflect"
	"testing"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/signing/signingtest"
)

// What a report was held to is attested with its figures.
func TestChecksAreAttested(t *testing.T) {
	b := signingtest.Build(t, 1)
	report, err := evaluate.Decode(b.Report)
	if err != nil {
		t.Fatal(err)
	}
	report.Suite, report.Preprocessing = "standard", "none"
	report.Checks = []evaluate.Check{
		{Name: "converged", Pass: true, Rule: "a rule", Figures: map[string]float64{"drop": 0.002}},
		{Name: "logits", Pass: false, Rule: "another", Figures: map[string]float64{"probabilities": 1}},
	}
	if b.Report, err = report.Encode(); err != nil {
		t.Fatal(err)
	}
	r, err := b.Robustness("", "fast", 1)
	if err != nil {
		t.Fatal(err)
	}
	if r.Suite != "standard" || r.Preprocessing != "none" || len(r.Checks) != 2 {
		t.Fatalf("attested %+v", r)
	}
	for i, c := range report.Checks {
		a := r.Checks[i]
		if a.Name != c.Name || a.Pass != c.Pass || a.Rule != c.Rule || !reflect.DeepEqual(a.Figures, c.Figures) {
			t.Errorf("attested %+v, the report has %+v", a, c)
		}
	}
}
