package attack

import (
	"fmt"
	"math"

	"github.com/temper-ml/temper/models/nn"
)

// Loop is projected gradient ascent, the one loop behind FGSM, PGD and
// adversarial training.
type Loop struct {
	Model Model
	Ball  Ball
	Alpha float32 // size of a step, in the ball's norm
	steps int     // taken so far, for errors
}

// Step moves the first n images of x one step up their loss, inside the ball
// around the images of clean. Before an image moves, visit (if any) is told
// its logits and may return false to keep it, or put another image in its
// place. A nil loss means that no image moves. The step allocates no memory.
func (l *Loop) Step(x, clean []float32, n int, loss nn.Loss, visit func(row int, logits []float32) (move bool)) error {
	network := l.Model.Network()
	size, classes := network.Input.Size(), network.Classes()
	l.steps++
	var logits, gradient []float32
	var err error
	if loss == nil {
		logits, err = l.Model.Logits(x, n)
	} else {
		logits, gradient, err = l.Model.Gradient(x, n, loss)
	}
	if err != nil {
		return fmt.Errorf("attack: step %d: %w", l.steps, err)
	}
	for row := range n {
		at, end := row*size, (row+1)*size
		z := logits[row*classes : (row+1)*classes]
		if !finite(z) {
			return fmt.Errorf("attack: step %d: the logits of row %d are not finite: %v", l.steps, row, z)
		}
		move := visit == nil || visit(row, z)
		if loss == nil || !move {
			continue
		}
		if !finite(gradient[at:end]) {
			return fmt.Errorf("attack: step %d: the gradient of row %d is not finite", l.steps, row)
		}
		l.Ball.Step(x[at:end], gradient[at:end], l.Alpha)
		l.Ball.Project(x[at:end], clean[at:end])
	}
	return nil
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
