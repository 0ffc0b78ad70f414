package evaluate

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// Check is one rule that a figure of robustness must satisfy to be believed.
// It is judged by its figures alone, so that whoever reads a report can judge
// again, by thresholds of their own.
type Check struct {
	Name    string             `json:"name"`
	Pass    bool               `json:"pass"`
	Rule    string             `json:"rule"` // in words, with the thresholds
	Figures map[string]float64 `json:"figures"`
}

// Thresholds are what the checks' figures are compared with; all are shares
// from 0 to 1 but the number of samples.
type Thresholds struct {
	MaxRise          float64 `yaml:"max_rise" json:"max_rise"`                     // of accuracy from one epsilon to a greater one
	MaxUnbounded     float64 `yaml:"max_unbounded" json:"max_unbounded"`           // accuracy where every image is allowed
	MaxUnconverged   float64 `yaml:"max_unconverged" json:"max_unconverged"`       // of the samples, broken only by twice the iterations
	MaxSquareDrop    float64 `yaml:"max_square_drop" json:"max_square_drop"`       // of accuracy by Square after the attacks with gradients, without escalation
	MaxEscalatedDrop float64 `yaml:"max_escalated_drop" json:"max_escalated_drop"` // of what is left, by Square with five times the queries
	MaxMaskedDrop    float64 `yaml:"max_masked_drop" json:"max_masked_drop"`       // of accuracy by Square, in any case
	MaxZeroGradients float64 `yaml:"max_zero_gradients" json:"max_zero_gradients"` // of the samples
	MaxOverlap       float64 `yaml:"max_overlap" json:"max_overlap"`               // of the samples, in the training set too
	MinSamples       int     `yaml:"min_samples" json:"min_samples"`
	Transfer         bool    `yaml:"transfer,omitempty" json:"transfer,omitempty"` // examples made on another model must have been tried
}

// DefaultThresholds are those of the literature where it has some: 0.2 points
// for Square and the zero gradients are AutoAttack's flags.
func DefaultThresholds() Thresholds {
	return Thresholds{
		MaxRise:          0.005, // two or three of 500 samples, for other random starts
		MaxUnbounded:     0.01,
		MaxUnconverged:   0.005,
		MaxSquareDrop:    0.002,
		MaxEscalatedDrop: 0.05, // two of the 50 samples that it is tried on
		MaxMaskedDrop:    0.1,  // robust MNIST networks lose 1 to 3 points, masked gradients tens
		MaxZeroGradients: 0.01,
		MaxOverlap:       0.001, // published sets hold a few duplicates
		MinSamples:       1000,
	}
}

// Validate names what is wrong.
func (t Thresholds) Validate() error {
	for _, f := range []struct {
		key   string
		value float64
	}{
		{"max_rise", t.MaxRise}, {"max_unbounded", t.MaxUnbounded}, {"max_unconverged", t.MaxUnconverged}, {"max_square_drop", t.MaxSquareDrop},
		{"max_escalated_drop", t.MaxEscalatedDrop}, {"max_masked_drop", t.MaxMaskedDrop}, {"max_zero_gradients", t.MaxZeroGradients}, {"max_overlap", t.MaxOverlap},
	} {
		if !(f.value >= 0 && f.value <= 1) {
			return fmt.Errorf("checks: %s is %v: must be a fraction from 0 to 1", f.key, f.value)
		}
	}
	if t.MinSamples < 1 {
		return fmt.Errorf("checks: min_samples is %d: must be at least 1", t.MinSamples)
	}
	return nil
}

// sameOutputs is how much the outputs to one image may differ from call to
// call, and minTargeted the classes that the targeted loss needs: AutoAttack's.
const (
	sameOutputs = 1e-4
	minTargeted = 4
)

// fewestOfAClass samples tell more than chance what a class is taken for.
const fewestOfAClass = 10

// rule is one check.
type rule struct {
	name    string
	text    func(t Thresholds) string
	figures []string // that it needs
	pass    func(f map[string]float64, t Thresholds) bool
	asked   func(t Thresholds) bool // nil: always
}

func points(share float64) string { return fmt.Sprintf("%.4g points", 100*share) }

func fixed(text string) func(Thresholds) string { return func(Thresholds) string { return text } }

// rules are the checks, in the order of ROBUSTNESS.md section 4.
var rules = []rule{
	{
		name: "threat_model", text: fixed("norm, epsilon, box and preprocessing are stated"), figures: []string{"stated"},
		pass: func(f map[string]float64, _ Thresholds) bool { return f["stated"] == 1 },
	}, {
		name: "iterative_is_stronger", text: fixed("accuracy under FGSM is at least that under PGD-20"), figures: []string{"fgsm", "pgd-20"},
		pass: func(f map[string]float64, _ Thresholds) bool { return f["fgsm"] >= f["pgd-20"] },
	}, {
		name: "monotone_in_epsilon",
		text: func(t Thresholds) string {
			return "accuracy under PGD-20 rises by at most " + points(t.MaxRise) + " from one of at least 8 epsilons to the next"
		},
		figures: []string{"rise", "epsilons"},
		pass:    func(f map[string]float64, t Thresholds) bool { return f["rise"] <= t.MaxRise && f["epsilons"] >= 8 },
	}, {
		name: "unbounded_attack_wins",
		text: func(t Thresholds) string {
			return fmt.Sprintf("accuracy is at most chance where every image can become grey, and at most %v where it can become any other", t.MaxUnbounded)
		},
		figures: []string{"half", "whole", "chance"},
		pass: func(f map[string]float64, t Thresholds) bool {
			return f["half"] <= f["chance"] && f["whole"] <= t.MaxUnbounded
		},
	}, {
		name: "converged",
		text: func(t Thresholds) string {
			return "twice the iterations break at most " + points(t.MaxUnconverged) + " more"
		},
		figures: []string{"drop"},
		pass:    func(f map[string]float64, t Thresholds) bool { return f["drop"] <= t.MaxUnconverged },
	}, {
		name: "noise_is_weaker", text: fixed("100 random draws break fewer than PGD-20"), figures: []string{"noise", "pgd-20", "clean"},
		pass: func(f map[string]float64, _ Thresholds) bool {
			return f["noise"] > f["pgd-20"] || f["noise"] == f["pgd-20"] && f["noise"] == f["clean"]
		},
	}, {
		name: "gradient_free_is_weaker",
		text: func(t Thresholds) string {
			return "Square after the attacks with gradients takes less than " + points(t.MaxSquareDrop) + "; otherwise five times the queries break at most " + points(t.MaxEscalatedDrop) + " of what is left, and Square takes at most " + points(t.MaxMaskedDrop)
		},
		figures: []string{"drop", "escalated_drop", "escalated_samples"},
		pass: func(f map[string]float64, t Thresholds) bool {
			return f["drop"] < t.MaxSquareDrop || f["drop"] <= t.MaxMaskedDrop && f["escalated_samples"] > 0 && f["escalated_drop"] <= t.MaxEscalatedDrop
		},
	}, {
		name: "transfer_is_weaker", text: fixed("PGD-20 made on another model breaks no more than PGD-20 made on this one"), figures: []string{"transferred", "pgd-20"},
		pass:  func(f map[string]float64, _ Thresholds) bool { return f["transferred"] >= f["pgd-20"] },
		asked: func(t Thresholds) bool { return t.Transfer },
	}, {
		name: "not_the_training_attack_alone", text: fixed("at least two of APGD-T, FAB-T and Square were tried"), figures: []string{"kinds"},
		pass: func(f map[string]float64, _ Thresholds) bool { return f["kinds"] >= 2 },
	}, {
		name: "deterministic", text: fixed("five answers to the same image are the same"), figures: []string{"difference"},
		pass: func(f map[string]float64, _ Thresholds) bool { return f["difference"] <= sameOutputs },
	}, {
		name: "logits", text: fixed("the outputs are logits, not probabilities"), figures: []string{"probabilities"},
		pass: func(f map[string]float64, _ Thresholds) bool { return f["probabilities"] < 0.5 },
	}, {
		name: "gradients",
		text: func(t Thresholds) string {
			return "the loss has no gradient at all on at most " + points(t.MaxZeroGradients) + " of the samples"
		},
		figures: []string{"zero"},
		pass:    func(f map[string]float64, t Thresholds) bool { return f["zero"] <= t.MaxZeroGradients },
	}, {
		name: "classes", text: fixed(fmt.Sprintf("there are at least %d classes, as the targeted loss needs", minTargeted)), figures: []string{"classes"},
		pass: func(f map[string]float64, _ Thresholds) bool { return f["classes"] >= minTargeted },
	}, {
		name:    "samples",
		text:    func(t Thresholds) string { return fmt.Sprintf("there are at least %d samples", t.MinSamples) },
		figures: []string{"samples"},
		pass:    func(f map[string]float64, t Thresholds) bool { return f["samples"] >= float64(t.MinSamples) },
	}, {
		name: "disjoint",
		text: func(t Thresholds) string {
			return "at most " + points(t.MaxOverlap) + " of the samples are in the training set"
		},
		figures: []string{"overlap"},
		pass:    func(f map[string]float64, t Thresholds) bool { return f["overlap"] <= t.MaxOverlap },
	}, {
		name: "labels", text: fixed("of every class most samples are taken for that class: the labels are not permuted"), figures: []string{"confused_classes"},
		pass: func(f map[string]float64, _ Thresholds) bool { return f["confused_classes"] == 0 },
	},
}

// CheckNames lists the checks that thresholds ask for.
func (t Thresholds) CheckNames() []string {
	var names []string
	for _, r := range rules {
		if r.asked == nil || r.asked(t) {
			names = append(names, r.name)
		}
	}
	return names
}

// Judge is the check by other thresholds. A check that is unknown, or lacks a
// figure, fails.
func (t Thresholds) Judge(c Check) Check {
	at := slices.IndexFunc(rules, func(r rule) bool { return r.name == c.Name })
	if at < 0 {
		c.Pass, c.Rule = false, "there is no such check"
		return c
	}
	r := rules[at]
	c.Rule, c.Pass = r.text(t), true
	for _, name := range r.figures {
		if v, ok := c.Figures[name]; !ok || math.IsNaN(v) || math.IsInf(v, 0) {
			c.Pass = false
		}
	}
	c.Pass = c.Pass && r.pass(c.Figures, t)
	return c
}

func (c Check) String() string { return c.Name + ": " + c.Text() }

// Text is the rule with the check's figures, for people.
func (c Check) Text() string {
	var figures []string
	for name, v := range c.Figures {
		figures = append(figures, fmt.Sprintf("%s %.4g", name, v))
	}
	slices.Sort(figures)
	return fmt.Sprintf("%s (%s)", c.Rule, strings.Join(figures, ", "))
}

func (c Check) validate() error {
	if c.Name == "" || len(c.Name) > 100 || len(c.Rule) > 1000 || len(c.Figures) > 100 {
		return fmt.Errorf("check %.100q is impossible", c.Name)
	}
	for name, v := range c.Figures {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return fmt.Errorf("check %s: %s is %v", c.Name, name, v)
		}
	}
	return nil
}

// checks gathers the figures and judges.
func (w *whole) checks(r *Report, t Thresholds) []Check {
	f := map[string]map[string]float64{}
	set := func(check, figure string, v float64) {
		if f[check] == nil {
			f[check] = map[string]float64{}
		}
		f[check][figure] = v
	}
	stated := 0.0
	if r.Threat.Validate() == nil && r.Preprocessing != "" {
		stated = 1
	}
	set("threat_model", "stated", stated)
	set("threat_model", "epsilon", r.Threat.Epsilon)

	few := w.plan.CheckSamples
	set("noise_is_weaker", "clean", fraction(countRight(w.clean[:few], w.labels[:few]), few))
	rise, epsilons, before := 0.0, 0, 1.0
	white, kinds := r.CleanAccuracy, 0
	left := -1 // the last trial of the suite
	for i, trial := range w.plan.Trials {
		share := w.share(i)
		switch {
		case trial.For == "suite":
			left = i
			if trial.Attack != "apgd-ce" {
				kinds++
			}
			if trial.Attack == "square" {
				set("gradient_free_is_weaker", "drop", white-share)
			} else {
				white = share
			}
		case trial.For == "curve" && trial.Attack == "pgd-20":
			if epsilons++; epsilons > 1 {
				rise = max(rise, share-before)
			}
			before = share
			if nearly(trial.Epsilon, r.Threat.Epsilon) {
				for _, name := range []string{"iterative_is_stronger", "noise_is_weaker", "transfer_is_weaker"} {
					set(name, "pgd-20", share)
				}
			}
		case trial.For == "curve" && nearly(trial.Epsilon, r.Threat.Epsilon):
			set("iterative_is_stronger", "fgsm", share)
		case trial.For != "check":
		case trial.MadeOn != "":
			set("transfer_is_weaker", "transferred", share)
		case trial.Attack == noiseAttack:
			set("noise_is_weaker", "noise", share)
		case trial.Attack == unboundedAttack:
			which := "half"
			if trial.After >= 0 {
				which = "whole"
			}
			set("unbounded_attack_wins", which, share)
			set("unbounded_attack_wins", "chance", 1/float64(len(w.plan.Classes)))
		case trial.Attack == convergedAttack:
			set("converged", "drop", w.drop(left, i))
		case trial.Attack == escalatedAttack:
			n := len(w.answers[i])
			was := countRight(w.answers[left][:n], w.labels[:n])
			set("gradient_free_is_weaker", "escalated_samples", float64(was))
			set("gradient_free_is_weaker", "escalated_drop", fraction(was-countRight(w.answers[i], w.labels[:n]), was))
		}
	}
	set("monotone_in_epsilon", "rise", rise)
	set("monotone_in_epsilon", "epsilons", float64(epsilons))
	set("not_the_training_attack_alone", "kinds", float64(kinds))
	set("deterministic", "difference", w.signs.Difference)
	set("logits", "probabilities", fraction(w.signs.Probabilities, w.signs.Tried))
	set("gradients", "zero", fraction(w.signs.ZeroGradients, w.signs.Tried))
	set("classes", "classes", float64(len(w.plan.Classes)))
	set("samples", "samples", float64(r.Samples))
	if w.signs.Disjoint {
		set("disjoint", "overlap", fraction(w.signs.Trained, r.Samples))
	}
	confused := 0
	for label, row := range r.Confusion.Clean {
		total := 0
		for _, n := range row {
			total += n
		}
		if total >= fewestOfAClass && row[label] < slices.Max(row) {
			confused++
		}
	}
	set("labels", "confused_classes", float64(confused))

	var all []Check
	for _, rule := range rules {
		if figures, ok := f[rule.name]; ok && (rule.name != "transfer_is_weaker" || len(figures) == len(rule.figures)) {
			all = append(all, t.Judge(Check{Name: rule.name, Figures: figures}))
		}
	}
	return all
}

// drop is the share of the samples of a trial that it broke and the one before
// it did not.
func (w *whole) drop(before, trial int) float64 {
	n := len(w.answers[trial])
	return fraction(countRight(w.answers[before][:n], w.labels[:n])-countRight(w.answers[trial], w.labels[:n]), n)
}

func nearly(a, b float64) bool { return math.Abs(a-b) <= 1e-9 }
