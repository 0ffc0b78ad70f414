package train

import (
	"fmt"

	"github.com/temper-ml/temper/models/attack"
)

const (
	guardEvery  = 100 // steps
	guardImages = 256 // held out
	guardSteps  = 10  // of PGD, a quarter of epsilon each: they cross the ball
	// maxGap is how much more accurate a network may be under FGSM than under
	// PGD before it counts as overfit to single steps.
	maxGap = 0.25
	// maxFall is how far accuracy under PGD may fall below its best.
	maxFall = 0.15
	// maxRollbacks bounds what a checkpoint holds of them: a training that needs
	// so many has failed, and the log has them all.
	maxRollbacks = 1000
)

// Rollback is one intervention of the guard.
type Rollback struct {
	Step   int     `json:"step"` // at which it was noticed
	To     int     `json:"to"`   // step whose weights the training went back to
	FGSM   float64 `json:"fgsm_accuracy"`
	PGD    float64 `json:"pgd_accuracy"`
	Reason string  `json:"reason"`
}

// guard watches for catastrophic overfitting: training on single-step attacks
// may collapse within a few hundred steps to a network that withstands those
// and nothing else (Wong et al. 2020). It looks at the raw weights, in which
// the collapse shows before it reaches their moving average.
type guard struct {
	heldOut

	best      float64  // accuracy under PGD at the phase's full epsilon so far
	rescued   bool     // single-step methods are replaced by PGD from now on
	good      snapshot // the last weights that passed, or the phase's first
	goodStep  int
	rollbacks []Rollback
}

// reset forgets the phase before.
func (g *guard) reset(now *snapshot, step int) {
	g.best = 0
	g.keep(now, step)
}

func (g *guard) keep(now *snapshot, step int) {
	g.good.copyFrom(now)
	g.goodStep = step
}

// check looks at the weights after step steps of training, and rolls now back
// where they have collapsed.
func (g *guard) check(now *snapshot, step int, p Phase, threat attack.Threat, full float64) (*Rollback, error) {
	fgsm, err := g.accuracy(attack.FGSM(threat))
	if err != nil {
		return nil, fmt.Errorf("guard: %w", err)
	}
	pgd, err := g.accuracy(attack.PGD(threat, attack.PGDConfig{Steps: guardSteps, Alpha: threat.Epsilon / 4}))
	if err != nil {
		return nil, fmt.Errorf("guard: %w", err)
	}
	reason := ""
	// Training on several steps does not overfit to one; there a gap only
	// says that the training is young.
	singleStep := (p.Method == "fgsm" || p.Method == "n-fgsm") && !g.rescued
	switch {
	case singleStep && fgsm-pgd > maxGap:
		reason = fmt.Sprintf("FGSM accuracy exceeds PGD accuracy by more than %.2f", maxGap)
	case pgd < g.best-maxFall:
		reason = fmt.Sprintf("PGD accuracy fell by more than %.2f from %.3f", maxFall, g.best)
	}
	if reason == "" {
		if threat.Epsilon == full {
			g.best = max(g.best, pgd)
		}
		g.keep(now, step)
		return nil, nil
	}
	now.copyFrom(&g.good)
	g.rescued = true
	g.rollbacks = g.rollbacks[max(0, len(g.rollbacks)+1-maxRollbacks):] // the latest
	g.rollbacks = append(g.rollbacks, Rollback{Step: step, To: g.goodStep, FGSM: fgsm, PGD: pgd, Reason: reason})
	return &g.rollbacks[len(g.rollbacks)-1], nil
}
