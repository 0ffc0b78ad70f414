package evaluate

import (
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/attack"
)

// For a linear model the bound is exact: it counts what the closed form and the
// attacks count. Every attack leaves at least as many right.
func TestCertifiedEqualsTheClosedForm(t *testing.T) {
	l := newLinear(t, 3)
	set := testSet(t, l, 400)
	x := make([]float32, set.Shape.Size())
	for _, epsilon := range []float64{0, 0.01, 0.05, 0.3} {
		r := run(t, l, set, Options{Threat: attack.Threat{Norm: "linf", Epsilon: epsilon}, Attacks: []string{"fgsm", "pgd-20", "noise-5"}, Certify: true})
		want := 0
		for i, y := range set.Labels {
			set.Read(x, i, i+1)
			if l.robust(x, int(y), epsilon) {
				want++
			}
		}
		if d := want - r.CertifiedCorrect; d < 0 || d > 2 { // rounding counts against the model
			t.Errorf("epsilon %v: %d certified, the closed form is %d", epsilon, r.CertifiedCorrect, want)
		}
		for _, a := range r.Attacks {
			if a.Correct < r.CertifiedCorrect {
				t.Errorf("epsilon %v: %s leaves %d right, though %d are certified", epsilon, a.Name, a.Correct, r.CertifiedCorrect)
			}
		}
		data, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Decode(data)
		if err != nil || *again.Certified != *r.Certified {
			t.Errorf("read back: %v (%v)", again, err)
		}
		again.CertifiedCorrect++
		if err := again.Validate(); err == nil {
			t.Error("a count that contradicts its share was accepted")
		}
	}
	if r := run(t, l, set, Options{Threat: attack.Threat{Norm: "linf", Epsilon: 0.1}, Attacks: []string{"fgsm"}}); r.Certified != nil {
		t.Error("a proof that nobody asked for")
	}
	if _, err := Run(t.Context(), l, set, Options{Threat: attack.Threat{Norm: "l2", Epsilon: 0.1}, Attacks: []string{"fgsm"}, Certify: true}); err == nil || !strings.Contains(err.Error(), "linf only") {
		t.Errorf("in l2: %v", err)
	}
}
