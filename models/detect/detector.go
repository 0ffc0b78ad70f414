package detect

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"sort"

	"github.com/temper-ml/temper/models/interval"
	"github.com/temper-ml/temper/models/nn"
)

// Detector scores requests to one served model. It is made by Calibrate.
type Detector struct {
	Guard       *nn.Network // a small robust network beside the served one
	Calibration Calibration
}

// Calibration is what was learned on clean examples: set A gives the tables
// and the threshold, set B, disjoint from A, the bound.
type Calibration struct {
	Model     string   `json:"model"`     // Digest of the served network
	Guard     string   `json:"guard"`     // Digest of the guard
	Signals   []Signal `json:"signals"`   // in the order of SignalNames
	Threshold float64  `json:"threshold"` // a request with a score above it is flagged
	Exceeded  int      `json:"exceeded"`  // examples of set B that are flagged
	Trials    int      `json:"trials"`    // examples of set B
	Bound     float64  `json:"bound"`     // upper confidence bound on the share of flagged clean requests
}

// Signal holds one signal's quantiles on set A, rising, at evenly spaced
// levels; the last is its maximum.
type Signal struct {
	Name      string    `json:"name"`
	Quantiles []float64 `json:"quantiles"`
}

// The choices of the calibration.
const (
	// quantile is the share of set A below the threshold.
	quantile = 0.995
	// confidence is that of the bound.
	confidence = 0.99
	// shift multiplies the bound before the alarm bets on it: traffic is never
	// quite like the images of the calibration. Even MNIST's own test images
	// are flagged up to 1.2 times as often as the bound on its validation
	// images says, in runs, since one writer's digits follow each other.
	shift = 2
	// minExamples keeps five examples of set A above the threshold.
	minExamples = 1000
	// maxQuantiles keeps a detector's file small; the bound is from set B, so
	// it stays honest however coarse the tables are.
	maxQuantiles = 1000
	// maxBound is far above what quantile gives on sets that are alike.
	maxBound = 0.1
	// scoreBatch is the number of examples in one forward pass.
	scoreBatch = 64
)

// Images are examples to calibrate on; *dataset.Set is one.
type Images interface {
	Len() int
	Read(dst []float32, lo, hi int) // pixels of examples lo..hi into dst
}

// Calibrate makes the detector for a served network from clean examples that
// neither network was trained on, in two disjoint sets. It refuses sets that
// cannot give a meaningful threshold.
func Calibrate(served, guard *nn.Network, a, b Images) (*Detector, error) {
	if a.Len() < minExamples || b.Len() < minExamples {
		return nil, fmt.Errorf("calibrate on %d and %d examples: each set must have at least %d", a.Len(), b.Len(), minExamples)
	}
	d := &Detector{Guard: guard, Calibration: Calibration{Model: Digest(served), Guard: Digest(guard)}}
	for _, name := range SignalNames {
		d.Calibration.Signals = append(d.Calibration.Signals, Signal{Name: name})
	}
	s, err := newScorer(d, served)
	if err != nil {
		return nil, err
	}
	signals, err := s.signalsOf(a)
	if err != nil {
		return nil, fmt.Errorf("calibration set A: %w", err)
	}
	for k, name := range SignalNames {
		values := make([]float64, len(signals))
		for i := range values {
			values[i] = signals[i][k]
		}
		slices.Sort(values)
		if values[0] == values[len(values)-1] {
			return nil, fmt.Errorf("calibration set A: %s is %v for every example: the examples are all the same, or the guard is the served network", name, values[0])
		}
		d.Calibration.Signals[k].Quantiles = thin(values)
	}
	scores := d.Calibration.scores(signals)
	slices.Sort(scores)
	d.Calibration.Threshold = scores[int(math.Ceil(quantile*float64(len(scores))))-1]

	if signals, err = s.signalsOf(b); err != nil {
		return nil, fmt.Errorf("calibration set B: %w", err)
	}
	for _, score := range d.Calibration.scores(signals) {
		if score > d.Calibration.Threshold {
			d.Calibration.Exceeded++
		}
	}
	d.Calibration.Trials = b.Len()
	d.Calibration.Bound = interval.Upper(d.Calibration.Exceeded, d.Calibration.Trials, confidence)
	return d, d.Check()
}

// thin keeps at most maxQuantiles of the sorted values, the last among them.
func thin(sorted []float64) []float64 {
	m := min(len(sorted), maxQuantiles)
	out := make([]float64, m)
	for i := range out {
		out[i] = sorted[(i+1)*len(sorted)/m-1]
	}
	return out
}

// Check refuses a calibration that no clean examples give.
func (d *Detector) Check() error {
	c := &d.Calibration
	names := make([]string, len(c.Signals))
	best := 0.0 // the highest score there is
	for i, s := range c.Signals {
		names[i] = s.Name
		n := len(s.Quantiles)
		if n < 2 || n > maxQuantiles || !slices.IsSorted(s.Quantiles) || !(s.Quantiles[0] >= 0 && s.Quantiles[n-1] <= farthest) || s.Quantiles[0] == s.Quantiles[n-1] {
			return fmt.Errorf("signal %q: quantiles must be 2 to %d rising values from 0 to %d", s.Name, maxQuantiles, farthest)
		}
		best += evidence(0, n) / signalCount
	}
	if !slices.Equal(names, SignalNames[:]) {
		return fmt.Errorf("signals are %q, this version of Temper knows %q: calibrate again", names, SignalNames)
	}
	if !(c.Threshold > 0 && c.Threshold < best) {
		return fmt.Errorf("threshold %v is outside 0 to %.3g, the highest score: too many clean examples look as hostile as can be", c.Threshold, best)
	}
	if c.Trials < minExamples || c.Exceeded < 0 || c.Exceeded > c.Trials {
		return fmt.Errorf("%d of %d examples flagged: the bound needs at least %d", c.Exceeded, c.Trials, minExamples)
	}
	if want := interval.Upper(c.Exceeded, c.Trials, confidence); !(math.Abs(c.Bound-want) <= 1e-9) {
		return fmt.Errorf("bound %v: %d of %d flagged give %v", c.Bound, c.Exceeded, c.Trials, want)
	}
	if c.Bound > maxBound {
		return fmt.Errorf("up to %.1f%% of clean requests would be flagged: the calibration sets differ too much", 100*c.Bound)
	}
	if got := Digest(d.Guard); got != c.Guard {
		return fmt.Errorf("the guard is %s, the calibration is for %s", got, c.Guard)
	}
	return nil
}

// Alarm watches the flags of requests; 1/alpha is the average number of
// requests to a false alarm, at least, as long as clean ones are flagged at
// most twice as often as the calibration's bound says.
func (d *Detector) Alarm(alpha float64) (*Alarm, error) {
	return NewAlarm(shift*d.Calibration.Bound, alpha)
}

// evidence turns a rank into an e-value: for a clean request, on average at
// most 1. p, from 1/(n+1) to 1, is the share of set A (and the request itself)
// with a signal at least as large.
//
// Source: Vovk and Wang, "E-values: calibration, combination and
// applications" (2021), the calibrator with kappa 1/2.
func evidence(atLeast, n int) float64 {
	p := float64(atLeast+1) / float64(n+1)
	return 0.5 / math.Sqrt(p)
}

// score is the average of the signals' e-values: averages of e-values are
// e-values however the signals depend on each other.
func (c *Calibration) score(signals [signalCount]float64) float64 {
	sum := 0.0
	for k, s := range c.Signals {
		n := len(s.Quantiles)
		sum += evidence(n-sort.SearchFloat64s(s.Quantiles, signals[k]), n)
	}
	return sum / signalCount
}

func (c *Calibration) scores(signals [][signalCount]float64) []float64 {
	out := make([]float64, len(signals))
	for i := range out {
		out[i] = c.score(signals[i])
	}
	return out
}

// Score is what the detector says of one request.
type Score struct {
	Signals [signalCount]float64 // see SignalNames
	Score   float64              // finite for any input
	Flagged bool                 // the score is above the threshold
	Served  int                  // class by the served network
	Guard   int                  // class by the guard
}

// Scorer computes scores. It serves one goroutine at a time.
type Scorer struct {
	detector      *Detector
	served, guard *nn.Forward
	squeezed      []float32 // [scoreBatch, input]
	p, q          []float64 // [scoreBatch, classes] of the served network, [classes]
	ok            [scoreBatch]bool
}

// Scorer scores requests to the network that the detector was calibrated for.
func (d *Detector) Scorer(served *nn.Network) (*Scorer, error) {
	if got := Digest(served); got != d.Calibration.Model {
		return nil, fmt.Errorf("the detector is for network %s, not for %s: calibrate one for the model in service", d.Calibration.Model, got)
	}
	return newScorer(d, served)
}

func newScorer(d *Detector, served *nn.Network) (*Scorer, error) {
	if d.Guard.Input != served.Input || d.Guard.Classes() != served.Classes() {
		return nil, fmt.Errorf("the guard takes %v to %d classes, the served network %v to %d: they must be the same", d.Guard.Input, d.Guard.Classes(), served.Input, served.Classes())
	}
	s := &Scorer{detector: d}
	var err error
	if s.served, err = nn.NewForward(served, scoreBatch); err != nil {
		return nil, err
	}
	if s.guard, err = nn.NewForward(d.Guard, scoreBatch); err != nil {
		return nil, err
	}
	s.squeezed = make([]float32, scoreBatch*served.Input.Size())
	s.p, s.q = make([]float64, scoreBatch*served.Classes()), make([]float64, served.Classes())
	return s, nil
}

// Score scores n requests [n, input]. It refuses pixels that are not finite:
// no server answers those.
func (s *Scorer) Score(x []float32, n int) ([]Score, error) {
	size := s.served.Network().Input.Size()
	if n < 0 || len(x) != n*size {
		return nil, fmt.Errorf("%d values for %d requests of %d", len(x), n, size)
	}
	for i, v := range x {
		if v-v != 0 { // NaN or infinite
			return nil, fmt.Errorf("pixel %d of request %d is %v: pixels must be finite", i%size, i/size, v)
		}
	}
	scores := make([]Score, n)
	for lo := 0; lo < n; lo += scoreBatch {
		hi := min(lo+scoreBatch, n)
		s.signals(scores[lo:hi], x[lo*size:hi*size])
	}
	for i := range scores {
		scores[i].Score = s.detector.Calibration.score(scores[i].Signals)
		scores[i].Flagged = scores[i].Score > s.detector.Calibration.Threshold
	}
	return scores, nil
}

// signals fills in all but the score of at most scoreBatch requests.
func (s *Scorer) signals(scores []Score, x []float32) {
	n, classes := len(scores), len(s.q)
	logits := s.served.Logits(x, n)
	for i := range n {
		scores[i].Served, s.ok[i] = softmax(s.p[i*classes:(i+1)*classes], logits[i*classes:(i+1)*classes])
	}
	compare := func(signal int, logits []float32) {
		for i := range n {
			label, ok := softmax(s.q, logits[i*classes:(i+1)*classes])
			scores[i].Signals[signal] = distance(s.p[i*classes:(i+1)*classes], s.q, ok && s.ok[i])
			if signal == Disagreement {
				scores[i].Guard = label
			}
		}
	}
	compare(Disagreement, s.guard.Logits(x, n))
	squeezed := s.squeezed[:len(x)]
	squeezeBit(squeezed, x)
	compare(BitDepth, s.served.Logits(squeezed, n))
	squeezeMedian(squeezed, x, n, s.served.Network().Input)
	compare(Median, s.served.Logits(squeezed, n))
}

// signalsOf computes the signals of a whole set.
func (s *Scorer) signalsOf(set Images) ([][signalCount]float64, error) {
	out := make([][signalCount]float64, 0, set.Len())
	size := s.served.Network().Input.Size()
	x := make([]float32, scoreBatch*size)
	var scores [scoreBatch]Score
	for lo := 0; lo < set.Len(); lo += scoreBatch {
		hi := min(lo+scoreBatch, set.Len())
		batch := x[:(hi-lo)*size]
		set.Read(batch, lo, hi)
		for i, v := range batch {
			if v-v != 0 {
				return nil, fmt.Errorf("pixel %d of example %d is %v", i%size, lo+i/size, v)
			}
		}
		s.signals(scores[:hi-lo], batch)
		for _, score := range scores[:hi-lo] {
			out = append(out, score.Signals)
		}
	}
	return out, nil
}

// Digest names a network by its content: layers and weights, not its file.
func Digest(n *nn.Network) string {
	h := sha256.New()
	description, err := json.Marshal(struct {
		Input  nn.Shape
		Layers []nn.Layer
	}{n.Input, n.Layers})
	if err != nil {
		panic(err) // plain data: cannot fail
	}
	h.Write(description)
	var b [4]byte
	for _, v := range n.Flat() {
		binary.LittleEndian.PutUint32(b[:], math.Float32bits(v))
		h.Write(b[:])
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}
