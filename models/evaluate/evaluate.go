// Package evaluate measures a classifier: how often it is right on clean
// examples, under each attack, and under the worst attack for each example;
// with confidence bounds, a security curve, golearn's confusion matrices and
// metrics, and the checks without which no figure is to be believed.
//
// Measure writes down what became of every example (a Part), and Reduce counts
// it. The examples can be divided among machines: an example's fate depends on
// the model, the seed and itself only, so that the parts of any division reduce
// to one report.
package evaluate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
)

// Options say what to measure.
type Options struct {
	Threat  attack.Threat
	Attacks []string // as attack.Parse takes them, each made on every example
	Suite   string   // "standard": also the attacks of attack.Standard, each made on what the ones before left; "" for none
	Samples int      // how many examples of the test set; 0 means all
	Drawn   bool     // the samples are drawn by the seed; otherwise they are the first
	Seed    uint64   // of everything random

	// Shard, from 1 to Shards, measures a part of the samples: every Shards-th
	// one. 0 of 0 is all of them.
	Shard, Shards int

	// Source, where set, is another model: every attack is also made on it
	// and tried on this one.
	Source       attack.Model
	SourceDigest string

	// Certify also counts what is provably right: see package certify.
	Certify bool

	Checks bool         // also measure what the checks are about; needs a suite
	Train  *dataset.Set // what the model was trained on: for the check that no sample is among it

	CurvePoints  int // values of epsilon on the security curve, 0 for no curve, which checks need
	CurveSamples int // the first samples for the curve and the checks; 0 means 500, or all where there are fewer
	Examples     int // images to keep for the report page

	ModelDigest   string // recorded as given
	DatasetDigest string // recorded as given; "" means that of the test set

	// Progress, where set, is called with 0 <= done <= total, in a unit of its
	// own; done never falls.
	Progress func(done, total int)

	// Made, where set, is called after an attack was made on some images and left
	// some of them right.
	Made func(t Trial, tried, left int, took time.Duration)
}

// Confidence is that of the one-sided bounds in every report.
const Confidence = 0.95

// chunk is how many examples are attacked at a time: it bounds memory.
const chunk = 1000

// curveSamples keeps a curve of 8 points to seconds, and the checks to minutes.
const curveSamples = 500

// curveAttacks are the attacks of the security curve.
var curveAttacks = []string{"fgsm", "pgd-20"}

// minCurve is the least number of points with which the threat's epsilon is
// on the curve and two points are beyond it.
const minCurve = 4

// Suites are the names that Options.Suite takes.
func Suites() []string { return []string{"standard"} }

// Run measures all of the samples and counts. The same model, set and options
// give an equal report. Errors: options that do not go together, a set that
// the model does not fit, a model whose outputs are not finite, an attack that
// leaves its threat model, ctx done.
func Run(ctx context.Context, m attack.Model, test *dataset.Set, o Options) (*Report, error) {
	if o.Shards > 1 {
		return nil, fmt.Errorf("evaluate: shard %d of %d is not the whole: Measure it, and Reduce all", o.Shard, o.Shards)
	}
	p, err := Measure(ctx, m, test, o)
	if err != nil {
		return nil, err
	}
	return Reduce([]*Part{p}, DefaultThresholds())
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

// toBytes rounds pixels of [0,1] to 0..255.
func toBytes(pixels []float32) []byte {
	b := make([]byte, len(pixels))
	for i, v := range pixels {
		b[i] = byte(math.Round(255 * float64(v)))
	}
	return b
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
