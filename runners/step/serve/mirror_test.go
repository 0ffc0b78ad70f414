package serve

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/temper-ml/temper/runners/step/serve/inference"
)

type event struct {
	http.Header
	body string
}

// sink collects events.
type sink struct {
	mu     sync.Mutex
	events []event
}

func (s *sink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, event{r.Header, string(body)})
	w.WriteHeader(http.StatusAccepted)
}

func TestMirror(t *testing.T) {
	var got sink
	server := httptest.NewServer(&got)
	defer server.Close()
	s := start(t, model(t, small, 1), func(o *Options) { o.Mirror, o.Namespace = server.URL, "prod" })
	infer := s.url + "/v2/models/digits/infer"

	resp, answer := do(t, "POST", infer, one)
	id := resp.Header.Get("X-Request-Id")
	do(t, "POST", infer, "{") // refused: not mirrored
	x := make([]float32, small.Input.Size())
	c := inference.Client{URL: s.url, Model: "digits", Binary: true}
	binary, err := c.Predict(t.Context(), x, 1, small.Input)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.stop(); err != nil { // sends what is queued
		t.Fatal(err)
	}

	if len(got.events) != 4 {
		t.Fatalf("%d events", len(got.events))
	}
	pair := func(id string) (request, response event) {
		var of []event
		for _, e := range got.events {
			if e.Get("Ce-Id") == id {
				of = append(of, e)
			}
		}
		if len(of) != 2 || of[0].Get("Ce-Type") != RequestEvent || of[1].Get("Ce-Type") != ResponseEvent {
			t.Fatalf("id %s has the events %v", id, of)
		}
		return of[0], of[1]
	}
	request, response := pair(id)
	if request.body != one || response.body != answer {
		t.Errorf("mirrored %s and %s", request.body, response.body)
	}
	for _, e := range got.events {
		for k, want := range map[string]string{"Ce-Specversion": "1.0", "Ce-Source": "/temper/serve/digits", "Ce-Inferenceservicename": "digits", "Ce-Namespace": "prod", "Ce-Component": "predictor"} {
			if e.Get(k) != want {
				t.Errorf("%s is %q, want %q", k, e.Get(k), want)
			}
		}
		if _, err := time.Parse(time.RFC3339Nano, e.Get("Ce-Time")); err != nil {
			t.Error(err)
		}
	}
	if request.Get("Content-Type") != "application/json" || request.Get(inference.HeaderLength) != "" {
		t.Errorf("%v", request.Header)
	}
	request, _ = pair(binary.ID) // the client gave no id, so the answer has the event's
	if request.Get("Content-Type") != "application/octet-stream" || request.Get(inference.HeaderLength) == "" || !strings.HasSuffix(request.body, strings.Repeat("\x00", 48)) {
		t.Errorf("%v %q", request.Header, request.body)
	}
	if n := value(t, s, "temper_mirror_requests_total"); n != 2 {
		t.Errorf("%v requests were counted", n)
	}
}

// A sink that hangs, or fails, costs the requests nothing.
func TestMirrorNeverSlows(t *testing.T) {
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-release
		w.WriteHeader(http.StatusInternalServerError)
	}))
	defer server.Close()
	s := start(t, model(t, small, 1), func(o *Options) { o.Mirror = server.URL })
	h := s.Handler()
	for range mirrorQueue + 500 { // would not end if one of them waited
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("POST", "/v2/models/digits/infer", strings.NewReader(one)))
		if w.Code != 200 {
			t.Fatal(w.Code, w.Body)
		}
	}
	if n := value(t, s, "temper_mirror_dropped_total", "reason", mirrorFull); n < 400 {
		t.Errorf("%v requests were counted as dropped", n)
	}
	close(release)
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if n := value(t, s, "temper_mirror_dropped_total", "reason", mirrorFailed); n < mirrorQueue/2 {
		t.Errorf("%v requests were counted as failed", n)
	}
	if n := s.mirror.waiting.Load(); n != 0 {
		t.Errorf("%d bytes are still queued", n)
	}
}

func TestMirrorSamples(t *testing.T) {
	m := &mirror{fraction: 0.1}
	n := 0
	for range 100_000 {
		if m.sample() {
			n++
		}
	}
	if n < 9_500 || n > 10_500 { // five standard deviations
		t.Errorf("%d of 100000 at a tenth", n)
	}
}
