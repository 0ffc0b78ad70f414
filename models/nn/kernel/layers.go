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
	PairsIn, PairsOut       bool // inputs and outputs, and their gradients, are pairs: see UsePairs

	tiles  *winograd
	image  product   // the product over one input, but for the rows of the output
	width  int       // of the input with its border, in values of a
	shift  int       // between copies of a narrow input
	above  int       // rows of border above the first filter
	padded []float32 // one input with its border, which stays zero
	halved []float32 // the same as pairs of bfloat16
	back   []part    // the input gradient, where that is made of convolutions
	column []float32 // what each tap gives to the input gradient
	planes []float32 // the same, added up
	across []float32 // an output's gradient, its pixels innermost
	xPairs []float32 // operands of the weight gradient as pairs of bfloat16
	dPairs []float32
	strip  []float32 // lines of a result, before they are rounded
	block  *scratch  // the same, by AMX
	zeros  []float32 // a bias
	taps   *tapGradient
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

// sizes of an example's input and output in memory.
func (c *Conv) sizes() (in, out int) {
	in, out = c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth*c.Filters
	if c.PairsIn {
		in /= 2
	}
	if c.PairsOut {
		out /= 2
	}
	return in, out
}

func (c *Conv) paddedInput(x []float32) (image []float32, width int) {
	width = c.Width + 2*c.Padding
	if c.Padding > 0 {
		c.padded = grow(c.padded, (c.Height+2*c.Padding)*width*c.Channels)
	}
	return pad(c.padded, x, c.Height, c.Width, c.Channels, c.Padding), width
}

// packs says whether Forward multiplies bfloat16 values. The pairs are of neighbouring
// channels, so one channel alone would gain nothing, unless it is narrow.
func (c *Conv) packs() bool { return c.BF16 && (c.Channels > 1 || c.narrow()) }

// narrow says whether AMX computes the outputs of one channel, whose pairs are of
// neighbouring pixels. An output must start with a pair: with a stride of 1 those in
// odd columns start with one of another copy of the input.
func (c *Conv) narrow() bool {
	return c.tiled() && c.Channels == 1 && (c.Stride%2 == 0 || c.Stride == 1 && c.OutWidth%2 == 0)
}

// phases is how many copies of the input there are.
func (c *Conv) phases() int {
	if c.narrow() && c.Stride == 1 {
		return 2
	}
	return 1
}

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
	if c.narrow() {
		pairStrips(packed, w, c.Kernel, c.Kernel, c.Filters)
	} else {
		pairStrips(packed, w, c.Kernel*c.Kernel, c.Channels, c.Filters)
	}
	return packed
}

// narrowInput returns the copies of a narrow input, shift words from one to the next,
// and the words of a line.
func (c *Conv) narrowInput(x []float32) (copies []float32, line int) {
	image, width := c.paddedInput(x)
	height := c.Height + 2*c.Padding
	line = (width + 1) / 2
	c.shift = height*line + c.Kernel // the last output may read beyond the input, what its weights are 0 for
	c.halved = grow(c.halved, c.phases()*c.shift)
	if width%2 == 0 { // a pair from the end of a line to the next is read for weights of 0, too
		width, height = width*height, 1
	}
	for phase := range c.phases() {
		for y := range height {
			round(c.halved[phase*c.shift+y*line:], image[y*width:][phase:width])
		}
	}
	return c.halved, line
}

// bordered is room for one input as pairs, with its border.
func (c *Conv) bordered() (image []float32, width, channels int) {
	channels, width = (c.Channels+1)/2, c.Width+2*c.Padding
	c.halved = grow(c.halved, (c.Height+2*c.Padding)*width*channels)
	return c.halved, width, channels
}

// pairedInput is paddedInput with pairs of channels.
func (c *Conv) pairedInput(x []float32) (image []float32, width, channels int) {
	if c.PairsIn && c.Padding == 0 {
		return x, c.Width, c.Channels / 2
	}
	image, width, channels = c.bordered()
	if c.PairsIn {
		return pad(image, x, c.Height, c.Width, channels, c.Padding), width, channels
	}
	piece, pieces := c.Width*c.Channels, c.Height // what lies together in both
	if c.Channels%2 == 1 {
		piece, pieces = c.Channels, c.Height*c.Width
	}
	for i := range pieces {
		at := i * piece / c.Channels // pixel
		at = (at/c.Width+c.Padding)*width + at%c.Width + c.Padding
		round(image[at*channels:], x[i*piece:][:piece])
	}
	return image, width, channels
}

// Forward computes y = conv(x, w) + bias for rows examples, clamped at 0 where
// relu is set. The weights are as Pack returned them.
func (c *Conv) Forward(y, x, w, bias []float32, rows int, relu bool) {
	if c.Winograd {
		c.winograd().forward(y, x, w, bias, rows, relu)
		return
	}
	in, out := c.sizes()
	line := c.OutWidth * c.Filters
	for r := range rows {
		c.load(x[r*in:][:in], w, bias, relu && !c.PairsOut)
		if !c.PairsOut {
			c.rows(y[r*out:], 0, c.OutHeight)
			continue
		}
		if c.finishes() {
			c.image.finish = finish{out: y[r*out:], line: line / 2, row: c.phases() * c.Filters / 2, relu: relu}
			c.rows(nil, 0, c.OutHeight)
			continue
		}
		for oy, n := 0, c.some(1, line); oy < c.OutHeight; oy += n {
			n := min(n, c.OutHeight-oy)
			c.rows(c.strip, oy, n)
			roundMasked(y[r*out+oy*line/2:], c.strip[:n*line], nil, relu)
		}
	}
}

// finishes says whether AMX rounds the results, or pools them.
func (c *Conv) finishes() bool {
	steps := c.Kernel * ((c.Channels + 1) / 2)
	if c.narrow() {
		steps = (c.Kernel + 1) / 2
	}
	return c.tiled() && c.packs() && c.Filters%stripWidth == 0 && (steps <= tileSide || steps%tileSide == 0)
}

// some is how many lines of so many floats, a multiple of unit, are worked on at a
// time before they are rounded or pooled, and makes room for them in strip: they, and
// what they are made of, stay in the first-level cache.
func (c *Conv) some(unit, line int) int {
	const most = 4096 // floats
	n := max(1, most/(unit*line)) * unit
	c.strip = grow(c.strip, n*line)
	return n
}

// load prepares for rows the rows of one example's output.
func (c *Conv) load(x, w, bias []float32, relu bool) {
	switch {
	case c.narrow():
		image, line := c.narrowInput(x)
		c.over(image, line, max(1, c.Stride/2), (c.Kernel+1)/2, w, bias, relu)
	case c.packs():
		image, width, channels := c.pairedInput(x)
		c.over(image, width*channels, c.Stride*channels, c.Kernel*channels, w, bias, relu)
	default:
		image, width := c.paddedInput(x)
		c.over(image, width*c.Channels, c.Stride*c.Channels, c.Kernel*c.Channels, w, bias, relu)
	}
}

// over prepares for rows those of one example's output, given with its border: how long
// a line of it is, how far one output is from the next, and how many steps a row of the
// filters takes.
func (c *Conv) over(image []float32, line, next, steps int, w, bias []float32, relu bool) {
	c.width, c.above = line, c.Padding
	phases := c.phases()
	c.image = product{
		m: c.OutWidth / phases, n: c.Filters, steps: steps,
		a: image, aRow: next, aStep: 1, aSegment: line,
		b: w, bStep: c.Filters, bSegment: steps * c.Filters,
		cRow: phases * c.Filters, bias: bias, relu: relu, pairs: c.packs(),
		aLine: c.Stride * line, cLine: c.OutWidth * c.Filters,
	}
	if c.image.pairs && inStrips(c.Filters) {
		c.image.bStep, c.image.bSegment = stripWidth, steps*stripWidth
		c.image.bStrip = c.Kernel * c.image.bSegment
	}
}

// rows computes n rows of the output from oy on. The rows of a filter that lie in
// the border are left out; those of the output that see the same ones go together,
// at least two where AMX takes two at a time.
func (c *Conv) rows(y []float32, oy, n int) {
	unit := 1
	if c.image.finish.places != nil || c.image.tiled() && c.image.m <= tileSide {
		unit = 2
	}
	if c.image.finishes() {
		if c.block == nil {
			c.block = new(scratch)
		}
		c.image.finish.scratch = c.block
		if c.image.bias == nil {
			c.zeros = grow(c.zeros, c.image.n)
			c.image.bias = c.zeros
		}
	}
	first, end := oy, oy+n
	under := func(oy int) (lo, hi int) { // of the rows of filters over a unit
		at := oy*c.Stride - c.above // row of the input under the filter's first
		last := (min(oy+unit, end)-1)*c.Stride - c.above
		return max(0, -last), min(c.Kernel, c.Height-at)
	}
	for oy < end {
		p := c.image
		lo, hi := under(oy)
		p.segments = hi - lo
		p.a = p.a[(oy*c.Stride+lo)*c.width:]
		p.b = p.b[lo*p.bSegment:]
		switch {
		case p.finish.places != nil:
			p.finish = p.finish.from((oy-first)/2, 0)
		case p.finishes():
			p.finish = p.finish.from(oy-first, 0)
		default:
			p.c = y[(oy-first)*p.cLine:]
		}
		for same := true; same; {
			p.lines += min(unit, end-oy)
			oy += unit
			l, h := under(oy)
			same = oy < end && l == lo && h == hi
		}
		p.run()
		if c.phases() > 1 {
			p.a = p.a[c.shift:]
			if p.finishes() {
				p.finish.out = p.finish.out[c.Filters/2:]
			} else {
				p.c = p.c[c.Filters:]
			}
			p.run()
		}
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
	c.over(x, (c.Width+2*c.Padding)*c.Channels, c.Stride*c.Channels, c.Kernel*c.Channels, w, bias, relu)
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
		c.back[i].BF16, c.back[i].PairsIn = c.BF16, c.PairsOut
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
	in, out := c.sizes()
	for r := range rows {
		if c.direct() {
			c.parts()[0].load(dy[r*out:][:out], turned, nil, false)
			c.weave(dx[r*in:][:in], rest(mask, r*in))
		} else {
			c.addTaps(dx[r*in:][:in], dy[r*out:][:out], turned, rest(mask, r*in))
		}
	}
}

// weave computes one example's input gradient where direct says so, of the output's as
// the first part has loaded it, and of turned weights.
func (c *Conv) weave(dx, mask []float32) {
	parts := c.parts()
	first := &parts[0].Conv
	image, step := first.image, first.image.aRow
	image.cRow, image.cLine = c.Stride*c.Channels, c.Stride*c.Width*c.Channels
	for i := range parts {
		p := &parts[i]
		p.image, p.width, p.above = image, first.width, p.Padding-p.top
		p.image.m = p.OutWidth
		p.image.a = image.a[p.top*first.width+p.left*step:]
		p.image.b = image.b[i*p.Kernel*p.Kernel*c.Channels*c.Filters:]
	}
	lines := func(to []float32, at, n int) { // n lines of each part from at on
		for i := range parts {
			p := &parts[i]
			p.rows(to[(p.row*c.Width+p.column)*c.Channels:], at, min(n, p.OutHeight-at))
		}
	}
	if !c.PairsIn {
		lines(dx, 0, first.OutHeight)
		maskInput(dx, mask)
		return
	}
	if len(parts) == 1 && first.finishes() {
		first.image.finish = finish{out: dx, line: image.cLine / 2, row: image.cRow / 2, mask: mask}
		first.rows(nil, 0, first.OutHeight)
		return
	}
	line := image.cLine
	for at, n := 0, c.some(1, line); at < first.OutHeight; at += n {
		lines(c.strip, at, n)
		floats := min(n*line, c.Height*c.Width*c.Channels-at*line)
		roundMasked(dx[at*line/2:], c.strip[:floats], rest(mask, at*line/2), false)
	}
}

// addTaps computes one example's input gradient. For each tap of the filters and
// each channel, one product over the filters gives the gradient to all the pixels
// that the tap met, in the order of the output. With a row as long as an input's,
// border and all, those of different taps are added by shifting them. A stride
// spreads taps and pixels over as many planes, woven into dx in the end.
func (c *Conv) addTaps(dx, dy, turned, mask []float32) {
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
	}
	if c.BF16 && !c.PairsOut {
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
	maskInput(dx, mask)
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
	switch {
	case c.Winograd:
		w := c.winograd()
		w.sum = grow(w.sum, c.Arranged())
		clear(w.sum)
	case c.tiled():
		c.tapGradient().begin()
	}
}

// tiled says whether AMX computes the weight gradients.
func (c *Conv) tiled() bool { return c.BF16 && path == "amx" }

func (c *Conv) addWeights(dw, dbias, x, dy []float32, rows int) {
	in, out := c.sizes()
	if c.Winograd {
		c.winograd().addWeight(x, dy, rows)
		addRows(dbias[:c.Filters], dy[:rows*out])
		return
	}
	for r := range rows {
		if c.tiled() {
			c.tapGradient().load(dbias, dy[r*out:][:out])
			c.tapGradient().add(dw, x[r*in:][:in])
		} else {
			c.addWeight(dw, dbias, x[r*in:][:in], dy[r*out:][:out])
		}
	}
}

func (c *Conv) endWeight(dw []float32) {
	switch {
	case c.Winograd:
		n := c.Channels * c.Filters
		gatherWeight.apply(dw, strides{3 * n, n}, c.winograd().sum, strides{tileIn * n, n}, n, false)
	case c.tiled():
		c.tapGradient().end(dw)
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
		cRow: c.Filters, add: true, pairs: c.BF16,
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

	PairsIn, PairsOut bool // inputs and outputs, and their gradients, are pairs: see UsePairs

	pairs, dPairs []float32 // operands as pairs of bfloat16
	turned        []float32 // an operand, transposed
	strip         []float32 // columns of a result, before they are rounded
}

// Arranged makes Dense a Packer, with Pack.
func (d *Dense) Arranged() int { return d.In * d.Units }

// Pack makes Dense a Packer.
func (d *Dense) Pack(packed, w []float32) []float32 {
	if !d.BF16 {
		return w
	}
	pairStrips(packed, w, 1, d.In, d.Units)
	return packed
}

// multiply computes y = x w, at least 0 where relu is set, 0 where mask is not
// positive, for rows of in values; in and out say whether x and y are pairs.
func (d *Dense) multiply(y, x, w, bias, mask []float32, rows, from, to int, relu, in, out bool) {
	p := product{
		m: rows, n: to, steps: from, segments: 1,
		a: x, aRow: from, aStep: 1, b: w, bStep: to, c: y, cRow: to, bias: bias, relu: relu, pairs: d.BF16,
	}
	if d.BF16 {
		p.steps = (from + 1) / 2
		p.aRow = p.steps
		if !in {
			d.pairs = grow(d.pairs, rows*p.steps)
			roundRows(d.pairs, x, rows, from)
			p.a = d.pairs
		}
		if inStrips(to) {
			p.bStep, p.bStrip = stripWidth, p.steps*stripWidth
		}
	}
	if !out {
		p.run()
		maskInput(y[:rows*to], mask)
		return
	}
	const most = 512 // columns: a few rows of them stay in the first-level cache
	d.strip = grow(d.strip, rows*most)
	p.c, p.cRow, p.relu = d.strip, most, false
	for j := 0; j < to; j += most {
		part := p
		part.n = min(most, to-j)
		if p.bStrip > 0 {
			part.b = p.b[j/stripWidth*p.bStrip:]
		} else {
			part.b = p.b[j:]
		}
		if bias != nil {
			part.bias = bias[j:]
		}
		part.run()
		for r := range rows {
			at := (r*to + j) / 2
			roundMasked(y[at:], d.strip[r*most:][:part.n], rest(mask, at), relu)
		}
	}
}

// Forward computes y = x w + bias, clamped at 0 where relu is set. The weights
// are as Pack returned them.
func (d *Dense) Forward(y, x, w, bias []float32, rows int, relu bool) {
	d.multiply(y, x, w, bias, nil, rows, d.In, d.Units, relu, d.PairsIn, d.PairsOut)
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
	pairStrips(turned, d.dPairs, 1, d.Units, d.In)
}

// BackwardInput computes dx from dy and the weights arranged by Turn; see Weighted for
// the mask.
func (d *Dense) BackwardInput(dx, dy, turned, mask []float32, rows int) {
	d.multiply(dx, dy, turned, nil, mask, rows, d.Units, d.In, false, d.PairsOut, d.PairsIn)
}

// BackwardWeight computes dw and dbias, summed over the rows.
func (d *Dense) BackwardWeight(dw, dbias, x, dy []float32, rows int) {
	p := product{
		m: d.In, n: d.Units, steps: rows, segments: 1,
		a: x, aRow: 1, aStep: d.In, b: dy, bStep: d.Units, c: dw, cRow: d.Units, pairs: d.BF16,
	}
	if d.BF16 {
		p.steps = (rows + 1) / 2
		d.pairs, d.dPairs = grow(d.pairs, p.steps*d.In), grow(d.dPairs, p.steps*d.Units)
		joinRows(d.pairs, x, d.PairsIn, rows, d.In)
		joinRows(d.dPairs, dy, d.PairsOut, rows, d.Units)
		p.a, p.b = d.pairs, d.dPairs
		if path == "amx" { // which wants the steps of a row side by side
			d.turned = grow(d.turned, p.steps*d.In)
			transpose(d.turned, p.a, p.steps, d.In)
			p.a, p.aRow, p.aStep = d.turned, p.steps, 1
		}
	}
	p.run()
	if d.PairsOut {
		clear(dbias[:d.Units])
		sumPairs(dbias[:d.Units], dy, nil, rows)
	} else {
		sumRows(dbias[:d.Units], dy[:rows*d.Units])
	}
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

	which  []int32   // place of each maximum in its window, row-major; none where the ReLU cut it off
	places []int8    // the same, where outputs are pairs
	dz     []float32 // gradient of the convolution's output of some images
}

// none is the place of a maximum that has no gradient.
const none = -1

// windows is how many an example has, with filters counted.
func (p *ConvPool) windows() int {
	return p.OutHeight / p.Size * (p.OutWidth / p.Size) * p.Filters
}

// Forward computes y for rows examples; relu must be set.
func (p *ConvPool) Forward(y, x, w, bias []float32, rows int, relu bool) {
	in, _ := p.sizes()
	out := p.windows()
	line, row := p.OutWidth*p.Filters, p.OutWidth/p.Size*p.Filters
	if p.PairsOut && len(p.places) < rows*out {
		p.places = make([]int8, rows*out)
	}
	if !p.PairsOut && len(p.which) < rows*out {
		p.which = make([]int32, rows*out)
	}
	pooled := func(r, py int, strip []float32) {
		at := r*out + py*row
		if p.PairsOut {
			poolPairs(y[at/2:][:row/2], p.places[at:at+row], strip, line, p.Filters)
			return
		}
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
	step := p.some(p.Size, line) / p.Size
	for r := range rows {
		p.load(x[r*in:][:in], w, bias, relu && !p.PairsOut) // its pool clamps pairs
		if p.PairsOut && p.finishes() && p.phases() == 1 {
			p.image.m = p.OutWidth / 2 * 2
			p.image.finish = finish{out: y[r*out/2:], line: row / 2, row: p.Filters / 2, places: p.places[r*out:]}
			p.rows(nil, 0, p.OutHeight/2*2)
			continue
		}
		for py := 0; py < p.OutHeight/p.Size; py += step {
			n := min(step, p.OutHeight/p.Size-py)
			p.rows(p.strip, py*p.Size, n*p.Size)
			for i := range n {
				pooled(r, py+i, p.strip[i*p.Size*line:])
			}
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
	out, line, row := p.windows(), p.OutWidth*p.Filters, p.OutWidth/p.Size*p.Filters
	p.dz = grow(p.dz, p.together()*p.OutHeight*line) // what no window covers stays zero
	for i := range n {
		for py := range p.OutHeight / p.Size {
			at := (r+i)*out + py*row
			unpool(p.dz[(i*p.OutHeight+py*p.Size)*line:], dy[at:at+row], p.which[at:at+row], p.Size, line, p.Filters)
		}
	}
	return p.dz
}

// unpooledPairs does so for the pairs of example r, in an image whose lines of pixels
// with channels pairs each are so wide.
func (p *ConvPool) unpooledPairs(image, dy []float32, r, width, channels int) {
	out, row := p.windows(), p.OutWidth/p.Size*p.Filters
	for py := range p.OutHeight / p.Size {
		at := r*out + py*row
		unpoolPairs(image[py*p.Size*width*channels:], dy[at/2:], p.places[at:at+row], width*channels, p.Filters)
	}
}

// BackwardInput computes dx from dy and the weights arranged by Turn; see Weighted for
// the mask.
func (p *ConvPool) BackwardInput(dx, dy, turned, mask []float32, rows int) {
	in, out := p.sizes()
	step := p.together()
	for r := 0; r < rows; r += step {
		n := min(step, rows-r)
		dx, mask := dx[r*in:][:n*in], rest(mask, r*in)
		switch {
		case !p.PairsOut:
			p.Conv.BackwardInput(dx, p.unpooled(dy, r, n), turned, mask, n)
		case p.direct():
			first := &p.parts()[0].Conv
			image, width, channels := first.bordered()
			p.unpooledPairs(image[(first.Padding*width+first.Padding)*channels:], dy, r, width, channels)
			first.over(image, width*channels, channels, first.Kernel*channels, turned, nil, false)
			p.weave(dx, mask)
		default:
			p.dz = grow(p.dz, out)
			p.unpooledPairs(p.dz, dy, r, p.OutWidth, p.Filters/2)
			p.addTaps(dx, p.dz, turned, mask)
		}
	}
}

// BackwardWeight computes dw and dbias, summed over the rows.
func (p *ConvPool) BackwardWeight(dw, dbias, x, dy []float32, rows int) {
	in, _ := p.sizes()
	p.beginWeight(dw, dbias)
	if out := p.windows(); p.PairsOut {
		for r := range rows {
			p.tapGradient().loadPooled(dbias, dy[r*out/2:], p.places[r*out:][:out])
			p.tapGradient().add(dw, x[r*in:][:in])
		}
	} else {
		step := p.together()
		for r := 0; r < rows; r += step {
			n := min(step, rows-r)
			p.addWeights(dw, dbias, x[r*in:], p.unpooled(dy, r, n), n)
		}
	}
	p.endWeight(dw)
}

// MaxWindow is the largest window of a MaxPool: far above any network in use.
const MaxWindow = 15
