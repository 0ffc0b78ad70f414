package attack

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/unknown"
)

// linear is softmax regression worked out by hand: logits = x W + b. Its
// robustness has a closed form, so it is the oracle of these tests.
type linear struct {
	network *nn.Network
	batch   int
	logits  []float32
	dz      []float32
	dx      []float32
	poison  int // the gradient call that returns NaN, counted from 1; 0 for none
	calls   int
}

func newLinear(t testing.TB, pixels, classes, batch int, seed uint64) *linear {
	t.Helper()
	n, err := nn.New(nn.Description{
		Name: "linear", Input: nn.Shape{Height: 1, Width: pixels, Channels: 1},
		Layers: []nn.Layer{{Dense: &nn.Dense{Units: classes}}},
	}, seed)
	if err != nil {
		t.Fatal(err)
	}
	return &linear{network: n, batch: batch,
		logits: make([]float32, batch*classes), dz: make([]float32, batch*classes), dx: make([]float32, batch*pixels)}
}

func (m *linear) Network() *nn.Network { return m.network }
func (m *linear) Batch() int           { return m.batch }

func (m *linear) Logits(x []float32, n int) ([]float32, error) {
	if n > m.batch {
		return nil, errors.New("more rows than the batch")
	}
	pixels, classes := m.network.Input.Size(), m.network.Classes()
	w, b := m.network.Weights(0)
	for i := range n {
		z := m.logits[i*classes : (i+1)*classes]
		copy(z, b)
		for p, v := range x[i*pixels : (i+1)*pixels] {
			for c := range z {
				z[c] += v * w[p*classes+c]
			}
		}
	}
	return m.logits[:n*classes], nil
}

func (m *linear) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	if logits, err = m.Logits(x, n); err != nil {
		return nil, nil, err
	}
	pixels, classes := m.network.Input.Size(), m.network.Classes()
	half := n / 2 &^ 1 // two pieces, as several goroutines would see them
	loss(logits[:half*classes], m.dz[:half*classes], 0, half)
	loss(logits[half*classes:], m.dz[half*classes:n*classes], half, n)
	w, _ := m.network.Weights(0)
	for i := range n {
		for p := range pixels {
			sum := float32(0)
			for c := range classes {
				sum += m.dz[i*classes+c] * w[p*classes+c]
			}
			m.dx[i*pixels+p] = sum
		}
	}
	if m.calls++; m.calls == m.poison {
		m.dx[0] = float32(math.NaN())
	}
	return logits, m.dx[:n*pixels], nil
}

// images draws n images with many pixels at the edges of the box, and labels
// them as the model sees them, so that its clean accuracy is 1.
func images(t testing.TB, m Model, n int, seed uint64) (x []float32, labels []uint8) {
	t.Helper()
	size, classes := m.Network().Input.Size(), m.Network().Classes()
	rng := rand.New(rand.NewPCG(seed, 1))
	x, labels = make([]float32, n*size), make([]uint8, n)
	for i := range x {
		x[i] = float32(min(1, max(0, 1.4*rng.Float64()-0.2)))
	}
	for i := range n {
		z, err := m.Logits(x[i*size:(i+1)*size], 1)
		if err != nil {
			t.Fatal(err)
		}
		labels[i] = uint8(Predict(z[:classes]))
	}
	return x, labels
}

// broken tells which of the adversarial images the model misclassifies.
func broken(t testing.TB, m Model, adv []float32, labels []uint8) []bool {
	t.Helper()
	size := m.Network().Input.Size()
	out := make([]bool, len(labels))
	for i, y := range labels {
		z, err := m.Logits(adv[i*size:(i+1)*size], 1)
		if err != nil {
			t.Fatal(err)
		}
		out[i] = Predict(z) != int(y)
	}
	return out
}

func count1(b []bool) (n int) {
	for _, v := range b {
		if v {
			n++
		}
	}
	return n
}

func perturb(t testing.TB, a Attack, m Model, x []float32, labels []uint8, seed uint64) []float32 {
	t.Helper()
	adv, err := a.Perturb(context.Background(), m, x, labels, seed)
	if err != nil {
		t.Fatalf("%s: %v", a.Name(), err)
	}
	return adv
}

var epsilons = []float64{0, 1e-9, 1. / 255, 0.1, 0.15, 0.3, 0.5, 0.999, 1, 1.5, 1e30}

func TestCase43EveryAttackStaysInBallAndBox(t *testing.T) {
	for _, epsilon := range epsilons {
		threat := Threat{"linf", epsilon}
		m := newLinear(t, 30, 4, 8, 7)
		x, labels := images(t, m, 19, 11)
		for _, name := range []string{"fgsm", "noise-20", "pgd-20", "pgd-7x3", "apgd-ce-25", "apgd-dlr-25", "apgd-t-25", "fab-t-25", "square-300x2"} {
			a, err := Parse(name, threat)
			if err != nil {
				t.Fatal(err)
			}
			adv := perturb(t, a, m, x, labels, 5)
			moved := false
			for i := range adv {
				if d := adv[i] - x[i]; d > float32(epsilon) || -d > float32(epsilon) || !(adv[i] >= 0 && adv[i] <= 1) {
					t.Fatalf("%s, epsilon %v: pixel %v became %v", name, epsilon, x[i], adv[i])
				}
				moved = moved || adv[i] != x[i]
			}
			if moved != (epsilon > 1e-8) && epsilon != 1e-9 && !(name == "fab-t-25" && epsilon < 0.1) { // 1e-9 is below float32's resolution for most pixels; FAB keeps an image only if it is misclassified
				t.Errorf("%s, epsilon %v: moved %v", name, epsilon, moved)
			}
		}
	}
}

func TestCase43VerifyRefusesOutsideOfBallOrBox(t *testing.T) {
	threat := Threat{"linf", 0.3}
	clean := []float32{0, 0.5, 1}
	for _, c := range []struct {
		adv  []float32
		want string
	}{
		{[]float32{0.3, 0.2, 1}, ""},
		{[]float32{math.Nextafter32(0.3, 1), 0.5, 1}, "moved by"},
		{[]float32{0, 0.1, 1}, "moved by"},
		{[]float32{0, 0.5, math.Nextafter32(1, 2)}, "outside of [0,1]"},
		{[]float32{-1e-9, 0.5, 1}, "outside of [0,1]"},
		{[]float32{0, float32(math.NaN()), 1}, "outside of [0,1]"},
		{[]float32{0, 0.5}, "2 adversarial pixels for 3"},
	} {
		err := threat.Verify(c.adv, clean, len(clean))
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: error %v, want %q", c.adv, err, c.want)
		}
	}
}

func FuzzCase43Ball(f *testing.F) {
	f.Add(float32(0.9), float32(0.3), float32(1e9), uint64(1))
	f.Add(float32(0), float32(0), float32(-1), uint64(2))
	f.Add(float32(1), float32(1), float32(0.5), uint64(3))
	f.Add(float32(1e-40), float32(1e-42), float32(1e-41), uint64(4))
	f.Fuzz(func(t *testing.T, clean, epsilon, moved float32, seed uint64) {
		threat := Threat{"linf", float64(epsilon)}
		ball, err := threat.Ball()
		if err != nil || !(clean >= 0 && clean <= 1) || moved != moved {
			t.Skip()
		}
		x, c := []float32{moved}, []float32{clean}
		ball.Project(x, c)
		if err := threat.Verify(x, c, 1); err != nil {
			t.Fatalf("project %v around %v: %v", moved, clean, err)
		}
		ball.RandomStart(x, c, rand.NewPCG(seed, seed))
		if err := threat.Verify(x, c, 1); err != nil {
			t.Fatalf("random start around %v: %v", clean, err)
		}
		inside := x[0]
		if ball.Project(x, c); x[0] != inside {
			t.Fatalf("projecting %v, which is allowed, moved it to %v", inside, x[0])
		}
	})
}

func TestProjectReachesTheBall(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 100_000 {
		r, c := rng.Float32(), rng.Float32()
		x, clean := []float32{-1, 2}, []float32{c, c}
		Linf(r).Project(x, clean)
		lo, hi := max(0, float64(c)-float64(r)), min(1, float64(c)+float64(r))
		if math.Abs(float64(x[0])-lo) > 2e-7 || math.Abs(float64(x[1])-hi) > 2e-7 {
			t.Fatalf("bounds of %v by %v: %v, want %v and %v", c, r, x, lo, hi)
		}
	}
}

func TestCase44InputGradientEqualsFiniteDifferences(t *testing.T) {
	const pixels, classes = 12, 4
	m := newLinear(t, pixels, classes, 4, 3)
	x, labels := images(t, m, 4, 9)
	targets := make([]float32, 4*classes)
	for i := range targets {
		targets[i] = float32(i % classes)
	}
	for i := range 4 {
		Softmax(targets[i*classes:(i+1)*classes], slices.Clone(targets[i*classes:(i+1)*classes]), classes)
	}
	for name, c := range map[string]struct {
		loss  nn.Loss
		value func(row int, z []float32) float64
	}{
		"cross-entropy": {CrossEntropy(labels, classes), func(row int, z []float32) float64 { return Value(z, labels[row]) }},
		"divergence": {Divergence(targets, classes), func(row int, z []float32) float64 {
			sum := 0.0
			for c, p := range targets[row*classes : (row+1)*classes] {
				sum += float64(p) * (math.Log(float64(p)) + Value(z, uint8(c)))
			}
			return sum
		}},
	} {
		_, dx, err := m.Gradient(x, 4, c.loss)
		if err != nil {
			t.Fatal(err)
		}
		dx = slices.Clone(dx)
		const h = 1.0 / 64
		for i := range x {
			row, moved := i/pixels, slices.Clone(x)
			at := func(d float32) float64 {
				moved[i] = x[i] + d
				z, _ := m.Logits(moved, 4)
				return c.value(row, z[row*classes:(row+1)*classes])
			}
			if want := (at(h) - at(-h)) / (2 * h); math.Abs(want-float64(dx[i])) > 1e-4 {
				t.Errorf("%s: gradient of pixel %d is %v, finite difference %v", name, i, dx[i], want)
			}
		}
	}
}

func TestCase44FGSMEqualsOnePGDStep(t *testing.T) {
	threat := Threat{"linf", 0.2}
	m := newLinear(t, 25, 5, 6, 4)
	x, labels := images(t, m, 6, 8)
	fgsm := perturb(t, FGSM(threat), m, x, labels, 0)

	ball, err := threat.Ball()
	if err != nil {
		t.Fatal(err)
	}
	loop := Loop{Model: m, Ball: ball, Alpha: float32(threat.Epsilon)}
	step := slices.Clone(x)
	if err := loop.Ascend(step, x, 6, 1, CrossEntropy(labels, 5)); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(fgsm, step) {
		t.Error("FGSM and one step of the loop differ")
	}
	_, dx, err := m.Gradient(x, 6, CrossEntropy(labels, 5))
	if err != nil {
		t.Fatal(err)
	}
	for i, g := range dx { // and both are x + epsilon sign(gradient), clipped
		want := math.Min(1, math.Max(0, float64(x[i])+threat.Epsilon*math.Copysign(1, float64(g))))
		if math.Abs(want-float64(fgsm[i])) > 1e-6 {
			t.Fatalf("pixel %d: %v, want %v", i, fgsm[i], want)
		}
	}
}

// perceptron is a network with a hidden layer.
func perceptron(t *testing.T, batch int, seed uint64) Model {
	t.Helper()
	n, err := nn.New(nn.Description{
		Name: "perceptron", Input: nn.Shape{Height: 1, Width: 40, Channels: 1},
		Layers: []nn.Layer{{Dense: &nn.Dense{Units: 30, ReLU: true}}, {Dense: &nn.Dense{Units: 6}}},
	}, seed)
	if err != nil {
		t.Fatal(err)
	}
	m, err := graph.NewAttack(n, batch)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestCase45MoreStepsOrRestartsNeverRaiseAccuracy(t *testing.T) {
	for seed := range uint64(3) {
		for name, c := range map[string]struct {
			m       Model
			epsilon float64
		}{
			"linear":     {newLinear(t, 40, 6, 16, seed), 0.04},
			"perceptron": {perceptron(t, 16, seed), 0.08},
		} {
			x, labels := images(t, c.m, 100, seed)
			harder := func(specs ...string) {
				t.Helper()
				var weak []bool
				for i, spec := range specs {
					a, err := Parse(spec, Threat{"linf", c.epsilon})
					if err != nil {
						t.Fatal(err)
					}
					now := broken(t, c.m, perturb(t, a, c.m, x, labels, seed), labels)
					if n := count1(now); n == 0 || n == len(now) {
						t.Fatalf("%s, %s: %d of %d broken: the test shows nothing", name, spec, n, len(now))
					}
					for image, was := range weak {
						if was && !now[image] {
							t.Errorf("%s: image %d is broken by %s, not by %s", name, image, specs[i-1], spec)
						}
					}
					weak = now
				}
			}
			harder("pgd-3", "pgd-4", "pgd-5", "pgd-7", "pgd-10", "pgd-20", "pgd-50", "pgd-100")
			harder("pgd-4", "pgd-4x2", "pgd-4x3", "pgd-4x5")
			harder("pgd-4x2", "pgd-10x2", "pgd-10x3", "pgd-20x3")
		}
	}
}

// recorder keeps what it is asked about.
type recorder struct {
	Model
	asked [][]float32
}

func (r *recorder) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	r.asked = append(r.asked, slices.Clone(x[:n*r.Network().Input.Size()]))
	return r.Model.Gradient(x, n, loss)
}

// The path of pgd-20 begins with that of pgd-10, which is why it breaks no
// fewer images.
func TestCase45MoreStepsGoOnAlongThePath(t *testing.T) {
	m := perceptron(t, 1, 5)
	x, labels := images(t, m, 1, 5)
	path := func(spec string) [][]float32 {
		a, err := Parse(spec, Threat{"linf", 0.001}) // too little to break the image, which would end the path
		if err != nil {
			t.Fatal(err)
		}
		r := &recorder{Model: m}
		perturb(t, a, r, x, labels, 7)
		return r.asked
	}
	short, long := path("pgd-10"), path("pgd-20")
	if len(short) != 12 || len(long) != 22 { // the clean image, the start, the steps
		t.Fatalf("paths of %d and %d images: want 12 and 22", len(short), len(long))
	}
	for i := range short {
		if !slices.Equal(short[i], long[i]) {
			t.Fatalf("the paths part at %d", i)
		}
	}
}

// TestLinearOracle: two linear classes are robust on an image exactly if the
// margin exceeds what the attacker can take from it pixel by pixel.
func TestLinearOracle(t *testing.T) {
	const n = 300
	m := newLinear(t, 50, 2, 32, 21)
	x, labels := images(t, m, n, 22)
	w, b := m.network.Weights(0)
	for _, epsilon := range []float64{0, 0.02, 0.05, 0.1, 0.3} {
		threat := Threat{"linf", epsilon}
		want := make([]bool, n)
		for i, y := range labels {
			other := 1 - y
			margin := float64(b[y] - b[other])
			for p := range 50 {
				v, dw := float64(x[i*50+p]), float64(w[p*2+int(y)]-w[p*2+int(other)])
				room := v // how far the pixel can go towards the other class
				if dw < 0 {
					room = 1 - v
				}
				margin += dw*v - math.Abs(dw)*min(epsilon, room)
			}
			if math.Abs(margin) < 1e-5 {
				t.Fatalf("image %d is too close to call: choose another seed", i)
			}
			want[i] = margin < 0
		}
		t.Logf("epsilon %v: %d of %d can be broken", epsilon, count1(want), n)
		pgd, err := Parse("pgd-20", threat)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range []Attack{FGSM(threat), pgd} {
			if got := broken(t, m, perturb(t, a, m, x, labels, 1), labels); !slices.Equal(got, want) {
				t.Errorf("epsilon %v: %s breaks %d images, the closed form %d", epsilon, a.Name(), count1(got), count1(want))
			}
		}
		noise := broken(t, m, perturb(t, Noise(threat, 100), m, x, labels, 1), labels)
		for i := range noise {
			if noise[i] && !want[i] {
				t.Errorf("epsilon %v: noise breaks image %d, which cannot be broken", epsilon, i)
			}
		}
		if epsilon == 0.05 && count1(noise) >= count1(want) {
			t.Errorf("noise breaks %d images, gradients %d: noise must be weaker", count1(noise), count1(want))
		}
	}
}

func TestSameResultForEveryBatch(t *testing.T) {
	threat := Threat{"linf", 0.1}
	for _, a := range []Attack{FGSM(threat), PGD(threat, PGDConfig{Steps: 3, Restarts: 2}), Noise(threat, 4)} {
		var first []float32
		for _, batch := range []int{1, 7, 64} {
			m := newLinear(t, 20, 4, batch, 2)
			x, labels := images(t, m, 33, 6)
			adv := perturb(t, a, m, x, labels, 77)
			if first == nil {
				first = adv
			} else if !slices.Equal(first, adv) {
				t.Errorf("%s: batch %d gives another result", a.Name(), batch)
			}
		}
		m := newLinear(t, 20, 4, 16, 2)
		x, labels := images(t, m, 33, 6)
		if a.Name() != "fgsm" && slices.Equal(first, perturb(t, a, m, x, labels, 78)) {
			t.Errorf("%s: another seed gives the same result", a.Name())
		}
	}
}

func TestNaNGradientIsAnErrorWithStep(t *testing.T) {
	m := newLinear(t, 10, 3, 4, 2)
	x, labels := images(t, m, 4, 6)
	m.poison = 3
	_, err := PGD(Threat{"linf", 1e-6}, PGDConfig{Steps: 5}).Perturb(context.Background(), m, x, labels, 1)
	if err == nil || !strings.Contains(err.Error(), "step 3") || !strings.Contains(err.Error(), "gradient") {
		t.Errorf("error %v: must name the gradient and step 3", err)
	}
	m = newLinear(t, 10, 3, 4, 2)
	m.network.Flat()[5] = float32(math.Inf(1))
	for _, name := range Names() {
		a, _ := Parse(name, Threat{"linf", 0.1})
		if _, err := a.Perturb(context.Background(), m, x, labels, 1); err == nil {
			t.Errorf("%s: no error for infinite weights", name)
		}
	}
}

func TestFinite(t *testing.T) {
	for _, v := range []float32{0, 1, -1, math.MaxFloat32, -math.MaxFloat32, math.SmallestNonzeroFloat32} {
		if !finite([]float32{1, v, 2}) {
			t.Errorf("%v is finite", v)
		}
	}
	for _, v := range []float64{math.NaN(), math.Inf(1), math.Inf(-1)} {
		if finite([]float32{1, float32(v), 2}) {
			t.Errorf("%v is not finite", v)
		}
	}
}

func TestBadInputIsRefused(t *testing.T) {
	m := newLinear(t, 10, 3, 4, 2)
	x, labels := images(t, m, 2, 6)
	with := func(i int, v float32) []float32 { c := slices.Clone(x); c[i] = v; return c }
	for name, c := range map[string]struct {
		threat Threat
		x      []float32
		labels []uint8
		want   string
	}{
		"label":            {Threat{"linf", 0.1}, x, []uint8{0, 3}, "label 3 of image 1"},
		"size":             {Threat{"linf", 0.1}, x[1:], labels, "19 pixels for 2 labels"},
		"above the box":    {Threat{"linf", 0.1}, with(12, 1.1), labels, "pixel 2 of image 1"},
		"NaN pixel":        {Threat{"linf", 0.1}, with(0, float32(math.NaN())), labels, "pixel 0 of image 0"},
		"negative epsilon": {Threat{"linf", -0.1}, x, labels, "threat.epsilon"},
		"NaN epsilon":      {Threat{"linf", math.NaN()}, x, labels, "threat.epsilon"},
		"infinite epsilon": {Threat{"linf", math.Inf(1)}, x, labels, "threat.epsilon"},
		"norm":             {Threat{"l3", 0.1}, x, labels, `unknown norm "l3": have l2, linf`},
	} {
		for _, a := range []Attack{FGSM(c.threat), PGD(c.threat, PGDConfig{Steps: 2}), Noise(c.threat, 2)} {
			if _, err := a.Perturb(context.Background(), m, c.x, c.labels, 1); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s, %s: error %v, want %q", name, a.Name(), err, c.want)
			}
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := FGSM(Threat{"linf", 0.1}).Perturb(ctx, m, x, labels, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: error %v", err)
	}
}

func TestParse(t *testing.T) {
	threat := Threat{"linf", 0.3}
	for _, name := range Names() {
		a, err := Parse(name, threat)
		if err != nil || a.Name() != name {
			t.Errorf("%s: %v, %v", name, a, err)
		}
	}
	var missing *unknown.Error
	if _, err := Parse("fgms", threat); !errors.As(err, &missing) || !strings.Contains(err.Error(), `did you mean "fgsm"`) {
		t.Errorf("fgms: %v", err)
	}
	for _, spec := range []string{"", "pgd", "pgd-", "pgd-0", "pgd--1", "pgd-1x", "pgd-1x0", "pgd-007", "pgd-1e3", "pgd-20x5x5", "noise-", "noise-0", "pgd-99999999999999999999", "pgd-10001", "FGSM", "fgsm-1"} {
		if a, err := Parse(spec, threat); err == nil {
			t.Errorf("%q: accepted as %s", spec, a.Name())
		}
	}
	if _, err := Parse("fgsm", Threat{"linf", math.NaN()}); err == nil {
		t.Error("NaN epsilon accepted")
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range append(Names(), "", "pgd-", "pgd-1x", "noise-x", "pgd-9999999999999999999") {
		f.Add(s, 0.3)
	}
	f.Fuzz(func(t *testing.T, spec string, epsilon float64) {
		a, err := Parse(spec, Threat{"linf", epsilon})
		if err != nil {
			return
		}
		again, err := Parse(a.Name(), Threat{"linf", epsilon})
		if err != nil || again.Name() != a.Name() {
			t.Fatalf("%q is called %q, which parses to %v, %v", spec, a.Name(), again, err)
		}
	})
}

func TestStepHardlyAllocates(t *testing.T) {
	m := newLinear(t, 50, 3, 64, 2)
	x, labels := images(t, m, 64, 6)
	adv := slices.Clone(x)
	loop := Loop{Model: m, Ball: Linf(0.3), Alpha: 0.1}
	loss := CrossEntropy(labels, 3)
	perWorker := float64(4 + 3*runtime.GOMAXPROCS(0)) // goroutines, not memory for images
	if n := testing.AllocsPerRun(20, func() { loop.Ascend(adv, x, 64, 1, loss) }); n > perWorker {
		t.Errorf("%v allocations a step", n)
	}
}

func TestNoisyLeavesTheBallButNotTheBox(t *testing.T) {
	clean := make([]float32, 2000)
	for i := range clean {
		clean[i] = 0.5
	}
	x := make([]float32, len(clean))
	Noisy(0.2).RandomStart(x, clean, rand.NewPCG(1, 2))
	low, high, mean := slices.Min(x), slices.Max(x), float32(0)
	for _, v := range x {
		mean += v / float32(len(x))
	}
	if low < 0.1 || low > 0.11 || high > 0.9 || high < 0.89 || mean < 0.48 || mean > 0.52 {
		t.Errorf("noise from %v to %v, mean %v: want U(0.1, 0.9)", low, high, mean)
	}
	Noisy(0.4).RandomStart(x, clean, rand.NewPCG(1, 2))
	if slices.Min(x) < 0 || slices.Max(x) > 1 {
		t.Error("noise outside of the box")
	}
}

// BenchmarkStep is the cost of moving a batch of 128 MNIST images, without
// the gradient.
func BenchmarkStep(b *testing.B) {
	const n = 128 * 784
	x, clean, gradient := make([]float32, n), make([]float32, n), make([]float32, n)
	rng := rand.NewPCG(1, 2)
	addNoise(gradient, clean, 1, rng)
	ball := Linf(0.3)
	ball.RandomStart(x, clean, rng)
	b.Run("step", func(b *testing.B) {
		for b.Loop() {
			finite(gradient)
			ball.Step(x, gradient, 0.1)
			ball.Project(x, clean)
		}
	})
	b.Run("start", func(b *testing.B) {
		for b.Loop() {
			ball.RandomStart(x, clean, rng)
		}
	})
}
