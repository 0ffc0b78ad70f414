package detect

import (
	"context"
	"fmt"
	"slices"
	"sort"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/nn"
)

// Figure is how a detector fares on one kind of traffic.
type Figure struct {
	Traffic string  `json:"traffic"`
	Epsilon float64 `json:"epsilon,omitempty"` // of an attack
	Images  int     `json:"images"`
	Fooled  float64 `json:"fooled"`       // share that the served network answers otherwise than without the attack
	AUROC   float64 `json:"auroc"`        // of the score against that of the clean images
	AtFive  float64 `json:"at_5_percent"` // share detected where 5% of clean images would be
	Flagged float64 `json:"flagged"`      // share above the detector's own threshold
	Shifted float64 `json:"shifted"`      // share that is unlike the usual, and not flagged

	Simulated *Simulated `json:"simulated,omitempty"` // the alarms on streams of such requests
}

// Evaluation says how Evaluate measures.
type Evaluation struct {
	Attacks  []string  // as attack.Parse reads them
	Epsilons []float64 // of each attack
	Adaptive int       // steps of the adaptive attack; 0 leaves it out
	Seed     uint64
	Requests int                   // without an attack, of each simulation; 0 leaves simulations out
	Progress func(done, total int) // may be nil
}

// Evaluate measures the detector on n clean images: on them, on benign changes
// that it was not calibrated on, and on attacks, zero-knowledge (the attacker
// knows the served network) and adaptive (the attacker knows the guard, the
// squeezers and the score too).
func (d *Detector) Evaluate(ctx context.Context, served, guard attack.Model, x []float32, labels []uint8, e Evaluation) ([]Figure, error) {
	s, err := d.Scorer(served.Network())
	if err != nil {
		return nil, err
	}
	input := served.Network().Input
	clean, err := s.Score(x, len(labels))
	if err != nil {
		return nil, err
	}
	usual := hostility(clean)
	var figures []Figure
	total := 1 + len(TestShifts) + len(e.Attacks)*len(e.Epsilons)
	if e.Adaptive > 0 {
		total += len(e.Epsilons)
	}
	add := func(traffic string, epsilon float64, x []float32) error {
		scores, err := s.Score(x, len(labels))
		if err != nil {
			return fmt.Errorf("%s: %w", traffic, err)
		}
		f := Figure{Traffic: traffic, Epsilon: epsilon, Images: len(labels)}
		for i, score := range scores {
			for share, yes := range map[*float64]bool{&f.Fooled: score.Served != clean[i].Served, &f.Flagged: score.Flagged, &f.Shifted: score.Shifted} {
				if yes {
					*share++
				}
			}
		}
		for _, share := range []*float64{&f.Fooled, &f.Flagged, &f.Shifted} {
			*share /= float64(len(labels))
		}
		f.AUROC, f.AtFive = separation(usual, hostility(scores))
		switch {
		case e.Requests == 0:
		case epsilon > 0:
			f.Simulated, err = d.simulateAttack(clean, scores, e.Seed)
		default:
			f.Simulated, err = d.simulateBenign(scores, e.Requests, e.Seed)
			if err == nil && len(figures) > 0 { // the first is clean
				f.Simulated.Drift, err = d.simulateDrift(clean, scores, e.Seed)
			}
		}
		if err != nil {
			return err
		}
		figures = append(figures, f)
		if e.Progress != nil {
			e.Progress(len(figures), total)
		}
		return nil
	}
	if err := add("clean", 0, x); err != nil {
		return nil, err
	}
	for i, shift := range TestShifts {
		if err := add(shift.String(), 0, shift.Apply(x, len(labels), input, e.Seed+uint64(i))); err != nil {
			return nil, err
		}
	}
	for _, epsilon := range e.Epsilons {
		threat := attack.Threat{Norm: "linf", Epsilon: epsilon}
		for _, name := range e.Attacks {
			a, err := attack.Parse(name, threat)
			if err != nil {
				return nil, err
			}
			attacked, err := a.Perturb(ctx, served, x, labels, e.Seed)
			if err != nil {
				return nil, fmt.Errorf("%s at epsilon %v: %w", name, epsilon, err)
			}
			if err := add(a.Name(), epsilon, attacked); err != nil {
				return nil, err
			}
		}
		if e.Adaptive == 0 {
			continue
		}
		attacked, err := d.adaptive(ctx, served, guard, x, labels, threat, e)
		if err != nil {
			return nil, err
		}
		if err := add("adaptive", epsilon, attacked); err != nil {
			return nil, err
		}
	}
	return figures, nil
}

// adaptive attacks the served network and the detector at once. It goes down
// the sum of four losses, each the cross-entropy towards one wrong class: of
// the served network on the image and on what either squeezer makes of it (a
// squeezer's gradient is taken for that of the identity: BPDA, Athalye et al.
// 2018), and of the guard on the image. So answers agree on the wrong class.
// The trees have no gradient: of all iterates that fool the served network it
// keeps the one that the detector scores lowest, and of none the last.
func (d *Detector) adaptive(ctx context.Context, served, guard attack.Model, x []float32, labels []uint8, t attack.Threat, e Evaluation) ([]float32, error) {
	s, err := d.Scorer(served.Network())
	if err != nil {
		return nil, err
	}
	ball, err := t.Ball()
	if err != nil {
		return nil, err
	}
	input := served.Network().Input
	size, classes := input.Size(), served.Network().Classes()
	out := slices.Clone(x)
	batch := min(served.Batch(), guard.Batch(), scoreBatch)
	squeezed := make([]float32, batch*size)
	sum := make([]float32, batch*size)
	targets := make([]uint8, batch)
	for lo := 0; lo < len(labels); lo += batch {
		hi := min(lo+batch, len(labels))
		n := hi - lo
		clean, now := x[lo*size:hi*size], slices.Clone(x[lo*size:hi*size])
		best := make([]float64, n)
		for i := range best {
			best[i] = 2 // above every score
		}
		logits, err := served.Logits(clean, n)
		if err != nil {
			return nil, err
		}
		for i := range n {
			targets[i] = runnerUp(logits[i*classes:(i+1)*classes], labels[lo+i])
		}
		loss := attack.CrossEntropy(targets[:n], classes)
		for step := range e.Adaptive {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			clear(sum)
			for _, part := range []struct {
				model   attack.Model
				squeeze func(dst, x []float32, n int, s nn.Shape)
			}{{served, nil}, {guard, nil}, {served, squeezeMedian}, {served, func(dst, x []float32, _ int, _ nn.Shape) { squeezeBit(dst, x) }}} {
				at := now
				if part.squeeze != nil {
					at = squeezed[:n*size]
					part.squeeze(at, now, n, input)
				}
				_, gradient, err := part.model.Gradient(at, n, loss)
				if err != nil {
					return nil, fmt.Errorf("adaptive attack, step %d: %w", step, err)
				}
				for i, g := range gradient[:n*size] {
					sum[i] -= g // towards the target
				}
			}
			for i := range n {
				row := now[i*size : (i+1)*size]
				ball.Step(row, sum[i*size:(i+1)*size], float32(t.Epsilon/8))
				ball.Project(row, clean[i*size:(i+1)*size])
			}
			scores, err := s.Score(now, n)
			if err != nil {
				return nil, err
			}
			for i, score := range scores {
				last := step == e.Adaptive-1 && best[i] == 2
				if score.Served != int(labels[lo+i]) && score.Score < best[i] || last {
					best[i] = score.Score
					copy(out[(lo+i)*size:], now[i*size:(i+1)*size])
				}
			}
		}
	}
	return out, t.Verify(out, x, size)
}

// runnerUp is the class with the highest logit besides the label.
func runnerUp(logits []float32, label uint8) uint8 {
	best := -1
	for c, z := range logits {
		if c != int(label) && (best < 0 || z > logits[best]) {
			best = c
		}
	}
	return uint8(best)
}

func hostility(scores []Score) []float64 {
	out := make([]float64, len(scores))
	for i, s := range scores {
		out[i] = s.Score
	}
	slices.Sort(out)
	return out
}

// separation is the area under the ROC curve, ties counting half (Mann and
// Whitney), and the share of the hostile scores above the 95% quantile of the
// usual ones. Both are sorted.
func separation(usual, hostile []float64) (auroc, atFive float64) {
	wins := 0.0
	for _, v := range hostile {
		below := sort.SearchFloat64s(usual, v)
		upTo := sort.Search(len(usual), func(i int) bool { return usual[i] > v })
		wins += float64(below+upTo) / 2
	}
	five := at(usual, 0.95)
	above := len(hostile) - sort.Search(len(hostile), func(i int) bool { return hostile[i] > five })
	n := float64(len(hostile))
	return wins / n / float64(len(usual)), float64(above) / n
}
