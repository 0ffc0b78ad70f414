// Package sentinel watches the requests to a served model and notices when it
// is under attack. It takes mirrored requests as CloudEvents and labels as
// feedback, scores the requests with the model's detector, bets on the stream
// of scores, and starts the defence once for each incident.
//
// A request with N images counts as N requests.
package sentinel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/nn"
)

// Model is a model in service with what the sentinel needs to watch it.
type Model struct {
	Version    string // as answers name it
	Digest     string // of the artifact, "sha256:..."
	Network    *nn.Network
	Detector   *detect.Detector // calibrated for the network
	ErrorBound float64          // upper bound on the error rate, by the signed report; 0 turns the alarm on labels off
	About      About            // for people
}

// About is what a model's signed statements say of it.
type About struct {
	Classes  []string         `json:"classes,omitempty"`
	SignedBy []string         `json:"signed_by,omitempty"` // names of the keys
	Network  string           `json:"network,omitempty"`
	Clean    float64          `json:"clean_accuracy,omitempty"`
	Robust   float64          `json:"robust_accuracy"` // in the worst case of the gate's attacks
	Epsilon  float64          `json:"epsilon,omitempty"`
	Curve    []evaluate.Point `json:"curve,omitempty"` // accuracy by epsilon
}

// Examples is a fixed set that every model is measured on before it is
// watched: labelled images that no feedback ever changes.
type Examples struct {
	Name   string
	Shape  nn.Shape
	Images detect.Images
	Labels []uint8
}

// Config is what the sentinel may be told; the zero value is useful.
type Config struct {
	Alpha   float64 // 1/Alpha is the least average number of requests to a false alarm; 0: detect.DefaultAlpha
	Defence Defence // nil: alarms only
	// DefendAccuracy starts the defence for an alarm on labels too. Labels may
	// be forged and accuracy falls by honest drift as well, so by default that
	// alarm is only reported.
	DefendAccuracy bool
	// AnyVersion takes every answer for one of the model in service: for
	// servers that name versions in their own way.
	AnyVersion bool
	Cooldown   time.Duration // after an incident none begins for this long; 0: DefaultCooldown
	Budget     int           // defences started in 24 hours, at most; 0: DefaultBudget
	Circuit    int           // defences in a row without a better model until a person must approve; 0: DefaultCircuit
	// Suspends says that the defence itself waits for a person where an
	// incident says Approval, as an Argo workflow that is suspended does.
	// Otherwise none starts before Approve.
	Suspends bool
	// Keep stores the evidence of an attack, before the defence starts, or of
	// drift, and returns its reference; nil keeps none.
	Keep func(context.Context, Incident) (string, error)
	// State is the path of the file that outlives a restart; "" for none.
	State string
	// Anchors are measured on every model that comes into service, with the
	// AnchorModel, or the first model watched, as the standard: one that is
	// worse on any of them by more than AnchorDrop opens the circuit. So a
	// model that is led astray in many small steps is compared with where it
	// began, not with the step before.
	Anchors     []Examples
	AnchorModel *nn.Network
	AnchorDrop  float64 // 0: DefaultAnchorDrop

	Notify func(Incident)   // told when an incident opens and when it closes, in order; must not call the sentinel
	Log    *slog.Logger     // nil: silent
	Now    func() time.Time // nil: time.Now
}

const (
	// DefaultCooldown gives a new model time to show itself.
	DefaultCooldown = 10 * time.Minute
	// DefaultBudget bounds what hostile-looking traffic can make its owner spend.
	DefaultBudget = 4
	// DefaultCircuit is how many defences may fail before a person looks.
	DefaultCircuit = 3
	// DefaultAnchorDrop is more than the anchor sets' sampling noise.
	DefaultAnchorDrop = 0.02
)

// Sentinel is safe for concurrent use. What it concludes depends only on the
// order in which observations and labels arrive.
type Sentinel struct {
	config  Config
	log     *slog.Logger
	metrics *metrics
	ctx     context.Context // of the defences
	cancel  context.CancelFunc
	starts  sync.WaitGroup // the running defences, and evidence being kept
	busy    chan struct{}  // a token for each event being handled
	queue   chan struct{}  // and for each that waits for its turn

	scoring sync.Mutex // one request is scored at a time, and counted in that order

	mu        sync.Mutex // guards all below
	watch     *watch     // nil until a model is in service
	evidence  ring       // flagged requests
	unusual   ring       // shifted ones
	answered  answered
	pending   pending
	sources   sources
	open      *Incident
	incidents []Incident // closed, oldest first
	raised    int
	cooling   bool
	cooled    time.Duration
	reported  map[string]time.Duration // the last report of each cause
	begun     []time.Duration          // defences within budgetTime
	running   int                      // defences whose Start has not returned
	failures  int                      // defences in a row without a better model
	broken    string                   // why a person must approve; "" while defences may start
	anchors   []float64                // the standard's accuracy on each anchor set
	clock     time.Duration            // see maxStep
	read      time.Time                // when the clock was moved
	history   history
	versions  []Version
	problem   string     // of the last load
	news      []Incident // not yet told
	launch    []Incident // defences to begin
	archive   []Incident // closed ones with evidence to keep
	urgent    bool       // the state must be written now
	restored  *memory    // of the model that was watched before a restart
	disk      *state     // nil: nothing outlives this process
	telling   sync.Mutex // keeps the news in order, and the writes
}

// Version is a model that was watched.
type Version struct {
	Version string    `json:"version"`
	Digest  string    `json:"digest"`
	Since   time.Time `json:"since"`
	About
}

// maxVersions is how many are remembered.
const maxVersions = 16

// watch is the watch over one model.
type watch struct {
	model          Model
	scorer         *detect.Scorer
	attack, drift  *detect.Alarm
	accuracy       *detect.Alarm // nil: off
	requests       uint64        // scored
	flagged        uint64
	shifted        uint64
	labels, errors uint64
	right, agreed  recent // of the last labels, and of the guard with the last answers
	onset          onset
}

// onset is the last request before the bet on an attack began to pay: where
// the attack began, as far as can be told.
type onset struct {
	requests, flagged uint64
	at                time.Time
}

func (w *watch) reset() {
	w.attack.Reset()
	w.drift.Reset()
	if w.accuracy != nil {
		w.accuracy.Reset()
	}
	w.onset = onset{requests: w.requests, flagged: w.flagged}
}

// New makes a sentinel that watches no model yet. Close it when done.
func New(c Config) (*Sentinel, error) {
	if c.Alpha == 0 {
		c.Alpha = detect.DefaultAlpha
	}
	if !(c.Alpha > 0 && c.Alpha < 1) {
		return nil, fmt.Errorf("alpha %v: must be above 0 and below 1", c.Alpha)
	}
	if c.Cooldown == 0 {
		c.Cooldown = DefaultCooldown
	}
	if c.Cooldown < 0 {
		return nil, fmt.Errorf("cooldown %v: must not be negative", c.Cooldown)
	}
	for n, usual := range map[*int]int{&c.Budget: DefaultBudget, &c.Circuit: DefaultCircuit} {
		if *n == 0 {
			*n = usual
		}
		if *n < 0 {
			return nil, fmt.Errorf("budget %d, circuit %d: must not be negative", c.Budget, c.Circuit)
		}
	}
	if c.AnchorDrop == 0 {
		c.AnchorDrop = DefaultAnchorDrop
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	s := &Sentinel{config: c, log: c.Log, metrics: newMetrics(), busy: make(chan struct{}, maxBusy), queue: make(chan struct{}, maxQueue)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.pending.init()
	s.answered.init()
	s.sources.init()
	s.reported = map[string]time.Duration{}
	if err := s.restore(); err != nil {
		return nil, err
	}
	if c.AnchorModel != nil {
		var err error
		if s.anchors, err = accuracies(c.AnchorModel, c.Anchors); err != nil {
			return nil, fmt.Errorf("anchor model: %w", err)
		}
	}
	return s, nil
}

// Close cancels the running defences, waits for them, and writes the state.
func (s *Sentinel) Close() {
	s.cancel()
	s.starts.Wait()
	s.change(func(time.Time) { s.urgent = true })
	if s.disk != nil {
		if err := s.disk.file.Close(); err != nil {
			s.log.Error("state not closed", "error", err)
		}
	}
}

// Use begins to watch a model that went into service, in place of the one
// before: the alarms start anew, and an open incident about another model has
// recovered. The same version again changes nothing.
func (s *Sentinel) Use(m Model) error {
	if m.Network == nil || m.Detector == nil {
		return fmt.Errorf("model %s: the sentinel needs its network and its detector", m.Version)
	}
	w := &watch{model: m}
	var err error
	if w.scorer, err = m.Detector.Scorer(m.Network); err != nil {
		return fmt.Errorf("model %s: %w", m.Version, err)
	}
	if w.attack, err = m.Detector.Alarm(s.config.Alpha); err != nil {
		return fmt.Errorf("model %s: %w", m.Version, err)
	}
	if w.drift, err = m.Detector.DriftAlarm(s.config.Alpha); err != nil {
		return fmt.Errorf("model %s: %w", m.Version, err)
	}
	if m.ErrorBound != 0 {
		if w.accuracy, err = detect.NewAlarm(m.ErrorBound, s.config.Alpha); err != nil {
			return fmt.Errorf("model %s: alarm on labels: %w", m.Version, err)
		}
	}
	standing, err := accuracies(m.Network, s.config.Anchors)
	if err != nil {
		return fmt.Errorf("model %s: %w", m.Version, err)
	}
	s.change(func(now time.Time) {
		if s.watch != nil && s.watch.model.Version == m.Version {
			return
		}
		s.watch = w
		s.evidence, s.unusual = ring{}, ring{}
		if s.open != nil && s.open.Model != m.Version {
			s.closeIncident(now, Recovered, nil)
		}
		s.goOn(w)
		s.compare(standing, now)
		s.versions = append(s.versions, Version{m.Version, m.Digest, now, m.About})
		if len(s.versions) > maxVersions {
			s.versions = s.versions[1:]
		}
		s.urgent = true
		s.metrics.ready.Set(1)
		s.log.Info("watching", "model", m.Version, "digest", m.Digest, "alarm_on_labels", w.accuracy != nil)
	})
	return nil
}

// compare holds a model against the standard on the anchor sets. Callers hold
// mu.
func (s *Sentinel) compare(standing []float64, now time.Time) {
	if len(s.anchors) != len(standing) {
		s.anchors = standing
		return
	}
	for i, a := range s.config.Anchors {
		if standing[i] < s.anchors[i]-s.config.AnchorDrop {
			why := fmt.Sprintf("model %s answers %.1f%% of anchor set %s right, the standard is %.1f%%", s.watch.model.Version, 100*standing[i], a.Name, 100*s.anchors[i])
			s.breakCircuit(why)
			s.report(Anchor, why, now)
			return
		}
	}
}

// accuracies of a network on each of the sets.
func accuracies(n *nn.Network, sets []Examples) ([]float64, error) {
	const batch = 64
	out := make([]float64, len(sets))
	for i, set := range sets {
		if set.Images.Len() == 0 || set.Images.Len() != len(set.Labels) {
			return nil, fmt.Errorf("anchor set %s: %d images with %d labels", set.Name, set.Images.Len(), len(set.Labels))
		}
		if set.Shape != n.Input {
			return nil, fmt.Errorf("anchor set %s has images of %v, the model takes %v: give --anchor (TEMPER_ANCHOR) the model's data set", set.Name, set.Shape, n.Input)
		}
		f, err := nn.NewForward(n, batch)
		if err != nil {
			return nil, err
		}
		x := make([]float32, batch*n.Input.Size())
		right := 0
		for lo := 0; lo < len(set.Labels); lo += batch {
			hi := min(lo+batch, len(set.Labels))
			set.Images.Read(x, lo, hi)
			logits := f.Logits(x, hi-lo)
			for k := range hi - lo {
				if row := logits[k*n.Classes() : (k+1)*n.Classes()]; attack.Predict(row) == int(set.Labels[lo+k]) {
					right++
				}
			}
		}
		out[i] = float64(right) / float64(len(set.Labels))
	}
	return out, nil
}

// change runs a change of state under the lock, with the state moved on to
// now. It writes what must outlive this process, then starts defences, and
// then tells the news: so a crash never starts one twice.
func (s *Sentinel) change(do func(now time.Time)) {
	s.telling.Lock()
	defer s.telling.Unlock()
	s.mu.Lock()
	now := s.config.Now()
	s.advance(now)
	do(now)
	s.record(now)
	s.metrics.update(s)
	news, launch, archive := s.news, s.launch, s.archive
	s.news, s.launch, s.archive = nil, nil, nil
	write := s.memorize(now)
	s.mu.Unlock()
	write()
	for _, i := range launch {
		s.begin(i)
	}
	for _, i := range archive {
		s.starts.Go(func() { s.keep(&i) })
	}
	if s.config.Notify != nil {
		for _, i := range news {
			s.config.Notify(i)
		}
	}
}

func (s *Sentinel) tell(i Incident) { s.news = append(s.news, i) }

// ErrNoModel says that no model is watched yet.
var ErrNoModel = errors.New("no model is in service yet: try again later")

// Observation is one answered inference request.
type Observation struct {
	ID      string    // links labels to it; "" for none
	Version string    // of the model that answered; "": the one in service
	Pixels  []float32 // [N, height, width, channels] of the model's input
	N       int
}

// Observe scores one request to the model in service and bets on the result.
// A request to another version, such as one that was answered before a
// promotion, is counted and left.
func (s *Sentinel) Observe(o Observation) error {
	s.scoring.Lock()
	defer s.scoring.Unlock()
	s.mu.Lock()
	w := s.watch
	s.mu.Unlock()
	if w == nil {
		return ErrNoModel
	}
	if o.Version != "" && o.Version != w.model.Version && !s.config.AnyVersion {
		s.metrics.skipped.WithLabelValues("other_version").Add(float64(o.N))
		return nil
	}
	begin := time.Now()
	scores, err := w.scorer.Score(o.Pixels, o.N)
	if err != nil {
		return err
	}
	s.metrics.seconds.Observe(time.Since(begin).Seconds())
	s.change(func(now time.Time) {
		if s.watch != w { // a promotion while scoring
			s.metrics.skipped.WithLabelValues("other_version").Add(float64(o.N))
			return
		}
		s.answered.add(o.ID, w.model.Version, scores)
		size := w.model.Network.Input.Size()
		for i, score := range scores {
			w.requests++
			s.metrics.requests.Inc()
			w.agreed.add(score.Served == score.Guard)
			s.history.requests++
			seen := func() Evidence {
				return Evidence{
					Pixels: slices.Clone(o.Pixels[i*size : (i+1)*size]), Shape: w.model.Network.Input, Classes: w.model.Network.Classes(),
					Served: score.Served, Guard: score.Guard, Score: score.Score, Request: w.requests,
				}
			}
			if score.Shifted {
				w.shifted++
				s.metrics.shifted.Inc()
				s.unusual.add(seen())
			}
			if w.attack.Level() < w.attack.Limit()/3 {
				w.onset = onset{w.requests - 1, w.flagged, now}
			}
			if score.Flagged {
				w.flagged++
				s.history.flagged++
				s.metrics.flagged.Inc()
				s.evidence.add(seen())
			}
			if w.attack.Observe(score.Flagged) {
				s.raise(Attack, now)
			}
			if w.drift.Observe(score.Shifted) {
				s.report(Drift, "requests are unlike those of the calibration, and not hostile", now)
			}
		}
	})
	return nil
}

// Evidence returns the last flagged requests to the model in service, oldest
// first.
func (s *Sentinel) Evidence() []Evidence {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.evidence.list()
}

// ring keeps the last maxEvidence pieces.
type ring struct {
	kept []Evidence
	next int
}

func (r *ring) add(e Evidence) {
	if len(r.kept) < maxEvidence {
		r.kept = append(r.kept, e)
		return
	}
	r.kept[r.next] = e
	r.next = (r.next + 1) % maxEvidence
}

func (r *ring) list() []Evidence {
	return append(append([]Evidence(nil), r.kept[r.next:]...), r.kept[:r.next]...)
}
