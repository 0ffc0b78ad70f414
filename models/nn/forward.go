package nn

import "fmt"

// Forward is a plain forward pass with its own memory: what serving needs, and
// no more. It reads the network's weights at each call. It serves one
// goroutine at a time.
type Forward struct {
	network *Network
	batch   int
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
	f := &Forward{network: n, batch: batch}
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
		relu := l.ReLU()
		f.layers = append(f.layers, func(x []float32, rows int) { weighted.Forward(y, take(x)[0], weight, bias, rows, relu) })
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
	for _, layer := range f.layers {
		layer(x, n)
	}
	return f.logits[:n*f.network.Classes()]
}
