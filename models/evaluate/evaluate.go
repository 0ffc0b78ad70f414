// Package evaluate measures a classifier: how often it is right on clean
// examples, under each attack, and under the worst attack for each example;
// with confidence bounds, a security curve, and golearn's confusion matrices
// and metrics.
package evaluate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/certify"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/interval"
)

// Options say what to measure.
type Options struct {
	Threat  attack.Threat
	Attacks []string // as attack.Parse takes them; at least one
	Samples int      // the first examples of the test set; 0 means all
	Seed    uint64   // of the attacks' random starts

	// Source, where set, is another model: every attack is also made on it
	// and tried on this one.
	Source       attack.Model
	SourceDigest string

	// Certify also counts what is provably right: see package certify.
	Certify bool

	CurvePoints  int // values of epsilon on the security curve, 0 for no curve
	CurveSamples int // the first samples for the curve; 0 means 500, or all where there are fewer
	Examples     int // images to keep for the report page

	ModelDigest   string // recorded as given
	DatasetDigest string // recorded as given; "" means that of the test set

	// Progress, where set, is called with 0 <= done <= total, in a unit of its
	// own; done never falls.
	Progress func(done, total int)
}

// Confidence is that of the one-sided bounds in every report.
const Confidence = 0.95

// chunk is how many examples are attacked at a time: it bounds memory, and
// being constant it gives the same random starts on every machine.
const chunk = 1000

// curveSamples keeps a curve of 8 points to seconds; it is for the eye, and
// no decision uses it.
const curveSamples = 500

// curveAttacks are the attacks of the security curve.
var curveAttacks = []string{"fgsm", "pgd-20"}

// minCurve is the least number of points with which the threat's epsilon is
// on the curve and two points are beyond it.
const minCurve = 4

// Run evaluates the model on the test set. The same model, set and options
// give an equal report. Errors: options that do not go together, a set that
// the model does not fit, a model whose outputs are not finite, an attack that
// leaves its threat model, ctx done.
func Run(ctx context.Context, m attack.Model, test *dataset.Set, o Options) (*Report, error) {
	e, err := newMeasurement(m, test, o)
	if err != nil {
		return nil, fmt.Errorf("evaluate: %w", err)
	}
	if err := e.attackAll(ctx); err != nil {
		return nil, fmt.Errorf("evaluate: %w", err)
	}
	if err := e.drawCurve(ctx); err != nil {
		return nil, fmt.Errorf("evaluate: %w", err)
	}
	r, err := e.report()
	if err != nil || !o.Certify {
		return r, err
	}
	r.Certified = new(Certified)
	c := r.Certified
	if c.CertifiedCorrect, err = certify.Accuracy(ctx, m.Network(), e.test, e.test.Len(), o.Threat); err != nil {
		return nil, fmt.Errorf("evaluate: %w", err)
	}
	c.CertifiedAccuracy, c.CertifiedAccuracyLowerBound = accuracy(c.CertifiedCorrect, e.test.Len())
	return r, r.Validate()
}

// Predict returns the model's class of every example.
func Predict(ctx context.Context, m attack.Model, set *dataset.Set) ([]uint8, error) {
	if err := Fits(m, set); err != nil {
		return nil, err
	}
	var all []uint8
	x := make([]float32, m.Batch()*set.Shape.Size())
	for lo := 0; lo < set.Len(); lo += m.Batch() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		hi := min(lo+m.Batch(), set.Len())
		set.Read(x, lo, hi)
		got, err := predict(m, x, hi-lo)
		if err != nil {
			return nil, err
		}
		all = append(all, got...)
	}
	return all, nil
}

// Fits reports whether a model can be evaluated on a set: examples, shape and
// number of classes.
func Fits(m attack.Model, set *dataset.Set) error {
	if set.Len() == 0 {
		return errors.New("the test set is empty")
	}
	n := m.Network()
	if n.Input != set.Shape {
		return fmt.Errorf("network %s takes images of %v, dataset %s has images of %v", n.Name, n.Input, set.Name, set.Shape)
	}
	if n.Classes() != len(set.Classes) {
		return fmt.Errorf("network %s has %d classes, dataset %s has %d", n.Name, n.Classes(), set.Name, len(set.Classes))
	}
	return set.Validate()
}

// predict returns the classes of the first n images of x.
func predict(m attack.Model, x []float32, n int) ([]uint8, error) {
	size, classes := m.Network().Input.Size(), m.Network().Classes()
	all := make([]uint8, 0, n)
	for lo := 0; lo < n; lo += m.Batch() {
		rows := min(m.Batch(), n-lo)
		logits, err := m.Logits(x[lo*size:(lo+rows)*size], rows)
		if err != nil {
			return nil, err
		}
		for row := range slices.Chunk(logits[:rows*classes], classes) {
			best := 0
			for c, v := range row {
				if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
					return nil, fmt.Errorf("network %s gives the output %v for example %d: the model is damaged", m.Network().Name, v, len(all))
				}
				if v > row[best] {
					best = c
				}
			}
			all = append(all, uint8(best))
		}
	}
	return all, nil
}

// attempt is one attack made on one model.
type attempt struct {
	attack  attack.Attack
	on      attack.Model
	madeOn  string
	correct int
	broken  int
}

type measurement struct {
	model    attack.Model
	test     *dataset.Set // cut to the samples
	options  Options
	attempts []*attempt
	epsilons []float64 // of the curve
	curve    []Series

	clean, worst []uint8 // predictions
	robust       int
	examples     map[uint8]Example // one for each label

	done, total int
}

func newMeasurement(m attack.Model, test *dataset.Set, o Options) (*measurement, error) {
	if err := o.Threat.Validate(); err != nil {
		return nil, err
	}
	if err := Fits(m, test); err != nil {
		return nil, err
	}
	if o.Samples < 0 || o.Samples > test.Len() {
		return nil, fmt.Errorf("samples is %d: dataset %s has %d test examples", o.Samples, test.Name, test.Len())
	}
	if o.Samples == 0 {
		o.Samples = test.Len()
	}
	if o.Examples < 0 || o.Examples > maxExamples {
		return nil, fmt.Errorf("examples is %d: must be 0 to %d", o.Examples, maxExamples)
	}
	if o.CurvePoints != 0 && (o.CurvePoints < minCurve || o.CurvePoints > maxPoints) {
		return nil, fmt.Errorf("curve points is %d: must be 0, or %d to %d", o.CurvePoints, minCurve, maxPoints)
	}
	if o.CurveSamples == 0 {
		o.CurveSamples = min(curveSamples, o.Samples)
	}
	if o.CurveSamples < 0 || o.CurveSamples > o.Samples {
		return nil, fmt.Errorf("curve samples is %d: must be 1 to the %d samples", o.CurveSamples, o.Samples)
	}
	if o.DatasetDigest == "" {
		o.DatasetDigest = test.Digest()
	}
	e := &measurement{model: m, test: test.Slice(0, o.Samples), options: o, examples: map[uint8]Example{}}
	if err := e.plan(); err != nil {
		return nil, err
	}
	for i := range o.CurvePoints {
		epsilon := o.Threat.Epsilon * float64(i) / float64(o.CurvePoints-minCurve+1)
		e.epsilons = append(e.epsilons, math.Round(epsilon*1e9)/1e9) // 0.42 and not 0.42000000000000004
	}
	e.total = o.Samples*(1+len(e.attempts)) + o.CurveSamples*len(e.epsilons)*len(curveAttacks)
	return e, nil
}

// plan lists the attacks to make, and on which model.
func (e *measurement) plan() error {
	o := e.options
	if len(o.Attacks) == 0 || len(o.Attacks) > maxAttacks/2 {
		return fmt.Errorf("%d attacks: must be 1 to %d", len(o.Attacks), maxAttacks/2)
	}
	for _, spec := range o.Attacks {
		a, err := attack.Parse(spec, o.Threat)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(e.attempts, func(other *attempt) bool { return other.attack.Name() == a.Name() }) {
			return fmt.Errorf("attack %s is listed twice", a.Name())
		}
		e.attempts = append(e.attempts, &attempt{attack: a, on: e.model})
	}
	if o.Source == nil {
		return nil
	}
	if o.SourceDigest == "" {
		return errors.New("the model that examples are transferred from has no digest: it must be named in the report")
	}
	if err := Fits(o.Source, e.test); err != nil {
		return fmt.Errorf("model to transfer from: %w", err)
	}
	for _, a := range e.attempts[:len(e.attempts):len(e.attempts)] {
		e.attempts = append(e.attempts, &attempt{attack: a.attack, on: o.Source, madeOn: o.SourceDigest})
	}
	return nil
}

func (e *measurement) advance(examples int) {
	e.done += examples
	if e.options.Progress != nil {
		e.options.Progress(e.done, e.total)
	}
}

// attackAll fills in the predictions and the counts of every attempt.
func (e *measurement) attackAll(ctx context.Context) error {
	size := e.test.Shape.Size()
	x := make([]float32, min(chunk, e.test.Len())*size)
	for lo := 0; lo < e.test.Len(); lo += chunk {
		hi := min(lo+chunk, e.test.Len())
		x := x[:(hi-lo)*size]
		e.test.Read(x, lo, hi)
		if err := e.attackChunk(ctx, x, lo, hi); err != nil {
			return err
		}
	}
	return nil
}

func (e *measurement) attackChunk(ctx context.Context, x []float32, lo, hi int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	clean, err := predict(e.model, x, hi-lo)
	if err != nil {
		return err
	}
	e.advance(hi - lo)
	labels := e.test.Labels[lo:hi]
	worst := slices.Clone(clean)
	size := e.test.Shape.Size()
	for _, a := range e.attempts {
		adv, err := e.perturb(ctx, a, x, labels, lo)
		if err != nil {
			return err
		}
		got, err := predict(e.model, adv, hi-lo)
		if err != nil {
			return fmt.Errorf("under %s: %w", a.attack.Name(), err)
		}
		for i, label := range labels {
			if got[i] == label {
				a.correct++
			} else if clean[i] == label {
				a.broken++
				if worst[i] == label {
					worst[i] = got[i]
				}
			}
			e.keep(Example{
				Index: lo + i, Label: int(label), Prediction: int(clean[i]),
				Attack: a.attack.Name(), AdversarialPrediction: int(got[i]),
			}, x[i*size:(i+1)*size], adv[i*size:(i+1)*size])
		}
		e.advance(hi - lo)
	}
	for i, label := range labels {
		if worst[i] == label {
			e.robust++
		}
	}
	e.clean = append(e.clean, clean...)
	e.worst = append(e.worst, worst...)
	return nil
}

// perturb makes adversarial examples and checks that they are within the
// threat model: the figures below are about that model and no other.
func (e *measurement) perturb(ctx context.Context, a *attempt, x []float32, labels []uint8, lo int) ([]float32, error) {
	adv, err := a.attack.Perturb(ctx, a.on, x, labels, e.options.Seed+uint64(lo/chunk))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.attack.Name(), err)
	}
	if err := e.options.Threat.Verify(adv, x, e.test.Shape.Size()); err != nil {
		return nil, fmt.Errorf("%s: %w", a.attack.Name(), err)
	}
	return adv, nil
}

// keep remembers one example of each label: the first that the attacks broke,
// or the first at all.
func (e *measurement) keep(x Example, clean, adversarial []float32) {
	breaks := func(x Example) bool { return x.Prediction == x.Label && x.AdversarialPrediction != x.Label }
	label := uint8(x.Label)
	if kept, ok := e.examples[label]; ok && (breaks(kept) || !breaks(x)) || e.options.Examples == 0 {
		return
	}
	x.Clean, x.Adversarial = toBytes(clean), toBytes(adversarial)
	e.examples[label] = x
}

// toBytes rounds pixels of [0,1] to 0..255.
func toBytes(pixels []float32) []byte {
	b := make([]byte, len(pixels))
	for i, v := range pixels {
		b[i] = byte(math.Round(255 * float64(v)))
	}
	return b
}

// drawCurve measures accuracy over epsilon, from 0 to beyond the threat's.
func (e *measurement) drawCurve(ctx context.Context) error {
	if len(e.epsilons) == 0 {
		return nil
	}
	n := e.options.CurveSamples
	x := make([]float32, n*e.test.Shape.Size())
	e.test.Read(x, 0, n)
	labels := e.test.Labels[:n]
	for _, spec := range curveAttacks {
		s := Series{Attack: spec}
		for _, epsilon := range e.epsilons {
			threat := e.options.Threat
			threat.Epsilon = epsilon
			a, err := attack.Parse(spec, threat)
			if err != nil {
				return err
			}
			adv := x
			if epsilon > 0 {
				if adv, err = a.Perturb(ctx, e.model, x, labels, e.options.Seed); err != nil {
					return fmt.Errorf("security curve: %s at epsilon %v: %w", spec, epsilon, err)
				}
			}
			got, err := predict(e.model, adv, n)
			if err != nil {
				return fmt.Errorf("security curve: %s at epsilon %v: %w", spec, epsilon, err)
			}
			s.Points = append(s.Points, Point{Epsilon: epsilon, Accuracy: fraction(countRight(got, labels), n)})
			e.advance(n)
		}
		e.curve = append(e.curve, s)
	}
	return nil
}

func countRight(predictions, labels []uint8) int {
	n := 0
	for i, p := range predictions {
		if p == labels[i] {
			n++
		}
	}
	return n
}

func (e *measurement) report() (*Report, error) {
	o, n := e.options, e.test.Len()
	r := &Report{
		ModelDigest: o.ModelDigest, Network: e.model.Network().Name,
		Dataset: e.test.Name, DatasetDigest: o.DatasetDigest,
		Threat: o.Threat, Seed: o.Seed, Samples: n, Confidence: Confidence,
		CleanCorrect: countRight(e.clean, e.test.Labels), RobustCorrect: e.robust,
		Shape: e.test.Shape, Curve: e.curve,
	}
	r.CleanAccuracy, r.CleanAccuracyLowerBound = accuracy(r.CleanCorrect, n)
	r.RobustAccuracy, r.RobustAccuracyLowerBound = accuracy(r.RobustCorrect, n)
	for _, a := range e.attempts {
		result := Attack{Name: a.attack.Name(), MadeOn: a.madeOn, Correct: a.correct, Broken: a.broken, SuccessRate: fraction(a.broken, r.CleanCorrect)}
		result.Accuracy, result.AccuracyLowerBound = accuracy(a.correct, n)
		r.Attacks = append(r.Attacks, result)
	}
	if len(e.curve) > 0 {
		r.CurveSamples = o.CurveSamples
	}
	if err := r.addConfusion(e.test, e.clean, e.worst); err != nil {
		return nil, fmt.Errorf("evaluate: %w", err)
	}
	for label := range e.test.Classes {
		if x, ok := e.examples[uint8(label)]; ok && len(r.Examples) < o.Examples {
			r.Examples = append(r.Examples, x)
		}
	}
	return r, r.Validate()
}

func accuracy(correct, n int) (accuracy, lowerBound float64) {
	return fraction(correct, n), interval.Lower(correct, n, Confidence)
}

func (r *Report) addConfusion(test *dataset.Set, clean, worst []uint8) error {
	k := len(test.Classes)
	cleanCounts, err := golearnMatrix(test.Labels, clean, k)
	if err != nil {
		return err
	}
	worstCounts, err := golearnMatrix(test.Labels, worst, k)
	if err != nil {
		return err
	}
	r.Confusion = Confusion{Clean: toTable(cleanCounts, k), Adversarial: toTable(worstCounts, k)}
	cleanMetrics, worstMetrics := metrics(cleanCounts, k), metrics(worstCounts, k)
	for i, name := range test.Classes {
		r.Classes = append(r.Classes, Class{Name: name, Clean: cleanMetrics[i], Adversarial: worstMetrics[i]})
	}
	return nil
}
