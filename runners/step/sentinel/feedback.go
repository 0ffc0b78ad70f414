package sentinel

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/time/rate"

	"github.com/temper-ml/temper/models/detect"
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
		if !s.sources.allow(f.Source, now) {
			err = errTooMany
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
		if w.accuracy == nil || !w.accuracy.Observe(predicted != f.Label) {
			return
		}
		if s.config.DefendAccuracy {
			s.raise(Accuracy, now)
		} else {
			s.report(Accuracy, now)
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

// label returns the class that an image was given and marks it as labelled.
func (a *answered) label(id string, index int, version string) (class int, err error) {
	answers, ok := a.fresh[id]
	if !ok {
		answers, ok = a.old[id]
	}
	switch {
	case !ok:
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

// sources limits the labels of each source and of all.
type sources struct {
	all  *rate.Limiter
	each map[string]*rate.Limiter
	kept time.Time // when idle ones were last dropped
}

func (s *sources) init() {
	s.all, s.each = rate.NewLimiter(totalRate, totalBurst), map[string]*rate.Limiter{}
}

func (s *sources) allow(name string, now time.Time) bool {
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
			return false
		}
		l = rate.NewLimiter(sourceRate, sourceBurst)
		s.each[name] = l
	}
	return l.AllowN(now, 1) && s.all.AllowN(now, 1)
}
