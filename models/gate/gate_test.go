package gate

import (
	"encoding/json"
	"math"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/interval"
	"github.com/temper-ml/temper/models/nn"
)

var policy = Policy{
	Threat: attack.Threat{Norm: "linf", Epsilon: 0.3}, Attacks: []string{"fgsm", "pgd-20"},
	MinCleanAccuracy: 0.97, MinRobustAccuracy: 0.90,
	MaxCleanRegression: 0.01, MaxRobustRegression: 0.02,
	MinSamples: 1000, Confidence: 0.95,
}

// report is a consistent report of a model with two classes.
func report(samples, clean, robust int) *evaluate.Report {
	r := &evaluate.Report{
		Network: "wong", Dataset: "mnist", DatasetDigest: "sha256:test",
		Threat: policy.Threat, Samples: samples, Confidence: evaluate.Confidence,
		CleanCorrect: clean, RobustCorrect: robust,
		Classes: []evaluate.Class{{Name: "0"}, {Name: "1"}},
		Confusion: evaluate.Confusion{
			Clean:       [][]int{{clean, samples - clean}, {0, 0}},
			Adversarial: [][]int{{robust, samples - robust}, {0, 0}},
		},
		Shape: nn.Shape{Height: 1, Width: 1, Channels: 1},
	}
	n := float64(samples)
	bound := func(k int) float64 { return interval.Lower(k, samples, evaluate.Confidence) }
	r.CleanAccuracy, r.CleanAccuracyLowerBound = float64(clean)/n, bound(clean)
	r.RobustAccuracy, r.RobustAccuracyLowerBound = float64(robust)/n, bound(robust)
	for _, name := range policy.Attacks {
		r.Attacks = append(r.Attacks, evaluate.Attack{
			Name: name, Correct: robust, Accuracy: float64(robust) / n, AccuracyLowerBound: bound(robust),
			Broken: clean - robust, SuccessRate: float64(clean-robust) / float64(clean),
		})
	}
	return r
}

func TestDecide(t *testing.T) {
	for name, c := range map[string]struct {
		candidate, inService *evaluate.Report
		pass                 bool
		failed               string // the rules that fail
	}{
		"good":                       {report(10000, 9900, 9300), nil, true, ""},
		"better than in service":     {report(10000, 9900, 9300), report(10000, 9910, 100), true, ""},
		"not accurate":               {report(10000, 9600, 9300), nil, false, "min_clean_accuracy"},
		"not robust":                 {report(10000, 9900, 8900), nil, false, "min_robust_accuracy"},
		"ten samples":                {report(10, 10, 10), nil, false, "min_samples min_clean_accuracy min_robust_accuracy"},
		"less accurate than service": {report(10000, 9780, 9300), report(10000, 9900, 9300), false, "max_clean_regression"},
		"less robust than service":   {report(10000, 9900, 9300), report(10000, 9900, 9600), false, "max_robust_regression"},
		"a little less than service": {report(10000, 9850, 9300), report(10000, 9900, 9400), true, ""},
		"everything":                 {report(10000, 9000, 5000), report(10000, 9900, 9400), false, "min_clean_accuracy min_robust_accuracy max_clean_regression max_robust_regression"},
	} {
		v, err := Decide(policy, c.candidate, c.inService)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var failed []string
		for _, r := range v.Reasons {
			if !r.Pass {
				failed = append(failed, r.Rule)
			}
		}
		if v.Pass != c.pass || strings.Join(failed, " ") != c.failed {
			t.Errorf("%s: %v because of %q, want %v because of %q", name, v, failed, c.pass, c.failed)
		}
		if want := map[bool]string{true: "pass", false: "fail"}[c.pass]; v.String() != want {
			t.Errorf("%s: %q, want %q", name, v.String(), want)
		}
		if rules := 3; c.inService == nil && len(v.Reasons) != rules || c.inService != nil && len(v.Reasons) != rules+2 {
			t.Errorf("%s: %d reasons", name, len(v.Reasons))
		}
		if data, err := json.Marshal(v); err != nil || !strings.Contains(string(data), `"pass":`) {
			t.Errorf("%s: JSON %s, %v", name, data, err)
		}
	}
}

// 903 of 1,000 is 90.3%, but proves only 88.6%; 9,060 of 10,000 proves 90.1%.
func TestCase51DecisionsAreOnTheLowerBound(t *testing.T) {
	small, err := Decide(policy, report(1000, 1000, 903), nil)
	if err != nil {
		t.Fatal(err)
	}
	large, err := Decide(policy, report(10000, 9990, 9060), nil)
	if err != nil {
		t.Fatal(err)
	}
	if small.Pass || !large.Pass {
		t.Errorf("903 of 1000: %v; 9060 of 10000: %v; want fail, pass", small, large)
	}
}

func TestCase50TenSamplesAreRefused(t *testing.T) {
	lenient := policy
	lenient.MinCleanAccuracy, lenient.MinRobustAccuracy = 0, 0
	if v, err := Decide(lenient, report(10, 10, 10), nil); err != nil || v.Pass {
		t.Errorf("ten samples: %v, %v", v, err)
	}
}

// Where figures cannot be judged there is an error, and never a pass.
func TestWhatCannotBeJudged(t *testing.T) {
	good := report(10000, 9900, 9300)
	changed := func(f func(*evaluate.Report)) *evaluate.Report {
		r := report(10000, 9900, 9300)
		f(r)
		return r
	}
	added := func(name, madeOn string) *evaluate.Report {
		return changed(func(r *evaluate.Report) {
			a := r.Attacks[0]
			a.Name, a.MadeOn = name, madeOn
			r.Attacks = append(r.Attacks, a)
		})
	}
	for want, c := range map[string]struct{ candidate, inService *evaluate.Report }{
		"there is no report":                     {nil, nil},
		"samples is absent":                      {&evaluate.Report{}, nil},
		"clean_accuracy":                         {changed(func(r *evaluate.Report) { r.CleanAccuracy = 0 }), nil},
		"lower bound of robust_accuracy":         {changed(func(r *evaluate.Report) { r.RobustAccuracyLowerBound = 0.99 }), nil},
		"robust_accuracy is NaN":                 {changed(func(r *evaluate.Report) { r.RobustAccuracy = math.NaN() }), nil},
		"about linf epsilon 0.15":                {changed(func(r *evaluate.Report) { r.Threat.Epsilon = 0.15 }), nil},
		"no attack pgd-20":                       {changed(func(r *evaluate.Report) { r.Attacks = r.Attacks[:1] }), nil},
		"no attack fgsm":                         {changed(func(r *evaluate.Report) { r.Attacks[0].MadeOn = "sha256:other" }), nil},
		"model in service: report":               {good, &evaluate.Report{}},
		"evaluate both on the same":              {good, changed(func(r *evaluate.Report) { r.DatasetDigest = "sha256:other" })},
		"service under fgsm, pgd-20, pgd-50: ":   {good, added("pgd-50", "")},
		"evaluated under fgsm, noise, pgd-20, ":  {added("noise", ""), good},
		"service under fgsm, fgsm (transferred)": {good, added("fgsm", "sha256:old")},
		"evaluated under fgsm, fgsm (transferre": {added("fgsm", "sha256:old"), good},
		"the model in service on 5000 of sha256": {good, report(5000, 4990, 4700)},
	} {
		v, err := Decide(policy, c.candidate, c.inService)
		if err == nil || !strings.Contains(err.Error(), want) || v.Pass || v.String() != "fail" {
			t.Errorf("%v, error %v, want %q", v, err, want)
		}
	}
	// Each was attacked by what was made on the model before it.
	if v, err := Decide(policy, added("fgsm", "sha256:a"), added("fgsm", "sha256:b")); err != nil || !v.Pass {
		t.Errorf("both under a transferred attack: %v, %v", v, err)
	}
	if v, err := Decide(Policy{}, good, nil); err == nil || v.Pass {
		t.Errorf("the zero policy: %v, %v", v, err)
	}
}

func TestCase50PolicyMustAskForEnough(t *testing.T) {
	for want, change := range map[string]func(*Policy){
		"min_samples is 999: must be at least 1000": func(p *Policy) { p.MinSamples = 999 },
		"confidence is 0.94: must be 0.95 or more":  func(p *Policy) { p.Confidence = 0.94 },
		"confidence is 1: must be 0.95 or more":     func(p *Policy) { p.Confidence = 1 },
		"confidence is NaN":                         func(p *Policy) { p.Confidence = math.NaN() },
	} {
		p := policy
		change(&p)
		if err := p.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

// Whatever the figures: nothing with NaN passes, and what passes holds the
// thresholds.
func FuzzDecide(f *testing.F) {
	f.Add(0.97, 0.9, 0.01, 0.02, 0.95, 0.3, 1000, 10000, 9900, 9300, math.NaN(), uint8(0))
	f.Add(0.97, 0.9, 0.01, 0.02, 0.95, 0.3, 1000, 10000, 9900, 9300, 0.5, uint8(255))
	f.Add(math.NaN(), 0.9, 0.01, 0.02, 0.95, 0.3, 1, 10000, 9900, 9300, 0.99, uint8(1))
	f.Add(0.0, 0.0, 1.0, 1.0, 0.5, 0.3, 1, 1, 1, 1, math.NaN(), uint8(3))
	f.Fuzz(func(t *testing.T, minClean, minRobust, dropClean, dropRobust, confidence, epsilon float64, minSamples, samples, clean, robust int, planted float64, where uint8) {
		if samples < 1 || samples > 20000 || clean < 1 || clean > samples || robust < 0 || robust > clean {
			return
		}
		p := Policy{
			Threat: attack.Threat{Norm: "linf", Epsilon: epsilon}, Attacks: []string{"fgsm"},
			MinCleanAccuracy: minClean, MinRobustAccuracy: minRobust, MaxCleanRegression: dropClean, MaxRobustRegression: dropRobust,
			MinSamples: minSamples, Confidence: confidence,
		}
		r := report(samples, clean, robust)
		r.Threat = p.Threat
		inService := report(samples, clean, robust)
		inService.Threat = p.Threat
		spots := []*float64{&r.CleanAccuracy, &r.CleanAccuracyLowerBound, &r.RobustAccuracy, &r.RobustAccuracyLowerBound, &r.Confidence, &r.Threat.Epsilon,
			&r.Attacks[0].Accuracy, &r.Attacks[0].AccuracyLowerBound, &r.Attacks[0].SuccessRate, &inService.RobustAccuracy, &inService.CleanAccuracyLowerBound}
		isPlanted := int(where) < len(spots)
		if isPlanted {
			*spots[where] = planted
		}
		v, err := Decide(p, r, inService)
		if !v.Pass {
			return
		}
		for _, x := range []float64{minClean, minRobust, dropClean, dropRobust, confidence, epsilon} {
			if math.IsNaN(x) {
				t.Errorf("passes with a policy of NaN: %+v", p)
			}
		}
		if isPlanted && math.IsNaN(planted) {
			t.Errorf("passes with a NaN in figure %d", where)
		}
		if err != nil || samples < minSamples || interval.Lower(clean, samples, confidence) < minClean || interval.Lower(robust, samples, confidence) < minRobust {
			t.Errorf("passes: %v, %+v, %d clean and %d robust of %d", err, p, clean, robust, samples)
		}
	})
}

// checked is a report of the standard suite whose checks all pass.
func checked() *evaluate.Report {
	r := report(10000, 9900, 9300)
	r.Suite = "standard"
	for name, figures := range map[string]map[string]float64{
		"threat_model":                  {"stated": 1},
		"iterative_is_stronger":         {"fgsm": 0.95, "pgd-20": 0.93},
		"monotone_in_epsilon":           {"rise": 0, "epsilons": 8},
		"unbounded_attack_wins":         {"half": 0.02, "whole": 0, "chance": 0.1},
		"converged":                     {"drop": 0.002},
		"noise_is_weaker":               {"noise": 0.97, "pgd-20": 0.93, "clean": 0.99},
		"gradient_free_is_weaker":       {"drop": 0.001, "escalated_drop": 0.5, "escalated_samples": 40},
		"not_the_training_attack_alone": {"kinds": 3},
		"deterministic":                 {"difference": 0},
		"logits":                        {"probabilities": 0},
		"gradients":                     {"zero": 0},
		"classes":                       {"classes": 10},
		"samples":                       {"samples": 10000},
		"disjoint":                      {"overlap": 0},
		"labels":                        {"confused_classes": 0},
	} {
		r.Checks = append(r.Checks, evaluate.Check{Name: name, Pass: true, Figures: figures})
	}
	return r
}

// The gate judges a report's checks itself, by the policy's thresholds, and
// refuses on any that fails or is absent.
func TestCase46Case47Case48Case49Case50ChecksDecide(t *testing.T) {
	p := policy
	p.Suite = "standard"
	limits := evaluate.DefaultThresholds()
	p.Checks = &limits
	if v, err := Decide(p, checked(), nil); err != nil || !v.Pass {
		t.Fatalf("all checks pass: %v, %v", v, err)
	}
	spoil := func(name, figure string, value float64) *evaluate.Report {
		r := checked()
		for _, c := range r.Checks {
			if c.Name == name {
				c.Figures[figure] = value
				return r
			}
		}
		t.Fatalf("no check %s", name)
		return nil
	}
	spoil2 := func(name, figure string, value float64, other string, second float64) *evaluate.Report {
		r := spoil(name, figure, value)
		for _, c := range r.Checks {
			if c.Name == name {
				c.Figures[other] = second
			}
		}
		return r
	}
	if v, err := Decide(p, spoil2("gradient_free_is_weaker", "drop", 0.025, "escalated_drop", 0.02), nil); err != nil || !v.Pass {
		t.Errorf("Square beats gradients honestly: %v, %v", v, err)
	}
	for what, c := range map[string]struct {
		r    *evaluate.Report
		rule string
	}{
		"threat model not stated":         {spoil("threat_model", "stated", 0), "threat_model"},
		"one step is stronger":            {spoil("iterative_is_stronger", "fgsm", 0.9), "iterative_is_stronger"},
		"accuracy rises":                  {spoil("monotone_in_epsilon", "rise", 0.02), "monotone_in_epsilon"},
		"few epsilons":                    {spoil("monotone_in_epsilon", "epsilons", 7), "monotone_in_epsilon"},
		"grey is recognised (Case49)":     {spoil("unbounded_attack_wins", "half", 0.2), "unbounded_attack_wins"},
		"anything is right (Case49)":      {spoil("unbounded_attack_wins", "whole", 0.05), "unbounded_attack_wins"},
		"not converged":                   {spoil("converged", "drop", 0.01), "converged"},
		"noise is stronger":               {spoil("noise_is_weaker", "noise", 0.9), "noise_is_weaker"},
		"noise is as strong":              {spoil("noise_is_weaker", "noise", 0.93), "noise_is_weaker"},
		"Square is stronger (Case47)":     {spoil("gradient_free_is_weaker", "drop", 0.2), "gradient_free_is_weaker"},
		"Square finds more and more":      {spoil2("gradient_free_is_weaker", "drop", 0.02, "escalated_drop", 0.2), "gradient_free_is_weaker"},
		"one kind of attack":              {spoil("not_the_training_attack_alone", "kinds", 1), "not_the_training_attack_alone"},
		"random answers (Case48)":         {spoil("deterministic", "difference", 0.01), "deterministic"},
		"probabilities (Case48)":          {spoil("logits", "probabilities", 1), "logits"},
		"no gradients (Case47)":           {spoil("gradients", "zero", 0.5), "gradients"},
		"three classes":                   {spoil("classes", "classes", 3), "classes"},
		"ten samples (Case50)":            {spoil("samples", "samples", 10), "samples"},
		"train and test overlap (Case50)": {spoil("disjoint", "overlap", 0.1), "disjoint"},
		"permuted labels (Case50)":        {spoil("labels", "confused_classes", 10), "labels"},
		"a figure that is no number":      {spoil("converged", "drop", math.NaN()), ""},
	} {
		v, err := Decide(p, c.r, nil)
		if c.rule == "" {
			if err == nil {
				t.Errorf("%s: %v", what, v)
			}
			continue
		}
		if err != nil || v.Pass {
			t.Errorf("%s: %v, %v", what, v, err)
		}
		for _, r := range v.Reasons {
			if r.Pass == (r.Rule == "checks."+c.rule) {
				t.Errorf("%s: %v", what, r)
			}
		}
	}
	for i, c := range checked().Checks { // each of them absent, though it says that it passes
		r := checked()
		r.Checks = append(r.Checks[:i:i], r.Checks[i+1:]...)
		if v, err := Decide(p, r, nil); err != nil || v.Pass {
			t.Errorf("without %s: %v, %v", c.Name, v, err)
		}
		r = checked()
		clear(r.Checks[i].Figures)
		if v, err := Decide(p, r, nil); err != nil || v.Pass {
			t.Errorf("%s without figures: %v, %v", c.Name, v, err)
		}
	}
	r := checked()
	r.Suite = ""
	if v, err := Decide(p, r, nil); err == nil || v.Pass {
		t.Errorf("without the suite: %v, %v", v, err)
	}
	limits.Transfer = true
	if v, err := Decide(p, checked(), nil); err != nil || v.Pass {
		t.Errorf("without the transfer that the policy asks for: %v, %v", v, err)
	}
	limits.MaxRise = math.NaN()
	if err := p.Validate(); err == nil {
		t.Error("a threshold that is no number is accepted")
	}
	p.Checks, p.Suite = &evaluate.Thresholds{MinSamples: 1}, ""
	if err := p.Validate(); err == nil || !strings.Contains(err.Error(), "need a suite") {
		t.Errorf("checks without a suite: %v", err)
	}
}

// Decisions are on lower bounds, for clean and robust accuracy, and against the
// model in service.
func TestCase51DecisionsOnLowerBounds(t *testing.T) {
	for what, c := range map[string]struct {
		candidate, inService *evaluate.Report
		pass                 bool
	}{
		"robust accuracy above the floor, its bound not": {report(1000, 995, 905), nil, false},
		"the same share of ten times the samples":        {report(10000, 9950, 9060), nil, true},
		"clean accuracy above the floor, its bound not":  {report(1000, 975, 950), nil, false},
		"weaker than in service":                         {report(10000, 9950, 9200), report(10000, 9950, 9600), false},
		"as in service":                                  {report(10000, 9950, 9200), report(10000, 9950, 9210), true},
	} {
		if v, err := Decide(policy, c.candidate, c.inService); err != nil || v.Pass != c.pass {
			t.Errorf("%s: %v, %v", what, v, err)
		}
	}
}
