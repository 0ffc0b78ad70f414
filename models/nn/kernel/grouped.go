package kernel

// GroupedConv is a convolution with groups, dilation or a border wider than its
// kernel: weights [kernel, kernel, channels / groups, filters]. Conv is faster
// where there is none of these.
type GroupedConv struct {
	Height, Width, Channels int // input
	OutHeight, OutWidth     int
	Filters                 int
	Kernel, Stride, Padding int
	Dilation, Groups        int

	padded []float32 // one input with its border, which stays zero
	sum    []float32 // gradient of one input with its border
}

// depthwise tells whether every channel has one filter of its own.
func (c *GroupedConv) depthwise() bool { return c.Groups == c.Channels && c.Groups == c.Filters }

// sizes of an example's input and output, and the width of an input's row with
// its border.
func (c *GroupedConv) sizes() (in, out, width int) {
	return c.Height * c.Width * c.Channels, c.OutHeight * c.OutWidth * c.Filters, c.Width + 2*c.Padding
}

func (c *GroupedConv) paddedInput(x []float32) []float32 {
	if c.Padding > 0 {
		c.padded = grow(c.padded, (c.Height+2*c.Padding)*(c.Width+2*c.Padding)*c.Channels)
	}
	return pad(c.padded, x, c.Height, c.Width, c.Channels, c.Padding)
}

func (c *GroupedConv) Forward(y, x, w, bias []float32, rows int, relu bool) {
	in, out, width := c.sizes()
	channels, filters := c.Channels/c.Groups, c.Filters/c.Groups
	for r := range rows {
		image := c.paddedInput(x[r*in:][:in])
		for oy := range c.OutHeight {
			line := y[r*out+oy*c.OutWidth*c.Filters:][:c.OutWidth*c.Filters]
			if c.depthwise() {
				c.forwardDepthwise(line, image, w, bias, oy, relu)
				continue
			}
			for g := range c.Groups {
				p := product{
					m: c.OutWidth, n: filters, steps: channels, segments: c.Kernel,
					aRow: c.Stride * c.Channels, aStep: 1, aSegment: c.Dilation * c.Channels,
					bStep: c.Filters, bSegment: channels * c.Filters,
					c: line[g*filters:], cRow: c.Filters, bias: bias[g*filters:],
				}
				for ky := range c.Kernel {
					p.a = image[(oy*c.Stride+ky*c.Dilation)*width*c.Channels+g*channels:]
					p.b = w[ky*c.Kernel*channels*c.Filters+g*filters:]
					p.add, p.relu = ky > 0, relu && ky == c.Kernel-1
					p.run()
				}
			}
		}
	}
}

// forwardDepthwise computes one line of the output.
func (c *GroupedConv) forwardDepthwise(line, image, w, bias []float32, oy int, relu bool) {
	n, width := c.Channels, c.Width+2*c.Padding
	for ox := range c.OutWidth {
		to := line[ox*n:][:n]
		copy(to, bias)
		for ky := range c.Kernel {
			for kx := range c.Kernel {
				from := image[((oy*c.Stride+ky*c.Dilation)*width+ox*c.Stride+kx*c.Dilation)*n:][:n]
				for i, v := range w[(ky*c.Kernel+kx)*n:][:n] {
					to[i] += v * from[i]
				}
			}
		}
		if relu {
			for i, v := range to {
				to[i] = max(v, 0)
			}
		}
	}
}

// Turn transposes the weights of every tap: [kernel, kernel, filters,
// channels / groups].
func (c *GroupedConv) Turn(turned, w []float32) {
	size := c.Channels / c.Groups * c.Filters
	for tap := range c.Kernel * c.Kernel {
		transpose(turned[tap*size:], w[tap*size:], c.Channels/c.Groups, c.Filters)
	}
}

func (c *GroupedConv) BackwardInput(dx, dy, turned, mask []float32, rows int) {
	in, out, width := c.sizes()
	channels, filters := c.Channels/c.Groups, c.Filters/c.Groups
	c.sum = grow(c.sum, (c.Height+2*c.Padding)*width*c.Channels)
	for r := range rows {
		clear(c.sum)
		for oy := range c.OutHeight {
			line := dy[r*out+oy*c.OutWidth*c.Filters:][:c.OutWidth*c.Filters]
			for ky := range c.Kernel {
				for kx := range c.Kernel {
					sum := c.sum[((oy*c.Stride+ky*c.Dilation)*width+kx*c.Dilation)*c.Channels:]
					tap := turned[(ky*c.Kernel+kx)*c.Filters*channels:]
					if c.depthwise() {
						c.backwardDepthwise(sum, line, tap)
						continue
					}
					for g := range c.Groups {
						p := product{
							m: c.OutWidth, n: channels, steps: filters, segments: 1,
							a: line[g*filters:], aRow: c.Filters, aStep: 1,
							b: tap[g*filters*channels:], bStep: channels,
							c: sum[g*channels:], cRow: c.Stride * c.Channels, add: true,
						}
						p.run()
					}
				}
			}
		}
		copyLines(dx[r*in:], c.Width*c.Channels, c.sum[(c.Padding*width+c.Padding)*c.Channels:], width*c.Channels, c.Height)
		maskInput(dx[r*in:][:in], rest(mask, r*in))
	}
}

// backwardDepthwise adds what one tap of one line of gradients gives to the
// inputs under it.
func (c *GroupedConv) backwardDepthwise(sum, line, tap []float32) {
	n := c.Channels
	for ox := range c.OutWidth {
		to, from := sum[ox*c.Stride*n:][:n], line[ox*n:][:n]
		for i, v := range tap[:n] {
			to[i] += v * from[i]
		}
	}
}

func (c *GroupedConv) BackwardWeight(dw, dbias, x, dy []float32, rows int) {
	in, out, width := c.sizes()
	channels, filters := c.Channels/c.Groups, c.Filters/c.Groups
	if c.depthwise() {
		clear(dw[:c.Kernel*c.Kernel*c.Channels])
	}
	for r := range rows {
		image, grad := c.paddedInput(x[r*in:][:in]), dy[r*out:][:out]
		for ky := range c.Kernel {
			for kx := range c.Kernel {
				under := image[(ky*width+kx)*c.Dilation*c.Channels:]
				tap := dw[(ky*c.Kernel+kx)*channels*c.Filters:]
				if c.depthwise() {
					c.weightDepthwise(tap, under, grad)
					continue
				}
				for g := range c.Groups {
					p := product{
						m: channels, n: filters, steps: c.OutWidth, segments: c.OutHeight,
						a: under[g*channels:], aRow: 1, aStep: c.Stride * c.Channels, aSegment: c.Stride * width * c.Channels,
						b: grad[g*filters:], bStep: c.Filters, bSegment: c.OutWidth * c.Filters,
						c: tap[g*filters:], cRow: c.Filters, add: r > 0,
					}
					p.run()
				}
			}
		}
	}
	sumRows(dbias[:c.Filters], dy[:rows*out])
}

// weightDepthwise adds one image's part of the gradient of one tap.
func (c *GroupedConv) weightDepthwise(tap, under, grad []float32) {
	n, width := c.Channels, c.Width+2*c.Padding
	tap = tap[:n]
	for oy := range c.OutHeight {
		for ox := range c.OutWidth {
			from := under[(oy*width+ox)*c.Stride*n:][:n]
			for i, g := range grad[(oy*c.OutWidth+ox)*n:][:n] {
				tap[i] += g * from[i]
			}
		}
	}
}
