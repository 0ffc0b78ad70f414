package sentinel

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"time"

	"golang.org/x/time/rate"

	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/interval"
)

// Feedback is the true class of an image that was classified before.
type Feedback struct {
	ID     string `json:"id"`     // of the request's event: the X-Request-Id of the server's answer
	Index  int    `json:"index"`  // of the image in the request
	Label  int    `json:"label"`  // its true class
	Source string `json:"source"` // who says so
}

const (
	// maxFeedback is a message's size: an id, a source and two numbers.
	maxFeedback = 4 << 10
	// maxSource is the length of a source's name.
	maxSource = 128
	// maxAnswered images may still be labelled.
	maxAnswered = 1 << 17
	// maxSources are told apart; while all of them are active, others wait.
	maxSources = 1024
	// Labels are rare. One source may send one a second, and all of them
	// together 50, with some at a time: a name is easily changed.
	sourceRate, sourceBurst = 1, 30
	totalRate, totalBurst   = 50, 500
)

var (
	errUnknown  = errors.New("no such request, or too long ago")
	errLabelled = errors.New("this image has a label already")
	errReplaced = errors.New("the model that answered is no longer in service")
	errTooMany  = errors.New("too many labels: slow down")
	errBanned   = errors.New("labels of this source contradict those of the others: it is in quarantine")
)

func parseFeedback(data []byte) (Feedback, error) {
	var f struct {
		Feedback
		Label *int `json:"label"`
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return Feedback{}, fmt.Errorf(`not {"id": ..., "index": 0, "label": ..., "source": ...}: %w`, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return Feedback{}, errors.New("more after the JSON object")
	}
	switch {
	case f.ID == "" || len(f.ID) > maxID:
		return Feedback{}, fmt.Errorf("id: must be 1 to %d bytes", maxID)
	case f.Label == nil:
		return Feedback{}, errors.New("label is missing")
	case len(f.Source) > maxSource:
		return Feedback{}, fmt.Errorf("source: at most %d bytes", maxSource)
	}
	f.Feedback.Label = *f.Label
	return f.Feedback, nil
}

// Feedback takes the true class of an image and bets on whether the model in
// service errs more often than its signed report says.
func (s *Sentinel) Feedback(f Feedback) (err error) {
	s.change(func(now time.Time) {
		w := s.watch
		if w == nil {
			err = ErrNoModel
			return
		}
		if classes := w.model.Network.Classes(); f.Label < 0 || f.Label >= classes {
			err = fmt.Errorf("label %d: must be 0 to %d", f.Label, classes-1)
			return
		}
		if err = s.sources.allow(f.Source, now); err != nil {
			return
		}
		var predicted int
		if predicted, err = s.answered.label(f.ID, f.Index, w.model.Version); err != nil {
			return
		}
		w.labels++
		if predicted != f.Label {
			w.errors++
		}
		w.right.add(predicted == f.Label)
		if s.sources.count(f.Source, predicted != f.Label) {
			s.urgent = true
			s.metrics.banned.Inc()
			s.log.Warn("a source of labels is in quarantine: it contradicts the others", "source", f.Source)
			if w.accuracy != nil { // what it said so far counts no more
				w.accuracy.Reset()
			}
			return
		}
		if w.accuracy == nil || !w.accuracy.Observe(predicted != f.Label) {
			return
		}
		if s.config.DefendAccuracy {
			s.raise(Accuracy, now)
		} else {
			s.report(Accuracy, fmt.Sprintf("%d of %d labels contradict the model", w.errors, w.labels), now)
		}
	})
	return err
}

// answered remembers what was answered, in two generations.
type answered struct {
	fresh, old map[string]*answers
	images     int // in fresh
}

// answers are the classes of one request's images, -1 for one that has its
// label.
type answers struct {
	version string
	classes []int32
}

func (a *answered) init() { a.fresh, a.old = map[string]*answers{}, map[string]*answers{} }

func (a *answered) add(id, version string, scores []detect.Score) {
	if id == "" || len(scores) == 0 {
		return
	}
	if a.images >= maxAnswered/2 {
		a.fresh, a.old, a.images = map[string]*answers{}, a.fresh, 0
	}
	classes := make([]int32, len(scores))
	for i, score := range scores {
		classes[i] = int32(score.Served)
	}
	a.fresh[id] = &answers{version, classes}
	a.images += len(classes)
}

// Scored says whether a request has been scored, so that its images can be
// labelled.
func (s *Sentinel) Scored(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answered.find(id) != nil
}

func (a *answered) find(id string) *answers {
	if found := a.fresh[id]; found != nil {
		return found
	}
	return a.old[id]
}

// label returns the class that an image was given and marks it as labelled.
func (a *answered) label(id string, index int, version string) (class int, err error) {
	answers := a.find(id)
	switch {
	case answers == nil:
		return 0, errUnknown
	case answers.version != version:
		return 0, errReplaced
	case index < 0 || index >= len(answers.classes):
		return 0, fmt.Errorf("index %d: the request has %d images", index, len(answers.classes))
	case answers.classes[index] < 0:
		return 0, errLabelled
	}
	class = int(answers.classes[index])
	answers.classes[index] = -1
	return class, nil
}

// sources limits the labels of each source and of all, and puts those in
// quarantine that contradict the others.
type sources struct {
	all   *rate.Limiter
	each  map[string]*rate.Limiter
	told  map[string]tally // of the sources whose labels were counted
	total tally
	kept  time.Time // when idle ones were last dropped
}

// tally is what one source said of late.
type tally struct {
	Labels int  `json:"labels"`
	Errors int  `json:"errors"` // that contradict the model
	Banned bool `json:"banned,omitempty"`
}

const (
	// minTally labels of a source, and as many of the others, are needed to
	// compare them.
	minTally = 20
	// banConfidence is that of either bound in the comparison: with 1,024
	// honest sources, one in quarantine by mistake is an event of 2%.
	banConfidence = 0.99999
	// maxTally is when all tallies are halved: what was long ago counts less.
	maxTally = 8192
)

func (s *sources) init() {
	s.all, s.each, s.told = rate.NewLimiter(totalRate, totalBurst), map[string]*rate.Limiter{}, map[string]tally{}
}

func (s *sources) restore(told map[string]tally) {
	for name, t := range told {
		s.told[name] = t
		s.total.Labels += t.Labels
		s.total.Errors += t.Errors
	}
}

func (s *sources) tallies() map[string]tally { return maps.Clone(s.told) }

func (s *sources) banned() (n int) {
	for _, t := range s.told {
		if t.Banned {
			n++
		}
	}
	return n
}

// allow says whether one more label of a source may be taken: at its rate, at
// the rate of all, and, beside others, no more than all of them together.
func (s *sources) allow(name string, now time.Time) error {
	t := s.told[name]
	if t.Banned {
		return errBanned
	}
	if others := s.total.Labels - t.Labels; others > 0 && t.Labels >= others+sourceBurst {
		return errTooMany
	}
	l := s.each[name]
	if l == nil {
		if len(s.each) >= maxSources && now.Sub(s.kept) >= time.Second {
			s.kept = now
			for name, idle := range s.each { // a full allowance is as good as a new one
				if idle.TokensAt(now) >= sourceBurst {
					delete(s.each, name)
				}
			}
		}
		if len(s.each) >= maxSources {
			return errTooMany
		}
		l = rate.NewLimiter(sourceRate, sourceBurst)
		s.each[name] = l
	}
	if !l.AllowN(now, 1) || !s.all.AllowN(now, 1) {
		return errTooMany
	}
	return nil
}

// count adds a label of a source, and reports whether that puts it in
// quarantine: where its labels contradict the model far more often than those
// of all others do. When the model is wrong they all contradict it.
func (s *sources) count(name string, wrong bool) (banned bool) {
	t, known := s.told[name]
	if !known && len(s.told) >= maxSources {
		return false
	}
	t.Labels++
	s.total.Labels++
	if wrong {
		t.Errors++
		s.total.Errors++
	}
	others := tally{Labels: s.total.Labels - t.Labels, Errors: s.total.Errors - t.Errors}
	if t.Labels >= minTally && others.Labels >= minTally &&
		interval.Lower(t.Errors, t.Labels, banConfidence) > interval.Upper(others.Errors, others.Labels, banConfidence) {
		s.total.Labels, s.total.Errors = others.Labels, others.Errors
		s.told[name] = tally{Banned: true}
		return true
	}
	s.told[name] = t
	if s.total.Labels > maxTally {
		s.total = tally{}
		for name, t := range s.told {
			t.Labels, t.Errors = t.Labels/2, t.Errors/2
			if t.Labels == 0 && !t.Banned {
				delete(s.told, name)
				continue
			}
			s.told[name] = t
			s.total.Labels += t.Labels
			s.total.Errors += t.Errors
		}
	}
	return false
}
