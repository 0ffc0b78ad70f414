package attack

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/temper-ml/temper/models/nn"
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
	trail nn.Trail
	walker
}

const none = -1

// changer is a walker that changes a window of the image at a time.
type changer interface {
	// changed tells how w.x differs from the point that was looked at before.
	changed() (back bool, window nn.Window)
}

// follower is a Model that answers at the cost of what changed; see nn.Trail.
type follower interface {
	Follow(x []float32, changes []nn.Change) (logits []float32, err error)
}

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
// unchanged is returned as it is. Where the model has parts, each takes rows
// through all that their walkers want by itself, so that they stay in its
// core's cache.
func walkAll(ctx context.Context, m Model, t Threat, x []float32, labels []uint8, gradients bool, newWalker func() walker) ([]float32, error) {
	size, _, err := check(m, t, x, labels)
	if err != nil {
		return nil, err
	}
	parts := []Model{m}
	if d, ok := m.(interface{ Parts() []Model }); ok {
		parts = d.Parts()
	}
	c := &crowd{x: x, labels: labels, adv: append([]float32(nil), x...), size: size, newWalker: newWalker}
	group, ctx := errgroup.WithContext(ctx)
	for _, m := range parts {
		group.Go(func() error { return c.walk(ctx, m, gradients) })
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return c.adv, t.Verify(c.adv, x, size)
}

// crowd is all images under attack.
type crowd struct {
	x, adv    []float32
	labels    []uint8
	size      int
	newWalker func() walker
	taken     atomic.Int64 // images that some row has taken on
}

// walk takes rows of images through what their walkers want. A row whose image
// is done with takes the next one, so that the batch stays full until none are
// left.
func (c *crowd) walk(ctx context.Context, m Model, gradients bool) error {
	size, classes := c.size, m.Network().Classes()
	image := func(x []float32, i int) []float32 { return x[i*size : (i+1)*size : (i+1)*size] }
	take := func(w *walk) bool {
		next := int(c.taken.Add(1)) - 1
		if next >= len(c.labels) {
			w.image = none
			return false
		}
		w.image, w.label, w.fresh = next, c.labels[next], true
		w.clean, w.adv = image(c.x, next), image(c.adv, next)
		copy(w.x, w.clean)
		return true
	}
	work := make([]float32, min(m.Batch(), len(c.labels))*size)
	var rows []*walk
	for i := range len(work) / size {
		w := &walk{x: image(work, i)}
		if !take(w) {
			break
		}
		w.walker = c.newWalker()
		rows = append(rows, w)
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

	var changes []nn.Change
	follower, follows := m.(follower)
	for step := 1; len(rows) > 0; step++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		var logits, gradient []float32
		var err error
		_, changing := rows[0].walker.(changer)
		switch {
		case gradients:
			logits, gradient, err = m.Gradient(work, len(rows), loss)
		case changing && follows:
			changes = changes[:0]
			for _, w := range rows {
				c := nn.Change{Trail: &w.trail}
				if !w.fresh {
					c.Back, c.Window = w.walker.(changer).changed()
				}
				changes = append(changes, c)
			}
			logits, err = follower.Follow(work, changes)
		default:
			logits, err = m.Logits(work, len(rows))
		}
		if err != nil {
			return fmt.Errorf("attack: step %d: %w", step, err)
		}
		for i, w := range rows {
			z := logits[i*classes : (i+1)*classes]
			var g []float32
			if gradients {
				g = gradient[i*size : (i+1)*size]
			}
			switch {
			case !finite(z):
				return fmt.Errorf("attack: step %d: the output %v of image %d is not finite", step, z, w.image)
			case !finite(g):
				return fmt.Errorf("attack: step %d: the gradient of image %d is not finite", step, w.image)
			case w.fresh && Predict(z) != int(w.label):
				w.image = none
			case w.fresh:
				w.key, w.fresh = keyOf(w.clean, w.label), false
				w.begin(w, z)
			case !w.visit(w, z, g):
				w.image = none
			}
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
	return nil
}
