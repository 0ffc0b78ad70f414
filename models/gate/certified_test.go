package gate

import (
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/interval"
)

func TestMinCertified(t *testing.T) {
	p := policy
	p.MinCertified = 0.9
	certified := func(correct int) *evaluate.Report {
		r := report(10000, 9900, 9300)
		r.Certified = &evaluate.Certified{
			CertifiedCorrect: correct, CertifiedAccuracy: float64(correct) / 10000,
			CertifiedAccuracyLowerBound: interval.Lower(correct, 10000, evaluate.Confidence),
		}
		return r
	}
	for correct, pass := range map[int]bool{9100: true, 9040: false, 0: false} { // 9040 of 10000 may be chance
		v, err := Decide(p, certified(correct), nil)
		if err != nil || v.Pass != pass {
			t.Errorf("%d certified: %v (%v)", correct, v, err)
		}
	}
	// No figure is not a pass, and a proof that an attack refutes is no proof.
	if v, err := Decide(p, report(10000, 9900, 9300), nil); err == nil || v.Pass || !strings.Contains(err.Error(), "--certify") {
		t.Errorf("without the figure: %v (%v)", v, err)
	}
	if v, err := Decide(p, certified(9301), nil); err == nil || v.Pass || !strings.Contains(err.Error(), "the proof or the attacks are wrong") {
		t.Errorf("more certified than robust: %v (%v)", v, err)
	}
	p.Threat.Norm = "l2"
	if err := p.Validate(); err == nil || !strings.Contains(err.Error(), "linf only") {
		t.Errorf("in l2: %v", err)
	}
}
