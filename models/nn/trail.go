package nn

import (
	"slices"

	"github.com/temper-ml/temper/models/nn/kernel"
)

// Window is a rectangle of an image's pixels.
type Window struct{ Top, Left, Height, Width int }

func (w Window) empty() bool { return w.Height <= 0 || w.Width <= 0 }

// Trail remembers what the first layers of a network made of an image, so that the
// answer to the same image with some pixels changed costs only what those layers
// see of the change. It belongs to one Forward or to several of one network. The zero
// Trail remembers nothing.
type Trail struct {
	maps   [][]float32 // what each of the layers takes, with the border that it wants; last what the last one makes
	before []patch     // of the maps, before the last change
}

// patch is a window of a map, line after line.
type patch struct {
	Window
	values []float32
}

// Change tells how an image differs from the one that its Trail remembers.
type Change struct {
	*Trail
	Back   bool   // first the change before, if it was of a window, is taken back
	Window Window // then these pixels are others; where it is empty, all are
}

// local is a layer each of whose outputs sees a window of its input only.
type local struct {
	in      Shape
	border  int // around the input
	reach   func(w Window) Window
	forward func(y []float32, line int, x []float32, w Window) // lines of w, line apart, from the input with its border
}

// maxTrail bounds the values that a Trail remembers of an image: a batch has many.
const maxTrail = 64 << 10

// follow adds a layer to the local ones, if it is one and all before it are. Its
// output has the given shape, that of the pool for a ConvPool.
func (f *Forward) follow(layer int, weighted kernel.Weighted, out Shape) bool {
	n := f.network
	if len(f.locals) < len(f.layers) || !n.TakenOnce(layer-1, layer) {
		return false
	}
	l := local{in: n.shapes[layer], reach: func(w Window) Window { return w }}
	_, bias := n.Weights(layer)
	relu := n.Layers[layer].ReLU()
	var conv *kernel.Conv
	size := 1 // of pooling
	switch w := weighted.(type) {
	case *kernel.Conv:
		conv = w
		l.forward = func(y []float32, line int, x []float32, to Window) {
			w.Window(y, line, x, f.weights[layer], bias, relu, to.Top, to.Left, to.Height, to.Width)
		}
	case *kernel.ConvPool:
		conv, size = &w.Conv, w.Size
		l.forward = func(y []float32, line int, x []float32, to Window) {
			w.Window(y, line, x, f.weights[layer], bias, to.Top, to.Left, to.Height, to.Width)
		}
	case nil:
		function := n.pixelwise(layer)
		if function == nil {
			return false
		}
		from := [][]float32{nil}
		l.forward = func(y []float32, line int, x []float32, to Window) {
			width, channels := l.in.Width, l.in.Channels
			for i := range to.Height {
				from[0] = x[((to.Top+i)*width+to.Left)*channels:]
				function.Forward(y[i*line:], from, to.Width)
			}
		}
	default:
		return false
	}
	if conv != nil {
		l.border = conv.Padding
		grain := conv.Grain()
		span := func(at, n, most int) (int, int) { // the outputs along one axis that see n inputs
			first := max((at+conv.Padding-conv.Kernel+conv.Stride)/conv.Stride, 0)
			last := (at + n - 1 + conv.Padding) / conv.Stride
			first = first / grain * grain / size
			last = min((last/grain*grain+grain-1)/size, most-1)
			return first, max(last-first+1, 0)
		}
		l.reach = func(w Window) (to Window) {
			if w.empty() {
				return w
			}
			to.Top, to.Height = span(w.Top, w.Height, out.Height)
			to.Left, to.Width = span(w.Left, w.Width, out.Width)
			return to
		}
	}
	values := l.values() + out.Size()
	for _, before := range f.locals {
		values += before.values()
	}
	if values > maxTrail {
		return false
	}
	f.locals = append(f.locals, l)
	return true
}

// TakenOnce tells whether a layer's output, that of -1 being the network's input, is
// all that another takes, and taken by no other.
func (n *Network) TakenOnce(layer, by int) bool {
	for i := range n.Layers {
		if slices.Contains(n.Inputs(i), layer) != (i == by) {
			return false
		}
	}
	return len(n.Inputs(by)) == 1
}

// pixelwise is the arithmetic of a layer without weights for a single pixel, nil where
// it looks at more than one.
func (n *Network) pixelwise(layer int) kernel.Function {
	l := n.Layers[layer]
	if l.Normalise == nil && (l.Activation == nil || l.Activation.Function == "softmax") {
		return nil
	}
	op, _ := l.operation()
	pixel := Shape{1, 1, n.shapes[layer].Channels}
	_, function := op.arithmetic([]Shape{pixel}, pixel)
	return function
}

// line is the distance of two lines of the layer's input.
func (l *local) line() int { return (l.in.Width + 2*l.border) * l.in.Channels }

func (l *local) values() int { return (l.in.Height + 2*l.border) * l.line() }

// Follow computes what Logits does, the same bits, for as many rows of x as there are
// changes. What a row's Trail remembers is then about that row, for the next call.
func (f *Forward) Follow(x []float32, changes []Change) []float32 {
	if len(f.locals) == 0 {
		return f.Logits(x, len(changes))
	}
	last := len(f.locals)
	size := f.out.Size()
	for r, c := range changes {
		f.update(c, x[r*f.network.Input.Size():])
		copy(f.made[r*size:][:size], c.maps[last])
	}
	for _, layer := range f.layers[last:] {
		layer(x, len(changes))
	}
	return f.logits[:len(changes)*f.network.Classes()]
}

// update makes a row's Trail follow a change.
func (f *Forward) update(c Change, x []float32) {
	t, w := c.Trail, c.Window
	whole := w.empty() || t.maps == nil
	if whole {
		w = Window{Height: f.network.Input.Height, Width: f.network.Input.Width}
	}
	if t.maps == nil {
		for _, l := range f.locals {
			t.maps = append(t.maps, make([]float32, l.values()))
		}
		t.maps = append(t.maps, make([]float32, f.out.Size()))
		t.before = make([]patch, len(t.maps))
	}
	for i, m := range t.maps {
		// Of the last map every line is as long as the output.
		channels, line, border := f.out.Channels, f.out.Width*f.out.Channels, 0
		if i < len(f.locals) {
			l := &f.locals[i]
			channels, line, border = l.in.Channels, l.line(), l.border
		}
		inside := func(w Window) []float32 { return m[(w.Top+border)*line+(w.Left+border)*channels:] }
		p := &t.before[i]
		if c.Back && !p.empty() {
			copyLines(inside(p.Window), line, p.values, p.Width*channels, p.Height, p.Width*channels)
		}
		p.Window = Window{}
		if !w.empty() {
			n := w.Width * channels
			if !whole {
				p.Window = w
				p.values = slices.Grow(p.values[:0], w.Height*n)[:w.Height*n]
				copyLines(p.values, n, inside(w), line, w.Height, n)
			}
			if i == 0 {
				copyLines(inside(w), line, x[(w.Top*f.network.Input.Width+w.Left)*channels:], f.network.Input.Width*channels, w.Height, n)
			} else {
				f.locals[i-1].forward(inside(w), line, t.maps[i-1], w)
			}
		}
		if i < len(f.locals) {
			w = f.locals[i].reach(w)
		}
	}
}

// copyLines copies lines of n values.
func copyLines(to []float32, toLine int, from []float32, fromLine, lines, n int) {
	for i := range lines {
		copy(to[i*toLine:][:n], from[i*fromLine:][:n])
	}
}
