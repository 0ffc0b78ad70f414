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

// tileSide is the most rows of a tile, and the most words of a row.
const tileSide = 16

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
	cRow, cSecond   uintptr
	width           uintptr // of all strips of columns
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
	if part.aStep != 1 { // tiles want the steps of a row side by side
		part.turn()
	}
	// Steps are cut into tiles of even size; what is left makes one more pass.
	count := (part.steps + tileSide - 1) / tileSide
	size := (part.steps + count - 1) / count
	left := part.steps % size
	part.steps -= left
	part.passes(size)
	if left > 0 {
		part.a, part.b = part.a[part.steps:], part.b[part.steps*part.bStep:]
		part.steps, part.add = left, true
		part.passes(left)
	}
	if p.relu {
		rows, n := p.m, p.n
		if p.cRow == n {
			rows, n = 1, p.m*n
		}
		for l := range max(1, p.lines) {
			for i := range rows {
				clamp(p.c[l*p.cLine+i*p.cRow:][:n])
			}
		}
	}
}

// turn transposes a, so that its steps lie side by side, those of all segments
// in one where b allows it.
func (p *product) turn() {
	row := p.segments * p.steps
	*p.turned = grow(*p.turned, p.m*row)
	for s := range p.segments {
		transposeTo((*p.turned)[s*p.steps:], p.a[s*p.aSegment:], p.steps, p.m, row, p.aStep)
	}
	p.a, p.aRow, p.aStep, p.aSegment = *p.turned, row, 1, p.steps
	if p.segments > 1 && p.bSegment == p.steps*p.bStep {
		p.steps, p.segments = row, 1
	}
}

// passes adds up steps in tiles of that many pairs. Two tiles of rows, from one
// line or, where those are short, from two, go by two of columns; one goes by
// four.
func (p *product) passes(pairs int) {
	lines := max(1, p.lines)
	if p.m <= tileSide {
		for l := 0; l < lines; l += 2 {
			heights := [2]int{p.m, p.m}
			p.strips(heights[:min(2, lines-l)], pairs, p.a[l*p.aLine:], p.c[l*p.cLine:], p.aLine, p.cLine)
		}
		return
	}
	count := (p.m + tileSide - 1) / tileSide
	edge := func(tile int) int { return p.m * tile / count } // even heights
	for l := range lines {
		for at := 0; at < count; at += 2 {
			i := edge(at)
			heights := [2]int{edge(at+1) - i, edge(at+2) - edge(at+1)}
			p.strips(heights[:min(2, count-at)], pairs, p.a[l*p.aLine+i*p.aRow:], p.c[l*p.cLine+i*p.cRow:], heights[0]*p.aRow, heights[0]*p.cRow)
		}
	}
}

// strips covers c with one or two tiles in height, the second aSecond and cSecond
// floats from the first.
func (p *product) strips(heights []int, pairs int, a, c []float32, aSecond, cSecond int) {
	const float = unsafe.Sizeof(float32(0))
	t := tiles{
		a:        unsafe.Pointer(&a[0]),
		segments: uintptr(p.segments), steps: uintptr(p.steps / pairs),
		aRow: uintptr(p.aRow) * float, aStep: uintptr(pairs) * float, aNext: uintptr(p.aSegment-p.steps) * float,
		aSecond: uintptr(aSecond) * float,
		bRow:    uintptr(p.bStep) * float, bStep: uintptr(pairs*p.bStep) * float, bNext: uintptr(p.bSegment-p.steps*p.bStep) * float,
		cRow: uintptr(p.cRow) * float, cSecond: uintptr(cSecond) * float,
	}
	for j := 0; j < p.n; {
		left := p.n - j
		columns := min(4/len(heights), (left+tileSide-1)/tileSide)
		if columns == 4 && left < 4*tileSide {
			columns = 3 // the fourth would share a register with a wider one of b
		}
		done := min(left, columns*tileSide)
		widths := [4]int{tileSide, tileSide, tileSide, tileSide}
		widths[columns-1] = done - (columns-1)*tileSide
		if widths[columns-1] == tileSide {
			done = left / done * done
		}
		t.shape(heights, widths[:columns], pairs)
		t.b, t.c, t.width = unsafe.Pointer(&p.b[j]), unsafe.Pointer(&c[j]), uintptr(done)*float
		switch {
		case p.add:
			t.start = 1
		case p.bias != nil:
			t.start, t.bias = 2, unsafe.Pointer(&p.bias[j])
		}
		microTiles(len(heights), columns, (*[25]uintptr)(unsafe.Pointer(&t)))
		j += done
	}
}

func microTiles(rows, columns int, t *[25]uintptr) {
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
