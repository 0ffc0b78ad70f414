package sentinel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/nn"
)

// Defence hardens the model after an attack: in this process, by a workflow,
// or by telling somebody who does.
type Defence interface {
	// Start is called once for each incident, in a goroutine of its own; and
	// again, with the same ID, by a sentinel that was restarted before it
	// returned: it must be idempotent. It may return as soon as the defence is
	// under way, or when it is done. An error says that there is no new model
	// to wait for, and wraps ErrRejected where that is the gate's word: the
	// incident ends, and after the cooldown another may begin.
	Start(ctx context.Context, i Incident) error
}

// ErrRejected is wrapped by a defence's error where the gate rejected every
// candidate.
var ErrRejected = errors.New("the gate rejected every candidate")

// Causes of an incident.
const (
	Attack   = "attack"   // requests are flagged more often than clean ones are
	Drift    = "drift"    // requests are unlike the calibration's, and not hostile: starts no defence
	Accuracy = "accuracy" // labels show more errors than the signed report
	Anchor   = "anchor"   // the model in service is worse on the fixed set than the anchor was
)

// Outcomes of an incident; "" while it is open.
const (
	Recovered  = "recovered"  // another model went into service
	Rejected   = "rejected"   // the gate rejected what the defence made
	Failed     = "failed"     // the defence said that it has no new model
	Unresolved = "unresolved" // neither happened in time
	Subsided   = "subsided"   // no defence was started, and the alarm fell silent
	Reported   = "reported"   // an alarm that starts no defence
)

// Reasons why an alarm starts no defence.
const (
	HeldBudget   = "the daily budget of defences is spent"
	HeldRunning  = "the defence of an earlier incident is still running"
	HeldApproval = "the circuit is open: a person must approve"
)

// Incident is one alarm and what came of it.
type Incident struct {
	ID      string    `json:"id"`      // lower-case letters, digits and '-': usable as a name anywhere
	Cause   string    `json:"cause"`   // Attack, Drift, Accuracy or Anchor
	Model   string    `json:"model"`   // version of the model under attack
	Digest  string    `json:"digest"`  // of that model's artifact
	Request uint64    `json:"request"` // the alarm was raised at this request since the model went into service, counting from 1
	Label   uint64    `json:"label"`   // and at this label
	Opened  time.Time `json:"opened"`
	Closed  time.Time `json:"closed,omitzero"`
	Outcome string    `json:"outcome,omitempty"`
	Error   string    `json:"error,omitempty"` // why the defence failed

	Defended bool   `json:"defended"`           // a defence was started
	Held     string `json:"held,omitempty"`     // why none was
	Approval bool   `json:"approval,omitempty"` // the defence must wait for a person before it promotes
	Taken    bool   `json:"taken,omitempty"`    // the defence's Start returned without an error

	// Estimates: of the pixels' change, 0 where it cannot be told, and of the
	// share of hostile requests since the attack began.
	Epsilon float64 `json:"epsilon,omitempty"`
	Share   float64 `json:"share,omitempty"`
	// Kept is the reference, with the digest, of the evidence as a data set;
	// "" where it is not kept.
	Kept     string  `json:"evidence,omitempty"`
	Timeline []Event `json:"timeline"`

	Evidence []Evidence    `json:"-"`     // the last requests that were flagged when the alarm was raised (for Drift: shifted), oldest first
	Clock    time.Duration `json:"clock"` // the sentinel's clock at the alarm

	note func(name, text string)
}

// Event is something that happened in an incident.
type Event struct {
	At   time.Time `json:"at"`
	Name string    `json:"name"` // a few words
	Text string    `json:"text,omitempty"`
}

// Note adds to the incident's timeline; a Defence may, while it runs.
func (i Incident) Note(name, text string) {
	if i.note != nil {
		i.note(name, text)
	}
}

// Evidence is one flagged or shifted request.
type Evidence struct {
	Pixels  []float32 // of Shape
	Shape   nn.Shape
	Classes int
	Served  int // class by the model in service
	Guard   int // class by the guard
	Score   float64
	Request uint64 // its number since the model went into service
}

// States of the sentinel.
const (
	Normal    = "normal"
	Alarm     = "alarm"     // an incident is open, and there is no defence to start
	Defending = "defending" // an incident is open, and the defence was started
	Cooldown  = "cooldown"  // an incident was closed a short while ago: no new one begins
)

const (
	// maxIncidents is how many closed incidents the status keeps.
	maxIncidents = 32
	// maxTimeline bounds what a defence may note, maxNote each text.
	maxTimeline, maxNote = 64, 500
	// maxIncident is when an incident whose defence never led to a new model
	// is given up, so that a lost defence does not end all defence.
	maxIncident = 6 * time.Hour
	// keepTimeout bounds the wait for the registry before a defence starts.
	keepTimeout = time.Minute
	// maxEvidence flagged, and as many shifted, requests are kept: for MNIST
	// 0.8 MB each.
	maxEvidence = 256
	// driftEvery is how often the evidence of drift, which may last, is kept.
	driftEvery = 6 * time.Hour
	// budgetTime is what the budget is for.
	budgetTime = 24 * time.Hour
	// patience is how many cooldowns long the alarm may go on before it is
	// taken for a new attack rather than the same one.
	patience = 6
	// maxStep is the most that the sentinel's clock moves at once. While it
	// watches it moves each second; so a wall clock that jumps ahead ends no
	// incident and renews no budget, one that jumps back moves nothing, and of
	// a pause between two processes an hour counts.
	maxStep = time.Hour
)

// advance moves the clock and the state on. Callers hold mu.
func (s *Sentinel) advance(now time.Time) {
	if !s.read.IsZero() {
		s.clock += min(max(now.Sub(s.read), 0), maxStep)
	}
	s.read = now
	for len(s.begun) > 0 && s.clock-s.begun[0] >= budgetTime {
		s.begun = s.begun[1:]
	}
	if i := s.open; i != nil {
		switch {
		case s.clock-i.Clock > maxIncident:
			s.closeIncident(now, Unresolved, nil)
		case !i.Defended && i.Cause == Attack && s.watch != nil && s.quiet():
			s.closeIncident(now, Subsided, nil)
		}
	}
	if s.cooling && s.clock-s.cooled >= s.config.Cooldown && (s.quiet() || s.clock-s.cooled >= patience*s.config.Cooldown) {
		// Start from nothing: the money won in the incident would otherwise
		// call the next one long after the attack.
		s.cooling = false
		if s.watch != nil {
			s.watch.reset()
		}
	}
}

// quiet is the other side of the hysteresis: an alarm that was raised at its
// limit is over below half of it. An attack that goes on is one incident.
func (s *Sentinel) quiet() bool {
	return s.watch == nil || s.watch.attack.Level() < s.watch.attack.Limit()/2
}

func (s *Sentinel) state() string {
	switch {
	case s.open != nil && !s.open.Defended:
		return Alarm
	case s.open != nil:
		return Defending
	case s.cooling:
		return Cooldown
	}
	return Normal
}

// raise opens an incident unless one is open or was closed a short while ago:
// never two defences at once, never a second one for the same attack, and no
// more in a day than the budget. Callers hold mu.
func (s *Sentinel) raise(cause string, now time.Time) {
	if s.state() != Normal {
		return
	}
	i := s.newIncident(cause, now)
	s.open = &i
	switch {
	case s.config.Defence == nil:
	case s.running > 0:
		i.Held = HeldRunning
	case len(s.begun) >= s.config.Budget:
		i.Held = HeldBudget
	case s.broken != "" && !s.config.Suspends:
		i.Held = HeldApproval
	default:
		s.defend(&i)
	}
	if i.Held != "" {
		s.log.Warn("no defence is started", "incident", i.ID, "why", i.Held)
		i.add(now, "no defence", i.Held)
	}
	s.tell(i)
}

// defend starts the defence of an incident once the state is written.
func (s *Sentinel) defend(i *Incident) {
	i.Defended, i.Held, i.Approval = true, "", s.broken != ""
	s.begun = append(s.begun, s.clock)
	s.launch = append(s.launch, *i)
}

// begin runs a defence in a goroutine of its own.
func (s *Sentinel) begin(i Incident) {
	s.mu.Lock()
	s.running++
	s.mu.Unlock()
	s.starts.Go(func() {
		i.note = func(name, text string) { s.note(i.ID, name, text) }
		if s.config.Keep != nil && i.Kept == "" && len(i.Evidence) > 0 {
			s.keep(&i)
		}
		i.Note("defence started", "")
		err := s.start(i)
		stopped := err != nil && s.ctx.Err() != nil // this process ends; the next one goes on
		if err != nil && !stopped {
			s.log.Error("the defence failed", "incident", i.ID, "error", err)
		}
		s.change(func(now time.Time) {
			s.running--
			if s.open == nil || s.open.ID != i.ID || stopped {
				return
			}
			switch {
			case err == nil:
				s.open.Taken, s.urgent = true, true
			case errors.Is(err, ErrRejected):
				s.closeIncident(now, Rejected, err)
			default:
				s.closeIncident(now, Failed, err)
			}
		})
	})
}

// keep stores an incident's evidence. An attack does not wait for a registry
// that is down.
func (s *Sentinel) keep(i *Incident) {
	ctx, cancel := context.WithTimeout(s.ctx, keepTimeout)
	defer cancel()
	kept, err := s.config.Keep(ctx, *i)
	if err != nil {
		s.log.Error("the evidence is not kept", "incident", i.ID, "error", err)
		return
	}
	i.Kept = kept
	s.change(func(now time.Time) {
		if at := s.find(i.ID); at != nil {
			at.Kept, s.urgent = kept, true
			at.add(now, "evidence kept", kept)
		}
	})
}

// note adds to the timeline of an incident.
func (s *Sentinel) note(id, name, text string) {
	s.change(func(now time.Time) {
		if at := s.find(id); at != nil {
			at.add(now, name, text)
		}
	})
}

// find returns the open incident, or one that was closed; nil where it is
// neither. Callers hold mu.
func (s *Sentinel) find(id string) *Incident {
	if s.open != nil && s.open.ID == id {
		return s.open
	}
	for k := range s.incidents {
		if s.incidents[k].ID == id {
			return &s.incidents[k]
		}
	}
	return nil
}

// add appends to a copy of the timeline: readers may hold the one before.
func (i *Incident) add(now time.Time, name, text string) {
	if len(i.Timeline) < maxTimeline {
		i.Timeline = append(slices.Clone(i.Timeline), Event{now, name, text[:min(len(text), maxNote)]})
	}
}

// Approve closes the circuit again: a person has looked at why defences led
// to no better model. A defence that waited for it starts.
func (s *Sentinel) Approve() {
	s.change(func(now time.Time) {
		s.broken, s.failures, s.urgent = "", 0, true
		s.log.Warn("a person approved further defences")
		if i := s.open; i != nil && i.Held == HeldApproval {
			i.add(now, "approved", "")
			s.defend(i)
		}
	})
}

// driftKept is beside the causes in Sentinel.reported: when the evidence of
// drift was kept.
const driftKept = "drift evidence"

// report tells of an alarm that starts no defence, once in a cooldown. It
// leaves the state alone: forged labels must not keep the sentinel from
// answering an attack. Callers hold mu.
func (s *Sentinel) report(cause, text string, now time.Time) {
	if last, ok := s.reported[cause]; ok && s.clock-last < s.config.Cooldown {
		return
	}
	s.reported[cause] = s.clock
	i := s.newIncident(cause, now)
	i.Closed, i.Outcome = now, Reported
	if text != "" {
		i.add(now, cause, text)
	}
	if last, ok := s.reported[driftKept]; len(i.Evidence) > 0 && s.config.Keep != nil && (!ok || s.clock-last >= driftEvery) {
		s.reported[driftKept] = s.clock
		s.archive = append(s.archive, i)
	}
	s.remember(i)
}

func (s *Sentinel) newIncident(cause string, now time.Time) Incident {
	w := s.watch
	i := Incident{
		ID: incidentID(w.model.Version, now, s.raised), Cause: cause,
		Model: w.model.Version, Digest: w.model.Digest,
		Request: w.requests, Label: w.labels, Opened: now, Clock: s.clock,
	}
	if cause == Drift {
		i.Evidence = s.unusual.list()
	}
	if cause == Attack {
		i.Evidence = s.evidence.list()
		images := make([][]float32, len(i.Evidence))
		for k, e := range i.Evidence {
			images[k] = e.Pixels
		}
		i.Epsilon = detect.Epsilon(images)
		i.Share = w.model.Detector.Share(w.flagged-w.onset.flagged, w.requests-w.onset.requests)
		if !w.onset.at.IsZero() {
			i.add(w.onset.at, "attack began", fmt.Sprintf("after request %d", w.onset.requests))
		}
	}
	i.add(now, "alarm", fmt.Sprintf("%s, at request %d", cause, i.Request))
	s.raised++
	s.urgent = true
	s.metrics.incidents.WithLabelValues(cause).Inc()
	s.log.Warn("alarm", "incident", i.ID, "cause", cause, "model", i.Model, "request", i.Request, "flagged", w.flagged, "labels", w.labels, "errors", w.errors, "epsilon", i.Epsilon, "share", i.Share)
	return i
}

// start keeps a defence that panics from taking the monitor down with it.
func (s *Sentinel) start(i Incident) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return s.config.Defence.Start(s.ctx, i)
}

// closeIncident ends the open incident and begins the cooldown. Callers hold mu.
func (s *Sentinel) closeIncident(now time.Time, outcome string, err error) {
	i := *s.open
	i.Closed, i.Outcome = now, outcome
	i.add(now, outcome, "")
	if err != nil {
		i.Error = err.Error()
	}
	s.open, s.cooling, s.cooled, s.urgent = nil, true, s.clock, true
	switch {
	case outcome == Recovered:
		s.failures = 0
		if i.Approval { // a person let it through
			s.broken = ""
		}
	case i.Defended:
		if s.failures++; s.failures >= s.config.Circuit && s.broken == "" {
			s.breakCircuit(fmt.Sprintf("%d defences in a row led to no better model", s.failures))
		}
	}
	s.log.Info("incident closed", "incident", i.ID, "outcome", outcome)
	s.remember(i)
}

// breakCircuit stops defences until a person approves. Callers hold mu.
func (s *Sentinel) breakCircuit(why string) {
	s.broken, s.urgent = why, true
	s.log.Error("the circuit is open: no defence starts until a person approves", "why", why)
}

// remember tells of a closed incident and keeps it, without its evidence so
// that the history stays small.
func (s *Sentinel) remember(i Incident) {
	s.tell(i)
	i.Evidence, i.note = nil, nil
	s.incidents = append(s.incidents, i)
	if len(s.incidents) > maxIncidents {
		s.incidents = s.incidents[1:]
	}
}

// incidentID is a name that sorts by time and holds no hostile character.
func incidentID(version string, now time.Time, count int) string {
	clean := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, strings.ToLower(strings.TrimPrefix(version, "sha256")))
	return fmt.Sprintf("%s-%s-%d", now.UTC().Format("20060102t150405z"), clean[:min(len(clean), 12)], count+1)
}
