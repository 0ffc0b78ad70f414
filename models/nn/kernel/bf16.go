package kernel

import "math"

// Products of bfloat16 read pairs of values that are multiplied one after the
// other as one 32-bit word, the first in its lower half. Slices of such words
// are []float32 here, so that one product type serves both: a pair in the place
// of a value, half as many steps. Activations, weights and gradients stay
// float32 between layers, and are rounded on their way into a product.

// Packer is a Weighted whose Forward takes its weights as Pack returns them: w
// itself, or w arranged in packed, which Winograd's algorithm makes room for. Pack needs to be called once for each new set of
// weights. Arranged is the length of packed, and of Turn's turned.
type Packer interface {
	Weighted
	Pack(packed, w []float32) []float32
	Arranged() int
}

// UseBF16 makes a layer multiply bfloat16 values. Those other than Conv,
// ConvPool and Dense go on as they were.
func UseBF16(layer Weighted) {
	if conv := convolution(layer); conv != nil {
		conv.BF16 = true
	} else if dense, ok := layer.(*Dense); ok {
		dense.BF16 = true
	}
}

// UseFast makes a layer as fast as training has it: a convolution by Winograd's
// algorithm where that is faster than bfloat16 too, and otherwise UseBF16 where the path
// has bfloat16.
func UseFast(layer Weighted) {
	if path != "amx" && UseWinograd(layer) {
		return
	}
	if HasBF16() {
		UseBF16(layer)
	}
}

// UseWinograd makes a layer compute by Winograd's algorithm if it is a convolution of
// which that is the fastest way in float32, and says whether it is.
func UseWinograd(layer Weighted) bool {
	conv := convolution(layer)
	if conv != nil {
		conv.Winograd = conv.suitsWinograd()
	}
	return conv != nil && conv.Winograd
}

// convolution is that of a layer, nil for one without.
func convolution(layer Weighted) *Conv {
	switch l := layer.(type) {
	case *Conv:
		return l
	case *ConvPool:
		return &l.Conv
	}
	return nil
}

// round writes the n values of src to dst as (n+1)/2 pairs of neighbours. The
// partner of an odd last value is 0.
func round(dst, src []float32) {
	if len(src) == 0 {
		return
	}
	roundTo(dst[:(len(src)+1)/2], src)
}

// roundRows rounds rows of n values, each to (n+1)/2 pairs.
func roundRows(dst, src []float32, rows, n int) {
	if n%2 == 0 {
		round(dst, src[:rows*n])
		return
	}
	for r := range rows {
		round(dst[r*((n+1)/2):], src[r*n:][:n])
	}
}

// pair writes count rows of n pairs to dst: row i holds src[i*step+j] and
// src[i*step+far+j] for j < n. The second is 0 where far is 0.
func pair(dst, src []float32, count, n, far, step int) {
	if count == 0 || n == 0 {
		return
	}
	pairTo(dst[:count*n], src[:(count-1)*step+far+n], count, n, far, step)
}

// pairRows writes the rows of src [rows, n] to dst [(rows+1)/2, n] as pairs of
// one row and the next. The partner of an odd last row is 0.
func pairRows(dst, src []float32, rows, n int) {
	pair(dst, src, rows/2, n, n, 2*n)
	if rows%2 == 1 {
		pair(dst[rows/2*n:], src[(rows-1)*n:], 1, n, 0, 0)
	}
}

// The portable forms.

func roundPortable(dst, src []float32) {
	for i := range dst {
		var second float32
		if 2*i+1 < len(src) {
			second = src[2*i+1]
		}
		dst[i] = join(src[2*i], second)
	}
}

func pairPortable(dst, src []float32, count, n, far, step int) {
	for i := range count {
		for j := range n {
			var second float32
			if far > 0 {
				second = src[i*step+far+j]
			}
			dst[i*n+j] = join(src[i*step+j], second)
		}
	}
}

// join is a pair as one word.
func join(first, second float32) float32 {
	return math.Float32frombits(uint32(bfloat16(first)) | uint32(bfloat16(second))<<16)
}

// split is the two values of a pair.
func split(pair float32) (first, second float32) {
	bits := math.Float32bits(pair)
	return math.Float32frombits(bits << 16), math.Float32frombits(bits &^ 0xffff)
}

// bfloat16 rounds as the processor does: to the nearest, to even in the middle,
// and what is below the least normal number to 0.
func bfloat16(v float32) uint16 {
	bits := math.Float32bits(v)
	switch {
	case bits&0x7f800000 == 0:
		return uint16(bits >> 16 & 0x8000)
	case v != v:
		return uint16(bits>>16 | 0x40) // stays a NaN
	}
	return uint16((bits + 0x7fff + bits>>16&1) >> 16)
}
