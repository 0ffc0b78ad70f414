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

// Assembly must never be handed an address outside a slice.
func TestShortOperandsAreRefused(t *testing.T) {
	each(t, func(t *testing.T) {
		for _, short := range []string{"a", "b", "c", "bias", "sum", "column"} {
			length := func(operand string, n int) []float32 {
				if operand == short {
					n--
				}
				return make([]float32, n)
			}
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%s too short by one was taken", short)
					}
				}()
				p := product{m: 2, n: 16, steps: 2, segments: 2, a: length("a", 6), aRow: 2, aStep: 1, aSegment: 2, b: length("b", 64), bStep: 16, bSegment: 32, c: length("c", 32), cRow: 16, bias: length("bias", 16)}
				p.run()
				scatter(length("sum", 10), length("column", 12), 2, 4, 6, 8)
			}()
		}
	})
}

// Layers of every path equal a direct computation in float64.
func TestLayersEqualDefinition(t *testing.T) {
	for _, c := range []Conv{
		{Height: 7, Width: 9, Channels: 3, Filters: 5, Kernel: 3, Stride: 1, Padding: 1},
		{Height: 8, Width: 7, Channels: 17, Filters: 18, Kernel: 3, Stride: 1},
		{Height: 8, Width: 9, Channels: 1, Filters: 33, Kernel: 4, Stride: 2, Padding: 1},
		{Height: 9, Width: 11, Channels: 16, Filters: 7, Kernel: 5, Stride: 3, Padding: 2},
		{Height: 5, Width: 5, Channels: 2, Filters: 4, Kernel: 5, Stride: 1, Padding: 4},
	} {
		c.OutHeight, c.OutWidth = (c.Height+2*c.Padding-c.Kernel)/c.Stride+1, (c.Width+2*c.Padding-c.Kernel)/c.Stride+1
		t.Run(fmt.Sprintf("%dx%d stride %d padding %d", c.Kernel, c.Kernel, c.Stride, c.Padding), func(t *testing.T) {
			each(t, func(t *testing.T) {
				c := c // scratch of its own for each path
				rng := rand.New(rand.NewPCG(7, 8))
				const rows = 3
				in, out := c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth*c.Filters
				x, dy := fill(rng, rows*in), fill(rng, rows*out)
				w, bias := fill(rng, c.Kernel*c.Kernel*c.Channels*c.Filters), fill(rng, c.Filters)
				wantY, wantDX := make([]float64, rows*out), make([]float64, rows*in)
				wantDW, wantDB := make([]float64, len(w)), make([]float64, len(bias))
				for i := range wantY {
					r, at, f := i/out, i%out/c.Filters, i%c.Filters
					oy, ox := at/c.OutWidth, at%c.OutWidth
					wantY[i] = float64(bias[f])
					wantDB[f] += float64(dy[i])
					for k := range c.Kernel * c.Kernel * c.Channels {
						ky, kx, ch := k/c.Channels/c.Kernel, k/c.Channels%c.Kernel, k%c.Channels
						y, xx := oy*c.Stride+ky-c.Padding, ox*c.Stride+kx-c.Padding
						if y < 0 || y >= c.Height || xx < 0 || xx >= c.Width {
							continue
						}
						j := r*in + (y*c.Width+xx)*c.Channels + ch
						wantY[i] += float64(x[j]) * float64(w[k*c.Filters+f])
						wantDX[j] += float64(dy[i]) * float64(w[k*c.Filters+f])
						wantDW[k*c.Filters+f] += float64(dy[i]) * float64(x[j])
					}
				}
				y, dx := make([]float32, rows*out), make([]float32, rows*in)
				dw, db, turned := make([]float32, len(w)), make([]float32, len(bias)), make([]float32, len(w))
				c.Turn(turned, w)
				for range 2 { // the second time with used scratch memory
					c.Forward(y, x, w, bias, rows, false)
					c.BackwardInput(dx, dy, turned, rows)
					c.BackwardWeight(dw, db, x, dy, rows)
				}
				near(t, "y", y, float32s(wantY), 1e-4)
				near(t, "dx", dx, float32s(wantDX), 1e-4)
				near(t, "dw", dw, float32s(wantDW), 1e-4)
				near(t, "db", db, float32s(wantDB), 1e-4)
			})
		})
	}
}

func float32s(v []float64) []float32 {
	out := make([]float32, len(v))
	for i := range v {
		out[i] = float32(v[i])
	}
	return out
}

// NaN anywhere in a window comes out of a pool, to be found.
func TestPoolKeepsNaN(t *testing.T) {
	each(t, func(t *testing.T) {
		p := MaxPool{Height: 2, Width: 2, Channels: 11, Size: 2}
		for tap := range 4 {
			x := make([]float32, 4*11)
			for ch := range 11 {
				x[tap*11+ch] = float32(math.NaN())
			}
			y, which := make([]float32, 11), make([]int32, 11)
			p.Forward(y, which, x, 1)
			for ch, v := range y {
				if v == v {
					t.Fatalf("NaN at place %d, channel %d: the maximum is %v", tap, ch, v)
				}
			}
		}
	})
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
			best := clone(x)
			index = make([]int32, n)
			maximum(best, index, g, 3)
			chosen := make([]float32, n)
			selected(chosen, g, index, 3)
			w, m, v, a := clone(x), clone(m), clone(v), clone(g)
			Adam(w, m, v, a, g, c)
			return [][]float32{sum, masked, best, chosen, w, m, v, a}, index
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
