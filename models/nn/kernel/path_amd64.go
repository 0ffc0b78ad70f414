package kernel

import (
	"math"
	"unsafe"

	"golang.org/x/sys/cpu"
)

//go:generate go run ./asm -out path_amd64.s -stubs stubs_amd64.go -pkg kernel

func available() (paths []string) {
	avx512 := cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW && cpu.X86.HasAVX512DQ && cpu.X86.HasAVX512VL && cpu.X86.HasAVX2 && cpu.X86.HasFMA
	if avx512 && cpu.X86.HasAVX512BF16 {
		if hasTiles {
			paths = append(paths, "amx")
		}
		paths = append(paths, "avx512bf16")
	}
	if avx512 {
		paths = append(paths, "avx512")
	}
	if cpu.X86.HasAVX2 && cpu.X86.HasFMA {
		paths = append(paths, "avx2")
	}
	return append(paths, "portable")
}

// tile is what a micro-kernel reads; asm/main.go knows its layout. Strides
// count bytes. aNext and bNext lead from the end of one segment to the start
// of the next.
type tile struct {
	a, b, c, bias      unsafe.Pointer
	segments, steps    uintptr
	aRow, aStep, aNext uintptr
	bStep, bNext       uintptr
	cRow               uintptr
	mask               uintptr // avx512: bits of the columns in use; avx2: address of 8 lanes
	flags              uintptr // 1: add to c; 2: clamp at 0
	lines              uintptr // the micro-kernel counts them down, and moves a, b and c on
	aLine, bLine       uintptr
	cLine              uintptr
}

// lanes holds a mask of k leading lanes at lanes[8-k].
var lanes = [16]int32{-1, -1, -1, -1, -1, -1, -1, -1}

func (p *product) dispatch() {
	switch {
	case path == "portable", p.pairs && !HasBF16():
		p.portable()
	case path == "avx2":
		p.vectors(avx2)
	case p.tiled():
		p.tile()
	case p.pairs:
		p.vectors(bf16)
	default:
		p.vectors(avx512)
	}
}

// set is the instruction set of a micro-kernel.
type set int

const (
	avx512 set = iota
	avx2
	bf16 // avx512 with pairs of bfloat16 as factors
)

// tile is the largest one of the set.
func (s set) tile() (rows, width int) {
	if s == avx2 {
		return 6, 8
	}
	return 14, 16
}

// peak returns a loop of the path's instruction and how many operations one
// turn of it is.
func peak(path string) (perTurn int, loop func(turns int)) {
	const accumulators = 12
	switch path {
	case "avx2":
		return accumulators * 8 * 2, peakAVX2
	case "avx512":
		return accumulators * 16 * 2, peakAVX512
	case "avx512bf16":
		return accumulators * 32 * 2, peakBF16
	case "amx":
		return 6 * 16 * 16 * 32 * 2, peakAMX
	}
	return 8 * 2, peakPortable
}

// vectors covers c with tiles of at most two vectors in width: strips of columns
// outside, so that a strip of b stays in the first-level cache while the rows of
// a pass by.
func (p *product) vectors(set set) {
	maxRows, width := set.tile()
	const float = unsafe.Sizeof(float32(0))
	t := tile{
		segments: uintptr(p.segments), steps: uintptr(p.steps),
		aRow: uintptr(p.aRow) * float, aStep: uintptr(p.aStep) * float,
		aNext: uintptr(p.aSegment-p.steps*p.aStep) * float,
		bStep: uintptr(p.bStep) * float,
		bNext: uintptr(p.bSegment-p.steps*p.bStep) * float,
		cRow:  uintptr(p.cRow) * float,
		aLine: uintptr(p.aLine) * float, bLine: uintptr(p.bLine) * float, cLine: uintptr(p.cLine) * float,
	}
	if p.add {
		t.flags |= 1
	}
	if p.relu {
		t.flags |= 2
	}
	tiles := (p.m + maxRows - 1) / maxRows
	for j := 0; j < p.n; {
		columns, vectors, masked := strip(p.n-j, width)
		if masked {
			if width == 16 {
				t.mask = 1<<columns - 1
			} else {
				t.mask = uintptr(unsafe.Pointer(&lanes[8-columns])) // a global: never moves
			}
		}
		if p.bias != nil {
			t.bias = unsafe.Pointer(&p.bias[j])
		}
		for i, n := 0, 0; n < tiles; n++ {
			next := p.m * (n + 1) / tiles // tiles of even height: none is left with a row or two
			t.a = unsafe.Pointer(&p.a[i*p.aRow])
			t.b = unsafe.Pointer(&p.b[j])
			t.c = unsafe.Pointer(&p.c[i*p.cRow+j])
			t.lines = uintptr(max(1, p.lines))
			micro(set, next-i, vectors, masked, (*[18]uintptr)(unsafe.Pointer(&t)))
			i = next
		}
		j += columns
	}
}

// strip chooses the next columns to work on: two full vectors, else what is
// left in one or two, the last of them masked.
func strip(left, width int) (columns, vectors int, masked bool) {
	switch {
	case left >= 2*width:
		return 2 * width, 2, false
	case left > width && width == 16:
		return left, 2, true
	case left >= width:
		return width, 1, false
	}
	return left, 1, true
}

func vectorised() bool { return path != "portable" }

func addTo(dst, src []float32) {
	i := 0
	if n := len(src) / 8; n > 0 && vectorised() {
		addVectors(&dst[:len(src)][0], &src[0], n)
		i = n * 8
	}
	addPortable(dst[i:], src[i:])
}

func maximum(best []float32, index []int32, x []float32, place int32) {
	i := 0
	if n := len(x) / 8; n > 0 && vectorised() {
		maximumVectors(&best[:len(x)][0], &index[:len(x)][0], &x[0], place, n)
		i = n * 8
	}
	maximumPortable(best[i:], index[i:], x[i:], place)
}

func selected(dst, src []float32, index []int32, place int32) {
	i := 0
	if n := len(src) / 8; n > 0 && vectorised() {
		selectedVectors(&dst[:len(src)][0], &src[0], &index[:len(src)][0], place, n)
		i = n * 8
	}
	selectedPortable(dst[i:], src[i:], index[i:], place)
}

func clamp(v []float32) {
	i := 0
	if n := len(v) / 8; n > 0 && vectorised() {
		clampVectors(&v[0], n)
		i = n * 8
	}
	clampPortable(v[i:])
}

// transposeTo writes the transpose of src [rows, columns] to dst: their rows are
// srcRow and dstRow apart.
func transposeTo(dst, src []float32, rows, columns, dstRow, srcRow int) {
	switch {
	case columns == 1 && srcRow == 1:
		copy(dst[:rows], src)
		return
	case rows == 1:
		for i, v := range src[:columns] {
			dst[i*dstRow] = v
		}
		return
	case !vectorised() || path == "avx2" || rows < 1 || columns < 1:
		transposePortable(dst, src, rows, columns, dstRow, srcRow)
		return
	}
	_, _ = dst[(columns-1)*dstRow+rows-1], src[(rows-1)*srcRow+columns-1]
	const block = 16
	for r := 0; r < rows; r += block {
		for c := 0; c < columns; c += block {
			transposeBlock(&dst[c*dstRow+r], &src[r*srcRow+c], min(block, rows-r), min(block, columns-c), dstRow*4, srcRow*4)
		}
	}
}

func maskPositive(dst, grad, y []float32) {
	i := 0
	if n := len(y) / 8; n > 0 && vectorised() {
		maskPositiveVectors(&dst[:len(y)][0], &grad[:len(y)][0], &y[0], n)
		i = n * 8
	}
	maskPositivePortable(dst[i:], grad[i:], y[i:])
}

func adam(p, m, v, average, grad []float32, c *AdamStep) {
	i := 0
	if n := len(p) / 8; n > 0 && vectorised() {
		k := len(p)
		adamVectors(&p[0], &m[:k][0], &v[:k][0], &average[:k][0], &grad[:k][0], (*[8]float32)(unsafe.Pointer(c)), n)
		i = n * 8
	}
	adamPortable(p[i:], m[i:], v[i:], average[i:], grad[i:], c)
}

func roundTo(dst, src, mask []float32, relu bool) {
	if !HasBF16() {
		roundPortable(dst, src, mask, relu)
		return
	}
	floor, masks := float32(math.Inf(-1)), (*float32)(nil)
	if relu {
		floor = 0
	}
	if mask != nil {
		masks = &mask[0]
	}
	roundVectors(&dst[0], &src[0], masks, len(src), floor)
}

func joinTo(dst, src []float32, lines, dstLine, srcLine, count, far, step, n int) {
	if !HasBF16() {
		joinPortable(dst, src, lines, dstLine, srcLine, count, far, step, n)
		return
	}
	joinVectors(&dst[0], &src[0], lines, dstLine*4, srcLine*4, count, far*4, step*4, n, both(far))
}

// both is the mask of vectors of which the second is 0 where far is 0.
func both(far int) int {
	if far == 0 {
		return 0
	}
	return 0xffff
}

func pairTo(dst, src []float32, count, n, far, step int) {
	if !HasBF16() {
		pairPortable(dst, src, count, n, far, step)
		return
	}
	pairVectors(&dst[0], &src[0], count, n, far*4, step*4, both(far))
}

func pool(y []float32, which []int32, strip []float32, size, line, channels int) {
	if !vectorised() || size != 2 || channels%8 != 0 || len(y) == 0 {
		poolPortable(y, which, strip, size, line, channels)
		return
	}
	_, _ = which[len(y)-1], strip[line+2*len(y)-1]
	poolVectors(&y[0], &which[0], &strip[0], len(y)/channels, channels/8, line*4)
}

func unpool(strip, dy []float32, which []int32, size, line, channels int) {
	if !vectorised() || size != 2 || channels%8 != 0 || len(dy) == 0 {
		unpoolPortable(strip, dy, which, size, line, channels)
		return
	}
	_, _ = which[len(dy)-1], strip[line+2*len(dy)-1]
	unpoolVectors(&strip[0], &dy[0], &which[0], len(dy)/channels, channels/8, line*4)
}

func poolPairs(y []float32, which []int8, strip []float32, line, channels int) {
	if !HasBF16() || channels%16 != 0 || len(which) == 0 {
		poolPairsPortable(y, which, strip, line, channels)
		return
	}
	_, _ = y[len(which)/2-1], strip[line+2*len(which)-1]
	poolHalves(&y[0], &which[0], &strip[0], len(which)/channels, channels/16, line*4)
}

func unpoolPairs(image, dy []float32, which []int8, line, channels int) {
	if !HasBF16() || channels%16 != 0 || len(which) == 0 {
		unpoolPairsPortable(image, dy, which, line, channels)
		return
	}
	_, _ = dy[len(which)/2-1], image[line+len(which)-1]
	unpoolHalves(&image[0], &dy[0], &which[0], len(which)/channels, channels/16, line*4)
}

func unpoolJoin(top, dy []float32, which []int8, line, channels int) {
	if !HasBF16() || channels%16 != 0 || len(which) == 0 {
		unpoolJoinedPortable(top, dy, which, line)
		return
	}
	_, _ = dy[len(which)/2-1], top[line+len(which)-1]
	unpoolJoined(&top[0], &dy[0], &which[0], len(which)/channels, channels/16, line*4)
}

func sumPairsTo(sum, pairs []float32, which []int8, rows int) {
	if !HasBF16() {
		sumPairsPortable(sum, pairs, which, rows)
		return
	}
	places := (*int8)(nil)
	if which != nil {
		places = &which[0]
	}
	sumHalves(&sum[0], &pairs[0], places, rows, len(sum))
}

// vectors applies the transform to n vectors of tiles, if the path can.
func (t *transform) vectors(dst []float32, to strides, src []float32, from strides, n int, relu bool) bool {
	if path == "portable" || path == "avx2" || n == 0 {
		return false
	}
	d, s := &dst[0], &src[0]
	dr, dc, sr, sc := to.row*4, to.column*4, from.row*4, from.column*4
	switch t {
	case &spreadInput:
		spreadInputs(d, s, dr, dc, sr, sc, n)
	case &spreadOutput:
		spreadOutputs(d, s, dr, dc, sr, sc, n)
	case &scatterInput:
		scatterInputs(d, s, dr, dc, sr, sc, n)
	case &spreadWeight:
		spreadTaps(d, s, dr, dc, sr, sc, n)
	case &gatherWeight:
		gatherTaps(d, s, dr, dc, sr, sc, n)
	case &gatherOutput:
		floor := float32(math.Inf(-1))
		if relu {
			floor = 0
		}
		gatherOutputs(d, s, dr, dc, sr, sc, n, floor)
	}
	return true
}

func signStep(x, clean, gradient []float32, alpha, reach float32) (finite bool) {
	i, all := 0, uint32(0)
	if n := len(x) / 8; n > 0 && vectorised() {
		var exponents [8]uint32
		signStepVectors(&x[0], &clean[0], &gradient[0], alpha, reach, &exponents, n)
		for _, e := range exponents {
			all |= e
		}
		i = n * 8
	}
	return signStepPortable(x[i:], clean[i:], gradient[i:], alpha, reach) && all>>31 == 0
}
