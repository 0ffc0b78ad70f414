// Package recipe says how a network is trained: what models/zoo holds as YAML.
package recipe

import (
	"fmt"
	"math"
	"slices"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/unknown"
)

// Recipe says how a network is trained; models/zoo holds named ones as YAML.
type Recipe struct {
	Batch     int      `yaml:"batch" json:"batch"` // images an optimiser step
	Optimiser Adam     `yaml:"optimiser" json:"optimiser"`
	Schedule  Schedule `yaml:"schedule" json:"schedule"`
	Phases    []Phase  `yaml:"phases" json:"phases"` // one after the other

	// CleanShare is the share of each batch that stays clean in fgsm, n-fgsm
	// and pgd phases; 0 trains on adversarial images only.
	CleanShare float64 `yaml:"clean_share,omitempty" json:"clean_share,omitempty"`
	// Shift is by how many pixels, at most, each training image is moved at
	// random in both directions; what comes in is black. 0 leaves them in place.
	Shift int `yaml:"shift,omitempty" json:"shift,omitempty"`
	// EMA is the decay of the moving average of the weights, which then is
	// the result of the training; 0 means none.
	EMA float64 `yaml:"ema,omitempty" json:"ema,omitempty"`
	// Clip bounds the Euclidean norm of the whole gradient; 0 means no bound.
	Clip float64 `yaml:"clip,omitempty" json:"clip,omitempty"`
	// Guard watches for catastrophic overfitting; see Run.
	Guard bool `yaml:"guard,omitempty" json:"guard,omitempty"`
	// KeepBest makes the result the weights that were most robust on held-out
	// images at an epoch's end, instead of the last; see Run.
	KeepBest bool `yaml:"keep_best,omitempty" json:"keep_best,omitempty"`
}

// Adam holds the parameters of the Adam optimiser (Kingma and Ba 2015).
type Adam struct {
	LearningRate float64 `yaml:"learning_rate" json:"learning_rate"` // the schedule's peak
	Beta1        float64 `yaml:"beta1,omitempty" json:"beta1,omitempty"`
	Beta2        float64 `yaml:"beta2,omitempty" json:"beta2,omitempty"`
	Epsilon      float64 `yaml:"epsilon,omitempty" json:"epsilon,omitempty"`
}

// Schedule is the course of the learning rate over all phases together.
type Schedule struct {
	Kind   string  `yaml:"kind" json:"kind"`                         // constant, triangular (0 to peak at 2/5, back to 0), cosine (peak to 0), step
	Every  float64 `yaml:"every,omitempty" json:"every,omitempty"`   // step: epochs between drops
	Factor float64 `yaml:"factor,omitempty" json:"factor,omitempty"` // step: what each drop multiplies by
}

// Phase is a stretch of training by one method.
type Phase struct {
	Method string  `yaml:"method" json:"method"` // standard, fgsm, n-fgsm, pgd, trades, ibp
	Epochs float64 `yaml:"epochs" json:"epochs"`
	// EpsilonRampEpochs is how long epsilon takes from 0 to its value; the
	// method's alpha rises with it.
	EpsilonRampEpochs float64 `yaml:"epsilon_ramp_epochs,omitempty" json:"epsilon_ramp_epochs,omitempty"`
	Epsilon           float64 `yaml:"epsilon,omitempty" json:"epsilon,omitempty"` // 0 means the threat's
	// Beyond is how many times the threat's epsilon, where Epsilon is 0, the
	// training defends against; 0 means 1. What withstands a little more is
	// surer at the threat's.
	Beyond float64 `yaml:"beyond,omitempty" json:"beyond,omitempty"`
	Alpha  float64 `yaml:"alpha,omitempty" json:"alpha,omitempty"` // pgd, trades: size of a step
	Steps  int     `yaml:"steps,omitempty" json:"steps,omitempty"` // pgd, trades: number of steps
	Beta   float64 `yaml:"beta,omitempty" json:"beta,omitempty"`   // trades: weight of robustness against accuracy
	// Bound is the share of the loss that is on the worst logits that models/certify
	// proves possible, the rest being on the images; it rises with epsilon. ibp
	// needs it; with fgsm, n-fgsm and pgd a little of it regularises.
	Bound float64 `yaml:"bound,omitempty" json:"bound,omitempty"`
}

// Limits on a recipe: far above any useful one, low enough that a mistyped
// number is an error and not an endless run.
const (
	maxBatch  = 1 << 16
	maxEpochs = 10_000
	maxSteps  = 1_000
	maxPhases = 100
	maxBeyond = 10
	maxShift  = 1000
)

var (
	methods   = []string{"standard", "fgsm", "n-fgsm", "pgd", "trades", "ibp"}
	schedules = []string{"constant", "triangular", "cosine", "step"}
)

// Validate reports what is wrong with the recipe, naming the key; also where
// keys that are fine by themselves do not go together.
func (r Recipe) Validate() error {
	if r.Batch < 1 || r.Batch > maxBatch {
		return fmt.Errorf("batch is %d: must be 1 to %d", r.Batch, maxBatch)
	}
	a := r.Optimiser
	for _, f := range []struct {
		key       string
		value     float64
		low, high float64 // both allowed
	}{
		{"optimiser.learning_rate", a.LearningRate, 1e-12, 10},
		{"optimiser.beta1", a.Beta1, 0, 0.999999},
		{"optimiser.beta2", a.Beta2, 0, 0.999999},
		{"optimiser.epsilon", a.Epsilon, 0, 1},
		{"clean_share", r.CleanShare, 0, 1},
		{"shift", float64(r.Shift), 0, maxShift},
		{"ema", r.EMA, 0, 0.999999},
		{"clip", r.Clip, 0, 1e6},
	} {
		if !(f.value >= f.low && f.value <= f.high) {
			return fmt.Errorf("%s is %v: must be %v to %v", f.key, f.value, f.low, f.high)
		}
	}
	if r.CleanRows() == r.Batch {
		return fmt.Errorf("clean_share is %v: that leaves no adversarial image in a batch of %d", r.CleanShare, r.Batch)
	}
	if !slices.Contains(schedules, r.Schedule.Kind) {
		return fmt.Errorf("schedule.kind: %w", unknown.Name("schedule", r.Schedule.Kind, schedules))
	}
	if s := r.Schedule; s.Kind == "step" {
		if !(s.Every > 0 && s.Every <= maxEpochs) || !(s.Factor > 0 && s.Factor <= 1) {
			return fmt.Errorf("schedule.every is %v, schedule.factor is %v: step needs every above 0 and factor above 0 up to 1", s.Every, s.Factor)
		}
	} else if s.Every != 0 || s.Factor != 0 {
		return fmt.Errorf("schedule.every and schedule.factor go with kind step, not with %s", s.Kind)
	}
	if len(r.Phases) < 1 || len(r.Phases) > maxPhases {
		return fmt.Errorf("phases: %d of them: must be 1 to %d", len(r.Phases), maxPhases)
	}
	for i, p := range r.Phases {
		if err := p.validate(); err != nil {
			return fmt.Errorf("phases[%d].%w", i, err)
		}
		if p.Method == "ibp" && r.CleanShare > 0 {
			return fmt.Errorf("clean_share is %v, but phases[%d].method is ibp, whose images are all clean: remove clean_share", r.CleanShare, i)
		}
		if p.Method == "trades" && r.CleanShare > 0 {
			return fmt.Errorf("clean_share is %v, but phases[%d].method is trades, which has a clean image beside each adversarial one: remove clean_share", r.CleanShare, i)
		}
	}
	if !r.Adversarial() && r.CleanShare > 0 {
		return fmt.Errorf("clean_share is %v, but every phase is standard: remove clean_share", r.CleanShare)
	}
	if !r.Adversarial() && r.Guard {
		return fmt.Errorf("guard is on, but every phase is standard and cannot overfit to an attack: remove guard")
	}
	if !r.Adversarial() && r.KeepBest {
		return fmt.Errorf("keep_best is on, but every phase is standard and no weights are robust: remove keep_best")
	}
	if e := r.Epochs(); e > maxEpochs {
		return fmt.Errorf("phases: %v epochs in all: must be at most %d", e, maxEpochs)
	}
	return nil
}

func (p Phase) validate() error {
	if !slices.Contains(methods, p.Method) {
		return fmt.Errorf("method: %w", unknown.Name("method", p.Method, methods))
	}
	iterates, trades, standard := p.Method == "pgd" || p.Method == "trades", p.Method == "trades", p.Method == "standard"
	for _, f := range []struct {
		key     string
		value   float64
		applies bool
		needed  bool
		high    float64
	}{
		{"epochs", p.Epochs, true, true, maxEpochs},
		{"epsilon_ramp_epochs", p.EpsilonRampEpochs, !standard, false, p.Epochs},
		{"epsilon", p.Epsilon, !standard, false, math.MaxFloat32},
		{"beyond", p.Beyond, !standard, false, maxBeyond},
		{"alpha", p.Alpha, iterates, iterates, math.MaxFloat32},
		{"steps", float64(p.Steps), iterates, iterates, maxSteps},
		{"beta", p.Beta, trades, trades, 1000},
		{"bound", p.Bound, !standard && !trades, p.Method == "ibp", 1},
	} {
		switch {
		case !f.applies && f.value != 0:
			return fmt.Errorf("%s is %v, but method %s has none: remove it", f.key, f.value, p.Method)
		case f.needed && f.value == 0:
			return fmt.Errorf("%s is missing: method %s needs it", f.key, p.Method)
		case !(f.value >= 0 && f.value <= f.high):
			return fmt.Errorf("%s is %v: must be 0 to %v", f.key, f.value, f.high)
		}
	}
	if p.Epsilon > 0 && p.Beyond > 0 {
		return fmt.Errorf("beyond is %v, but epsilon is %v whatever the threat's: remove one", p.Beyond, p.Epsilon)
	}
	return nil
}

// Epochs is the length of all phases together.
func (r Recipe) Epochs() float64 {
	total := 0.0
	for _, p := range r.Phases {
		total += p.Epochs
	}
	return total
}

// CleanRows is the number of images of a batch that stay clean.
func (r Recipe) CleanRows() int { return int(math.Round(r.CleanShare * float64(r.Batch))) }

// Uses reports whether a phase has the method.
func (r Recipe) Uses(method string) bool {
	return slices.ContainsFunc(r.Phases, func(p Phase) bool { return p.Method == method })
}

// Bounded reports whether a phase trains on a bound.
func (r Recipe) Bounded() bool {
	return slices.ContainsFunc(r.Phases, func(p Phase) bool { return p.Bound > 0 })
}

// Adversarial reports whether a phase trains against an adversary, by images or
// by a bound.
func (r Recipe) Adversarial() bool {
	return slices.ContainsFunc(r.Phases, func(p Phase) bool { return p.Method != "standard" })
}

// WithEpochs returns the recipe with its phases and ramps stretched or shrunk
// so that together they last the given number of epochs. A step schedule
// keeps its pace.
func (r Recipe) WithEpochs(epochs float64) Recipe {
	scaled := r
	scaled.Phases = slices.Clone(r.Phases)
	factor := epochs / r.Epochs()
	for i := range scaled.Phases {
		scaled.Phases[i].Epochs *= factor
		scaled.Phases[i].EpsilonRampEpochs *= factor
	}
	return scaled
}

// WithDefaults fills in Adam's usual parameters where they are absent.
func (a Adam) WithDefaults() Adam {
	for _, f := range []struct {
		value *float64
		usual float64
	}{{&a.Beta1, 0.9}, {&a.Beta2, 0.999}, {&a.Epsilon, 1e-8}} {
		if *f.value == 0 {
			*f.value = f.usual
		}
	}
	return a
}

// Rate is the learning rate at a step of total, the peak being 1.
func (s Schedule) Rate(step, total int, epoch float64) float64 {
	at := (float64(step) + 0.5) / float64(total) // the step's middle: the rate is never 0
	switch s.Kind {
	case "triangular":
		const peak = 0.4
		return min(at/peak, (1-at)/(1-peak))
	case "cosine":
		return (1 + math.Cos(math.Pi*at)) / 2
	case "step":
		return math.Pow(s.Factor, math.Floor(epoch/s.Every))
	}
	return 1
}

// EpsilonAt is the phase's epsilon a number of epochs after its start.
func (p Phase) EpsilonAt(epoch float64, threat attack.Threat) float64 {
	epsilon := p.Epsilon
	if epsilon == 0 {
		epsilon = threat.Epsilon
		if p.Beyond > 0 {
			epsilon *= p.Beyond
		}
	}
	if epoch < p.EpsilonRampEpochs {
		epsilon *= epoch / p.EpsilonRampEpochs
	}
	return epsilon
}
