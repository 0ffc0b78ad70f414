package kernel

import "math"

// Weighted is the arithmetic of a layer with weights and bias, over rows
// examples. It serves one goroutine.
type Weighted interface {
	// Forward computes y from x, clamped at 0 where relu is set.
	Forward(y, x, w, bias []float32, rows int, relu bool)
	// Turn arranges the weights for BackwardInput into turned, of the same
	// length unless the layer is a Packer. It needs to be called once for each new
	// set of weights.
	Turn(turned, w []float32)
	// BackwardInput computes dx, the gradient with respect to x, from dy and
	// the weights arranged by Turn. It is 0 where mask, unless that is nil, is not
	// positive: where x comes of a ReLU and is the mask, dx is the gradient before it.
	BackwardInput(dx, dy, turned, mask []float32, rows int)
	// BackwardWeight computes dw and dbias, summed over the rows.
	BackwardWeight(dw, dbias, x, dy []float32, rows int)
}

// Function is the arithmetic of a layer without weights, over rows examples.
// It may keep what Backward needs of the Forward before it, and serves one
// goroutine.
type Function interface {
	// Forward computes y from the inputs x.
	Forward(y []float32, x [][]float32, rows int)
	// Backward computes dx, the gradient with respect to x[i], from dy, that
	// with respect to y.
	Backward(dx []float32, i int, dy, y []float32, x [][]float32, rows int)
}

// disjointMaxPool is a MaxPool with the places of its maxima.
type disjointMaxPool struct {
	MaxPool
	which []int32
}

// NewMaxPool makes a Function of a MaxPool.
func NewMaxPool(p MaxPool) Function { return &disjointMaxPool{MaxPool: p} }

func (p *disjointMaxPool) Forward(y []float32, x [][]float32, rows int) {
	if n := rows * (p.Height / p.Size) * (p.Width / p.Size) * p.Channels; len(p.which) < n {
		p.which = make([]int32, n)
	}
	p.MaxPool.Forward(y, p.which, x[0], rows)
}

func (p *disjointMaxPool) Backward(dx []float32, _ int, dy, _ []float32, _ [][]float32, rows int) {
	p.MaxPool.Backward(dx, dy, p.which, rows)
}

// Window is the geometry of a pool whose windows may overlap and reach into a
// border that is Padding wide.
type Window struct {
	Height, Width, Channels int // input
	OutHeight, OutWidth     int
	SizeY, SizeX            int
	Stride, Padding         int
}

// each calls f for every window: where its output starts, the place of its
// first tap, which may lie in the border, and its taps that do not.
func (w *Window) each(rows int, f func(out, y, x, y0, y1, x0, x1, image int)) {
	out := 0
	for r := range rows {
		image := r * w.Height * w.Width * w.Channels
		for oy := range w.OutHeight {
			y := oy*w.Stride - w.Padding
			for ox := range w.OutWidth {
				x := ox*w.Stride - w.Padding
				f(out, y, x, max(y, 0), min(y+w.SizeY, w.Height), max(x, 0), min(x+w.SizeX, w.Width), image)
				out += w.Channels
			}
		}
	}
}

// OverlappingMaxPool takes the maximum over windows of any stride.
type OverlappingMaxPool struct {
	Window
	which []int32
}

// Forward computes y; the first of equal values wins.
func (p *OverlappingMaxPool) Forward(y []float32, in [][]float32, rows int) {
	if n := rows * p.OutHeight * p.OutWidth * p.Channels; len(p.which) < n {
		p.which = make([]int32, n)
	}
	x, ch := in[0], p.Channels
	p.each(rows, func(out, top, left, y0, y1, x0, x1, image int) {
		best, index := y[out:][:ch], p.which[out:][:ch]
		first := true
		for iy := y0; iy < y1; iy++ {
			for ix := x0; ix < x1; ix++ {
				pixel, tap := x[image+(iy*p.Width+ix)*ch:][:ch], int32((iy-top)*p.SizeX+ix-left)
				if first {
					copy(best, pixel)
					for i := range index {
						index[i] = tap
					}
					first = false
					continue
				}
				maximum(best, index, pixel, tap)
			}
		}
	})
}

// Backward computes dx: each window's gradient goes to its maximum.
func (p *OverlappingMaxPool) Backward(dx []float32, _ int, dy, _ []float32, _ [][]float32, rows int) {
	ch, sx := p.Channels, int32(p.SizeX)
	clear(dx[:rows*p.Height*p.Width*ch])
	p.each(rows, func(out, top, left, _, _, _, _, image int) {
		for c, tap := range p.which[out:][:ch] {
			dx[image+((top+int(tap/sx))*p.Width+left+int(tap%sx))*ch+c] += dy[out+c]
		}
	})
}

// AvgPool takes the mean over windows.
type AvgPool struct {
	Window
	CountPadding bool
	share        []float32 // [channels] of one window
}

func (p *AvgPool) weight(y0, y1, x0, x1 int) float32 {
	if p.CountPadding {
		return 1 / float32(p.SizeY*p.SizeX)
	}
	return 1 / float32((y1-y0)*(x1-x0))
}

func (p *AvgPool) Forward(y []float32, in [][]float32, rows int) {
	x, ch := in[0], p.Channels
	p.each(rows, func(out, _, _, y0, y1, x0, x1, image int) {
		sum := y[out:][:ch]
		clear(sum)
		for iy := y0; iy < y1; iy++ {
			for ix := x0; ix < x1; ix++ {
				addTo(sum, x[image+(iy*p.Width+ix)*ch:][:ch])
			}
		}
		w := p.weight(y0, y1, x0, x1)
		for c := range sum {
			sum[c] *= w
		}
	})
}

func (p *AvgPool) Backward(dx []float32, _ int, dy, _ []float32, _ [][]float32, rows int) {
	ch := p.Channels
	p.share = grow(p.share, ch)
	clear(dx[:rows*p.Height*p.Width*ch])
	p.each(rows, func(out, _, _, y0, y1, x0, x1, image int) {
		w := p.weight(y0, y1, x0, x1)
		for c, g := range dy[out:][:ch] {
			p.share[c] = g * w
		}
		for iy := y0; iy < y1; iy++ {
			for ix := x0; ix < x1; ix++ {
				addTo(dx[image+(iy*p.Width+ix)*ch:][:ch], p.share)
			}
		}
	})
}

// Affine scales and shifts each channel by weights [channels] and bias
// [channels].
type Affine struct{ Pixels, Channels int }

func (a *Affine) Forward(y, x, w, bias []float32, rows int, relu bool) {
	scale(y, x, w[:a.Channels], bias[:a.Channels], rows*a.Pixels)
	if relu {
		y = y[:rows*a.Pixels*a.Channels]
		for i, v := range y {
			y[i] = max(v, 0)
		}
	}
}

// Turn copies: there is nothing to arrange.
func (a *Affine) Turn(turned, w []float32) { copy(turned, w) }

func (a *Affine) BackwardInput(dx, dy, turned, mask []float32, rows int) {
	scale(dx, dy, turned[:a.Channels], nil, rows*a.Pixels)
	maskInput(dx[:rows*a.Pixels*a.Channels], mask)
}

func (a *Affine) BackwardWeight(dw, dbias, x, dy []float32, rows int) {
	n := a.Channels
	clear(dw[:n])
	for i := range rows * a.Pixels {
		from, grad := x[i*n:][:n], dy[i*n:][:n]
		for c, g := range grad {
			dw[c] += g * from[c]
		}
	}
	sumRows(dbias[:n], dy[:rows*a.Pixels*n])
}

// scale computes y = x*factor + shift for every pixel, channel by channel; a
// nil shift is 0.
func scale(y, x, factor, shift []float32, pixels int) {
	n := len(factor)
	for i := range pixels {
		from, to := x[i*n:][:n], y[i*n:][:n]
		if shift == nil {
			for c, f := range factor {
				to[c] = from[c] * f
			}
			continue
		}
		for c, f := range factor {
			to[c] = from[c]*f + shift[c]
		}
	}
}

// Scale is an Affine whose numbers are constants.
type Scale struct {
	Pixels        int
	Factor, Shift []float32 // [channels]
}

func (s *Scale) Forward(y []float32, x [][]float32, rows int) {
	scale(y, x[0], s.Factor, s.Shift, rows*s.Pixels)
}

func (s *Scale) Backward(dx []float32, _ int, dy, _ []float32, _ [][]float32, rows int) {
	scale(dx, dy, s.Factor, nil, rows*s.Pixels)
}

// LeakyReLU multiplies what is below 0 by Slope; with 0 it is a ReLU.
type LeakyReLU struct {
	Size  int // values of an example
	Slope float32
}

func (l *LeakyReLU) Forward(y []float32, x [][]float32, rows int) {
	y = y[:rows*l.Size]
	if l.Slope == 0 {
		for i, v := range x[0][:len(y)] {
			y[i] = max(v, 0) // NaN stays NaN, to be found
		}
		return
	}
	for i, v := range x[0][:len(y)] {
		if v < 0 {
			v *= l.Slope
		}
		y[i] = v
	}
}

func (l *LeakyReLU) Backward(dx []float32, _ int, dy, _ []float32, x [][]float32, rows int) {
	n := rows * l.Size
	if l.Slope == 0 {
		maskPositive(dx[:n], dy[:n], x[0][:n])
		return
	}
	dx, dy = dx[:n], dy[:n]
	for i, v := range x[0][:n] {
		if v > 0 {
			dx[i] = dy[i]
		} else {
			dx[i] = dy[i] * l.Slope
		}
	}
}

// Clip keeps values between Min and Max. Beyond them, and at them as PyTorch's
// ReLU6 has it, the gradient is 0.
type Clip struct {
	Size     int
	Min, Max float32
}

func (c *Clip) Forward(y []float32, x [][]float32, rows int) {
	y = y[:rows*c.Size]
	for i, v := range x[0][:len(y)] {
		y[i] = min(max(v, c.Min), c.Max)
	}
}

func (c *Clip) Backward(dx []float32, _ int, dy, _ []float32, x [][]float32, rows int) {
	dx = dx[:rows*c.Size]
	for i, v := range x[0][:len(dx)] {
		if v > c.Min && v < c.Max {
			dx[i] = dy[i]
		} else {
			dx[i] = 0
		}
	}
}

// Sigmoid is 1 / (1 + exp(-x)).
type Sigmoid struct{ Size int }

func (s *Sigmoid) Forward(y []float32, x [][]float32, rows int) {
	y = y[:rows*s.Size]
	for i, v := range x[0][:len(y)] {
		y[i] = float32(1 / (1 + math.Exp(-float64(v))))
	}
}

func (s *Sigmoid) Backward(dx []float32, _ int, dy, y []float32, _ [][]float32, rows int) {
	dx = dx[:rows*s.Size]
	for i, v := range y[:len(dx)] {
		dx[i] = dy[i] * v * (1 - v)
	}
}

// Tanh is the hyperbolic tangent.
type Tanh struct{ Size int }

func (t *Tanh) Forward(y []float32, x [][]float32, rows int) {
	y = y[:rows*t.Size]
	for i, v := range x[0][:len(y)] {
		y[i] = float32(math.Tanh(float64(v)))
	}
}

func (t *Tanh) Backward(dx []float32, _ int, dy, y []float32, _ [][]float32, rows int) {
	dx = dx[:rows*t.Size]
	for i, v := range y[:len(dx)] {
		dx[i] = dy[i] * (1 - v*v)
	}
}

// Softmax makes probabilities of all of an example's values.
type Softmax struct{ Size int }

func (s *Softmax) Forward(y []float32, x [][]float32, rows int) {
	for r := range rows {
		in, out := x[0][r*s.Size:][:s.Size], y[r*s.Size:][:s.Size]
		most := in[0]
		for _, v := range in {
			most = max(most, v)
		}
		sum := 0.0
		for i, v := range in {
			e := math.Exp(float64(v) - float64(most))
			sum += e
			out[i] = float32(e)
		}
		for i, v := range out {
			out[i] = float32(float64(v) / sum)
		}
	}
}

func (s *Softmax) Backward(dx []float32, _ int, dy, y []float32, _ [][]float32, rows int) {
	for r := range rows {
		p, g, to := y[r*s.Size:][:s.Size], dy[r*s.Size:][:s.Size], dx[r*s.Size:][:s.Size]
		mean := 0.0
		for i, v := range p {
			mean += float64(v) * float64(g[i])
		}
		for i, v := range p {
			to[i] = float32(float64(v) * (float64(g[i]) - mean))
		}
	}
}

// Combine computes an operator of two inputs, value by value; an input of
// fewer values than the output meets it pixel by pixel.
type Combine struct {
	Operator string // add, sub, mul or div
	ReLU     bool
	Size     int    // values of an example of the output
	Sizes    [2]int // and of the inputs
}

func (c *Combine) Forward(y []float32, x [][]float32, rows int) {
	n := min(c.Sizes[0], c.Sizes[1])
	for at := 0; at < rows*c.Size; at += n {
		out, a, b := y[at:][:n], c.part(x[0], 0, at, n), c.part(x[1], 1, at, n)
		switch c.Operator {
		case "add":
			copy(out, a)
			addTo(out, b)
		case "sub":
			for i, v := range a {
				out[i] = v - b[i]
			}
		case "mul":
			for i, v := range a {
				out[i] = v * b[i]
			}
		case "div":
			for i, v := range a {
				out[i] = v / b[i]
			}
		}
		if c.ReLU {
			for i, v := range out {
				out[i] = max(v, 0)
			}
		}
	}
}

// part is the n values of input k that meet those of the output from at on.
func (c *Combine) part(x []float32, k, at, n int) []float32 {
	if c.Sizes[k] < c.Size {
		at = at / c.Size * c.Sizes[k]
	}
	return x[at:][:n]
}

// Backward leaves the ReLU to the caller: dy is the gradient before it.
func (c *Combine) Backward(dx []float32, k int, dy, y []float32, x [][]float32, rows int) {
	n := min(c.Sizes[0], c.Sizes[1])
	sums := c.Sizes[k] < c.Size
	if sums {
		clear(dx[:rows*c.Sizes[k]])
	}
	for at := 0; at < rows*c.Size; at += n {
		g, to := dy[at:][:n], c.part(dx, k, at, n)
		a, b := c.part(x[0], 0, at, n), c.part(x[1], 1, at, n)
		if !sums {
			clear(to)
		}
		switch {
		case c.Operator == "add" || c.Operator == "sub" && k == 0:
			addTo(to, g)
		case c.Operator == "sub":
			for i, v := range g {
				to[i] -= v
			}
		case c.Operator == "mul":
			other := a
			if k == 0 {
				other = b
			}
			for i, v := range g {
				to[i] += v * other[i]
			}
		case k == 0: // a / b
			for i, v := range g {
				to[i] += v / b[i]
			}
		default:
			for i, v := range g {
				if v != 0 { // behind a ReLU, 0 where the quotient is negative
					to[i] -= v * a[i] / (b[i] * b[i])
				}
			}
		}
	}
}

// Concat joins the channels of its inputs.
type Concat struct {
	Pixels   int
	Channels []int // of each input
}

func (c *Concat) Forward(y []float32, x [][]float32, rows int) {
	at, total := 0, c.total()
	for k, n := range c.Channels {
		for i := range rows * c.Pixels {
			copy(y[i*total+at:][:n], x[k][i*n:])
		}
		at += n
	}
}

func (c *Concat) Backward(dx []float32, k int, dy, _ []float32, _ [][]float32, rows int) {
	at, total, n := 0, c.total(), c.Channels[k]
	for _, before := range c.Channels[:k] {
		at += before
	}
	for i := range rows * c.Pixels {
		copy(dx[i*n:][:n], dy[i*total+at:])
	}
}

func (c *Concat) total() (sum int) {
	for _, n := range c.Channels {
		sum += n
	}
	return sum
}

// Pad surrounds an image with values; rows and Left count values, not pixels.
type Pad struct {
	Height, Row       int // input
	OutHeight, OutRow int
	Top, Left         int
	Value             float32
}

func (p *Pad) Forward(y []float32, x [][]float32, rows int) {
	y = y[:rows*p.OutHeight*p.OutRow]
	for i := range y {
		y[i] = p.Value
	}
	for r := range rows {
		for h := range p.Height {
			copy(y[(r*p.OutHeight+p.Top+h)*p.OutRow+p.Left:][:p.Row], x[0][(r*p.Height+h)*p.Row:])
		}
	}
}

func (p *Pad) Backward(dx []float32, _ int, dy, _ []float32, _ [][]float32, rows int) {
	for r := range rows {
		for h := range p.Height {
			copy(dx[(r*p.Height+h)*p.Row:][:p.Row], dy[(r*p.OutHeight+p.Top+h)*p.OutRow+p.Left:])
		}
	}
}

// Permute puts values in another order: output i is input Places[i].
type Permute struct{ Places []int32 }

func (p *Permute) Forward(y []float32, x [][]float32, rows int) {
	n := len(p.Places)
	for r := range rows {
		from, to := x[0][r*n:][:n], y[r*n:][:n]
		for i, at := range p.Places {
			to[i] = from[at]
		}
	}
}

func (p *Permute) Backward(dx []float32, _ int, dy, _ []float32, _ [][]float32, rows int) {
	n := len(p.Places)
	for r := range rows {
		from, to := dy[r*n:][:n], dx[r*n:][:n]
		for i, at := range p.Places {
			to[at] = from[i]
		}
	}
}
