package attack

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
)

// FGSM is the fast gradient sign method (Goodfellow et al. 2015): one step of
// epsilon up the cross-entropy from the clean image.
func FGSM(t Threat) Attack { return fgsm{t} }

type fgsm struct{ threat Threat }

func (fgsm) Name() string { return "fgsm" }

func (a fgsm) Perturb(ctx context.Context, m Model, x []float32, labels []uint8, _ uint64) ([]float32, error) {
	size, classes, err := check(m, a.threat, x, labels)
	if err != nil {
		return nil, err
	}
	ball, err := a.threat.Ball()
	if err != nil {
		return nil, err
	}
	loop := Loop{Model: m, Ball: ball, Alpha: float32(a.threat.Epsilon)}
	adv := append([]float32(nil), x...)
	for lo := 0; lo < len(labels); lo += m.Batch() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		hi := min(lo+m.Batch(), len(labels))
		if err := loop.Step(adv[lo*size:hi*size], x[lo*size:hi*size], hi-lo, CrossEntropy(labels[lo:hi], classes), nil); err != nil {
			return nil, err
		}
	}
	return adv, a.threat.Verify(adv, x)
}

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
	name := fmt.Sprintf("pgd-%d", c.Steps)
	if c.Restarts > 1 {
		name += fmt.Sprintf("x%d", c.Restarts)
	}
	return search{name, t, c}
}

// Noise draws images uniformly from the ball and keeps the worst: an attack
// without a gradient that every honest one must beat.
func Noise(t Threat, draws int) Attack {
	name := "noise"
	if draws != noiseDraws {
		name = fmt.Sprintf("noise-%d", draws)
	}
	return search{name, t, PGDConfig{Restarts: draws}}
}

// search is PGD; without steps only its random starts remain.
type search struct {
	name   string
	threat Threat
	config PGDConfig
}

func (s search) Name() string { return s.name }

// atClean is the step number of an image that is looked at unchanged, before
// its first random start.
const atClean = -1

func (s search) Perturb(ctx context.Context, m Model, x []float32, labels []uint8, seed uint64) ([]float32, error) {
	size, classes, err := check(m, s.threat, x, labels)
	if err != nil {
		return nil, err
	}
	ball, err := s.threat.Ball()
	if err != nil {
		return nil, err
	}
	if !(s.config.Alpha >= 0) || s.config.Steps < 0 {
		return nil, fmt.Errorf("attack %s: alpha is %v and steps are %d: must not be negative", s.name, s.config.Alpha, s.config.Steps)
	}

	// Each row of the batch works on an image of its own at its own step; a
	// row whose image is broken or used up takes the next image, so the batch
	// stays full until none are left.
	type slot struct {
		image, restart, step int
		worst                float64 // highest loss so far
	}
	batch := min(m.Batch(), len(labels))
	slots := make([]slot, 0, batch)
	work, clean := make([]float32, batch*size), make([]float32, batch*size)
	current := make([]uint8, batch)
	adv := make([]float32, len(x))
	row := func(x []float32, i int) []float32 { return x[i*size : (i+1)*size] }
	next := 0
	take := func(i int) bool {
		if next == len(labels) {
			return false
		}
		slots[i] = slot{image: next, step: atClean, worst: math.Inf(-1)}
		copy(row(work, i), row(x, next))
		copy(row(clean, i), row(x, next))
		current[i] = labels[next]
		next++
		return true
	}
	for i := range batch {
		slots = append(slots, slot{})
		take(i)
	}

	rng := rand.NewPCG(0, 0)
	const done = -1 // image of a slot that has nothing left to do
	visit := func(i int, logits []float32) (move bool) {
		s, at := s.config, &slots[i]
		broken := Predict(logits) != int(current[i])
		if loss := Value(logits, current[i]); broken || loss > at.worst {
			at.worst = loss
			copy(row(adv, at.image), row(work, i))
		}
		switch {
		case broken, at.step == s.Steps && at.restart == s.Restarts:
			if !take(i) {
				at.image = done
			}
		case at.step == s.Steps, at.step == atClean:
			Seed(rng, seed, uint64(at.image), uint64(at.restart))
			ball.RandomStart(row(work, i), row(clean, i), rng)
			at.restart++
			at.step = 0
		default:
			at.step++
			return true
		}
		return false
	}

	loop := Loop{Model: m, Ball: ball, Alpha: float32(s.config.Alpha)}
	loss := CrossEntropy(current, classes)
	if s.config.Steps == 0 {
		loss = nil
	}
	for len(slots) > 0 {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := loop.Step(work, clean, len(slots), loss, visit); err != nil {
			return nil, err
		}
		for i := 0; i < len(slots); i++ {
			if slots[i].image != done {
				continue
			}
			last := len(slots) - 1
			slots[i], current[i] = slots[last], current[last]
			copy(row(work, i), row(work, last))
			copy(row(clean, i), row(clean, last))
			slots = slots[:last]
			i--
		}
	}
	return adv, s.threat.Verify(adv, x)
}
