package nn

import (
	"fmt"

	"github.com/temper-ml/temper/models/nn/kernel"
)

// Forward is a plain forward pass with its own memory: what serving needs, and
// no more. Changes to the network's weights count from the next Refresh on. It serves
// one goroutine at a time.
type Forward struct {
	network *Network
	batch   int
	weights [][]float32 // of each layer, as its arithmetic takes them
	refresh []func()
	layers  []func(x []float32, rows int)
	logits  []float32 // output of the last layer

	// For Follow: the first of layers, each of which sees windows of the one before.
	locals []local
	made   []float32 // output of the last of them
	out    Shape     // of that output
}

// NewForward prepares a forward pass over at most batch rows at a time.
func NewForward(n *Network, batch int) (*Forward, error) {
	if batch < 1 {
		return nil, fmt.Errorf("batch %d: must be at least 1", batch)
	}
	f := newForward(n, batch, make([][]float32, len(n.Layers)))
	f.Refresh()
	return f, nil
}

// Another is one for another goroutine, which shares what Refresh does: none of them
// may be in use then.
func (f *Forward) Another() *Forward { return newForward(f.network, f.batch, f.weights) }

// Refresh arranges the weights as they are now.
func (f *Forward) Refresh() {
	for _, arrange := range f.refresh {
		arrange()
	}
}

func newForward(n *Network, batch int, weights [][]float32) *Forward {
	f := &Forward{network: n, batch: batch, weights: weights}
	activity := make([][]float32, len(n.Layers)) // output of each layer, [batch, shape]
	for i, l := range n.Layers {
		if i > 0 && n.ConvPool(i-1) != nil {
			activity[i] = activity[i-1] // which that layer wrote
			continue
		}
		weighted, function := n.Arithmetic(i)
		out := n.shapes[i+1]
		if pooled := n.ConvPool(i); pooled != nil {
			weighted, out = pooled, n.shapes[i+2]
		}
		kernel.UseWinograd(weighted)
		y := make([]float32, batch*out.Size())
		activity[i], f.logits = y, y
		inputs := n.Inputs(i)
		from := make([][]float32, len(inputs))
		for k, layer := range inputs {
			if layer >= 0 {
				from[k] = activity[layer]
			}
		}
		take := func(x []float32) [][]float32 { // the network's input is another each time
			for k, layer := range inputs {
				if layer < 0 {
					from[k] = x
				}
			}
			return from
		}
		if f.follow(i, weighted, out) {
			f.made, f.out = y, out
		}
		if weighted == nil {
			f.layers = append(f.layers, func(x []float32, rows int) { function.Forward(y, take(x), rows) })
			continue
		}
		weight, bias := n.Weights(i)
		f.refresh = append(f.refresh, func() {
			if packer, ok := weighted.(kernel.Packer); ok {
				f.weights[i] = packer.Pack(f.weights[i], weight)
			} else {
				f.weights[i] = weight
			}
		})
		relu := l.ReLU()
		f.layers = append(f.layers, func(x []float32, rows int) { weighted.Forward(y, take(x)[0], f.weights[i], bias, rows, relu) })
	}
	return f
}

// Network is the network whose weights the pass reads.
func (f *Forward) Network() *Network { return f.network }

// Batch is the largest number of rows of one call.
func (f *Forward) Batch() int { return f.batch }

// Logits computes the outputs [n, classes] for n rows of x. The result is
// valid until the next call.
func (f *Forward) Logits(x []float32, n int) []float32 {
	for _, layer := range f.layers {
		layer(x, n)
	}
	return f.logits[:n*f.network.Classes()]
}
