package certify

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
)

// network makes a network with random weights, biases included.
func network(t *testing.T, layers ...nn.Layer) *nn.Network {
	t.Helper()
	net, err := nn.New(nn.Description{Name: "test", Input: nn.Shape{Height: 6, Width: 6, Channels: 2}, Layers: layers}, 7)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(9, 9))
	for i := range net.Flat() { // no value right at the bend of a ReLU
		net.Flat()[i] += float32(0.1 * rng.NormFloat64())
	}
	return net
}

func dense(units int, relu bool) nn.Layer {
	return nn.Layer{Dense: &nn.Dense{Units: units, ReLU: relu}}
}

func conv(filters int, from ...int) nn.Layer {
	return nn.Layer{Conv: &nn.Conv{Filters: filters, Kernel: 3, Padding: 1, ReLU: true}, From: from}
}

// networks has every kind of layer that a bound is known for.
func networks(t *testing.T) map[string]*nn.Network {
	return map[string]*nn.Network{
		"linear": network(t, dense(4, false)),
		"deep":   network(t, conv(3), nn.Layer{MaxPool: &nn.MaxPool{Size: 2}}, dense(9, true), dense(4, false)),
		"residual": network(t,
			nn.Layer{Normalise: &nn.Normalise{Mean: []float32{0.3, 0.5}, Std: []float32{0.2, 0.4}}},
			conv(4), nn.Layer{Conv: &nn.Conv{Filters: 4, Kernel: 3, Padding: 1}},
			nn.Layer{Combine: &nn.Combine{Operator: "add", ReLU: true}, From: []int{1, 2}},
			nn.Layer{Affine: &nn.Affine{ReLU: true}},
			nn.Layer{AvgPool: &nn.AvgPool{}}, dense(4, false)),
		"functions": network(t,
			nn.Layer{Pad: &nn.Pad{Top: 1, Value: 0.5}}, nn.Layer{Activation: &nn.Activation{Function: "leaky_relu", Slope: 0.2}},
			conv(3, 1), nn.Layer{Conv: &nn.Conv{Filters: 2, Kernel: 1, ReLU: false}, From: []int{1}},
			nn.Layer{Concat: &nn.Concat{}, From: []int{2, 3}},
			nn.Layer{MaxPool: &nn.MaxPool{Size: 3, Stride: 2, Padding: 1}}, nn.Layer{Activation: &nn.Activation{Function: "tanh"}},
			nn.Layer{Conv: &nn.Conv{Filters: 4, Kernel: 3, Stride: 4}},
			nn.Layer{Activation: &nn.Activation{Function: "sigmoid"}}),
	}
}

// images draws n images, with values at the edges of the box among them.
func images(net *nn.Network, n int) (x []float32, labels []uint8) {
	rng := rand.New(rand.NewPCG(1, 2))
	x, labels = make([]float32, n*net.Input.Size()), make([]uint8, n)
	for i := range x {
		x[i] = min(max(float32(1.2*rng.Float64()-0.1), 0), 1)
	}
	for i := range labels {
		labels[i] = uint8(rng.IntN(net.Classes()))
	}
	return x, labels
}

// For a linear network the bound is exact: the margin less |dw| times the room
// that each pixel has.
func TestLinearNetworkHasTheClosedForm(t *testing.T) {
	net := networks(t)["linear"]
	b, err := New(net, 50)
	if err != nil {
		t.Fatal(err)
	}
	x, labels := images(net, 50)
	size, classes := net.Input.Size(), net.Classes()
	weight, bias := net.Weights(0)
	for _, epsilon := range []float64{0, 0.01, 0.3, 2} {
		for row, got := range b.Margins(x, labels, epsilon) {
			want, y := math.Inf(1), int(labels[row])
			for k := range classes {
				if k == y {
					continue
				}
				m := float64(bias[y]) - float64(bias[k])
				for i, v := range x[row*size:][:size] {
					d := float64(weight[i*classes+y]) - float64(weight[i*classes+k])
					room := math.Min(epsilon, float64(v)) // down
					if d < 0 {
						room = math.Min(epsilon, 1-float64(v))
					}
					m += d*float64(v) - math.Abs(d)*room
				}
				want = min(want, m)
			}
			if d := want - float64(got); !(d >= 0 && d < 1e-3) {
				t.Errorf("epsilon %v, image %d: margin %v, the closed form is %v: must be below it, by rounding only", epsilon, row, got, want)
			}
		}
	}
}

// No image within the ball, PGD's included, has a smaller margin than the
// bound; at epsilon 0 the bound is the margin itself.
func TestNoImageBreaksTheBound(t *testing.T) {
	const n = 40
	for name, net := range networks(t) {
		t.Run(name, func(t *testing.T) {
			b, err := New(net, n)
			if err != nil {
				t.Fatal(err)
			}
			model, err := graph.NewAttack(net, n)
			if err != nil {
				t.Fatal(err)
			}
			x, labels := images(net, n)
			margins := func(x []float32) []float32 {
				logits, err := model.Logits(x, n)
				if err != nil {
					t.Fatal(err)
				}
				out := make([]float32, n)
				for row, y := range labels {
					z := logits[row*net.Classes():][:net.Classes()]
					out[row] = float32(math.Inf(1))
					for k, v := range z {
						if k != int(y) {
							out[row] = min(out[row], z[y]-v)
						}
					}
				}
				return out
			}
			rng := rand.NewPCG(3, 4)
			tight := 0
			for _, epsilon := range []float64{0, 0.001, 0.1, 0.5} {
				bound := append([]float32(nil), b.Margins(x, labels, epsilon)...)
				ball := attack.Linf(epsilon)
				for try := range 30 {
					adv := append([]float32(nil), x...)
					if try > 0 {
						size := net.Input.Size()
						for row := range n {
							ball.RandomStart(adv[row*size:][:size], x[row*size:][:size], rng)
						}
					}
					if try == 29 && epsilon > 0 {
						adv, err = attack.PGD(attack.Threat{Norm: "linf", Epsilon: epsilon}, attack.PGDConfig{Steps: 20}).Perturb(t.Context(), model, x, labels, 1)
						if err != nil {
							t.Fatal(err)
						}
					}
					for row, m := range margins(adv) {
						if m < bound[row] {
							t.Fatalf("epsilon %v, try %d: image %d has margin %v, below the bound %v", epsilon, try, row, m, bound[row])
						}
						if epsilon == 0 && m-bound[row] < 1e-2 {
							tight++
						}
					}
				}
			}
			if tight < 30*n {
				t.Errorf("at epsilon 0 the bound is the margin for %d of %d", tight, 30*n)
			}
		})
	}
}

// The gradient equals central differences in random directions, but for what
// float32 and the bends of ReLU and maximum do to these.
func TestGradient(t *testing.T) {
	const n, epsilon = 5, 0.05
	for name, net := range networks(t) {
		t.Run(name, func(t *testing.T) {
			b, err := New(net, n)
			if err != nil {
				t.Fatal(err)
			}
			x, labels := images(net, n)
			classes := net.Classes()
			loss := attack.CrossEntropy(labels, classes)
			value := func() (sum float64) {
				worst := b.Step(x, labels, epsilon, loss)
				for row, y := range labels {
					sum += attack.Value(worst[row*classes:][:classes], y)
				}
				return sum
			}
			value()
			gradient := append([]float32(nil), b.Gradient()...)
			flat, rng := net.Flat(), rand.New(rand.NewPCG(5, 6))
			start := append([]float32(nil), flat...)
			off, total := 0.0, 0.0
			for range 20 {
				direction, want := make([]float64, len(flat)), 0.0
				for i := range direction {
					direction[i] = rng.NormFloat64()
					want += direction[i] * float64(gradient[i])
				}
				const h = 1e-4
				at := func(h float64) float64 {
					for i := range flat {
						flat[i] = start[i] + float32(h*direction[i])
					}
					return value()
				}
				got := (at(h) - at(-h)) / (2 * h)
				copy(flat, start)
				off, total = off+math.Abs(got-want), total+math.Abs(want)
			}
			if !(off < 0.03*total) {
				t.Errorf("central differences are %.1f%% off the gradient", 100*off/total)
			}
		})
	}
}

// Training's bound has the gradient of the exact one, but for rounding, and
// proves the same to the last bit.
func TestFastBound(t *testing.T) {
	for name, net := range networks(t) {
		t.Run(name, func(t *testing.T) {
			x, labels := images(net, 40)
			loss := attack.CrossEntropy(labels, net.Classes())
			exact, err := New(net, 40)
			if err != nil {
				t.Fatal(err)
			}
			fast, err := NewFast(net, 40)
			if err != nil {
				t.Fatal(err)
			}
			exact.Step(x, labels, 0.05, loss)
			fast.Step(x, labels, 0.05, loss)
			off, total := 0.0, 0.0
			for i, want := range exact.Gradient() {
				off += math.Pow(float64(fast.Gradient()[i]-want), 2)
				total += math.Pow(float64(want), 2)
			}
			if d := math.Sqrt(off / total); !(d < 0.03) { // bfloat16 has 8 bits
				t.Errorf("the gradient is %.2f%% off", 100*d)
			}
			if !slices.Equal(fast.Margins(x, labels, 0.05), exact.Margins(x, labels, 0.05)) {
				t.Error("the margins differ")
			}
		})
	}
}

// Neither the number of processors nor the batch size changes a bit.
func TestCase17BoundsDoNotDependOnProcessors(t *testing.T) {
	net := networks(t)["deep"]
	x, labels := images(net, 200)
	results := map[string]bool{}
	for _, procs := range []int{1, 3} {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
		b, err := New(net, 200)
		if err != nil {
			t.Fatal(err)
		}
		worst := b.Step(x, labels, 0.1, attack.CrossEntropy(labels, net.Classes()))
		results[fmt.Sprint(worst, b.Gradient(), b.Margins(x, labels, 0.1))] = true
	}
	if len(results) != 1 {
		t.Error("another number of processors gave another result")
	}
	whole, err := New(net, 200)
	if err != nil {
		t.Fatal(err)
	}
	all := append([]float32(nil), whole.Margins(x, labels, 0.1)...)
	small, err := New(net, 7)
	if err != nil {
		t.Fatal(err)
	}
	for lo := 0; lo+7 <= 200; lo += 7 {
		for i, m := range small.Margins(x[lo*net.Input.Size():], labels[lo:lo+7], 0.1) {
			if m != all[lo+i] {
				t.Fatalf("image %d: %v in a batch of 7, %v in one of 200", lo+i, m, all[lo+i])
			}
		}
	}
}

// Training steps on the bound prove a network that was not.
func TestTrainingProves(t *testing.T) {
	net := network(t, conv(4), dense(4, false))
	set := &dataset.Set{Name: "quarters", Shape: net.Input, Classes: []string{"a", "b", "c", "d"}}
	rng := rand.New(rand.NewPCG(7, 8))
	for range 200 { // the brighter quarter is the class
		y := rng.IntN(4)
		set.Labels = append(set.Labels, uint8(y))
		for i := range net.Input.Size() {
			at := i / 2
			v := 40 + rng.IntN(40)
			if at/18 == y/2 && at%6/3 == y%2 {
				v += 120
			}
			set.Bytes = append(set.Bytes, byte(v))
		}
	}
	threat := attack.Threat{Norm: "linf", Epsilon: 0.1}
	before, err := Accuracy(t.Context(), net, set, set.Len(), threat)
	if err != nil {
		t.Fatal(err)
	}
	b, err := New(net, set.Len())
	if err != nil {
		t.Fatal(err)
	}
	x := make([]float32, set.Len()*net.Input.Size())
	set.Read(x, 0, set.Len())
	for range 300 {
		b.Step(x, set.Labels, threat.Epsilon, attack.CrossEntropy(set.Labels, 4))
		for i, g := range b.Gradient() {
			net.Flat()[i] -= 5e-4 * g
		}
	}
	after, err := Accuracy(t.Context(), net, set, set.Len(), threat)
	if err != nil {
		t.Fatal(err)
	}
	if before > 100 || after < 190 {
		t.Errorf("%d images proven before training, %d after, of %d", before, after, set.Len())
	}

	// What is proven withstands every attack.
	model, err := graph.NewAttack(net, 100)
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range []string{"fgsm", "pgd-50x3", "noise-20"} {
		a, err := attack.Parse(spec, threat)
		if err != nil {
			t.Fatal(err)
		}
		adv, err := a.Perturb(t.Context(), model, x, set.Labels, 1)
		if err != nil {
			t.Fatal(err)
		}
		right := 0
		for lo := 0; lo < set.Len(); lo += 100 {
			logits, err := model.Logits(adv[lo*net.Input.Size():], 100)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 100 {
				if attack.Predict(logits[4*i:4*i+4]) == int(set.Labels[lo+i]) {
					right++
				}
			}
		}
		if right < after {
			t.Errorf("%s leaves %d right, though %d are proven", spec, right, after)
		}
	}
}

func TestWithoutBound(t *testing.T) {
	for want, layer := range map[string]nn.Layer{
		"softmax has no bound":      {Activation: &nn.Activation{Function: "softmax"}},
		"operator mul has no bound": {Combine: &nn.Combine{Operator: "mul"}, From: []int{0, 0}},
		"std -1 is negative":        {Normalise: &nn.Normalise{Mean: []float32{0}, Std: []float32{-1}}},
		"slope -0.1":                {Activation: &nn.Activation{Function: "leaky_relu", Slope: -0.1}},
	} {
		net := network(t, dense(4, true), layer, dense(4, false))
		if _, err := New(net, 1); err == nil || !strings.Contains(err.Error(), "layer 1") || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, expected %q", err, want)
		}
	}
	net := network(t, dense(2, false))
	set := &dataset.Set{Name: "s", Shape: net.Input, Classes: []string{"a", "b"}, Bytes: make([]byte, 72), Labels: []byte{1}}
	for want, c := range map[string]struct {
		threat  attack.Threat
		samples int
	}{
		"linf only":           {attack.Threat{Norm: "l2", Epsilon: 1}, 1},
		"2 samples of 1":      {attack.Threat{Norm: "linf", Epsilon: 1}, 2},
		"0 samples of 1":      {attack.Threat{Norm: "linf", Epsilon: 1}, 0},
		"threat.epsilon is -": {attack.Threat{Norm: "linf", Epsilon: -1}, 1},
	} {
		if _, err := Accuracy(t.Context(), net, set, c.samples, c.threat); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, expected %q", err, want)
		}
	}
	// A weight that is not a number proves nothing.
	net.Flat()[3] = float32(math.NaN())
	if n, err := Accuracy(t.Context(), net, set, 1, attack.Threat{Norm: "linf", Epsilon: 0.1}); n != 0 || err != nil {
		t.Errorf("%d proven by NaN (%v)", n, err)
	}
}

// BenchmarkStep compares a step on the bound with one on images, for wong and
// batches of 128: go test -run '^$' -bench Step ./models/certify
func BenchmarkStep(b *testing.B) {
	net, err := nn.New(nn.Description{Name: "wong", Input: nn.Shape{Height: 28, Width: 28, Channels: 1}, Layers: []nn.Layer{
		{Conv: &nn.Conv{Filters: 16, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Conv: &nn.Conv{Filters: 32, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		dense(100, true), dense(10, false),
	}}, 1)
	if err != nil {
		b.Fatal(err)
	}
	const n = 128
	x, labels := images(net, n)
	loss := attack.CrossEntropy(labels, 10)
	b.Run("bound", func(b *testing.B) {
		bound, err := New(net, n)
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			bound.Step(x, labels, 0.3, loss)
		}
		b.ReportMetric(n*float64(b.N)/b.Elapsed().Seconds(), "images/s")
	})
	b.Run("images", func(b *testing.B) {
		model, err := graph.NewTraining(net, n)
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if _, err := model.Step(x, n, loss); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(n*float64(b.N)/b.Elapsed().Seconds(), "images/s")
	})
}
