package train

import (
	"context"
	"crypto/sha256"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/certify"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/kernel"
)

var threat = attack.Threat{Norm: "linf", Epsilon: 0.1}

// toy draws n images of 4x4 pixels: a bright column says the class.
func toy(n int, seed uint64) *dataset.Set {
	s := &dataset.Set{Name: "toy", Shape: nn.Shape{Height: 4, Width: 4, Channels: 1}, Classes: []string{"a", "b", "c", "d"}}
	rng := rand.New(rand.NewPCG(seed, 9))
	for range n {
		class := rng.IntN(4)
		for p := range 16 {
			b := rng.IntN(120)
			if p%4 == class {
				b += 100
			}
			s.Bytes = append(s.Bytes, byte(b))
		}
		s.Labels = append(s.Labels, uint8(class))
	}
	return s
}

func toyNetwork(t testing.TB) *nn.Network {
	t.Helper()
	net, err := nn.New(nn.Description{Name: "toy", Input: nn.Shape{Height: 4, Width: 4, Channels: 1}, Layers: []nn.Layer{
		{Dense: &nn.Dense{Units: 12, ReLU: true}}, {Dense: &nn.Dense{Units: 4}},
	}}, 5)
	if err != nil {
		t.Fatal(err)
	}
	return net
}

// everything is a recipe that uses all there is. The toy has 40 steps an epoch.
func everything() Recipe {
	return Recipe{
		Batch: 10, Optimiser: Adam{LearningRate: 0.01}, Schedule: Schedule{Kind: "triangular"},
		Phases: []Phase{
			{Method: "standard", Epochs: 0.5},
			{Method: "fgsm", Epochs: 0.5},
			{Method: "n-fgsm", Epochs: 3.5, EpsilonRampEpochs: 1},
			{Method: "pgd", Epochs: 1, Steps: 3, Alpha: 0.05},
			{Method: "trades", Epochs: 1, Steps: 2, Alpha: 0.05, Beta: 3},
		},
		EMA: 0.99, Clip: 1, Guard: true, KeepBest: true,
	}
}

func mixture() Recipe {
	return Recipe{
		Batch: 10, Optimiser: Adam{LearningRate: 0.01}, Schedule: Schedule{Kind: "step", Every: 1, Factor: 0.5},
		Phases: []Phase{{Method: "pgd", Epochs: 2, Steps: 2, Alpha: 0.05}}, CleanShare: 0.3,
	}
}

// certified is a recipe on the bound, alone and beside adversarial images.
func certified() Recipe {
	return Recipe{
		Batch: 10, Optimiser: Adam{LearningRate: 0.01}, Schedule: Schedule{Kind: "cosine"},
		Phases: []Phase{
			{Method: "ibp", Epochs: 1.5, EpsilonRampEpochs: 1, Bound: 0.5},
			{Method: "n-fgsm", Epochs: 0.5, Bound: 0.1},
			{Method: "ibp", Epochs: 1, Epsilon: 0.12, Bound: 1},
		},
		Clip: 1, Guard: true,
	}
}

func trainToy(t *testing.T, ctx context.Context, recipe Recipe, seed uint64, opts Options) (*nn.Network, *Result, error) {
	t.Helper()
	net := toyNetwork(t)
	r, err := Run(ctx, net, toy(405, 1), toy(60, 2), recipe, threat, seed, opts)
	return net, r, err
}

func mustTrain(t *testing.T, recipe Recipe, seed uint64, opts Options) (*nn.Network, *Result) {
	t.Helper()
	net, r, err := trainToy(t, context.Background(), recipe, seed, opts)
	if err != nil {
		t.Fatal(err)
	}
	return net, r
}

func TestLearns(t *testing.T) {
	for _, recipe := range []Recipe{everything(), mixture()} {
		net, r := mustTrain(t, recipe.WithEpochs(10), 3, Options{})
		if r.Steps != 400 || math.Abs(r.Epochs-10) > 1e-9 || !(r.Loss > 0 && r.Loss < 1.5) || len(r.Rollbacks) != 0 {
			t.Errorf("result %+v", r)
		}
		f, err := nn.NewForward(net, 200)
		if err != nil {
			t.Fatal(err)
		}
		test, x, right := toy(200, 3), make([]float32, 200*16), 0
		test.Read(x, 0, 200)
		logits := f.Logits(x, 200)
		for i, y := range test.Labels {
			if attack.Predict(logits[4*i:4*i+4]) == int(y) {
				right++
			}
		}
		if right < 190 {
			t.Errorf("%d of 200 right after training by %+v", right, recipe.Phases)
		}
	}
}

func TestCase14ResumingEqualsAnUninterruptedRun(t *testing.T) {
	for name, recipe := range map[string]Recipe{"everything": everything(), "mixture": mixture(), "certified": certified()} {
		t.Run(name, func(t *testing.T) {
			want, result := mustTrain(t, recipe, 3, Options{})
			opts := Options{Checkpoint: filepath.Join(t.TempDir(), "checkpoint")}
			last, runs := 0, 0
			for {
				ctx, cancel := context.WithCancel(context.Background())
				stop := last + 37
				opts.Progress = func(done, total int) {
					if done != last+1 || done > total || total != result.Steps {
						t.Fatalf("progress %d of %d after %d", done, total, last)
					}
					if last = done; done == stop {
						cancel()
					}
				}
				runs++
				net, r, err := trainToy(t, ctx, recipe, 3, opts)
				cancel()
				if errors.Is(err, ErrInterrupted) {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(net.Flat(), want.Flat()) {
					t.Errorf("after %d interruptions the weights differ", runs-1)
				}
				if r.Loss != result.Loss || r.Steps != result.Steps {
					t.Errorf("result %+v, want %+v", r, result)
				}
				break
			}
			if runs < 3 {
				t.Fatalf("%d runs: the test shows nothing", runs)
			}
			opts.Progress = func(int, int) { t.Error("a finished training trains on") }
			net, _ := mustTrain(t, recipe, 3, opts)
			if !slices.Equal(net.Flat(), want.Flat()) {
				t.Error("the finished checkpoint gives other weights")
			}
		})
	}
}

// TestCase14ResumeKeepsTheGuard interrupts before, between and after
// rollbacks, which the test provokes by raising the guard's best.
func TestCase14ResumeKeepsTheGuard(t *testing.T) {
	train := func(file string, stops ...int) (*trainer, *Result) {
		for {
			tr, err := newTrainer(toyNetwork(t), toy(405, 1), toy(60, 2), everything(), threat, 3, Options{Checkpoint: file})
			if err != nil {
				t.Fatal(err)
			}
			if err := tr.resume(); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			tr.opts.Progress = func(done, total int) {
				if done == 90 {
					tr.guard.best = 2 // more than any accuracy: the next check fails
				}
				if len(stops) > 0 && done == stops[0] {
					stops = stops[1:]
					cancel()
				}
			}
			r, err := tr.run(ctx)
			cancel()
			if err == nil {
				return tr, r
			}
			if !errors.Is(err, ErrInterrupted) {
				t.Fatal(err)
			}
		}
	}
	want, result := train("")
	if len(result.Rollbacks) != 1+1 || !want.guard.rescued { // at step 140, and at the phase's end, 180
		t.Fatalf("rollbacks %+v: want two", result.Rollbacks)
	}
	if r := result.Rollbacks[0]; r.Step != 140 || r.To != 40 {
		t.Errorf("first rollback %+v: want from step 140 to step 40, the phase's first", r)
	}
	got, again := train(filepath.Join(t.TempDir(), "checkpoint"), 95, 139, 140, 141, 179, 181)
	if !slices.Equal(got.net.Flat(), want.net.Flat()) || !slices.Equal(again.Rollbacks, result.Rollbacks) {
		t.Errorf("resumed: rollbacks %+v, want %+v; the weights equal: %v", again.Rollbacks, result.Rollbacks, slices.Equal(got.net.Flat(), want.net.Flat()))
	}
}

func TestCase17SameSeedSameWeights(t *testing.T) {
	for name, recipe := range map[string]Recipe{"everything": everything(), "mixture": mixture()} {
		recipe.Batch = 80 // several pieces of a batch, so that processors share it
		recipe = recipe.WithEpochs(8)
		a, _ := mustTrain(t, recipe, 3, Options{})
		b, _ := mustTrain(t, recipe, 3, Options{})
		before := runtime.GOMAXPROCS(1)
		c, _ := mustTrain(t, recipe, 3, Options{})
		runtime.GOMAXPROCS(before)
		d, _ := mustTrain(t, recipe, 4, Options{})
		if !slices.Equal(a.Flat(), b.Flat()) {
			t.Errorf("%s: the same seed gives other weights", name)
		}
		if !slices.Equal(a.Flat(), c.Flat()) {
			t.Errorf("%s: GOMAXPROCS %d and 1 give other weights", name, before)
		}
		if slices.Equal(a.Flat(), d.Flat()) {
			t.Errorf("%s: another seed gives the same weights", name)
		}
	}
}

func TestCase16CheckpointThatCannotBeWritten(t *testing.T) {
	folder := t.TempDir()
	plain := filepath.Join(folder, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{
		filepath.Join(plain, "checkpoint"), // its folder is a file
		filepath.Join(folder, "missing", "checkpoint"),
		"/proc/checkpoint", // read-only, also for root
		folder,             // a folder itself
	} {
		steps := 0
		_, _, err := trainToy(t, context.Background(), mixture(), 1, Options{Checkpoint: path, Progress: func(int, int) { steps++ }})
		if err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: error %v: must name the file", path, err)
		}
		if steps > 0 {
			t.Errorf("%s: trained %d steps before the error", path, steps)
		}
	}
	entries, _ := os.ReadDir(folder)
	if len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestCheckpointOfAnotherTrainingIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "checkpoint")
	mustTrain(t, mixture(), 1, Options{Checkpoint: file})
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	longer := mixture()
	longer.Phases[0].Epochs = 3
	wider := threat
	wider.Epsilon = 0.2
	trained := toyNetwork(t)
	trained.Flat()[0]++
	for want, run := range map[string]func() error{
		"recipe":           func() error { return resumeAs(file, toyNetwork(t), toy(405, 1), longer, threat, 1) },
		"threat model":     func() error { return resumeAs(file, toyNetwork(t), toy(405, 1), mixture(), wider, 1) },
		"seed":             func() error { return resumeAs(file, toyNetwork(t), toy(405, 1), mixture(), threat, 2) },
		"training data":    func() error { return resumeAs(file, toyNetwork(t), toy(405, 2), mixture(), threat, 1) },
		"starting weights": func() error { return resumeAs(file, trained, toy(405, 1), mixture(), threat, 1) },
	} {
		if err := run(); err == nil || !strings.Contains(err.Error(), "another "+want) {
			t.Errorf("another %s: error %v", want, err)
		}
	}
	tr, err := newTrainer(toyNetwork(t), toy(405, 1), toy(60, 2), mixture(), threat, 1, Options{Checkpoint: file})
	if err != nil {
		t.Fatal(err)
	}
	tr.origin.Kernel = "abacus"
	if err := tr.resume(); err == nil || !strings.Contains(err.Error(), "another instruction set (TEMPER_KERNEL="+kernel.Path()+", now abacus)") {
		t.Errorf("another kernel path: error %v", err)
	}
	if after, _ := os.ReadFile(file); !slices.Equal(before, after) {
		t.Error("the refused checkpoint was changed")
	}
}

func resumeAs(file string, net *nn.Network, train *dataset.Set, recipe Recipe, threat attack.Threat, seed uint64) error {
	_, err := Run(context.Background(), net, train, toy(60, 2), recipe, threat, seed, Options{Checkpoint: file})
	return err
}

func TestDamagedCheckpointIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "checkpoint")
	mustTrain(t, mixture(), 1, Options{Checkpoint: file})
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	flipped := slices.Clone(good)
	flipped[len(flipped)/2] ^= 1
	for name, data := range map[string][]byte{
		"empty": {}, "cut": good[:len(good)-1], "longer": append(slices.Clone(good), 0), "flipped bit": flipped,
		"other file": []byte("PK\x03\x04 not a checkpoint, but long enough to hold a sum at its end, or is it"),
		"huge":       make([]byte, 10<<20),
	} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := trainToy(t, context.Background(), mixture(), 1, Options{Checkpoint: file}); !errors.Is(err, errDamaged) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func FuzzCheckpoint(f *testing.F) {
	want := head{Parameters: 3, Guard: true, KeepBest: true}
	vectors := func() (v [][]float32) {
		for range 9 {
			v = append(v, make([]float32, 3))
		}
		return v
	}
	h := want
	h.Step, h.Updates, h.Best, h.Rollbacks = 7, 6, 0.5, []Rollback{{Step: 5, To: 4, Reason: "fell"}}
	good, err := encode(h, vectors())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good[:len(good)-32])
	f.Add([]byte(magic + "\xff\xff\xff\xff{}"))
	f.Add([]byte(magic + "\x02\x00\x00\x00{}"))
	f.Fuzz(func(t *testing.T, body []byte) {
		_, _ = decode(body, want, 10, vectors())
		// The sum keeps noise out; sign the body as a hostile writer would.
		sum := sha256.Sum256(body)
		got, err := decode(append(slices.Clone(body), sum[:]...), want, 10, vectors())
		if err == nil && (got.Step < 0 || got.Step > 10 || got.Updates > got.Step || got.GoodStep > got.Step) {
			t.Fatalf("accepted %+v", got)
		}
	})
}

// poisoned is a machine that returns NaN for one value of the gradient.
type poisoned struct {
	machine
	step, at int
}

func (p *poisoned) Gradient() []float32 {
	g := p.machine.Gradient()
	if p.step--; p.step < 0 {
		g[p.at] = float32(math.NaN())
	}
	return g
}

func TestNaNStopsTrainingAndKeepsTheCheckpoint(t *testing.T) {
	file := filepath.Join(t.TempDir(), "checkpoint")
	tr, err := newTrainer(toyNetwork(t), toy(405, 1), nil, mixture(), threat, 1, Options{Checkpoint: file})
	if err != nil {
		t.Fatal(err)
	}
	tr.machine = &poisoned{tr.machine, 17, 16*12 + 12 + 3}
	_, err = tr.run(context.Background())
	if err == nil || !strings.Contains(err.Error(), "step 17") || !strings.Contains(err.Error(), "1.weight") {
		t.Errorf("error %v: must name step 17 and parameter 1.weight", err)
	}
	if data, err := os.ReadFile(file); err != nil || len(data) == 0 {
		t.Errorf("checkpoint: %v", err)
	}
	if tr, err = newTrainer(toyNetwork(t), toy(405, 1), nil, mixture(), threat, 1, Options{Checkpoint: file}); err == nil {
		err = tr.resume()
	}
	if err != nil || tr.net.Check() != nil {
		t.Errorf("resuming: %v, %v", err, tr.net.Check())
	}

	net := toyNetwork(t)
	net.Flat()[3] = float32(math.NaN())
	if _, err := Run(context.Background(), net, toy(405, 1), nil, mixture(), threat, 1, Options{}); err == nil || !strings.Contains(err.Error(), "step 0") {
		t.Errorf("NaN weights: error %v", err)
	}
}

func TestInputThatDoesNotFit(t *testing.T) {
	guarded := everything()
	other := toy(405, 1)
	other.Classes = other.Classes[:3]
	for want, run := range map[string]func() error{
		"guard is on, but there are no validation images": func() error {
			_, err := Run(context.Background(), toyNetwork(t), toy(405, 1), nil, guarded, threat, 1, Options{})
			return err
		},
		"keep_best is on, but there are no validation images": func() error {
			keeping := mixture()
			keeping.KeepBest = true
			_, err := Run(context.Background(), toyNetwork(t), toy(405, 1), nil, keeping, threat, 1, Options{})
			return err
		},
		"in 4 classes": func() error {
			_, err := Run(context.Background(), toyNetwork(t), other, nil, mixture(), threat, 1, Options{})
			return err
		},
		"only 5 training images": func() error {
			_, err := Run(context.Background(), toyNetwork(t), toy(5, 1), nil, mixture(), threat, 1, Options{})
			return err
		},
		"not one step": func() error {
			_, err := Run(context.Background(), toyNetwork(t), toy(405, 1), nil, mixture().WithEpochs(0.001), threat, 1, Options{})
			return err
		},
		"nothing to defend": func() error {
			_, err := Run(context.Background(), toyNetwork(t), toy(405, 1), nil, mixture(), attack.Threat{Norm: "linf"}, 1, Options{})
			return err
		},
		"unknown norm": func() error {
			_, err := Run(context.Background(), toyNetwork(t), toy(405, 1), nil, mixture(), attack.Threat{Norm: "l7"}, 1, Options{})
			return err
		},
	} {
		if err := run(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

// Training on the bound proves what training on adversarial images, which are
// as robust to attacks, does not.
func TestTrainingOnTheBoundProves(t *testing.T) {
	proven := func(recipe Recipe) int {
		net, _ := mustTrain(t, recipe, 3, Options{})
		n, err := certify.Accuracy(t.Context(), net, toy(200, 3), 200, threat)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	with, without := proven(certified().WithEpochs(60)), proven(mixture().WithEpochs(60))
	if with < 160 || without > with-20 {
		t.Errorf("%d of 200 proven by training on the bound, %d without", with, without)
	}
	recipe := certified()
	l2 := attack.Threat{Norm: "l2", Epsilon: 1}
	if _, err := Run(t.Context(), toyNetwork(t), toy(405, 1), toy(60, 2), recipe, l2, 1, Options{}); err == nil || !strings.Contains(err.Error(), "linf only") {
		t.Errorf("error %v", err)
	}
}

// The gradient of adversarial images and the bound together equals central
// differences of the two losses' mixture.
func TestMixtureWithTheBoundHasItsGradient(t *testing.T) {
	defer kernel.Use("portable")() // differences need all of float32's digits
	const epsilon, share = 0.1, 0.3
	net := toyNetwork(t)
	recipe := mixture()
	recipe.CleanShare, recipe.Phases[0].Bound = 0, share
	tr, err := newTrainer(net, toy(405, 1), nil, recipe, threat, 1, Options{})
	if err != nil {
		t.Fatal(err)
	}
	o, err := tr.batches.make(0, methodAt(recipe.Phases[0], epsilon, epsilon, false))
	if err != nil {
		t.Fatal(err)
	}
	var gradient []float32
	value := func() float64 {
		logits, err := tr.machine.Step(o.x, o.n, o.loss)
		if err != nil {
			t.Fatal(err)
		}
		loss := o.value(logits)
		gradient = tr.machine.Gradient()
		return (1-share)*loss + share*tr.bounded(gradient, epsilon, share)
	}
	value()
	analytic := slices.Clone(gradient)
	flat, rng := net.Flat(), rand.New(rand.NewPCG(5, 6))
	start := slices.Clone(flat)
	off, total := 0.0, 0.0
	for range 20 {
		direction, want := make([]float64, len(flat)), 0.0
		for i := range direction {
			direction[i] = rng.NormFloat64()
			want += direction[i] * float64(analytic[i])
		}
		const h = 1e-3
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
	if !(off < 0.02*total) {
		t.Errorf("central differences are %.1f%% off the gradient", 100*off/total)
	}
}
