package graph

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"gorgonia.org/gorgonia"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/kernel"
	"github.com/temper-ml/temper/models/zoo"
)

// The networks cover what the zoo's networks are made of, with sizes that fill
// no vector evenly.
var networks = []nn.Description{
	{Name: "dense", Input: nn.Shape{Height: 3, Width: 5, Channels: 1}, Layers: []nn.Layer{
		{Dense: &nn.Dense{Units: 37, ReLU: true}}, {Dense: &nn.Dense{Units: 3}}}},
	{Name: "strided", Input: nn.Shape{Height: 9, Width: 8, Channels: 3}, Layers: []nn.Layer{
		{Conv: &nn.Conv{Filters: 17, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Conv: &nn.Conv{Filters: 5, Kernel: 3, Stride: 2, ReLU: true}},
		{Dense: &nn.Dense{Units: 4}}}},
	{Name: "pooled", Input: nn.Shape{Height: 11, Width: 10, Channels: 1}, Layers: []nn.Layer{
		{Conv: &nn.Conv{Filters: 18, Kernel: 3, Padding: 1, ReLU: true}},
		{MaxPool: &nn.MaxPool{Size: 2}},
		{Conv: &nn.Conv{Filters: 33, Kernel: 3, ReLU: true}},
		{MaxPool: &nn.MaxPool{Size: 3}},
		{Dense: &nn.Dense{Units: 5}}}},
	{Name: "pool first", Input: nn.Shape{Height: 6, Width: 6, Channels: 2}, Layers: []nn.Layer{
		{MaxPool: &nn.MaxPool{Size: 2}}, {Dense: &nn.Dense{Units: 3}}}},
	{Name: "residual", Input: nn.Shape{Height: 9, Width: 7, Channels: 3}, Layers: []nn.Layer{
		{Normalise: &nn.Normalise{Mean: []float32{0.5, 0.4, 0.3}, Std: []float32{0.25, 0.2, 0.3}}},
		{Conv: &nn.Conv{Filters: 6, Kernel: 3, Padding: 1, ReLU: true}},
		{Conv: &nn.Conv{Filters: 10, Kernel: 3, Stride: 2, Padding: 1}},
		{Affine: &nn.Affine{ReLU: true}},
		{Conv: &nn.Conv{Filters: 10, Kernel: 3, Padding: 1}},
		{From: []int{1}, Conv: &nn.Conv{Filters: 10, Kernel: 1, Stride: 2}},
		{From: []int{4, 5}, Combine: &nn.Combine{Operator: "add", ReLU: true}},
		{From: []int{6, 6}, Combine: &nn.Combine{Operator: "add"}},
		{From: []int{7}, AvgPool: &nn.AvgPool{}},
		{Dense: &nn.Dense{Units: 10}},
		{Activation: &nn.Activation{Function: "sigmoid"}},
		{From: []int{6, 10}, Combine: &nn.Combine{Operator: "mul"}},
		{AvgPool: &nn.AvgPool{Size: 3, Stride: 2, Padding: 1}},
		{From: []int{11}, MaxPool: &nn.MaxPool{Size: 3, Stride: 2, Padding: 1}},
		{From: []int{12, 13}, Concat: &nn.Concat{}},
		{Dense: &nn.Dense{Units: 4}}}},
	{Name: "grouped", Input: nn.Shape{Height: 8, Width: 8, Channels: 4}, Layers: []nn.Layer{
		{Pad: &nn.Pad{Top: 1, Left: 2, Right: 1, Value: 0.5}},
		{Conv: &nn.Conv{Filters: 4, Kernel: 3, Stride: 2, Padding: 1, Groups: 4, ReLU: true}},
		{Conv: &nn.Conv{Filters: 6, Kernel: 3, Padding: 2, Dilation: 2, Groups: 2}},
		{Activation: &nn.Activation{Function: "leaky_relu", Slope: 0.2}},
		{Permute: &nn.Permute{Sizes: []int{30, 3, 2}, Strides: []int{6, 1, 3}, Shape: nn.Shape{Height: 5, Width: 6, Channels: 6}}},
		{Conv: &nn.Conv{Filters: 8, Kernel: 1, Padding: 1}},
		{Activation: &nn.Activation{Function: "tanh"}},
		{AvgPool: &nn.AvgPool{Size: 3, Stride: 1, Padding: 1, CountPadding: true}},
		{Activation: &nn.Activation{Function: "clip", Min: -0.05, Max: 0.1}},
		{Dense: &nn.Dense{Units: 5}},
		{Activation: &nn.Activation{Function: "softmax"}}}},
	{Name: "arithmetic", Input: nn.Shape{Height: 4, Width: 5, Channels: 2}, Layers: []nn.Layer{
		{From: []int{-1}, Conv: &nn.Conv{Filters: 2, Kernel: 3, Padding: 1}},
		{From: []int{-1, 0}, Combine: &nn.Combine{Operator: "sub", ReLU: true}},
		{From: []int{0}, Activation: &nn.Activation{Function: "sigmoid"}},
		{From: []int{1, 2}, Combine: &nn.Combine{Operator: "div"}},
		{Activation: &nn.Activation{Function: "relu"}},
		{Conv: &nn.Conv{Filters: 4, Kernel: 2, Groups: 2}},
		{Dense: &nn.Dense{Units: 3}}}},
}

// weigh is the loss sum over classes of factor*logit, whose gradient is
// factor: it tests the network alone, and a float64 sum of it is smooth enough
// for central differences.
func weigh(factor []float32, classes int) nn.Loss {
	return func(logits, grad []float32, lo, hi int) { copy(grad, factor[lo*classes:hi*classes]) }
}

func fill(rng *rand.Rand, n int) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = rng.Float32()*2 - 1
	}
	return v
}

func TestCase44GradientsEqualCentralDifferences(t *testing.T) {
	for _, d := range networks {
		t.Run(d.Name, func(t *testing.T) {
			const n = 3
			net, err := nn.New(d, 1)
			if err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(2, 3))
			x, factor := fill(rng, n*d.Input.Size()), fill(rng, n*d.Classes())
			attack, err := NewAttack(net, n)
			if err != nil {
				t.Fatal(err)
			}
			training, err := NewTraining(net, n)
			if err != nil {
				t.Fatal(err)
			}
			_, dx, err := attack.Gradient(x, n, weigh(factor, d.Classes()))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := training.Step(x, n, weigh(factor, d.Classes())); err != nil {
				t.Fatal(err)
			}
			forward, err := nn.NewForward(net, n)
			if err != nil {
				t.Fatal(err)
			}
			value := func() (sum float64) {
				forward.Refresh()
				for i, z := range forward.Logits(x, n) {
					sum += float64(z) * float64(factor[i])
				}
				return sum
			}
			// A kink (ReLU, max-pool) between the two points makes a single
			// difference wrong, so a few may disagree; a wrong formula makes
			// most of them disagree.
			compare := func(what string, at []float32, gradient []float32) {
				wrong, tested := 0, 0
				for range 200 {
					i := rng.IntN(len(at))
					const h = 2e-3
					old := at[i]
					at[i] = old + h
					up := value()
					at[i] = old - h
					down := value()
					at[i] = old
					tested++
					if want := (up - down) / (2 * h); math.Abs(want-float64(gradient[i])) > 2e-3+0.01*math.Abs(want) {
						wrong++
						if wrong > 10 {
							t.Errorf("%s %d: gradient %v, central difference %v", what, i, gradient[i], want)
							return
						}
					}
				}
			}
			compare("input", x, dx)
			compare("weight", net.Flat(), training.Gradient())
		})
	}
}

// An attack and its judge see the same logits, to the bit, as does who asks about one
// image alone, on every path.
func TestForwardEqualsGraph(t *testing.T) {
	for _, path := range kernel.Paths() {
		for _, d := range append(networks, winograd) {
			t.Run(path+"/"+d.Name, func(t *testing.T) {
				defer kernel.Use(path)()
				net, err := nn.New(d, 1)
				if err != nil {
					t.Fatal(err)
				}
				const n = 70 // three pieces, the last one short
				x := fill(rand.New(rand.NewPCG(4, 5)), n*d.Input.Size())
				attack, err := NewAttack(net, n)
				if err != nil {
					t.Fatal(err)
				}
				behind, _, err := attack.Gradient(x, n, weigh(make([]float32, n*d.Classes()), d.Classes()))
				if err != nil {
					t.Fatal(err)
				}
				behind = slices.Clone(behind)
				logits, err := attack.Logits(x, n)
				if err != nil {
					t.Fatal(err)
				}
				one, err := nn.NewForward(net, 1)
				if err != nil {
					t.Fatal(err)
				}
				for r := range n {
					want := one.Logits(x[r*d.Input.Size():], 1)
					row := r * d.Classes()
					if !slices.Equal(behind[row:][:len(want)], want) || !slices.Equal(logits[row:][:len(want)], want) {
						t.Fatalf("row %d: %v behind a gradient, %v without, %v alone", r, behind[row:][:len(want)], logits[row:][:len(want)], want)
					}
				}
			})
		}
	}
}

// Changes to the weights count from the next call on.
func TestLogitsFollowTheWeights(t *testing.T) {
	net, err := nn.New(winograd, 1)
	if err != nil {
		t.Fatal(err)
	}
	x := fill(rand.New(rand.NewPCG(4, 5)), net.Input.Size())
	attack, err := NewAttack(net, 1)
	if err != nil {
		t.Fatal(err)
	}
	for seed, ask := range []func() ([]float32, error){
		func() ([]float32, error) { return attack.Logits(x, 1) },
		func() ([]float32, error) { return attack.Parts()[0].Logits(x, 1) },
	} {
		other, err := nn.New(winograd, uint64(2+seed))
		if err != nil {
			t.Fatal(err)
		}
		copy(net.Flat(), other.Flat())
		forward, err := nn.NewForward(other, 1)
		if err != nil {
			t.Fatal(err)
		}
		want := forward.Logits(x, 1)
		if logits, err := ask(); err != nil || !slices.Equal(logits, want) {
			t.Errorf("logits %v, want %v (%v)", logits, want, err)
		}
	}
}

func TestResultsDoNotDependOnGoroutines(t *testing.T) {
	const n = 128
	d := networks[2]
	x := fill(rand.New(rand.NewPCG(6, 7)), n*d.Input.Size())
	factor := fill(rand.New(rand.NewPCG(8, 9)), n*d.Classes())
	var first []float32
	for _, procs := range []int{1, 2, 5} {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
		net, err := nn.New(d, 1)
		if err != nil {
			t.Fatal(err)
		}
		training, err := NewTraining(net, n)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := training.Step(x, n, weigh(factor, d.Classes())); err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = training.Gradient()
		}
		for i, g := range training.Gradient() {
			if g != first[i] {
				t.Fatalf("%d goroutines: gradient %d is %v, with one goroutine %v", procs, i, g, first[i])
			}
		}
	}
}

// winograd is a network whose convolutions but the first are computed by Winograd's
// algorithm where the path has it, with and without a pool.
var winograd = nn.Description{Name: "winograd", Input: nn.Shape{Height: 15, Width: 14, Channels: 1}, Layers: []nn.Layer{
	{Conv: &nn.Conv{Filters: 16, Kernel: 3, Padding: 1, ReLU: true}},
	{Conv: &nn.Conv{Filters: 32, Kernel: 3, ReLU: true}},
	{MaxPool: &nn.MaxPool{Size: 2}},
	{Conv: &nn.Conv{Filters: 16, Kernel: 3, Padding: 1, ReLU: true}},
	{Conv: &nn.Conv{Filters: 16, Kernel: 3, Padding: 2, ReLU: true}},
	{Dense: &nn.Dense{Units: 6}}}}

// The fast arithmetic of training differs from the exact one by rounding, on every path
// and in all its kinds.
func TestFastIsNearlyExact(t *testing.T) {
	d := winograd
	const n = 70 // three pieces, the last one short
	rng := rand.New(rand.NewPCG(8, 9))
	x, factor := fill(rng, n*d.Input.Size()), fill(rng, n*d.Classes())
	for _, path := range kernel.Paths() {
		t.Run(path, func(t *testing.T) {
			defer kernel.Use(path)()
			net, err := nn.New(d, 1)
			if err != nil {
				t.Fatal(err)
			}
			results := func(newAttack func(*nn.Network, int) (*Attack, error), newTraining func(*nn.Network, int) (*Training, error)) [3][]float32 {
				attack, err := newAttack(net, n)
				if err != nil {
					t.Fatal(err)
				}
				training, err := newTraining(net, n)
				if err != nil {
					t.Fatal(err)
				}
				logits, dx, err := attack.Gradient(x, n, weigh(factor, d.Classes()))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := training.Step(x, n, weigh(factor, d.Classes())); err != nil {
					t.Fatal(err)
				}
				return [3][]float32{logits, dx, training.Gradient()}
			}
			exact, fast := results(NewAttack, NewTraining), results(NewFastAttack, NewFastTraining)
			tolerance := 1e-4
			if kernel.HasBF16() {
				tolerance = 0.02
			}
			if path == "amx" { // rounds in every layer, and a ReLU near 0 or a near tie in a pool goes the other way
				tolerance = 0.1
			}
			for i, what := range []string{"logits", "input gradient", "weight gradient"} {
				off, size := 0.0, 0.0
				for k, want := range exact[i] {
					off += float64(fast[i][k]-want) * float64(fast[i][k]-want)
					size += float64(want) * float64(want)
				}
				if off = math.Sqrt(off / size); !(off < tolerance) {
					t.Errorf("%s: off by %.2g of their size", what, off)
				}
			}
		})
	}
}

func TestWrongRowsAreRefused(t *testing.T) {
	net, err := nn.New(networks[0], 1)
	if err != nil {
		t.Fatal(err)
	}
	attack, err := NewAttack(net, 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ values, n int }{{15, 2}, {45, 3}, {15, 0}} {
		if _, err := attack.Logits(make([]float32, c.values), c.n); err == nil {
			t.Errorf("%d rows in %d values: no error", c.n, c.values)
		}
	}
}

// tape compiles the machine's gradients for Gorgonia's own tape machine.
func tape(t testing.TB, m *machine) gorgonia.VM {
	program, locations, err := gorgonia.CompileFunction(m.graph, m.graph.Inputs(), m.gradients)
	if err != nil {
		t.Fatal(err)
	}
	return gorgonia.NewTapeMachine(m.graph, gorgonia.WithPrecompiled(program, locations))
}

func TestTapeMachineAgrees(t *testing.T) {
	for _, d := range networks {
		const n = 20
		net, err := nn.New(d, 1)
		if err != nil {
			t.Fatal(err)
		}
		attack, err := NewAttack(net, n)
		if err != nil {
			t.Fatal(err)
		}
		x := fill(rand.New(rand.NewPCG(6, 7)), n*d.Input.Size())
		loss := weigh(fill(rand.New(rand.NewPCG(8, 9)), n*d.Classes()), d.Classes())
		_, dx, err := attack.Gradient(x, n, loss)
		if err != nil {
			t.Fatal(err)
		}
		want := append([]float32(nil), dx...)
		clear(dx)
		if err := tape(t, attack.machines[0]).RunAll(); err != nil {
			t.Fatal(err)
		}
		if m := attack.machines[0]; !m.direct { // Gorgonia's own addition came last
			copy(dx, m.gradients[0].Value().Data().([]float32))
		}
		for i := range want {
			if dx[i] != want[i] {
				t.Fatalf("%s: gradient %d is %v by the tape machine, %v by the program", d.Name, i, dx[i], want[i])
			}
		}
	}
}

// BenchmarkTapeMachine is BenchmarkAttack for one piece on one goroutine, by
// Gorgonia's tape machine and by the program.
func BenchmarkTapeMachine(b *testing.B) {
	net := wong(b)
	attack, err := NewAttack(net, minPiece)
	if err != nil {
		b.Fatal(err)
	}
	x := fill(rand.New(rand.NewPCG(1, 1)), minPiece*net.Input.Size())
	loss := weigh(fill(rand.New(rand.NewPCG(1, 2)), minPiece*10), 10)
	if _, _, err := attack.Gradient(x, minPiece, loss); err != nil {
		b.Fatal(err)
	}
	m := attack.machines[0]
	b.Run("tape", func(b *testing.B) {
		vm := tape(b, m)
		b.ReportAllocs()
		for b.Loop() {
			if err := vm.RunAll(); err != nil {
				b.Fatal(err)
			}
			vm.Reset()
		}
	})
	b.Run("program", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			m.run(x, 0, 0, minPiece, loss)
		}
	})
}

func wong(b *testing.B) *nn.Network {
	net, err := nn.New(nn.Description{Name: "wong", Input: nn.Shape{Height: 28, Width: 28, Channels: 1}, Layers: []nn.Layer{
		{Conv: &nn.Conv{Filters: 16, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Conv: &nn.Conv{Filters: 32, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Dense: &nn.Dense{Units: 100, ReLU: true}}, {Dense: &nn.Dense{Units: 10}}}}, 1)
	if err != nil {
		b.Fatal(err)
	}
	return net
}

// steps runs a benchmark for the networks of the zoo on every path but the slow
// portable one.
func steps(b *testing.B, prepare func(net *nn.Network, batch int) (step func() error, err error)) {
	for _, name := range []string{"wong", "paper", "trades"} {
		d, err := zoo.LoadNetwork(name)
		if err != nil {
			b.Fatal(err)
		}
		for _, path := range kernel.Paths() {
			for _, batch := range []int{128, 512} {
				if path == "portable" {
					continue
				}
				b.Run(fmt.Sprintf("%s/%s/%d", name, path, batch), func(b *testing.B) {
					defer kernel.Use(path)()
					net, err := nn.New(d, 1)
					if err != nil {
						b.Fatal(err)
					}
					step, err := prepare(net, batch)
					if err != nil {
						b.Fatal(err)
					}
					b.ReportAllocs()
					for b.Loop() {
						if err := step(); err != nil {
							b.Fatal(err)
						}
					}
					b.ReportMetric(float64(batch)*float64(b.N)/b.Elapsed().Seconds(), "images/s")
				})
			}
		}
	}
}

// BenchmarkAttack measures gradients with respect to the input, as training
// takes them.
func BenchmarkAttack(b *testing.B) {
	steps(b, func(net *nn.Network, batch int) (func() error, error) {
		x := fill(rand.New(rand.NewPCG(1, 1)), batch*net.Input.Size())
		loss := weigh(fill(rand.New(rand.NewPCG(1, 2)), batch*10), 10)
		attack, err := NewFastAttack(net, batch)
		return func() error { _, _, err := attack.Gradient(x, batch, loss); return err }, err
	})
}

// BenchmarkTraining measures gradients with respect to the weights.
func BenchmarkTraining(b *testing.B) {
	steps(b, func(net *nn.Network, batch int) (func() error, error) {
		x := fill(rand.New(rand.NewPCG(1, 1)), batch*net.Input.Size())
		loss := weigh(fill(rand.New(rand.NewPCG(1, 2)), batch*10), 10)
		training, err := NewFastTraining(net, batch)
		return func() error { _, err := training.Step(x, batch, loss); return err }, err
	})
}

// BenchmarkLogits measures answers.
func BenchmarkLogits(b *testing.B) {
	steps(b, func(net *nn.Network, batch int) (func() error, error) {
		x := fill(rand.New(rand.NewPCG(1, 1)), batch*net.Input.Size())
		attack, err := NewAttack(net, batch)
		return func() error { _, err := attack.Logits(x, batch); return err }, err
	})
}

// BenchmarkOne measures one answer to one image, as a service gives it.
func BenchmarkOne(b *testing.B) {
	for _, name := range []string{"wong", "paper", "trades"} {
		d, err := zoo.LoadNetwork(name)
		if err != nil {
			b.Fatal(err)
		}
		for _, path := range kernel.Paths() {
			b.Run(name+"/"+path, func(b *testing.B) {
				defer kernel.Use(path)()
				net, err := nn.New(d, 1)
				if err != nil {
					b.Fatal(err)
				}
				forward, err := nn.NewForward(net, 1)
				if err != nil {
					b.Fatal(err)
				}
				x := fill(rand.New(rand.NewPCG(1, 1)), net.Input.Size())
				b.ReportAllocs()
				for b.Loop() {
					forward.Logits(x, 1)
				}
			})
		}
	}
}
