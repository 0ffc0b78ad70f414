package kernel

import (
	"math"
	"unsafe"
)

// Products of bfloat16 read pairs of values that are multiplied one after the
// other as one 32-bit word, the first in its lower half. Slices of such words
// are []float32 here, so that one product type serves both: a pair in the place
// of a value, half as many steps. Activations, weights and gradients stay
// float32 between layers, and are rounded on their way into a product.

// Packer is a Weighted whose Forward takes its weights as Pack returns them: w
// itself, or w arranged in packed, which grows where Winograd's algorithm wants more.
// Pack needs to be called once for each new set of weights. Arranged is the length of
// packed, and of Turn's turned.
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

// FitPairs says whether the outputs of one layer may be pairs of bfloat16 for the other
// to take: half the memory, and rounded where they are made, while they are in the
// first-level cache. The next layer would round them all the same. AMX, for which memory
// is the limit, works so.
func FitPairs(from, to Weighted) bool {
	if path != "amx" {
		return false
	}
	gives := false
	switch l := from.(type) {
	case *Conv:
		gives = l.BF16 && l.Filters%2 == 0
	case *ConvPool:
		gives = l.BF16 && l.Filters%16 == 0 && l.Size == 2
	case *Dense:
		gives = l.BF16 && l.Units%2 == 0
	}
	if !gives {
		return false
	}
	if conv := convolution(to); conv != nil {
		return conv.BF16 && conv.direct()
	}
	dense, ok := to.(*Dense)
	return ok && dense.BF16
}

// UsePairs says whether a layer's inputs and outputs are pairs: x and dx, with the mask,
// and y and dy then have half the length. FitPairs must allow it.
func UsePairs(layer Weighted, in, out bool) {
	if conv := convolution(layer); conv != nil {
		conv.PairsIn, conv.PairsOut = in, out
	} else if dense, ok := layer.(*Dense); ok {
		dense.PairsIn, dense.PairsOut = in, out
	}
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
func round(dst, src []float32) { roundMasked(dst, src, nil, false) }

// roundMasked is round with 0 in the place of what is negative, if relu is set, and of
// what is not positive in mask, pairs as in dst, if that is not nil.
func roundMasked(dst, src, mask []float32, relu bool) {
	if len(src) == 0 {
		return
	}
	dst = dst[:(len(src)+1)/2]
	if mask != nil {
		mask = mask[:len(dst)]
	}
	roundTo(dst, src, mask, relu)
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
func pairRows(dst, src []float32, rows, n int) { pairColumns(dst, src, rows, n, n) }

// pairColumns is pairRows for the first columns of rows of n.
func pairColumns(dst, src []float32, rows, columns, n int) {
	pair(dst, src, rows/2, columns, n, 2*n)
	if rows%2 == 1 {
		pair(dst[rows/2*columns:], src[(rows-1)*n:], 1, columns, 0, 0)
	}
}

// pairStrips writes the rows of taps weights [rows, n] to dst as pairRows does, tap by
// tap; where AMX wants it in strips of columns, see type product.
func pairStrips(dst, w []float32, taps, rows, n int) {
	width := n
	if inStrips(n) {
		width = stripWidth
	}
	for j := 0; j < n; j += width {
		for tap := range taps {
			pairColumns(dst, w[tap*rows*n+j:], rows, width, n)
			dst = dst[(rows+1)/2*width:]
		}
	}
}

// inStrips says whether n columns of pairs lie in strips.
func inStrips(n int) bool { return path == "amx" && n > stripWidth && n%stripWidth == 0 }

// joinRows makes pairs of the rows of src, n values each, and the next: pairRows, if
// in is set of what is pairs of neighbours.
func joinRows(dst, src []float32, in bool, rows, n int) {
	if !in {
		pairRows(dst, src, rows, n)
		return
	}
	joinPixels(dst, src, 1, 0, 0, rows/2, n/2, n, n)
	if rows%2 == 1 {
		joinPixels(dst[rows/2*n:], src[(rows-1)*n/2:], 1, 0, 0, 1, 0, 0, n)
	}
}

// joinPixels makes pairs of pixels of pairs of channels: for each of some lines, of a
// pixel of n values and the one far words on, or 0 where far is 0, then of those step
// words on, count times. Lines start dstLine and srcLine words apart.
func joinPixels(dst, src []float32, lines, dstLine, srcLine, count, far, step, n int) {
	if lines < 1 || count < 1 {
		return
	}
	_, _ = dst[(lines-1)*dstLine+count*n-1], src[(lines-1)*srcLine+(count-1)*step+far+(n+1)/2-1]
	joinTo(dst, src, lines, dstLine, srcLine, count, far, step, n)
}

// halves are the values of pairs, one by one.
func halves(pairs []float32) []uint16 {
	if len(pairs) == 0 {
		return nil
	}
	return unsafe.Slice((*uint16)(unsafe.Pointer(&pairs[0])), 2*len(pairs))
}

// sumPairs adds to sum rows of as many values, in pairs, but those whose place, unless
// which is nil, is none.
func sumPairs(sum, pairs []float32, which []int8, rows int) {
	n := rows * len(sum)
	_ = pairs[n/2-1]
	if which != nil {
		_ = which[n-1]
	}
	sumPairsTo(sum, pairs, which, rows)
}

// The portable forms.

func roundPortable(dst, src, mask []float32, relu bool) {
	for i := range dst {
		var pair [2]float32
		copy(pair[:], src[2*i:])
		for k, v := range pair {
			if relu {
				pair[k] = max(v, 0)
			}
			if mask != nil && int16(halves(mask)[2*i+k]) <= 0 { // what is negative has its sign set
				pair[k] = 0
			}
		}
		dst[i] = join(pair[0], pair[1])
	}
}

func joinPortable(dst, src []float32, lines, dstLine, srcLine, count, far, step, n int) {
	to, from := halves(dst), halves(src)
	for l := range lines {
		for i := range count {
			for j := range n {
				second := uint16(0)
				if far > 0 {
					second = from[2*(l*srcLine+i*step+far)+j]
				}
				at := 2 * (l*dstLine + i*n + j)
				to[at], to[at+1] = from[2*(l*srcLine+i*step)+j], second
			}
		}
	}
}

// poolPairsPortable is poolPortable of windows of 2 x 2, with a ReLU after it; y
// becomes pairs.
func poolPairsPortable(y []float32, which []int8, strip []float32, line, channels int) {
	best, places := make([]float32, len(which)), make([]int32, len(which))
	poolPortable(best, places, strip, 2, line, channels)
	for i, p := range places {
		which[i] = int8(p)
	}
	roundPortable(y, best, nil, true)
}

// unpoolJoinedPortable sets the pairs of the pixels of windows of 2 x 2 to zero, but the
// places which to dy: of its upper ones in top, of the lower ones line words on.
func unpoolJoinedPortable(top, dy []float32, which []int8, line int) {
	to, from := halves(top), halves(dy)
	for i, place := range which {
		for tap := range 4 {
			at := 2*(tap/2*line+i) + tap%2
			to[at] = 0
			if int(place) == tap {
				to[at] = from[i]
			}
		}
	}
}

func sumPairsPortable(sum, pairs []float32, which []int8, rows int) {
	for i := range rows * len(sum) {
		if which == nil || which[i] >= 0 {
			sum[i%len(sum)] += math.Float32frombits(uint32(halves(pairs)[i]) << 16)
		}
	}
}

// unpoolPairsPortable sets the windows in image, all pairs, to zero, but the places
// which to dy.
func unpoolPairsPortable(image, dy []float32, which []int8, line, channels int) {
	to, from := halves(image), halves(dy)
	for i, place := range which {
		for tap := range 4 {
			at := tap/2*2*line + (i/channels*2+tap%2)*channels + i%channels
			to[at] = 0
			if int(place) == tap {
				to[at] = from[i]
			}
		}
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
