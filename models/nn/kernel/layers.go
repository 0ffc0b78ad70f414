package kernel

// Conv is a square convolution over [rows, height, width, channels] with
// zero padding, weights [kernel, kernel, channels, filters] and bias [filters].
// It owns its scratch memory and serves one goroutine.
type Conv struct {
	Height, Width, Channels int // input
	OutHeight, OutWidth     int
	Filters                 int
	Kernel, Stride, Padding int
	BF16                    bool // multiply bfloat16 values: see HasBF16
	Winograd                bool // by Winograd's algorithm, of float32: see UseWinograd

	tiles  *winograd
	image  product   // the product over one input, but for the rows of the output
	width  int       // of the input with its border, in values of a
	above  int       // rows of border above the first filter
	padded []float32 // one input with its border, which stays zero
	halved []float32 // the same as pairs of bfloat16
	back   []part    // the input gradient, where that is made of convolutions
	column []float32 // what each tap gives to the input gradient
	planes []float32 // the same, added up
	across []float32 // an output's gradient, its pixels innermost
	xPairs []float32 // operands of the weight gradient as pairs of bfloat16
	dPairs []float32
	turned []float32 // an operand, transposed
}

// grow returns a slice of n floats, reusing s where it is long enough. New
// memory is zero.
func grow(s []float32, n int) []float32 {
	if cap(s) < n {
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
	copyLines(dst[p*row+p*channels:], row, image, width*channels, height)
	return dst
}

func (c *Conv) paddedInput(x []float32) (image []float32, width int) {
	width = c.Width + 2*c.Padding
	if c.Padding > 0 {
		c.padded = grow(c.padded, (c.Height+2*c.Padding)*width*c.Channels)
	}
	return pad(c.padded, x, c.Height, c.Width, c.Channels, c.Padding), width
}

// packs says whether Forward multiplies bfloat16 values. The pairs are of
// neighbouring channels, so one channel alone would gain nothing.
func (c *Conv) packs() bool { return c.BF16 && c.Channels > 1 }

// fitsWinograd says whether Winograd may be set.
func (c *Conv) fitsWinograd() bool { return c.Kernel == 3 && c.Stride == 1 }

// suitsWinograd says whether it is the fastest where vectors are 16 values wide: those
// have channels to fill them, and at least half of what the tiles make is wanted.
func (c *Conv) suitsWinograd() bool {
	if path == "portable" || path == "avx2" || !c.fitsWinograd() || c.Channels%16 != 0 || c.Filters%16 != 0 {
		return false
	}
	w := newWinograd(c)
	return 2*w.out.height*w.out.width >= w.out.tall*w.out.wide
}

func (c *Conv) winograd() *winograd {
	if c.tiles == nil {
		c.tiles = newWinograd(c)
	}
	return c.tiles
}

// Grain is the side of the squares that outputs are made in: each of one depends, if
// only by rounding, on all the inputs under it.
func (c *Conv) Grain() int {
	if c.Winograd {
		return tileOut
	}
	return 1
}

// together is how many images are worked on at a time.
func (c *Conv) together() int {
	if c.Winograd {
		return c.winograd().images
	}
	return 1
}

// Arranged is how many values the weights are after Pack, and after Turn.
func (c *Conv) Arranged() int {
	n := c.Channels * c.Filters
	if c.Winograd {
		return planes * n
	}
	return c.Kernel * c.Kernel * n
}

// Pack makes Conv a Packer.
func (c *Conv) Pack(packed, w []float32) []float32 {
	if c.Winograd {
		packed = grow(packed, c.Arranged())
		spreadWeights(packed, w, c.Channels*c.Filters)
		return packed
	}
	if !c.packs() {
		return w
	}
	from, to := c.Channels*c.Filters, (c.Channels+1)/2*c.Filters
	for tap := range c.Kernel * c.Kernel {
		pairRows(packed[tap*to:], w[tap*from:], c.Channels, c.Filters)
	}
	return packed
}

// pairedInput is paddedInput with pairs of channels.
func (c *Conv) pairedInput(x []float32) (image []float32, width, channels int) {
	channels, width = (c.Channels+1)/2, c.Width+2*c.Padding
	c.halved = grow(c.halved, (c.Height+2*c.Padding)*width*channels)
	piece, pieces := c.Width*c.Channels, c.Height // what lies together in both
	if c.Channels%2 == 1 {
		piece, pieces = c.Channels, c.Height*c.Width
	}
	for i := range pieces {
		at := i * piece / c.Channels // pixel
		at = (at/c.Width+c.Padding)*width + at%c.Width + c.Padding
		round(c.halved[at*channels:], x[i*piece:][:piece])
	}
	return c.halved, width, channels
}

// Forward computes y = conv(x, w) + bias for rows examples, clamped at 0 where
// relu is set. The weights are as Pack returned them.
func (c *Conv) Forward(y, x, w, bias []float32, rows int, relu bool) {
	if c.Winograd {
		c.winograd().forward(y, x, w, bias, rows, relu)
		return
	}
	in, out := c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth*c.Filters
	for r := range rows {
		c.load(x[r*in:][:in], w, bias, relu)
		c.rows(y[r*out:], 0, c.OutHeight)
	}
}

// load prepares for rows the rows of one example's output.
func (c *Conv) load(x, w, bias []float32, relu bool) {
	var image []float32
	width, channels := 0, c.Channels
	if c.packs() {
		image, width, channels = c.pairedInput(x)
	} else {
		image, width = c.paddedInput(x)
	}
	c.over(image, width, channels, w, bias, relu)
}

// over prepares for rows those of one example's output, given with its border.
func (c *Conv) over(image []float32, width, channels int, w, bias []float32, relu bool) {
	c.width, c.above = width*channels, c.Padding
	c.image = product{
		m: c.OutWidth, n: c.Filters, steps: c.Kernel * channels,
		a: image, aRow: c.Stride * channels, aStep: 1, aSegment: c.width,
		b: w, bStep: c.Filters, bSegment: c.Kernel * channels * c.Filters,
		cRow: c.Filters, bias: bias, relu: relu, pairs: c.packs(),
		aLine: c.Stride * width * channels, cLine: c.OutWidth * c.Filters,
	}
}

// rows computes n rows of the output from oy on. The rows of a filter that lie in
// the border are left out; those of the output that see the same ones go together.
func (c *Conv) rows(y []float32, oy, n int) {
	under := func(oy int) (lo, hi int) {
		at := oy*c.Stride - c.above // row of the input under the filter's first
		return max(0, -at), min(c.Kernel, c.Height-at)
	}
	for first, end := oy, oy+n; oy < end; {
		p := c.image
		lo, hi := under(oy)
		p.segments = hi - lo
		p.a = p.a[(oy*c.Stride+lo)*c.width:]
		p.b = p.b[lo*p.bSegment:]
		p.c = y[(oy-first)*p.cLine:]
		for same := true; same; {
			oy++
			p.lines++
			l, h := under(oy)
			same = oy < end && l == lo && h == hi
		}
		p.run()
	}
}

// Window computes a window of one example's output from its input with the border of
// zeros, with the values that Forward gives them. Lines of y lie so many floats apart.
// It multiplies float32 values.
func (c *Conv) Window(y []float32, line int, x, w, bias []float32, relu bool, top, left, height, width int) {
	if c.Winograd {
		c.winograd().window(y, line, x, w, bias, relu, top, left, height, width)
		return
	}
	c.over(x, c.Width+2*c.Padding, c.Channels, w, bias, relu)
	c.image.m, c.image.a, c.image.cLine = width, x[left*c.image.aRow:], line
	c.rows(y, top, height)
}

// part is one part of an input gradient: that of every Stride-th row and column of
// the input is a convolution of the output's gradient with every Stride-th row and
// column of the filters, turned.
type part struct {
	Conv
	row, column int // the first ones
	top, left   int // how far into the border the filters start
}

// direct says whether the gradient of the input is made of such parts: where they
// are all of one size, no input is left over, and its channels fill a vector.
func (c *Conv) direct() bool {
	return c.Channels >= 16 && c.Kernel%c.Stride == 0 && (c.Height+2*c.Padding-c.Kernel)%c.Stride == 0 && (c.Width+2*c.Padding-c.Kernel)%c.Stride == 0
}

// parts returns them: Stride x Stride.
func (c *Conv) parts() []part {
	if c.back == nil {
		s, k := c.Stride, c.Kernel/c.Stride
		// The filters of output o are at o+(row+Padding)/s-(k-1) and further, by
		// which the border is as wide on both sides as the widest needs.
		border := k - 1 - c.Padding/s
		for row := range s {
			for column := range s {
				c.back = append(c.back, part{
					Conv: Conv{
						Height: c.OutHeight, Width: c.OutWidth, Channels: c.Filters,
						OutHeight: (c.Height - row + s - 1) / s, OutWidth: (c.Width - column + s - 1) / s, Filters: c.Channels,
						Kernel: k, Stride: 1, Padding: border,
					},
					row: row, column: column,
					top: (row+c.Padding)/s - c.Padding/s, left: (column+c.Padding)/s - c.Padding/s,
				})
			}
		}
	}
	for i := range c.back {
		c.back[i].BF16 = c.BF16
	}
	return c.back
}

// Turn arranges the weights for BackwardInput into turned. It needs to be called
// once for each new set of weights.
func (c *Conv) Turn(turned, w []float32) {
	k := c.Kernel
	if c.Winograd {
		n := c.Channels * c.Filters
		c.column = grow(c.column, len(w))
		for tap := range k * k {
			transpose(c.column[tap*n:], w[tap*n:], c.Channels, c.Filters)
		}
		spreadWeights(turned, c.column, n)
		return
	}
	if !c.direct() {
		if c.BF16 {
			roundRows(turned, w, k*k*c.Channels, c.Filters)
		} else {
			copy(turned, w)
		}
		return
	}
	to := turned
	if c.BF16 {
		c.column = grow(c.column, len(w))
		to = c.column
	}
	for i, p := range c.parts() {
		for ky := range p.Kernel {
			for kx := range p.Kernel {
				// the last tap of the part comes first
				y := (p.row+c.Padding)%c.Stride + (p.Kernel-1-ky)*c.Stride
				x := (p.column+c.Padding)%c.Stride + (p.Kernel-1-kx)*c.Stride
				at := (i*p.Kernel+ky)*p.Kernel + kx
				transpose(to[at*c.Channels*c.Filters:], w[(y*k+x)*c.Channels*c.Filters:], c.Channels, c.Filters)
			}
		}
	}
	if c.BF16 {
		for i, p := range c.parts() {
			at := i * p.Kernel * p.Kernel * c.Channels * c.Filters
			p.Pack(turned[at:], to[at:])
		}
	}
}

// BackwardInput computes dx, the gradient with respect to x, from dy and the
// weights arranged by Turn; see Weighted for the mask.
func (c *Conv) BackwardInput(dx, dy, turned, mask []float32, rows int) {
	if c.Winograd {
		c.winograd().backward(dx, dy, turned, mask, rows)
		return
	}
	in, out := c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth*c.Filters
	for r := range rows {
		if c.direct() {
			c.weaveParts(dx[r*in:][:in], dy[r*out:][:out], turned)
		} else {
			c.addTaps(dx[r*in:][:in], dy[r*out:][:out], turned)
		}
		maskInput(dx[r*in:][:in], mask, r*in)
	}
}

// weaveParts computes one example's input gradient where direct says so.
func (c *Conv) weaveParts(dx, dy, turned []float32) {
	parts := c.parts()
	first := &parts[0].Conv
	first.load(dy, turned, nil, false)
	image, step := first.image, first.image.aRow
	image.cRow, image.cLine = c.Stride*c.Channels, c.Stride*c.Width*c.Channels
	for i := range parts {
		p := &parts[i]
		p.image, p.width, p.above = image, first.width, p.Padding-p.top
		p.image.m = p.OutWidth
		p.image.a = image.a[p.top*first.width+p.left*step:]
		p.image.b = turned[i*p.Kernel*p.Kernel*c.Channels*c.Filters:]
		p.rows(dx[(p.row*c.Width+p.column)*c.Channels:], 0, p.OutHeight)
	}
}

// addTaps computes one example's input gradient. For each tap of the filters and
// each channel, one product over the filters gives the gradient to all the pixels
// that the tap met, in the order of the output. With a row as long as an input's,
// border and all, those of different taps are added by shifting them. A stride
// spreads taps and pixels over as many planes, woven into dx in the end.
func (c *Conv) addTaps(dx, dy, turned []float32) {
	s := c.Stride
	height, width := (c.Height+2*c.Padding+s-1)/s, (c.Width+2*c.Padding+s-1)/s
	plane := height * width
	p := product{
		m: c.Kernel * c.Kernel * c.Channels, n: c.OutHeight * width, steps: c.Filters, segments: 1,
		a: turned, aRow: c.Filters, aStep: 1, bStep: c.OutHeight * width, cRow: plane,
	}
	if c.BF16 {
		p.steps, p.pairs = (c.Filters+1)/2, true
		p.aRow = p.steps
		c.dPairs = grow(c.dPairs, c.OutHeight*c.OutWidth*p.steps)
		roundRows(c.dPairs, dy, c.OutHeight*c.OutWidth, c.Filters)
		dy = c.dPairs
	}
	c.across = grow(c.across, p.steps*p.bStep) // its border stays zero
	for oy := range c.OutHeight {
		transposeTo(c.across[oy*width:], dy[oy*c.OutWidth*p.steps:], c.OutWidth, p.steps, p.bStep, p.steps)
	}
	c.column = grow(c.column, p.m*plane) // what is past n stays zero
	p.b, p.c = c.across, c.column
	p.run()

	c.planes = grow(c.planes, s*s*c.Channels*plane)
	clear(c.planes)
	for tap := range c.Kernel * c.Kernel {
		ky, kx := tap/c.Kernel, tap%c.Kernel
		all, shift := c.Channels*plane, ky/s*width+kx/s
		Add(c.planes[(ky%s*s+kx%s)*all+shift:], c.column[tap*all:][:all-shift])
	}
	for y := range c.Height {
		for x := range min(s, c.Width) {
			py, px := y+c.Padding, x+c.Padding
			at := (py%s*s+px%s)*c.Channels*plane + py/s*width + px/s
			transposeTo(dx[(y*c.Width+x)*c.Channels:], c.planes[at:], c.Channels, (c.Width-x+s-1)/s, s*c.Channels, plane)
		}
	}
}

// BackwardWeight computes dw and dbias, summed over the rows.
func (c *Conv) BackwardWeight(dw, dbias, x, dy []float32, rows int) {
	c.beginWeight(dw, dbias)
	c.addWeights(dw, dbias, x, dy, rows)
	c.endWeight(dw)
}

// beginWeight, addWeights as often as there are examples, and endWeight compute the
// weight gradients.
func (c *Conv) beginWeight(dw, dbias []float32) {
	clear(dw)
	clear(dbias)
	if c.Winograd {
		w := c.winograd()
		w.sum = grow(w.sum, c.Arranged())
		clear(w.sum)
	}
}

func (c *Conv) addWeights(dw, dbias, x, dy []float32, rows int) {
	in, out := c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth*c.Filters
	if c.Winograd {
		c.winograd().addWeight(x, dy, rows)
		addRows(dbias[:c.Filters], dy[:rows*out])
		return
	}
	for r := range rows {
		c.addWeight(dw, dbias, x[r*in:][:in], dy[r*out:][:out])
	}
}

func (c *Conv) endWeight(dw []float32) {
	if c.Winograd {
		n := c.Channels * c.Filters
		gatherWeight.apply(dw, strides{3 * n, n}, c.winograd().sum, strides{tileIn * n, n}, n, false)
	}
}

// addWeight adds the weight gradients of one example.
func (c *Conv) addWeight(dw, dbias, x, dy []float32) {
	image, width := c.paddedInput(x)
	segment, pixels := c.Kernel*c.Channels, c.OutHeight*c.OutWidth
	p := product{
		m: segment, n: c.Filters, steps: c.OutWidth,
		aRow: 1, aStep: c.Stride * c.Channels, aSegment: c.Stride * width * c.Channels,
		b: dy, bStep: c.Filters, bSegment: c.OutWidth * c.Filters,
		cRow: c.Filters, add: true, pairs: c.BF16, turned: &c.turned,
	}
	if c.BF16 {
		// Steps are output pixels, so the pairs are of neighbours in a row: in x
		// the stride apart.
		p.steps = (c.OutWidth + 1) / 2
		size := (c.Height + 2*c.Padding) * width * c.Channels
		c.xPairs = grow(c.xPairs, size)
		pair(c.xPairs, image, 1, size-p.aStep, p.aStep, 0)
		pair(c.xPairs[size-p.aStep:], image[size-p.aStep:], 1, p.aStep, 0, 0)
		image = c.xPairs
		p.aStep *= 2
		p.bSegment = p.steps * c.Filters
		c.dPairs = grow(c.dPairs, c.OutHeight*p.bSegment)
		if c.OutWidth%2 == 0 {
			pairRows(c.dPairs, dy, pixels, c.Filters)
		} else {
			for oy := range c.OutHeight {
				pairRows(c.dPairs[oy*p.bSegment:], dy[oy*c.OutWidth*c.Filters:], c.OutWidth, c.Filters)
			}
		}
		p.b = c.dPairs
	}
	for ky := range c.Kernel {
		part := p
		lo := max(0, (c.Padding-ky+c.Stride-1)/c.Stride) // the first row of dy over the input, not its border
		part.segments = min(c.OutHeight, (c.Height+c.Padding-ky-1)/c.Stride+1) - lo
		if part.segments < 1 {
			continue
		}
		part.a = image[(lo*c.Stride+ky)*width*c.Channels:]
		part.b = p.b[lo*p.bSegment:]
		part.c = dw[ky*segment*c.Filters:]
		part.run()
	}
	addRows(dbias[:c.Filters], dy[:pixels*c.Filters])
}

// Dense is a fully connected layer: weights [in, units], bias [units]. It owns
// its scratch memory and serves one goroutine.
type Dense struct {
	In, Units int
	BF16      bool // multiply bfloat16 values: see HasBF16

	pairs, dPairs []float32 // operands as pairs of bfloat16
	turned        []float32 // an operand, transposed
}

// Arranged makes Dense a Packer, with Pack.
func (d *Dense) Arranged() int { return d.In * d.Units }

// Pack makes Dense a Packer.
func (d *Dense) Pack(packed, w []float32) []float32 {
	if !d.BF16 {
		return w
	}
	pairRows(packed, w, d.In, d.Units)
	return packed
}

// rounded returns rows of n values as pairs, and the length of a row.
func (d *Dense) rounded(x []float32, rows, n int) ([]float32, int) {
	d.pairs = grow(d.pairs, rows*((n+1)/2))
	roundRows(d.pairs, x, rows, n)
	return d.pairs, (n + 1) / 2
}

// Forward computes y = x w + bias, clamped at 0 where relu is set. The weights
// are as Pack returned them.
func (d *Dense) Forward(y, x, w, bias []float32, rows int, relu bool) {
	p := product{
		m: rows, n: d.Units, steps: d.In, segments: 1,
		a: x, aRow: d.In, aStep: 1, b: w, bStep: d.Units, c: y, cRow: d.Units, bias: bias, relu: relu, pairs: d.BF16,
	}
	if d.BF16 {
		p.a, p.steps = d.rounded(x, rows, d.In)
		p.aRow = p.steps
	}
	p.run()
}

// Turn arranges the weights for BackwardInput into turned, of the same length.
// It needs to be called once for each new set of weights.
func (d *Dense) Turn(turned, w []float32) {
	if !d.BF16 {
		transpose(turned, w, d.In, d.Units)
		return
	}
	d.dPairs = grow(d.dPairs, len(w))
	transpose(d.dPairs, w, d.In, d.Units)
	pairRows(turned, d.dPairs, d.Units, d.In)
}

// BackwardInput computes dx from dy and the weights arranged by Turn; see Weighted for
// the mask.
func (d *Dense) BackwardInput(dx, dy, turned, mask []float32, rows int) {
	p := product{
		m: rows, n: d.In, steps: d.Units, segments: 1,
		a: dy, aRow: d.Units, aStep: 1, b: turned, bStep: d.In, c: dx, cRow: d.In, pairs: d.BF16,
	}
	if d.BF16 {
		p.a, p.steps = d.rounded(dy, rows, d.Units)
		p.aRow = p.steps
	}
	p.run()
	maskInput(dx[:rows*d.In], mask, 0)
}

// BackwardWeight computes dw and dbias, summed over the rows.
func (d *Dense) BackwardWeight(dw, dbias, x, dy []float32, rows int) {
	p := product{
		m: d.In, n: d.Units, steps: rows, segments: 1,
		a: x, aRow: 1, aStep: d.In, b: dy, bStep: d.Units, c: dw, cRow: d.Units, pairs: d.BF16, turned: &d.turned,
	}
	if d.BF16 {
		p.steps = (rows + 1) / 2
		d.pairs, d.dPairs = grow(d.pairs, p.steps*d.In), grow(d.dPairs, p.steps*d.Units)
		pairRows(d.pairs, x, rows, d.In)
		pairRows(d.dPairs, dy, rows, d.Units)
		p.a, p.b = d.pairs, d.dPairs
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

// ConvPool is a Conv with a ReLU and a MaxPool after it, worked on by rows that
// stay in the first-level cache, or by few images that stay in the second-level one:
// the convolution's output, the largest of a network, is never written to memory. It
// remembers each maximum's place for the gradients, whose dy is that of the pool's
// output.
type ConvPool struct {
	Conv
	Size int // of the pool's windows, which do not overlap

	strip []float32 // of the convolution's output: rows under one row of windows, or some images
	which []int32   // place of each maximum in its window, row-major; none where the ReLU cut it off
	dz    []float32 // gradient of the convolution's output of some images
}

// none is the place of a maximum that has no gradient.
const none = -1

func (p *ConvPool) out() int { return p.OutHeight / p.Size * (p.OutWidth / p.Size) * p.Filters }

// Forward computes y for rows examples; relu must be set.
func (p *ConvPool) Forward(y, x, w, bias []float32, rows int, relu bool) {
	in, out := p.Height*p.Width*p.Channels, p.out()
	line, row := p.OutWidth*p.Filters, p.OutWidth/p.Size*p.Filters
	if len(p.which) < rows*out {
		p.which = make([]int32, rows*out)
	}
	pooled := func(r, py int, strip []float32) {
		at := r*out + py*row
		pool(y[at:at+row], p.which[at:at+row], strip, p.Size, line, p.Filters)
	}
	if p.Winograd {
		step := p.together()
		p.strip = grow(p.strip, step*p.OutHeight*line)
		for r := 0; r < rows; r += step {
			n := min(step, rows-r)
			p.Conv.Forward(p.strip, x[r*in:], w, bias, n, relu)
			for i := range n {
				for py := range p.OutHeight / p.Size {
					pooled(r+i, py, p.strip[(i*p.OutHeight+py*p.Size)*line:])
				}
			}
		}
		return
	}
	p.strip = grow(p.strip, p.Size*line)
	for r := range rows {
		p.load(x[r*in:][:in], w, bias, relu)
		for py := range p.OutHeight / p.Size {
			p.rows(p.strip, py*p.Size, p.Size)
			pooled(r, py, p.strip)
		}
	}
}

// Window computes a window of one example's output, as Conv's does.
func (p *ConvPool) Window(y []float32, line int, x, w, bias []float32, top, left, height, width int) {
	row := width * p.Filters
	strip := p.Size * row
	p.strip = grow(p.strip, height*p.Size*strip)
	if len(p.which) < row {
		p.which = make([]int32, row)
	}
	p.Conv.Window(p.strip, strip, x, w, bias, true, top*p.Size, left*p.Size, height*p.Size, width*p.Size)
	for i := range height {
		pool(y[i*line:][:row], p.which[:row], p.strip[i*p.Size*strip:], p.Size, strip, p.Filters)
	}
}

// unpooled spreads the gradient of n examples from r on over the convolution's output.
func (p *ConvPool) unpooled(dy []float32, r, n int) []float32 {
	out, line, row := p.out(), p.OutWidth*p.Filters, p.OutWidth/p.Size*p.Filters
	p.dz = grow(p.dz, p.together()*p.OutHeight*line) // what no window covers stays zero
	for i := range n {
		for py := range p.OutHeight / p.Size {
			at := (r+i)*out + py*row
			unpool(p.dz[(i*p.OutHeight+py*p.Size)*line:], dy[at:at+row], p.which[at:at+row], p.Size, line, p.Filters)
		}
	}
	return p.dz
}

// BackwardInput computes dx from dy and the weights arranged by Turn; see Weighted for
// the mask.
func (p *ConvPool) BackwardInput(dx, dy, turned, mask []float32, rows int) {
	in, step := p.Height*p.Width*p.Channels, p.together()
	for r := 0; r < rows; r += step {
		n := min(step, rows-r)
		p.Conv.BackwardInput(dx[r*in:], p.unpooled(dy, r, n), turned, nil, n)
		maskInput(dx[r*in:][:n*in], mask, r*in)
	}
}

// BackwardWeight computes dw and dbias, summed over the rows.
func (p *ConvPool) BackwardWeight(dw, dbias, x, dy []float32, rows int) {
	in, step := p.Height*p.Width*p.Channels, p.together()
	p.beginWeight(dw, dbias)
	for r := 0; r < rows; r += step {
		n := min(step, rows-r)
		p.addWeights(dw, dbias, x[r*in:], p.unpooled(dy, r, n), n)
	}
	p.endWeight(dw)
}

// MaxWindow is the largest window of a MaxPool: far above any network in use.
const MaxWindow = 15
