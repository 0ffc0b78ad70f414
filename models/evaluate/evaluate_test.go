package evaluate

import (
	"bytes"
	"context"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
)

// linear is a linear softmax model of two classes, for which robustness has a
// closed form and the gradient of the loss always points to the optimum.
type linear struct {
	network *nn.Network
	forward *nn.Forward
	damaged bool
}

const side, classes = 6, 2

func newLinear(t testing.TB, seed uint64) *linear {
	t.Helper()
	n, err := nn.New(nn.Description{
		Name: "linear", Input: nn.Shape{Height: side, Width: side, Channels: 1},
		Layers: []nn.Layer{{Dense: &nn.Dense{Units: classes}}},
	}, seed)
	if err != nil {
		t.Fatal(err)
	}
	w, b := n.Weights(0)
	clear(b)
	for i, v := range w { // grey, the mean of the images, is on the boundary
		b[i%classes] -= v / 2
	}
	f, err := nn.NewForward(n, 64)
	if err != nil {
		t.Fatal(err)
	}
	return &linear{network: n, forward: f}
}

func (l *linear) Network() *nn.Network { return l.network }
func (l *linear) Batch() int           { return l.forward.Batch() }

func (l *linear) Logits(x []float32, n int) ([]float32, error) {
	z := l.forward.Logits(x, n)
	if l.damaged {
		z[0] = float32(math.NaN())
	}
	return z, nil
}

func (l *linear) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	logits = l.forward.Logits(x, n)
	grad := make([]float32, len(logits))
	loss(logits, grad, 0, n)
	size := l.network.Input.Size()
	w, _ := l.network.Weights(0)
	dx = make([]float32, n*size)
	for r := range n {
		for i := range size {
			for c := range classes {
				dx[r*size+i] += w[i*classes+c] * grad[r*classes+c]
			}
		}
	}
	return logits, dx, nil
}

// robust is the closed form: no image in the ball around x is classified
// other than as label. Source: the linear oracle of ROBUSTNESS.md section 4.
func (l *linear) robust(x []float32, label int, epsilon float64) bool {
	w, b := l.network.Weights(0)
	for c := range classes {
		if c == label {
			continue
		}
		margin := float64(b[label] - b[c])
		for i, v := range x {
			d := float64(w[i*classes+label]) - float64(w[i*classes+c])
			room := float64(v) // the pixel can fall by this
			if d < 0 {
				room = 1 - room
			}
			margin += d*float64(v) - math.Abs(d)*min(epsilon, room)
		}
		if margin <= 0 {
			return false
		}
	}
	return true
}

// testSet has images that a linear model classifies right most of the time:
// their labels are its own predictions, but for one in ten.
func testSet(t testing.TB, l *linear, n int) *dataset.Set {
	t.Helper()
	rng := rand.New(rand.NewPCG(7, 7))
	s := &dataset.Set{Name: "squares", Shape: l.network.Input, Classes: []string{"zero", "one"}, Labels: make([]uint8, n)}
	s.Bytes = make([]byte, n*s.Shape.Size())
	for i := range s.Bytes {
		s.Bytes[i] = byte(rng.UintN(256))
	}
	labels, err := Predict(context.Background(), l, s)
	if err != nil {
		t.Fatal(err)
	}
	for i := range labels {
		if i%10 == 0 {
			labels[i] = (labels[i] + 1) % classes
		}
	}
	s.Labels = labels
	return s
}

var threat = attack.Threat{Norm: "linf", Epsilon: 0.05}

func run(t testing.TB, m attack.Model, s *dataset.Set, o Options) *Report {
	t.Helper()
	r, err := Run(context.Background(), m, s, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// On a linear model PGD reaches the optimum, so the worst case must be the
// closed form, example by example; over more than one chunk.
func TestWorstCaseEqualsTheClosedForm(t *testing.T) {
	l := newLinear(t, 1)
	s := testSet(t, l, chunk+200)
	r := run(t, l, s, Options{Threat: threat, Attacks: []string{"fgsm", "pgd-50", "noise"}, Seed: 3, Examples: 2})
	want, x := 0, make([]float32, s.Shape.Size())
	for i, label := range s.Labels {
		s.Read(x, i, i+1)
		if l.robust(x, int(label), threat.Epsilon) {
			want++
		}
	}
	if want == 0 || want > s.Len()*8/10 {
		t.Fatalf("the closed form calls %d of %d robust: the test says nothing", want, s.Len())
	}
	// float32 and the last bit of epsilon may decide one example
	if d := r.RobustCorrect - want; d < -1 || d > 1 {
		t.Errorf("robust on %d examples, the closed form on %d", r.RobustCorrect, want)
	}
	if got, want := r.CleanCorrect, s.Len()*9/10; got != want {
		t.Errorf("clean: %d right, want %d", got, want)
	}
	if r.Attacks[2].Accuracy < r.Attacks[1].Accuracy {
		t.Errorf("noise %v is stronger than pgd %v", r.Attacks[2].Accuracy, r.Attacks[1].Accuracy)
	}
	if len(r.Examples) != 2 || r.Examples[0].Label != 0 || r.Examples[0].AdversarialPrediction == 0 {
		t.Errorf("examples %+v", r.Examples)
	}
}

// The worst case is the mean of the minimum, not the minimum of the means: two
// attacks that break different halves leave nothing.
func TestWorstCaseIsPerExample(t *testing.T) {
	l := newLinear(t, 2)
	s := testSet(t, l, 100)
	e, err := newMeasurement(l, s, Options{Threat: attack.Threat{Norm: "linf", Epsilon: 1}, Attacks: []string{"fgsm", "noise"}})
	if err != nil {
		t.Fatal(err)
	}
	e.attempts[0].attack = breaksHalf{l, 0}
	e.attempts[1].attack = breaksHalf{l, 1}
	if err := e.run(context.Background()); err != nil {
		t.Fatal(err)
	}
	r, err := Reduce([]*Part{e.part}, DefaultThresholds())
	if err != nil {
		t.Fatal(err)
	}
	if r.Attacks[0].Accuracy < 0.4 || r.Attacks[1].Accuracy < 0.4 || r.RobustAccuracy != 0 {
		t.Errorf("halves %v and %v, worst case %v: want about 0.5, 0.5 and 0", r.Attacks[0].Accuracy, r.Attacks[1].Accuracy, r.RobustAccuracy)
	}
}

// breaksHalf turns every second image into one of another class.
type breaksHalf struct {
	model *linear
	from  int
}

func (b breaksHalf) Name() string { return "half" + string(rune('0'+b.from)) }

func (b breaksHalf) Perturb(ctx context.Context, m attack.Model, x []float32, labels []uint8, _ uint64) ([]float32, error) {
	predicted, err := predict(b.model, x, len(labels))
	if err != nil {
		return nil, err
	}
	size := m.Network().Input.Size()
	adv := slices.Clone(x)
	for i := b.from; i < len(labels); i += 2 {
		for j := range labels {
			if predicted[j] != labels[i] {
				copy(adv[i*size:(i+1)*size], x[j*size:(j+1)*size])
				break
			}
		}
	}
	return adv, nil
}

func TestAnAttackThatLeavesItsThreatModelIsAnError(t *testing.T) {
	l := newLinear(t, 2)
	s := testSet(t, l, 100)
	e, err := newMeasurement(l, s, Options{Threat: threat, Attacks: []string{"fgsm"}})
	if err != nil {
		t.Fatal(err)
	}
	e.attempts[0].attack = breaksHalf{l, 0}
	if err := e.run(context.Background()); err == nil || !strings.Contains(err.Error(), "epsilon") {
		t.Errorf("error %v, want one about epsilon", err)
	}
}

func TestTransfer(t *testing.T) {
	l, source := newLinear(t, 1), newLinear(t, 9)
	s := testSet(t, l, 300)
	r := run(t, l, s, Options{Threat: threat, Attacks: []string{"fgsm"}, Source: source, SourceDigest: "sha256:old"})
	if len(r.Attacks) != 2 || r.Attacks[1].MadeOn != "sha256:old" || r.Attacks[0].MadeOn != "" {
		t.Fatalf("attacks %+v", r.Attacks)
	}
	if r.Attacks[1].Accuracy < r.Attacks[0].Accuracy {
		t.Errorf("transferred FGSM %v is stronger than white-box %v", r.Attacks[1].Accuracy, r.Attacks[0].Accuracy)
	}
	if _, err := Run(context.Background(), l, s, Options{Threat: threat, Attacks: []string{"fgsm"}, Source: source}); err == nil {
		t.Error("a source without a digest is accepted")
	}
}

func TestCurveFallsAndHoldsTheThreat(t *testing.T) {
	l := newLinear(t, 1)
	s := testSet(t, l, 300)
	var calls, last int
	r := run(t, l, s, Options{Threat: threat, Attacks: []string{"fgsm"}, CurvePoints: 8, CurveSamples: 200, Progress: func(done, total int) {
		if done < last || done > total {
			t.Errorf("progress %d of %d after %d", done, total, last)
		}
		calls, last = calls+1, done
		if done == total {
			calls = -1 << 20 // nothing may follow
		}
	}})
	if calls >= 0 {
		t.Error("progress never reached its total")
	}
	for _, series := range r.Curve {
		if len(series.Points) != 8 || series.Points[0].Epsilon != 0 || math.Abs(series.Points[5].Epsilon-threat.Epsilon) > 1e-12 {
			t.Errorf("%s: points %+v: want 8, from 0, the sixth at the threat's epsilon", series.Attack, series.Points)
		}
		for i := 1; i < len(series.Points); i++ {
			if series.Points[i].Accuracy > series.Points[i-1].Accuracy {
				t.Errorf("%s: accuracy rises: %+v", series.Attack, series.Points)
			}
		}
	}
}

func TestSameInputsSameBytes(t *testing.T) {
	l := newLinear(t, 1)
	s := testSet(t, l, 100)
	o := Options{Threat: threat, Attacks: []string{"pgd-5", "noise-3"}, CurvePoints: 4, Examples: 3, Seed: 1}
	a, err := run(t, l, s, o).Encode()
	if err != nil {
		t.Fatal(err)
	}
	b, err := run(t, l, s, o).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Errorf("two runs differ:\n%s%s", a, b)
	}
	back, err := Decode(a)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := back.Encode(); err != nil || !bytes.Equal(a, c) {
		t.Errorf("after a round trip (%v):\n%s%s", err, a, c)
	}
	for _, key := range []string{"clean_accuracy", "robust_accuracy", "robust_accuracy_lower_bound", "attacks"} {
		if !bytes.Contains(a, []byte(`"`+key+`":`)) {
			t.Errorf("no key %s in %s", key, a)
		}
	}
}

func TestBadInput(t *testing.T) {
	l := newLinear(t, 1)
	s := testSet(t, l, 50)
	narrow := *s
	narrow.Shape.Width = 3
	narrow.Bytes = narrow.Bytes[:50*18]
	three := *s
	three.Classes = []string{"zero", "one", "two"}
	label := *s
	label.Labels = append([]uint8{9}, s.Labels[1:]...)
	damaged := newLinear(t, 1)
	damaged.damaged = true
	good := Options{Threat: threat, Attacks: []string{"fgsm"}}
	with := func(f func(*Options)) Options { o := good; f(&o); return o }
	for _, c := range []struct {
		model attack.Model
		set   *dataset.Set
		o     Options
		want  string
	}{
		{l, s.Slice(0, 0), good, "the test set is empty"},
		{l, nil, good, "the test set is empty"},
		{l, &narrow, good, "network linear takes images of 6x6x1, dataset squares has images of 6x3x1"},
		{l, &three, good, "network linear has 2 classes, dataset squares has 3"},
		{l, &label, good, "label 9"},
		{damaged, s, good, "the model is damaged"},
		{l, s, with(func(o *Options) { o.Attacks = nil }), "0 attacks"},
		{l, s, with(func(o *Options) { o.Attacks = []string{"fgms"} }), `did you mean "fgsm"?`},
		{l, s, with(func(o *Options) { o.Attacks = []string{"noise", "noise-100"} }), "listed twice"},
		{l, s, with(func(o *Options) { o.Samples = 51 }), "has 50 test examples"},
		{l, s, with(func(o *Options) { o.Samples = -1 }), "samples is -1"},
		{l, s, with(func(o *Options) { o.CurvePoints = 3 }), "curve points"},
		{l, s, with(func(o *Options) { o.CurveSamples = 51 }), "curve samples"},
		{l, s, with(func(o *Options) { o.Examples = 1e6 }), "examples"},
		{l, s, with(func(o *Options) { o.Threat.Epsilon = math.NaN() }), "epsilon"},
		{l, s, with(func(o *Options) { o.Threat.Norm = "l3" }), "have l2, linf"},
	} {
		if _, err := Run(context.Background(), c.model, c.set, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v, want %q", err, c.want)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Run(ctx, l, s, good); err == nil {
		t.Error("a cancelled context is ignored")
	}
}

func TestConfusionMatrixAndMetrics(t *testing.T) {
	// worked by hand: class 2 is never predicted
	labels, predicted := []uint8{0, 0, 0, 1, 1, 2}, []uint8{0, 0, 1, 1, 1, 0}
	m, err := ConfusionMatrix(labels, predicted, 3)
	if err != nil {
		t.Fatal(err)
	}
	if want := [][]int{{2, 1, 0}, {0, 2, 0}, {1, 0, 0}}; !reflect.DeepEqual(m, want) {
		t.Errorf("matrix %v, want %v", m, want)
	}
	counts, err := golearnMatrix(labels, predicted, 3)
	if err != nil {
		t.Fatal(err)
	}
	want := []Metrics{{2. / 3, 2. / 3, 2. / 3}, {2. / 3, 1, 0.8}, {0, 0, 0}}
	for i, got := range metrics(counts, 3) {
		if math.Abs(got.Precision-want[i].Precision) > 1e-12 || math.Abs(got.Recall-want[i].Recall) > 1e-12 || math.Abs(got.F1-want[i].F1) > 1e-12 {
			t.Errorf("class %d: %+v, want %+v", i, got, want[i])
		}
	}
	for _, bad := range [][2][]uint8{{{0, 1}, {0}}, {{3}, {0}}, {{0}, {3}}} {
		if _, err := ConfusionMatrix(bad[0], bad[1], 3); err == nil {
			t.Errorf("%v is accepted", bad)
		}
	}
}

// The figures of shards are those of one run, to the byte, whatever the number
// of shards and their order.
func TestShardsReduceToOneRun(t *testing.T) {
	m := perceptron(t)
	s := stripes(t, m, 230)
	o := Options{
		Threat: attack.Threat{Norm: "linf", Epsilon: 0.02}, Attacks: []string{"fgsm", "pgd-5x2"}, Suite: "standard", Checks: true, Train: stripes(t, m, 20),
		CurvePoints: 8, CurveSamples: 30, Examples: 3, Seed: 5, Source: newPerceptron(t, 9), SourceDigest: "sha256:other",
	}
	o.Samples = 61
	for _, drawn := range []bool{false, true} {
		if o.Drawn = drawn; drawn { // without the checks, which take long
			o.Checks, o.Suite = false, ""
		}
		want, err := run(t, m, s, o).Encode()
		if err != nil {
			t.Fatal(err)
		}
		for _, shards := range []int{3} {
			o := o
			var parts []*Part
			for shard := shards; shard >= 1; shard-- {
				o.Shard, o.Shards = shard, shards
				p, err := Measure(context.Background(), m, s, o)
				if err != nil {
					t.Fatal(err)
				}
				data, err := p.Encode()
				if err != nil {
					t.Fatal(err)
				}
				if p, err = DecodePart(data); err != nil {
					t.Fatal(err)
				}
				parts = append(parts, p)
			}
			r, err := Reduce(parts, DefaultThresholds())
			if err != nil {
				t.Fatal(err)
			}
			got, err := r.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%d shards, drawn %v:\n%s\none run:\n%s", shards, drawn, got, want)
			}
			for name, bad := range map[string][]*Part{"one missing": parts[1:], "one twice": append([]*Part{parts[0]}, parts[:shards-1]...), "none": nil} {
				if _, err := Reduce(bad, DefaultThresholds()); err == nil {
					t.Errorf("%s: accepted", name)
				}
			}
			other := *parts[0]
			other.Plan.Seed++
			if _, err := Reduce(append([]*Part{&other}, parts[1:]...), DefaultThresholds()); err == nil || !strings.Contains(err.Error(), "not of one evaluation") {
				t.Errorf("another seed: %v", err)
			}
		}
	}
}

func newPerceptron(t testing.TB, seed uint64) attack.Model {
	t.Helper()
	n, err := nn.New(nn.Description{
		Name: "perceptron", Input: nn.Shape{Height: 6, Width: 6, Channels: 1},
		Layers: []nn.Layer{{Dense: &nn.Dense{Units: 20, ReLU: true}}, {Dense: &nn.Dense{Units: 5}}},
	}, seed)
	if err != nil {
		t.Fatal(err)
	}
	m, err := graph.NewAttack(n, 32)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func perceptron(t testing.TB) attack.Model { return newPerceptron(t, 4) }

// stripes are images that the model's own answers label, but for one in ten.
func stripes(t testing.TB, m attack.Model, n int) *dataset.Set {
	t.Helper()
	rng := rand.New(rand.NewPCG(7, uint64(n)))
	s := &dataset.Set{Name: "stripes", Shape: m.Network().Input, Classes: []string{"a", "b", "c", "d", "e"}, Labels: make([]uint8, n)}
	s.Bytes = make([]byte, n*s.Shape.Size())
	for i := range s.Bytes {
		s.Bytes[i] = byte(rng.UintN(256))
	}
	labels, err := Predict(context.Background(), m, s)
	if err != nil {
		t.Fatal(err)
	}
	for i := range labels {
		if i%10 == 0 {
			labels[i] = (labels[i] + 1) % 5
		}
	}
	s.Labels = labels
	return s
}

// blind hides its gradients, as quantisation does.
type blind struct{ attack.Model }

func (b blind) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	logits, dx, err = b.Model.Gradient(x, n, loss)
	clear(dx)
	return logits, dx, err
}

// checks runs the suite and returns its checks by name.
func checks(t testing.TB, m attack.Model, s *dataset.Set, o Options) map[string]Check {
	t.Helper()
	o.Threat, o.Suite, o.Checks, o.CurvePoints, o.CurveSamples = attack.Threat{Norm: "linf", Epsilon: 0.02}, "standard", true, 8, min(s.Len(), 40)
	all := map[string]Check{}
	for _, c := range run(t, m, s, o).Checks {
		all[c.Name] = c
	}
	return all
}

func TestCase47Case49Case50ChecksOfARealRun(t *testing.T) {
	m := perceptron(t)
	s := stripes(t, m, 100)
	honest := checks(t, m, s, Options{Train: stripes(t, m, 101)})
	for name, c := range honest {
		if c.Pass == (name == "samples") { // a hundred are too few
			t.Errorf("an honest model: %s: pass %v", c, c.Pass)
		}
	}
	permuted := s.Slice(0, 60)
	permuted.Labels = slices.Clone(permuted.Labels)
	for i, y := range permuted.Labels {
		permuted.Labels[i] = (y + 2) % 5
	}
	for what, c := range map[string]struct {
		all  map[string]Check
		fail []string
	}{
		"no gradients, whatever the epsilon":      {checks(t, blind{m}, s.Slice(0, 20), Options{}), []string{"unbounded_attack_wins", "gradients"}},
		"train and test overlap, permuted labels": {checks(t, m, permuted, Options{Train: s.Slice(50, 90)}), []string{"disjoint", "labels"}},
	} {
		for _, name := range c.fail {
			if got, ok := c.all[name]; !ok || got.Pass {
				t.Errorf("%s: %s: made %v, pass %v", what, got, ok, got.Pass)
			}
		}
		if _, ok := c.all["disjoint"]; ok == (what == "no gradients, whatever the epsilon") {
			t.Errorf("%s: compared with a training set: %v", what, ok)
		}
	}
}

func FuzzDecodePart(f *testing.F) {
	l := newLinear(f, 1)
	p, err := Measure(context.Background(), l, testSet(f, l, 30), Options{Threat: threat, Attacks: []string{"fgsm"}, CurvePoints: 4, Examples: 1, Shard: 2, Shards: 3})
	if err != nil {
		f.Fatal(err)
	}
	data, err := p.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(bytes.Replace(data, []byte(`"shards":3`), []byte(`"shards":1`), 1))
	f.Add([]byte(`{"shard":1,"shards":1,"plan":{"samples":1}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := DecodePart(data)
		if err != nil {
			return
		}
		if r, err := Reduce([]*Part{p}, DefaultThresholds()); err == nil {
			if _, err := r.Encode(); err != nil {
				t.Fatalf("a report that cannot be written: %v", err)
			}
		}
	})
}
