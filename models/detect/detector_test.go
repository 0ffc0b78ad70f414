package detect

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
)

// The tests' world: 12x12 images of four patterns made of 3x3 blocks, with
// some blocks wrong and noise; the served model is a softmax regression that
// learned from clean images, the guard one that learned from attacked ones.
var testShape = nn.Shape{Height: 12, Width: 12, Channels: 1}

const (
	testClasses = 4
	testEpsilon = 0.3
)

type images struct {
	pixels []float32
	labels []int
}

func (s *images) Len() int                       { return len(s.labels) }
func (s *images) Read(dst []float32, lo, hi int) { copy(dst, s.rows(lo, hi)) }
func (s *images) rows(lo, hi int) []float32      { n := testShape.Size(); return s.pixels[lo*n : hi*n] }
func (s *images) each(do func(x []float32, y int)) {
	for i, y := range s.labels {
		do(s.rows(i, i+1), y)
	}
}

func makeImages(n int, seed uint64) *images {
	pattern := rand.New(rand.NewPCG(7, 7))
	var blocks [testClasses][16]float32
	for c := range blocks {
		for b := range blocks[c] {
			blocks[c][b] = float32(pattern.IntN(2))
		}
	}
	rng := rand.New(rand.NewPCG(seed, 8))
	s := &images{pixels: make([]float32, n*testShape.Size()), labels: make([]int, n)}
	for i := range n {
		c := rng.IntN(testClasses)
		s.labels[i] = c
		drawn := blocks[c]
		for b := range drawn {
			if rng.Float64() < 0.08 {
				drawn[b] = 1 - drawn[b]
			}
		}
		for j, row := 0, s.rows(i, i+1); j < len(row); j++ {
			v := drawn[j/12/3*4+j%12/3]
			row[j] = v + (0.5-v)*0.4*rng.Float32()
		}
	}
	return s
}

// gradient is that of the cross-entropy with respect to a linear network's
// input, and its logits' gradient.
func gradient(n *nn.Network, x []float32, y int) (dx, dlogits []float64) {
	w, b := n.Weights(0)
	logits := make([]float32, testClasses)
	copy(logits, b)
	for i, v := range x {
		for c := range logits {
			logits[c] += v * w[i*testClasses+c]
		}
	}
	dlogits = make([]float64, testClasses)
	softmax(dlogits, logits)
	dlogits[y]--
	dx = make([]float64, len(x))
	for i := range x {
		for c, d := range dlogits {
			dx[i] += d * float64(w[i*testClasses+c])
		}
	}
	return dx, dlogits
}

func fgsm(n *nn.Network, x []float32, y int) []float32 {
	dx, _ := gradient(n, x, y)
	out := slices.Clone(x)
	for i, d := range dx {
		step := float32(math.Copysign(testEpsilon, d))
		if d == 0 {
			step = 0
		}
		out[i] = min(max(out[i]+step, 0), 1)
	}
	return out
}

func attacked(n *nn.Network, s *images) *images {
	out := &images{labels: s.labels}
	s.each(func(x []float32, y int) { out.pixels = append(out.pixels, fgsm(n, x, y)...) })
	return out
}

func trained(t testing.TB, adversarial bool) *nn.Network {
	t.Helper()
	n, err := nn.New(nn.Description{Name: "test", Input: testShape, Layers: []nn.Layer{{Dense: &nn.Dense{Units: testClasses}}}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	w, b := n.Weights(0)
	set := makeImages(1000, 1)
	for range 4 {
		set.each(func(x []float32, y int) {
			if adversarial {
				x = fgsm(n, x, y)
			}
			_, d := gradient(n, x, y)
			for i, v := range x {
				for c := range d {
					w[i*testClasses+c] -= 0.05 * v * float32(d[c])
				}
			}
			for c := range d {
				b[c] -= 0.05 * float32(d[c])
			}
		})
	}
	return n
}

func accuracy(s *images, labels func(Score) int, scores []Score) float64 {
	right := 0
	for i, score := range scores {
		if labels(score) == s.labels[i] {
			right++
		}
	}
	return float64(right) / float64(s.Len())
}

// calibrated makes one detector for all tests: the race detector makes a
// calibration slow.
func calibrated(t testing.TB) (*Detector, *nn.Network) {
	t.Helper()
	made.Do(func() { made.detector, made.served = calibrate(t) })
	if made.detector == nil {
		t.Fatal("the calibration failed before")
	}
	d := *made.detector
	d.Calibration.Signals = slices.Clone(d.Calibration.Signals)
	return &d, made.served
}

var made struct {
	sync.Once
	detector *Detector
	served   *nn.Network
}

func calibrate(t testing.TB) (*Detector, *nn.Network) {
	t.Helper()
	served, guard := trained(t, false), trained(t, true)
	d, err := Calibrate(t.Context(), gradients(t, served), guard, makeImages(2000, 2), makeImages(2500, 3))
	if err != nil {
		t.Fatal(err)
	}
	return d, served
}

func gradients(t testing.TB, n *nn.Network) *graph.Attack {
	t.Helper()
	a, err := graph.NewAttack(n, scoreBatch)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func score(t testing.TB, d *Detector, served *nn.Network, s *images) []Score {
	t.Helper()
	scorer, err := d.Scorer(served)
	if err != nil {
		t.Fatal(err)
	}
	scores, err := scorer.Score(s.pixels, s.Len())
	if err != nil {
		t.Fatal(err)
	}
	return scores
}

// Clean traffic keeps the alarm quiet; hostile traffic raises it at once.
func TestDetectsAttack(t *testing.T) {
	d, served := calibrated(t)
	if d.Calibration.Attack.Bound > 0.05 {
		t.Errorf("bound %v on flagged clean requests, want about 0.027", d.Calibration.Attack.Bound)
	}
	alarm, err := d.Alarm(DefaultAlpha)
	if err != nil {
		t.Fatal(err)
	}
	clean := makeImages(2000, 4)
	scores := score(t, d, served, clean)
	flagged := 0
	for i, s := range scores {
		if s.Flagged {
			flagged++
		}
		if alarm.Observe(s.Flagged) {
			t.Fatalf("false alarm at request %d", i+1)
		}
	}
	hostile := attacked(served, makeImages(200, 5))
	found := score(t, d, served, hostile)
	t.Logf("bound %.4f, threshold %.2f, %d of %d clean requests flagged; attacked accuracy: served %.2f, guard %.2f", d.Calibration.Attack.Bound, d.Calibration.Attack.Threshold, flagged, len(scores),
		accuracy(hostile, func(s Score) int { return s.Served }, found), accuracy(hostile, func(s Score) int { return s.Guard }, found))
	for i, s := range found {
		if alarm.Observe(s.Flagged) {
			t.Logf("alarm at hostile request %d", i+1)
			if i+1 > 10 {
				t.Errorf("the alarm took %d hostile requests, want at most 10", i+1)
			}
			return
		}
	}
	t.Error("no alarm")
}

// Scores do not depend on how requests are batched.
func TestScoreBatches(t *testing.T) {
	d, served := calibrated(t)
	set := makeImages(150, 6)
	all := score(t, d, served, set)
	for i := range all {
		if one := score(t, d, served, &images{set.rows(i, i+1), set.labels[i : i+1]}); one[0] != all[i] {
			t.Fatalf("request %d: %+v alone, %+v among others", i, one[0], all[i])
		}
	}
}

func TestDetectorIsForOneNetwork(t *testing.T) {
	d, served := calibrated(t)
	other := served.Clone()
	other.Flat()[0]++
	if _, err := d.Scorer(other); err == nil || !strings.Contains(err.Error(), "calibrate") {
		t.Errorf("another network: error %v", err)
	}
}

// Degenerate calibration data is an error, never a detector that flags
// everything or nothing.
func TestCase58DegenerateCalibration(t *testing.T) {
	served, guard := trained(t, false), trained(t, true)
	const n = 2 * minExamples
	good, few := makeImages(n, 2), makeImages(minExamples-1, 3)
	same := &images{labels: make([]int, n)}
	for range n {
		same.pixels = append(same.pixels, good.rows(0, 1)...)
	}
	damaged := &images{slices.Clone(good.pixels), good.labels}
	damaged.pixels[12345] = float32(math.NaN())
	hostile := attacked(served, good)
	mixed := &images{append(slices.Clone(good.rows(0, n/2)), hostile.rows(n/2, n)...), good.labels}
	for name, c := range map[string]struct {
		guard *nn.Network
		a, b  Images
		want  string
	}{
		"no examples":                 {guard, &images{}, &images{}, "calibrate on 0 and 0 examples"},
		"few in A":                    {guard, few, good, "calibrate on 999 and 2000 examples"},
		"few in B":                    {guard, good, few, "calibrate on 2000 and 999 examples"},
		"one example again and again": {guard, same, good, "for every example: the examples are all the same"},
		"NaN in A":                    {guard, damaged, good, "calibration set A: pixel 105 of example 85 is NaN"},
		"NaN in B":                    {guard, good, damaged, "calibration set B: pixel 105 of example 85 is NaN"},
		"guard is the served network": {served, good, makeImages(n, 4), "or the guard is the served network"},
		"B is nothing like A":         {guard, good, hostile, "the calibration sets differ too much"},
		"half of B is nothing like A": {guard, good, mixed, "the calibration sets differ too much"},
	} {
		if _, err := Calibrate(t.Context(), gradients(t, served), c.guard, c.a, c.b); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
	}
}

// The score of any finite input is finite, and pixels that are not finite are
// refused.
func FuzzCase58Score(f *testing.F) {
	d, served := calibrated(f)
	scorer, err := d.Scorer(served)
	if err != nil {
		f.Fatal(err)
	}
	huge := served.Clone() // weights at the limit of Network.Check, to overflow
	for i := range huge.Flat() {
		huge.Flat()[i] = float32(1e6 * float64(1-2*(i%2)))
	}
	clean := makeImages(1, 9).pixels
	for _, v := range []float32{0, -1, 0.5, 1e-45, 1e30, math.MaxFloat32, -math.MaxFloat32, float32(math.Inf(1)), float32(math.NaN())} {
		f.Add(v, v, 0)
		f.Add(v, float32(0.25), 77)
	}
	f.Fuzz(func(t *testing.T, v, w float32, at int) {
		x := slices.Clone(clean)
		for i := range x {
			if i%3 == 0 {
				x[i] = v
			}
		}
		if at >= 0 && at < len(x) {
			x[at] = w
		}
		finite := !slices.ContainsFunc(x, func(v float32) bool { return math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) })
		for _, s := range []*Scorer{scorer, {
			detector: d, served: forward(t, huge), guard: scorer.guard, squeezed: scorer.squeezed, p: scorer.p, q: scorer.q,
		}} {
			scores, err := s.Score(x, 1)
			if finite != (err == nil) {
				t.Fatalf("finite %v, error %v", finite, err)
			}
			if err != nil {
				continue
			}
			for _, v := range append(scores[0].Signals[:], scores[0].Score, scores[0].Unlike) {
				if math.IsNaN(v) || math.IsInf(v, 0) {
					t.Fatalf("score %+v", scores[0])
				}
			}
		}
	})
}

func forward(t testing.TB, n *nn.Network) *nn.Forward {
	f, err := nn.NewForward(n, scoreBatch)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// An input on which the network overflows is as suspicious as can be.
func TestCase58OverflowIsFlagged(t *testing.T) {
	d, served := calibrated(t)
	x := make([]float32, testShape.Size())
	for i := range x {
		x[i] = math.MaxFloat32
	}
	scorer, err := d.Scorer(served)
	if err != nil {
		t.Fatal(err)
	}
	scores, err := scorer.Score(x, 1)
	if err != nil || !scores[0].Flagged {
		t.Errorf("score %+v, error %v", scores, err)
	}
}

// The median of Xu et al. is scipy.ndimage.median_filter(size=2,
// mode='reflect'): of four sorted values the third.
func TestSqueeze(t *testing.T) {
	s := nn.Shape{Height: 3, Width: 3, Channels: 2}
	plane := [2][]float32{{.1, .9, .3, .4, .2, .8, .7, .6, .5}, {0, 1, 0, 1, 0, 1, 0, 1, 0}}
	x, got := make([]float32, 2*s.Size()), make([]float32, 2*s.Size())
	for i := range s.Size() {
		x[i], x[s.Size()+i] = plane[i%2][i/2], plane[1-i%2][i/2]
	}
	squeezeMedian(got, x, 2, s)
	for i := range got {
		image, y, xx, c := i/s.Size(), i%s.Size()/6, i%6/2, i%2
		at := func(y, xx int) float32 { return x[image*s.Size()+max(y, 0)*6+max(xx, 0)*2+c] }
		window := []float32{at(y, xx), at(y, xx-1), at(y-1, xx), at(y-1, xx-1)}
		slices.Sort(window)
		if got[i] != window[2] {
			t.Errorf("image %d, row %d, column %d, channel %d: %v, want %v of %v", image, y, xx, c, got[i], window[2], window)
		}
	}
	bits := make([]float32, 4)
	squeezeBit(bits, []float32{0, .499, .5, 1})
	if !slices.Equal(bits, []float32{0, 0, 1, 1}) {
		t.Errorf("1 bit: %v", bits)
	}
}

func TestSameCalibration(t *testing.T) {
	a, _ := calibrated(t)
	b, _ := calibrate(t)
	x, _ := json.Marshal(a.Calibration)
	y, _ := json.Marshal(b.Calibration)
	if string(x) != string(y) {
		t.Error("the same examples give another calibration")
	}
}
