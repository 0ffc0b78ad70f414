package train

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
)

func toyBatches(t *testing.T, r Recipe) *batches {
	t.Helper()
	model, err := graph.NewAttack(toyNetwork(t), r.Batch)
	if err != nil {
		t.Fatal(err)
	}
	return newBatches(toy(405, 1), model, r, 7)
}

func TestMethodsStayWithinTheThreat(t *testing.T) {
	r := everything()
	b := toyBatches(t, r)
	for _, p := range r.Phases {
		for _, rescued := range []bool{false, true} {
			o, err := b.make(3, methodAt(p, 0.1, 0.1, rescued))
			if err != nil {
				t.Fatal(err)
			}
			rows := o.x
			if p.Method == "trades" {
				if o.n != 20 {
					t.Fatalf("trades: %d rows", o.n)
				}
				rows = nil
				for i := range 10 {
					if !slices.Equal(o.x[2*i*16:(2*i+1)*16], b.clean[i*16:(i+1)*16]) {
						t.Error("trades: the even rows must be clean")
					}
					rows = append(rows, o.x[(2*i+1)*16:(2*i+2)*16]...)
				}
			}
			epsilon := 0.1
			if p.Method == "n-fgsm" && !rescued {
				epsilon = 0.3 // noise of twice the radius and a step of one
			}
			if err := (attack.Threat{Norm: "linf", Epsilon: epsilon}).Verify(rows, b.clean, 16); err != nil {
				t.Errorf("%s: %v", p.Method, err)
			}
			if moved := !slices.Equal(rows, b.clean); moved != (p.Method != "standard") {
				t.Errorf("%s: moved %v", p.Method, moved)
			}
		}
	}
}

func TestCleanShare(t *testing.T) {
	r := mixture()
	b := toyBatches(t, r)
	o, err := b.make(0, methodAt(r.Phases[0], 0.1, 0.1, false))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(o.x[:3*16], b.clean[:3*16]) {
		t.Error("the first 3 of 10 rows must be clean")
	}
	for i := 3; i < 10; i++ {
		if slices.Equal(o.x[i*16:(i+1)*16], b.clean[i*16:(i+1)*16]) {
			t.Errorf("row %d is not attacked", i)
		}
	}
}

func TestEveryEpochHasEachImageAtMostOnceInAnOrderOfItsOwn(t *testing.T) {
	b := toyBatches(t, mixture())
	var orders [][]int
	for epoch := range 2 {
		seen := map[int]bool{}
		for step := range 40 {
			b.load(40*epoch + step)
			for _, i := range b.order[step*10 : step*10+10] {
				if seen[i] {
					t.Fatalf("image %d twice in epoch %d", i, epoch)
				}
				seen[i] = true
			}
		}
		orders = append(orders, slices.Clone(b.order))
	}
	if slices.Equal(orders[0], orders[1]) {
		t.Error("both epochs have the same order")
	}
	b.load(0)
	if !slices.Equal(b.order, orders[0]) {
		t.Error("the order depends on what was loaded before")
	}
}

// TestLossGradients compares the losses' gradients with central differences
// of their values.
func TestLossGradients(t *testing.T) {
	r := everything()
	b := toyBatches(t, r)
	b.load(0)
	copy(b.adv, b.clean)
	rng := rand.New(rand.NewPCG(3, 4))
	for name, o := range map[string]objective{"cross-entropy": b.crossEntropy(b.clean), "trades": b.tradeoff(6)} {
		for _, spread := range []float64{1, 4} {
			logits, grad := make([]float32, o.n*4), make([]float32, o.n*4)
			for i := range logits {
				logits[i] = float32(spread * rng.NormFloat64())
			}
			o.loss(logits[:8*4], grad[:8*4], 0, 8) // two pieces, as goroutines would see them
			o.loss(logits[8*4:], grad[8*4:], 8, o.n)
			const h = 1.0 / 256
			for i := range logits {
				z := logits[i]
				logits[i] = z + h
				up := o.value(logits)
				logits[i] = z - h
				down := o.value(logits)
				logits[i] = z
				if want := (up - down) / (2 * h); math.Abs(want-float64(grad[i])) > 5e-5 {
					t.Errorf("%s, spread %v: gradient %d is %v, difference %v", name, spread, i, grad[i], want)
				}
			}
		}
	}
}

func TestTradesStaysFiniteForExtremeLogits(t *testing.T) {
	b := toyBatches(t, everything())
	b.load(0)
	o := b.tradeoff(6)
	logits, grad := make([]float32, o.n*4), make([]float32, o.n*4)
	for i := range logits {
		logits[i] = float32(i%3-1) * 1e4
	}
	o.loss(logits, grad, 0, o.n)
	if v := o.value(logits); math.IsNaN(v) || math.IsInf(v, 0) {
		t.Errorf("value %v", v)
	}
	if v := norm(grad, make([]float64, 1)); math.IsNaN(v) || math.IsInf(v, 0) {
		t.Errorf("gradient %v", grad)
	}
}

// TestAdam compares the update with one worked out in float64 from the paper's
// algorithm, parameter by parameter, over more than one chunk.
func TestAdam(t *testing.T) {
	const n = chunk + 100
	a := Adam{LearningRate: 0.01}.WithDefaults()
	rng := rand.New(rand.NewPCG(1, 2))
	weights, g := make([]float32, n), make([]float32, n)
	w, m, v, ema := make([]float64, n), make([]float64, n), make([]float64, n), make([]float64, n)
	for i := range weights {
		weights[i] = float32(rng.NormFloat64())
		w[i], ema[i] = float64(weights[i]), float64(weights[i])
	}
	plain := newSnapshot(slices.Clone(weights))
	s := newSnapshot(weights)
	for step := 1; step <= 20; step++ {
		for i := range g {
			g[i] = float32(rng.NormFloat64())
		}
		decay := min(0.95, float64(1+step)/float64(10+step))
		for i := range w {
			d := 0.5 * float64(g[i])
			m[i] = a.Beta1*m[i] + (1-a.Beta1)*d
			v[i] = a.Beta2*v[i] + (1-a.Beta2)*d*d
			w[i] -= 0.01 * m[i] / (1 - math.Pow(a.Beta1, float64(step))) / (math.Sqrt(v[i]/(1-math.Pow(a.Beta2, float64(step)))) + a.Epsilon)
			ema[i] = decay*ema[i] + (1-decay)*w[i]
		}
		s.update(g, 0.5, 0.01, a, 0.95)
		plain.update(g, 0.5, 0.01, a, 0)
	}
	for i := range w {
		if math.Abs(w[i]-float64(s.weights[i])) > 2e-5 || math.Abs(ema[i]-float64(s.ema[i])) > 2e-5 {
			t.Fatalf("parameter %d: %v and average %v, want %v and %v", i, s.weights[i], s.ema[i], w[i], ema[i])
		}
	}
	if !slices.Equal(plain.weights, s.weights) {
		t.Error("the moving average changes the weights")
	}
}

func TestAlphaRisesWithEpsilon(t *testing.T) {
	p := Phase{Method: "pgd", Epsilon: 0.15, EpsilonRampEpochs: 2, Alpha: 0.1, Steps: 5}
	if m := methodAt(p, 0.075, 0.15, false); m.alpha != 0.05 || m.steps != 5 {
		t.Errorf("half-way up the ramp %+v: alpha must be half", m)
	}
}

func TestShiftMovesTheImage(t *testing.T) {
	shape := nn.Shape{Height: 4, Width: 5, Channels: 2}
	at := func(x []float32, row, column, channel int) float32 {
		if row < 0 || row >= shape.Height || column < 0 || column >= shape.Width {
			return 0
		}
		return x[(row*shape.Width+column)*shape.Channels+channel]
	}
	image := make([]float32, shape.Size())
	for i := range image {
		image[i] = float32(i + 1)
	}
	for down := -5; down <= 5; down++ {
		for right := -6; right <= 6; right++ {
			moved := slices.Clone(image)
			shift(moved, shape, down, right)
			for i := range moved {
				row, column, channel := i/10, i%10/2, i%2
				if want := at(image, row-down, column-right, channel); moved[i] != want {
					t.Fatalf("%d down, %d right: %v at %d %d %d, want %v", down, right, moved[i], row, column, channel, want)
				}
			}
		}
	}
}

// What is drawn belongs to the step: a training that resumes draws the same.
func TestShiftBelongsToTheStep(t *testing.T) {
	r := everything()
	r.Shift = 1
	load := func(steps ...int) []float32 {
		b := toyBatches(t, r)
		for _, s := range steps {
			b.load(s)
		}
		return b.clean
	}
	here := load(2)
	if !slices.Equal(load(0, 1, 2), here) {
		t.Error("step 2 after steps 0 and 1 has other images than step 2 alone")
	}
	r.Shift = 0
	if slices.Equal(load(2), here) {
		t.Error("no image was moved")
	}
}
