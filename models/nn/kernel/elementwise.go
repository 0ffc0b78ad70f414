package kernel

import "math"

// Add adds src to dst, which is as long.
func Add(dst, src []float32) { addTo(dst, src) }

// MaskPositive sets dst to grad where y is positive, and to 0 elsewhere: the
// gradient of a ReLU with output y. dst may be grad.
func MaskPositive(dst, grad, y []float32) { maskPositive(dst, grad, y) }

// maskInput sets dx to 0 where mask is not positive; a mask of nil leaves it.
func maskInput(dx, mask []float32) {
	if mask != nil {
		maskPositive(dx, dx, mask[:len(dx)])
	}
}

// rest is a mask from the given place on: nil for nil.
func rest(mask []float32, from int) []float32 {
	if mask == nil {
		return nil
	}
	return mask[from:]
}

// SignStep moves each value of x by alpha in the direction of the gradient's sign,
// not at all where that is 0, then to the nearest value within reach of clean and
// within [0,1]: one step of an attack in the maximum norm. It reports whether
// the gradient is finite.
func SignStep(x, clean, gradient []float32, alpha, reach float32) (finite bool) {
	return signStep(x, clean[:len(x)], gradient[:len(x)], alpha, reach)
}

// AdamStep holds the coefficients of one step of Adam, in the order that the
// assembly reads them.
type AdamStep struct {
	Beta1, Rest1 float32 // decay of the first moment, and 1 minus it
	Beta2, Rest2 float32 // decay of the second moment, and 1 minus it
	Rate         float32 // learning rate x sqrt(1 - Beta2^t) / (1 - Beta1^t)
	Epsilon      float32 // epsilon x sqrt(1 - Beta2^t)
	Average      float32 // 1 minus the decay of the moving average of the weights
	Scale        float32 // factor on the gradient, such as that of norm clipping
}

// Adam updates the weights p with their moments m and v and their exponential
// moving average, element by element (Kingma and Ba 2015, algorithm 1, with
// the bias corrections moved into Rate and Epsilon as its section 2 shows).
func Adam(p, m, v, average, grad []float32, c *AdamStep) { adam(p, m, v, average, grad, c) }

// transpose writes the transpose of src [rows, columns] to dst.
func transpose(dst, src []float32, rows, columns int) {
	transposeTo(dst, src, rows, columns, rows, columns)
}

// sumRows sets sum to the sum of the rows of src, each as long as sum.
func sumRows(sum, src []float32) {
	clear(sum)
	addRows(sum, src)
}

func addRows(sum, src []float32) {
	for len(src) > 0 {
		addTo(sum, src[:len(sum)])
		src = src[len(sum):]
	}
}

// The portable forms; maximum, selected and the exported functions above say
// what they do.

func addPortable(dst, src []float32) {
	for i, v := range src {
		dst[i] += v
	}
}

// maximumPortable raises best to x where x is larger or not a number, noting
// place in index there: a NaN must come out of the network, to be found.
func maximumPortable(best []float32, index []int32, x []float32, place int32) {
	for i, v := range x {
		if v > best[i] || v != v {
			best[i], index[i] = v, place
		}
	}
}

// selectedPortable sets dst to src where index names place, and to 0
// elsewhere.
func selectedPortable(dst, src []float32, index []int32, place int32) {
	for i, v := range src {
		if index[i] == place {
			dst[i] = v
		} else {
			dst[i] = 0
		}
	}
}

// transposePortable works in blocks that stay in the first-level cache.
func transposePortable(dst, src []float32, rows, columns, dstRow, srcRow int) {
	const block = 16
	for i := 0; i < rows; i += block {
		for j := 0; j < columns; j += block {
			for r := i; r < min(i+block, rows); r++ {
				for c, v := range src[r*srcRow+j:][:min(block, columns-j)] {
					dst[(j+c)*dstRow+r] = v
				}
			}
		}
	}
}

// clampPortable sets what is negative to 0; a NaN stays one.
func clampPortable(v []float32) {
	for i, x := range v {
		v[i] = max(x, 0)
	}
}

// poolPortable sets y [pixels, channels] to the maxima of the windows in strip,
// size rows of line floats, and which to their places; none where a maximum is
// not positive. A NaN stays one.
func poolPortable(y []float32, which []int32, strip []float32, size, line, channels int) {
	for at := 0; at < len(y); at += channels {
		best, index := y[at:][:channels], which[at:][:channels]
		window := strip[at*size:]
		copy(best, window)
		clear(index)
		for tap := 1; tap < size*size; tap++ {
			maximumPortable(best, index, window[tap/size*line+tap%size*channels:][:channels], int32(tap))
		}
		for i, v := range best {
			if !(v > 0) {
				index[i] = none
			}
		}
	}
}

// unpoolPortable sets the windows in strip to zero, but the places which to dy.
func unpoolPortable(strip, dy []float32, which []int32, size, line, channels int) {
	for at := 0; at < len(dy); at += channels {
		window := strip[at*size:]
		for tap := range size * size {
			selectedPortable(window[tap/size*line+tap%size*channels:][:channels], dy[at:][:channels], which[at:], int32(tap))
		}
	}
}

// signStepPortable tells finite values by their exponent bits: those of others are
// all set, which adding one to the exponent carries into the sign.
func signStepPortable(x, clean, gradient []float32, alpha, reach float32) (finite bool) {
	exponents, size := uint32(0), math.Float32bits(alpha)
	for i, g := range gradient {
		bits := math.Float32bits(g)
		exponents |= bits&^(1<<31) + 1<<23
		v, c := x[i], clean[i]
		if g != 0 {
			v += math.Float32frombits(size | bits&(1<<31))
		}
		x[i] = min(max(v, c-reach, 0), c+reach, 1)
	}
	return exponents>>31 == 0
}

func maskPositivePortable(dst, grad, y []float32) {
	for i, v := range y {
		if v > 0 {
			dst[i] = grad[i]
		} else {
			dst[i] = 0
		}
	}
}

func adamPortable(p, m, v, average, grad []float32, c *AdamStep) {
	for i, g := range grad[:len(p)] {
		g *= c.Scale
		m[i] = c.Beta1*m[i] + c.Rest1*g
		v[i] = c.Beta2*v[i] + c.Rest2*(g*g)
		p[i] -= c.Rate * m[i] / (float32(math.Sqrt(float64(v[i]))) + c.Epsilon)
		average[i] += c.Average * (p[i] - average[i])
	}
}
