package kernel

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

func fill(rng *rand.Rand, n int) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = rng.Float32()*2 - 1
	}
	return v
}

func near(t *testing.T, what string, got, want []float32, tolerance float64) {
	t.Helper()
	for i := range want {
		if d := math.Abs(float64(got[i] - want[i])); !(d <= tolerance*(1+math.Abs(float64(want[i])))) {
			t.Fatalf("%s: element %d is %v, want %v", what, i, got[i], want[i])
		}
	}
}

// each runs a test on every path that this processor has.
func each(t *testing.T, f func(t *testing.T)) {
	for _, p := range available() {
		t.Run(p, func(t *testing.T) {
			defer use(p)()
			f(t)
		})
	}
}

// reference is the definition of product in float64.
func reference(p product) []float32 {
	c := append([]float32(nil), p.c...)
	for i := range p.m {
		for j := range p.n {
			sum := 0.0
			switch {
			case p.add:
				sum = float64(p.c[i*p.cRow+j])
			case p.bias != nil:
				sum = float64(p.bias[j])
			}
			for s := range p.segments {
				for k := range p.steps {
					sum += float64(p.a[s*p.aSegment+i*p.aRow+k*p.aStep]) * float64(p.b[s*p.bSegment+k*p.bStep+j])
				}
			}
			if p.relu {
				sum = max(sum, 0)
			}
			c[i*p.cRow+j] = float32(sum)
		}
	}
	return c
}

func TestProductEqualsDefinition(t *testing.T) {
	each(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(1, 2))
		for trial := range 600 {
			p := product{
				m: 1 + rng.IntN(40), n: 1 + rng.IntN(70), steps: 1 + rng.IntN(20), segments: 1 + rng.IntN(4),
				add: trial%3 == 0, relu: trial%2 == 0,
			}
			if trial%50 == 0 {
				p.steps, p.segments = 2*maxSteps+3, 1
			}
			if trial%5 == 0 { // a transposed, as for weight gradients
				p.aRow, p.aStep = 1, p.m+rng.IntN(3)
			} else {
				p.aRow, p.aStep = p.steps+rng.IntN(3), 1
			}
			p.aSegment = rng.IntN(9)
			p.bStep, p.cRow = p.n+rng.IntN(5), p.n+rng.IntN(5)
			p.bSegment = p.steps * p.bStep
			off := rng.IntN(4) // vectors need not be aligned
			p.a = fill(rng, off+p.segments*p.aSegment+p.m*p.aRow+p.steps*p.aStep)[off:]
			p.b = fill(rng, off+p.segments*p.bSegment)[off:]
			p.c = fill(rng, off+p.m*p.cRow)[off:]
			if trial%3 == 1 {
				p.bias = fill(rng, p.n)
			}
			want := reference(p)
			p.run()
			near(t, fmt.Sprintf("trial %d: %dx%d over %dx%d", trial, p.m, p.n, p.segments, p.steps), p.c, want, 1e-4)
		}
	})
}

func TestProductRefusesShortOperands(t *testing.T) {
	p := product{m: 2, n: 2, steps: 2, segments: 1, a: make([]float32, 3), aRow: 2, aStep: 1, b: make([]float32, 4), bStep: 2, c: make([]float32, 4), cRow: 2}
	defer func() {
		if recover() == nil {
			t.Error("a product beyond its operand ran")
		}
	}()
	p.run()
}

func TestReLUKeepsNaN(t *testing.T) {
	each(t, func(t *testing.T) {
		nan := float32(math.NaN())
		p := product{m: 1, n: 20, steps: 1, segments: 1, a: []float32{nan}, aRow: 1, aStep: 1, b: make([]float32, 20), bStep: 20, c: make([]float32, 20), cRow: 20, relu: true}
		p.run()
		for i, v := range p.c {
			if v == v {
				t.Fatalf("element %d: a NaN became %v", i, v)
			}
		}
	})
}

func TestElementwisePathsAgree(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for _, n := range []int{1, 7, 8, 9, 64, 100} {
		x, g := fill(rng, n), fill(rng, n)
		for i := 0; i < n; i += 3 {
			g[i], x[i] = 0, 0
		}
		lo, hi := make([]float32, n), make([]float32, n)
		for i := range lo {
			lo[i], hi[i] = x[i]-rng.Float32()/2, x[i]+rng.Float32()/2
		}
		m, v := fill(rng, n), fill(rng, n)
		for i := range v {
			v[i] *= v[i]
		}
		c := &AdamStep{0.9, 0.1, 0.999, 0.001, 0.01, 1e-8, 0.001, 0.5}
		run := func(p string) (out [][]float32, index []int32) {
			defer use(p)()
			clone := func(s []float32) []float32 { return append([]float32(nil), s...) }
			sum := clone(x)
			Add(sum, g)
			masked := make([]float32, n)
			MaskPositive(masked, g, x)
			stepped := make([]float32, n)
			Step(stepped, x, g, lo, hi, 0.25)
			best := clone(x)
			index = make([]int32, n)
			maximum(best, index, g, 3)
			chosen := make([]float32, n)
			selected(chosen, g, index, 3)
			w, m, v, a := clone(x), clone(m), clone(v), clone(g)
			Adam(w, m, v, a, g, c)
			return [][]float32{sum, masked, stepped, best, chosen, w, m, v, a}, index
		}
		want, places := run("portable")
		for _, p := range available() {
			got, index := run(p)
			for i := range want {
				near(t, fmt.Sprintf("%s: result %d of %d values", p, i, n), got[i], want[i], 1e-6)
			}
			for i := range places {
				if index[i] != places[i] {
					t.Fatalf("%s: place %d is %d, want %d", p, i, index[i], places[i])
				}
			}
		}
	}
}

func TestTransposeTwiceIsIdentity(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	src := fill(rng, 37*19)
	once, twice := make([]float32, len(src)), make([]float32, len(src))
	transpose(once, src, 37, 19)
	transpose(twice, once, 19, 37)
	near(t, "transposed twice", twice, src, 0)
	if once[19-1+0] == src[18] && once[1] == src[1] {
		t.Error("transpose left the matrix as it was")
	}
}

func BenchmarkProduct(b *testing.B) {
	for _, p := range available() {
		for _, size := range [][3]int{{7, 32, 64}, {14, 32, 96}, {128, 100, 1568}} {
			b.Run(fmt.Sprintf("%s/%dx%dx%d", p, size[0], size[1], size[2]), func(b *testing.B) {
				defer use(p)()
				rng := rand.New(rand.NewPCG(1, 1))
				p := product{m: size[0], n: size[1], steps: size[2], segments: 1, aRow: size[2], aStep: 1, bStep: size[1], cRow: size[1]}
				p.a, p.b, p.c = fill(rng, p.m*p.steps), fill(rng, p.n*p.steps), fill(rng, p.m*p.n)
				for b.Loop() {
					p.run()
				}
				b.ReportMetric(2*float64(p.m*p.n*p.steps)*float64(b.N)/b.Elapsed().Seconds()/1e9, "GFLOP/s")
			})
		}
	}
}
