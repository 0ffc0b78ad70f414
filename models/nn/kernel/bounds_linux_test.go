package kernel

import (
	"fmt"
	"math"
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

// What makes and takes pairs neither, and every path has the same bits.
func TestPairsStayInTheirOperands(t *testing.T) {
	values := fill(rand.New(rand.NewPCG(9, 11)), 1<<16)
	for i := range values {
		switch i % 11 {
		case 3:
			values[i] = float32(math.NaN())
		case 5:
			values[i] = 0
		}
	}
	run := func(p string, trial int) []float32 {
		defer Use(p)()
		rng := rand.New(rand.NewPCG(9, uint64(trial)))
		before := trial%2 == 0
		operand := func(n int) []float32 {
			v := fence(t, n, before)
			copy(v, values[rng.IntN(1000):])
			return v
		}
		pairs := func(n int) []float32 {
			v := fence(t, n, before)
			round(v, values[rng.IntN(1000):][:2*n])
			return v
		}
		n := 1 + rng.IntN(100)
		mask := pairs((n + 1) / 2)
		if trial%3 == 0 {
			mask = nil
		}
		rounded := pairs((n + 1) / 2)
		roundMasked(rounded, operand(n), mask, trial%4 < 2)

		n = 2 * (1 + rng.IntN(40))
		lines, count, step := 1+rng.IntN(3), 1+rng.IntN(4), n/2*(1+rng.IntN(3))
		far := n / 2 * rng.IntN(3)
		dstLine, srcLine := count*n+rng.IntN(5), count*step+rng.IntN(5)
		joined := operand((lines-1)*dstLine + count*n)
		joinPixels(joined, pairs((lines-1)*srcLine+(count-1)*step+far+n/2), lines, dstLine, srcLine, count, far, step, n)

		channels, windows := 16*(1+rng.IntN(3)), 1+rng.IntN(5)
		out := windows * channels
		line := 2*out + rng.IntN(9)
		which := unsafe.Slice((*int8)(unsafe.Pointer(&fence(t, out/4, before)[0])), out)
		pooled := pairs(out / 2)
		poolPairs(pooled, which, operand(line+2*out), line, channels)
		image := pairs(line + out)
		unpoolPairs(image, pooled, which, line, channels)
		top := pairs(line + out)
		unpoolJoin(top, pooled, which, line, channels)
		sums := operand(channels)
		clear(pooled) // sums of the same in another order may differ
		for i := range halves(pooled) {
			halves(pooled)[i] = bfloat16(float32(i%5 - 2))
		}
		clear(sums)
		sumPairs(sums, pooled, which, windows)
		odd := sums[:2*(1+rng.IntN(channels/2))]
		sumPairs(odd, pooled, nil, out/len(odd))
		places := make([]float32, out)
		for i, place := range which {
			places[i] = float32(place)
		}
		return slices.Concat(rounded, joined, pooled, places, image, top, sums)
	}
	for trial := range 60 {
		want := run("portable", trial)
		for _, p := range available() {
			for i, v := range run(p, trial) {
				if got, want := math.Float32bits(v), math.Float32bits(want[i]); got != want {
					t.Fatalf("%s, trial %d: word %d is %08x, want %08x", p, trial, i, got, want)
				}
			}
		}
	}
}
