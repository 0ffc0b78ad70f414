package kernel

import "fmt"

// Winograd's algorithm F(4x4, 3x3) (Lavin and Gray 2016, "Fast Algorithms for
// Convolutional Neural Networks", section 4.3): 4 x 4 outputs of a 3 x 3 convolution
// come of 6 x 6 inputs by 36 products in the place of 144. Inputs and weights are
// spread over 36 planes by transforms of few operations, each plane is a product of
// matrices, [tiles, channels] by [channels, filters], and its results are gathered.
// All of it is float32, with an error some five times that of the plain convolution. What
// an output is, to the bit, depends on the inputs under its tile and on nothing else.
//
// Gradients follow from the algorithm. Where a tile of outputs is A (W * B x B') A',
// with W = G w G' and * taking value by value what stands for a product of matrices,
// that of its inputs is B' (W' * A' dy A) B, added up where tiles overlap, and that of
// the weights is G' (sum over tiles of B x B' * A' dy A) G.

const (
	tileOut = 4                // outputs of a tile along an axis
	tileIn  = 6                // its inputs
	overlap = tileIn - tileOut // of neighbouring tiles of inputs
	planes  = tileIn * tileIn
	// Rows of a plane that are worked on at a time: enough for a micro-kernel to
	// have its operands' worth, few enough for the second-level cache.
	planeRows = 36
)

// transform is t -> M t M' for tiles t, of M.
type transform [][]float32

var (
	spreadInput = transform{
		{4, 0, -5, 0, 1, 0},
		{0, -4, -4, 1, 1, 0},
		{0, 4, -4, -1, 1, 0},
		{0, -2, -1, 2, 1, 0},
		{0, 2, -1, -2, 1, 0},
		{0, 4, 0, -5, 0, 1},
	}
	spreadWeight = transform{
		{1. / 4, 0, 0},
		{-1. / 6, -1. / 6, -1. / 6},
		{-1. / 6, 1. / 6, -1. / 6},
		{1. / 24, 1. / 12, 1. / 6},
		{1. / 24, -1. / 12, 1. / 6},
		{0, 0, 1},
	}
	gatherOutput = transform{
		{1, 1, 1, 1, 1, 0},
		{0, 1, -1, 2, -2, 0},
		{0, 1, 1, 4, 4, 0},
		{0, 1, -1, 8, -8, 1},
	}
	scatterInput = transposed(spreadInput)
	spreadOutput = transposed(gatherOutput)
	gatherWeight = transposed(spreadWeight)
)

func transposed(m transform) transform {
	t := make(transform, len(m[0]))
	for i := range t {
		for _, row := range m {
			t[i] = append(t[i], row[i])
		}
	}
	return t
}

// strides tell where the rows and columns of tiles lie.
type strides struct{ row, column int }

// apply transforms n tiles, side by side in src as in dst. Results of gatherOutput are
// at least 0 where relu is set; those of scatterInput are added to what its first rows
// and columns hold of the tiles before.
func (t *transform) apply(dst []float32, to strides, src []float32, from strides, n int, relu bool) {
	last := func(s strides, size int) int { return (size-1)*(s.row+s.column) + n - 1 }
	if last(to, len(*t)) >= len(dst) || last(from, len((*t)[0])) >= len(src) {
		panic(fmt.Sprintf("kernel: a transform of %d tiles reaches beyond its operands: %v of %d to %v of %d", n, from, len(src), to, len(dst)))
	}
	if n%16 != 0 || !t.vectors(dst, to, src, from, n/16, relu) {
		t.portable(dst, to, src, from, n, relu)
	}
}

func (t *transform) portable(dst []float32, to strides, src []float32, from strides, n int, relu bool) {
	var rows [tileIn][tileIn]float32
	for tile := range n {
		for r := range (*t)[0] {
			for o, m := range *t {
				sum := float32(0)
				for i, v := range m {
					sum += v * src[r*from.row+i*from.column+tile]
				}
				rows[r][o] = sum
			}
		}
		for o, m := range *t {
			for column := range *t {
				sum := float32(0)
				for r, v := range m {
					sum += v * rows[r][column]
				}
				if relu {
					sum = max(sum, 0)
				}
				at := o*to.row + column*to.column + tile
				if t == &scatterInput && (o < overlap || column < overlap) {
					sum += dst[at]
				}
				dst[at] = sum
			}
		}
	}
}

// winograd is a convolution with 3 x 3 filters and stride 1.
type winograd struct {
	in, out      tiled
	down, across int       // tiles of an image
	images       int       // worked on at a time
	sum          []float32 // gradient of the weights, spread
	part         *winograd // the tiles of a window
}

// tiled is one side of it, [height, width, channels]: inputs or outputs.
type tiled struct {
	height, width, channels int
	border                  int // of zeros, before the first of both axes
	tall, wide              int // under all tiles
	padded                  []float32
	result                  []float32 // as tall and wide
	planes                  []float32 // [planes, tiles of some images, channels]
}

func newWinograd(c *Conv) *winograd {
	w := &winograd{down: (c.OutHeight + tileOut - 1) / tileOut, across: (c.OutWidth + tileOut - 1) / tileOut}
	tall, wide := w.down*tileOut, w.across*tileOut
	w.in = tiled{height: c.Height, width: c.Width, channels: c.Channels, border: c.Padding, tall: tall + overlap, wide: wide + overlap}
	w.out = tiled{height: c.OutHeight, width: c.OutWidth, channels: c.Filters, tall: tall, wide: wide}
	w.images = max(1, planeRows/(w.down*w.across))
	return w
}

func (s *tiled) size() int { return s.height * s.width * s.channels }

// whole says whether tiles cover the images and no more.
func (s *tiled) whole() bool { return s.height == s.tall && s.width == s.wide }

// inside is where an image starts among what is as tall and wide as its tiles.
func (s *tiled) inside() int { return (s.border*s.wide + s.border) * s.channels }

// plane makes room for some images and returns how far apart their planes are. Of
// planes that are a multiple of 4 KiB apart the first-level cache could hold few lines.
func (w *winograd) plane(s *tiled, images int) int {
	n := images*w.down*w.across*s.channels + 16
	s.planes = grow(s.planes, planes*n)
	return n
}

// tiles calls f for every tile of an image: where it starts among what is as tall and
// wide as all of them, and in a plane.
func (w *winograd) tiles(s *tiled, image int, f func(at, tile int)) {
	tile := image * w.down * w.across * s.channels
	for y := range w.down {
		for x := range w.across {
			f((y*s.wide+x)*tileOut*s.channels, tile)
			tile += s.channels
		}
	}
}

// spread makes planes of some images.
func (w *winograd) spread(s *tiled, t *transform, x []float32, images int) {
	plane := w.plane(s, images)
	for i := range images {
		image := x[i*s.size():][:s.size()]
		if !s.whole() {
			s.padded = grow(s.padded, s.tall*s.wide*s.channels) // the border stays zero
			copyLines(s.padded[s.inside():], s.wide*s.channels, image, s.width*s.channels, s.height)
			image = s.padded
		}
		w.tiles(s, i, func(at, tile int) {
			t.apply(s.planes[tile:], strides{tileIn * plane, plane}, image[at:], strides{s.wide * s.channels, s.channels}, s.channels, false)
		})
	}
}

// collect makes some images of planes.
func (w *winograd) collect(s *tiled, t *transform, y []float32, images int, relu bool) {
	plane := w.plane(s, images)
	for i := range images {
		image := y[i*s.size():][:s.size()]
		result := image
		if !s.whole() {
			s.result = grow(s.result, s.tall*s.wide*s.channels)
			result = s.result
		}
		if t == &scatterInput { // there are none before the first ones
			line := s.wide * s.channels
			clear(result[:overlap*line])
			for y := overlap; y < s.tall; y++ {
				clear(result[y*line:][:overlap*s.channels])
			}
		}
		w.tiles(s, i, func(at, tile int) {
			t.apply(result[at:], strides{s.wide * s.channels, s.channels}, s.planes[tile:], strides{tileIn * plane, plane}, s.channels, relu)
		})
		if !s.whole() {
			copyLines(image, s.width*s.channels, result[s.inside():], s.wide*s.channels, s.height)
		}
	}
}

// copyLines copies lines, as long as the shorter of the distances.
func copyLines(to []float32, toLine int, from []float32, fromLine, lines int) {
	for i := range lines {
		copy(to[i*toLine:][:min(toLine, fromLine)], from[i*fromLine:])
	}
}

// multiply makes the planes of one side of those of the other by weights.
func (w *winograd) multiply(to, from *tiled, weights, bias []float32, images int) {
	toPlane, fromPlane := w.plane(to, images), w.plane(from, images)
	for i := range planes {
		p := product{
			m: images * w.down * w.across, n: to.channels, steps: from.channels, segments: 1,
			a: from.planes[i*fromPlane:], aRow: from.channels, aStep: 1,
			b: weights[i*from.channels*to.channels:], bStep: to.channels,
			c: to.planes[i*toPlane:], cRow: to.channels,
		}
		if i == tileIn+1 { // what is added to this plane is added to all outputs
			p.bias = bias
		}
		p.run()
	}
}

// some calls f for all rows, for some images at a time.
func (w *winograd) some(rows int, f func(r, images int)) {
	for r := 0; r < rows; r += w.images {
		f(r, min(w.images, rows-r))
	}
}

// spreadWeights arranges the weights, nine taps of n values, as planes.
func spreadWeights(to, weights []float32, n int) {
	spreadWeight.apply(to, strides{tileIn * n, n}, weights, strides{3 * n, n}, n, false)
}

// forward computes y of rows examples, with spread weights.
func (w *winograd) forward(y, x, weights, bias []float32, rows int, relu bool) {
	w.some(rows, func(r, images int) {
		w.spread(&w.in, &spreadInput, x[r*w.in.size():], images)
		w.multiply(&w.out, &w.in, weights, bias, images)
		w.collect(&w.out, &gatherOutput, y[r*w.out.size():], images, relu)
	})
}

// window computes a window of one example's output from its input with the border.
// Lines of y lie so many floats apart. The tiles are those of forward, and whole: the
// values are the same.
func (w *winograd) window(y []float32, line int, x, weights, bias []float32, relu bool, top, left, height, width int) {
	if w.part == nil {
		w.part = &winograd{images: 1}
	}
	p := w.part
	first, column := top/tileOut, left/tileOut
	p.down, p.across = (top+height-1)/tileOut+1-first, (left+width-1)/tileOut+1-column
	p.in.cover(p, w.in.channels, overlap)
	p.out.cover(p, w.out.channels, 0)

	clear(p.in.padded) // what is past the border
	from, border := (w.in.width+2*w.in.border)*w.in.channels, 2*w.in.border
	lines := min(p.in.tall, w.in.height+border-first*tileOut)
	values := min(p.in.wide, w.in.width+border-column*tileOut) * w.in.channels
	for i := range lines {
		copy(p.in.padded[i*p.in.wide*w.in.channels:][:values], x[(first*tileOut+i)*from+column*tileOut*w.in.channels:])
	}
	p.forward(p.out.padded, p.in.padded, weights, bias, 1, relu)
	for i := range height {
		at := (top-first*tileOut+i)*p.out.wide + left - column*tileOut
		copy(y[i*line:][:width*w.out.channels], p.out.padded[at*w.out.channels:])
	}
}

// cover makes it as large as the tiles of w and so much more.
func (s *tiled) cover(w *winograd, channels, more int) {
	s.tall, s.wide, s.channels = w.down*tileOut+more, w.across*tileOut+more, channels
	s.height, s.width = s.tall, s.wide
	s.padded = grow(s.padded, s.size())
}

// backward computes dx of rows examples, with spread weights whose taps were
// transposed; see Weighted for the mask.
func (w *winograd) backward(dx, dy, weights, mask []float32, rows int) {
	w.some(rows, func(r, images int) {
		w.spread(&w.out, &spreadOutput, dy[r*w.out.size():], images)
		w.multiply(&w.in, &w.out, weights, nil, images)
		w.collect(&w.in, &scatterInput, dx[r*w.in.size():], images, false)
		maskInput(dx[r*w.in.size():][:images*w.in.size()], rest(mask, r*w.in.size()))
	})
}

// addWeight adds the gradient of the weights over rows examples to sum.
func (w *winograd) addWeight(x, dy []float32, rows int) {
	w.some(rows, func(r, images int) {
		w.spread(&w.in, &spreadInput, x[r*w.in.size():], images)
		w.spread(&w.out, &spreadOutput, dy[r*w.out.size():], images)
		n := w.in.channels * w.out.channels
		in, out := w.plane(&w.in, images), w.plane(&w.out, images)
		for i := range planes {
			p := product{
				m: w.in.channels, n: w.out.channels, steps: images * w.down * w.across, segments: 1,
				a: w.in.planes[i*in:], aRow: 1, aStep: w.in.channels,
				b: w.out.planes[i*out:], bStep: w.out.channels,
				c: w.sum[i*n:], cRow: w.out.channels, add: true,
			}
			p.run()
		}
	})
}
