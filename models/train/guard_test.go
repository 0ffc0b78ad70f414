package train

import (
	"slices"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
)

// masked hides its gradient at the clean images, as a network does that is
// overfit to FGSM: a single step finds nothing, a random start does.
type masked struct {
	attack.Model
	clean []float32
}

func (m *masked) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	logits, dx, err = m.Model.Gradient(x, n, loss)
	for i := range dx {
		if slices.Contains(m.clean, x[i]) {
			dx[i] = 0
		}
	}
	return logits, dx, err
}

func toyGuard(t *testing.T) (*guard, *snapshot) {
	t.Helper()
	net, _ := mustTrain(t, mixture(), 1, Options{})
	model, err := graph.NewAttack(net, 32)
	if err != nil {
		t.Fatal(err)
	}
	held := toy(60, 2)
	g := &guard{heldOut: holdOut(held, 60, model, 0), good: newSnapshot(make([]float32, len(net.Flat())))}
	now := newSnapshot(net.Flat())
	g.reset(&now, 10)
	return g, &now
}

var wide = attack.Threat{Norm: "linf", Epsilon: 0.4}

func TestGuardRollsBackAnOverfitNetwork(t *testing.T) {
	g, now := toyGuard(t)
	g.model = &masked{g.model, g.x}
	before := slices.Clone(now.weights)
	now.updates = 100
	for i := range now.m {
		now.m[i], now.v[i] = 1, 1
		now.weights[i] *= 1.01 // the weights of the phase's start are others
	}
	back, err := g.check(now, 110, Phase{Method: "n-fgsm"}, wide, 0.4)
	if err != nil {
		t.Fatal(err)
	}
	if back == nil || back.Step != 110 || back.To != 10 || back.FGSM-back.PGD <= maxGap || !g.rescued {
		t.Fatalf("rollback %+v", back)
	}
	if !slices.Equal(now.weights, before) || now.updates != 0 || now.m[0] != 0 || now.v[0] != 0 {
		t.Error("the weights or the optimiser's state are not those of the phase's start")
	}
	m := methodAt(Phase{Method: "n-fgsm"}, 0.3, 0.3, g.rescued)
	if m.steps != rescueSteps || m.ball != attack.Linf(0.3) {
		t.Errorf("goes on with %+v: want PGD-3", m)
	}
	if p := methodAt(Phase{Method: "pgd", Steps: 7, Alpha: 0.1}, 0.3, 0.3, true); p.steps != 7 {
		t.Errorf("PGD-7 becomes PGD-%d", p.steps)
	}
	// PGD does not overfit to a single step: no gap counts there.
	if back, err := g.check(now, 120, Phase{Method: "pgd"}, wide, 0.4); err != nil || back != nil {
		t.Errorf("%+v, %v", back, err)
	}
}

func TestGuardRollsBackAFallAtFullEpsilonOnly(t *testing.T) {
	g, now := toyGuard(t)
	narrow := attack.Threat{Norm: "linf", Epsilon: 0.001}
	for _, threat := range []attack.Threat{narrow, wide} { // a ramp: harder, not worse
		if back, err := g.check(now, 20, Phase{Method: "pgd"}, threat, 0.4); err != nil || back != nil {
			t.Fatalf("%+v, %v", back, err)
		}
	}
	if g.goodStep != 20 {
		t.Errorf("good weights are those of step %d", g.goodStep)
	}
	if back, err := g.check(now, 30, Phase{Method: "pgd"}, narrow, 0.001); err != nil || back != nil {
		t.Fatalf("%+v, %v", back, err)
	}
	back, err := g.check(now, 40, Phase{Method: "pgd"}, wide, 0.4)
	if err != nil || back == nil || back.To != 30 {
		t.Errorf("rollback %+v, %v", back, err)
	}
}

// However often the guard steps in, a checkpoint holds it.
func TestRollbacksAreBounded(t *testing.T) {
	g, now := toyGuard(t)
	g.rollbacks = make([]Rollback, maxRollbacks)
	g.best = 2 // more than any accuracy: the next check fails
	const last = 1 << 40
	back, err := g.check(now, last, Phase{Method: "pgd"}, wide, 0.4)
	if err != nil || back == nil || len(g.rollbacks) != maxRollbacks || g.rollbacks[maxRollbacks-1].Step != last {
		t.Fatalf("%+v, %v: %d rollbacks are kept", back, err, len(g.rollbacks))
	}
	for i := range g.rollbacks { // as long as one can be
		g.rollbacks[i] = Rollback{Step: last, To: last, FGSM: 1. / 3 * 1e-5, PGD: 1. / 3 * 1e-5, Reason: back.Reason + back.Reason}
	}
	if _, err := encode(head{Rollbacks: g.rollbacks}, nil); err != nil {
		t.Error(err)
	}
}
