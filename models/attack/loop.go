package attack

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"

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
	steps int     // taken so far, for errors
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

// Step moves the first n images of x one step up their loss, inside the ball
// around the images of clean.
func (l *Loop) Step(x, clean []float32, n int, loss nn.Loss) error {
	network := l.Model.Network()
	size, classes := network.Input.Size(), network.Classes()
	l.steps++
	logits, gradient, err := l.Model.Gradient(x, n, loss)
	if err != nil {
		return fmt.Errorf("attack: step %d: %w", l.steps, err)
	}
	for row := range n {
		if z := logits[row*classes : (row+1)*classes]; !finite(z) {
			return fmt.Errorf("attack: step %d: the output %v of row %d is not finite", l.steps, z, row)
		}
	}
	reach, linf := reachOf(l.Ball)
	var bad atomic.Int64 // a row whose gradient is not finite, plus 1
	share(n, func(lo, hi int) {
		for row := lo; row < hi; row++ {
			at, end := row*size, (row+1)*size
			if linf {
				if !kernel.SignStep(x[at:end], clean[at:end], gradient[at:end], l.Alpha, reach) {
					bad.Store(int64(row) + 1)
					return
				}
				continue
			}
			if !finite(gradient[at:end]) {
				bad.Store(int64(row) + 1)
				return
			}
			l.Ball.Step(x[at:end], gradient[at:end], l.Alpha)
			l.Ball.Project(x[at:end], clean[at:end])
		}
	})
	if row := bad.Load() - 1; row >= 0 {
		return fmt.Errorf("attack: step %d: the gradient of row %d is not finite", l.steps, row)
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
