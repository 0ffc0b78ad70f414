package evaluate

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/interval"
	"github.com/temper-ml/temper/models/nn"
)

// Report says how often one model was right on one data set, clean and under
// attacks within one threat model. All accuracies are fractions from 0 to 1.
type Report struct {
	ModelDigest   string        `json:"model_digest"`
	Network       string        `json:"network"`
	Dataset       string        `json:"dataset"`
	DatasetDigest string        `json:"dataset_digest"`
	Threat        attack.Threat `json:"threat"`
	Box           [2]float64    `json:"box"`           // of every pixel before and after an attack
	Preprocessing string        `json:"preprocessing"` // of the pixels before the network
	Seed          uint64        `json:"seed"`

	Samples    int     `json:"samples"`         // the first examples of the test split, in order, unless they are drawn
	Drawn      bool    `json:"drawn,omitempty"` // by the seed
	Confidence float64 `json:"confidence"`      // of each one-sided Clopper-Pearson lower bound

	CleanCorrect            int     `json:"clean_correct"`
	CleanAccuracy           float64 `json:"clean_accuracy"`
	CleanAccuracyLowerBound float64 `json:"clean_accuracy_lower_bound"`

	// Robust counts the examples that are right clean and under every attack.
	RobustCorrect            int     `json:"robust_correct"`
	RobustAccuracy           float64 `json:"robust_accuracy"`
	RobustAccuracyLowerBound float64 `json:"robust_accuracy_lower_bound"`

	*Certified // nil where no proof was asked for

	Suite   string   `json:"suite,omitempty"` // that the attacks with a Tried are of
	Attacks []Attack `json:"attacks"`

	Checks       []Check `json:"checks,omitempty"`
	CheckSamples int     `json:"check_samples,omitempty"` // the first samples, which the checks' own attacks were made on

	Classes   []Class   `json:"classes"`
	Confusion Confusion `json:"confusion"`

	Curve        []Series `json:"curve,omitempty"`
	CurveSamples int      `json:"curve_samples,omitempty"`

	Shape    nn.Shape  `json:"shape"` // of each example
	Examples []Example `json:"examples,omitempty"`

	// Seconds is left 0 by Run, so that the same inputs give the same bytes;
	// who prints a report may fill it in.
	Seconds float64 `json:"seconds,omitempty"`
}

// Certified counts the examples that are provably right whatever an attacker
// within the threat does: see package certify.
type Certified struct {
	CertifiedCorrect            int     `json:"certified_correct"`
	CertifiedAccuracy           float64 `json:"certified_accuracy"`
	CertifiedAccuracyLowerBound float64 `json:"certified_accuracy_lower_bound"`
}

// Attack is the outcome of one attack. One of a suite is made on what the
// attacks before it in the suite left, and its figures say what is right after
// it, as AutoAttack prints them.
type Attack struct {
	Name    string `json:"name"`              // as attack.Parse takes it
	MadeOn  string `json:"made_on,omitempty"` // digest of the model that the examples were made on; empty: white box
	Tried   int    `json:"tried,omitempty"`   // of a suite: the examples that it was made on
	Correct int    `json:"correct"`           // examples right under this attack alone; of a suite: under it and those before it
	Broken  int    `json:"broken"`            // examples right clean and wrong so

	Accuracy           float64 `json:"accuracy"`
	AccuracyLowerBound float64 `json:"accuracy_lower_bound"`
	SuccessRate        float64 `json:"success_rate"` // broken / right clean
}

// Class has golearn's metrics of one class, 0 where undefined.
type Class struct {
	Name        string  `json:"name"`
	Clean       Metrics `json:"clean"`
	Adversarial Metrics `json:"adversarial"`
}

// Metrics are those of one class against the others.
type Metrics struct {
	Precision float64 `json:"precision"`
	Recall    float64 `json:"recall"`
	F1        float64 `json:"f1"`
}

// Confusion has counts [label][prediction], in the order of Classes. The
// adversarial prediction is that of the first attack which broke the example,
// or the clean one where none did.
type Confusion struct {
	Clean       [][]int `json:"clean"`
	Adversarial [][]int `json:"adversarial"`
}

// Series is the accuracy under one attack over rising epsilon.
type Series struct {
	Attack string  `json:"attack"`
	Points []Point `json:"points"`
}

// Point is one point of a security curve.
type Point struct {
	Epsilon  float64 `json:"epsilon"`
	Accuracy float64 `json:"accuracy"`
}

// Example is one test example and its adversarial twin: pixels of Shape as
// bytes.
type Example struct {
	Index                 int    `json:"index"` // in the test split
	Label                 int    `json:"label"`
	Prediction            int    `json:"prediction"`
	Attack                string `json:"attack"`
	AdversarialPrediction int    `json:"adversarial_prediction"`
	Clean                 []byte `json:"clean"`
	Adversarial           []byte `json:"adversarial"`
}

// Limits on a report that somebody else wrote.
const (
	MaxReportBytes = 8 << 20 // a report of 100 examples of 224x224x3 in base64 is larger; one of MNIST is 30 KB
	maxClasses     = 256     // labels are bytes
	maxAttacks     = 256
	maxExamples    = 100
	maxPoints      = 1000
	maxChecks      = 100
)

// Encode writes the report as JSON; equal reports give equal bytes.
func (r *Report) Encode() ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode report: %w", err)
	}
	data = append(data, '\n')
	if len(data) > MaxReportBytes {
		return nil, fmt.Errorf("report is %d bytes: at most %d; ask for fewer examples", len(data), MaxReportBytes)
	}
	return data, nil
}

// Decode reads a report and refuses unknown fields, missing figures and
// figures that contradict each other.
func Decode(data []byte) (*Report, error) {
	if len(data) > MaxReportBytes {
		return nil, fmt.Errorf("report is %d bytes: at most %d", len(data), MaxReportBytes)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	r := new(Report)
	if err := d.Decode(r); err != nil {
		return nil, fmt.Errorf("decode report: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("decode report: data after its end")
	}
	if err := r.Validate(); err != nil {
		return nil, err
	}
	return r, nil
}

// Validate refuses a report with absent, impossible or contradictory figures:
// every accuracy must be its count over the samples, and every bound must
// follow from them.
func (r *Report) Validate() error {
	if err := r.validate(); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}

func (r *Report) validate() error {
	n, k := r.Samples, len(r.Classes)
	if n < 1 {
		return errors.New("samples is absent or below 1")
	}
	if !(r.Confidence >= 0.5 && r.Confidence < 1) {
		return fmt.Errorf("confidence is %v: must be 0.5 or more and below 1", r.Confidence)
	}
	if err := r.Threat.Validate(); err != nil {
		return err
	}
	if err := r.figure("clean_accuracy", r.CleanCorrect, r.CleanAccuracy, r.CleanAccuracyLowerBound); err != nil {
		return err
	}
	if err := r.figure("robust_accuracy", r.RobustCorrect, r.RobustAccuracy, r.RobustAccuracyLowerBound); err != nil {
		return err
	}
	if c := r.Certified; c != nil {
		if err := r.figure("certified_accuracy", c.CertifiedCorrect, c.CertifiedAccuracy, c.CertifiedAccuracyLowerBound); err != nil {
			return err
		}
		if c.CertifiedCorrect > r.RobustCorrect {
			return fmt.Errorf("certified_correct is %d, but attacks left only %d right: the proof or the attacks are wrong", c.CertifiedCorrect, r.RobustCorrect)
		}
	}
	if len(r.Attacks) == 0 || len(r.Attacks) > maxAttacks {
		return fmt.Errorf("%d attacks: must be 1 to %d", len(r.Attacks), maxAttacks)
	}
	least := r.CleanCorrect
	for _, a := range r.Attacks {
		if err := r.figure("accuracy under "+a.Name, a.Correct, a.Accuracy, a.AccuracyLowerBound); err != nil {
			return err
		}
		if a.Broken < 0 || a.Broken > r.CleanCorrect || a.SuccessRate != fraction(a.Broken, r.CleanCorrect) {
			return fmt.Errorf("success_rate of %s is %v with %d of %d broken", a.Name, a.SuccessRate, a.Broken, r.CleanCorrect)
		}
		least = min(least, a.Correct, r.CleanCorrect-a.Broken)
	}
	if r.RobustCorrect > least {
		return fmt.Errorf("robust_correct is %d: above the %d of the strongest attack alone", r.RobustCorrect, least)
	}
	for _, c := range r.Checks {
		if err := c.validate(); err != nil {
			return err
		}
	}
	if len(r.Checks) > maxChecks || r.CheckSamples < 0 || r.CheckSamples > n {
		return fmt.Errorf("%d checks on %d samples are impossible", len(r.Checks), r.CheckSamples)
	}
	if k < 2 || k > maxClasses {
		return fmt.Errorf("%d classes: must be 2 to %d", k, maxClasses)
	}
	for _, c := range r.Classes {
		for _, m := range []Metrics{c.Clean, c.Adversarial} {
			for _, v := range []float64{m.Precision, m.Recall, m.F1} {
				if !isFraction(v) {
					return fmt.Errorf("class %q: metric %v is not a fraction", c.Name, v)
				}
			}
		}
	}
	if err := checkConfusion(r.Confusion.Clean, k, n, r.CleanCorrect); err != nil {
		return fmt.Errorf("clean confusion matrix: %w", err)
	}
	if err := checkConfusion(r.Confusion.Adversarial, k, n, r.RobustCorrect); err != nil {
		return fmt.Errorf("adversarial confusion matrix: %w", err)
	}
	for _, s := range r.Curve {
		if len(s.Points) > maxPoints {
			return fmt.Errorf("curve of %s has %d points: at most %d", s.Attack, len(s.Points), maxPoints)
		}
		for _, p := range s.Points {
			if !(p.Epsilon >= 0) || math.IsInf(p.Epsilon, 0) || !isFraction(p.Accuracy) {
				return fmt.Errorf("curve of %s: point %+v is impossible", s.Attack, p)
			}
		}
	}
	if r.CurveSamples < 0 || r.CurveSamples > n || !(r.Seconds >= 0) || math.IsInf(r.Seconds, 0) {
		return fmt.Errorf("curve_samples %d or seconds %v is impossible", r.CurveSamples, r.Seconds)
	}
	return r.validateExamples()
}

func (r *Report) validateExamples() error {
	s := r.Shape
	if s.Height < 1 || s.Width < 1 || s.Channels < 1 || s.Height > nn.MaxSide || s.Width > nn.MaxSide || s.Channels > nn.MaxChannels {
		return fmt.Errorf("shape %v is impossible", s)
	}
	if len(r.Examples) > maxExamples {
		return fmt.Errorf("%d examples: at most %d", len(r.Examples), maxExamples)
	}
	for i, e := range r.Examples {
		if len(e.Clean) != s.Size() || len(e.Adversarial) != s.Size() {
			return fmt.Errorf("example %d: %d and %d pixels, the shape %v has %d", i, len(e.Clean), len(e.Adversarial), s, s.Size())
		}
		for _, c := range []int{e.Label, e.Prediction, e.AdversarialPrediction} {
			if c < 0 || c >= len(r.Classes) {
				return fmt.Errorf("example %d: class %d of %d", i, c, len(r.Classes))
			}
		}
	}
	return nil
}

// boundTolerance allows for another implementation of the Beta quantile.
const boundTolerance = 1e-6

func (r *Report) figure(name string, correct int, accuracy, bound float64) error {
	if correct < 0 || correct > r.Samples {
		return fmt.Errorf("%s: %d of %d correct is impossible", name, correct, r.Samples)
	}
	if want := fraction(correct, r.Samples); !(math.Abs(accuracy-want) <= boundTolerance) {
		return fmt.Errorf("%s is %v: %d of %d correct is %v", name, accuracy, correct, r.Samples, want)
	}
	if want := interval.Lower(correct, r.Samples, r.Confidence); !(math.Abs(bound-want) <= boundTolerance) {
		return fmt.Errorf("lower bound of %s is %v: %d of %d correct give %v", name, bound, correct, r.Samples, want)
	}
	return nil
}

func checkConfusion(m [][]int, classes, samples, correct int) error {
	if len(m) != classes {
		return fmt.Errorf("%d rows for %d classes", len(m), classes)
	}
	sum, trace := 0, 0
	for i, row := range m {
		if len(row) != classes {
			return fmt.Errorf("row %d has %d entries for %d classes", i, len(row), classes)
		}
		for _, v := range row {
			if v < 0 || v > samples {
				return fmt.Errorf("row %d counts %d of %d samples", i, v, samples)
			}
			sum += v
		}
		trace += row[i]
	}
	if sum != samples || trace != correct {
		return fmt.Errorf("counts %d of %d correct, the report says %d of %d", trace, sum, correct, samples)
	}
	return nil
}

func isFraction(v float64) bool { return v >= 0 && v <= 1 }

func fraction(part, whole int) float64 {
	if whole == 0 {
		return 0
	}
	return float64(part) / float64(whole)
}
