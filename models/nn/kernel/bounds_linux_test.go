package kernel

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fence returns memory for n floats with none before and none after it: a page
// that may not be touched follows at once, or precedes it.
func fence(t *testing.T, n int, before bool) []float32 {
	page := unix.Getpagesize()
	size := (4*n + page - 1) / page * page
	memory, err := unix.Mmap(-1, 0, size+2*page, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(memory) })
	inside := memory[page:][:size]
	if err := unix.Mprotect(inside, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	if !before {
		inside = inside[size-4*n:]
	}
	return unsafe.Slice((*float32)(unsafe.Pointer(&inside[0])), n)
}

// Assembly touches nothing outside its operands: a fault would end the process.
func TestProductStaysInItsOperands(t *testing.T) {
	each(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(9, 9))
		for trial := range 120 {
			p := product{m: 1 + rng.IntN(40), n: 1 + rng.IntN(70), steps: 1 + rng.IntN(40), segments: 1 + rng.IntN(2), lines: 1 + rng.IntN(3), pairs: trial%2 == 0, relu: true}
			p.aRow, p.aStep = p.steps, 1
			if trial%4 < 2 {
				p.aRow, p.aStep = 1, p.m
			}
			p.aSegment, p.aLine = p.m*p.steps, p.m*p.steps*p.segments
			p.bStep, p.bSegment = p.n, p.n*p.steps
			p.cRow, p.cLine = p.n, p.n*p.m
			before := trial%3 == 0
			p.a, p.b, p.c = fence(t, p.lines*p.aLine, before), fence(t, p.segments*p.bSegment, before), fence(t, p.lines*p.cLine, before)
			p.bias = fence(t, p.n, before)
			for i := range p.bias {
				p.bias[i] = float32(i)
			}
			p.run() // of zeros: c becomes the bias
			for i, v := range p.c {
				if v != p.bias[i%p.n] {
					t.Fatal(fmt.Sprintf("trial %d: element %d is %v, want %v", trial, i, v, p.bias[i%p.n]))
				}
			}
		}
	})
}

// The transforms neither, and every path has the same result.
func TestTransformStaysInItsOperands(t *testing.T) {
	each(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(9, 10))
		for i, m := range []*transform{&spreadInput, &spreadOutput, &spreadWeight, &scatterInput, &gatherOutput, &gatherWeight} {
			in, out := len((*m)[0]), len(*m)
			for trial := range 20 {
				n := 16 * (1 + rng.IntN(3))
				if trial%5 == 0 {
					n = 1 + rng.IntN(40)
				}
				place := func(size int) (s strides, values int) {
					s.column = n + rng.IntN(5)
					s.row = size*s.column + rng.IntN(5)
					return s, (size-1)*(s.row+s.column) + n
				}
				from, values := place(in)
				src := fence(t, values, trial%2 == 0)
				copy(src, fill(rng, values))
				to, values := place(out)
				dst := fence(t, values, trial%2 == 0)
				copy(dst, fill(rng, values))
				want := slices.Clone(dst)
				relu := m == &gatherOutput && trial%3 == 0
				m.portable(want, to, src, from, n, relu)
				m.apply(dst, to, src, from, n, relu)
				near(t, fmt.Sprintf("transform %d, trial %d", i, trial), dst, want, 1e-5)
			}
		}
	})
}
