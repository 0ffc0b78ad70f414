package nn

import "github.com/temper-ml/temper/models/nn/kernel"

// ConvPool returns the arithmetic of a convolution with ReLU together with the
// max-pool after it, which takes half the memory traffic of the two, or nil where
// the layer is no such convolution or another layer takes its output too.
func (n *Network) ConvPool(layer int) *kernel.ConvPool {
	weighted, _ := n.Arithmetic(layer)
	conv, ok := weighted.(*kernel.Conv)
	if !ok || !n.Layers[layer].ReLU() || layer+1 == len(n.Layers) {
		return nil
	}
	pool := n.Layers[layer+1].MaxPool
	if pool == nil || pool.Step() != pool.Size || pool.Padding != 0 {
		return nil
	}
	if !n.TakenOnce(layer, layer+1) {
		return nil
	}
	return &kernel.ConvPool{Conv: *conv, Size: pool.Size}
}
