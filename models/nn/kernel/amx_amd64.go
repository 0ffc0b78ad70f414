package kernel

import (
	"fmt"
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
	if p.m <= tileSide {
		one := *p
		if two := *p; p.lines > 1 && p.bLine == 0 {
			two.lines, two.aLine, two.cLine = p.lines/2, 2*p.aLine, 2*p.cLine
			two.strips([]int{p.m, p.m}, pairs, from, p.aLine, p.cLine)
			if one.lines = p.lines % 2; one.lines == 0 {
				return
			}
			one.a, one.c = p.a[two.lines*two.aLine:], p.c[two.lines*two.cLine:]
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
		part.a, part.c = p.a[i*p.aRow:], p.c[i*p.cRow:]
		part.strips(heights[:min(2, count-at)], pairs, from, heights[0]*p.aRow, heights[0]*p.cRow)
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
		cRow:    uintptr(p.cRow) * float, cSecond: uintptr(cSecond) * float,
		lines: uintptr(p.lines),
		aLine: uintptr(p.aLine) * float, bLine: uintptr(p.bLine) * float, cLine: uintptr(p.cLine) * float,
	}
	for j := 0; j < p.n; {
		left := p.n - j
		columns := min(4/len(heights), (left+tileSide-1)/tileSide)
		if p.bStrip > 0 {
			columns = min(columns, stripWidth/tileSide)
		}
		if columns == 4 && left < 4*tileSide {
			columns = 3 // the fourth would share a register with a wider one of b
		}
		done := min(left, columns*tileSide)
		widths := [4]int{tileSide, tileSide, tileSide, tileSide}
		widths[columns-1] = done - (columns-1)*tileSide
		at, row, segment, next := j, p.bStep, p.bSegment, columns*tileSide
		if p.bStrip > 0 {
			at, row, next = j/stripWidth*p.bStrip+j%stripWidth, min(stripWidth, left), p.bStrip
			segment = p.bSegment / stripWidth * row
		}
		if widths[columns-1] == tileSide && (p.bStrip == 0 || columns*tileSide == stripWidth) {
			done = left / done * done
		}
		t.shape(heights, widths[:columns], pairs)
		t.b, t.c, t.width = unsafe.Pointer(&p.b[at+from*row]), unsafe.Pointer(&p.c[j]), uintptr(done)*float
		t.bRow, t.bStep, t.bNext = uintptr(row)*float, uintptr(pairs*row)*float, uintptr(segment-p.steps*row)*float
		t.bStrip = uintptr(next) * float
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
