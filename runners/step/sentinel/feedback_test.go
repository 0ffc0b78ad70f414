package sentinel

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

func (f *fixture) label(body string) int {
	f.t.Helper()
	code, _ := f.post("/v2/feedback", map[string]string{"Content-Type": "application/json"}, []byte(body))
	return code
}

// mislabel sends n clean requests and a label for each, wrong or right.
func (f *fixture) labels(n int, wrong bool, seed uint64) {
	f.t.Helper()
	x := clean(n, seed)
	scorer, err := f.model.Detector.Scorer(f.model.Network)
	if err != nil {
		f.t.Fatal(err)
	}
	for i := range n {
		scores, err := scorer.Score(x.at(i), 1)
		if err != nil {
			f.t.Fatal(err)
		}
		label := scores[0].Served
		if wrong {
			label = (label + 1) % 3
		}
		id := f.send(x.at(i))
		f.clock.Add(time.Second) // within the cap of one source
		if code := f.label(fmt.Sprintf(`{"id":%q,"label":%d,"source":"nightly audit"}`, id, label)); code != http.StatusAccepted {
			f.t.Fatalf("label %d: %d", i, code)
		}
	}
}

// Right labels keep quiet; when all are wrong the alarm comes within a few.
func TestAccuracyAlarm(t *testing.T) {
	f := start(t, nil)
	f.labels(100, false, 11)
	if st := f.Status(); st.Labels != 100 || st.Errors != 0 || len(st.Incidents) != 0 {
		t.Fatalf("%+v", st)
	}
	f.labels(6, true, 12)
	st := f.Status()
	if len(st.Incidents) != 1 || st.Incidents[0].Cause != Accuracy || st.Incidents[0].Outcome != Reported || st.Incidents[0].Label > 106 {
		t.Fatalf("%+v", st)
	}
	// Labels can be forged: the alarm starts nothing, and does not keep an
	// attack from being answered.
	if st.State != Normal || len(f.defence.started) != 0 {
		t.Errorf("%+v", st)
	}
	f.labels(6, true, 13)
	if n := len(f.Status().Incidents); n != 1 {
		t.Errorf("%d reports of one fall in accuracy", n)
	}
	f.attack()
	<-f.defence.started
}

func TestAccuracyAlarmDefends(t *testing.T) {
	f := start(t, func(c *Config) { c.DefendAccuracy = true })
	f.labels(8, true, 12)
	if i := <-f.defence.started; i.Cause != Accuracy {
		t.Errorf("%+v", i)
	}
	if st := f.Status(); st.State != Defending {
		t.Errorf("%+v", st)
	}
}

func TestFeedbackRefuses(t *testing.T) {
	f := start(t, nil)
	id := f.send(clean(2, 1))
	for body, want := range map[string]int{
		``:                                           400,
		`{}`:                                         400,
		`{"id":"` + id + `"}`:                        400,
		`{"id":"","label":1}`:                        400,
		`{"id":"` + id + `","label":3}`:              400,
		`{"id":"` + id + `","label":-1}`:             400,
		`{"id":"` + id + `","label":1.5}`:            400,
		`{"id":"` + id + `","label":"1"}`:            400,
		`{"id":"` + id + `","label":1e99}`:           400,
		`{"id":"` + id + `","label":1}{}`:            400,
		`{"id":"` + id + `","label":1,"weight":100}`: 400,
		`{"id":"` + id + `","label":1,"index":2}`:    400,
		`{"id":"` + id + `","label":1,"index":-1}`:   400,
		`{"id":"` + id + `","label":1,"source":"` + strings.Repeat("s", maxSource+1) + `"}`: 400,
		`{"id":"` + strings.Repeat("i", maxID+1) + `","label":1}`:                           400,
		strings.Repeat(" ", maxFeedback) + `{"id":"` + id + `","label":1}`:                  413,
		`{"id":"never seen","label":1}`:                                                     404,
		strings.Repeat("[", 4000):                                                           400,
	} {
		if got := f.label(body); got != want {
			t.Errorf("%.80s: %d, want %d", body, got, want)
		}
		f.clock.Add(time.Second)
	}
	if st := f.Status(); st.Labels != 0 {
		t.Fatalf("%d labels", st.Labels)
	}
	for i, want := range []int{202, 409} { // one label an image
		if got := f.label(fmt.Sprintf(`{"id":%q,"label":%d,"index":1}`, id, i)); got != want {
			t.Errorf("label %d: %d, want %d", i, got, want)
		}
	}
	if err := f.Use(model(t, "v2", 2)); err != nil {
		t.Fatal(err)
	}
	if got := f.label(fmt.Sprintf(`{"id":%q,"label":0}`, id)); got != 409 {
		t.Errorf("about the model before: %d", got)
	}
}

// One source, and all together, can only send so many.
func TestFeedbackCaps(t *testing.T) {
	f := start(t, nil)
	id := f.send(clean(1000, 1))
	send := func(n int, source func(int) string) (accepted int) {
		for i := range n {
			if f.Feedback(Feedback{ID: id, Index: f.sent, Label: 0, Source: source(i)}) == nil {
				accepted++
			}
			f.sent++
		}
		return accepted
	}
	f.sent = 0
	if n := send(100, func(int) string { return "one" }); n != sourceBurst {
		t.Errorf("%d labels of one source", n)
	}
	if n := send(800, func(i int) string { return fmt.Sprint(i) }); n > totalBurst {
		t.Errorf("%d labels of many sources", n)
	}
	f.clock.Add(10 * time.Second)
	if n := send(100, func(int) string { return "one" }); n != 10*sourceRate {
		t.Errorf("%d labels of one source after 10 s", n)
	}
}

func FuzzFeedback(f *testing.F) {
	f.Add([]byte(`{"id":"a","index":0,"label":3,"source":"x"}`))
	f.Add([]byte(`{"id":"a","label":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseFeedback(data)
		if err == nil && (got.ID == "" || len(got.ID) > maxID || len(got.Source) > maxSource) {
			t.Errorf("%+v", got)
		}
	})
}
