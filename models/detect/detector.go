package detect

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"gonum.org/v1/gonum/mat"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/interval"
	"github.com/temper-ml/temper/models/nn"
)

// Detector scores requests to one served model. It is made by Calibrate.
type Detector struct {
	Guard       *nn.Network // a small robust network beside the served one
	Calibration Calibration
}

// Calibration is what was learned on clean examples, on benign changes of
// them, and on attacks: one half of set A trains the forest, the other gives
// the thresholds; set B, disjoint from A, the bounds.
type Calibration struct {
	Model     string    `json:"model"`     // Digest of the served network
	Guard     string    `json:"guard"`     // Digest of the guard
	Signals   []Signal  `json:"signals"`   // in the order of SignalNames
	Logits    Gaussians `json:"logits"`    // of the served network
	Histogram []float64 `json:"histogram"` // mean shares of pixels by bin
	Forest    Forest    `json:"forest"`
	Attack    Cut       `json:"attack"` // on the forest's score: above it a request is flagged as hostile
	// Benign is the same threshold on benignly changed examples of set B, of the
	// kind that is flagged most often: where such a change lasts it is the usual rate.
	Benign Cut `json:"benign"`
	Drift  Cut `json:"drift"` // on how unlike the usual a request is
	// Caught is the share of attacked images that is flagged, on images that
	// the forest did not see.
	Caught float64 `json:"caught"`
}

// Signal holds one signal's quantiles, rising, at evenly spaced levels; the
// last is its maximum.
type Signal struct {
	Name      string    `json:"name"`
	Quantiles []float64 `json:"quantiles"`
}

// Cut is a threshold and what is known of it.
type Cut struct {
	Threshold float64 `json:"threshold"`
	Exceeded  int     `json:"exceeded"` // examples of set B above the threshold
	Trials    int     `json:"trials"`   // examples of set B
	Bound     float64 `json:"bound"`    // upper confidence bound on the share of such requests above it
}

// Gaussians describe the logits of clean images by the class that they are
// given: means [class][logit] and one precision matrix for all.
type Gaussians struct {
	Means     [][]float64 `json:"means"`
	Precision [][]float64 `json:"precision"`
}

// The choices of the calibration.
const (
	// attackQuantile is the share of clean images below the attack's threshold,
	// and shiftQuantile that of benignly changed ones, of every kind: so noise,
	// a turned camera or another light raises no attack.
	attackQuantile = 0.995
	shiftQuantile  = 0.995
	// driftQuantile is lower: a turned image differs from the usual ones less
	// than it differs from its own original, and drift is in no hurry.
	driftQuantile = 0.95
	// confidence is that of the bounds.
	confidence = 0.99
	// safety multiplies the bound before the alarm bets on it: traffic is never
	// quite like the images of the calibration. Even MNIST's own test images
	// are flagged up to 1.2 times as often as the bound on its validation
	// images says, in runs, since one writer's digits follow each other.
	safety = 2
	// driftSafety is lower: a false alarm on drift starts nothing.
	driftSafety = 1.5
	// minExamples keeps five examples above the attack's threshold.
	minExamples = 1000
	// attackExamples, at most, are attacked by each attack, for the forest.
	// benignRows is how many benignly changed examples it learns from, and clean
	// ones, for each hostile one: with one, a seventh of the attacks passed below
	// the threshold that noise asks for.
	attackExamples = 150
	benignRows     = 2
	// maxQuantiles keeps a detector's file small; the bound is from set B, so
	// it stays honest however coarse the tables are.
	maxQuantiles = 1000
	// maxBound and maxDriftBound are far above what the quantiles give on sets
	// that are alike.
	maxBound, maxDriftBound = 0.1, 0.25
	// scoreBatch is the number of examples in one forward pass.
	scoreBatch = 64
)

// epsilons are those of the attacks that the forest learns from. Weaker ones
// fool hardly any network; by 0.3 a person sees them.
var epsilons = []float64{0.1, 0.15, 0.2, 0.3}

// attacks that the forest learns from: one step, and several.
func attacks(epsilon float64) []attack.Attack {
	t := attack.Threat{Norm: "linf", Epsilon: epsilon}
	return []attack.Attack{attack.FGSM(t), attack.PGD(t, attack.PGDConfig{Steps: 10})}
}

// Images are examples to calibrate on; *dataset.Set is one.
type Images interface {
	Len() int
	Read(dst []float32, lo, hi int) // pixels of examples lo..hi into dst
}

// Calibrate makes the detector for a served network from clean examples that
// neither network was trained on, in two disjoint sets; labels are not needed.
// It refuses sets that cannot give a meaningful threshold.
func Calibrate(ctx context.Context, served attack.Model, guard *nn.Network, a, b Images) (*Detector, error) {
	if a.Len() < 2*minExamples || b.Len() < minExamples {
		return nil, fmt.Errorf("calibrate on %d and %d examples: there must be at least %d and %d", a.Len(), b.Len(), 2*minExamples, minExamples)
	}
	network := served.Network()
	d := &Detector{Guard: guard, Calibration: Calibration{Model: Digest(network), Guard: Digest(guard)}}
	s, err := newScorer(d, network)
	if err != nil {
		return nil, err
	}
	c := &d.Calibration
	half := a.Len() / 2
	train, err := read(a, 0, half, network.Input)
	if err != nil {
		return nil, fmt.Errorf("calibration set A: %w", err)
	}
	labels, err := s.learnLogits(train, half)
	if err != nil {
		return nil, fmt.Errorf("calibration set A: %w", err)
	}
	if err := d.plant(ctx, served, s, train, labels); err != nil {
		return nil, err
	}

	rest, err := read(a, half, a.Len(), network.Input)
	if err != nil {
		return nil, fmt.Errorf("calibration set A: %w", err)
	}
	clean := s.signalsOf(rest)
	for k, name := range SignalNames {
		values := column(clean, func(x *[signalCount]float64) float64 { return x[k] })
		if k == Disagreement && values[0] == values[len(values)-1] {
			return nil, fmt.Errorf("calibration set A: %s is %v for every example: the examples are all the same, or the guard is the served network", name, values[0])
		}
		c.Signals = append(c.Signals, Signal{name, thin(values)})
	}
	scores, unlike := column(clean, c.Forest.score), column(clean, c.unlike)
	c.Attack.Threshold = at(scores, attackQuantile)
	c.Drift.Threshold = at(unlike, driftQuantile)
	for i, shift := range CalibrationShifts {
		changed := shift.Apply(rest, len(clean), network.Input, uint64(i))
		scores := column(s.signalsOf(changed), c.Forest.score)
		c.Attack.Threshold = max(c.Attack.Threshold, at(scores, shiftQuantile))
	}
	if err := c.catch(ctx, served, s, rest); err != nil {
		return nil, err
	}

	bound, err := read(b, 0, b.Len(), network.Input)
	if err != nil {
		return nil, fmt.Errorf("calibration set B: %w", err)
	}
	clean = s.signalsOf(bound)
	c.Attack.count(column(clean, c.Forest.score))
	c.Drift.count(column(clean, c.unlike))
	for i, shift := range CalibrationShifts {
		changed := shift.Apply(bound, b.Len(), network.Input, uint64(200+i))
		kind := Cut{Threshold: c.Attack.Threshold}
		kind.count(column(s.signalsOf(changed), c.Forest.score))
		if kind.Bound > c.Benign.Bound {
			c.Benign = kind
		}
	}
	return d, d.Check()
}

// plant grows the forest: clean and benignly changed images against attacked
// ones.
func (d *Detector) plant(ctx context.Context, served attack.Model, s *Scorer, x []float32, labels []uint8) error {
	c, input := &d.Calibration, served.Network().Input
	size := input.Size()
	kinds := len(attacks(1)) * len(epsilons)
	n := min(attackExamples, len(labels)/kinds)
	var rows [][signalCount]float64
	for i, shift := range CalibrationShifts {
		m := benignRows * n * kinds / len(CalibrationShifts)
		lo := i * m % (len(labels) - m)
		rows = append(rows, s.signalsOf(shift.Apply(x[lo*size:(lo+m)*size], m, input, uint64(100+i)))...)
	}
	rows = append(rows, s.signalsOf(x)...)
	usual := len(rows)
	err := eachAttack(ctx, served, x, labels, n, func(_ attack.Attack, attacked []float32) {
		rows = append(rows, s.signalsOf(attacked)...)
	})
	if err != nil {
		return err
	}
	hostile := make([]bool, len(rows))
	for i := usual; i < len(rows); i++ {
		hostile[i] = true
	}
	forest, err := grow(rows, hostile)
	if err != nil {
		return fmt.Errorf("forest: %w", err)
	}
	c.Forest = *forest
	return nil
}

// catch measures which share of attacked images is flagged.
func (c *Calibration) catch(ctx context.Context, served attack.Model, s *Scorer, x []float32) error {
	const n = attackExamples / 2
	_, labels := s.classes(x[:n*len(attacks(1))*len(epsilons)*served.Network().Input.Size()])
	caught, all := 0, 0
	err := eachAttack(ctx, served, x, labels, n, func(_ attack.Attack, attacked []float32) {
		for _, signals := range s.signalsOf(attacked) {
			all++
			if c.Forest.score(&signals) > c.Attack.Threshold {
				caught++
			}
		}
	})
	c.Caught = float64(caught) / float64(all)
	return err
}

// eachAttack makes every attack of the calibration on n images of its own.
func eachAttack(ctx context.Context, served attack.Model, x []float32, labels []uint8, n int, use func(attack.Attack, []float32)) error {
	size, lo := served.Network().Input.Size(), 0
	for _, epsilon := range epsilons {
		for _, a := range attacks(epsilon) {
			attacked, err := a.Perturb(ctx, served, x[lo*size:(lo+n)*size], labels[lo:lo+n], uint64(lo))
			if err != nil {
				return fmt.Errorf("%s at epsilon %v: %w", a.Name(), epsilon, err)
			}
			use(a, attacked)
			lo += n
		}
	}
	return nil
}

// read returns the pixels of examples lo..hi, all of them finite.
func read(set Images, lo, hi int, shape nn.Shape) ([]float32, error) {
	x := make([]float32, (hi-lo)*shape.Size())
	set.Read(x, lo, hi)
	for i, v := range x {
		if v-v != 0 { // NaN or infinite
			return nil, fmt.Errorf("pixel %d of example %d is %v", i%shape.Size(), lo+i/shape.Size(), v)
		}
	}
	return x, nil
}

// column computes a value of each row and sorts them.
func column(rows [][signalCount]float64, of func(*[signalCount]float64) float64) []float64 {
	out := make([]float64, len(rows))
	for i := range rows {
		out[i] = of(&rows[i])
	}
	slices.Sort(out)
	return out
}

// at is the quantile of sorted values.
func at(sorted []float64, quantile float64) float64 {
	return sorted[int(math.Ceil(quantile*float64(len(sorted))))-1]
}

func (c *Cut) count(values []float64) {
	for _, v := range values {
		if v > c.Threshold {
			c.Exceeded++
		}
	}
	c.Trials = len(values)
	c.Bound = interval.Upper(c.Exceeded, c.Trials, confidence)
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
	for i, s := range c.Signals {
		names[i] = s.Name
		n := len(s.Quantiles)
		if n < 2 || n > maxQuantiles || !slices.IsSorted(s.Quantiles) || !(s.Quantiles[0] >= -limit && s.Quantiles[n-1] <= limit) {
			return fmt.Errorf("signal %q: quantiles must be 2 to %d rising numbers", s.Name, maxQuantiles)
		}
	}
	if !slices.Equal(names, SignalNames[:]) {
		return fmt.Errorf("signals are %q, this version of Temper knows %q: calibrate again", names, SignalNames)
	}
	classes := d.Guard.Classes()
	for _, m := range [][][]float64{c.Logits.Means, c.Logits.Precision} {
		if len(m) != classes {
			return fmt.Errorf("logits: %d rows for %d classes", len(m), classes)
		}
		for _, row := range m {
			if len(row) != classes || slices.ContainsFunc(row, func(v float64) bool { return !(math.Abs(v) <= limit) }) {
				return fmt.Errorf("logits: each row must hold %d numbers", classes)
			}
		}
	}
	if len(c.Histogram) != histogramBins || slices.ContainsFunc(c.Histogram, func(v float64) bool { return !(v >= 0 && v <= 1) }) {
		return fmt.Errorf("histogram: must be %d shares", histogramBins)
	}
	if err := c.Forest.check(); err != nil {
		return err
	}
	if best := c.Forest.highest(); !(c.Attack.Threshold > 0 && c.Attack.Threshold < best) {
		return fmt.Errorf("threshold %v is outside 0 to %.3g, the highest score: too many clean or benignly changed images look as hostile as can be; take a guard that is more robust", c.Attack.Threshold, best)
	}
	if !(c.Drift.Threshold > 0 && c.Drift.Threshold <= limit) {
		return fmt.Errorf("drift threshold %v: must be above 0", c.Drift.Threshold)
	}
	if !(c.Caught >= 0 && c.Caught <= 1) {
		return fmt.Errorf("caught %v: must be a share", c.Caught)
	}
	if err := c.Attack.check(maxBound); err != nil {
		return err
	}
	if err := c.Benign.check(maxBound); err != nil {
		return fmt.Errorf("benign changes: %w", err)
	}
	if err := c.Drift.check(maxDriftBound); err != nil {
		return fmt.Errorf("drift: %w", err)
	}
	if got := Digest(d.Guard); got != c.Guard {
		return fmt.Errorf("the guard is %s, the calibration is for %s", got, c.Guard)
	}
	return nil
}

func (c *Cut) check(most float64) error {
	if c.Trials < minExamples || c.Exceeded < 0 || c.Exceeded > c.Trials {
		return fmt.Errorf("%d of %d examples flagged: the bound needs at least %d", c.Exceeded, c.Trials, minExamples)
	}
	if want := interval.Upper(c.Exceeded, c.Trials, confidence); !(math.Abs(c.Bound-want) <= 1e-9) {
		return fmt.Errorf("bound %v: %d of %d flagged give %v", c.Bound, c.Exceeded, c.Trials, want)
	}
	if c.Bound > most {
		return fmt.Errorf("up to %.1f%% of usual requests would be flagged: the calibration sets differ too much", 100*c.Bound)
	}
	return nil
}

// highest is the score that no request exceeds.
func (f *Forest) highest() float64 {
	sum := 0.0
	for _, tree := range f.Trees {
		best := 0.0
		for _, n := range tree {
			best = max(best, n.Hostile)
		}
		sum += best
	}
	return sum / float64(len(f.Trees))
}

// Alarm watches for hostile requests; 1/alpha is the average number of
// requests to a false alarm, at least, as long as clean and benignly changed
// ones are flagged at most twice as often as the calibration's bounds say.
func (d *Detector) Alarm(alpha float64) (*Alarm, error) {
	return NewAlarm(safety*max(d.Calibration.Attack.Bound, d.Calibration.Benign.Bound), alpha)
}

// DriftAlarm watches in the same way for requests that are unlike those of the
// calibration without being hostile.
func (d *Detector) DriftAlarm(alpha float64) (*Alarm, error) {
	p := driftSafety * d.Calibration.Drift.Bound
	return newAlarm(p, alpha, []float64{0.9, 0.5, 0.3, 0.2, 1.5 * p})
}

// unlike says how unlike the usual requests one is: the mean of its signals'
// e-values, each on how rare so low or so high a value is. For a clean request
// it is on average at most 1.
//
// Source: Vovk and Wang, "E-values: calibration, combination and
// applications" (2021), the calibrator with kappa 1/2; averages of e-values
// are e-values however the signals depend on each other.
func (c *Calibration) unlike(signals *[signalCount]float64) float64 {
	sum := 0.0
	for k, s := range c.Signals {
		n := len(s.Quantiles)
		above := n - sort.SearchFloat64s(s.Quantiles, signals[k])
		below := sort.Search(n, func(i int) bool { return s.Quantiles[i] > signals[k] })
		p := min(1, float64(2*min(above, below)+1)/float64(n+1))
		sum += 0.5 / math.Sqrt(p)
	}
	return sum / signalCount
}

// Score is what the detector says of one request.
type Score struct {
	Signals [signalCount]float64 // see SignalNames
	Score   float64              // how hostile, from 0 to 1
	Unlike  float64              // how unlike the usual requests, finite for any input
	Flagged bool                 // hostile: the score is above its threshold
	Shifted bool                 // unlike the usual ones, and not flagged
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
	c := &s.detector.Calibration
	for lo := 0; lo < n; lo += scoreBatch {
		hi := min(lo+scoreBatch, n)
		s.signals(scores[lo:hi], x[lo*size:hi*size])
		for i := range scores[lo:hi] {
			score := &scores[lo+i]
			score.Score, score.Unlike = c.Forest.score(&score.Signals), c.unlike(&score.Signals)
			if !s.ok[i] { // a model that overflows does not answer: as suspicious as can be
				score.Score = 1
			}
			score.Flagged = score.Score > c.Attack.Threshold
			score.Shifted = !score.Flagged && score.Unlike > c.Drift.Threshold
		}
	}
	return scores, nil
}

// signals fills in the signals and classes of at most scoreBatch requests.
func (s *Scorer) signals(scores []Score, x []float32) {
	n, classes, input := len(scores), len(s.q), s.served.Network().Input
	logits := s.served.Logits(x, n)
	for i := range n {
		row, signals := logits[i*classes:(i+1)*classes], &scores[i].Signals
		p := s.p[i*classes : (i+1)*classes]
		scores[i].Served, s.ok[i] = softmax(p, row)
		pixels := x[i*input.Size() : (i+1)*input.Size()]
		signals[TotalVariation] = totalVariation(pixels, input)
		signals[Histogram] = s.detector.Calibration.unusual(pixels)
		if s.ok[i] {
			signals[Margin], signals[Energy] = margin(row)
			signals[Confidence] = p[scores[i].Served]
			signals[Mahalanobis] = s.detector.Calibration.Logits.distance(row)
		} else {
			signals[Mahalanobis] = limit
		}
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
	squeezeMedian(squeezed, x, n, input)
	compare(Median, s.served.Logits(squeezed, n))
}

// unusual is the L1 distance of an image's histogram to the usual one.
func (c *Calibration) unusual(x []float32) float64 {
	var h [histogramBins]float64
	histogram(&h, x)
	sum := 0.0
	for b, usual := range c.Histogram {
		sum += math.Abs(h[b] - usual)
	}
	return sum
}

// signalsOf computes the signals of many images, on all processors.
func (s *Scorer) signalsOf(x []float32) [][signalCount]float64 {
	size := s.served.Network().Input.Size()
	out := make([][signalCount]float64, len(x)/size)
	batches := (len(out) + scoreBatch - 1) / scoreBatch
	var next atomic.Int64
	work := func(s *Scorer) {
		var scores [scoreBatch]Score
		for b := int(next.Add(1)) - 1; b < batches; b = int(next.Add(1)) - 1 {
			lo, hi := b*scoreBatch, min((b+1)*scoreBatch, len(out))
			s.signals(scores[:hi-lo], x[lo*size:hi*size])
			for i, score := range scores[:hi-lo] {
				out[lo+i] = score.Signals
			}
		}
	}
	var wait sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), batches) - 1 {
		another, err := newScorer(s.detector, s.served.Network())
		if err != nil {
			panic("detect: " + err.Error()) // s was made of the same
		}
		wait.Go(func() { work(another) })
	}
	work(s)
	wait.Wait()
	return out
}

// classes returns the served network's logits [n][classes] and answers.
func (s *Scorer) classes(x []float32) (logits []float32, labels []uint8) {
	size := s.served.Network().Input.Size()
	for ; len(x) > 0; x = x[min(scoreBatch*size, len(x)):] {
		batch := x[:min(scoreBatch*size, len(x))]
		z := s.served.Logits(batch, len(batch)/size)
		logits = append(logits, z...)
		for i := range len(batch) / size {
			label, _ := softmax(s.q, z[i*len(s.q):(i+1)*len(s.q)])
			labels = append(labels, uint8(label))
		}
	}
	return logits, labels
}

// learnLogits learns what logits and pixels of clean images are like, and
// returns the answers to them.
func (s *Scorer) learnLogits(x []float32, n int) ([]uint8, error) {
	logits, labels := s.classes(x)
	classes := len(s.q)
	c := &s.detector.Calibration
	c.Logits.Means = make([][]float64, classes)
	counts := make([]float64, classes)
	for k := range classes {
		c.Logits.Means[k] = make([]float64, classes)
	}
	for i, label := range labels {
		counts[label]++
		for j, z := range logits[i*classes : (i+1)*classes] {
			if z-z != 0 {
				return nil, fmt.Errorf("logit %d of example %d is %v", j, i, z)
			}
			c.Logits.Means[label][j] += float64(z)
		}
	}
	for k, count := range counts {
		for j := range classes {
			c.Logits.Means[k][j] /= max(count, 1)
		}
	}
	covariance := mat.NewSymDense(classes, nil)
	for i, label := range labels {
		row := logits[i*classes : (i+1)*classes]
		for a := range classes {
			for b := a; b < classes; b++ {
				covariance.SetSym(a, b, covariance.At(a, b)+(float64(row[a])-c.Logits.Means[label][a])*(float64(row[b])-c.Logits.Means[label][b])/float64(n))
			}
		}
	}
	// A hundredth of the mean variance on the diagonal keeps the inverse tame
	// where logits move together.
	ridge := 1e-12 + mat.Trace(covariance)/float64(classes)/100
	for a := range classes {
		covariance.SetSym(a, a, covariance.At(a, a)+ridge)
	}
	var cholesky mat.Cholesky
	if !cholesky.Factorize(covariance) {
		return nil, errors.New("the logits have no covariance: the examples are all the same")
	}
	var inverse mat.SymDense
	if err := cholesky.InverseTo(&inverse); err != nil {
		return nil, fmt.Errorf("the logits' covariance: %w", err)
	}
	for a := range classes {
		row := make([]float64, classes)
		for b := range row {
			row[b] = inverse.At(a, b)
		}
		c.Logits.Precision = append(c.Logits.Precision, row)
	}
	size := s.served.Network().Input.Size()
	var sum [histogramBins]float64
	for i := range n {
		histogram(&sum, x[i*size:(i+1)*size])
	}
	for _, v := range sum {
		c.Histogram = append(c.Histogram, v/float64(n))
	}
	return labels, nil
}

// distance is the Mahalanobis distance of finite logits to the nearest class's
// mean.
//
// Source: Lee et al., "A Simple Unified Framework for Detecting
// Out-of-Distribution Samples and Adversarial Attacks" (NeurIPS 2018); on
// logits rather than the layer before, which measured the same here and is
// small whatever the network.
func (g *Gaussians) distance(logits []float32) float64 {
	nearest := math.Inf(1)
	for _, mean := range g.Means {
		sum := 0.0
		for a, row := range g.Precision {
			da, part := float64(logits[a])-mean[a], 0.0
			for b, v := range row {
				part += v * (float64(logits[b]) - mean[b])
			}
			sum += da * part
		}
		nearest = min(nearest, sum)
	}
	return min(math.Sqrt(max(nearest, 0)), limit)
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
