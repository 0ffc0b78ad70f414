package evaluate

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/temper-ml/temper/models/interval"
)

// Reduce counts all parts of one evaluation, in any order, and judges its
// checks. Parts that are missing, doubled or of another evaluation are an
// error.
func Reduce(parts []*Part, t Thresholds) (*Report, error) {
	r, err := reduce(parts, t)
	if err != nil {
		return nil, fmt.Errorf("evaluate: %w", err)
	}
	return r, r.Validate()
}

func reduce(parts []*Part, t Thresholds) (*Report, error) {
	if len(parts) == 0 {
		return nil, errors.New("there are no parts")
	}
	parts = slices.SortedFunc(slices.Values(parts), func(a, b *Part) int { return cmp.Compare(a.Shard, b.Shard) })
	first := parts[0]
	if len(parts) != first.Shards {
		return nil, fmt.Errorf("%d parts of %d", len(parts), first.Shards)
	}
	for i, p := range parts {
		if err := p.validate(); err != nil {
			return nil, err
		}
		if p.Shards != first.Shards || p.Shard != i+1 {
			return nil, fmt.Errorf("shard %d of %d is where %d of %d should be: give each part once", p.Shard, p.Shards, i+1, first.Shards)
		}
		if !reflect.DeepEqual(p.Plan, first.Plan) {
			return nil, fmt.Errorf("shards %d and %d are not of one evaluation: model, data set, threat, seed and attacks must be the same", first.Shard, p.Shard)
		}
	}

	w := &whole{plan: &first.Plan, labels: interleave(parts, func(p *Part) []byte { return p.Labels }), clean: interleave(parts, func(p *Part) []byte { return p.Clean })}
	for i := range w.plan.Trials {
		w.answers = append(w.answers, interleave(parts, func(p *Part) []byte { return p.Answers[i] }))
	}
	if w.plan.Checks {
		w.signs.Disjoint = true
	}
	examples := map[int]Example{}
	for _, p := range parts {
		if p.Signs != nil {
			w.signs.add(p.Signs)
		}
		for _, x := range p.Examples {
			if kept, ok := examples[x.Label]; !ok || x.before(kept) {
				examples[x.Label] = x
			}
		}
	}
	r, err := w.report()
	if err != nil {
		return nil, err
	}
	for _, label := range slices.Sorted(maps.Keys(examples)) {
		if len(r.Examples) < w.plan.Examples {
			r.Examples = append(r.Examples, examples[label])
		}
	}
	if w.plan.Certify {
		r.Certified = new(Certified)
		for _, p := range parts {
			r.CertifiedCorrect += p.Proven
		}
		r.CertifiedAccuracy, r.CertifiedAccuracyLowerBound = accuracy(r.CertifiedCorrect, r.Samples)
	}
	if w.plan.Checks {
		r.CheckSamples = w.plan.CheckSamples
		r.Checks = w.checks(r, t)
	}
	return r, nil
}

func (s *Signs) add(o *Signs) {
	s.Tried += o.Tried
	s.Difference = max(s.Difference, o.Difference)
	s.Probabilities += o.Probabilities
	s.ZeroGradients += o.ZeroGradients
	s.Trained += o.Trained
	s.Disjoint = s.Disjoint && o.Disjoint
}

// interleave puts the classes of all samples back in order.
func interleave(parts []*Part, of func(*Part) []byte) []byte {
	n := 0
	for _, p := range parts {
		n += len(of(p))
	}
	all := make([]byte, n)
	for i, p := range parts {
		for j, class := range of(p) {
			all[i+j*len(parts)] = class
		}
	}
	return all
}

// whole is what became of all samples.
type whole struct {
	plan          *Plan
	labels, clean []byte
	answers       [][]byte // by trial
	signs         Signs
}

func (w *whole) report() (*Report, error) {
	p, n := w.plan, w.plan.Samples
	r := &Report{
		ModelDigest: p.ModelDigest, Network: p.Network, Dataset: p.Dataset, DatasetDigest: p.DatasetDigest,
		Threat: p.Threat, Box: [2]float64{0, 1}, Preprocessing: p.Preprocessing, Seed: p.Seed,
		Samples: n, Drawn: p.Drawn, Confidence: Confidence, Shape: p.Shape, Suite: p.Suite,
		CleanCorrect: countRight(w.clean, w.labels),
	}
	worst := slices.Clone(w.clean) // the answer to the first attack that broke the example
	for i, t := range p.Trials {
		switch t.For {
		case "attack", "suite":
			a := Attack{Name: t.Attack, MadeOn: t.MadeOn, Correct: countRight(w.answers[i], w.labels)}
			before := w.clean
			if t.After >= 0 {
				before = w.answers[t.After]
			}
			if t.For == "suite" {
				a.Tried = countRight(before, w.labels)
			}
			for j, label := range w.labels {
				got := w.answers[i][j]
				if w.clean[j] == label && got != label {
					a.Broken++
					if worst[j] == label {
						worst[j] = got
					}
				}
			}
			a.SuccessRate = fraction(a.Broken, r.CleanCorrect)
			a.Accuracy, a.AccuracyLowerBound = accuracy(a.Correct, n)
			r.Attacks = append(r.Attacks, a)
		case "curve":
			if len(r.Curve) == 0 || r.Curve[len(r.Curve)-1].Attack != t.Attack {
				r.Curve = append(r.Curve, Series{Attack: t.Attack})
			}
			s := &r.Curve[len(r.Curve)-1]
			s.Points = append(s.Points, Point{Epsilon: t.Epsilon, Accuracy: w.share(i)})
			r.CurveSamples = t.First
		}
	}
	r.RobustCorrect = countRight(worst, w.labels)
	r.CleanAccuracy, r.CleanAccuracyLowerBound = accuracy(r.CleanCorrect, n)
	r.RobustAccuracy, r.RobustAccuracyLowerBound = accuracy(r.RobustCorrect, n)
	return r, r.addConfusion(w.labels, p.Classes, w.clean, worst)
}

// share is the share of right answers to a trial.
func (w *whole) share(trial int) float64 {
	got := w.answers[trial]
	return fraction(countRight(got, w.labels[:len(got)]), len(got))
}

func accuracy(correct, n int) (accuracy, lowerBound float64) {
	return fraction(correct, n), interval.Lower(correct, n, Confidence)
}

func (r *Report) addConfusion(labels []uint8, classes []string, clean, worst []uint8) error {
	k := len(classes)
	cleanCounts, err := golearnMatrix(labels, clean, k)
	if err != nil {
		return err
	}
	worstCounts, err := golearnMatrix(labels, worst, k)
	if err != nil {
		return err
	}
	r.Confusion = Confusion{Clean: toTable(cleanCounts, k), Adversarial: toTable(worstCounts, k)}
	cleanMetrics, worstMetrics := metrics(cleanCounts, k), metrics(worstCounts, k)
	for i, name := range classes {
		r.Classes = append(r.Classes, Class{Name: name, Clean: cleanMetrics[i], Adversarial: worstMetrics[i]})
	}
	return nil
}
