package detect

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/temper-ml/temper/models/nn"
)

// Attacks stand out from clean and from benignly changed traffic; those raise
// drift and no attack; an attacker who knows the detector does not fare worse
// than one who does not.
func TestEvaluate(t *testing.T) {
	d, served := calibrated(t)
	set := makeImages(200, 11)
	labels := make([]uint8, set.Len())
	for i, y := range set.labels {
		labels[i] = uint8(y)
	}
	done := 0
	figures, err := d.Evaluate(t.Context(), gradients(t, served), gradients(t, d.Guard), set.pixels, labels, Evaluation{
		Attacks: []string{"fgsm", "pgd-10"}, Epsilons: []float64{0.3}, Adaptive: 10, Seed: 1, Requests: 200_000,
		Progress: func(n, total int) { done = n*1000 + total },
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := 1 + len(TestShifts) + 3; len(figures) != want || done != want*1000+want {
		t.Fatalf("%d figures, progress %d", len(figures), done)
	}
	by := map[string]Figure{}
	for _, f := range figures {
		t.Logf("%+v %+v", f, f.Simulated)
		by[f.Traffic] = f
		if f.Epsilon == 0 && (f.Flagged > 0.03 || f.Simulated.FalseAlarms > 0 || f.Simulated.Requests != 200_000) {
			t.Errorf("%s: %v flagged as hostile, simulated %+v", f.Traffic, f.Flagged, f.Simulated)
		}
	}
	if c := by["clean"]; math.Abs(c.AUROC-0.5) > 1e-9 || c.Fooled != 0 || c.Simulated.DriftAlarms > 0 || c.Simulated.Drift != nil {
		t.Errorf("clean: %+v %+v", c, c.Simulated)
	}
	for _, traffic := range []string{"noise 0.25", "brightness 0.2"} {
		if s := by[traffic].Simulated; s.DriftAlarms == 0 || s.Drift.Median > 100 {
			t.Errorf("%s: no drift: %+v %+v", traffic, s, s.Drift)
		}
	}
	if f := by["fgsm"]; f.AUROC < 0.99 || f.Fooled < 0.3 || f.Simulated.Delays[100].Median > 10 || f.Simulated.Delays[10].Median <= f.Simulated.Delays[30].Median {
		t.Errorf("fgsm: %+v %+v", f, f.Simulated)
	}
	if a, p := by["adaptive"], by["pgd-10"]; a.AUROC > p.AUROC+0.01 {
		t.Errorf("knowing the detector helps nothing: AUROC %v, without %v", a.AUROC, p.AUROC)
	}
}

// Benign drift raises drift, never an attack; an attack raises an attack.
func TestDriftIsToldFromAttack(t *testing.T) {
	d, served := calibrated(t)
	for _, shift := range []Shift{{"noise", 0.25}, {"rotation", 40}, {"brightness", 0.2}} {
		attack, err := d.Alarm(DefaultAlpha)
		if err != nil {
			t.Fatal(err)
		}
		drift, err := d.DriftAlarm(DefaultAlpha)
		if err != nil {
			t.Fatal(err)
		}
		set := makeImages(2000, 12)
		raised := 0
		for i, s := range score(t, d, served, &images{shift.Apply(set.pixels, set.Len(), testShape, 3), set.labels}) {
			if attack.Observe(s.Flagged) {
				t.Errorf("%s: an attack at request %d", shift, i+1)
				break
			}
			if drift.Observe(s.Shifted) && raised == 0 {
				raised = i + 1
			}
		}
		if raised == 0 {
			t.Errorf("%s: no drift", shift)
		}
	}
	drift, err := d.DriftAlarm(DefaultAlpha)
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range score(t, d, served, makeImages(5000, 13)) {
		if drift.Observe(s.Shifted) {
			t.Fatalf("drift at clean request %d", i+1)
		}
	}
}

// The area under the curve by its definition: the share of pairs in order.
func TestSeparation(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		usual, hostile := make([]float64, 1+rng.IntN(30)), make([]float64, 1+rng.IntN(30))
		for i := range usual {
			usual[i] = float64(rng.IntN(10))
		}
		for i := range hostile {
			hostile[i] = float64(rng.IntN(12))
		}
		slices.Sort(usual)
		slices.Sort(hostile)
		want := 0.0
		for _, u := range usual {
			for _, h := range hostile {
				if h > u {
					want++
				} else if h == u {
					want += 0.5
				}
			}
		}
		want /= float64(len(usual) * len(hostile))
		if got, _ := separation(usual, hostile); math.Abs(got-want) > 1e-12 {
			t.Fatalf("AUROC %v, want %v", got, want)
		}
	}
	if _, five := separation([]float64{1, 2, 3, 4}, []float64{4, 5}); five != 0.5 {
		t.Errorf("at 5%%: %v", five)
	}
}

// The estimate of epsilon is right where pixels are black and white, and none
// where they are not, or were only blurred by noise.
func TestEpsilon(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	make := func(change func(v float32) float32) (all [][]float32) {
		for range 20 {
			x := []float32{}
			for range 784 {
				v := float32(0)
				if p := rng.Float64(); p < 0.1 {
					v = rng.Float32()
				} else if p < 0.2 {
					v = 1
				}
				x = append(x, min(max(change(v), 0), 1))
			}
			all = append(all, x)
		}
		return all
	}
	for _, epsilon := range []float32{0.05, 0.1, 0.15, 0.3} {
		got := Epsilon(make(func(v float32) float32 { return v + epsilon*float32(2*rng.IntN(2)-1) }))
		if math.Abs(got-float64(epsilon)) > 0.005 {
			t.Errorf("epsilon %v: estimated %v", epsilon, got)
		}
	}
	for name, change := range map[string]func(float32) float32{
		"clean": func(v float32) float32 { return v },
		"noise": func(v float32) float32 { return v + float32(rng.NormFloat64())*0.2 },
		"grey":  func(float32) float32 { return rng.Float32() },
	} {
		if got := Epsilon(make(change)); got != 0 {
			t.Errorf("%s: estimated %v", name, got)
		}
	}
	if got := Epsilon(nil); got != 0 {
		t.Errorf("no images: %v", got)
	}
}

// A rotation by a quarter turn moves each pixel to where it belongs, and by
// nothing leaves the image.
func TestShift(t *testing.T) {
	s := nn.Shape{Height: 5, Width: 5, Channels: 2}
	x, got := make([]float32, s.Size()), make([]float32, s.Size())
	for i := range x {
		x[i] = float32(i) / 50
	}
	rotate(got, x, s, 0)
	if !slices.Equal(got, x) {
		t.Error("no rotation changes the image")
	}
	rotate(got, x, s, 90)
	for y := range 5 {
		for xx := range 5 {
			if a, b := got[(y*5+xx)*2], x[((4-xx)*5+y)*2]; math.Abs(float64(a-b)) > 1e-5 {
				if c := x[(xx*5+4-y)*2]; math.Abs(float64(a-c)) > 1e-5 {
					t.Fatalf("row %d, column %d: %v", y, xx, a)
				}
			}
		}
	}
	for _, shift := range append(slices.Clone(CalibrationShifts), TestShifts...) {
		a, b := shift.Apply(x, 1, s, 1), shift.Apply(x, 1, s, 1)
		if !slices.Equal(a, b) || slices.Equal(a, x) {
			t.Errorf("%s: not the same twice, or no change", shift)
		}
	}
}
