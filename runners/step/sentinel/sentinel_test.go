package sentinel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/runners/step/serve"
	"github.com/temper-ml/temper/runners/step/serve/inference"
)

// The tests' model and guard are random linear networks; clean images are
// nearly black and white.
var shape = nn.Shape{Height: 6, Width: 6, Channels: 1}

func network(t testing.TB, seed uint64) *nn.Network {
	t.Helper()
	n, err := nn.New(nn.Description{Name: "test", Input: shape, Layers: []nn.Layer{{Dense: &nn.Dense{Units: 3}}}}, seed)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n.Flat() {
		n.Flat()[i] *= 4
	}
	return n
}

type images []float32

func clean(n int, seed uint64) images {
	rng := rand.New(rand.NewPCG(seed, 1))
	x := make(images, n*shape.Size())
	for i := range x {
		x[i] = 0.1 * rng.Float32()
		if rng.IntN(2) == 1 {
			x[i] = 1 - x[i]
		}
	}
	return x
}

func (x images) Len() int                       { return len(x) / shape.Size() }
func (x images) Read(dst []float32, lo, hi int) { copy(dst, x[lo*shape.Size():hi*shape.Size()]) }
func (x images) at(i int) []float32             { return x[i*shape.Size() : (i+1)*shape.Size()] }

// hostile is the most suspicious of some attacked images.
func hostile(m Model) []float32 {
	if x, ok := hostiles.Load(m.Detector); ok {
		return x.([]float32)
	}
	gradients, err := graph.NewAttack(m.Network, 64)
	if err != nil {
		panic(err)
	}
	x := clean(300, 99)
	scorer, err := m.Detector.Scorer(m.Network)
	if err != nil {
		panic(err)
	}
	scores, err := scorer.Score(x, x.Len())
	if err != nil {
		panic(err)
	}
	labels := make([]uint8, x.Len())
	for i, score := range scores {
		labels[i] = uint8(score.Served)
	}
	if x, err = attack.FGSM(attack.Threat{Norm: "linf", Epsilon: 0.3}).Perturb(context.Background(), gradients, x, labels, 1); err != nil {
		panic(err)
	}
	if scores, err = scorer.Score(x, x.Len()); err != nil {
		panic(err)
	}
	best := 0
	for i, score := range scores {
		if score.Score > scores[best].Score {
			best = i
		}
	}
	if !scores[best].Flagged {
		panic("no attacked image is flagged")
	}
	hostiles.Store(m.Detector, x.at(best))
	return x.at(best)
}

var hostiles sync.Map // by detector

// made keeps the tests' models: calibration takes a second.
var made sync.Map // by seed

func model(t testing.TB, version string, seed uint64) Model {
	t.Helper()
	m := Model{Version: version, Digest: "sha256:" + version, Network: network(t, seed), ErrorBound: 0.03}
	if d, ok := made.Load(seed); ok {
		m.Detector = d.(*detect.Detector)
		return m
	}
	gradients, err := graph.NewAttack(m.Network, 64)
	if err != nil {
		t.Fatal(err)
	}
	if m.Detector, err = detect.Calibrate(t.Context(), gradients, network(t, seed+1000), clean(2000, 1), clean(2500, 2)); err != nil {
		t.Fatal(err)
	}
	made.Store(seed, m.Detector)
	return m
}

// clock is a clock that stands still unless told.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// wait lets time pass, as a ticking sentinel sees it.
func (f *fixture) wait(d time.Duration) {
	for ; d > 0; d -= maxStep {
		f.clock.Add(min(d, maxStep))
		f.Status()
	}
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// defence records what was started.
type defence struct {
	started chan Incident
	err     error
}

func (d *defence) Start(_ context.Context, i Incident) error {
	d.started <- i
	return d.err
}

func newDefence() *defence { return &defence{started: make(chan Incident, 100)} }

type fixture struct {
	*Sentinel
	t       *testing.T
	url     string
	model   Model
	clock   *clock
	defence *defence
	told    *[]Incident
	sent    int
}

func start(t *testing.T, change func(*Config)) *fixture {
	t.Helper()
	f := &fixture{t: t, model: model(t, "v1", 1), clock: &clock{now: time.Unix(1e9, 0)}, defence: newDefence(), told: new([]Incident)}
	var mu sync.Mutex
	c := Config{Defence: f.defence, Now: f.clock.Now, Notify: func(i Incident) {
		mu.Lock()
		defer mu.Unlock()
		*f.told = append(*f.told, i)
	}}
	if change != nil {
		change(&c)
	}
	var err error
	if f.Sentinel, err = New(c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	if err := f.Use(f.model); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(f.Handler())
	t.Cleanup(server.Close)
	f.url = server.URL
	return f
}

func (f *fixture) post(path string, header map[string]string, body []byte) (int, string) {
	f.t.Helper()
	req, err := http.NewRequest(http.MethodPost, f.url+path, bytes.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func binaryMode(kind, id string) map[string]string {
	return map[string]string{"Content-Type": "application/json", "Ce-Specversion": "1.0", "Ce-Type": kind, "Ce-Id": id, "Ce-Source": "http://test", "Ce-Inferenceservicename": "mnist"}
}

func structuredMode(kind, id string, data []byte) []byte {
	return fmt.Appendf(nil, `{"specversion":"1.0","type":%q,"id":%q,"source":"http://test","datacontenttype":"application/json","data":%s}`, kind, id, data)
}

func requestBody(pixels []float32) []byte {
	body, _ := inference.AppendRequest(nil, pixels, len(pixels)/shape.Size(), shape, false)
	return body
}

func responseBody(version string, n int) []byte {
	a := inference.Answer{Model: "m", Version: version, Labels: make([]int64, n), Probabilities: make([]float32, 3*n), Classes: 3}
	body, _ := a.Append(nil, []inference.Output{{Name: inference.Label}, {Name: inference.Probabilities}})
	return body
}

// send mirrors one answered request and returns its id.
func (f *fixture) send(pixels []float32) string {
	f.t.Helper()
	f.sent++
	id := fmt.Sprintf("request-%d", f.sent)
	for _, e := range []struct {
		kind string
		body []byte
	}{{serve.RequestEvent, requestBody(pixels)}, {serve.ResponseEvent, responseBody(f.Status().Model, len(pixels)/shape.Size())}} {
		header, body := binaryMode(e.kind, id), e.body
		if f.sent%2 == 0 {
			header, body = map[string]string{"Content-Type": "application/cloudevents+json"}, structuredMode(e.kind, id, e.body)
		}
		if code, text := f.post("/", header, body); code != http.StatusAccepted {
			f.t.Fatalf("%s: %d %s", e.kind, code, text)
		}
	}
	return id
}

// attack sends hostile requests until an incident is open, at most 10.
func (f *fixture) attack() {
	f.t.Helper()
	for range 10 {
		f.send(hostile(f.model))
		if f.Status().Open != nil {
			return
		}
	}
	f.t.Fatalf("no alarm after 10 hostile requests: %+v", f.Status())
}

func TestOneDefenceForEachIncident(t *testing.T) {
	f := start(t, nil)
	x := clean(400, 3)
	for i := range x.Len() {
		f.send(x.at(i))
	}
	st := f.Status()
	if st.State != Normal || st.Requests != 400 || len(st.Incidents) != 0 || st.Flagged > 20 {
		t.Fatalf("after clean traffic: %+v", st)
	}

	f.attack()
	began := f.Status().Open
	if d := began.Request - 400; d > 10 {
		t.Errorf("alarm at hostile request %d", d)
	}
	started := <-f.defence.started
	if started.ID != began.ID || started.Cause != Attack || started.Model != "v1" || len(started.Evidence) < 2 {
		t.Errorf("the defence got %+v", started)
	}
	for _, e := range started.Evidence {
		if len(e.Pixels) != shape.Size() || e.Score <= f.model.Detector.Calibration.Attack.Threshold {
			t.Errorf("evidence %+v", e)
		}
	}
	for range 100 {
		f.send(hostile(f.model))
	}
	if st := f.Status(); st.State != Defending || st.Open.ID != began.ID {
		t.Errorf("under attack for longer: %+v", st)
	}

	f.model = model(t, "v2", 2)
	if err := f.Use(f.model); err != nil {
		t.Fatal(err)
	}
	st = f.Status()
	if st.State != Cooldown || st.Model != "v2" || st.Attack.Level != 0 || len(st.Incidents) != 1 || st.Incidents[0].Outcome != Recovered || len(f.Evidence()) != 0 {
		t.Errorf("after the promotion: %+v", st)
	}
	for range 100 { // the same attacker goes on: no second defence for the same attack
		f.send(hostile(f.model))
	}
	if st := f.Status(); st.State != Cooldown || st.Open != nil {
		t.Errorf("in the cooldown: %+v", st)
	}
	f.clock.Add(DefaultCooldown)
	if st := f.Status(); st.State != Cooldown { // the attacker has not stopped: one attack, one incident
		t.Errorf("after the cooldown, under attack: %+v", st)
	}
	for i := 0; f.Status().State != Normal; i++ {
		if i == 2000 {
			t.Fatalf("not normal after %d clean requests: %+v", i, f.Status())
		}
		f.send(clean(20, uint64(i)))
	}
	if st := f.Status(); st.Attack.Level != 0 {
		t.Errorf("after the attack: %+v", st)
	}
	if len(f.defence.started) != 0 {
		t.Error("a second defence for one incident")
	}

	f.attack() // another one
	if i := <-f.defence.started; i.ID == began.ID || i.Model != "v2" {
		t.Errorf("the second incident: %+v", i)
	}
	var outcomes []string
	for _, i := range *f.told {
		outcomes = append(outcomes, i.Outcome)
	}
	if got := strings.Join(outcomes, ","); got != ",recovered," {
		t.Errorf("told of outcomes %q", got)
	}
}

// The same events in the same order give the same alarm at the same request.
func TestDeterministic(t *testing.T) {
	run := func() uint64 {
		f := start(t, nil)
		x := clean(50, 9)
		for i := range x.Len() {
			f.send(x.at(i))
		}
		f.attack()
		return f.Status().Open.Request
	}
	if a, b := run(), run(); a != b {
		t.Errorf("alarms at requests %d and %d", a, b)
	}
}

func TestDefenceThatFails(t *testing.T) {
	for name, c := range map[string]struct {
		d    Defence
		want string
	}{
		"error": {&defence{make(chan Incident, 9), errors.New("no candidate passed the gate")}, "no candidate passed the gate"},
		"panic": {panics{}, "panic: broken"},
	} {
		f := start(t, func(c2 *Config) { c2.Defence = c.d })
		f.send(clean(1, 1))
		for range 10 {
			f.send(hostile(f.model))
		}
		f.starts.Wait()
		st := f.Status()
		if st.State != Cooldown || len(st.Incidents) != 1 || st.Incidents[0].Outcome != Failed || st.Incidents[0].Error != c.want {
			t.Errorf("%s: %+v", name, st)
		}
		f.wait(patience * DefaultCooldown)
		for range 10 {
			f.send(hostile(f.model))
		}
		f.starts.Wait()
		if st := f.Status(); len(st.Incidents) != 2 || st.Incidents[1].ID == st.Incidents[0].ID { // it may try again
			t.Errorf("%s: the next incident: %+v", name, st)
		}
	}
}

var raceDetector bool

type panics struct{}

func (panics) Start(context.Context, Incident) error { panic("broken") }

func TestWithoutDefence(t *testing.T) {
	f := start(t, func(c *Config) { c.Defence = nil })
	f.attack()
	if st := f.Status(); st.State != Alarm {
		t.Errorf("%+v", st)
	}
	for f.Status().Attack.Level < 11 { // an attack that goes on does not subside
		f.send(hostile(f.model))
	}
	f.wait(maxIncident + time.Second)
	if st := f.Status(); st.State != Cooldown || st.Incidents[0].Outcome != Unresolved {
		t.Errorf("a lost defence: %+v", st)
	}
}

func TestUseRefuses(t *testing.T) {
	f := start(t, nil)
	other := model(t, "v2", 2)
	other.Detector = f.model.Detector
	if err := f.Use(other); err == nil || !strings.Contains(err.Error(), "calibrate") {
		t.Errorf("a detector for another network: %v", err)
	}
	if err := f.Use(Model{Version: "v3", Network: other.Network}); err == nil {
		t.Error("no detector: no error")
	}
	if st := f.Status(); st.Model != "v1" {
		t.Errorf("watching %s", st.Model)
	}
}

// Requests and responses in any order, delivered twice, or lost.
func TestCase63EventsOutOfOrder(t *testing.T) {
	f := start(t, nil)
	x := clean(10, 4)
	ask := func(id string, i int) {
		t.Helper()
		if code, text := f.post("/", binaryMode(serve.RequestEvent, id), requestBody(x.at(i))); code != http.StatusAccepted {
			t.Fatal(code, text)
		}
	}
	reply := func(id, version string) {
		t.Helper()
		if code, text := f.post("/", binaryMode(serve.ResponseEvent, id), responseBody(version, 1)); code != http.StatusAccepted {
			t.Fatal(code, text)
		}
	}
	expect := func(requests uint64, waiting int) {
		t.Helper()
		if st := f.Status(); st.Requests != requests || st.Waiting != waiting {
			t.Fatalf("%d requests, %d waiting, want %d, %d", st.Requests, st.Waiting, requests, waiting)
		}
	}
	reply("a", "v1") // the response first
	expect(0, 1)
	ask("a", 0)
	expect(1, 0)
	ask("a", 0) // delivered again
	reply("a", "v1")
	expect(1, 0)
	ask("b", 1)
	ask("c", 2)
	reply("c", "v1")
	expect(2, 1)
	reply("b", "v0") // answered by the model before
	expect(2, 0)
	ask("same", 3) // another request with the same id does not hide the first
	ask("same", 4)
	expect(3, 1)
	reply("same", "v1")
	expect(4, 0)
	ask("d", 5) // its response is lost
	reply("x", "v1")
	expect(4, 2)
	f.clock.Add(maxWait + time.Second)
	ask("e", 6)
	expect(5, 1)
	reply("e", "v1")
	expect(6, 0)
	ask("f", 7)
	if code, text := f.post("/", binaryMode(serve.ResponseEvent, "f"), []byte(`{"error":"busy"}`)); code != http.StatusAccepted {
		t.Fatal(code, text)
	}
	expect(6, 0)
}

// A batch of N counts N, in binary data as in JSON.
func TestBatchAndBinaryData(t *testing.T) {
	f := start(t, nil)
	f.send(clean(100, 5))
	body, length := inference.AppendRequest(nil, clean(7, 6), 7, shape, true)
	header := binaryMode(serve.RequestEvent, "binary")
	header[inference.HeaderLength] = fmt.Sprint(length)
	if code, text := f.post("/", header, body); code != http.StatusAccepted {
		t.Fatal(code, text)
	}
	a := inference.Answer{Version: "v1", Labels: make([]int64, 7)}
	body, length = a.Append(nil, []inference.Output{{Name: inference.Label, Binary: true}})
	header = binaryMode(serve.ResponseEvent, "binary")
	header[inference.HeaderLength] = fmt.Sprint(length)
	if code, text := f.post("/", header, body); code != http.StatusAccepted {
		t.Fatal(code, text)
	}
	if st := f.Status(); st.Requests != 107 || st.Waiting != 0 {
		t.Errorf("%d requests, %d waiting", st.Requests, st.Waiting)
	}
}

func TestNoModelYet(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	server := httptest.NewServer(s.Handler())
	defer server.Close()
	f := &fixture{Sentinel: s, t: t, url: server.URL}
	if code, _ := f.post("/", binaryMode(serve.RequestEvent, "a"), requestBody(clean(1, 1))); code != http.StatusServiceUnavailable {
		t.Errorf("event: %d", code)
	}
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 503, "/status": 200, "/metrics": 200} {
		resp, err := http.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, want)
		}
	}
}

// Bad events are refused with 4xx and one log line each, and leave no memory
// behind.
func TestCase52BadEvents(t *testing.T) {
	var logged bytes.Buffer
	f := start(t, func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelWarn}))
	})
	good := string(requestBody(clean(1, 1)))
	with := func(h map[string]string, pairs ...string) map[string]string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i+1] == "" {
				delete(h, pairs[i])
			} else {
				h[pairs[i]] = pairs[i+1]
			}
		}
		return h
	}
	header := func(pairs ...string) map[string]string { return with(binaryMode(serve.RequestEvent, "bad"), pairs...) }
	structured := map[string]string{"Content-Type": "application/cloudevents+json"}
	deep := strings.Repeat("[", 10_000)
	replaced := func(old, new string) string {
		out := strings.Replace(good, old, new, 1)
		if out == good {
			t.Fatalf("%q is not in %s", old, good)
		}
		return out
	}
	first := good[strings.Index(good, `"data":[`)+8:][:5]
	cases := map[string]struct {
		header map[string]string
		body   string
		want   int
	}{
		"not an event":       {map[string]string{"Content-Type": "application/json"}, good, 400},
		"no id":              {header("Ce-Id", ""), good, 400},
		"no source":          {header("Ce-Source", ""), good, 400},
		"version 9":          {header("Ce-Specversion", "9.0"), good, 400},
		"other type":         {header("Ce-Type", "com.example.other"), good, 400},
		"long id":            {header("Ce-Id", strings.Repeat("i", 1000)), good, 400},
		"bad time":           {header("Ce-Time", "yesterday"), good, 400},
		"nameless attribute": {header("Ce-", "x", "Ce-Id", ""), good, 400},
		"gzip":               {header("Content-Encoding", "gzip"), "\x1f\x8b\x08", 415},
		"too large":          {header(), strings.Repeat(" ", maxBody+1), 413},
		"empty":              {header(), "", 400},
		"deep":               {header(), deep, 400},
		"deep in structure":  {structured, string(structuredMode(serve.RequestEvent, "x", []byte(`{"a":`+deep))), 400},
		"structured, no id":  {structured, `{"specversion":"1.0","type":"` + serve.RequestEvent + `","source":"x","data":{}}`, 400},
		"structured, empty":  {structured, "", 400},
		"batch":              {map[string]string{"Content-Type": "application/cloudevents-batch+json"}, "[]", 400},
		"wrong shape":        {header(), replaced(`[1,1,6,6]`, `[1,1,6,7]`), 400},
		"NaN pixel":          {header(), replaced(first, "NaN,0"), 400},
		"1e999 pixel":        {header(), replaced(first, "1e999"), 400},
		"pixel outside":      {header(), replaced(first, "1.5,0"), 400},
		"bad response":       {with(binaryMode(serve.ResponseEvent, "bad")), "<html>", 400},
		"bad header length":  {header(inference.HeaderLength, "-5"), good, 400},
		"huge header length": {header(inference.HeaderLength, "999999999"), good, 400},
	}
	for name, c := range cases {
		logged.Reset()
		code, text := f.post("/", c.header, []byte(c.body))
		if code != c.want {
			t.Errorf("%s: %d %s, want %d", name, code, text, c.want)
		}
		var answer struct{ Error string }
		if err := json.Unmarshal([]byte(text), &answer); err != nil || answer.Error == "" || len(text) > 2000 {
			t.Errorf("%s: answer %.300s", name, text)
		}
		if lines := strings.Count(logged.String(), "\n"); lines != 1 || logged.Len() > 3000 {
			t.Errorf("%s: %d log lines, %d bytes", name, lines, logged.Len())
		}
	}
	if st := f.Status(); st.Requests != 0 || st.Waiting != 0 {
		t.Errorf("bad events were counted: %+v", st)
	}

	// An endless body ends at the limit.
	req, err := http.NewRequest(http.MethodPost, f.url+"/", io.MultiReader(strings.NewReader(good), endless{}))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header() {
		req.Header.Set(k, v)
	}
	if resp, err := http.DefaultClient.Do(req); err == nil { // or the connection is closed
		resp.Body.Close()
		if resp.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("endless body: %d", resp.StatusCode)
		}
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

// What waits for a response is bounded in number, and so are remembered
// answers and sources.
func TestCase52MemoryIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("many events")
	}
	f := start(t, nil)
	h := f.Handler()
	body := requestBody(clean(1, 1))
	var before, after runtime.MemStats
	feed := func(from, to int) {
		for i := from; i < to; i++ {
			r := httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(body))
			for k, v := range binaryMode(serve.RequestEvent, fmt.Sprint("never answered ", i)) {
				r.Header.Set(k, v)
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != http.StatusAccepted {
				t.Fatal(w.Code, w.Body)
			}
			f.Feedback(Feedback{ID: "x", Source: fmt.Sprint("source ", i)})
		}
		runtime.GC()
	}
	feed(0, 5_000)
	runtime.ReadMemStats(&before)
	feed(5_000, 10_000)
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
		t.Errorf("5,000 events grew the heap by %d bytes", grown)
	}
	if n := f.Status().Waiting; n > maxWaiting {
		t.Errorf("%d waiting", n)
	}
	if n := len(f.sources.each); n > maxSources {
		t.Errorf("%d sources", n)
	}
}

// Metrics have the same number of series whatever names come in.
func TestCase56MetricSeriesAreBounded(t *testing.T) {
	f := start(t, nil)
	h := f.Handler()
	series := func() int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		n := 0
		for line := range strings.Lines(w.Body.String()) {
			if strings.HasPrefix(line, "temper_") {
				n++
			}
		}
		return n
	}
	strange := func(i int) {
		name := fmt.Sprint("name-", i)
		for _, r := range []*http.Request{
			httptest.NewRequest(http.MethodPost, "/", strings.NewReader("{}")),
			httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(responseBody(name, 1))),
			httptest.NewRequest(http.MethodGet, "/"+name, nil),
			httptest.NewRequest(http.MethodPost, "/v2/feedback", strings.NewReader(`{"id":"`+name+`","label":1,"source":"`+name+`"}`)),
		} {
			for k, v := range binaryMode(serve.ResponseEvent, name) {
				r.Header.Set(k, v)
			}
			r.Header.Set("Ce-"+name, name)
			r.Header.Set("Ce-Source", name)
			h.ServeHTTP(httptest.NewRecorder(), r)
		}
	}
	strange(0)
	f.send(clean(1, 1))
	for i := range 600 { // every outcome at least once, the limits included
		strange(i)
	}
	before := series()
	for i := range 2_000 {
		strange(1000 + i)
	}
	if after := series(); after != before || before < 10 {
		t.Errorf("%d series, then %d", before, after)
	}
}

func TestCase57NoDebugEndpoints(t *testing.T) {
	f := start(t, nil)
	for _, path := range []string{"/debug/pprof/", "/debug/vars", "/debug/pprof/heap", "/admin", "/config"} {
		w := httptest.NewRecorder()
		f.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		if w.Code != http.StatusNotFound && w.Code != http.StatusMethodNotAllowed {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
}

// Many senders, a promotion and readers at once: every request is counted
// once, and an attack still starts one defence.
func TestConcurrent(t *testing.T) {
	f := start(t, nil)
	x := clean(200, 7)
	var senders sync.WaitGroup
	for worker := range 4 {
		senders.Go(func() {
			for i := worker; i < x.Len(); i += 4 {
				pixels := x.at(i)
				if i%2 == 1 {
					pixels = hostile(f.model)
				}
				if err := f.Observe(Observation{ID: fmt.Sprint(i), Pixels: pixels, N: 1}); err != nil {
					t.Error(err)
				}
				f.Status()
				f.Evidence()
				f.Feedback(Feedback{ID: fmt.Sprint(i), Label: i % 3})
			}
		})
	}
	senders.Wait()
	if n := len(f.defence.started); n != 1 {
		t.Errorf("%d defences", n)
	}
	if st := f.Status(); st.Requests != 200 {
		t.Errorf("%d requests", st.Requests)
	}
}

func FuzzEvent(f *testing.F) {
	s, err := New(Config{})
	if err != nil {
		f.Fatal(err)
	}
	if err := s.Use(model(f, "v1", 1)); err != nil {
		f.Fatal(err)
	}
	request, response := requestBody(clean(1, 1)), responseBody("v1", 1)
	f.Add("application/json", "1.0", serve.RequestEvent, "a", "", "", request)
	f.Add("application/json", "1.0", serve.ResponseEvent, "a", "2026-11-21T00:00:00Z", "20", response)
	f.Add("application/cloudevents+json", "", "", "", "", "", structuredMode(serve.RequestEvent, "b", request))
	f.Add("application/cloudevents+json", "", "", "", "", "", structuredMode(serve.ResponseEvent, "b", response))
	f.Add("application/cloudevents+json", "", "", "", "", "", []byte(`{"specversion":"1.0","type":"`+serve.RequestEvent+`","id":"a","source":"s","data_base64":"e30="}`))
	f.Fuzz(func(t *testing.T, content, version, kind, id, at, length string, body []byte) {
		r := httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(body))
		for k, v := range map[string]string{"Content-Type": content, "Ce-Specversion": version, "Ce-Type": kind, "Ce-Id": id, "Ce-Time": at, "Ce-Source": "s", inference.HeaderLength: length} {
			if v != "" {
				r.Header.Set(k, v)
			}
		}
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		if w.Code != http.StatusAccepted && w.Code/100 != 4 {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	})
}

// A real server mirrors to the sentinel, which notices hostile requests within
// ten, and follows a reload.
func TestServerMirrorsToSentinel(t *testing.T) {
	f := start(t, nil)
	source := &fixed{&serve.Model{Network: f.model.Network, Version: "v1", Digest: f.model.Digest}}
	server, err := serve.New(serve.Options{Name: "m", Source: source, Mirror: f.url})
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l, nil) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	sent := uint64(0)
	ask := func(c inference.Client, x []float32) {
		t.Helper()
		if _, err := c.Predict(t.Context(), x, 1, shape); err != nil {
			t.Fatal(err)
		}
		sent++
		for f.Status().Requests != sent {
			time.Sleep(time.Millisecond)
		}
	}
	client := inference.Client{URL: "http://" + l.Addr().String(), Model: "m"}
	x := clean(50, 8)
	for i := range x.Len() {
		client.Binary = i%2 == 0
		ask(client, x.at(i))
	}
	if st := f.Status(); st.State != Normal {
		t.Fatalf("%+v", st)
	}
	for range 10 {
		ask(client, hostile(f.model))
	}
	if i := f.Status().Open; i == nil || i.Request > 60 {
		t.Errorf("%+v", f.Status())
	}
	f.model = model(t, "v2", 2)
	if err := f.Use(f.model); err != nil {
		t.Fatal(err)
	}
	source.Model = &serve.Model{Network: f.model.Network, Version: "v2", Digest: f.model.Digest}
	if err := server.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	sent = 0
	ask(client, x.at(0))
}

type fixed struct{ *serve.Model }

func (f *fixed) Load(context.Context, string) (*serve.Model, error) { return f.Model, nil }
