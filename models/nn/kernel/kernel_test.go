package kernel

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
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
			defer Use(p)()
			f(t)
		})
	}
}

// reference is the definition of product in float64.
func reference(p product) []float32 {
	c := append([]float32(nil), p.c...)
	for l := range max(1, p.lines) {
		for i := range p.m {
			for j := range p.n {
				at := l*p.cLine + i*p.cRow + j
				sum := 0.0
				switch {
				case p.add:
					sum = float64(p.c[at])
				case p.bias != nil:
					sum = float64(p.bias[j])
				}
				for s := range p.segments {
					for k := range p.steps {
						at := j
						if p.bStrip > 0 {
							at = j/stripWidth*p.bStrip + j%stripWidth
						}
						a, b := p.a[l*p.aLine+s*p.aSegment+i*p.aRow+k*p.aStep], p.b[l*p.bLine+s*p.bSegment+k*p.bStep+at]
						if p.pairs {
							a0, a1 := split(a)
							b0, b1 := split(b)
							sum += float64(a0)*float64(b0) + float64(a1)*float64(b1)
						} else {
							sum += float64(a) * float64(b)
						}
					}
				}
				if p.relu {
					sum = max(sum, 0)
				}
				c[at] = float32(sum)
			}
		}
	}
	return c
}

func TestProductEqualsDefinition(t *testing.T) {
	each(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(1, 2))
		// operand has n values, or pairs of them, anywhere: vectors need not be aligned
		operand := func(n int, pairs bool) []float32 {
			off := rng.IntN(4)
			v := fill(rng, off+2*n)
			if pairs {
				for i := range n {
					v[off+i] = join(v[off+i], v[off+n+i])
				}
			}
			return v[off:][:n]
		}
		trials := 150
		if testing.Short() {
			trials = 40
		}
		for trial := range trials {
			p := product{
				m: 1 + rng.IntN(50), n: 1 + rng.IntN(100), steps: 1 + rng.IntN(40), segments: 1 + rng.IntN(3), lines: rng.IntN(4),
				add: trial%3 == 0, relu: trial%2 == 0, pairs: trial/2%2 == 0,
			}
			if trial%50 == 0 {
				p.steps, p.segments = 2*maxSteps+3, 1
			}
			if trial%5 == 0 { // a transposed, as for weight gradients
				p.aRow, p.aStep = 1, p.m+rng.IntN(3)
			} else {
				p.aRow, p.aStep = p.steps+rng.IntN(3), 1
			}
			p.aSegment, p.aLine, p.bLine = rng.IntN(9), rng.IntN(9), rng.IntN(2)*rng.IntN(9)
			p.bStep, p.cRow = p.n+rng.IntN(2)*rng.IntN(5), p.n+rng.IntN(5)
			p.bSegment = p.steps*p.bStep + trial/5%2*rng.IntN(5)
			p.cLine = p.m * p.cRow
			if p.tiled() && trial%2 == 0 {
				p.n, p.bStep, p.bLine, p.bSegment = stripWidth*(1+rng.IntN(3)), stripWidth, 0, p.steps*stripWidth
				p.bStrip = p.segments*p.bSegment + rng.IntN(2)*stripWidth
				p.cRow = p.n + rng.IntN(5)
				p.cLine = p.m * p.cRow
			}
			p.a = operand(p.lines*p.aLine+p.segments*p.aSegment+p.m*p.aRow+p.steps*p.aStep, p.pairs)
			p.b = operand(p.lines*p.bLine+p.segments*p.bSegment+(p.n-1)/stripWidth*p.bStrip, p.pairs)
			p.c = operand(max(1, p.lines)*p.cLine, false)
			if trial%3 == 1 {
				p.bias = operand(p.n, false)
			}
			want := reference(p)
			p.run()
			near(t, fmt.Sprintf("trial %d: %dx%d over %dx%d, %d lines, pairs %v", trial, p.m, p.n, p.segments, p.steps, p.lines, p.pairs), p.c, want, 1e-4)
		}
	})
}

// Assembly must never be handed an address outside a slice.
func TestShortOperandsAreRefused(t *testing.T) {
	each(t, func(t *testing.T) {
		for _, short := range []string{"a", "b", "c", "bias", "across", "rows"} {
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
				transposeTo(length("across", 15), length("rows", 15), 3, 5, 3, 5)
			}()
		}
	})
}

// rounded is v, rounded to bfloat16 where half is set.
func rounded(v []float32, half bool) []float64 {
	out := make([]float64, len(v))
	for i, x := range v {
		if half {
			x, _ = split(join(x, 0))
		}
		out[i] = float64(x)
	}
	return out
}

// Layers of every path equal a direct computation in float64.
func TestLayersEqualDefinition(t *testing.T) {
	for _, c := range []Conv{
		{Height: 7, Width: 9, Channels: 3, Filters: 5, Kernel: 3, Stride: 1, Padding: 1},
		{Height: 8, Width: 7, Channels: 17, Filters: 18, Kernel: 3, Stride: 1},
		{Height: 8, Width: 9, Channels: 1, Filters: 33, Kernel: 4, Stride: 2, Padding: 1},
		{Height: 9, Width: 11, Channels: 16, Filters: 7, Kernel: 5, Stride: 3, Padding: 2},
		{Height: 8, Width: 6, Channels: 32, Filters: 33, Kernel: 4, Stride: 2, Padding: 1},
		{Height: 8, Width: 10, Channels: 16, Filters: 3, Kernel: 4, Stride: 2},
		{Height: 8, Width: 11, Channels: 17, Filters: 5, Kernel: 6, Stride: 3, Padding: 5},
		{Height: 10, Width: 12, Channels: 32, Filters: 32, Kernel: 3, Stride: 1, Padding: 1},
		{Height: 5, Width: 5, Channels: 2, Filters: 4, Kernel: 5, Stride: 1, Padding: 4},
		{Height: 3, Width: 3, Channels: 1, Filters: 1, Kernel: 3, Stride: 1},
		{Height: 10, Width: 6, Channels: 32, Filters: 16, Kernel: 3, Stride: 1},
		{Height: 2, Width: 6, Channels: 16, Filters: 48, Kernel: 3, Stride: 1, Padding: 2},
	} {
		c.OutHeight, c.OutWidth = (c.Height+2*c.Padding-c.Kernel)/c.Stride+1, (c.Width+2*c.Padding-c.Kernel)/c.Stride+1
		for _, mode := range []string{"float32", "bf16", "winograd"} {
			c.BF16, c.Winograd = mode == "bf16", mode == "winograd"
			if c.Winograd && !c.fitsWinograd() {
				continue
			}
			t.Run(fmt.Sprintf("%dx%d stride %d padding %d %s", c.Kernel, c.Kernel, c.Stride, c.Padding, mode), func(t *testing.T) {
				each(t, func(t *testing.T) {
					c := c // scratch of its own for each path
					rng := rand.New(rand.NewPCG(7, 8))
					const rows = 7
					in, out := c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth*c.Filters
					x, dy := fill(rng, rows*in), fill(rng, rows*out)
					w, bias := fill(rng, c.Kernel*c.Kernel*c.Channels*c.Filters), fill(rng, c.Filters)
					xForward, wForward := rounded(x, c.packs()), rounded(w, c.packs())
					xBack, wBack, dyBack := rounded(x, c.BF16), rounded(w, c.BF16), rounded(dy, c.BF16)
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
							wantY[i] += xForward[j] * wForward[k*c.Filters+f]
							wantDX[j] += dyBack[i] * wBack[k*c.Filters+f]
							wantDW[k*c.Filters+f] += dyBack[i] * xBack[j]
						}
					}
					y, dx := make([]float32, rows*out), make([]float32, rows*in)
					dw, db := make([]float32, len(w)), make([]float32, len(bias))
					packed, turned := make([]float32, c.Arranged()), make([]float32, c.Arranged())
					for range 2 { // the second time with used scratch memory
						c.Turn(turned, w)
						c.Forward(y, x, c.Pack(packed, w), bias, rows, false)
						c.BackwardInput(dx, dy, turned, nil, rows)
						c.BackwardWeight(dw, db, x, dy, rows)
					}
					near(t, "y", y, float32s(wantY), 1e-4)
					near(t, "dx", dx, float32s(wantDX), 1e-4)
					testMask(t, &c, dx, dy, turned, x, rows)
					near(t, "dw", dw, float32s(wantDW), 1e-4)
					near(t, "db", db, float32s(wantDB), 1e-4)
				})
			})
		}
	}
	for _, d := range []Dense{{In: 1, Units: 1}, {In: 37, Units: 10}, {In: 70, Units: 33}, {In: 1100, Units: 16}} {
		for _, d.BF16 = range []bool{false, true} {
			for _, rows := range []int{1, 2, 17} {
				t.Run(fmt.Sprintf("dense %d to %d bf16 %v, %d rows", d.In, d.Units, d.BF16, rows), func(t *testing.T) {
					each(t, func(t *testing.T) {
						d := d
						rng := rand.New(rand.NewPCG(7, 9))
						x, dy := fill(rng, rows*d.In), fill(rng, rows*d.Units)
						w, bias := fill(rng, d.In*d.Units), fill(rng, d.Units)
						xs, ws, ds := rounded(x, d.BF16), rounded(w, d.BF16), rounded(dy, d.BF16)
						wantY, wantDX := make([]float64, len(dy)), make([]float64, len(x))
						wantDW, wantDB := make([]float64, len(w)), make([]float64, len(bias))
						for r := range rows {
							for u := range d.Units {
								wantY[r*d.Units+u] = float64(bias[u])
								wantDB[u] += float64(dy[r*d.Units+u])
								for i := range d.In {
									wantY[r*d.Units+u] += xs[r*d.In+i] * ws[i*d.Units+u]
									wantDX[r*d.In+i] += ds[r*d.Units+u] * ws[i*d.Units+u]
									wantDW[i*d.Units+u] += ds[r*d.Units+u] * xs[r*d.In+i]
								}
							}
						}
						y, dx := make([]float32, len(dy)), make([]float32, len(x))
						dw, db := make([]float32, len(w)), make([]float32, len(bias))
						packed, turned := make([]float32, len(w)), make([]float32, len(w))
						d.Turn(turned, w)
						d.Forward(y, x, d.Pack(packed, w), bias, rows, false)
						d.BackwardInput(dx, dy, turned, nil, rows)
						d.BackwardWeight(dw, db, x, dy, rows)
						near(t, "y", y, float32s(wantY), 1e-4)
						near(t, "dx", dx, float32s(wantDX), 1e-4)
						testMask(t, &d, dx, dy, turned, x, rows)
						near(t, "dw", dw, float32s(wantDW), 1e-4)
						near(t, "db", db, float32s(wantDB), 1e-4)
					})
				})
			}
		}
	}
}

// testMask tests that a mask leaves of the gradient dx what it should.
func testMask(t *testing.T, layer Weighted, dx, dy, turned, mask []float32, rows int) {
	t.Helper()
	got := make([]float32, len(dx))
	layer.BackwardInput(got, dy, turned, mask, rows)
	for i, v := range dx {
		if !(mask[i] > 0) {
			v = 0
		}
		if got[i] != v {
			t.Fatalf("dx under a mask: element %d is %v, want %v", i, got[i], v)
		}
	}
}

// Winograd's algorithm is nearly as exact as plain float32, by how much what it logs
// says.
func TestWinogradIsExact(t *testing.T) {
	each(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(1, 1))
		c := Conv{Height: 14, Width: 14, Channels: 64, OutHeight: 12, OutWidth: 12, Filters: 64, Kernel: 3, Stride: 1}
		x, w, bias := fill(rng, 14*14*64), fill(rng, 9*64*64), make([]float32, 64)
		for i, v := range x {
			x[i] = max(v, 0) // as a ReLU leaves them
		}
		exact, size := make([]float64, 12*12*64), 0.0
		for i := range exact {
			f, at := i%64, i/64
			for k := range 9 * 64 {
				exact[i] += float64(x[((at/12+k/192)*14+at%12+k/64%3)*64+k%64]) * float64(w[k*64+f])
			}
			size += exact[i] * exact[i]
		}
		off := func(bf16, winograd bool) float64 { // root of the mean square, of what the outputs have
			c := c
			c.BF16, c.Winograd = bf16, winograd
			y := make([]float32, len(exact))
			c.Forward(y, x, c.Pack(make([]float32, c.Arranged()), w), bias, 1, false)
			sum := 0.0
			for i, v := range y {
				sum += (float64(v) - exact[i]) * (float64(v) - exact[i])
			}
			return math.Sqrt(sum / size)
		}
		plain, winograd, bfloat16s := off(false, false), off(false, true), off(true, false)
		t.Logf("error of an output: %.1e plain, %.1e by Winograd's algorithm, %.1e by bfloat16", plain, winograd, bfloat16s)
		if winograd > 10*plain || winograd > bfloat16s/1000 {
			t.Error("Winograd's algorithm is not as exact as that")
		}
	})
}

// What answers and training are fast by.
func TestUseFast(t *testing.T) {
	conv := func(side, channels, filters, kernel, stride int) Conv {
		out := (side-kernel)/stride + 1
		return Conv{Height: side, Width: side, Channels: channels, OutHeight: out, OutWidth: out, Filters: filters, Kernel: kernel, Stride: stride}
	}
	each(t, func(t *testing.T) {
		for _, c := range []struct {
			name string
			Conv
			winograd bool
		}{
			{"3 x 3", conv(26, 32, 64, 3, 1), true},
			{"few outputs", conv(7, 32, 64, 3, 1), false}, // 5 x 5 of 8 x 8
			{"first layer", conv(28, 1, 32, 3, 1), false},
			{"odd filters", conv(26, 32, 10, 3, 1), false},
			{"a stride", conv(13, 32, 32, 3, 2), false},
			{"5 x 5", conv(28, 32, 32, 5, 1), false},
		} {
			answer := &ConvPool{Conv: c.Conv, Size: 2}
			winograd := c.winograd && path != "portable" && path != "avx2"
			if UseWinograd(answer) != winograd || answer.Winograd != winograd || answer.BF16 {
				t.Errorf("%s for an answer: Winograd %v, bfloat16 %v", c.name, answer.Winograd, answer.BF16)
			}
			p := &ConvPool{Conv: c.Conv, Size: 2}
			UseFast(&c.Conv)
			UseFast(p)
			winograd = winograd && path != "amx"
			if c.Conv.Winograd != winograd || c.Conv.BF16 != (!winograd && HasBF16()) {
				t.Errorf("%s: Winograd %v, bfloat16 %v", c.name, c.Conv.Winograd, c.Conv.BF16)
			}
			if p.Winograd != c.Conv.Winograd || p.BF16 != c.Conv.BF16 {
				t.Errorf("%s with a pool: Winograd %v, bfloat16 %v", c.name, p.Winograd, p.BF16)
			}
		}
	})
}

// A ConvPool is its Conv and its MaxPool, bit for bit.
func TestConvPoolEqualsItsParts(t *testing.T) {
	for _, p := range []ConvPool{
		{Conv: Conv{Height: 9, Width: 8, Channels: 1, Filters: 32, Kernel: 3, Padding: 1}, Size: 2},
		{Conv: Conv{Height: 8, Width: 9, Channels: 16, Filters: 24, Kernel: 3}, Size: 2},
		{Conv: Conv{Height: 8, Width: 8, Channels: 3, Filters: 13, Kernel: 3, Padding: 1}, Size: 2},
		{Conv: Conv{Height: 11, Width: 10, Channels: 4, Filters: 8, Kernel: 5, Padding: 2}, Size: 3},
		{Conv: Conv{Height: 10, Width: 11, Channels: 16, Filters: 32, Kernel: 3}, Size: 2},
	} {
		p.Stride = 1
		p.OutHeight, p.OutWidth = p.Height+2*p.Padding-p.Kernel+1, p.Width+2*p.Padding-p.Kernel+1
		for _, mode := range []string{"float32", "bf16", "winograd"} {
			p.BF16, p.Winograd = mode == "bf16", mode == "winograd"
			t.Run(fmt.Sprintf("%dx%d to %d, windows of %d, %s", p.Height, p.Width, p.Filters, p.Size, mode), func(t *testing.T) {
				each(t, func(t *testing.T) {
					const rows = 7
					rng := rand.New(rand.NewPCG(7, 8))
					p, conv := p, p.Conv
					pool := MaxPool{Height: p.OutHeight, Width: p.OutWidth, Channels: p.Filters, Size: p.Size}
					full := p.OutHeight * p.OutWidth * p.Filters
					x, w, bias := fill(rng, rows*p.Height*p.Width*p.Channels), fill(rng, p.Kernel*p.Kernel*p.Channels*p.Filters), fill(rng, p.Filters)
					packed, turned := make([]float32, conv.Arranged()), make([]float32, conv.Arranged())
					conv.Turn(turned, w)
					take := conv.Pack(packed, w)
					dy := fill(rng, rows*p.windows())

					z, dz := make([]float32, rows*full), make([]float32, rows*full)
					y, which := make([]float32, rows*p.windows()), make([]int32, rows*p.windows())
					dx, dw, db := make([]float32, len(x)), make([]float32, len(w)), make([]float32, len(bias))
					conv.Forward(z, x, take, bias, rows, true)
					pool.Forward(y, which, z, rows)
					pool.Backward(dz, dy, which, rows)
					MaskPositive(dz, dz, z)
					conv.BackwardInput(dx, dz, turned, nil, rows)
					conv.BackwardWeight(dw, db, x, dz, rows)

					gotY := make([]float32, len(y))
					gotX, gotW, gotB := make([]float32, len(x)), make([]float32, len(w)), make([]float32, len(bias))
					for range 2 { // the second time with used scratch memory
						p.Forward(gotY, x, take, bias, rows, true)
						p.BackwardInput(gotX, dy, turned, nil, rows)
						p.BackwardWeight(gotW, gotB, x, dy, rows)
					}
					testMask(t, &p, dx, dy, turned, x, rows)
					near(t, "y", gotY, y, 0)
					near(t, "dx", gotX, dx, 0)
					near(t, "dw", gotW, dw, 0)
					near(t, "db", gotB, db, 0)

					x[0] = float32(math.NaN())
					p.Forward(gotY, x, take, bias, rows, true)
					if v := gotY[0]; v == v {
						t.Errorf("a NaN in the window became %v", v)
					}
				})
			})
		}
	}
}

// Rounding to bfloat16 is the processor's on every path, bit for bit.
func TestRounding(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	special := []float32{0, float32(math.Copysign(0, -1)), 1, -1, 1.00390625, 1.01171875, 1e-40, -1e-40, math.MaxFloat32, float32(math.Inf(1)), float32(math.Inf(-1)), float32(math.NaN())}
	for n := 1; n < 100; n++ {
		src := fill(rng, 4*n)
		for i := range src {
			src[i] = math.Float32frombits(rng.Uint32())
			if i < len(special) {
				src[i] = special[(i+n)%len(special)]
			}
		}
		run := func(p string) []uint32 {
			defer Use(p)()
			one, two := make([]float32, (n+1)/2+1), make([]float32, 2*n+1)
			round(one, src[:n])
			pairRows(two, src[:3*n], 3, n)
			var bits []uint32
			for _, v := range append(one, two...) {
				bits = append(bits, math.Float32bits(v))
			}
			return bits
		}
		want := run("portable")
		for _, p := range Paths() {
			for i, bits := range run(p) {
				if bits != want[i] {
					t.Fatalf("%s: word %d of %d values is %08x, want %08x", p, i, n, bits, want[i])
				}
			}
		}
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
			defer Use(p)()
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
			moved := clone(x)
			if !SignStep(moved, m, g, 0.25, 0.5) {
				t.Errorf("%s: %d finite values are said not to be", p, n)
			}
			for i := range n {
				for _, bad := range []float64{math.NaN(), math.Inf(1), math.Inf(-1)} {
					gradient := clone(g)
					gradient[i] = float32(bad)
					if SignStep(clone(x), m, gradient, 0.25, 0.5) {
						t.Errorf("%s: %v at %d of %d is said to be finite", p, bad, i, n)
					}
				}
			}
			return [][]float32{sum, masked, best, chosen, w, m, v, a, moved}, index
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

func TestTranspose(t *testing.T) {
	each(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(5, 6))
		for _, rows := range []int{1, 5, 16, 37, 48} {
			for _, columns := range []int{1, 15, 16, 19, 33} {
				dstRow, srcRow := rows+rng.IntN(3), columns+rng.IntN(3)
				src, dst := fill(rng, rows*srcRow), fill(rng, columns*dstRow)
				want := slices.Clone(dst)
				for r := range rows {
					for c := range columns {
						want[c*dstRow+r] = src[r*srcRow+c]
					}
				}
				transposeTo(dst, src, rows, columns, dstRow, srcRow)
				near(t, fmt.Sprintf("%d x %d", rows, columns), dst, want, 0)
			}
		}
	})
}

// BenchmarkLayer measures the layers of the network trades, on one goroutine.
func BenchmarkLayer(b *testing.B) {
	const rows = 32
	conv := func(side, channels, filters int) Conv {
		return Conv{Height: side, Width: side, Channels: channels, OutHeight: side - 2, OutWidth: side - 2, Filters: filters, Kernel: 3, Stride: 1}
	}
	first, third := conv(28, 1, 32), conv(12, 32, 64)
	for _, l := range []struct {
		name         string
		layer        Packer
		in, out, w   int
		units, times int // multiply-adds of one row are w x times
	}{
		{"0.conv", &first, 28 * 28, 26 * 26 * 32, 9 * 32, 32, 26 * 26},
		{"1.conv+pool", &ConvPool{Conv: conv(26, 32, 32), Size: 2}, 26 * 26 * 32, 12 * 12 * 32, 9 * 32 * 32, 32, 24 * 24},
		{"3.conv", &third, 12 * 12 * 32, 10 * 10 * 64, 9 * 32 * 64, 64, 10 * 10},
		{"4.conv+pool", &ConvPool{Conv: conv(10, 64, 64), Size: 2}, 10 * 10 * 64, 4 * 4 * 64, 9 * 64 * 64, 64, 8 * 8},
		{"6.dense", &Dense{In: 1024, Units: 200}, 1024, 200, 1024 * 200, 200, 1},
	} {
		rng := rand.New(rand.NewPCG(1, 1))
		x, dy, w, bias := fill(rng, rows*l.in), fill(rng, rows*l.out), fill(rng, l.w), fill(rng, l.units)
		y, dx, dw, db := make([]float32, len(dy)), make([]float32, len(x)), make([]float32, len(w)), make([]float32, len(bias))
		for _, p := range append(Paths()[:max(1, len(Paths())-1)], "winograd") {
			restore := func() {}
			if p != "winograd" {
				restore = Use(p)
			}
			conv := convolution(l.layer)
			if p == "winograd" && (conv == nil || !conv.suitsWinograd()) {
				continue
			}
			if conv != nil {
				conv.BF16, conv.Winograd = HasBF16(), p == "winograd"
			} else {
				l.layer.(*Dense).BF16 = HasBF16()
			}
			UsePairs(l.layer, p == "amx" && l.name != "0.conv", p == "amx") // what is in x, y and their gradients counts for little
			packed, turned := make([]float32, l.layer.Arranged()), make([]float32, l.layer.Arranged())
			l.layer.Turn(turned, w)
			take := l.layer.Pack(packed, w)
			l.layer.Forward(y, x, take, bias, rows, true) // gradients need the places of the maxima
			for _, part := range []struct {
				name string
				run  func()
			}{
				{"forward", func() { l.layer.Forward(y, x, take, bias, rows, true) }},
				{"input gradient", func() { l.layer.BackwardInput(dx, dy, turned, x, rows) }},
				{"weight gradient", func() { l.layer.BackwardWeight(dw, db, x, dy, rows) }},
			} {
				b.Run(l.name+"/"+part.name+"/"+p, func(b *testing.B) {
					for b.Loop() {
						part.run()
					}
					b.ReportMetric(2*rows*float64(l.w*l.times)*float64(b.N)/b.Elapsed().Seconds()/1e9, "GFLOP/s")
				})
			}
			restore()
		}
	}
}

func BenchmarkProduct(b *testing.B) {
	for _, p := range available() {
		for _, size := range [][3]int{{7, 32, 64}, {14, 32, 96}, {128, 100, 1568}} {
			b.Run(fmt.Sprintf("%s/%dx%dx%d", p, size[0], size[1], size[2]), func(b *testing.B) {
				defer Use(p)()
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

// BenchmarkTiles measures 24 lines of a convolution of 32 channels to 32 with 3 x 3
// filters, of so many pixels each, by AMX.
func BenchmarkTiles(b *testing.B) {
	defer Use(Paths()[0])()
	if path != "amx" {
		b.Skip("this processor has no AMX")
	}
	const lines, filters, channels, taps = 24, 32, 16, 3 // pairs of channels
	for _, pixels := range []int{8, 10, 12, 16, 24, 32} {
		rng := rand.New(rand.NewPCG(2, 2))
		line := (pixels + taps - 1) * channels
		pairs := func(n int) []float32 {
			v := make([]float32, n)
			round(v, fill(rng, 2*n))
			return v
		}
		p := product{
			m: pixels, n: filters, steps: taps * channels, segments: taps, pairs: true, lines: lines,
			a: pairs((lines + taps - 1) * line), aRow: channels, aStep: 1, aSegment: line, aLine: line,
			b: pairs(taps * taps * channels * filters), bStep: filters, bSegment: taps * channels * filters,
			c: make([]float32, lines*pixels*filters), cRow: filters, cLine: pixels * filters,
		}
		b.Run(fmt.Sprint(pixels), func(b *testing.B) {
			for b.Loop() {
				p.run()
			}
			b.ReportMetric(4*float64(p.lines*p.m*p.n*p.steps*p.segments)*float64(b.N)/b.Elapsed().Seconds()/1e9, "GFLOP/s")
		})
	}
}

func TestPeakIsMeasured(t *testing.T) {
	for _, p := range Paths() {
		begin := time.Now()
		clock := func() time.Duration { return time.Since(begin) }
		if speed := Peak(p, time.Millisecond, clock); !(speed > 0 && speed < 1e7) {
			t.Errorf("%s: %v GFLOP/s", p, speed)
		}
	}
}

// Layers that take and give pairs compute what they do of values rounded before, and
// round it.
func TestPairsEqualRounded(t *testing.T) {
	each(t, func(t *testing.T) {
		if path != "amx" {
			t.Skip("only AMX uses pairs between layers")
		}
		const rows = 3
		conv := func(height, width, channels, filters, kernel, stride, padding int) Conv {
			return Conv{Height: height, Width: width, Channels: channels, Filters: filters, Kernel: kernel, Stride: stride, Padding: padding, BF16: true,
				OutHeight: (height+2*padding-kernel)/stride + 1, OutWidth: (width+2*padding-kernel)/stride + 1}
		}
		shapes := []Conv{
			conv(28, 28, 1, 32, 3, 1, 0), conv(26, 26, 32, 32, 3, 1, 0), conv(12, 12, 32, 64, 3, 1, 0), conv(10, 10, 64, 64, 3, 1, 0),
			conv(28, 28, 1, 16, 4, 2, 1), conv(14, 14, 16, 32, 4, 2, 1), conv(14, 14, 32, 64, 3, 1, 1), conv(9, 11, 18, 48, 3, 1, 1),
			conv(13, 7, 3, 16, 5, 2, 2), conv(8, 8, 16, 96, 2, 2, 0), conv(7, 9, 34, 22, 5, 1, 2),
		}
		if testing.Short() {
			shapes = shapes[len(shapes)-4:]
		}
		type layer struct {
			name             string
			Packer           // of rounded values
			pairs            Packer
			in, out, w, bias int
			pairsIn          bool
		}
		var layers []layer
		for _, c := range shapes {
			in, out, w := c.Height*c.Width*c.Channels, c.OutHeight*c.OutWidth*c.Filters, c.Kernel*c.Kernel*c.Channels*c.Filters
			pairs, name := c, fmt.Sprintf(" %dx%dx%d to %d by %dx%d/%d+%d", c.Height, c.Width, c.Channels, c.Filters, c.Kernel, c.Kernel, c.Stride, c.Padding)
			layers = append(layers, layer{"conv" + name, &c, &pairs, in, out, w, c.Filters, c.direct() && c.Channels%2 == 0})
			if c.Filters%16 == 0 {
				p := ConvPool{Conv: c, Size: 2}
				pairs := p
				layers = append(layers, layer{"conv+pool" + name, &p, &pairs, in, p.windows(), w, c.Filters, c.direct() && c.Channels%2 == 0})
			}
		}
		for _, d := range []Dense{{In: 1568, Units: 100, BF16: true}, {In: 100, Units: 10, BF16: true}, {In: 70, Units: 64, BF16: true}, {In: 64, Units: 96, BF16: true}} {
			pairs := d
			layers = append(layers, layer{fmt.Sprintf("dense %d to %d", d.In, d.Units), &d, &pairs, d.In, d.Units, d.In * d.Units, d.Units, true})
		}
		for _, l := range layers {
			t.Run(l.name, func(t *testing.T) {
				rng := rand.New(rand.NewPCG(4, 4))
				halved := func(v []float32) (pairs []float32) { // rounds v, too
					pairs = make([]float32, len(v)/2)
					round(pairs, v)
					for i, p := range pairs {
						v[2*i], v[2*i+1] = split(p)
					}
					return pairs
				}
				x, dy := fill(rng, rows*l.in), fill(rng, rows*l.out)
				w, bias := fill(rng, l.w), fill(rng, l.bias)
				for i, v := range x {
					x[i] = max(v, 0)
				}
				xPairs, dyPairs := x, halved(dy)
				if l.pairsIn {
					xPairs = halved(x)
				}
				work := func(layer Packer, x, dy, y, dx []float32) (dw, db []float32) {
					packed, turned := make([]float32, layer.Arranged()), make([]float32, layer.Arranged())
					dw, db = make([]float32, l.w), make([]float32, l.bias)
					for range 2 {
						layer.Turn(turned, w)
						layer.Forward(y, x, layer.Pack(packed, w), bias, rows, true)
						layer.BackwardInput(dx, dy, turned, x, rows)
						layer.BackwardWeight(dw, db, x, dy, rows)
					}
					return dw, db
				}
				wantY, wantDX := make([]float32, len(dy)), make([]float32, len(x))
				wantDW, wantDB := work(l.Packer, x, dy, wantY, wantDX)
				UsePairs(l.pairs, l.pairsIn, true)
				y, dx := make([]float32, len(dyPairs)), make([]float32, len(xPairs))
				dw, db := work(l.pairs, xPairs, dyPairs, y, dx)
				// A bias is added last, and not first, where AMX rounds.
				const ulp = 1. / 128
				values := func(pairs []float32) (v []float32) {
					for _, p := range pairs {
						first, second := split(p)
						v = append(v, first, second)
					}
					return v
				}
				near(t, "y", values(y), wantY, ulp)
				if l.pairsIn {
					dx = values(dx)
				}
				near(t, "dx", dx, wantDX, ulp)
				near(t, "dw", dw, wantDW, 1e-4)
				near(t, "db", db, wantDB, 1e-4)
			})
		}
	})
}
