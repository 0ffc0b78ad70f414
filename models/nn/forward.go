package nn

import (
	"fmt"

	"github.com/temper-ml/temper/models/nn/kernel"
)

// Forward is a plain forward pass with its own memory: what serving needs, and
// no more. It reads the network's weights at each call. It serves one
// goroutine at a time.
type Forward struct {
	network  *Network
	batch    int
	layers   []func(y, x []float32, rows int)
	activity [][]float32 // output of each layer, [batch, shape]
}

// NewForward prepares a forward pass over at most batch rows at a time.
func NewForward(n *Network, batch int) (*Forward, error) {
	if batch < 1 {
		return nil, fmt.Errorf("batch %d: must be at least 1", batch)
	}
	f := &Forward{network: n, batch: batch}
	for i, l := range n.Layers {
		in, out := n.shapes[i], n.shapes[i+1]
		weight, bias := n.Weights(i)
		f.activity = append(f.activity, make([]float32, batch*out.Size()))
		switch {
		case l.Conv != nil:
			conv := l.Conv.Kernels(in, out)
			f.layers = append(f.layers, func(y, x []float32, rows int) { conv.Forward(y, x, weight, bias, rows, l.Conv.ReLU) })
		case l.MaxPool != nil:
			pool := l.MaxPool.Kernels(in)
			which := make([]int32, batch*out.Size())
			f.layers = append(f.layers, func(y, x []float32, rows int) { pool.Forward(y, which, x, rows) })
		case l.Dense != nil:
			dense := l.Dense.Kernels(in)
			f.layers = append(f.layers, func(y, x []float32, rows int) { dense.Forward(y, x, weight, bias, rows, l.Dense.ReLU) })
		}
	}
	return f, nil
}

// Network is the network whose weights the pass reads.
func (f *Forward) Network() *Network { return f.network }

// Batch is the largest number of rows of one call.
func (f *Forward) Batch() int { return f.batch }

// Logits computes the outputs [n, classes] for n rows of x. The result is
// valid until the next call.
func (f *Forward) Logits(x []float32, n int) []float32 {
	for i, layer := range f.layers {
		layer(f.activity[i], x, n)
		x = f.activity[i]
	}
	return x[:n*f.network.Classes()]
}

// Kernels returns the arithmetic of the layer between two shapes.
func (c *Conv) Kernels(in, out Shape) *kernel.Conv {
	return &kernel.Conv{
		Height: in.Height, Width: in.Width, Channels: in.Channels,
		OutHeight: out.Height, OutWidth: out.Width, Filters: c.Filters,
		Kernel: c.Kernel, Stride: c.Step(), Padding: c.Padding,
	}
}

// Kernels returns the arithmetic of the layer on an input shape.
func (p *MaxPool) Kernels(in Shape) *kernel.MaxPool {
	return &kernel.MaxPool{Height: in.Height, Width: in.Width, Channels: in.Channels, Size: p.Size}
}

// Kernels returns the arithmetic of the layer on an input shape.
func (d *Dense) Kernels(in Shape) *kernel.Dense { return &kernel.Dense{In: in.Size(), Units: d.Units} }
