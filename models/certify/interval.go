package certify

import (
	"math"

	"github.com/temper-ml/temper/models/nn/kernel"
)

// interval holds the least and greatest values of an activation, and the
// gradients with respect to them.
type interval struct {
	lower, upper   []float32
	dLower, dUpper []float32
}

// worker propagates one piece of a batch, with memory of its own.
type worker struct {
	*Bound
	input   interval
	outputs []interval        // of each layer but, where it is dense, the last: its bounds are not needed
	exact   []kernel.Weighted // of Margins
	steps   []kernel.Weighted // of Step
	lower   []kernel.Function // a Function keeps what its Backward needs, so each bound has its own
	upper   []kernel.Function

	// Scratch: centre and radius of a layer's input and output with gradients,
	// and the gradient of the absolute weights.
	c, r, outC, outR []float32
	dC, dR           []float32
	dAbsolute        []float32
	grad             []float32 // of the worst logits
}

func (b *Bound) newWorker() *worker {
	w := &worker{Bound: b, grad: make([]float32, b.piece*b.classes)}
	room := func(size int) interval {
		n := b.piece * size
		return interval{make([]float32, n), make([]float32, n), make([]float32, n), make([]float32, n)}
	}
	w.input = room(b.size)
	most, weights := b.size, 0
	for i := range b.net.Layers {
		exact, lower := b.net.Arithmetic(i)
		step, upper := b.net.Arithmetic(i)
		if b.fast {
			kernel.UseBF16(step)
		}
		w.exact, w.steps, w.lower, w.upper = append(w.exact, exact), append(w.steps, step), append(w.lower, lower), append(w.upper, upper)
		size := b.net.LayerShapes()[i+1].Size()
		w.outputs = append(w.outputs, room(size))
		most, weights = max(most, size), max(weights, len(b.layers[i].weight))
	}
	for _, s := range []*[]float32{&w.c, &w.r, &w.outC, &w.outR, &w.dC, &w.dR} {
		*s = make([]float32, b.piece*most)
	}
	w.dAbsolute = make([]float32, weights)
	return w
}

// start sets the input's bounds.
func (w *worker) start(x []float32, epsilon float32) {
	for i, v := range x {
		w.input.lower[i], w.input.upper[i] = max(v-epsilon, 0), min(v+epsilon, 1)
	}
}

// from is the interval that a layer takes as its input k, and its size.
func (w *worker) from(layer, k int) (*interval, int) {
	i := w.net.Inputs(layer)[k]
	if i < 0 {
		return &w.input, w.size
	}
	return &w.outputs[i], w.net.LayerShapes()[i+1].Size()
}

// elided tells whether the layer is the last and dense: then the difference of
// two logits is bounded at once, which is tighter than the difference of their
// bounds (Gowal et al. 2019, section 3.2).
func (w *worker) elided(layer int) bool {
	return layer == len(w.net.Layers)-1 && w.net.Layers[layer].Dense != nil
}

// unit is twice the relative error of one float32 operation: enough for two of
// them, the network's and the bound's own.
const unit = 1.0 / (1 << 23)

// forward computes the worst logits of rows examples. With rounding, each bound
// is moved outwards by what float32 arithmetic may add to it.
func (w *worker) forward(rows int, labels []uint8, worst []float32, rounding bool) {
	for i := range w.net.Layers {
		out := &w.outputs[i]
		size := w.net.LayerShapes()[i+1].Size()
		in, inSize := w.from(i, 0)
		s := &w.layers[i]
		if s.weight == nil {
			w.monotone(i, rows)
			if rounding {
				widen(out.lower[:rows*size], out.upper[:rows*size], w.terms(i))
			}
			continue
		}
		c, r := w.c[:rows*inSize], w.r[:rows*inSize]
		centre(c, r, in)
		if rounding {
			// A sum of n products is off by at most n units of the sum of their
			// magnitudes (Higham 2002, section 3.1), and |W|(r + n units (|c| + r))
			// has that with the radius.
			g := w.terms(i) * unit
			for k, v := range c {
				r[k] += g * (max(v, -v) + r[k])
			}
		}
		if w.elided(i) {
			w.elide(rows, labels, worst, s, inSize, rounding)
			return
		}
		outC, outR := w.outC[:rows*size], w.outR[:rows*size]
		if rounding {
			w.exact[i].Forward(outC, c, s.weight, s.bias, rows, false)
			w.exact[i].Forward(outR, r, s.absolute, s.none, rows, false)
		} else {
			w.steps[i].Forward(outC, c, s.packed, s.bias, rows, false)
			w.steps[i].Forward(outR, r, s.packedAbsolute, s.none, rows, false)
		}
		relu := w.net.Layers[i].ReLU()
		for k, v := range outC {
			l, u := v-outR[k], v+outR[k]
			if relu {
				l, u = max(l, 0), max(u, 0)
			}
			out.lower[k], out.upper[k] = l, u
		}
		if rounding {
			widen(out.lower[:rows*size], out.upper[:rows*size], 4) // the sums above
			terms := w.terms(i)
			for at := 0; at < rows*size; at += len(s.bias) {
				lower, upper := out.lower[at:][:len(s.bias)], out.upper[at:][:len(s.bias)]
				for k, b := range s.bias { // where a sum may start
					g := terms * unit * max(b, -b)
					lower[k] -= g
					upper[k] += g
					if relu {
						lower[k] = max(lower[k], 0)
					}
				}
			}
		}
	}
	last := &w.outputs[len(w.outputs)-1]
	for row, y := range labels {
		at := row * w.classes
		for k := range w.classes {
			worst[at+k] = last.upper[at+k] - last.lower[at+int(y)]
		}
		worst[at+int(y)] = 0
	}
}

// monotone applies a function that rises in each of its inputs to both bounds.
func (w *worker) monotone(layer, rows int) {
	out := &w.outputs[layer]
	var lower, upper [][]float32
	for k := range w.net.Inputs(layer) {
		in, _ := w.from(layer, k)
		lower, upper = append(lower, in.lower), append(upper, in.upper)
	}
	w.lower[layer].Forward(out.lower, lower, rows)
	w.upper[layer].Forward(out.upper, upper, rows)
}

// terms is the length of the sums that a layer computes, and a little more: 0
// where it only chooses among its inputs.
func (w *worker) terms(layer int) float32 {
	in := w.net.InputShapes(layer)[0]
	switch l := w.net.Layers[layer]; {
	case l.Conv != nil:
		return float32(l.Conv.Kernel*l.Conv.Kernel*in.Channels + 4)
	case l.Dense != nil:
		return float32(in.Size() + 4)
	case l.AvgPool != nil:
		return float32(in.Height*in.Width + 4)
	case l.MaxPool != nil, l.Concat != nil, l.Pad != nil, l.Permute != nil:
		return 0
	}
	return 8 // one operation or two, or a function of the mathematics library
}

// widen moves bounds outwards by so many roundings of their magnitude.
func widen(lower, upper []float32, terms float32) {
	if terms == 0 {
		return
	}
	const least = 1e-30 // rounding near zero is absolute
	for k := range lower {
		g := terms*unit*max(lower[k], -lower[k], upper[k], -upper[k]) + least
		lower[k] -= g
		upper[k] += g
	}
}

// centre computes (lower + upper) / 2 and (upper - lower) / 2.
func centre(c, r []float32, in *interval) {
	for k := range c {
		l, u := in.lower[k], in.upper[k]
		c[k], r[k] = (l+u)/2, (u-l)/2
	}
}

// elide computes worst[k] = sum of (W_k - W_y) c + |W_k - W_y| r, plus the
// biases' difference, of the last layer's input, for the label y.
func (w *worker) elide(rows int, labels []uint8, worst []float32, s *layer, in int, rounding bool) {
	n := w.classes
	for row := range rows {
		y, out := int(labels[row]), worst[row*n:][:n]
		for k := range out {
			out[k] = s.bias[k] - s.bias[y]
		}
		for i := range in {
			line := s.weight[i*n:][:n]
			own, c, r := line[y], w.c[row*in+i], w.r[row*in+i]
			for k, v := range line {
				d := v - own
				out[k] += d*c + max(d, -d)*r
			}
		}
		if !rounding {
			continue
		}
		// The radius has the rounding of each class's sum; what the network then
		// subtracts, and the sum above, are off by as much of larger terms.
		for k := range out {
			sum := max(s.bias[k], -s.bias[k]) + max(s.bias[y], -s.bias[y])
			for i := range in {
				a, b, c := s.weight[i*n+k], s.weight[i*n+y], w.c[row*in+i]
				sum += (max(a, -a) + max(b, -b)) * (max(c, -c) + w.r[row*in+i])
			}
			if k != y {
				out[k] += 2 * float32(in+4) * unit * sum
			}
		}
	}
}

// backward computes the gradient of the weights into flat, from grad, that of
// the worst logits. It needs the forward pass before it, without rounding.
func (w *worker) backward(rows int, labels []uint8, grad, flat []float32) {
	for i := range w.outputs {
		clear(w.outputs[i].dLower)
		clear(w.outputs[i].dUpper)
	}
	for i := len(w.net.Layers) - 1; i >= 0; i-- {
		out, size := &w.outputs[i], w.net.LayerShapes()[i+1].Size()
		s := &w.layers[i]
		if i == len(w.net.Layers)-1 && !w.elided(i) {
			for row, y := range labels {
				for k, g := range grad[row*size:][:size] {
					if k != int(y) {
						out.dUpper[row*size+k] = g
						out.dLower[row*size+int(y)] -= g
					}
				}
			}
		}
		if s.weight == nil {
			w.monotoneBackward(i, rows)
			continue
		}
		in, inSize := w.from(i, 0)
		c, r := w.c[:rows*inSize], w.r[:rows*inSize]
		centre(c, r, in)
		dC, dR := w.dC[:rows*inSize], w.dR[:rows*inSize]
		dw := flat[s.first:][:len(s.weight)]
		db := flat[s.first+len(s.weight):][:len(s.bias)]
		if w.elided(i) {
			w.elideBackward(rows, labels, grad, s, inSize, dw, db, dC, dR)
			add(in, dC, dR)
			continue
		}
		outC, outR := w.outC[:rows*size], w.outR[:rows*size]
		relu := w.net.Layers[i].ReLU()
		for k := range outC {
			l, u := out.dLower[k], out.dUpper[k]
			if relu && out.lower[k] <= 0 {
				l = 0
			}
			if relu && out.upper[k] <= 0 {
				u = 0
			}
			outC[k], outR[k] = l+u, u-l
		}
		dAbsolute := w.dAbsolute[:len(s.weight)]
		w.steps[i].BackwardWeight(dAbsolute, db, r, outR, rows)
		w.steps[i].BackwardWeight(dw, db, c, outC, rows) // of the bias, the centre's is the one that counts
		const sign = 1 << 31
		for k, v := range s.weight { // no branches: half of them would be mispredicted
			dw[k] += math.Float32frombits(math.Float32bits(dAbsolute[k]) ^ math.Float32bits(v)&sign)
		}
		if w.net.Inputs(i)[0] >= 0 { // nothing needs the gradient of the network's input
			w.steps[i].BackwardInput(dC, outC, s.turned, nil, rows)
			w.steps[i].BackwardInput(dR, outR, s.turnedAbsolute, nil, rows)
			add(in, dC, dR)
		}
	}
}

// add adds the gradients of centre and radius to those of the bounds.
func add(in *interval, dC, dR []float32) {
	for k, c := range dC {
		in.dLower[k] += (c - dR[k]) / 2
		in.dUpper[k] += (c + dR[k]) / 2
	}
}

func (w *worker) monotoneBackward(layer, rows int) {
	out := &w.outputs[layer]
	l := w.net.Layers[layer]
	var lower, upper [][]float32
	for k := range w.net.Inputs(layer) {
		in, _ := w.from(layer, k)
		lower, upper = append(lower, in.lower), append(upper, in.upper)
	}
	size := rows * w.net.LayerShapes()[layer+1].Size()
	if l.Combine != nil && l.Combine.ReLU {
		kernel.MaskPositive(out.dLower[:size], out.dLower[:size], out.lower[:size])
		kernel.MaskPositive(out.dUpper[:size], out.dUpper[:size], out.upper[:size])
	}
	for k, from := range w.net.Inputs(layer) {
		if from < 0 { // nothing needs the gradient of the network's input
			continue
		}
		in, n := w.from(layer, k)
		d := w.dC[:rows*n]
		w.lower[layer].Backward(d, k, out.dLower, out.lower, lower, rows)
		kernel.Add(in.dLower[:len(d)], d)
		w.upper[layer].Backward(d, k, out.dUpper, out.upper, upper, rows)
		kernel.Add(in.dUpper[:len(d)], d)
	}
}

// elideBackward is the gradient of elide.
func (w *worker) elideBackward(rows int, labels []uint8, grad []float32, s *layer, in int, dw, db, dC, dR []float32) {
	clear(dw)
	clear(db)
	n := w.classes
	for row := range rows {
		y, g := int(labels[row]), grad[row*n:][:n]
		for k, v := range g {
			if k != y {
				db[k] += v
				db[y] -= v
			}
		}
		for i := range in {
			line, dLine := s.weight[i*n:][:n], dw[i*n:][:n]
			own, c, r := line[y], w.c[row*in+i], w.r[row*in+i]
			var sumC, sumR float32
			for k, v := range g {
				if k == y {
					continue
				}
				d, at := line[k]-own, c
				switch {
				case d > 0:
					at, sumR = c+r, sumR+v*d
				case d < 0:
					at, sumR = c-r, sumR-v*d
				}
				sumC += v * d
				dLine[k] += v * at
				dLine[y] -= v * at
			}
			dC[row*in+i], dR[row*in+i] = sumC, sumR
		}
	}
}
