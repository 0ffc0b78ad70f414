// Package gate decides whether a model may be promoted: a pure function of a
// policy, the model's evaluation report and that of the model in service.
package gate

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/interval"
	"github.com/temper-ml/temper/models/unknown"
)

// Policy says what a model must prove. Accuracies are fractions from 0 to 1
// and are compared with one-sided lower bounds, never with the accuracies
// themselves. The zero value passes nothing.
type Policy struct {
	Threat  attack.Threat `yaml:"threat,omitempty" json:"threat"` // the report must be about exactly this one; a zoo file gives it once for all
	Attacks []string      `yaml:"attacks" json:"attacks"`         // white-box attacks that the report must have

	// Suite is the ensemble of attacks that the report must have, "" for none,
	// and Checks are what the report's checks must satisfy, nil for none asked.
	Suite  string               `yaml:"suite,omitempty" json:"suite,omitempty"`
	Checks *evaluate.Thresholds `yaml:"checks,omitempty" json:"checks,omitempty"`

	MinCleanAccuracy  float64 `yaml:"min_clean_accuracy" json:"min_clean_accuracy"`
	MinRobustAccuracy float64 `yaml:"min_robust_accuracy" json:"min_robust_accuracy"` // worst case over all attacks of the report

	// MinCertified is of what is proven for every image within the threat, by
	// models/certify; 0 asks for no proof.
	MinCertified float64 `yaml:"min_certified,omitempty" json:"min_certified,omitempty"`

	// How far each lower bound may be below that of the model in service.
	MaxCleanRegression  float64 `yaml:"max_clean_regression" json:"max_clean_regression"`
	MaxRobustRegression float64 `yaml:"max_robust_regression" json:"max_robust_regression"`

	MinSamples int     `yaml:"min_samples" json:"min_samples"`
	Confidence float64 `yaml:"confidence" json:"confidence"` // of the lower bounds, such as 0.95
}

// The least that a policy may ask for: with less, chance decides.
const (
	minSamples    = 1000
	minConfidence = 0.95
)

// Validate reports what is wrong with the policy, naming the key.
func (p Policy) Validate() error {
	if err := p.Threat.Validate(); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	if len(p.Attacks) == 0 && p.Suite == "" {
		return errors.New("policy: attacks is empty: name at least one that the report must have, or a suite")
	}
	if p.Suite != "" && !slices.Contains(evaluate.Suites(), p.Suite) {
		return fmt.Errorf("policy: suite: %w", unknown.Name("suite", p.Suite, evaluate.Suites()))
	}
	if p.Checks != nil {
		if err := p.Checks.Validate(); err != nil {
			return fmt.Errorf("policy: %w", err)
		}
		if p.Suite == "" {
			return errors.New("policy: checks need a suite: name it")
		}
	}
	for _, spec := range p.Attacks {
		a, err := attack.Parse(spec, p.Threat)
		if err != nil {
			return fmt.Errorf("policy: attacks: %w", err)
		}
		if a.Name() != spec { // reports have the short name
			return fmt.Errorf("policy: attacks: write %s as %s", spec, a.Name())
		}
	}
	for _, f := range []struct {
		key   string
		value float64
	}{
		{"min_clean_accuracy", p.MinCleanAccuracy},
		{"min_robust_accuracy", p.MinRobustAccuracy},
		{"min_certified", p.MinCertified},
		{"max_clean_regression", p.MaxCleanRegression},
		{"max_robust_regression", p.MaxRobustRegression},
	} {
		if !(f.value >= 0 && f.value <= 1) { // false for NaN too
			return fmt.Errorf("policy: %s is %v: must be a fraction from 0 to 1", f.key, f.value)
		}
	}
	if p.MinCertified > 0 && p.Threat.Norm != "linf" {
		return fmt.Errorf("policy: min_certified is %v, but the threat is in %s: a proof is known for linf only", p.MinCertified, p.Threat.Norm)
	}
	if p.MinSamples < minSamples {
		return fmt.Errorf("policy: min_samples is %d: must be at least %d", p.MinSamples, minSamples)
	}
	if !(p.Confidence >= minConfidence && p.Confidence < 1) {
		return fmt.Errorf("policy: confidence is %v: must be %v or more and below 1", p.Confidence, minConfidence)
	}
	return nil
}

// Verdict is the decision and what led to it.
type Verdict struct {
	Pass    bool     `json:"pass"`
	Reasons []Reason `json:"reasons"`
}

// String is "pass" or "fail": what workflows compare.
func (v Verdict) String() string {
	if v.Pass {
		return "pass"
	}
	return "fail"
}

// Reason is one rule of the policy with the figure it was applied to.
type Reason struct {
	Rule      string  `json:"rule"` // the policy's key
	Figure    float64 `json:"figure"`
	Threshold float64 `json:"threshold"` // the figure must be at least this
	Pass      bool    `json:"pass"`
	Text      string  `json:"text"`
}

func (r Reason) String() string {
	if r.Pass {
		return "pass: " + r.Text
	}
	return "fail: " + r.Text
}

// Decide applies the policy. inService is nil where nothing is in service yet;
// the rules on regression then do not apply. The error is for what cannot be
// judged (an invalid policy or report, another threat model, reports that
// cannot be compared); the verdict is then never a pass.
func Decide(p Policy, candidate, inService *evaluate.Report) (Verdict, error) {
	if err := p.Validate(); err != nil {
		return Verdict{}, err
	}
	if err := p.accepts(candidate); err != nil {
		return Verdict{}, fmt.Errorf("gate: candidate: %w", err)
	}
	if p.MinCertified > 0 && candidate.Certified == nil {
		return Verdict{}, errors.New("gate: candidate: the report has no certified accuracy, which the policy requires: evaluate with --certify")
	}
	clean := interval.Lower(candidate.CleanCorrect, candidate.Samples, p.Confidence)
	robust := interval.Lower(candidate.RobustCorrect, candidate.Samples, p.Confidence)

	v := Verdict{Pass: true}
	rule := func(name string, figure, threshold float64, format string, args ...any) {
		pass := figure >= threshold // false for NaN too
		v.Pass = v.Pass && pass
		v.Reasons = append(v.Reasons, Reason{name, figure, threshold, pass, fmt.Sprintf(format, args...)})
	}
	rule("min_samples", float64(candidate.Samples), float64(p.MinSamples),
		"%d samples, at least %d wanted", candidate.Samples, p.MinSamples)
	rule("min_clean_accuracy", clean, p.MinCleanAccuracy,
		"clean accuracy at least %.4f (%d of %d), %.4f wanted", clean, candidate.CleanCorrect, candidate.Samples, p.MinCleanAccuracy)
	rule("min_robust_accuracy", robust, p.MinRobustAccuracy,
		"robust accuracy at least %.4f (%d of %d), %.4f wanted", robust, candidate.RobustCorrect, candidate.Samples, p.MinRobustAccuracy)
	if p.MinCertified > 0 {
		proven := interval.Lower(candidate.CertifiedCorrect, candidate.Samples, p.Confidence)
		rule("min_certified", proven, p.MinCertified,
			"certified accuracy at least %.4f (%d of %d), %.4f wanted", proven, candidate.CertifiedCorrect, candidate.Samples, p.MinCertified)
	}
	for _, reason := range p.JudgeChecks(candidate.Checks) {
		v.Pass = v.Pass && reason.Pass
		v.Reasons = append(v.Reasons, reason)
	}
	if inService == nil {
		return v, nil
	}
	if err := p.accepts(inService); err != nil {
		return Verdict{}, fmt.Errorf("gate: model in service: %w", err)
	}
	if err := sameMeasure(candidate, inService); err != nil {
		return Verdict{}, fmt.Errorf("gate: %w", err)
	}
	was := interval.Lower(inService.CleanCorrect, inService.Samples, p.Confidence)
	rule("max_clean_regression", clean, was-p.MaxCleanRegression,
		"clean accuracy at least %.4f, at least %.4f in service, may fall by %.4f", clean, was, p.MaxCleanRegression)
	was = interval.Lower(inService.RobustCorrect, inService.Samples, p.Confidence)
	rule("max_robust_regression", robust, was-p.MaxRobustRegression,
		"robust accuracy at least %.4f, at least %.4f in service, may fall by %.4f", robust, was, p.MaxRobustRegression)
	return v, nil
}

// JudgeChecks is a reason for each check that the policy asks for, judged by the
// policy's thresholds. One that is not among those that were made fails.
func (p Policy) JudgeChecks(made []evaluate.Check) []Reason {
	if p.Checks == nil {
		return nil
	}
	var reasons []Reason
	for _, name := range p.Checks.CheckNames() {
		reason := Reason{Rule: "checks." + name, Threshold: 1, Text: "the report has no such check"}
		if i := slices.IndexFunc(made, func(c evaluate.Check) bool { return c.Name == name }); i >= 0 {
			c := p.Checks.Judge(made[i])
			reason.Pass, reason.Text = c.Pass, c.Text()
		}
		if reason.Pass {
			reason.Figure = 1
		}
		reasons = append(reasons, reason)
	}
	return reasons
}

// accepts refuses a report that does not answer the policy's question.
func (p Policy) accepts(r *evaluate.Report) error {
	if r == nil {
		return errors.New("there is no report")
	}
	if err := r.Validate(); err != nil {
		return err
	}
	if r.Threat != p.Threat {
		return fmt.Errorf("the report is about %s epsilon %v, the policy about %s epsilon %v", r.Threat.Norm, r.Threat.Epsilon, p.Threat.Norm, p.Threat.Epsilon)
	}
	if p.Suite != "" && r.Suite != p.Suite {
		return fmt.Errorf("the report is of suite %q, the policy requires %s", r.Suite, p.Suite)
	}
	for _, spec := range p.Attacks {
		if !has(r, spec) {
			return fmt.Errorf("the report has no attack %s, which the policy requires", spec)
		}
	}
	return nil
}

// has reports whether the report has a white-box attack.
func has(r *evaluate.Report, name string) bool {
	return slices.ContainsFunc(r.Attacks, func(a evaluate.Attack) bool { return a.Name == name && a.MadeOn == "" })
}

// sameMeasure refuses reports whose figures do not mean the same: lower bounds
// differ with the number of samples, and the worst case with the attacks.
func sameMeasure(candidate, inService *evaluate.Report) error {
	if candidate.DatasetDigest != inService.DatasetDigest || candidate.Samples != inService.Samples {
		return fmt.Errorf("the candidate was evaluated on %d samples of %s, the model in service on %d of %s: evaluate both on the same",
			candidate.Samples, candidate.DatasetDigest, inService.Samples, inService.DatasetDigest)
	}
	if candidate.Drawn != inService.Drawn || candidate.Drawn && candidate.Seed != inService.Seed {
		return errors.New("the candidate and the model in service were evaluated on different samples: evaluate both on the first, or with one seed")
	}
	if ours, theirs := measures(candidate), measures(inService); !slices.Equal(ours, theirs) {
		return fmt.Errorf("the candidate was evaluated under %s, the model in service under %s: evaluate both under the same attacks",
			strings.Join(ours, ", "), strings.Join(theirs, ", "))
	}
	return nil
}

// measures are the attacks that a report's worst case is over, sorted. Which
// model a transferred attack was made on differs between reports; that it was
// transferred must not.
func measures(r *evaluate.Report) []string {
	names := []string{"suite " + r.Suite}
	if r.Suite == "" {
		names = nil
	}
	for _, a := range r.Attacks {
		if a.MadeOn != "" {
			a.Name += " (transferred)"
		}
		names = append(names, a.Name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}
