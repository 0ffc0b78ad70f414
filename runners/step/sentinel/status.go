package sentinel

import "time"

// Status is what GET /status answers.
type Status struct {
	State     string     `json:"state"` // Normal, Alarm, Defending or Cooldown
	Model     string     `json:"model"` // version; "" while none is watched
	Digest    string     `json:"digest"`
	Requests  uint64     `json:"requests"` // to this model, scored
	Flagged   uint64     `json:"flagged"`
	Shifted   uint64     `json:"shifted"`       // unlike the usual requests, and not flagged
	Bound     float64    `json:"flagged_bound"` // upper bound on the share of clean requests that is flagged
	Share     float64    `json:"hostile_share"` // estimate, since the last attack began
	Attack    Level      `json:"attack"`
	Drift     Level      `json:"drift"`
	Accuracy  *Level     `json:"accuracy,omitempty"` // absent: off
	Labels    uint64     `json:"labels"`
	Errors    uint64     `json:"errors"`                  // labels that the model's answer contradicts
	Right     *float64   `json:"live_accuracy,omitempty"` // by the last labels; absent without any
	Agreed    *float64   `json:"agreement,omitempty"`     // of the guard with the last answers
	Banned    int        `json:"quarantined_sources"`
	Waiting   int        `json:"waiting"`           // requests without their response, or the other way round
	Problem   string     `json:"problem,omitempty"` // why the model in service cannot be watched
	Circuit   string     `json:"circuit,omitempty"` // why a person must approve the next defence
	Begun     int        `json:"defences_today"`    // started within 24 hours
	Budget    int        `json:"defences_allowed"`
	Open      *Incident  `json:"open,omitempty"`
	Incidents []Incident `json:"incidents"` // closed, oldest first
	Versions  []Version  `json:"versions"`  // oldest first, the last is watched
	History   []Moment   `json:"history"`   // oldest first
	Classes   []string   `json:"classes,omitempty"`
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
		st = Status{
			State: s.state(), Waiting: s.pending.len(), Problem: s.problem, Circuit: s.broken,
			Begun: len(s.begun), Budget: s.config.Budget, Banned: s.sources.banned(),
			Incidents: append([]Incident{}, s.incidents...),
			Versions:  append([]Version{}, s.versions...),
			History:   append([]Moment{}, s.history.moments...),
		}
		if s.open != nil {
			i := *s.open
			st.Open = &i
		}
		if w := s.watch; w != nil {
			st.Model, st.Digest, st.Classes = w.model.Version, w.model.Digest, w.model.About.Classes
			st.Requests, st.Flagged, st.Shifted, st.Bound = w.requests, w.flagged, w.shifted, w.model.Detector.Calibration.Attack.Bound
			st.Share = w.model.Detector.Share(w.flagged-w.onset.flagged, w.requests-w.onset.requests)
			st.Attack = Level{w.attack.Level(), w.attack.Limit()}
			st.Drift = Level{w.drift.Level(), w.drift.Limit()}
			st.Labels, st.Errors = w.labels, w.errors
			st.Right, st.Agreed = w.right.share(), w.agreed.share()
			if w.accuracy != nil {
				st.Accuracy = &Level{w.accuracy.Level(), w.accuracy.Limit()}
			}
		}
	})
	return st
}

// recent is the share of true values among the last ones.
type recent struct {
	bits    [recentCount / 64]uint64
	n, next int
	yes     int
}

// recentCount is how many: enough for a share to the percent.
const recentCount = 256

func (r *recent) add(yes bool) {
	word, bit := &r.bits[r.next/64], uint64(1)<<(r.next%64)
	if r.n < recentCount {
		r.n++
	} else if *word&bit != 0 {
		r.yes--
	}
	*word &^= bit
	if yes {
		*word |= bit
		r.yes++
	}
	r.next = (r.next + 1) % recentCount
}

func (r *recent) share() *float64 {
	if r.n == 0 {
		return nil
	}
	v := float64(r.yes) / float64(r.n)
	return &v
}

// Moment is how things stood.
type Moment struct {
	At       time.Time `json:"at"`
	Model    string    `json:"model"`
	Requests uint64    `json:"requests"` // since this process began, of all models
	Flagged  uint64    `json:"flagged"`
	Attack   float64   `json:"attack"` // levels
	Drift    float64   `json:"drift"`
	Right    *float64  `json:"live_accuracy,omitempty"`
	Agreed   *float64  `json:"agreement,omitempty"`
}

// history is a moment for each second at first; when it is full every other
// one goes, and from then on it takes half as many. So it covers all of the
// time in little memory.
type history struct {
	moments           []Moment
	every             time.Duration
	requests, flagged uint64
}

const (
	maxMoments   = 600
	momentsFirst = time.Second
)

// record adds a moment when it is time. Callers hold mu.
func (s *Sentinel) record(now time.Time) {
	h, w := &s.history, s.watch
	if w == nil {
		return
	}
	h.every = max(h.every, momentsFirst)
	if n := len(h.moments); n > 0 && now.Sub(h.moments[n-1].At) < h.every && !now.Before(h.moments[n-1].At) {
		return
	}
	if len(h.moments) >= maxMoments {
		for i := range maxMoments / 2 {
			h.moments[i] = h.moments[2*i+1]
		}
		h.moments = h.moments[:maxMoments/2]
		h.every *= 2
	}
	h.moments = append(h.moments, Moment{
		At: now, Model: w.model.Version, Requests: h.requests, Flagged: h.flagged,
		Attack: w.attack.Level(), Drift: w.drift.Level(), Right: w.right.share(), Agreed: w.agreed.share(),
	})
}
