package kernel

// tapGradient computes a convolution's weight gradients by AMX, which adds up products
// of neighbouring pairs. The pairs are of output pixels, so those of one image are one
// long row, with lines of the same length for inputs and outputs: what an output line
// has too many are zeros. For a tap of the filters that row of inputs starts elsewhere.
//
// With many channels a tile of c has filters by channels: a holds the outputs'
// gradient, transposed once, and b the inputs, of which a pair and its neighbour to
// the right, half a pair on, need two copies. With few, it has taps by filters: a holds
// a row for each tap and channel, b the outputs' gradient.
type tapGradient struct {
	c       *Conv
	length  int       // of a line, in pairs
	steps   int       // pairs of an image, in whole tiles
	plane   int       // words, or values where there are few channels, of a copy of the inputs
	images  int       // worked on at a time
	held    int       // of them
	inputs  []float32 // the copies, of each image
	outputs []float32 // gradient of the outputs of one [steps, filters]
	a       []float32 // [filters, images, steps] or [taps, steps]
	sums    []float32 // [taps, filters, channels]
	spread  []float32 // inputs in the order of few, before they are rounded
}

// few says whether the taps make rows.
func (g *tapGradient) few() bool { return g.c.Channels < tileSide }

func (c *Conv) tapGradient() *tapGradient {
	if c.taps != nil {
		return c.taps
	}
	g := &tapGradient{c: c}
	c.taps = g
	taps, beyond := c.Kernel*c.Kernel, (c.Kernel-1)/c.Stride // outputs between the first tap's and the last's
	if g.few() {
		g.length = (c.OutWidth + beyond + 1) / 2
		g.steps = wholeTiles(c.OutHeight * g.length)
		g.plane = beyond*2*g.length + (beyond+1)/2*2 + 2*g.steps
		copies := c.Stride * c.Stride * c.Channels
		g.spread, g.inputs = make([]float32, copies*g.plane), make([]float32, copies*g.plane/2)
		g.a = make([]float32, taps*c.Channels*g.steps)
	} else {
		g.length = (c.OutWidth+1)/2 + beyond/2
		g.steps = wholeTiles(c.OutHeight * g.length)
		g.plane = (beyond*g.length + beyond/2 + g.steps) * c.Channels
		const enough = 192 // steps: sums are read and written for fewer
		g.images = max(1, enough/g.steps)
		g.inputs = make([]float32, g.images*g.copies())
		g.a = make([]float32, g.images*c.Filters*g.steps)
		g.sums = make([]float32, taps*c.Channels*c.Filters)
	}
	g.outputs = make([]float32, g.steps*c.Filters)
	return g
}

// wholeTiles is n, rounded up to a multiple of a tile's side.
func wholeTiles(n int) int { return (n + tileSide - 1) / tileSide * tileSide }

// phases is how many copies of a line there are: columns that may start a pair.
func (g *tapGradient) phases() int { return min(g.c.Kernel, 2*g.c.Stride) }

// copies is the size of all copies of an image.
func (g *tapGradient) copies() int { return g.c.Stride * g.phases() * g.plane }

func (g *tapGradient) begin() { clear(g.sums) }

// end completes dw.
func (g *tapGradient) end(dw []float32) {
	if n := g.c.Channels * g.c.Filters; !g.few() {
		g.multiply()
		for tap := range g.c.Kernel * g.c.Kernel {
			transpose(dw[tap*n:], g.sums[tap*n:], g.c.Filters, g.c.Channels)
		}
	}
}

// add adds the gradients of one example, after load.
func (g *tapGradient) add(dw, x []float32) {
	if g.few() {
		g.addFew(dw, x)
	} else {
		g.addMany(x)
	}
}

// load takes the gradient of one example's output, and adds that of the bias.
func (g *tapGradient) load(dbias, dy []float32) {
	c := g.c
	line, out := g.length*c.Filters, c.OutWidth*c.Filters
	if !c.PairsOut {
		for oy := range c.OutHeight {
			pairRows(g.outputs[oy*line:], dy[oy*out:], c.OutWidth, c.Filters)
		}
		addRows(dbias[:c.Filters], dy)
		return
	}
	pixel := c.Filters / 2
	joinPixels(g.outputs, dy, c.OutHeight, line, out/2, c.OutWidth/2, pixel, 2*pixel, c.Filters)
	if c.OutWidth%2 == 1 {
		joinPixels(g.outputs[c.OutWidth/2*c.Filters:], dy[(c.OutWidth-1)*pixel:], c.OutHeight, line, out/2, 1, 0, 0, c.Filters)
	}
	sumPairs(dbias[:c.Filters], dy, nil, c.OutHeight*c.OutWidth)
}

// loadPooled is load for the output's maxima in windows of 2 x 2, at the places.
func (g *tapGradient) loadPooled(dbias, dy []float32, places []int8) {
	c := g.c
	line, row := g.length*c.Filters, c.OutWidth/2*c.Filters
	for py := range c.OutHeight / 2 {
		unpoolJoin(g.outputs[2*py*line:], dy[py*row/2:], places[py*row:][:row], line, c.Filters)
	}
	sumPairs(dbias[:c.Filters], dy, places, c.OutHeight/2*(c.OutWidth/2))
}

func (g *tapGradient) addMany(x []float32) {
	c := g.c
	s, k, channels := c.Stride, c.Kernel, c.Channels
	var image []float32
	width, pixel := c.Width+2*c.Padding, channels
	if c.PairsIn {
		image, _, pixel = c.pairedInput(x)
	} else {
		image, _ = c.paddedInput(x)
	}
	height := c.Height + 2*c.Padding
	lines := c.OutHeight + (k-1)/s // of a copy
	line := g.length * channels
	copies := g.inputs[g.held*g.copies():]
	for row := range min(s, k) {
		for phase := range g.phases() {
			to := copies[(row*g.phases()+phase)*g.plane:]
			n := min(lines, (height-row+s-1)/s)
			count := min(g.length, max(0, (width-phase+s-1)/(2*s)))
			from := image[(row*width+phase)*pixel:]
			g.join(to, from, n, line, s*width*pixel, count, s*pixel, 2*s*pixel)
			if at := 2 * s * count; count < g.length && phase+at < width { // a last one without a partner
				g.join(to[count*channels:], from[at*pixel:], n, line, s*width*pixel, 1, 0, 0)
			}
		}
	}
	transposeTo(g.a[g.held*g.steps:], g.outputs, g.steps, c.Filters, g.images*g.steps, c.Filters)
	if g.held++; g.held == g.images {
		g.multiply()
	}
}

// multiply adds the gradients of the images that are held to the sums.
func (g *tapGradient) multiply() {
	if g.held == 0 {
		return
	}
	c := g.c
	s, k, channels := c.Stride, c.Kernel, c.Channels
	// Of a large image few enough steps at a time that they stay in the first-level
	// cache for all taps.
	const words = 8 << 10
	chunk := max(1, words/(c.Filters+channels)/tileSide) * tileSide
	for at := 0; at < g.steps; at += chunk {
		for row := range min(s, k) {
			for kx := range k {
				p := product{
					m: c.Filters, n: channels, steps: min(chunk, g.steps-at), segments: g.held,
					a: g.a[at:], aRow: g.images * g.steps, aStep: 1, aSegment: g.steps,
					b: g.inputs[(row*g.phases()+kx%g.phases())*g.plane+(at+kx/(2*s))*channels:], bStep: channels, bSegment: g.copies(),
					c: g.sums[(row*k+kx)*c.Filters*channels:], cRow: channels, add: true, pairs: true,
					lines: (k - row + s - 1) / s, bLine: g.length * channels, cLine: s * k * c.Filters * channels,
				}
				p.run()
			}
		}
	}
	g.held = 0
}

// join is joinPixels, of float32 too.
func (g *tapGradient) join(to, from []float32, lines, toLine, fromLine, count, far, step int) {
	if g.c.PairsIn {
		joinPixels(to, from, lines, toLine, fromLine, count, far, step, g.c.Channels)
		return
	}
	for l := range lines {
		pair(to[l*toLine:], from[l*fromLine:], count, g.c.Channels, far, step)
	}
}

func (g *tapGradient) addFew(dw, x []float32) {
	c := g.c
	s, k, channels := c.Stride, c.Kernel, c.Channels
	image, width := c.paddedInput(x)
	line := 2 * g.length
	// Every s-th pixel of every s-th line, channel by channel.
	whole := min(width/s, line)
	for y := range min(c.Height+2*c.Padding, (c.OutHeight+(k-1)/s)*s) {
		to, from := g.spread[y%s*s*channels*g.plane+y/s*line:], image[y*width*channels:]
		transposeTo(to, from, whole, s*channels, g.plane, s*channels)
		if left := width - whole*s; left > 0 && whole < line {
			transposeTo(to[whole:], from[whole*s*channels:], 1, min(left, s)*channels, g.plane, 1)
		}
	}
	round(g.inputs, g.spread)
	rows, values := halves(g.a), halves(g.inputs)
	for tap := range k * k {
		ky, kx := tap/k, tap%k
		for ch := range channels {
			at := ((ky%s*s+kx%s)*channels+ch)*g.plane + ky/s*line + kx/s
			copy(rows[(tap*channels+ch)*2*g.steps:][:2*g.steps], values[at:])
		}
	}
	p := product{
		m: k * k * channels, n: c.Filters, steps: g.steps, segments: 1,
		a: g.a, aRow: g.steps, aStep: 1, b: g.outputs, bStep: c.Filters,
		c: dw, cRow: c.Filters, add: true, pairs: true,
	}
	p.run()
}
