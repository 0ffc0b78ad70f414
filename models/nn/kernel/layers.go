package kernel

// Conv is a square convolution over [rows, height, width, channels] with
// zero padding, weights [kernel, kernel, channels, filters] and bias [filters].
// It owns its scratch memory and serves one goroutine.
type Conv struct {
	Height, Width, Channels int // input
	OutHeight, OutWidth     int
	Filters                 int
	Kernel, Stride, Padding int

	padded []float32 // one input with its border, which stays zero
	column []float32 // gradients of all patches of one example
}

// grow returns a slice of n floats, reusing s where it is long enough. New
// memory is zero.
func grow(s []float32, n int) []float32 {
	if len(s) < n {
		return make([]float32, n)
	}
	return s[:n]
}

// pad copies one image into dst with a border of zeros p wide; the border of
// dst must already be zero. It returns the image itself where p is 0.
func pad(dst, image []float32, height, width, channels, p int) []float32 {
	if p == 0 {
		return image
	}
	row := (width + 2*p) * channels
	for y := range height {
		copy(dst[(y+p)*row+p*channels:][:width*channels], image[y*width*channels:])
	}
	return dst
}

func (c *Conv) paddedInput(x []float32) (image []float32, width int) {
	width = c.Width + 2*c.Padding
	if c.Padding > 0 {
		c.padded = grow(c.padded, (c.Height+2*c.Padding)*width*c.Channels)
	}
	return pad(c.padded, x, c.Height, c.Width, c.Channels, c.Padding), width
}

// Forward computes y = conv(x, w) + bias for rows examples, clamped at 0 where
// relu is set.
func (c *Conv) Forward(y, x, w, bias []float32, rows int, relu bool) {
	in, out := c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth*c.Filters
	for r := range rows {
		image, width := c.paddedInput(x[r*in:][:in])
		p := product{
			m: c.OutWidth, n: c.Filters, steps: c.Kernel * c.Channels, segments: c.Kernel,
			aRow: c.Stride * c.Channels, aStep: 1, aSegment: width * c.Channels,
			b: w, bStep: c.Filters, bSegment: c.Kernel * c.Channels * c.Filters,
			cRow: c.Filters, bias: bias, relu: relu,
		}
		for oy := range c.OutHeight {
			p.a = image[oy*c.Stride*width*c.Channels:]
			p.c = y[r*out+oy*c.OutWidth*c.Filters:]
			p.run()
		}
	}
}

// direct says whether the gradient of the input is itself a convolution of
// the output's gradient with the turned filters: for stride 1, and enough
// channels to fill a vector.
func (c *Conv) direct() bool { return c.Stride == 1 && c.Channels >= 16 }

// Turn arranges the weights for BackwardInput into turned, of the same length.
// It needs to be called once for each new set of weights.
func (c *Conv) Turn(turned, w []float32) {
	k := c.Kernel
	if !c.direct() {
		transpose(turned, w, k*k*c.Channels, c.Filters)
		return
	}
	for tap := range k * k {
		transpose(turned[(k*k-1-tap)*c.Channels*c.Filters:], w[tap*c.Channels*c.Filters:], c.Channels, c.Filters)
	}
}

// BackwardInput computes dx, the gradient with respect to x, from dy and the
// weights arranged by Turn.
func (c *Conv) BackwardInput(dx, dy, turned []float32, rows int) {
	if c.direct() {
		back := Conv{
			Height: c.OutHeight, Width: c.OutWidth, Channels: c.Filters,
			OutHeight: c.Height, OutWidth: c.Width, Filters: c.Channels,
			Kernel: c.Kernel, Stride: 1, Padding: c.Kernel - 1 - c.Padding, padded: c.column,
		}
		back.Forward(dx, dy, turned, nil, rows, false)
		c.column = back.padded
		return
	}
	in, pixels := c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth
	patch, width := c.Kernel*c.Kernel*c.Channels, c.Width+2*c.Padding
	c.column = grow(c.column, pixels*patch)
	c.padded = grow(c.padded, (c.Height+2*c.Padding)*width*c.Channels)
	for r := range rows {
		p := product{
			m: pixels, n: patch, steps: c.Filters, segments: 1,
			a: dy[r*pixels*c.Filters:][:pixels*c.Filters], aRow: c.Filters, aStep: 1,
			b: turned, bStep: patch, c: c.column, cRow: patch,
		}
		p.run()
		sum := c.padded
		clear(sum)
		// Neighbouring patches overlap. Those that are apart enough not to are
		// added in one go, so that no load waits for the store just before it.
		segment, apart := c.Kernel*c.Channels, (c.Kernel+c.Stride-1)/c.Stride
		for oy := range c.OutHeight {
			for ky := range c.Kernel {
				for ox := range min(apart, c.OutWidth) {
					to := ((oy*c.Stride+ky)*width + ox*c.Stride) * c.Channels
					from := (oy*c.OutWidth+ox)*patch + ky*segment
					scatter(sum[to:], c.column[from:], (c.OutWidth-ox+apart-1)/apart, segment, apart*c.Stride*c.Channels, apart*patch)
				}
			}
		}
		for y := range c.Height {
			at := ((y+c.Padding)*width + c.Padding) * c.Channels
			copy(dx[r*in+y*c.Width*c.Channels:][:c.Width*c.Channels], sum[at:])
		}
	}
	clear(c.padded) // its border must be zero for Forward and BackwardWeight
}

// BackwardWeight computes dw and dbias, summed over the rows.
func (c *Conv) BackwardWeight(dw, dbias, x, dy []float32, rows int) {
	in, pixels := c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth
	segment := c.Kernel * c.Channels
	for r := range rows {
		image, width := c.paddedInput(x[r*in:][:in])
		p := product{
			m: segment, n: c.Filters, steps: c.OutWidth, segments: c.OutHeight,
			aRow: 1, aStep: c.Stride * c.Channels, aSegment: c.Stride * width * c.Channels,
			b: dy[r*pixels*c.Filters:][:pixels*c.Filters], bStep: c.Filters, bSegment: c.OutWidth * c.Filters,
			cRow: c.Filters, add: r > 0,
		}
		for ky := range c.Kernel {
			p.a = image[ky*width*c.Channels:]
			p.c = dw[ky*segment*c.Filters:]
			p.run()
		}
	}
	sumRows(dbias[:c.Filters], dy[:rows*pixels*c.Filters])
}

// Dense is a fully connected layer: weights [in, units], bias [units].
type Dense struct{ In, Units int }

// Forward computes y = x w + bias, clamped at 0 where relu is set.
func (d *Dense) Forward(y, x, w, bias []float32, rows int, relu bool) {
	p := product{
		m: rows, n: d.Units, steps: d.In, segments: 1,
		a: x, aRow: d.In, aStep: 1, b: w, bStep: d.Units, c: y, cRow: d.Units, bias: bias, relu: relu,
	}
	p.run()
}

// Turn arranges the weights for BackwardInput into turned, of the same length.
func (d *Dense) Turn(turned, w []float32) { transpose(turned, w, d.In, d.Units) }

// BackwardInput computes dx from dy and the weights arranged by Turn.
func (d *Dense) BackwardInput(dx, dy, turned []float32, rows int) {
	p := product{
		m: rows, n: d.In, steps: d.Units, segments: 1,
		a: dy, aRow: d.Units, aStep: 1, b: turned, bStep: d.In, c: dx, cRow: d.In,
	}
	p.run()
}

// BackwardWeight computes dw and dbias, summed over the rows.
func (d *Dense) BackwardWeight(dw, dbias, x, dy []float32, rows int) {
	p := product{
		m: d.In, n: d.Units, steps: rows, segments: 1,
		a: x, aRow: 1, aStep: d.In, b: dy, bStep: d.Units, c: dw, cRow: d.Units,
	}
	p.run()
	sumRows(dbias[:d.Units], dy[:rows*d.Units])
}

// MaxPool takes the maximum over Size x Size windows that do not overlap.
type MaxPool struct {
	Height, Width, Channels int // input
	Size                    int
}

// Forward computes y and, in which, the place of each maximum inside its
// window, row-major; the first of equal values wins.
func (p *MaxPool) Forward(y []float32, which []int32, x []float32, rows int) {
	oh, ow, ch := p.Height/p.Size, p.Width/p.Size, p.Channels
	out := 0
	for r := range rows {
		image := x[r*p.Height*p.Width*ch:][:p.Height*p.Width*ch]
		for oy := range oh {
			for ox := range ow {
				best, index := y[out:][:ch], which[out:][:ch]
				copy(best, image[(oy*p.Size*p.Width+ox*p.Size)*ch:])
				clear(index)
				for tap := 1; tap < p.Size*p.Size; tap++ {
					at := ((oy*p.Size+tap/p.Size)*p.Width + ox*p.Size + tap%p.Size) * ch
					maximum(best, index, image[at:][:ch], int32(tap))
				}
				out += ch
			}
		}
	}
}

// Backward computes dx: each window's gradient goes to its maximum.
func (p *MaxPool) Backward(dx, dy []float32, which []int32, rows int) {
	oh, ow, ch := p.Height/p.Size, p.Width/p.Size, p.Channels
	if p.Height%p.Size != 0 || p.Width%p.Size != 0 {
		clear(dx[:rows*p.Height*p.Width*ch])
	}
	in := 0
	for r := range rows {
		image := dx[r*p.Height*p.Width*ch:][:p.Height*p.Width*ch]
		for oy := range oh {
			for ox := range ow {
				for tap := range p.Size * p.Size {
					at := ((oy*p.Size+tap/p.Size)*p.Width + ox*p.Size + tap%p.Size) * ch
					selected(image[at:][:ch], dy[in:][:ch], which[in:][:ch], int32(tap))
				}
				in += ch
			}
		}
	}
}

// MaxWindow is the largest window of a MaxPool: far above any network in use.
const MaxWindow = 15
