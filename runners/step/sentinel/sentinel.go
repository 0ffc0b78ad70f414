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
	"sync"
	"time"

	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/nn"
)

// Model is a model in service with what the sentinel needs to watch it.
type Model struct {
	Version    string // as answers name it
	Digest     string // of the artifact, "sha256:..."
	Network    *nn.Network
	Detector   *detect.Detector // calibrated for the network
	ErrorBound float64          // upper bound on the error rate, by the signed report; 0 turns the alarm on labels off
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
	Cooldown   time.Duration    // after an incident none begins for this long; 0: DefaultCooldown
	Notify     func(Incident)   // told when an incident opens and when it closes, in order; must not call the sentinel
	Log        *slog.Logger     // nil: silent
	Now        func() time.Time // nil: time.Now
}

// DefaultCooldown gives a new model time to show itself.
const DefaultCooldown = 10 * time.Minute

// Sentinel is safe for concurrent use. What it concludes depends only on the
// order in which observations and labels arrive.
type Sentinel struct {
	config  Config
	log     *slog.Logger
	metrics *metrics
	ctx     context.Context // of the defences
	cancel  context.CancelFunc
	starts  sync.WaitGroup // the running defences
	busy    chan struct{}  // a token for each event being handled
	queue   chan struct{}  // and for each that waits for its turn

	scoring sync.Mutex // one request is scored at a time, and counted in that order

	mu        sync.Mutex // guards all below
	watch     *watch     // nil until a model is in service
	evidence  ring
	answered  answered
	pending   pending
	sources   sources
	open      *Incident
	incidents []Incident // closed, oldest first
	raised    int
	cooling   bool
	cooled    time.Time
	reported  time.Time  // the last report
	problem   string     // of the last load
	news      []Incident // not yet told
	telling   sync.Mutex // keeps the news in order
}

// watch is the watch over one model.
type watch struct {
	model          Model
	scorer         *detect.Scorer
	attack         *detect.Alarm
	accuracy       *detect.Alarm // nil: off
	requests       uint64        // scored
	flagged        uint64
	labels, errors uint64
}

func (w *watch) reset() {
	w.attack.Reset()
	if w.accuracy != nil {
		w.accuracy.Reset()
	}
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
	return s, nil
}

// Close cancels the running defences and waits for them.
func (s *Sentinel) Close() {
	s.cancel()
	s.starts.Wait()
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
	if m.ErrorBound != 0 {
		if w.accuracy, err = detect.NewAlarm(m.ErrorBound, s.config.Alpha); err != nil {
			return fmt.Errorf("model %s: alarm on labels: %w", m.Version, err)
		}
	}
	s.change(func(now time.Time) {
		if s.watch != nil && s.watch.model.Version == m.Version {
			return
		}
		s.watch = w
		s.evidence = ring{}
		if s.open != nil && s.open.Model != m.Version {
			s.closeIncident(now, Recovered, nil)
		}
		s.metrics.ready.Set(1)
		s.log.Info("watching", "model", m.Version, "digest", m.Digest, "alarm_on_labels", w.accuracy != nil)
	})
	return nil
}

// change runs a change of state under the lock, with the state moved on to
// now, and then tells the news.
func (s *Sentinel) change(do func(now time.Time)) {
	s.telling.Lock()
	defer s.telling.Unlock()
	s.mu.Lock()
	now := s.config.Now()
	s.advance(now)
	do(now)
	s.metrics.update(s)
	news := s.news
	s.news = nil
	s.mu.Unlock()
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
			if score.Flagged {
				w.flagged++
				s.metrics.flagged.Inc()
				s.evidence.add(Evidence{append([]float32(nil), o.Pixels[i*size:(i+1)*size]...), score.Served, score.Guard, score.Score, w.requests})
			}
			if w.attack.Observe(score.Flagged) {
				s.raise(Attack, now)
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

// Status is what GET /status answers.
type Status struct {
	State     string     `json:"state"` // Normal, Alarm, Defending or Cooldown
	Model     string     `json:"model"` // version; "" while none is watched
	Digest    string     `json:"digest"`
	Requests  uint64     `json:"requests"` // to this model, scored
	Flagged   uint64     `json:"flagged"`
	Bound     float64    `json:"flagged_bound"` // upper bound on the share of clean requests that is flagged
	Attack    Level      `json:"attack"`
	Accuracy  *Level     `json:"accuracy,omitempty"` // absent: off
	Labels    uint64     `json:"labels"`
	Errors    uint64     `json:"errors"`            // labels that the model's answer contradicts
	Waiting   int        `json:"waiting"`           // requests without their response, or the other way round
	Problem   string     `json:"problem,omitempty"` // why the model in service cannot be watched
	Open      *Incident  `json:"open,omitempty"`
	Incidents []Incident `json:"incidents"` // closed, oldest first
}

// Level is how far an alarm is from being raised, as powers of ten.
type Level struct {
	Level float64 `json:"level"`
	Limit float64 `json:"limit"`
}

// Status says how things stand.
func (s *Sentinel) Status() Status {
	var st Status
	s.change(func(time.Time) {
		st = Status{State: s.state(), Waiting: s.pending.len(), Problem: s.problem, Incidents: append([]Incident{}, s.incidents...)}
		if s.open != nil {
			i := *s.open
			st.Open = &i
		}
		if w := s.watch; w != nil {
			st.Model, st.Digest = w.model.Version, w.model.Digest
			st.Requests, st.Flagged, st.Bound = w.requests, w.flagged, w.model.Detector.Calibration.Bound
			st.Attack = Level{w.attack.Level(), w.attack.Limit()}
			st.Labels, st.Errors = w.labels, w.errors
			if w.accuracy != nil {
				st.Accuracy = &Level{w.accuracy.Level(), w.accuracy.Limit()}
			}
		}
	})
	return st
}
