package attack

import (
	"context"
	"fmt"
)

// PGDConfig says how hard PGD tries.
type PGDConfig struct {
	Steps    int
	Restarts int     // random starts tried on each image; 0 means 1
	Alpha    float64 // size of a step; 0 means epsilon/8, which takes 16 steps across the ball
}

// PGD is projected gradient descent (Madry et al. 2018) on the cross-entropy:
// from each random start a number of steps. Of the clean image and all
// iterates it returns the first that is misclassified, otherwise that of
// highest loss. So with the same alpha, more steps or more restarts never
// break fewer images.
func PGD(t Threat, c PGDConfig) Attack {
	c.Restarts = max(c.Restarts, 1)
	if c.Alpha == 0 {
		// The same for any number of steps, so that the path of pgd-20 begins
		// with that of pgd-10. The twenty steps have 2.5 epsilon of way: from any
		// start any point of the ball is within reach (Madry et al. 2018). Below
		// sixteen steps it is not.
		c.Alpha = t.Epsilon / 8
	}
	return pgd{fmt.Sprintf("pgd-%d", c.Steps) + times(c.Restarts), t, c}
}

// times is how a name tells of restarts.
func times(restarts int) string {
	if restarts > 1 {
		return fmt.Sprintf("x%d", restarts)
	}
	return ""
}

// Noise draws images from the ball and keeps the worst: an attack without a
// gradient that every honest one must beat.
func Noise(t Threat, draws int) Attack {
	name := "noise"
	if draws != noiseDraws {
		name = fmt.Sprintf("noise-%d", draws)
	}
	return pgd{name, t, PGDConfig{Restarts: draws}}
}

// pgd is PGD; without steps only its random starts remain.
type pgd struct {
	name   string
	threat Threat
	config PGDConfig
}

func (a pgd) Name() string { return a.name }

func (a pgd) Perturb(ctx context.Context, m Model, x []float32, labels []uint8, seed uint64) ([]float32, error) {
	ball, err := a.threat.Ball()
	if err != nil {
		return nil, err
	}
	if !(a.config.Alpha >= 0) || a.config.Steps < 0 {
		return nil, fmt.Errorf("attack %s: alpha is %v and steps are %d: must not be negative", a.name, a.config.Alpha, a.config.Steps)
	}
	return walkAll(ctx, m, a.threat, x, labels, a.config.Steps > 0, func() walker {
		return &pgdWalk{PGDConfig: a.config, ball: ball, seed: seed}
	})
}

type pgdWalk struct {
	PGDConfig
	ball          Ball
	seed          uint64
	restart, step int
	worst         float64 // highest loss so far
}

func (p *pgdWalk) begin(w *walk, logits []float32) {
	p.worst, p.restart = Value(logits, w.label), 0
	p.start(w)
}

func (p *pgdWalk) start(w *walk) {
	p.ball.RandomStart(w.x, w.clean, w.draw(p.seed, uint64(p.restart)))
	p.restart++
	p.step = 0
}

func (p *pgdWalk) slope(w *walk, logits, grad []float32) { crossEntropy(logits, grad, w.label) }

func (p *pgdWalk) visit(w *walk, logits, gradient []float32) bool {
	broken := Predict(logits) != int(w.label)
	if loss := Value(logits, w.label); broken || loss > p.worst {
		p.worst = loss
		copy(w.adv, w.x)
	}
	switch {
	case broken:
		return false
	case p.step < p.Steps:
		p.ball.Step(w.x, gradient, float32(p.Alpha))
		p.ball.Project(w.x, w.clean)
		p.step++
	case p.restart < p.Restarts:
		p.start(w)
	default:
		return false
	}
	return true
}
