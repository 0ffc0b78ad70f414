package sentinel

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// Defence hardens the model after an attack: in this process, by a workflow,
// or by telling somebody who does.
type Defence interface {
	// Start is called once for each incident, in a goroutine of its own. It
	// may return as soon as the defence is under way, or when it is done. An
	// error says that there is no new model to wait for: the incident ends,
	// and after the cooldown another may begin. A Defence that tries again
	// after a failure uses the incident's ID to stay idempotent.
	Start(ctx context.Context, i Incident) error
}

// Causes of an incident.
const (
	Attack   = "attack"   // requests are flagged more often than clean ones are
	Accuracy = "accuracy" // labels show more errors than the signed report
)

// Outcomes of an incident; "" while it is open.
const (
	Recovered  = "recovered"  // another model went into service
	Failed     = "failed"     // the defence said that it has none
	Unresolved = "unresolved" // neither happened in time
	Reported   = "reported"   // an alarm on labels that starts no defence
)

// Incident is one alarm and what came of it.
type Incident struct {
	ID      string    `json:"id"`      // lower-case letters, digits and '-': usable as a name anywhere
	Cause   string    `json:"cause"`   // Attack or Accuracy
	Model   string    `json:"model"`   // version of the model under attack
	Digest  string    `json:"digest"`  // of that model's artifact
	Request uint64    `json:"request"` // the alarm was raised at this request since the model went into service, counting from 1
	Label   uint64    `json:"label"`   // and at this label
	Opened  time.Time `json:"opened"`
	Closed  time.Time `json:"closed,omitzero"`
	Outcome string    `json:"outcome,omitempty"`
	Error   string    `json:"error,omitempty"` // why the defence failed

	Evidence []Evidence `json:"-"` // the last flagged requests when the alarm was raised, oldest first
}

// Evidence is one flagged request.
type Evidence struct {
	Pixels  []float32 // [height, width, channels]
	Served  int       // class by the model in service
	Guard   int       // class by the guard
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
	// maxIncident is when an incident whose defence never led to a new model
	// is given up, so that a lost defence does not end all defence.
	maxIncident = 6 * time.Hour
	// maxEvidence flagged requests are kept: for MNIST 0.8 MB.
	maxEvidence = 256
)

// advance moves the state on by the clock. Callers hold mu.
func (s *Sentinel) advance(now time.Time) {
	if i := s.open; i != nil && now.Sub(i.Opened) > maxIncident {
		s.closeIncident(now, Unresolved, nil)
	}
	if s.cooling && now.Sub(s.cooled) >= s.config.Cooldown {
		// Start from nothing: the money won in the incident would otherwise
		// call the next one long after the attack.
		s.cooling = false
		if s.watch != nil {
			s.watch.reset()
		}
	}
}

func (s *Sentinel) state() string {
	switch {
	case s.open != nil && s.config.Defence == nil:
		return Alarm
	case s.open != nil:
		return Defending
	case s.cooling:
		return Cooldown
	}
	return Normal
}

// raise opens an incident unless one is open or was closed a short while ago:
// never two defences at once, never a second one for the same attack. Callers
// hold mu.
func (s *Sentinel) raise(cause string, now time.Time) {
	if s.state() != Normal {
		return
	}
	i := s.newIncident(cause, now)
	s.open = &i
	s.tell(i)
	if s.config.Defence == nil {
		return
	}
	s.starts.Go(func() {
		err := s.start(i)
		if err == nil {
			return
		}
		s.log.Error("the defence failed", "incident", i.ID, "error", err)
		s.change(func(now time.Time) {
			if s.open != nil && s.open.ID == i.ID {
				s.closeIncident(now, Failed, err)
			}
		})
	})
}

// report tells of an alarm that starts no defence, once in a cooldown. It
// leaves the state alone: forged labels must not keep the sentinel from
// answering an attack. Callers hold mu.
func (s *Sentinel) report(cause string, now time.Time) {
	if !s.reported.IsZero() && now.Sub(s.reported) < s.config.Cooldown {
		return
	}
	s.reported = now
	i := s.newIncident(cause, now)
	i.Closed, i.Outcome = now, Reported
	s.remember(i)
}

func (s *Sentinel) newIncident(cause string, now time.Time) Incident {
	w := s.watch
	i := Incident{
		ID: incidentID(w.model.Version, now, s.raised), Cause: cause,
		Model: w.model.Version, Digest: w.model.Digest,
		Request: w.requests, Label: w.labels, Opened: now,
		Evidence: s.evidence.list(),
	}
	s.raised++
	s.metrics.incidents.WithLabelValues(cause).Inc()
	s.log.Warn("alarm", "incident", i.ID, "cause", cause, "model", i.Model, "request", i.Request, "flagged", w.flagged, "labels", w.labels, "errors", w.errors)
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
	if err != nil {
		i.Error = err.Error()
	}
	s.open, s.cooling, s.cooled = nil, true, now
	s.log.Info("incident closed", "incident", i.ID, "outcome", outcome)
	s.remember(i)
}

// remember tells of a closed incident and keeps it, without its evidence so
// that the history stays small.
func (s *Sentinel) remember(i Incident) {
	s.tell(i)
	i.Evidence = nil
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
