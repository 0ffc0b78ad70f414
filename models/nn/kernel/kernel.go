// Package kernel holds the arithmetic that networks spend their time in, for
// one goroutine each: convolutions and dense layers with their gradients,
// max-pooling, and the element-wise updates of training and attacks.
//
// Everything reduces to one product over strided operands (type product), so
// one micro-kernel per processor family is enough. Convolutions need no im2col:
// with channels innermost, the inputs under one row of a filter are contiguous,
// and neighbouring output pixels read the same addresses shifted by a constant.
//
// Which path runs is decided once, by the processor's features or by the
// environment variable TEMPER_KERNEL (portable, avx2, avx512, avx512bf16 or amx).
// Each output value is accumulated in one fixed order, so results do not depend
// on the number of goroutines; between paths they differ by rounding only.
//
// Layers that ask for it compute 3 x 3 convolutions by Winograd's algorithm, in float32,
// on all paths with AVX-512 (UseWinograd, winograd.go), or multiply bfloat16 values and
// add float32 ones, many more at a time, on avx512bf16 and amx (UseFast). Everything else
// is plain float32 on all paths.
package kernel

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"
)

// Path names the instruction set in use: one of Paths.
func Path() string { return path }

// Paths lists the instruction sets that this processor can run, fastest first;
// the last is "portable".
func Paths() []string { return available() }

// HasBF16 reports whether the path in use multiplies bfloat16 values.
func HasBF16() bool { return path == "amx" || path == "avx512bf16" }

var path = choose()

// choose takes the fastest path, or the one that TEMPER_KERNEL names. A name
// that this processor cannot run falls back and says so once.
func choose() string {
	have := available()
	want := os.Getenv("TEMPER_KERNEL")
	if want == "" {
		return have[0]
	}
	for _, p := range have {
		if p == want {
			return p
		}
	}
	fmt.Fprintf(os.Stderr, "TEMPER_KERNEL=%s: this processor has %s; using %s\n", want, strings.Join(have, ", "), have[0])
	return have[0]
}

// Use switches to one of Paths, for tests and benchmarks that compare them: no
// kernel may run meanwhile, and networks must be compiled anew.
func Use(p string) (restore func()) {
	if !slices.Contains(available(), p) {
		panic("kernel: this processor has no path " + p)
	}
	old := path
	path = p
	return func() { path = old }
}

// product computes, for i < m and j < n,
//
//	c[i, j] = init + sum over s < segments, k < steps of
//	          a[s*aSegment + i*aRow + k*aStep] * b[s*bSegment + k*bStep + j]
//
// where init is c itself if add is set, else bias[j], else 0; relu clamps the
// result at 0. All strides count floats. Rows of c lie cRow apart. Where lines is
// more than 1, that many such products follow each other, their a, b and c
// aLine, bLine and cLine apart. Where bStrip is not 0, b lies in strips of stripWidth
// columns, so far apart, whose rows follow each other: bStep is stripWidth.
type product struct {
	m, n, steps, segments int
	a                     []float32
	aRow, aStep, aSegment int
	b                     []float32
	bStep, bSegment       int
	bStrip                int
	c                     []float32
	cRow                  int
	bias                  []float32
	add, relu             bool
	pairs                 bool // a and b hold pairs of bfloat16, see bf16.go
	lines                 int
	aLine, bLine, cLine   int
	finish                finish
}

// stripWidth is how many columns AMX works on at a time: strips of b that lie together
// are read from the first-level cache, of which rows that are far apart use a part.
const stripWidth = 32

// tileSide is the most rows of AMX's tiles, and the most words of a row.
const tileSide = 16

// maxSteps bounds the steps of one pass over a single segment, so that the
// strip of b in use (maxSteps x 32 floats) stays in the first-level cache.
const maxSteps = 128

func (p *product) run() {
	if p.m <= 0 || p.n <= 0 {
		return
	}
	p.check()
	if p.tiled() || p.segments > 1 || p.steps <= maxSteps {
		p.dispatch()
		return
	}
	part := *p
	for at := 0; at < p.steps; at += maxSteps {
		part.steps = min(maxSteps, p.steps-at)
		part.a, part.b = p.a[at*p.aStep:], p.b[at*p.bStep:]
		part.add = p.add || at > 0
		part.relu = p.relu && at+part.steps == p.steps
		part.dispatch()
	}
}

// tiled says whether AMX computes the product.
func (p *product) tiled() bool { return p.pairs && path == "amx" && p.aStep == 1 }

// check panics where an operand is too short: assembly must never be handed
// an address outside a slice.
func (p *product) check() {
	lines := max(1, p.lines) - 1
	a := lines*p.aLine + (p.segments-1)*p.aSegment + (p.m-1)*p.aRow + (p.steps-1)*p.aStep
	b := lines*p.bLine + (p.segments-1)*p.bSegment + (p.steps-1)*p.bStep + p.n - 1
	if p.bStrip > 0 {
		b = (p.n/stripWidth-1)*p.bStrip + (p.segments-1)*p.bSegment + p.steps*stripWidth - 1
		if !p.tiled() || p.bLine != 0 || p.bStep != stripWidth || p.n%stripWidth != 0 {
			panic("kernel: only AMX takes b in strips, and whole ones")
		}
	}
	c := lines*p.cLine + (p.m-1)*p.cRow + p.n - 1
	if p.finishes() {
		if p.finish.check(p.lines, p.m, p.n); !p.tiled() || p.bias == nil || p.n%stripWidth != 0 || p.steps > tileSide && p.steps%tileSide != 0 {
			panic("kernel: only AMX finishes whole strips")
		}
		c = -1
	}
	if a >= len(p.a) || b >= len(p.b) || c >= len(p.c) || p.bias != nil && len(p.bias) < p.n || p.steps < 1 || p.segments < 1 {
		panic(fmt.Sprintf("kernel: product %dx%d over %dx%d reaches beyond its operands: a %d of %d, b %d of %d, c %d of %d", p.m, p.n, p.segments, p.steps, a, len(p.a), b, len(p.b), c, len(p.c)))
	}
}

// finish says how AMX rounds results to pairs, in the place of c: while it multiplies,
// the results before are at hand, and the processor's vectors have nothing else to do.
type finish struct {
	out       []float32 // lines and rows of pairs of values, so far apart
	line, row int
	relu      bool
	mask      []float32 // of the shape of out, if not nil: 0 where it is not positive
	places    []int8    // for each value of out, if not nil, which is then of maxima of windows of 2 x 2
	scratch   *scratch
}

// scratch is room for a block of results.
type scratch [tileSide*2*stripWidth + tileSide]float32

// place is where a cache line starts.
func (s *scratch) place() unsafe.Pointer {
	const line = 64
	off := -uintptr(unsafe.Pointer(s)) % line
	return unsafe.Pointer(&s[off/4])
}

func (p *product) finishes() bool { return p.finish.out != nil }

// from is what f is some lines and rows, or windows, further.
func (f finish) from(lines, rows int) finish {
	if at := lines*f.line + rows*f.row; f.out != nil {
		f.out, f.mask = f.out[at:], rest(f.mask, at)
		if f.places != nil {
			f.places = f.places[2*at:]
		}
	}
	return f
}

// check panics where there is no room for lines of rows of n values.
func (f *finish) check(lines, rows, n int) {
	lines = max(1, lines)
	if f.places != nil {
		lines, rows = lines/2, rows/2
	}
	last := (lines-1)*f.line + (rows-1)*f.row + n/2 - 1
	if last >= len(f.out) || f.mask != nil && last >= len(f.mask) || f.places != nil && 2*last+1 >= len(f.places) || f.scratch == nil {
		panic(fmt.Sprintf("kernel: %d lines of %d results to finish are more than the %d words for them", lines, rows, len(f.out)))
	}
}

func (p *product) portable() {
	for at := range max(1, p.lines) * p.m {
		l, i := at/p.m, at%p.m
		c := p.c[l*p.cLine+i*p.cRow:][:p.n]
		switch {
		case p.add:
		case p.bias != nil:
			copy(c, p.bias)
		default:
			clear(c)
		}
		for s := range p.segments {
			a, b := l*p.aLine+s*p.aSegment+i*p.aRow, l*p.bLine+s*p.bSegment
			for range p.steps {
				if p.pairs {
					v0, v1 := split(p.a[a])
					for j, w := range p.b[b:][:p.n] {
						w0, w1 := split(w)
						c[j] += v0*w0 + v1*w1
					}
				} else {
					v := p.a[a]
					for j, w := range p.b[b:][:p.n] {
						c[j] += v * w
					}
				}
				a += p.aStep
				b += p.bStep
			}
		}
		if p.relu {
			clampPortable(c)
		}
	}
}
