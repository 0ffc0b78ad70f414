package attack

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/kernel"
)

// Loop is projected gradient ascent on a whole batch, the loop of adversarial
// training and FGSM. It serves one goroutine at a time, and itself works on
// the rows of a batch from all processors.
type Loop struct {
	Model Model
	Ball  Ball
	Alpha float32 // size of a step, in the ball's norm
}

// ascender is a Model that takes rows through all steps without a meeting of
// goroutines after each; graph.Attack is one.
type ascender interface {
	Ascend(x []float32, n, steps int, loss nn.Loss, move func(step, lo, hi int, logits, gradient []float32) error) error
}

// Start moves the first n images of x to random starts around those of clean,
// drawn from a ball that may be narrower or wider than the loop's. What a row
// draws depends on the seed, the draw's number and the row only.
func (l *Loop) Start(ball Ball, x, clean []float32, n int, seed, draw uint64) {
	size := l.Model.Network().Input.Size()
	share(n, func(lo, hi int) {
		rng := rand.NewPCG(0, 0)
		for row := lo; row < hi; row++ {
			at, end := row*size, (row+1)*size
			Seed(rng, seed, draw, uint64(row))
			ball.RandomStart(x[at:end], clean[at:end], rng)
		}
	})
}

// Ascend moves the first n images of x by so many steps up their loss, inside the
// ball around the images of clean.
func (l *Loop) Ascend(x, clean []float32, n, steps int, loss nn.Loss) error {
	network := l.Model.Network()
	size, classes := network.Input.Size(), network.Classes()
	reach, linf := reachOf(l.Ball)
	move := func(step, lo, hi int, logits, gradient []float32) error {
		for row := range hi - lo {
			if z := logits[row*classes : (row+1)*classes]; !finite(z) {
				return fmt.Errorf("attack: step %d: the output %v of row %d is not finite", step+1, z, lo+row)
			}
			at, from := (lo+row)*size, gradient[row*size:(row+1)*size]
			x, clean, ok := x[at:at+size], clean[at:at+size], true
			if linf {
				ok = kernel.SignStep(x, clean, from, l.Alpha, reach)
			} else if ok = finite(from); ok {
				l.Ball.Step(x, from, l.Alpha)
				l.Ball.Project(x, clean)
			}
			if !ok {
				return fmt.Errorf("attack: step %d: the gradient of row %d is not finite", step+1, lo+row)
			}
		}
		return nil
	}
	if m, ok := l.Model.(ascender); ok {
		return m.Ascend(x, n, steps, loss, move)
	}
	for step := range steps {
		logits, gradient, err := l.Model.Gradient(x, n, loss)
		if err != nil {
			return fmt.Errorf("attack: step %d: %w", step+1, err)
		}
		if err := move(step, 0, n, logits, gradient); err != nil {
			return err
		}
	}
	return nil
}

// reachOf tells how far a ball's Project lets a pixel go, where its Step is along
// the gradient's sign: kernel.SignStep is both in one.
func reachOf(b Ball) (reach float32, ok bool) {
	switch r := b.(type) {
	case Linf:
		return r.reach(), true
	case Noisy:
		return 2, true // the box alone decides
	}
	return 0, false
}

// minShare is the number of rows below which a goroutine costs more than it
// saves.
const minShare = 16

// share divides n rows among the processors.
func share(n int, work func(lo, hi int)) {
	workers := max(1, min(runtime.GOMAXPROCS(0), n/minShare))
	var wait sync.WaitGroup
	for w := 1; w < workers; w++ {
		wait.Go(func() { work(w*n/workers, (w+1)*n/workers) })
	}
	work(0, n/workers)
	wait.Wait()
}

// finite reports whether no value is NaN or infinite: those are the float32
// whose exponent bits are all set, which adding one to the exponent carries
// into the sign.
func finite(x []float32) bool {
	carry := uint32(0)
	for _, v := range x {
		carry |= math.Float32bits(v)&^(1<<31) + 1<<23
	}
	return carry>>31 == 0
}
