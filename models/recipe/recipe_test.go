package recipe

import (
	"math"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/attack"
)

func TestRecipeValidate(t *testing.T) {
	for _, r := range []Recipe{everything(), mixture()} {
		if err := r.Validate(); err != nil {
			t.Error(err)
		}
	}
	for want, change := range map[string]func(r *Recipe){
		"batch is 0":                                        func(r *Recipe) { r.Batch = 0 },
		"optimiser.learning_rate is 0":                      func(r *Recipe) { r.Optimiser.LearningRate = 0 },
		"optimiser.learning_rate is NaN":                    func(r *Recipe) { r.Optimiser.LearningRate = math.NaN() },
		"optimiser.beta2 is 1":                              func(r *Recipe) { r.Optimiser.Beta2 = 1 },
		"ema is 1":                                          func(r *Recipe) { r.EMA = 1 },
		"clip is -1":                                        func(r *Recipe) { r.Clip = -1 },
		"no adversarial image in a batch of 10":             func(r *Recipe) { r.CleanShare = 0.96 },
		"shift is -1":                                       func(r *Recipe) { r.Shift = -1 },
		"clean_share is 1.5":                                func(r *Recipe) { r.CleanShare = 1.5 },
		"method is trades":                                  func(r *Recipe) { r.CleanShare = 0.5 },
		"every phase is standard: remove clean_share":       func(r *Recipe) { r.Phases, r.CleanShare = r.Phases[:1], 0.5 },
		"no weights are robust: remove keep_best":           func(r *Recipe) { r.Phases, r.Guard, r.KeepBest = r.Phases[:1], false, true },
		"cannot overfit to an attack: remove guard":         func(r *Recipe) { r.Phases = r.Phases[:1] },
		`unknown schedule "cosin"`:                          func(r *Recipe) { r.Schedule.Kind = "cosin" },
		"go with kind step, not with cosine":                func(r *Recipe) { r.Schedule = Schedule{Kind: "cosine", Every: 2} },
		"step needs every above 0":                          func(r *Recipe) { r.Schedule = Schedule{Kind: "step", Factor: 0.5} },
		"phases: 0 of them":                                 func(r *Recipe) { r.Phases = nil },
		"epochs in all":                                     func(r *Recipe) { r.Phases[0].Epochs, r.Phases[1].Epochs = maxEpochs, 1 },
		`phases[2].method: unknown method "nfgsm"`:          func(r *Recipe) { r.Phases[2].Method = "nfgsm" },
		"phases[0].epochs is missing":                       func(r *Recipe) { r.Phases[0].Epochs = 0 },
		"phases[0].epochs is NaN":                           func(r *Recipe) { r.Phases[0].Epochs = math.NaN() },
		"phases[2].epsilon_ramp_epochs is 4: must be 0":     func(r *Recipe) { r.Phases[2].EpsilonRampEpochs = 4 },
		"phases[3].steps is missing: method pgd needs it":   func(r *Recipe) { r.Phases[3].Steps = 0 },
		"phases[3].alpha is missing: method pgd needs it":   func(r *Recipe) { r.Phases[3].Alpha = 0 },
		"phases[3].beta is 1, but method pgd has none":      func(r *Recipe) { r.Phases[3].Beta = 1 },
		"phases[2].steps is 2, but method n-fgsm has none":  func(r *Recipe) { r.Phases[2].Steps = 2 },
		"phases[0].epsilon is 0.1, but method standard has": func(r *Recipe) { r.Phases[0].Epsilon = 0.1 },
		"phases[4].beta is missing: method trades needs it": func(r *Recipe) { r.Phases[4].Beta = 0 },
		"phases[3].steps is -1: must be 0":                  func(r *Recipe) { r.Phases[3].Steps = -1 },
		"phases[0].bound is 0.5, but method standard has":   func(r *Recipe) { r.Phases[0].Bound = 0.5 },
		"phases[4].bound is 0.5, but method trades has":     func(r *Recipe) { r.Phases[4].Bound = 0.5 },
		"phases[3].bound is 1.5: must be 0 to 1":            func(r *Recipe) { r.Phases[3].Bound = 1.5 },
		"phases[3].bound is missing: method ibp needs it":   func(r *Recipe) { r.Phases[3] = Phase{Method: "ibp", Epochs: 1} },
		"phases[3].beyond is 11: must be 0 to 10":           func(r *Recipe) { r.Phases[3].Beyond = 11 },
		"phases[3].beyond is 1.1, but epsilon is 0.2":       func(r *Recipe) { r.Phases[3].Beyond, r.Phases[3].Epsilon = 1.1, 0.2 },
		"phases[0].beyond is 1.1, but method standard has":  func(r *Recipe) { r.Phases[0].Beyond = 1.1 },
		"phases[0].method is ibp, whose images are all clean": func(r *Recipe) {
			r.Phases, r.CleanShare = []Phase{{Method: "ibp", Epochs: 1, Bound: 0.5}}, 0.5
		},
	} {
		r := everything()
		change(&r)
		if err := r.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func TestWithEpochs(t *testing.T) {
	r := everything()
	s := r.WithEpochs(13)
	if s.Epochs() != 13 || s.Phases[2].EpsilonRampEpochs != 2 || r.Phases[2].EpsilonRampEpochs != 1 {
		t.Errorf("%+v from %+v", s.Phases, r.Phases)
	}
	if err := s.Validate(); err != nil {
		t.Error(err)
	}
}

func TestSchedules(t *testing.T) {
	for _, c := range []struct {
		s     Schedule
		step  int // of 1000, 100 an epoch
		want  float64
		slack float64
	}{
		{Schedule{Kind: "constant"}, 700, 1, 0},
		{Schedule{Kind: "triangular"}, 0, 0, 0.002},
		{Schedule{Kind: "triangular"}, 200, 0.5, 0.002},
		{Schedule{Kind: "triangular"}, 400, 1, 0.002},
		{Schedule{Kind: "triangular"}, 700, 0.5, 0.002},
		{Schedule{Kind: "triangular"}, 999, 0, 0.002},
		{Schedule{Kind: "cosine"}, 0, 1, 0.001},
		{Schedule{Kind: "cosine"}, 500, 0.5, 0.002},
		{Schedule{Kind: "cosine"}, 999, 0, 0.001},
		{Schedule{Kind: "step", Every: 5, Factor: 0.5}, 499, 1, 0},
		{Schedule{Kind: "step", Every: 5, Factor: 0.5}, 500, 0.5, 0},
	} {
		if got := c.s.Rate(c.step, 1000, float64(c.step)/100); math.Abs(got-c.want) > c.slack || got <= 0 {
			t.Errorf("%+v at step %d: %v, want %v", c.s, c.step, got, c.want)
		}
	}
}

func TestEpsilonRamp(t *testing.T) {
	threat := attack.Threat{Norm: "linf", Epsilon: 0.3}
	p := Phase{Method: "n-fgsm", Epochs: 15, EpsilonRampEpochs: 3}
	for epoch, want := range map[float64]float64{0: 0, 1.5: 0.15, 3: 0.3, 14: 0.3} {
		if got := p.EpsilonAt(epoch, threat); got != want {
			t.Errorf("epoch %v: %v, want %v", epoch, got, want)
		}
	}
	p = Phase{Method: "pgd", Epsilon: 0.15, EpsilonRampEpochs: 2, Alpha: 0.1, Steps: 5}
	if got := p.EpsilonAt(5, threat); got != 0.15 {
		t.Errorf("the phase's epsilon is %v", got)
	}
	p = Phase{Method: "pgd", Beyond: 1.1, EpsilonRampEpochs: 2, Alpha: 0.1, Steps: 5}
	if at, full := p.EpsilonAt(1, threat), p.EpsilonAt(5, threat); math.Abs(at-0.165) > 1e-9 || math.Abs(full-0.33) > 1e-9 {
		t.Errorf("epsilon beyond the threat's: %v half-way up, then %v", at, full)
	}
}

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
		EMA: 0.99, Clip: 1, Guard: true,
	}
}

func mixture() Recipe {
	return Recipe{
		Batch: 10, Optimiser: Adam{LearningRate: 0.01}, Schedule: Schedule{Kind: "step", Every: 1, Factor: 0.5},
		Phases: []Phase{{Method: "pgd", Epochs: 2, Steps: 2, Alpha: 0.05}}, CleanShare: 0.3,
	}
}
