package kernel

import (
	"fmt"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/cpu"
)

// hasTiles says whether this process may use AMX: the processor has it and the
// operating system, asked once, permits it.
var hasTiles = permitted(cpu.X86.HasAMXTile && cpu.X86.HasAMXBF16, permitTiles)

func permitted(has bool, ask func() error) bool {
	if !has {
		return false
	}
	if err := ask(); err != nil {
		fmt.Fprintf(os.Stderr, "the processor has AMX, which the operating system does not permit (%v): using AVX-512\n", err)
		return false
	}
	return true
}

// tiles is what an AMX micro-kernel reads; asm/amx.go knows its layout. Strides
// and width count bytes.
type tiles struct {
	config          [64]byte // as LDTILECFG reads it
	a, b, c, bias   unsafe.Pointer
	start           uintptr // the tiles of c start as: 0: zero, 1: c, 2: the bias
	segments, steps uintptr // of a segment, in tiles
	aRow, aStep     uintptr
	aNext           uintptr // from the end of a segment to the next
	aSecond         uintptr // from the first tile's rows to the second's
	bRow, bStep     uintptr
	bNext           uintptr
	bStrip          uintptr // from a strip of columns to the next
	cRow, cSecond   uintptr
	width           uintptr // of all strips of columns
	lines           uintptr
	aLine, bLine    uintptr
	cLine           uintptr
	_               [4]uintptr // the micro-kernel's own

	// In the place of c: see finish.
	scratch             unsafe.Pointer
	out, beside         unsafe.Pointer
	outRow, besideRow   uintptr
	outLine, besideLine uintptr
	floor               uintptr // a float32
	rows                uintptr // of all tiles, or windows
	below               uintptr // from the first tile's rows to the second's in scratch
	_                   [3]uintptr
}

// shape configures the tiles of rows[i] x widths[j] values of c, for steps of
// pairs values of a. See asm/amx.go for their numbers.
func (t *tiles) shape(rows, widths []int, pairs int) {
	t.config = [64]byte{0: 1} // the palette
	set := func(tile, rows, words int) {
		t.config[16+2*tile] = byte(4 * words)
		t.config[48+tile] = byte(rows)
	}
	for i, r := range rows {
		set(4+i, r, pairs)
		for j, w := range widths {
			set(i*len(widths)+j, r, w)
			set(4+len(rows)+j%(4-len(rows)), pairs, w)
		}
	}
}

// tile computes a product of pairs by AMX.
func (p *product) tile() {
	part := *p
	part.lines = max(1, p.lines)
	// Steps are cut into tiles of even size; what is left makes one more pass.
	count := (part.steps + tileSide - 1) / tileSide
	size := (part.steps + count - 1) / count
	left := part.steps % size
	part.steps -= left
	part.passes(size, 0)
	if left > 0 {
		done := part.steps
		part.a = part.a[done:]
		part.steps, part.add = left, true
		part.passes(left, done)
	}
	if p.relu {
		rows, n := p.m, p.n
		if p.cRow == n {
			rows, n = 1, p.m*n
		}
		for l := range part.lines {
			for i := range rows {
				clamp(p.c[l*p.cLine+i*p.cRow:][:n])
			}
		}
	}
}

// passes adds up steps in tiles of that many pairs, those of b from the given step
// on. Two tiles of rows, from one line or, where those are short, from two, go by two
// of columns; one goes by four.
func (p *product) passes(pairs, from int) {
	if p.finish.places != nil {
		p.windows(pairs)
		return
	}
	if p.m <= tileSide {
		one := *p
		if two := *p; p.lines > 1 && p.bLine == 0 {
			two.lines, two.aLine, two.cLine, two.finish.line = p.lines/2, 2*p.aLine, 2*p.cLine, 2*p.finish.line
			two.strips([]int{p.m, p.m}, pairs, from, p.aLine, p.cLine)
			if one.lines = p.lines % 2; one.lines == 0 {
				return
			}
			one.a, one.finish = p.a[two.lines*two.aLine:], p.finish.from(two.lines*2, 0)
			if !p.finishes() {
				one.c = p.c[two.lines*two.cLine:]
			}
		}
		one.strips([]int{p.m}, pairs, from, 0, 0)
		return
	}
	count := (p.m + tileSide - 1) / tileSide
	edge := func(tile int) int { return p.m * tile / count } // even heights
	for at := 0; at < count; at += 2 {
		i := edge(at)
		heights := []int{edge(at+1) - i, edge(at+2) - edge(at+1)}
		part := *p
		part.a, part.finish = p.a[i*p.aRow:], p.finish.from(0, i)
		if !p.finishes() {
			part.c = p.c[i*p.cRow:]
		}
		part.strips(heights[:min(2, count-at)], pairs, from, heights[0]*p.aRow, heights[0]*p.cRow)
	}
}

// windows computes pairs of lines by tiles whose rows are under windows, as many of one
// line as of the other.
func (p *product) windows(pairs int) {
	count := (p.m + tileSide - 1) / tileSide
	for tile := range count {
		from, to := p.m/2*tile/count, p.m/2*(tile+1)/count
		part := *p
		part.lines, part.aLine = p.lines/2, 2*p.aLine
		part.a, part.finish = p.a[2*from*p.aRow:], p.finish.from(0, from)
		part.strips([]int{2 * (to - from), 2 * (to - from)}, pairs, 0, p.aLine, 0)
	}
}

// strips covers c with one or two tiles in height, the second aSecond and cSecond
// floats from the first.
func (p *product) strips(heights []int, pairs, from, aSecond, cSecond int) {
	const float = unsafe.Sizeof(float32(0))
	t := tiles{
		a:        unsafe.Pointer(&p.a[0]),
		segments: uintptr(p.segments), steps: uintptr(p.steps / pairs),
		aRow: uintptr(p.aRow) * float, aStep: uintptr(pairs) * float, aNext: uintptr(p.aSegment-p.steps) * float,
		aSecond: uintptr(aSecond) * float,
		bRow:    uintptr(p.bStep) * float, bStep: uintptr(pairs*p.bStep) * float, bNext: uintptr(p.bSegment-p.steps*p.bStep) * float,
		cRow: uintptr(p.cRow) * float, cSecond: uintptr(cSecond) * float,
		lines: uintptr(p.lines),
		aLine: uintptr(p.aLine) * float, bLine: uintptr(p.bLine) * float, cLine: uintptr(p.cLine) * float,
	}
	for j := 0; j < p.n; {
		left := p.n - j
		columns := min(4/len(heights), (left+tileSide-1)/tileSide)
		if p.bStrip > 0 || p.finishes() {
			columns = min(columns, stripWidth/tileSide)
		}
		if columns == 4 && left < 4*tileSide {
			columns = 3 // the fourth would share a register with a wider one of b
		}
		done := min(left, columns*tileSide)
		widths := [4]int{tileSide, tileSide, tileSide, tileSide}
		widths[columns-1] = done - (columns-1)*tileSide
		next := columns * tileSide
		if p.bStrip > 0 { // whole strips: this is the first, and the others go with it
			next = p.bStrip
		}
		if widths[columns-1] == tileSide {
			done = left / done * done
		}
		t.shape(heights, widths[:columns], pairs)
		t.b, t.width, t.bStrip = unsafe.Pointer(&p.b[j+from*p.bStep]), uintptr(done)*float, uintptr(next)*float
		if p.finishes() { // whole strips, all of them at once
			p.finishing(&t, heights)
			return
		}
		t.c = unsafe.Pointer(&p.c[j])
		switch {
		case p.add:
			t.start = 1
		case p.bias != nil:
			t.start, t.bias = 2, unsafe.Pointer(&p.bias[j])
		}
		microTiles(len(heights), columns, (*tilesWords)(unsafe.Pointer(&t)))
		j += done
	}
}

// finishing runs a micro-kernel whose results are rounded to pairs.
func (p *product) finishing(t *tiles, heights []int) {
	const float = unsafe.Sizeof(float32(0))
	f := &p.finish
	t.bias = unsafe.Pointer(&p.bias[0])
	t.scratch = f.scratch.place()
	t.below = uintptr(heights[0]*stripWidth) * float
	t.out, t.outRow, t.outLine = unsafe.Pointer(&f.out[0]), uintptr(f.row)*float, uintptr(f.line)*float
	t.beside, t.besideRow, t.besideLine = nil, t.outRow, t.outLine
	for _, h := range heights {
		t.rows += uintptr(h)
	}
	if !f.relu {
		t.floor = uintptr(math.Float32bits(float32(math.Inf(-1))))
	}
	words := (*tilesWords)(unsafe.Pointer(t))
	switch {
	case f.places != nil: // of a byte for each value
		t.beside, t.besideRow, t.besideLine = unsafe.Pointer(&f.places[0]), t.outRow/2, t.outLine/2
		t.rows /= 4
		amx_2x2_pooled(words)
	case f.mask != nil && len(heights) == 1:
		t.beside = unsafe.Pointer(&f.mask[0])
		amx_1x2_masked(words)
	case f.mask != nil:
		t.beside = unsafe.Pointer(&f.mask[0])
		amx_2x2_masked(words)
	case len(heights) == 1:
		amx_1x2_rounded(words)
	default:
		amx_2x2_rounded(words)
	}
}

// tilesWords is the memory of tiles.
type tilesWords = [unsafe.Sizeof(tiles{}) / 8]uintptr

func microTiles(rows, columns int, t *tilesWords) {
	switch [2]int{rows, columns} {
	case [2]int{1, 1}:
		amx_1x1(t)
	case [2]int{1, 2}:
		amx_1x2(t)
	case [2]int{1, 3}:
		amx_1x3(t)
	case [2]int{1, 4}:
		amx_1x4(t)
	case [2]int{2, 1}:
		amx_2x1(t)
	case [2]int{2, 2}:
		amx_2x2(t)
	default:
		panic("kernel: no micro-kernel of so many tiles")
	}
}
