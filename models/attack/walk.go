package attack

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync/atomic"
)

// walker is what an attack does with one image: it looks at the network's
// answer where the image stands, and moves it on. Every row of a batch has a
// walker of its own, with memory for one image, so that rows need not be at the
// same step.
type walker interface {
	// begin takes on the image that w describes, with the logits of its clean
	// point, and moves w.x to the first point to look at.
	begin(w *walk, logits []float32)
	// slope writes the gradient of the loss with respect to the logits.
	slope(w *walk, logits, grad []float32)
	// visit is told the logits [classes] and the gradient [size] of w.x and
	// moves it on; false means that the image is done with. Attacks without
	// gradients get none.
	visit(w *walk, logits, gradient []float32) (more bool)
}

// walk is one image under attack.
type walk struct {
	x     []float32 // where the image stands: a row of the batch
	clean []float32
	adv   []float32 // the worst image within the threat so far, at first the clean one
	label uint8
	key   uint64 // of the image's random draws
	rng   rand.PCG
	image int  // index; none for a row with nothing left to do
	fresh bool // the clean point has not been looked at
	walker
}

const none = -1

// draw starts the image's random stream number i: it depends on the seed and
// the image itself only. So an image's fate is the same in any batch, order,
// selection or shard.
func (w *walk) draw(seed, i uint64) *rand.PCG {
	Seed(&w.rng, seed, w.key, i)
	return &w.rng
}

// keyOf is a number that stands for an image and its label.
func keyOf(clean []float32, label uint8) uint64 {
	key := mix(uint64(label))
	for _, v := range clean {
		key = mix(key ^ uint64(math.Float32bits(v)))
	}
	return key
}

// walkAll lets walkers attack the images x [len(labels), input] and returns
// the worst image that each found. An image that the network misclassifies
// unchanged is returned as it is. A row whose image is done with takes the
// next one, so that the batch stays full until none are left.
func walkAll(ctx context.Context, m Model, t Threat, x []float32, labels []uint8, gradients bool, newWalker func() walker) ([]float32, error) {
	size, classes, err := check(m, t, x, labels)
	if err != nil {
		return nil, err
	}
	batch := min(m.Batch(), len(labels))
	work, adv := make([]float32, batch*size), append([]float32(nil), x...)
	image := func(x []float32, i int) []float32 { return x[i*size : (i+1)*size : (i+1)*size] }
	next := 0
	take := func(w *walk) bool {
		if next == len(labels) {
			w.image = none
			return false
		}
		w.image, w.label, w.fresh = next, labels[next], true
		w.clean, w.adv = image(x, next), image(adv, next)
		copy(w.x, w.clean)
		next++
		return true
	}
	rows := make([]*walk, batch)
	for i := range rows {
		rows[i] = &walk{x: image(work, i), walker: newWalker()}
		take(rows[i])
	}
	loss := func(logits, grad []float32, lo, hi int) {
		for i, w := range rows[lo:hi] {
			z, g := logits[i*classes:(i+1)*classes], grad[i*classes:(i+1)*classes]
			if w.fresh {
				clear(g) // its walker does not know the image yet
			} else {
				w.slope(w, z, g)
			}
		}
	}

	var bad atomic.Int64 // a row whose logits or gradient are not finite, plus 1
	for step := 1; len(rows) > 0; step++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var logits, gradient []float32
		var err error
		if gradients {
			logits, gradient, err = m.Gradient(work, len(rows), loss)
		} else {
			logits, err = m.Logits(work, len(rows))
		}
		if err != nil {
			return nil, fmt.Errorf("attack: step %d: %w", step, err)
		}
		share(len(rows), func(lo, hi int) {
			for i := lo; i < hi; i++ {
				w, z := rows[i], logits[i*classes:(i+1)*classes]
				var g []float32
				if gradients {
					g = gradient[i*size : (i+1)*size]
				}
				switch {
				case !finite(z) || !finite(g):
					bad.Store(int64(i) + 1)
					return
				case w.fresh && Predict(z) != int(w.label):
					w.image = none
				case w.fresh:
					w.key, w.fresh = keyOf(w.clean, w.label), false
					w.begin(w, z)
				case !w.visit(w, z, g):
					w.image = none
				}
			}
		})
		if i := int(bad.Load()) - 1; i >= 0 {
			what := "gradient"
			if z := logits[i*classes : (i+1)*classes]; !finite(z) {
				what = fmt.Sprintf("output %v", z)
			}
			return nil, fmt.Errorf("attack: step %d: the %s of row %d is not finite", step, what, i)
		}
		for i := 0; i < len(rows); i++ {
			if rows[i].image != none || take(rows[i]) {
				continue
			}
			last := len(rows) - 1
			if i != last { // the last row moves here
				copy(image(work, i), rows[last].x)
				rows[i] = rows[last]
				rows[i].x = image(work, i)
			}
			rows = rows[:last]
			i--
		}
	}
	return adv, t.Verify(adv, x, size)
}
