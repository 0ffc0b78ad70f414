package evaluate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/certify"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/unknown"
)

// Part is what became of a part of the samples: one of Shards, the samples at
// positions Shard-1, Shard-1+Shards and so on. Classes are one byte each, in
// the order of the positions.
type Part struct {
	Plan   Plan `json:"plan"` // equal in all parts of one evaluation
	Shard  int  `json:"shard"`
	Shards int  `json:"shards"`

	Labels   []byte    `json:"labels"`
	Clean    []byte    `json:"clean"`    // the model's answers
	Answers  [][]byte  `json:"answers"`  // to each trial of the plan; shorter where it was made on the first samples only
	Signs    *Signs    `json:"signs"`    // nil without checks
	Proven   int       `json:"proven"`   // samples that are certified
	Examples []Example `json:"examples"` // for the page: of each label the first that was broken, or the first
}

// Plan says what is measured.
type Plan struct {
	ModelDigest   string        `json:"model_digest"`
	Network       string        `json:"network"`
	Dataset       string        `json:"dataset"`
	DatasetDigest string        `json:"dataset_digest"`
	Threat        attack.Threat `json:"threat"`
	Preprocessing string        `json:"preprocessing"`
	Seed          uint64        `json:"seed"`
	Samples       int           `json:"samples"`
	Drawn         bool          `json:"drawn,omitempty"`
	Shape         nn.Shape      `json:"shape"`
	Classes       []string      `json:"classes"`
	Suite         string        `json:"suite,omitempty"`
	Checks        bool          `json:"checks,omitempty"`
	Certify       bool          `json:"certify,omitempty"`
	CheckSamples  int           `json:"check_samples"`
	Examples      int           `json:"examples"`
	Trials        []Trial       `json:"trials"`
}

// Trial is one attack made on some samples.
type Trial struct {
	For     string  `json:"for"`    // "attack", "suite", "curve" or "check"
	Attack  string  `json:"attack"` // as attack.Parse takes it
	Epsilon float64 `json:"epsilon"`
	MadeOn  string  `json:"made_on,omitempty"` // digest of another model
	First   int     `json:"first"`             // how many samples it is made on
	After   int     `json:"after"`             // the trial whose survivors it is made on; -1 for none
}

// Signs are what the model's behaviour shows apart from any attack, over the
// check's samples of the part.
type Signs struct {
	Tried         int     `json:"tried"`
	Difference    float64 `json:"difference"`     // greatest of the same question asked several times, relative to the outputs
	Probabilities int     `json:"probabilities"`  // examples whose outputs are probabilities
	ZeroGradients int     `json:"zero_gradients"` // examples where the loss has no gradient at all
	Trained       int     `json:"trained"`        // samples that are also in the training set; all samples are looked at
	Disjoint      bool    `json:"disjoint"`       // there was a training set to compare with
}

// What the checks measure on the side.
const (
	// escalationSamples bounds the cost of Square with five times the queries.
	escalationSamples = 50
	convergedAttack   = "apgd-ce-200"  // twice the iterations of the suite's
	escalatedAttack   = "square-25000" // five times the queries of the suite's
	unboundedAttack   = "apgd-ce"
	noiseAttack       = "noise"
	transferAttack    = "pgd-20"
	repetitions       = 5
)

// Measure attacks the samples of a shard. Errors are those of Run.
func Measure(ctx context.Context, m attack.Model, test *dataset.Set, o Options) (*Part, error) {
	e, err := newMeasurement(m, test, o)
	if err == nil {
		err = e.run(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("evaluate: %w", err)
	}
	return e.part, nil
}

// attempt is a trial with what makes it.
type attempt struct {
	Trial
	attack attack.Attack
	on     attack.Model
}

type measurement struct {
	model     attack.Model
	test      *dataset.Set
	options   Options
	positions []int // among the samples, of this shard
	index     []int // in the test set, of the same
	attempts  []attempt
	part      *Part
	examples  map[uint8]Example // by label
	done      int
	total     int
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
	if o.Shards == 0 {
		o.Shard, o.Shards = 1, 1
	}
	if o.Shard < 1 || o.Shard > o.Shards || o.Shards > o.Samples {
		return nil, fmt.Errorf("shard %d of %d: must be from 1 to the number of shards, and those at most the %d samples", o.Shard, o.Shards, o.Samples)
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
	if o.Suite != "" && !slices.Contains(Suites(), o.Suite) {
		return nil, unknown.Name("suite", o.Suite, Suites())
	}
	if o.Checks && (o.Suite == "" || o.CurvePoints == 0) {
		return nil, errors.New("the checks need a suite of attacks and a curve: a figure of other attacks cannot be checked")
	}
	if o.DatasetDigest == "" {
		o.DatasetDigest = test.Digest()
	}
	e := &measurement{model: m, test: test, options: o, examples: map[uint8]Example{}}
	order := make([]int, test.Len())
	for i := range order {
		order[i] = i
	}
	if o.Drawn {
		rand.New(rand.NewPCG(o.Seed, drawStream)).Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	}
	for at := o.Shard - 1; at < o.Samples; at += o.Shards {
		e.positions, e.index = append(e.positions, at), append(e.index, order[at])
	}
	if err := e.plan(); err != nil {
		return nil, err
	}
	plan := Plan{
		ModelDigest: o.ModelDigest, Network: m.Network().Name, Dataset: test.Name, DatasetDigest: o.DatasetDigest,
		Threat: o.Threat, Preprocessing: preprocessing(m.Network()), Seed: o.Seed, Samples: o.Samples, Drawn: o.Drawn, Shape: test.Shape, Classes: test.Classes,
		Suite: o.Suite, Checks: o.Checks, Certify: o.Certify, CheckSamples: o.CurveSamples, Examples: o.Examples,
	}
	e.part = &Part{Shard: o.Shard, Shards: o.Shards, Answers: make([][]byte, len(e.attempts))}
	for _, a := range e.attempts {
		plan.Trials = append(plan.Trials, a.Trial)
		e.total += e.first(a.First)
	}
	e.part.Plan = plan
	e.total += len(e.index)
	if o.Checks {
		e.part.Signs = new(Signs)
	}
	return e, nil
}

// preprocessing says what the network itself does to the pixels of [0,1] first.
// There is none outside of it, so that epsilon is in those pixels.
func preprocessing(n *nn.Network) string {
	for i, l := range n.Layers {
		if l.Normalise != nil && n.Inputs(i)[0] == -1 {
			return fmt.Sprintf("(x - %v) / %v, in the network", l.Normalise.Mean, l.Normalise.Std)
		}
	}
	return "none"
}

// drawStream keeps the draw of samples apart from other uses of the seed.
const drawStream = 0x73616d706c6573

// first is how many of the shard's samples are among the first n of all.
func (e *measurement) first(n int) int {
	at, _ := slices.BinarySearch(e.positions, n)
	return at
}

// epsilons are those of the curve, from 0 to beyond the threat's.
func (o *Options) epsilons() []float64 {
	var all []float64
	for i := range o.CurvePoints {
		epsilon := o.Threat.Epsilon * float64(i) / float64(o.CurvePoints-minCurve+1)
		all = append(all, math.Round(epsilon*1e9)/1e9) // 0.42 and not 0.42000000000000004
	}
	return all
}

// plan lists the attacks to make, on which model and samples.
func (e *measurement) plan() error {
	o := &e.options
	if len(o.Attacks) == 0 && o.Suite == "" || len(o.Attacks) > maxAttacks/2 {
		return fmt.Errorf("%d attacks: must be 1 to %d", len(o.Attacks), maxAttacks/2)
	}
	if o.Source != nil {
		if o.SourceDigest == "" {
			return errors.New("the model that examples are transferred from has no digest: it must be named in the report")
		}
		if err := Fits(o.Source, e.test); err != nil {
			return fmt.Errorf("model to transfer from: %w", err)
		}
	}
	named := map[string]bool{}
	for _, spec := range o.Attacks {
		a, err := attack.Parse(spec, o.Threat)
		if err != nil {
			return err
		}
		if named[a.Name()] {
			return fmt.Errorf("attack %s is listed twice", a.Name())
		}
		named[a.Name()] = true
		e.add(Trial{For: "attack", Attack: a.Name(), After: -1})
	}
	last := -1
	if o.Suite != "" {
		for _, spec := range suite(o.Threat) {
			if named[spec] {
				return fmt.Errorf("attack %s is listed, and of the suite %s too", spec, o.Suite)
			}
			last = e.add(Trial{For: "suite", Attack: spec, After: last})
		}
	}
	if o.Source != nil {
		for _, a := range e.attempts {
			if a.For == "attack" {
				e.add(Trial{For: "attack", Attack: a.Attack, MadeOn: o.SourceDigest, After: -1})
			}
		}
	}
	for _, spec := range curveAttacks {
		for _, epsilon := range o.epsilons() {
			e.add(Trial{For: "curve", Attack: spec, Epsilon: epsilon, First: o.CurveSamples, After: -1})
		}
	}
	if o.Checks {
		half, all := unbounded(o.Threat, e.test.Shape)
		few := o.CurveSamples
		e.add(Trial{For: "check", Attack: noiseAttack, First: few, After: -1})
		at := e.add(Trial{For: "check", Attack: unboundedAttack, Epsilon: half, First: few, After: -1})
		e.add(Trial{For: "check", Attack: unboundedAttack, Epsilon: all, First: few, After: at})
		e.add(Trial{For: "check", Attack: convergedAttack, First: few, After: last})
		e.add(Trial{For: "check", Attack: escalatedAttack, First: min(few, escalationSamples), After: last})
		if o.Source != nil {
			e.add(Trial{For: "check", Attack: transferAttack, MadeOn: o.SourceDigest, First: few, After: -1})
		}
	}
	for i := range e.attempts {
		a := &e.attempts[i]
		threat := o.Threat
		threat.Epsilon = a.Epsilon
		var err error
		if a.attack, err = attack.Parse(a.Attack, threat); err != nil {
			return err
		}
		if a.on = e.model; a.MadeOn != "" {
			a.on = o.Source
		}
	}
	return nil
}

// add plans a trial; an epsilon of 0 outside of the curve is the threat's.
func (e *measurement) add(t Trial) int {
	if t.Epsilon == 0 && t.For != "curve" {
		t.Epsilon = e.options.Threat.Epsilon
	}
	if t.First == 0 {
		t.First = e.options.Samples
	}
	e.attempts = append(e.attempts, attempt{Trial: t})
	return len(e.attempts) - 1
}

// suite lists the standard ensemble's attacks for a threat: FAB is for the
// maximum norm only.
func suite(t attack.Threat) []string {
	return slices.DeleteFunc(attack.Standard(), func(name string) bool { return name == "fab-t" && t.Norm != "linf" })
}

// unbounded are two radii: with one every image can become the same grey, with
// the other any image at all.
func unbounded(t attack.Threat, shape nn.Shape) (half, all float64) {
	if t.Norm == "l2" {
		all = math.Sqrt(float64(shape.Size()))
		return all / 2, all
	}
	return 0.5, 1
}

func (e *measurement) advance(examples int) {
	e.done += examples
	if e.options.Progress != nil {
		e.options.Progress(e.done, e.total)
	}
}

func (e *measurement) run(ctx context.Context) error {
	size := e.test.Shape.Size()
	x := make([]float32, min(chunk, len(e.index))*size)
	for lo := 0; lo < len(e.index); lo += chunk {
		hi := min(lo+chunk, len(e.index))
		x := x[:(hi-lo)*size]
		e.test.Gather(x, e.index[lo:hi])
		if err := e.attackChunk(ctx, x, lo); err != nil {
			return err
		}
	}
	for label := range e.test.Classes {
		if x, ok := e.examples[uint8(label)]; ok {
			e.part.Examples = append(e.part.Examples, x)
		}
	}
	if e.options.Checks && e.options.Train != nil {
		e.part.Signs.Trained, e.part.Signs.Disjoint = dataset.Overlap(e.options.Train, e.samples()), true
	}
	if e.options.Certify {
		var err error
		if e.part.Proven, err = certify.Accuracy(ctx, e.model.Network(), e.samples(), len(e.index), e.options.Threat); err != nil {
			return err
		}
	}
	return nil
}

// samples are those of the shard as a set.
func (e *measurement) samples() *dataset.Set {
	s := &dataset.Set{Name: e.test.Name, Shape: e.test.Shape, Classes: e.test.Classes, Labels: e.part.Labels}
	s.Floats = make([]float32, len(e.index)*s.Shape.Size())
	e.test.Gather(s.Floats, e.index)
	return s
}

// attackChunk makes all trials on the samples from position lo of the shard.
func (e *measurement) attackChunk(ctx context.Context, x []float32, lo int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	size := e.test.Shape.Size()
	n := len(x) / size
	labels := make([]uint8, n)
	for i, at := range e.index[lo : lo+n] {
		labels[i] = e.test.Labels[at]
	}
	clean, err := predict(e.model, x, n)
	if err != nil {
		return err
	}
	e.part.Labels, e.part.Clean = append(e.part.Labels, labels...), append(e.part.Clean, clean...)
	e.advance(n)
	if e.options.Checks {
		if few := min(n, e.first(e.options.CurveSamples)-lo); few > 0 {
			if err := e.observe(x[:few*size], labels[:few]); err != nil {
				return err
			}
		}
	}
	var some []float32 // the images of a trial
	var who []int      // and where they are in x
	var whose []uint8
	for t := range e.attempts {
		a := &e.attempts[t]
		first := min(n, e.first(a.First)-lo)
		if first <= 0 {
			continue
		}
		answers := slices.Clone(clean[:first])
		if a.After >= 0 {
			copy(answers, e.part.Answers[a.After][lo:])
		}
		some, who, whose = some[:0], who[:0], whose[:0]
		for i := range first {
			if a.After < 0 && a.For != "suite" || answers[i] == labels[i] {
				who, whose = append(who, i), append(whose, labels[i])
				some = append(some, x[i*size:(i+1)*size]...)
			}
		}
		if len(who) > 0 {
			began := time.Now()
			adv, err := e.perturb(ctx, a, some, whose)
			took := time.Since(began)
			if err != nil {
				return err
			}
			got, err := predict(e.model, adv, len(who))
			if err != nil {
				return fmt.Errorf("under %s: %w", a.Attack, err)
			}
			if e.options.Made != nil {
				e.options.Made(a.Trial, len(who), countRight(got, whose), took)
			}
			for j, i := range who {
				answers[i] = got[j]
				if a.For == "attack" || a.For == "suite" {
					e.keep(Example{
						Index: e.index[lo+i], Label: int(labels[i]), Prediction: int(clean[i]),
						Attack: a.Attack, AdversarialPrediction: int(got[j]),
					}, some[j*size:(j+1)*size], adv[j*size:(j+1)*size])
				}
			}
		}
		e.part.Answers[t] = append(e.part.Answers[t], answers...)
		e.advance(first)
	}
	return nil
}

// perturb makes adversarial examples and checks that they are within the
// threat model: the figures below are about that model and no other.
func (e *measurement) perturb(ctx context.Context, a *attempt, x []float32, labels []uint8) ([]float32, error) {
	if a.Epsilon == 0 {
		return x, nil
	}
	adv, err := a.attack.Perturb(ctx, a.on, x, labels, e.options.Seed)
	if err != nil {
		return nil, fmt.Errorf("%s: epsilon %v: %w", a.Attack, a.Epsilon, err)
	}
	threat := e.options.Threat
	threat.Epsilon = a.Epsilon
	if err := threat.Verify(adv, x, e.test.Shape.Size()); err != nil {
		return nil, fmt.Errorf("%s: %w", a.Attack, err)
	}
	return adv, nil
}

// keep remembers one example of each label: the first that an attack broke, or
// the first at all.
func (e *measurement) keep(x Example, clean, adversarial []float32) {
	label := uint8(x.Label)
	if kept, ok := e.examples[label]; e.options.Examples == 0 || ok && !x.before(kept) {
		return
	}
	x.Clean, x.Adversarial = toBytes(clean), toBytes(adversarial)
	e.examples[label] = x
}

// before reports whether x is to be shown rather than y. Of one sample the
// first attack counts.
func (x Example) before(y Example) bool {
	if x.broken() != y.broken() {
		return x.broken()
	}
	return x.Index < y.Index
}

func (x Example) broken() bool { return x.Prediction == x.Label && x.AdversarialPrediction != x.Label }

// observe looks for signs that attacks are being fooled.
func (e *measurement) observe(x []float32, labels []uint8) error {
	size, classes := e.test.Shape.Size(), e.model.Network().Classes()
	signs := e.part.Signs
	for lo := 0; lo < len(labels); lo += e.model.Batch() {
		hi := min(lo+e.model.Batch(), len(labels))
		rows, n := x[lo*size:hi*size], hi-lo
		var first []float32
		for range repetitions {
			logits, err := e.model.Logits(rows, n)
			if err != nil {
				return err
			}
			logits = logits[:n*classes]
			if first == nil {
				first = slices.Clone(logits)
			}
			for i := range n {
				signs.Difference = max(signs.Difference, difference(first[i*classes:(i+1)*classes], logits[i*classes:(i+1)*classes]))
			}
		}
		for i := range n {
			if probabilities(first[i*classes : (i+1)*classes]) {
				signs.Probabilities++
			}
		}
		_, dx, err := e.model.Gradient(rows, n, attack.CrossEntropy(labels[lo:hi], classes))
		if err != nil {
			return err
		}
		for i := range n {
			if !slices.ContainsFunc(dx[i*size:(i+1)*size], func(v float32) bool { return v != 0 }) {
				signs.ZeroGradients++
			}
		}
	}
	signs.Tried += len(labels)
	return nil
}

// difference is the length of a/|a| - b/|b|, as AutoAttack compares outputs.
func difference(a, b []float32) float64 {
	length := func(x []float32) float64 {
		sum := 1e-20
		for _, v := range x {
			sum += float64(v) * float64(v)
		}
		return math.Sqrt(sum)
	}
	la, lb, sum := length(a), length(b), 0.0
	for i := range a {
		d := float64(a[i])/la - float64(b[i])/lb
		sum += d * d
	}
	return math.Sqrt(sum)
}

// probabilities reports whether outputs are from 0 to 1 and add up to 1.
func probabilities(z []float32) bool {
	const tolerance = 1e-5
	sum := 0.0
	for _, v := range z {
		if v < -tolerance || v > 1+tolerance {
			return false
		}
		sum += float64(v)
	}
	return math.Abs(sum-1) < tolerance
}

// MaxPartBytes is far above a part of a million samples under all attacks.
const MaxPartBytes = 128 << 20

// maxTrials is far above what a plan can hold.
const maxTrials = 4096

// Encode writes the part as JSON; equal parts give equal bytes.
func (p *Part) Encode() ([]byte, error) {
	if err := p.validate(); err != nil {
		return nil, err
	}
	data, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("encode part: %w", err)
	}
	if len(data) >= MaxPartBytes {
		return nil, fmt.Errorf("part is %d bytes: at most %d; use more shards", len(data), MaxPartBytes)
	}
	return append(data, '\n'), nil
}

// DecodePart reads a part and refuses unknown fields and what cannot be.
func DecodePart(data []byte) (*Part, error) {
	if len(data) > MaxPartBytes {
		return nil, fmt.Errorf("part is %d bytes: at most %d", len(data), MaxPartBytes)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	p := new(Part)
	if err := d.Decode(p); err != nil {
		return nil, fmt.Errorf("decode part: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("decode part: data after its end")
	}
	return p, p.validate()
}

func (p *Part) validate() error {
	plan := &p.Plan
	n, k := plan.Samples, len(plan.Classes)
	switch {
	case p.Shards < 1 || p.Shard < 1 || p.Shard > p.Shards || n < p.Shards:
		return fmt.Errorf("part: shard %d of %d over %d samples is impossible", p.Shard, p.Shards, n)
	case k < 2 || k > maxClasses:
		return fmt.Errorf("part: %d classes: must be 2 to %d", k, maxClasses)
	case len(plan.Trials) > maxTrials || len(p.Answers) != len(plan.Trials):
		return fmt.Errorf("part: answers to %d of %d trials", len(p.Answers), len(plan.Trials))
	case plan.Checks != (p.Signs != nil):
		return errors.New("part: signs are there without checks, or checks without signs")
	case p.Proven < 0 || p.Proven > n || p.Proven > 0 && !plan.Certify:
		return fmt.Errorf("part: %d samples proven", p.Proven)
	case len(p.Examples) > k:
		return fmt.Errorf("part: %d examples of %d classes", len(p.Examples), k)
	case plan.CheckSamples < 0 || plan.CheckSamples > n || plan.Examples < 0 || plan.Examples > maxExamples:
		return errors.New("part: an impossible plan")
	}
	if err := plan.Threat.Validate(); err != nil {
		return fmt.Errorf("part: %w", err)
	}
	mine := p.first(n)
	if len(p.Labels) != mine || len(p.Clean) != mine {
		return fmt.Errorf("part: %d labels and %d answers for %d samples", len(p.Labels), len(p.Clean), mine)
	}
	for i, answers := range append([][]byte{p.Labels, p.Clean}, p.Answers...) {
		for _, class := range answers {
			if int(class) >= k {
				return fmt.Errorf("part: class %d of %d", class, k)
			}
		}
		if i < 2 {
			continue
		}
		t := plan.Trials[i-2]
		if t.First < 0 || t.First > n || len(answers) != p.first(t.First) || t.After < -1 || t.After >= i-2 {
			return fmt.Errorf("part: trial %d (%s): %d answers to %d of %d samples", i-2, t.Attack, len(answers), t.First, n)
		}
		if _, err := attack.Parse(t.Attack, attack.Threat{Norm: plan.Threat.Norm, Epsilon: t.Epsilon}); err != nil {
			return fmt.Errorf("part: trial %d: %w", i-2, err)
		}
	}
	if s := p.Signs; s != nil && (s.Tried != p.first(plan.CheckSamples) || s.Probabilities < 0 || s.Probabilities > s.Tried || s.ZeroGradients < 0 || s.ZeroGradients > s.Tried || s.Trained < 0 || s.Trained > mine || !(s.Difference >= 0)) {
		return fmt.Errorf("part: signs %+v are impossible", *s)
	}
	return nil
}

// first is how many of the part's samples are among the first n of all.
func (p *Part) first(n int) int { return max(0, (n-p.Shard+p.Shards)/p.Shards) }
