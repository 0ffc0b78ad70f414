package evaluate_test

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/recipe"
	"github.com/temper-ml/temper/models/train"
	"github.com/temper-ml/temper/models/zoo"
)

// The planted fakes: models that look robust to an attack and are not. Each is
// a real network trained on MNIST, behind something that fools attacks.

// digits are MNIST, and a network trained plainly on some of it.
var digits = sync.OnceValues(func() (*dataset.Splits, error) { return dataset.MNIST() })

// trained is a network trained on some of MNIST by one method.
func trained(t testing.TB, method string, images, epochs int) attack.Model {
	t.Helper()
	data, err := digits()
	if err != nil {
		t.Fatal(err)
	}
	model, err := zoo.Load("wong")
	if err != nil {
		t.Fatal(err)
	}
	net, err := nn.New(model.Network, 1)
	if err != nil {
		t.Fatal(err)
	}
	how := model.Train
	how.Phases = []recipe.Phase{{Method: method, Epochs: float64(epochs)}}
	if method == "fgsm" {
		how.Phases[0].EpsilonRampEpochs = 1
	}
	if _, err := train.Run(context.Background(), net, data.Train.Slice(0, images), nil, how, mnistThreat, 1, train.Options{}); err != nil {
		t.Fatal(err)
	}
	m, err := graph.NewAttack(net, 250)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

var mnistThreat = attack.Threat{Norm: "linf", Epsilon: 0.3}

// loud multiplies the logits, so that the cross-entropy has no gradient left.
type loud struct {
	attack.Model
	by     float32
	logits []float32
}

func (l *loud) louder(z []float32) []float32 {
	l.logits = append(l.logits[:0], z...)
	for i := range l.logits {
		l.logits[i] *= l.by
	}
	return l.logits
}

func (l *loud) Logits(x []float32, n int) ([]float32, error) {
	z, err := l.Model.Logits(x, n)
	return l.louder(z), err
}

func (l *loud) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	logits, dx, err = l.Model.Gradient(x, n, func(z, grad []float32, lo, hi int) {
		z = slices.Clone(z)
		for i := range z {
			z[i] *= l.by
		}
		loss(z, grad, lo, hi)
		for i := range grad {
			grad[i] *= l.by
		}
	})
	return l.louder(logits), dx, err
}

// quantised rounds every pixel to black or white first, which has no gradient.
type quantised struct{ attack.Model }

func (q quantised) round(x []float32, n int) []float32 {
	x = slices.Clone(x[:n*q.Network().Input.Size()])
	for i, v := range x {
		x[i] = 0
		if v >= 0.5 {
			x[i] = 1
		}
	}
	return x
}

func (q quantised) Logits(x []float32, n int) ([]float32, error) {
	return q.Model.Logits(q.round(x, n), n)
}

func (q quantised) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	logits, dx, err = q.Model.Gradient(q.round(x, n), n, loss)
	clear(dx)
	return logits, dx, err
}

// random adds noise to every image at every call.
type random struct {
	attack.Model
	rng *rand.Rand
}

func (r random) noisy(x []float32, n int) []float32 {
	x = slices.Clone(x[:n*r.Network().Input.Size()])
	for i := range x {
		x[i] = min(max(x[i]+float32(r.rng.NormFloat64())*0.3, 0), 1)
	}
	return x
}

func (r random) Logits(x []float32, n int) ([]float32, error) {
	return r.Model.Logits(r.noisy(x, n), n)
}

func (r random) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	return r.Model.Gradient(r.noisy(x, n), n, loss)
}

// soft gives probabilities instead of logits.
type soft struct{ attack.Model }

func (s soft) Logits(x []float32, n int) ([]float32, error) {
	z, err := s.Model.Logits(x, n)
	if err != nil {
		return nil, err
	}
	p := make([]float32, len(z))
	attack.Softmax(p, z, s.Network().Classes())
	return p, nil
}

// failed are the checks that a report fails, by default thresholds but for the
// number of samples.
func failed(t testing.TB, r *evaluate.Report) []string {
	t.Helper()
	limits := evaluate.DefaultThresholds()
	limits.MinSamples = r.Samples
	var names []string
	for _, name := range limits.CheckNames() {
		i := slices.IndexFunc(r.Checks, func(c evaluate.Check) bool { return c.Name == name })
		if i < 0 {
			t.Fatalf("check %s was not made", name)
		}
		if c := limits.Judge(r.Checks[i]); !c.Pass {
			t.Logf("fails: %s", c)
			names = append(names, name)
		}
	}
	return names
}

func accuracyUnder(t testing.TB, m attack.Model, spec string, n int) float64 {
	t.Helper()
	data, err := digits()
	if err != nil {
		t.Fatal(err)
	}
	return run(t, m, data.Test, evaluate.Options{Threat: mnistThreat, Attacks: []string{spec}, Samples: n}).Attacks[0].Accuracy
}

// standard is the suite with its checks.
func standard(t testing.TB, m attack.Model, n int) *evaluate.Report {
	t.Helper()
	data, err := digits()
	if err != nil {
		t.Fatal(err)
	}
	return run(t, m, data.Test, evaluate.Options{Threat: mnistThreat, Suite: "standard", Checks: true, CurvePoints: 8, CurveSamples: n / 2, Samples: n, Train: data.Train.Slice(0, 2000)})
}

func run(t testing.TB, m attack.Model, s *dataset.Set, o evaluate.Options) *evaluate.Report {
	t.Helper()
	r, err := evaluate.Run(context.Background(), m, s, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestCase46Case47Case48FakesAreBrokenAndFlagged(t *testing.T) {
	limits := evaluate.DefaultThresholds()
	policy := gate.Policy{
		Threat: mnistThreat, Suite: "standard", Checks: &limits,
		MinCleanAccuracy: 0.5, MinRobustAccuracy: 0.5, MinSamples: 1000, Confidence: 0.95,
	}
	naked := trained(t, "standard", 4000, 3)
	overfit := trained(t, "fgsm", 4000, 8)
	for name, c := range map[string]struct {
		m      attack.Model
		weak   string   // the attack that it withstands
		least  float64  // accuracy under that
		most   float64  // robust accuracy that the suite leaves
		checks []string // some of which it must fail
	}{
		"logits x 1000 (Case47)":      {&loud{Model: naked, by: 1000}, "fgsm", 0.5, 0.05, []string{"gradients"}},
		"1-bit quantisation (Case47)": {quantised{naked}, "pgd-20", 0.6, 0.9, []string{"gradients", "unbounded_attack_wins", "gradient_free_is_weaker"}},
		"noise at the input (Case48)": {random{naked, rand.New(rand.NewPCG(1, 2))}, "fgsm", 0, 0.05, []string{"deterministic"}},
		"probabilities (Case48)":      {soft{naked}, "fgsm", 0, 1, []string{"logits"}},
		"overfit to FGSM (Case46)":    {overfit, "fgsm", 0.6, 0.05, nil},
	} {
		t.Run(name, func(t *testing.T) {
			samples := 30
			if _, ok := c.m.(quantised); ok {
				samples = 12 // on which Square spends all of its queries
			}
			weak := accuracyUnder(t, c.m, c.weak, samples)
			r := standard(t, c.m, samples)
			t.Logf("clean %.3f, %s %.3f, suite %.3f", r.CleanAccuracy, c.weak, weak, r.RobustAccuracy)
			for _, a := range r.Attacks {
				t.Logf("%s %.3f", a.Name, a.Accuracy)
			}
			if weak < c.least || r.RobustAccuracy > c.most {
				t.Errorf("accuracy %v under %s, %v under the suite: want at least %v, at most %v", weak, c.weak, r.RobustAccuracy, c.least, c.most)
			}
			v, err := gate.Decide(policy, r, nil)
			if err != nil || v.Pass {
				t.Errorf("the gate: %v, %v", v, err)
			}
			for _, reason := range v.Reasons {
				if c.most < 0.1 && reason.Rule == "min_robust_accuracy" && reason.Pass {
					t.Errorf("the gate: %v", reason)
				}
			}
			got := failed(t, r)
			for _, name := range c.checks {
				if !slices.Contains(got, name) {
					t.Errorf("check %s passes", name)
				}
			}
		})
	}
}
