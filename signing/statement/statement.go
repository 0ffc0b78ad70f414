// Package statement has the in-toto statements that are signed about a model:
// what was tested, and how robust it was found to be.
package statement

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
)

const (
	// Type of every statement here.
	Type = "https://in-toto.io/Statement/v1"
	// TestResultType is in-toto's predicate for the outcome of tests.
	TestResultType = "https://in-toto.io/attestation/test-result/v0.1"
	// RobustnessType is Temper's predicate with the figures.
	RobustnessType = "https://temper-ml.github.io/attestation/robustness/v1"
)

// Passed and Failed are the results of a TestResult.
const (
	Passed = "PASSED"
	Failed = "FAILED"
)

// Statement says a predicate of its subjects.
type Statement struct {
	Type          string          `json:"_type"`
	Subject       []Resource      `json:"subject"`
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

// Resource is in-toto's ResourceDescriptor.
type Resource struct {
	Name   string            `json:"name,omitempty"`
	URI    string            `json:"uri,omitempty"`
	Digest map[string]string `json:"digest,omitempty"` // algorithm: hex
}

// New makes a statement about the artifact with a digest "sha256:...". Equal
// arguments give equal bytes.
func New(name, digest, predicateType string, predicate any) ([]byte, error) {
	hex, err := sha256Hex(digest)
	if err != nil {
		return nil, err
	}
	if checked, ok := predicate.(interface{ Validate() error }); ok {
		if err := checked.Validate(); err != nil {
			return nil, err
		}
	}
	p, err := json.Marshal(predicate)
	if err != nil {
		return nil, fmt.Errorf("predicate %s: %w", predicateType, err)
	}
	return json.Marshal(Statement{
		Type:          Type,
		Subject:       []Resource{{Name: name, Digest: map[string]string{"sha256": hex}}},
		PredicateType: predicateType,
		Predicate:     p,
	})
}

// Parse reads a statement; its predicate is read by the caller. Unknown fields
// are ignored, as in-toto asks.
func Parse(data []byte) (*Statement, error) {
	var s Statement
	if err := decode(data, &s); err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	if s.Type != Type {
		return nil, fmt.Errorf("statement of type %.100q: want %s", s.Type, Type)
	}
	if len(s.Subject) == 0 || s.PredicateType == "" || len(s.Predicate) == 0 {
		return nil, errors.New("statement without subject or predicate")
	}
	return &s, nil
}

func decode(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("data after its end")
	}
	return nil
}

// TestResult is the gate's verdict: the predicate of TestResultType.
type TestResult struct {
	Result        string     `json:"result"`        // Passed or Failed
	Configuration []Resource `json:"configuration"` // what was tested against, such as the data set and policy
	PassedTests   []string   `json:"passedTests,omitempty"`
	WarnedTests   []string   `json:"warnedTests,omitempty"`
	FailedTests   []string   `json:"failedTests,omitempty"`
}

// Validate refuses a verdict that is neither passed nor failed, or that its
// own tests contradict.
func (r *TestResult) Validate() error {
	if r.Result != Passed && r.Result != Failed {
		return fmt.Errorf("test result is %.100q: must be %s or %s", r.Result, Passed, Failed)
	}
	if r.Result == Passed && len(r.FailedTests) > 0 {
		return fmt.Errorf("test result is %s with %d failed tests", Passed, len(r.FailedTests))
	}
	return nil
}

// ParseTestResult reads a predicate of TestResultType.
func ParseTestResult(predicate []byte) (*TestResult, error) {
	r := new(TestResult)
	if err := decode(predicate, r); err != nil {
		return nil, fmt.Errorf("test result: %w", err)
	}
	return r, r.Validate()
}

// Robustness is how often one model was right, clean and under attacks within
// one threat model: the predicate of RobustnessType. Every accuracy is a
// fraction from 0 to 1 of Samples.
type Robustness struct {
	ModelDigest     string `json:"modelDigest"`               // of model.onnx
	BaseModelDigest string `json:"baseModelDigest,omitempty"` // of the model whose weights training started from
	Network         string `json:"network"`
	Dataset         string `json:"dataset"`
	DatasetDigest   string `json:"datasetDigest"` // of the test split
	ReportDigest    string `json:"reportDigest"`  // of the report that these figures are from
	Recipe          string `json:"recipe,omitempty"`
	Seed            uint64 `json:"seed"`

	Threat        Threat `json:"threat"`
	Preprocessing string `json:"preprocessing,omitempty"` // of the pixels of [0,1] before the network
	Suite         string `json:"suite,omitempty"`         // of attacks, each on what the ones before it left

	Samples    int       `json:"samples"`
	Confidence float64   `json:"confidence"` // of each one-sided lower bound
	Clean      Accuracy  `json:"clean"`
	Robust     Accuracy  `json:"robust"` // right clean and under every attack
	Attacks    []Attack  `json:"attacks"`
	Certified  *Accuracy `json:"certified,omitempty"` // provably right under any attack; nil where nothing was proven
	Checks     []Check   `json:"checks,omitempty"`    // whether the figures are to be believed
}

// Check is one rule that the figures were held to, with what it was judged by.
type Check struct {
	Name    string             `json:"name"`
	Pass    bool               `json:"pass"`
	Rule    string             `json:"rule"`
	Figures map[string]float64 `json:"figures"`
}

// Threat is the ball that attacks stay in.
type Threat struct {
	Norm    string  `json:"norm"`
	Epsilon float64 `json:"epsilon"`
}

// Accuracy is a share of the samples and its lower confidence bound.
type Accuracy struct {
	Correct    int     `json:"correct"`
	Accuracy   float64 `json:"accuracy"`
	LowerBound float64 `json:"lowerBound"`
}

// consistent says whether the figures can be of so many samples.
func (a Accuracy) consistent(samples int) bool {
	share := float64(a.Correct) / float64(samples)
	return a.Correct >= 0 && a.Correct <= samples && math.Abs(a.Accuracy-share) <= roundOff && a.LowerBound >= 0 && a.LowerBound <= a.Accuracy
}

// Attack is the accuracy under one attack alone.
type Attack struct {
	Name string `json:"name"`
	Accuracy
}

var digestPattern = regexp.MustCompile(`^sha256:([0-9a-f]{64})$`)

func sha256Hex(digest string) (string, error) {
	m := digestPattern.FindStringSubmatch(digest)
	if m == nil {
		return "", fmt.Errorf("digest %.100q: must be sha256: and 64 lower-case hex digits", digest)
	}
	return m[1], nil
}

// roundOff allows for another way to divide.
const roundOff = 1e-9

// Validate refuses absent, impossible and contradictory figures.
func (r *Robustness) Validate() error {
	for _, d := range []struct{ name, digest string }{{"modelDigest", r.ModelDigest}, {"datasetDigest", r.DatasetDigest}, {"reportDigest", r.ReportDigest}} {
		if _, err := sha256Hex(d.digest); err != nil {
			return fmt.Errorf("robustness: %s: %w", d.name, err)
		}
	}
	if r.BaseModelDigest != "" {
		if _, err := sha256Hex(r.BaseModelDigest); err != nil {
			return fmt.Errorf("robustness: baseModelDigest: %w", err)
		}
	}
	if r.Samples < 1 || !(r.Confidence >= 0.5 && r.Confidence < 1) || r.Threat.Norm == "" ||
		!(r.Threat.Epsilon >= 0) || math.IsInf(r.Threat.Epsilon, 0) {
		return fmt.Errorf("robustness: %d samples, confidence %v and threat %+v are absent or impossible", r.Samples, r.Confidence, r.Threat)
	}
	if len(r.Attacks) == 0 {
		return errors.New("robustness: no attack was tried")
	}
	figures := []Attack{{"clean", r.Clean}, {"robust", r.Robust}}
	for _, f := range append(figures, r.Attacks...) {
		if !f.consistent(r.Samples) {
			return fmt.Errorf("robustness: %.100q: %d of %d correct, accuracy %v, lower bound %v contradict each other",
				f.Name, f.Correct, r.Samples, f.Accuracy.Accuracy, f.LowerBound)
		}
		if r.Robust.Correct > f.Correct {
			return fmt.Errorf("robustness: %d correct under every attack, and %d under %.100q", r.Robust.Correct, f.Correct, f.Name)
		}
	}
	if c := r.Certified; c != nil && (!c.consistent(r.Samples) || c.Correct > r.Robust.Correct) {
		return fmt.Errorf("robustness: certified: %d of %d correct, accuracy %v, lower bound %v, and %d correct under every attack contradict each other",
			c.Correct, r.Samples, c.Accuracy, c.LowerBound, r.Robust.Correct)
	}
	return nil
}

// ParseRobustness reads a predicate of RobustnessType.
func ParseRobustness(predicate []byte) (*Robustness, error) {
	r := new(Robustness)
	if err := decode(predicate, r); err != nil {
		return nil, fmt.Errorf("robustness: %w", err)
	}
	return r, r.Validate()
}

// ModelFile is the name of the model in an artifact that statements are about.
const ModelFile = "model.onnx"
