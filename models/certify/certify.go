// Package certify proves that no image within a threat changes a network's
// answer, by interval bound propagation (Gowal et al. 2019): from the least and
// greatest value of each pixel, layer by layer, to those of each logit. What is
// proven holds against every attack; what is not proven may still withstand
// all of them. Networks trained with the bound (Step) are proven for most
// images, others for hardly any.
package certify

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/kernel"
)

// Accuracy counts the first samples images of a set for which the network
// provably gives the right class to every image within the threat, which must
// be in linf. Rounding is allowed for: the proof is about the network as
// float32 arithmetic computes it, in any order of summation. (Answers by Winograd's
// algorithm, kernel.UseWinograd, are sums of other terms: they differ from those by some
// millionths, which no proof of a margin that small allows for.)
func Accuracy(ctx context.Context, net *nn.Network, set *dataset.Set, samples int, threat attack.Threat) (proven int, err error) {
	if err := threat.Validate(); err != nil {
		return 0, err
	}
	if threat.Norm != "linf" {
		return 0, fmt.Errorf("certify: threat.norm is %s: a bound is known for linf only", threat.Norm)
	}
	if set.Shape != net.Input || len(set.Classes) != net.Classes() {
		return 0, fmt.Errorf("certify: network %q takes images of %v in %d classes; dataset %s has %v in %d", net.Name, net.Input, net.Classes(), set.Name, set.Shape, len(set.Classes))
	}
	if samples < 1 || samples > set.Len() {
		return 0, fmt.Errorf("certify: %d samples of %d images", samples, set.Len())
	}
	const batch = 256
	b, err := New(net, batch)
	if err != nil {
		return 0, err
	}
	x := make([]float32, batch*net.Input.Size())
	for lo := 0; lo < samples; lo += batch {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		hi := min(lo+batch, samples)
		set.Read(x, lo, hi)
		for _, m := range b.Margins(x, set.Labels[lo:hi], threat.Epsilon) {
			if m > 0 { // false for NaN
				proven++
			}
		}
	}
	return proven, nil
}

// Bound computes bounds of a network's logits, and their gradient with respect
// to its weights. It serves one goroutine at a time. Changes to the weights
// count from the next call on.
type Bound struct {
	net           *nn.Network
	batch, piece  int
	size, classes int
	worst         []float32 // [batch, classes]: see Step
	margins       []float32 // [batch]
	gradient      []float32
	partial       [][]float32 // each piece's share of gradient
	fast          bool        // products of Step are of bfloat16
	layers        []layer
	workers       []*worker
}

// layer is what the goroutines share of a layer with parameters; absolute is
// nil for others.
type layer struct {
	weight, bias, absolute []float32
	packed, packedAbsolute []float32 // as the products of Step take them
	turned, turnedAbsolute []float32
	none                   []float32 // zeros in the place of the bias: a radius has none
	first                  int       // of its parameters in the flat vector
}

// As in package graph: pieces of fixed size, so that sums do not depend on the
// number of processors.
const (
	minPiece  = 32
	maxPieces = 8
)

// New prepares bounds for at most batch images at a time. The error names a
// layer that has none.
func New(net *nn.Network, batch int) (*Bound, error) { return newBound(net, batch, false) }

// NewFast is New for training: where the kernel path has bfloat16
// (kernel.HasBF16), Step's products are made of it. Margins stay proofs.
func NewFast(net *nn.Network, batch int) (*Bound, error) {
	return newBound(net, batch, kernel.HasBF16())
}

func newBound(net *nn.Network, batch int, fast bool) (*Bound, error) {
	if batch < 1 {
		return nil, fmt.Errorf("batch %d: must be at least 1", batch)
	}
	b := &Bound{net: net, batch: batch, fast: fast, size: net.Input.Size(), classes: net.Classes(), piece: max(minPiece, (batch+maxPieces-1)/maxPieces)}
	b.worst, b.margins = make([]float32, batch*b.classes), make([]float32, batch)
	first := 0
	for i, l := range net.Layers {
		if err := bounded(l); err != nil {
			return nil, fmt.Errorf("network %q: layer %d (%s): %w", net.Name, i, l.Kind(), err)
		}
		w, bias := net.Weights(i)
		s := layer{weight: w, bias: bias, first: first}
		if w != nil {
			for _, to := range []*[]float32{&s.absolute, &s.packed, &s.packedAbsolute, &s.turned, &s.turnedAbsolute} {
				*to = make([]float32, len(w))
			}
			s.none = make([]float32, len(bias))
		}
		first += len(w) + len(bias)
		b.layers = append(b.layers, s)
	}
	for range min((batch+b.piece-1)/b.piece, runtime.GOMAXPROCS(0)) {
		b.workers = append(b.workers, b.newWorker())
	}
	return b, nil
}

// bounded refuses a layer that is neither linear nor rising in each of its
// inputs.
func bounded(l nn.Layer) error {
	switch {
	case l.Combine != nil && l.Combine.Operator != "add":
		return fmt.Errorf("operator %s has no bound: only add has", l.Combine.Operator)
	case l.Activation != nil && l.Activation.Function == "softmax":
		return errors.New("softmax has no bound: leave it out, the largest logit is the largest probability")
	case l.Activation != nil && l.Activation.Slope < 0:
		return fmt.Errorf("slope %v: a function that falls and rises has no bound", l.Activation.Slope)
	case l.Normalise != nil:
		for _, std := range l.Normalise.Std {
			if std < 0 {
				return fmt.Errorf("std %v is negative", std)
			}
		}
	}
	return nil
}

// Margins computes, for the images x of the labels, how far the label's logit
// is above every other at least, whatever image within epsilon (in the maximum
// norm, and within [0,1]) stands in for x. Where it is positive the answer is
// proven. The result is valid until the next call.
func (b *Bound) Margins(x []float32, labels []uint8, epsilon float64) []float32 {
	b.run(x, labels, epsilon, nil)
	for row, y := range labels {
		worst := b.worst[row*b.classes:][:b.classes]
		top := float32(math.Inf(-1))
		for k, v := range worst {
			if k != int(y) {
				top = max(top, v) // NaN stays
			}
		}
		b.margins[row] = -top
	}
	return b.margins[:len(labels)]
}

// Step computes, for the images x, the worst logits [n, classes] that the
// bounds allow: 0 for the label, and for any other class the most by which its
// logit can exceed the label's. Gradient then has the gradient, with respect to
// the weights, of loss on these. They are valid until the next call.
func (b *Bound) Step(x []float32, labels []uint8, epsilon float64, loss nn.Loss) (worst []float32) {
	pieces := (len(labels) + b.piece - 1) / b.piece
	if b.gradient == nil {
		b.gradient = make([]float32, len(b.net.Flat()))
	}
	for len(b.partial) < pieces {
		b.partial = append(b.partial, make([]float32, len(b.gradient)))
	}
	b.run(x, labels, epsilon, loss)
	const chunk = 16 << 10
	b.each((len(b.gradient)+chunk-1)/chunk, func(_ *worker, i int) {
		lo, hi := i*chunk, min((i+1)*chunk, len(b.gradient))
		copy(b.gradient[lo:hi], b.partial[0][lo:hi])
		for _, p := range b.partial[1:pieces] {
			kernel.Add(b.gradient[lo:hi], p[lo:hi])
		}
	})
	return b.worst[:len(labels)*b.classes]
}

// Gradient is the gradient of the last Step, in the order of the network's flat
// parameter vector.
func (b *Bound) Gradient() []float32 { return b.gradient }

// run computes worst, and with a loss each piece's gradient.
func (b *Bound) run(x []float32, labels []uint8, epsilon float64, loss nn.Loss) {
	n := len(labels)
	if n > b.batch || len(x) < n*b.size {
		panic(fmt.Sprintf("certify: %d images in %d values for a batch of %d", n, len(x), b.batch))
	}
	b.each(len(b.layers), func(w *worker, i int) {
		s := &b.layers[i]
		if s.weight == nil {
			return
		}
		for k, v := range s.weight {
			s.absolute[k] = max(v, -v)
		}
		if loss == nil {
			return
		}
		w.steps[i].Turn(s.turned, s.weight)
		w.steps[i].Turn(s.turnedAbsolute, s.absolute)
		s.packed, s.packedAbsolute = pack(w.steps[i], s.packed, s.weight), pack(w.steps[i], s.packedAbsolute, s.absolute)
	})
	b.each((n+b.piece-1)/b.piece, func(w *worker, piece int) {
		lo := piece * b.piece
		hi := min(lo+b.piece, n)
		w.start(x[lo*b.size:hi*b.size], float32(epsilon))
		worst := b.worst[lo*b.classes : hi*b.classes]
		w.forward(hi-lo, labels[lo:hi], worst, loss == nil)
		if loss != nil {
			grad := w.grad[:len(worst)]
			loss(worst, grad, lo, hi)
			w.backward(hi-lo, labels[lo:hi], grad, b.partial[piece])
		}
	})
}

// pack arranges the weights w of a layer as its Forward takes them.
func pack(layer kernel.Weighted, packed, w []float32) []float32 {
	if p, ok := layer.(kernel.Packer); ok {
		return p.Pack(packed, w)
	}
	return w
}

// each calls work for 0 to n-1 from all workers.
func (b *Bound) each(n int, work func(w *worker, i int)) {
	var next atomic.Int64
	loop := func(w *worker) {
		for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
			work(w, i)
		}
	}
	var wait sync.WaitGroup
	for _, w := range b.workers[1:] {
		wait.Go(func() { loop(w) })
	}
	loop(b.workers[0])
	wait.Wait()
}
