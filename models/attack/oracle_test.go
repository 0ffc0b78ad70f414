package attack

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
)

// distance is the closed form for a linear model: how far in the maximum norm
// the nearest image is that class other takes from class y, infinite where the
// box has none. Pixel i gives |dw_i| min(t, room_i) of the margin at distance t.
func (m *linear) distance(x []float32, y, other uint8) float64 {
	w, b := m.network.Weights(0)
	classes := m.network.Classes()
	margin := float64(b[y]) - float64(b[other])
	type pixel struct{ weight, room float64 }
	var all []pixel
	for p, v := range x {
		dw := float64(w[p*classes+int(y)]) - float64(w[p*classes+int(other)])
		margin += dw * float64(v)
		room := float64(v)
		if dw < 0 {
			room = 1 - room
		}
		all = append(all, pixel{math.Abs(dw), room})
	}
	slices.SortFunc(all, func(a, b pixel) int { return int(math.Copysign(1, a.room-b.room)) })
	slope := 0.0
	for _, p := range all {
		slope += p.weight
	}
	before := 0.0
	for _, p := range all { // piece by piece, up to the room of the next pixel
		if gain := slope * (p.room - before); gain >= margin && slope > 0 {
			return before + margin/slope
		} else {
			margin -= gain
		}
		before = p.room
		slope -= p.weight
	}
	return math.Inf(1)
}

func (m *linear) nearest(x []float32, y uint8) float64 {
	least := math.Inf(1)
	for c := range m.network.Classes() {
		if c != int(y) {
			least = min(least, m.distance(x, y, uint8(c)))
		}
	}
	return least
}

// Every attack with gradients breaks exactly the images that the closed form
// says can be broken; Square and noise break no other.
func TestLinearOracleOfEveryAttack(t *testing.T) {
	const n, pixels = 120, 48
	m := newLinear(t, pixels, 2, 32, 21)
	x, labels := images(t, m, n, 22)
	for _, epsilon := range []float64{0.1, 0.2, 0.3} {
		threat := Threat{"linf", epsilon}
		want := make([]bool, n)
		for i, y := range labels {
			d := m.nearest(x[i*pixels:(i+1)*pixels], y)
			if math.Abs(d-epsilon) < 1e-5 {
				t.Fatalf("image %d is too close to call: choose another seed", i)
			}
			want[i] = d < epsilon
		}
		if k := count1(want); k == 0 || k == n {
			t.Fatalf("epsilon %v: %d of %d can be broken: the test shows nothing", epsilon, k, n)
		}
		for _, spec := range []string{"fgsm", "pgd-20", "apgd-ce", "apgd-ce-20", "fab-t"} {
			a, err := Parse(spec, threat)
			if err != nil {
				t.Fatal(err)
			}
			if got := broken(t, m, perturb(t, a, m, x, labels, 1), labels); !slices.Equal(got, want) {
				t.Errorf("epsilon %v: %s breaks %d images, the closed form %d", epsilon, spec, count1(got), count1(want))
			}
		}
		for _, spec := range []string{"noise", "square-500"} {
			a, _ := Parse(spec, threat)
			for i, b := range broken(t, m, perturb(t, a, m, x, labels, 1), labels) {
				if b && !want[i] {
					t.Errorf("epsilon %v: %s breaks image %d, which cannot be broken", epsilon, spec, i)
				}
			}
		}
	}
}

// With several classes the targeted attacks must find every class's boundary,
// and the untargeted ones none that is not there.
func TestLinearOracleOfTargetedAttacks(t *testing.T) {
	const n, pixels, classes = 40, 40, 6
	m := newLinear(t, pixels, classes, 16, 5)
	x, labels := images(t, m, n, 6)
	threat := Threat{"linf", 0.03}
	want := make([]bool, n)
	for i, y := range labels {
		d := m.nearest(x[i*pixels:(i+1)*pixels], y)
		want[i] = d < threat.Epsilon
	}
	t.Logf("%d of %d can be broken", count1(want), n)
	for _, spec := range []string{"apgd-t", "fab-t"} {
		a, _ := Parse(spec, threat)
		got := broken(t, m, perturb(t, a, m, x, labels, 1), labels)
		for i := range got {
			if got[i] != want[i] {
				t.Errorf("%s: image %d broken %v, the closed form %v", spec, i, got[i], want[i])
			}
		}
	}
	for _, spec := range []string{"apgd-ce", "apgd-dlr", "square-300"} {
		a, _ := Parse(spec, threat)
		for i, b := range broken(t, m, perturb(t, a, m, x, labels, 1), labels) {
			if b && !want[i] {
				t.Errorf("%s breaks image %d, which cannot be broken", spec, i)
			}
		}
	}
}

// In L2 the closed form has no box, so the images are grey and the epsilon
// small: an image is broken iff its margin is below epsilon |dw|.
func TestLinearOracleInL2(t *testing.T) {
	const n, pixels = 100, 36
	m := newLinear(t, pixels, 2, 16, 8)
	rng := rand.New(rand.NewPCG(1, 1))
	x := make([]float32, n*pixels)
	for i := range x {
		x[i] = 0.4 + 0.2*rng.Float32()
	}
	w, b := m.network.Weights(0)
	b[0], b[1] = 0, 0
	for p := range pixels { // grey is on the boundary
		b[1] += (w[2*p] - w[2*p+1]) / 2
	}
	labels, want := make([]uint8, n), make([]bool, n)
	threat := Threat{"l2", 0.02}
	for i := range n {
		margin, norm := float64(b[0]-b[1]), 0.0
		for p, v := range x[i*pixels : (i+1)*pixels] {
			dw := float64(w[2*p]) - float64(w[2*p+1])
			margin += dw * float64(v)
			norm += dw * dw
		}
		if margin < 0 {
			labels[i] = 1
		}
		d := math.Abs(margin) / math.Sqrt(norm)
		if math.Abs(d-threat.Epsilon) < 1e-5 {
			t.Fatalf("image %d is too close to call", i)
		}
		want[i] = d < threat.Epsilon
	}
	if k := count1(want); k == 0 || k == n {
		t.Fatalf("%d of %d can be broken: the test shows nothing", k, n)
	}
	for _, spec := range []string{"fgsm", "pgd-200", "apgd-ce"} {
		a, _ := Parse(spec, threat)
		if got := broken(t, m, perturb(t, a, m, x, labels, 1), labels); !slices.Equal(got, want) {
			t.Errorf("%s breaks %d images, the closed form %d", spec, count1(got), count1(want))
		}
	}
	if _, err := FAB(threat, 10).Perturb(context.Background(), m, x, labels, 1); err == nil {
		t.Error("FAB in L2 is accepted")
	}
}

// FAB's distance is that of the closed form, whatever the epsilon.
func TestFABFindsTheNearestImage(t *testing.T) {
	const n, pixels, classes = 40, 30, 5
	m := newLinear(t, pixels, classes, 8, 3)
	x, labels := images(t, m, n, 4)
	walks := map[*fabWalk]bool{}
	found := map[int]float64{}
	threat := Threat{"linf", 0} // within which nothing is found, so that the search goes on
	_, err := walkAll(context.Background(), m, threat, x, labels, true, func() walker {
		f := newFABWalk(fab{threat, fabSteps}, pixels)
		walks[f] = true
		return &recorded{f, found}
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, y := range labels {
		want := m.nearest(x[i*pixels:(i+1)*pixels], y)
		if got, ok := found[i]; !ok || got < want-1e-6 || got > 1.01*want+1e-6 {
			t.Errorf("image %d: FAB found distance %v (%v), the closed form is %v", i, got, ok, want)
		}
	}
}

// recorded tells what FAB has found so far.
type recorded struct {
	*fabWalk
	found map[int]float64
}

func (r *recorded) visit(w *walk, logits, gradient []float32) bool {
	more := r.fabWalk.visit(w, logits, gradient)
	r.found[w.image] = r.nearest
	return more
}

// The projection reaches the hyperplane, stays in the box, and no way that does
// both is shorter.
func TestFABProjectionAgainstBruteForce(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 3))
	for trial := range 3000 {
		size := 1 + rng.IntN(8)
		p, w := make([]float32, size), make([]float32, size)
		for i := range p {
			p[i] = float32(min(1, max(0, 1.4*rng.Float64()-0.2)))
			if rng.IntN(4) > 0 {
				w[i] = float32(rng.NormFloat64())
			}
		}
		b := dot(w, p) + rng.NormFloat64()
		j := newProjection(size)
		most := j.project(p, w, b)

		// reach is how near the hyperplane the box within distance t comes.
		gap := b - dot(w, p)
		reach := func(t float64) float64 {
			sum := 0.0
			for i, v := range w {
				room := float64(1 - p[i])
				if float64(v)*gap < 0 {
					room = float64(p[i])
				}
				sum += math.Abs(float64(v)) * min(t, room)
			}
			return sum
		}
		at := 0.0
		for i, d := range j.move {
			v := float64(p[i]) + float64(d)
			if v < -1e-6 || v > 1+1e-6 {
				t.Fatalf("trial %d: pixel %d leaves the box: %v", trial, i, v)
			}
			if w[i] == 0 && d != 0 {
				t.Fatalf("trial %d: pixel %d moves for nothing", trial, i)
			}
			at += float64(w[i]) * v
		}
		if reach(1) <= math.Abs(gap) { // the box does not reach it: as near as it comes
			if want := dot(w, p) + math.Copysign(reach(1), gap); math.Abs(at-want) > 1e-4 {
				t.Fatalf("trial %d: stops at %v, the box reaches to %v", trial, at, want)
			}
			continue
		}
		if math.Abs(at-b) > 1e-4 {
			t.Fatalf("trial %d: ends at %v, the hyperplane is at %v", trial, at, b)
		}
		lo, hi := 0.0, 1.0 // the least distance, by halving
		for range 60 {
			if mid := (lo + hi) / 2; reach(mid) < math.Abs(gap) {
				lo = mid
			} else {
				hi = mid
			}
		}
		if math.Abs(most-hi) > 1e-4 {
			t.Fatalf("trial %d: moves by %v, %v is enough", trial, most, hi)
		}
	}
}

// The golden list of Croce and Hein 2020 for 100 steps.
func TestCheckpoints(t *testing.T) {
	for steps, want := range map[int][]int{
		100: {22, 41, 57, 70, 80, 87, 93, 99},
		20:  {4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20},
	} {
		var got []int
		for c := newCheckpoints(steps); c.at <= steps; c.advance() {
			got = append(got, c.at)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%d steps: %v, want %v", steps, got, want)
		}
	}
}

func TestCase44GradientsOfTheRatioLosses(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	for range 200 {
		z := make([]float32, 6)
		for i := range z {
			z[i] = float32(i) + 0.5*rng.Float32() // no ties, so that the ranks stay
		}
		rng.Shuffle(len(z), func(i, j int) { z[i], z[j] = z[j], z[i] })
		label := uint8(rng.IntN(6))
		target := (label + 1 + uint8(rng.IntN(5))) % 6
		for name, f := range map[string]func(z, g []float32) float64{
			"dlr":          func(z, g []float32) float64 { return dlr(z, g, label) },
			"targeted dlr": func(z, g []float32) float64 { return targetedDLR(z, g, label, target) },
		} {
			grad := make([]float32, 6)
			value := f(z, grad)
			if scaled := f(scale(z, 1000), nil); math.Abs(scaled-value) > 1e-5 {
				t.Fatalf("%s: %v, and %v for logits x 1000", name, value, scaled)
			}
			const h = 1.0 / 256
			for i := range z {
				moved := slices.Clone(z)
				moved[i] += h
				up := f(moved, nil)
				moved[i] -= 2 * h
				if want := (up - f(moved, nil)) / (2 * h); math.Abs(want-float64(grad[i])) > 1e-3 {
					t.Fatalf("%s of %v, label %d, target %d: gradient %d is %v, finite difference %v", name, z, label, target, i, grad[i], want)
				}
			}
		}
	}
	if got, want := dlr([]float32{1, 3, 2, 0}, nil, 1), -(3.-2)/(3-1); math.Abs(got-want) > 1e-9 {
		t.Errorf("dlr %v, want %v", got, want)
	}
	if got, want := targetedDLR([]float32{1, 3, 2, 0}, nil, 1, 0), -(3.-1)/(3-0.5); math.Abs(got-want) > 1e-9 {
		t.Errorf("targeted dlr %v, want %v", got, want)
	}
}

func scale(z []float32, by float32) []float32 {
	z = slices.Clone(z)
	for i := range z {
		z[i] *= by
	}
	return z
}

// More queries go on along the path, and more starts come after the first.
func TestCase45MoreQueriesNeverRaiseAccuracy(t *testing.T) {
	m := perceptron(t, 16, 2)
	x, labels := images(t, m, 60, 2)
	for _, specs := range [][]string{{"square-20", "square-100", "square-100x2", "square-300x2"}, {"apgd-ce-10", "apgd-ce-10x2", "apgd-ce-10x4"}, {"apgd-dlr-7", "apgd-dlr-7x3"}} {
		var weak []bool
		for i, spec := range specs {
			a, err := Parse(spec, Threat{"linf", 0.05})
			if err != nil {
				t.Fatal(err)
			}
			now := broken(t, m, perturb(t, a, m, x, labels, 3), labels)
			if n := count1(now); n == 0 || n == len(now) {
				t.Fatalf("%s: %d of %d broken: the test shows nothing", spec, n, len(now))
			}
			for image, was := range weak {
				if was && !now[image] {
					t.Errorf("image %d is broken by %s, not by %s", image, specs[i-1], spec)
				}
			}
			weak = now
		}
	}
}

func TestCase43InL2(t *testing.T) {
	for _, epsilon := range []float64{0, 1e-9, 1e-3, 0.5, 2, 100} {
		threat := Threat{"l2", epsilon}
		m := newImageLinear(t, 7, 5, 2, 4, 7)
		x, labels := images(t, m, 11, 11)
		for _, spec := range []string{"fgsm", "pgd-10x2", "noise-20", "apgd-ce-20", "apgd-dlr-20", "apgd-t-20", "square-200x2"} {
			a, err := Parse(spec, threat)
			if err != nil {
				t.Fatal(err)
			}
			size := m.network.Input.Size()
			adv := perturb(t, a, m, x, labels, 5)
			for i := range labels {
				sum := 0.0
				for p := i * size; p < (i+1)*size; p++ {
					d := float64(adv[p] - x[p])
					sum += d * d
					if !(adv[p] >= 0 && adv[p] <= 1) {
						t.Fatalf("%s, epsilon %v: pixel %v became %v", spec, epsilon, x[p], adv[p])
					}
				}
				if math.Sqrt(sum) > float64(float32(epsilon)) {
					t.Fatalf("%s, epsilon %v: image %d moved by %v", spec, epsilon, i, math.Sqrt(sum))
				}
			}
			if moved := !slices.Equal(adv, x); moved != (epsilon > 0) && epsilon != 1e-9 { // 1e-9 is below float32's resolution for most pixels
				t.Errorf("%s, epsilon %v: moved %v", spec, epsilon, moved)
			}
		}
	}
}

// newImageLinear is newLinear over images of colour.
func newImageLinear(t testing.TB, height, width, channels, classes int, seed uint64) *linear {
	m := newLinear(t, height*width*channels, classes, 8, seed)
	n, err := nn.New(nn.Description{
		Name: "linear", Input: nn.Shape{Height: height, Width: width, Channels: channels},
		Layers: []nn.Layer{{Dense: &nn.Dense{Units: classes}}},
	}, seed)
	if err != nil {
		t.Fatal(err)
	}
	m.network = n
	return m
}

// Square's windows are squares, of every channel one sign, and of Square's
// schedule.
func TestSquareWindows(t *testing.T) {
	s := squareWalk{shape: nn.Shape{Height: 28, Width: 28, Channels: 1}}
	for query, want := range map[int]int{0: 25, 10: 25, 11: 18, 51: 13, 201: 9, 501: 6, 1001: 4, 2001: 3, 4001: 2, 6001: 2, 8001: 1, 100000: 1} {
		s.query = query
		if got := s.side(); got != want {
			t.Errorf("query %d: side %d, want %d", query, got, want)
		}
	}
	b := bump(6)
	sum, up := 0.0, float32(0)
	for i, v := range b {
		sum += float64(v) * float64(v)
		if i < 18 {
			up += v
		} else {
			up -= v
		}
	}
	if math.Abs(sum-1) > 1e-5 || up < 1 {
		t.Errorf("bump of squared length %v, halves %v", sum, up)
	}
}

// What becomes of an image depends on the seed and itself: not on the batch,
// the order, or which other images are attacked; with the real arithmetic.
func TestEachImageByItself(t *testing.T) {
	conv, err := nn.New(nn.Description{
		Name: "conv", Input: nn.Shape{Height: 9, Width: 9, Channels: 2},
		Layers: []nn.Layer{{Conv: &nn.Conv{Filters: 5, Kernel: 3, Stride: 2, Padding: 1, ReLU: true}}, {Dense: &nn.Dense{Units: 6}}},
	}, 3)
	if err != nil {
		t.Fatal(err)
	}
	for _, norm := range Norms() {
		for _, spec := range []string{"pgd-4x2", "noise-5", "apgd-ce-12x2", "apgd-dlr-12", "apgd-t-12", "fab-t-9", "square-60x2"} {
			a, err := Parse(spec, Threat{norm, 0.1})
			if err != nil {
				t.Fatal(err)
			}
			if norm == "l2" && spec == "fab-t-9" {
				continue
			}
			var first []float32
			for _, batch := range []int{1, 7, 64} {
				m, err := graph.NewAttack(conv, batch)
				if err != nil {
					t.Fatal(err)
				}
				size := conv.Input.Size()
				x, labels := images(t, m, 33, 6)
				adv := perturb(t, a, m, x, labels, 77)
				if first == nil {
					first = adv
				} else if !slices.Equal(first, adv) {
					t.Errorf("%s, %s: batch %d gives another result", norm, spec, batch)
				}
				if !slices.Equal(perturb(t, a, struct{ Model }{m}, x, labels, 77), first) {
					t.Errorf("%s, %s: a model without parts, asked for whole images, gives another result", norm, spec)
				}
				var some []float32 // every third, from the last
				var whose []uint8
				var want []float32
				for i := 32; i >= 0; i -= 3 {
					some, whose = append(some, x[i*size:(i+1)*size]...), append(whose, labels[i])
					want = append(want, first[i*size:(i+1)*size]...)
				}
				if !slices.Equal(perturb(t, a, m, some, whose, 77), want) {
					t.Errorf("%s, %s: some of the images alone give another result", norm, spec)
				}
			}
		}
	}
}

// Memory is taken when an attack starts, not as it goes on.
func TestWalksHardlyAllocate(t *testing.T) {
	m := newLinear(t, 40, 4, 8, 2)
	x, labels := images(t, m, 8, 6)
	for _, spec := range []string{"pgd-%d", "apgd-ce-%d", "apgd-t-%d", "fab-t-%d", "square-%d"} {
		allocations := func(steps int) float64 {
			a, err := Parse(fmt.Sprintf(spec, steps), Threat{"linf", 1e-6}) // too little to break an image
			if err != nil {
				t.Fatal(err)
			}
			return testing.AllocsPerRun(3, func() { perturb(t, a, m, x, labels, 1) })
		}
		const more = 100
		// A call of share costs a closure or two, whatever the batch.
		targets := 1.0
		if spec == "apgd-t-%d" || spec == "fab-t-%d" {
			targets = 3
		}
		if n := (allocations(20+more) - allocations(20)) / (more * targets); n > 6 {
			t.Errorf(spec+": %v allocations a step", 20+more, n)
		}
	}
}
