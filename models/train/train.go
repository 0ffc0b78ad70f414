// Package train trains networks, on clean images and on adversarial ones.
//
// A training is a pure function of the network's starting weights, the
// recipe, the threat model, the data, the seed and the kernel path in use
// (models/nn/kernel: each instruction set rounds sums in its own way). Neither
// an interruption nor the number of processors changes a bit of the result.
package train

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/certify"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/nn/kernel"
	"github.com/temper-ml/temper/models/recipe"
)

// A recipe and its parts have a package of their own, so that a server reads a
// model's YAML without linking what trains it.
type (
	Recipe   = recipe.Recipe
	Phase    = recipe.Phase
	Adam     = recipe.Adam
	Schedule = recipe.Schedule
)

// ErrInterrupted is returned when the context ends a training. Where a
// checkpoint file was named, the same call resumes it.
var ErrInterrupted = errors.New("training interrupted")

// ErrDiverged is a loss or gradient that is not finite.
var ErrDiverged = errors.New("training diverged")

// checkpointEvery bounds the work lost when a process is killed without
// notice.
const checkpointEvery = 30 * time.Second

// Options are the effects of a training.
type Options struct {
	Progress   func(done, total int) // told of every step; may be nil
	Checkpoint string                // file to resume from and to keep up to date; "" for none
	Log        *slog.Logger          // one line an epoch and a rollback; nil for none
}

// Result describes a finished training.
type Result struct {
	Steps     int        `json:"steps"`
	Epochs    float64    `json:"epochs"`
	Loss      float64    `json:"loss"` // mean of the last whole epoch, on the images trained on
	Rollbacks []Rollback `json:"rollbacks,omitempty"`
	Seconds   float64    `json:"-"` // of this process, not counting what it resumed
}

// Run trains net in place by the recipe, on adversarial examples within the
// threat.
//
// With EMA the result is the moving average of the weights. With Guard, every
// 100 steps of an adversarial phase, and at its end, the weights are attacked
// on 256 images of validation, at the epsilon of that moment. Run goes back to
// the last weights that passed where accuracy under PGD-10 falls by more than
// 15 points from its best at full epsilon, or, training on single steps, where
// accuracy under FGSM exceeds it by more than 25 points; from then on
// single-step methods go on as PGD-3.
//
// With KeepBest the result is taken from the end of the epoch, among those at
// full epsilon, whose weights (or their moving average) were most accurate
// under APGD-20 within the threat on 1,000 images of validation. Validation is
// used for nothing else and may be nil without Guard and KeepBest.
//
// When the context ends, Run writes the checkpoint and returns
// ErrInterrupted. Running again with the same arguments, net's starting
// weights included, resumes and gives the weights of an uninterrupted run; a
// checkpoint of any other training is refused. A finished training leaves its
// last checkpoint, from which the same call returns at once. A loss or
// gradient that is not finite is an error that names the step, and leaves the
// last checkpoint as it was.
func Run(ctx context.Context, net *nn.Network, train, validation *dataset.Set, recipe Recipe, threat attack.Threat, seed uint64, opts Options) (*Result, error) {
	t, err := newTrainer(net, train, validation, recipe, threat, seed, opts)
	if err != nil {
		return nil, err
	}
	if err := t.resume(); err != nil {
		return nil, err
	}
	return t.run(ctx)
}

// machine computes the gradient of a loss with respect to the weights;
// graph.Training is one.
type machine interface {
	Step(x []float32, n int, loss nn.Loss) (logits []float32, err error)
	Gradient() []float32
}

// trainer is a training under way.
type trainer struct {
	net      *nn.Network
	recipe   Recipe
	threat   attack.Threat
	opts     Options
	log      *slog.Logger
	origin   origin
	batches  *batches
	machine  machine
	bound    *certify.Bound // nil where no phase has one
	guard    *guard         // nil without
	best     *best          // nil without
	ends     []int          // step after each phase's last
	partial  []float64
	now      snapshot // its weights are the network's
	step     int      // steps done
	loss     float64  // sum over this epoch
	lastLoss float64  // mean over the last whole epoch
	started  time.Time
	saved    time.Time
}

func newTrainer(net *nn.Network, train, validation *dataset.Set, recipe Recipe, threat attack.Threat, seed uint64, opts Options) (*trainer, error) {
	if err := recipe.Validate(); err != nil {
		return nil, fmt.Errorf("recipe: %w", err)
	}
	if err := threat.Validate(); err != nil {
		return nil, err
	}
	if recipe.Adversarial() && threat.Norm != "linf" {
		return nil, fmt.Errorf("threat.norm is %s: training defends within linf only", threat.Norm)
	}
	if recipe.Adversarial() && threat.Epsilon == 0 {
		for i, p := range recipe.Phases {
			if p.Method != "standard" && p.Epsilon == 0 {
				return nil, fmt.Errorf("recipe: phases[%d] is %s and the threat's epsilon is 0: nothing to defend against", i, p.Method)
			}
		}
	}
	for _, s := range []*dataset.Set{train, validation} {
		if s.Len() > 0 && (s.Shape != net.Input || len(s.Classes) != net.Classes()) {
			return nil, fmt.Errorf("network %q takes images of %v in %d classes; dataset %s has %v in %d", net.Name, net.Input, net.Classes(), s.Name, s.Shape, len(s.Classes))
		}
	}
	if train.Len() < recipe.Batch {
		return nil, fmt.Errorf("recipe: batch is %d, but there are only %d training images", recipe.Batch, train.Len())
	}
	if recipe.Guard && validation.Len() == 0 {
		return nil, errors.New("recipe: guard is on, but there are no validation images for it: hold some out or turn it off")
	}
	if recipe.KeepBest && validation.Len() == 0 {
		return nil, errors.New("recipe: keep_best is on, but there are no validation images for it: hold some out or turn it off")
	}
	recipe.Optimiser = recipe.Optimiser.WithDefaults()

	model, err := graph.NewFastAttack(net, recipe.Batch)
	if err != nil {
		return nil, err
	}
	rows := recipe.Batch
	if recipe.Uses("trades") {
		rows *= 2
	}
	machine, err := graph.NewFastTraining(net, rows)
	if err != nil {
		return nil, err
	}
	flat := net.Flat()
	t := &trainer{
		net: net, recipe: recipe, threat: threat, opts: opts, log: opts.Log,
		batches: newBatches(train, model, recipe, seed), machine: machine,
		partial: make([]float64, (len(flat)+chunk-1)/chunk),
		now:     newSnapshot(flat),
	}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	if recipe.Bounded() {
		if threat.Norm != "linf" {
			return nil, fmt.Errorf("recipe: bound: the threat is in %s, and a bound is known for linf only", threat.Norm)
		}
		if t.bound, err = certify.NewFast(net, recipe.Batch); err != nil {
			return nil, fmt.Errorf("recipe: bound: %w", err)
		}
	}
	if recipe.Guard {
		t.guard = &guard{heldOut: holdOut(validation, guardImages, model, seed), good: newSnapshot(make([]float32, len(flat)))}
	}
	if recipe.KeepBest {
		t.best = &best{heldOut: holdOut(validation, bestImages, model, seed), weights: make([]float32, len(flat))}
	}
	epochs := 0.0
	for _, p := range recipe.Phases {
		epochs += p.Epochs
		t.ends = append(t.ends, int(math.Round(epochs*float64(t.batches.perEpoch()))))
	}
	if t.total() == 0 {
		return nil, fmt.Errorf("recipe: %v epochs of %d batches are not one step", epochs, t.batches.perEpoch())
	}
	if opts.Checkpoint != "" {
		t.origin = origin{
			Network: digest(net.Description), Weights: hexSum(appendFloats(nil, [][]float32{flat})),
			Recipe: digest(recipe), Threat: digest(threat), Seed: digest(seed), Train: train.Digest(), Kernel: kernel.Path(),
		}
		if validation.Len() > 0 {
			t.origin.Validation = validation.Digest()
		}
	}
	return t, nil
}

func (t *trainer) total() int { return t.ends[len(t.ends)-1] }

// phase returns the phase of a step below total, the phase's first step and
// the step after its last.
func (t *trainer) phase(step int) (p Phase, first, end int) {
	for i, end := range t.ends {
		if step < end {
			return t.recipe.Phases[i], first, end
		}
		first = end
	}
	panic("train: a step after the last") // run stops at total
}

func (t *trainer) run(ctx context.Context) (*Result, error) {
	t.started, t.saved = time.Now(), time.Now()
	if t.opts.Checkpoint != "" { // a file that cannot be written is an error now, not hours later
		if err := t.save(); err != nil {
			return nil, err
		}
	}
	epochStarted, epochStep := time.Now(), t.step
	for t.step < t.total() {
		if ctx.Err() != nil {
			return nil, t.interrupted(ctx)
		}
		epsilon, rate, err := t.advance()
		if err != nil {
			return nil, fmt.Errorf("training: step %d: %w", t.step, err)
		}
		if t.opts.Progress != nil {
			t.opts.Progress(t.step, t.total())
		}
		if per := t.batches.perEpoch(); t.step%per == 0 || t.step == t.total() {
			t.lastLoss = t.loss / float64((t.step-1)%per+1)
			t.loss = 0
			p, _, _ := t.phase(t.step - 1)
			images := float64((t.step - epochStep) * t.recipe.Batch)
			t.log.Info("epoch", "epoch", (t.step+per-1)/per, "of", math.Ceil(float64(t.total())/float64(per)), "method", p.Method, "loss", round(t.lastLoss),
				"learning_rate", rate, "epsilon", round(epsilon), "images_per_second", math.Round(images/time.Since(epochStarted).Seconds()))
			if t.best != nil && p.Method != "standard" && epsilon == p.EpsilonAt(p.EpsilonRampEpochs, t.threat) {
				accuracy, err := t.best.look(t.result(), t.step, t.threat)
				if err != nil {
					return nil, fmt.Errorf("training: step %d: %w", t.step, err)
				}
				t.log.Info("held out", "step", t.step, "pgd_accuracy", round(accuracy), "best_step", t.best.step)
			}
			epochStarted, epochStep = time.Now(), t.step
		}
		if t.opts.Checkpoint != "" && (time.Since(t.saved) >= checkpointEvery || t.step == t.total()) {
			if err := t.save(); err != nil {
				return nil, err
			}
		}
	}
	if t.best != nil && t.best.step > 0 {
		copy(t.net.Flat(), t.best.weights)
	} else {
		copy(t.net.Flat(), t.result())
	}
	if err := t.net.Check(); err != nil {
		return nil, fmt.Errorf("training: %w: the trained %w", ErrDiverged, err)
	}
	r := &Result{Steps: t.step, Epochs: t.recipe.Epochs(), Loss: t.lastLoss, Seconds: time.Since(t.started).Seconds()}
	if t.guard != nil {
		r.Rollbacks = t.guard.rollbacks
	}
	return r, nil
}

// result is what the training would give if it ended now.
func (t *trainer) result() []float32 {
	if t.recipe.EMA > 0 {
		return t.now.ema
	}
	return t.now.weights
}

func round(x float64) float64 { return math.Round(x*1e4) / 1e4 }

// maxNorm bounds the gradient: Adam squares it in float32.
const maxNorm = 1e18

// advance takes one optimiser step, and lets the guard look where it is due.
// It does not stop half-way, so that a checkpoint is always between two steps.
func (t *trainer) advance() (epsilon, rate float64, err error) {
	per := float64(t.batches.perEpoch())
	p, first, end := t.phase(t.step)
	full := p.EpsilonAt(p.EpsilonRampEpochs, t.threat)
	epsilon = p.EpsilonAt(float64(t.step-first)/per, t.threat)
	rate = t.recipe.Optimiser.LearningRate * t.recipe.Schedule.Rate(t.step, t.total(), float64(t.step)/per)
	if t.guard != nil && t.step == first {
		t.guard.reset(&t.now, t.step)
	}

	o, err := t.batches.make(t.step, methodAt(p, epsilon, full, t.guard != nil && t.guard.rescued))
	if err != nil {
		return 0, 0, err
	}
	logits, err := t.machine.Step(o.x, o.n, o.loss)
	if err != nil {
		return 0, 0, err
	}
	const advice = "lower optimiser.learning_rate or set clip"
	loss := o.value(logits)
	gradient := t.machine.Gradient()
	if p.Bound > 0 && full > 0 {
		share := p.Bound * epsilon / full
		loss = (1-share)*loss + share*t.bounded(gradient, epsilon, share)
	}
	if math.IsNaN(loss) || math.IsInf(loss, 0) {
		return 0, 0, fmt.Errorf("%w: the loss is %v: %s", ErrDiverged, loss, advice)
	}
	length := norm(gradient, t.partial)
	if !(length <= maxNorm) {
		return 0, 0, fmt.Errorf("%w: the gradient of parameter %s is not finite or too large: %s", ErrDiverged, t.largest(gradient), advice)
	}
	scale := 1.0
	if t.recipe.Clip > 0 && length > t.recipe.Clip {
		scale = t.recipe.Clip / length
	}
	t.now.update(gradient, scale, rate, t.recipe.Optimiser, t.recipe.EMA)
	t.loss += loss
	t.step++

	due := (t.step-first)%guardEvery == 0 || t.step == end
	if t.guard == nil || !due || p.Method == "standard" || epsilon == 0 {
		return epsilon, rate, nil
	}
	back, err := t.guard.check(&t.now, t.step, p, attack.Threat{Norm: t.threat.Norm, Epsilon: epsilon}, full)
	if err != nil {
		return 0, 0, err
	}
	if back != nil {
		t.log.Warn("rolled back", "step", back.Step, "to", back.To, "fgsm_accuracy", round(back.FGSM), "pgd_accuracy", round(back.PGD), "reason", back.Reason)
	}
	return epsilon, rate, nil
}

// bounded mixes a share of the gradient of the bound's loss into gradient, and
// returns that loss: the mean cross-entropy of the worst logits that images
// within epsilon of the clean ones can have (Gowal et al. 2019).
func (t *trainer) bounded(gradient []float32, epsilon, share float64) float64 {
	o := t.batches.crossEntropy(t.batches.clean)
	worst := t.bound.Step(o.x, t.batches.labels, epsilon, o.loss)
	keep, take := float32(1-share), float32(share)
	for i, g := range t.bound.Gradient() {
		gradient[i] = keep*gradient[i] + take*g
	}
	return o.value(worst)
}

// largest names the parameter with the largest gradient, NaN being larger
// than any number.
func (t *trainer) largest(gradient []float32) string {
	name, most := "", -1.0
	for _, p := range t.net.Parameters {
		for _, g := range gradient[:len(p.Data)] {
			if a := math.Abs(float64(g)); a > most || math.IsNaN(a) {
				name, most = p.Name, a
			}
			if math.IsNaN(most) {
				return name
			}
		}
		gradient = gradient[len(p.Data):]
	}
	return name
}

// head describes the training as it is now; vectors is the memory that goes
// with it.
func (t *trainer) head() (head, [][]float32) {
	h := head{
		Origin: t.origin, Step: t.step, Updates: t.now.updates, Loss: t.loss, LastLoss: t.lastLoss,
		Parameters: len(t.now.weights),
	}
	vectors := t.now.vectors()
	if g := t.guard; g != nil {
		h.Guard, h.Best, h.Rescued, h.Rollbacks = true, g.best, g.rescued, g.rollbacks
		h.GoodStep, h.GoodUpdates = g.goodStep, g.good.updates
		vectors = append(vectors, g.good.vectors()...)
	}
	if b := t.best; b != nil {
		h.KeepBest, h.BestStep, h.BestAccuracy = true, b.step, b.accuracy
		vectors = append(vectors, b.weights)
	}
	return h, vectors
}

func (t *trainer) save() error {
	data, err := encode(t.head())
	if err == nil {
		err = write(t.opts.Checkpoint, data)
	}
	if err != nil {
		return fmt.Errorf("checkpoint %s cannot be written: %w: name a file in a writable folder with room for it", t.opts.Checkpoint, err)
	}
	t.saved = time.Now()
	return nil
}

// resume continues from the checkpoint, if there is one.
func (t *trainer) resume() error {
	if t.opts.Checkpoint == "" {
		return nil
	}
	want, vectors := t.head()
	data, err := read(t.opts.Checkpoint, vectorBytes(want))
	if err == nil && data == nil {
		return nil
	}
	var h head
	if err == nil {
		h, err = decode(data, want, t.total(), vectors)
	}
	if err != nil {
		return fmt.Errorf("checkpoint %s cannot be resumed: %w", t.opts.Checkpoint, err)
	}
	t.step, t.loss, t.lastLoss, t.now.updates = h.Step, h.Loss, h.LastLoss, h.Updates
	if g := t.guard; g != nil {
		g.best, g.rescued, g.rollbacks = h.Best, h.Rescued, h.Rollbacks
		g.goodStep, g.good.updates = h.GoodStep, h.GoodUpdates
	}
	if b := t.best; b != nil {
		b.step, b.accuracy = h.BestStep, h.BestAccuracy
	}
	t.log.Info("resumed", "checkpoint", t.opts.Checkpoint, "step", t.step, "of", t.total())
	return nil
}

func (t *trainer) interrupted(ctx context.Context) error {
	err := fmt.Errorf("%w at step %d of %d: %w", ErrInterrupted, t.step, t.total(), context.Cause(ctx))
	if t.opts.Checkpoint == "" {
		return err
	}
	if failed := t.save(); failed != nil {
		return errors.Join(err, failed)
	}
	return fmt.Errorf("%w: run again to resume from %s", err, t.opts.Checkpoint)
}
