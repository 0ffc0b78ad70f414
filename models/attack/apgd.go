package attack

import (
	"context"
	"fmt"
	"math"
)

// Auto-PGD (Croce and Hein 2020, "Reliable evaluation of adversarial
// robustness"): projected gradient ascent with momentum, whose step is halved
// and which goes back to its best point when the loss stops rising.

// apgdSteps is AutoAttack's number of steps.
const apgdSteps = 100

const (
	apgdMomentum = 0.75 // share of the new step, the rest is of the one before
	apgdRises    = 0.75 // share of a window's steps in which the loss should rise
)

// apgdLoss is what a kind of APGD climbs: the loss of one row and, where grad
// is not nil, its gradient with respect to the logits.
type apgdLoss func(logits, grad []float32, label, target uint8) float64

// apgdLosses are the kinds of APGD by name; targeted ones try one class after
// the other.
var apgdLosses = map[string]struct {
	loss     apgdLoss
	targeted bool
	classes  int // that the loss needs
}{
	"apgd-ce": {func(logits, grad []float32, label, _ uint8) float64 {
		if grad != nil {
			crossEntropy(logits, grad, label)
		}
		return Value(logits, label)
	}, false, 2},
	"apgd-dlr": {func(logits, grad []float32, label, _ uint8) float64 { return dlr(logits, grad, label) }, false, 3},
	"apgd-t":   {targetedDLR, true, 4},
}

// APGD is Auto-PGD of some steps from each of some random starts; kind is
// apgd-ce (on the cross-entropy), apgd-dlr (on the difference of logits ratio)
// or apgd-t (on its targeted form, towards each of up to nine classes). It
// panics for another kind.
func APGD(t Threat, kind string, steps, restarts int) Attack {
	if _, ok := apgdLosses[kind]; !ok {
		panic("attack: no kind of APGD: " + kind)
	}
	return apgd{kind, t, steps, max(restarts, 1)}
}

type apgd struct {
	kind            string
	threat          Threat
	steps, restarts int
}

func (a apgd) Name() string {
	if a.steps == apgdSteps && a.restarts == 1 {
		return a.kind
	}
	return fmt.Sprintf("%s-%d", a.kind, a.steps) + times(a.restarts)
}

func (a apgd) Perturb(ctx context.Context, m Model, x []float32, labels []uint8, seed uint64) ([]float32, error) {
	ball, err := a.threat.Ball()
	if err != nil {
		return nil, err
	}
	kind := apgdLosses[a.kind]
	if n := m.Network().Classes(); n < kind.classes {
		return nil, fmt.Errorf("attack %s: its loss needs %d classes, the network has %d: use apgd-ce, fab-t and square", a.kind, kind.classes, n)
	}
	size := m.Network().Input.Size()
	return walkAll(ctx, m, a.threat, x, labels, true, func() walker {
		buffers := make([]float32, 4*size)
		buffer := func(i int) []float32 { return buffers[i*size : (i+1)*size] }
		return &apgdWalk{
			apgd: a, ball: ball.(surfaced), loss: kind.loss, targeted: kind.targeted, seed: seed,
			old: buffer(0), best: buffer(1), bestGradient: buffer(2), ahead: buffer(3),
		}
	})
}

type apgdWalk struct {
	apgd
	ball     surfaced
	loss     apgdLoss
	targeted bool
	seed     uint64

	targets []uint8
	run     int // from one start to one target
	target  uint8
	worst   float64 // greatest loss of all runs

	step         int // taken in this run
	eta          float64
	old          []float32 // where the step before began
	ahead        []float32 // where the step would lead without momentum
	lossNow      float64   // at the last point
	lossBest     float64
	best         []float32
	bestGradient []float32

	window     checkpoints
	rises      int     // steps of the window in which the loss rose
	lossBefore float64 // best loss at the last checkpoint
	halved     bool    // at the last checkpoint
}

func (p *apgdWalk) begin(w *walk, logits []float32) {
	p.worst, p.run = math.Inf(-1), 0
	if p.targeted {
		p.targets = targetsOf(p.targets, logits, w.label)
	}
	p.start(w)
}

// start begins a run from a random point.
func (p *apgdWalk) start(w *walk) {
	if p.targeted {
		p.target = p.targets[p.run/p.restarts]
	}
	p.ball.surfaceStart(w.x, w.clean, w.draw(p.seed, uint64(p.run)))
	p.run++
	p.step, p.eta = 0, 2*p.threat.Epsilon
	p.lossBest = math.Inf(-1)
	p.window, p.rises = newCheckpoints(p.steps), 0
}

func (p *apgdWalk) slope(w *walk, logits, grad []float32) { p.loss(logits, grad, w.label, p.target) }

func (p *apgdWalk) visit(w *walk, logits, gradient []float32) bool {
	if Predict(logits) != int(w.label) {
		copy(w.adv, w.x)
		return false
	}
	loss := p.loss(logits, nil, w.label, p.target)
	if p.step > 0 && loss > p.lossNow {
		p.rises++
	}
	p.lossNow = loss
	if loss > p.lossBest {
		p.lossBest = loss
		copy(p.best, w.x)
		copy(p.bestGradient, gradient)
	}
	switch {
	case p.step == 0:
		p.lossBefore, p.halved = loss, true // so that no best loss to compare with halves nothing
		copy(p.old, w.x)
	case p.step == p.steps:
		return p.end(w)
	case p.window.reached(p.step):
		stuck := !p.halved && p.lossBest <= p.lossBefore
		p.halved = stuck || float64(p.rises) <= apgdRises*float64(p.window.length)
		p.lossBefore, p.rises = p.lossBest, 0
		p.window.advance()
		if p.halved {
			p.eta /= 2
			copy(w.x, p.best)
			gradient = p.bestGradient
		}
	}
	p.move(w, gradient)
	return true
}

// move takes a step with momentum.
func (p *apgdWalk) move(w *walk, gradient []float32) {
	copy(p.ahead, w.x)
	p.ball.Step(p.ahead, gradient, float32(p.eta))
	p.ball.Project(p.ahead, w.clean)
	a := float32(apgdMomentum)
	if p.step == 0 {
		a = 1
	}
	x, old := w.x, p.old[:len(w.x)]
	for i, z := range p.ahead[:len(x)] {
		v := x[i]
		x[i] = v + a*(z-v) + (1-a)*(v-old[i])
		old[i] = v
	}
	p.ball.Project(x, w.clean)
	p.step++
}

// end keeps the run's best point where no other was better, and starts the
// next run, if any.
func (p *apgdWalk) end(w *walk) bool {
	if p.lossBest > p.worst {
		p.worst = p.lossBest
		copy(w.adv, p.best)
	}
	runs := p.restarts
	if p.targeted {
		runs *= len(p.targets)
	}
	if p.run == runs {
		return false
	}
	p.start(w)
	return true
}

// checkpoints are the steps at which APGD reconsiders its step size: after
// 0.22 of all, then after windows that become shorter by 0.03 each, down to
// 0.06.
type checkpoints struct {
	at            int // the next
	length        int // of the window that ends there
	shrink, least int
}

func newCheckpoints(steps int) checkpoints {
	share := func(percent int) int { return max(percent*steps/100, 1) }
	return checkpoints{at: share(22), length: share(22), shrink: share(3), least: share(6)}
}

func (c *checkpoints) reached(step int) bool { return step == c.at }

func (c *checkpoints) advance() {
	c.length = max(c.length-c.shrink, c.least)
	c.at += c.length
}
