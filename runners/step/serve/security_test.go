package serve

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/serve/inference"
	"github.com/temper-ml/temper/runners/step/serve/inference/inferencetest"
)

// endless is a body that never ends, and counts what was taken of it.
type endless struct{ taken atomic.Int64 }

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	e.taken.Add(int64(len(p)))
	return len(p), nil
}

func TestCase52HostileBodies(t *testing.T) {
	s := start(t, model(t, small, 1))
	infer := s.url + "/v2/models/digits/infer"
	tensor := func(shape, data string) io.Reader {
		return strings.NewReader(`{"inputs":[{"name":"input","shape":` + shape + `,"datatype":"FP32","data":` + data + `}]}`)
	}
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	io.Copy(z, io.LimitReader(&endless{}, 10*maxBody/4))
	z.Close()
	nan := `{"inputs":[{"name":"input","shape":[1,12],"datatype":"FP32","parameters":{"binary_data_size":48}}]}`
	stream := &endless{}

	cases := []struct {
		name    string
		body    io.Reader
		headers []string
		code    int
	}{
		{"too large", strings.NewReader(strings.Repeat(" ", maxBody+1)), nil, 413},
		{"endless chunks", stream, nil, 413},
		{"gzip bomb", &bomb, []string{"Content-Encoding", "gzip"}, 415},
		{"deep arrays", strings.NewReader(strings.Repeat("[", 10_000)), nil, 400},
		{"deep data", tensor("[1,12]", strings.Repeat("[", 10_000)), nil, 400},
		{"deep objects", strings.NewReader(strings.Repeat(`{"parameters":`, 10_000)), nil, 400},
		{"wrong shape", tensor("[1,1,28,28]", "[0,0,0,0,0,0,0,0,0,0,0,0]"), nil, 400},
		{"shape overflows", tensor("[2147483647,2147483647,2147483647,2147483647]", "[0]"), nil, 400},
		{"too little data", tensor("[1,12]", "[0]"), nil, 400},
		{"too many images", tensor("[257,12]", "["+strings.Repeat("0,", 257*12-1)+"0]"), nil, 400},
		{"NaN as JSON", tensor("[1,12]", "[NaN,0,0,0,0,0,0,0,0,0,0,0]"), nil, 400},
		{"NaN as a string", tensor("[1,12]", `["NaN",0,0,0,0,0,0,0,0,0,0,0]`), nil, 400},
		{"NaN in binary", strings.NewReader(nan + strings.Repeat("\xff", 48)), []string{inference.HeaderLength, fmt.Sprint(len(nan))}, 400},
		{"1e999", tensor("[1,12]", "[1e999,0,0,0,0,0,0,0,0,0,0,0]"), nil, 400},
		{"above 1", tensor("[1,12]", "[1.5,0,0,0,0,0,0,0,0,0,0,0]"), nil, 400},
		{"below 0", tensor("[1,12]", "[-0.5,0,0,0,0,0,0,0,0,0,0,0]"), nil, 400},
		{"header length", strings.NewReader("{}"), []string{inference.HeaderLength, "-1"}, 400},
		{"header length beyond the body", strings.NewReader("{}"), []string{inference.HeaderLength, "7000000"}, 400},
		{"header length beyond int", strings.NewReader("{}"), []string{inference.HeaderLength, "99999999999999999999"}, 400},
		{"pickle", strings.NewReader("\x80\x04\x95"), nil, 400},
		{"empty", strings.NewReader(""), nil, 400},
	}
	for round := range 2 {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for _, c := range cases {
			if round == 1 && c.name != "endless chunks" {
				continue // the other bodies are read up
			}
			lines := len(s.log.lines())
			req, err := http.NewRequest("POST", infer, io.NopCloser(c.body))
			if err != nil {
				t.Fatal(err)
			}
			for i := 0; i < len(c.headers); i += 2 {
				req.Header.Set(c.headers[i], c.headers[i+1])
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				if c.code != 413 { // the server may cut off a client that goes on sending before that reads the answer
					t.Errorf("%s: %v", c.name, err)
				}
				continue
			}
			answer, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != c.code || !strings.HasPrefix(string(answer), `{"error":"`) {
				t.Errorf("%s: %d %s, want %d", c.name, resp.StatusCode, answer, c.code)
			}
			if got := len(s.log.lines()) - lines; got != 1 {
				t.Errorf("%s: %d log lines, want 1", c.name, got)
			}
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 24<<20 {
			t.Errorf("round %d: %d bytes of heap are left over", round, grown)
		}
	}
	if n := stream.taken.Load(); n > 4*maxBody {
		t.Errorf("%d bytes of an endless body were taken", n)
	}
	if n := s.buffered.Load(); n != 0 {
		t.Errorf("%d bytes are still reserved", n)
	}
	expect(t, "POST", infer, one, 200, "label")
}

// Large bodies at once are refused as a whole budget, not one by one.
func TestCase52MemoryOfAllRequestsIsBounded(t *testing.T) {
	s := start(t, model(t, small, 1))
	s.buffered.Add(maxBuffered)
	resp, answer := do(t, "POST", s.url+"/v2/models/digits/infer", one)
	if resp.StatusCode != 429 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("%d %s", resp.StatusCode, answer)
	}
	s.buffered.Add(-maxBuffered)
	expect(t, "POST", s.url+"/v2/models/digits/infer", one, 200, "label")
}

func TestCase52FloodOfBadRequestsIsNoFloodOfLines(t *testing.T) {
	s := start(t, model(t, small, 1))
	h := s.Handler()
	for range 5000 {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("POST", "/v2/models/digits/infer", strings.NewReader("{")))
	}
	if n := len(s.log.lines()); n > 500 {
		t.Errorf("%d log lines", n)
	}
	long := httptest.NewRequest("POST", "/v2/models/"+strings.Repeat("x", 10_000), nil)
	h.ServeHTTP(httptest.NewRecorder(), long)
	for _, l := range s.log.lines() {
		if len(l) > 2000 {
			t.Errorf("a log line of %d bytes", len(l))
		}
	}
}

func TestCase53HalfOpenConnections(t *testing.T) {
	t.Parallel()
	s := start(t, model(t, small, 1))
	address := strings.TrimPrefix(s.url, "http://")
	began := time.Now()
	open, err := inferencetest.HalfOpen(address, "digits", 500)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		asked := time.Now()
		expect(t, "GET", s.url+"/v2/health/ready", "", 200, "true")
		expect(t, "POST", s.url+"/v2/models/digits/infer", one, 200, "label")
		if took := time.Since(asked); took > headerTimeout {
			t.Errorf("health and inference took %v beside half-open connections", took)
		}
	}
	if err := inferencetest.Closed(open, began.Add(readTimeout+20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if n := s.buffered.Load(); n != 0 {
		t.Errorf("%d bytes are still reserved", n)
	}
}

func TestCase54OverloadIsShed(t *testing.T) {
	s := start(t, model(t, small, 1), func(o *Options) { o.MaxInFlight = 2 })
	infer := s.url + "/v2/models/digits/infer"
	p := s.current.Load()
	taken := p.stall()
	var waiting sync.WaitGroup
	for range 2 {
		waiting.Go(func() {
			resp, answer := do(t, "POST", infer, one)
			if resp.StatusCode != 200 {
				t.Errorf("an admitted request: %d %s", resp.StatusCode, answer)
			}
		})
	}
	for len(s.admitted) < 2 {
		time.Sleep(time.Millisecond)
	}
	for range 20 {
		resp, answer := do(t, "POST", infer, one)
		if resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "1" || !strings.Contains(answer, "overloaded") {
			t.Errorf("%d %v %s", resp.StatusCode, resp.Header, answer)
		}
	}
	expect(t, "GET", s.url+"/v2/health/ready", "", 200, "true")
	p.resume(taken)
	waiting.Wait()
	expect(t, "POST", infer, one, 200, "label")
	if got := value(t, s, "temper_inference_refused_total", "reason", overload); got != 20 {
		t.Errorf("%v refusals were counted, want 20", got)
	}
}

// TestCase54TenTimesTheCapacity: ten clients for each request that is admitted.
// What is admitted is answered nearly as soon as without the others, the rest is
// shed at once, and when they are gone the server is as before.
func TestCase54TenTimesTheCapacity(t *testing.T) {
	const capacity = 4
	s := start(t, model(t, wong, 1), func(o *Options) { o.MaxInFlight = capacity })
	server := inferencetest.Server{URL: s.url, Model: "digits", Metrics: s.adminURL + "/metrics", Operator: http.DefaultClient, Shape: wong.Input}
	run := func(clients int) *inferencetest.Load {
		t.Helper()
		l, err := server.Load(t.Context(), clients, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d clients: %+v", clients, *l)
		return l
	}
	full := run(capacity)
	if err := run(10 * capacity).Bounded(full); err != nil {
		t.Error(err)
	}
	if after := run(1); after.Shed > 0 || after.Mean > 5*time.Second {
		t.Errorf("after the overload: %+v", *after)
	}
}

// value is that of a metric, with a label where one is named.
func value(t *testing.T, s *running, name string, label ...string) float64 {
	t.Helper()
	families, err := s.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.Metric {
			if len(label) == 0 || hasLabel(m, label[0], label[1]) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no metric %s %v", name, label)
	return 0
}

func hasLabel(m *dto.Metric, name, value string) bool {
	for _, l := range m.Label {
		if l.GetName() == name && l.GetValue() == value {
			return true
		}
	}
	return false
}

func TestCase55BadModelIsRefused(t *testing.T) {
	good := model(t, small, 1)
	s := start(t, good)
	poison := func(change func(n *nn.Network)) *Model {
		m := model(t, small, 2)
		change(m.Network)
		return m
	}
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	cases := []struct {
		name   string
		model  *Model
		err    error
		reason string
	}{
		{"unsigned", nil, &LoadError{Unverified, errors.New("no signature")}, Unverified},
		{"registry down", nil, errors.New("connection refused"), Unavailable},
		{"not a model", nil, &LoadError{Invalid, errors.New("not ONNX")}, Invalid},
		{"nothing", nil, nil, Invalid},
		{"no network", &Model{Version: "2", Digest: "sha256:2"}, nil, Invalid},
		{"hostile version", &Model{Network: good.Network, Version: "../2", Digest: "sha256:2"}, nil, Invalid},
		{"NaN weight", poison(func(n *nn.Network) { n.Flat()[0] = nan }), nil, Invalid},
		{"infinite weight", poison(func(n *nn.Network) { n.Flat()[0] = inf }), nil, Invalid},
		{"huge weight", poison(func(n *nn.Network) { n.Flat()[0] = 1e38 }), nil, Invalid},
		{"all zero", poison(func(n *nn.Network) { clear(n.Flat()) }), nil, Invalid},
		{"ignores its input", poison(func(n *nn.Network) { // no unit of the first layer is ever on
			for i := range n.Parameters[0].Data {
				n.Parameters[0].Data[i] = -1
			}
			for i := range n.Parameters[1].Data {
				n.Parameters[1].Data[i] = -1
			}
		}), nil, SelfTest},
		{"self-test of another model", &Model{Network: network(t, small, 2), Version: "2", Digest: "sha256:2", Metadata: map[string]string{"temper.selftest": `{"pixels":"AAAAAAAAAAAAAAAA","labels":[0],"logits":[9,9,9,9]}`}}, nil, SelfTest},
		{"self-test cut short", &Model{Network: network(t, small, 2), Version: "2", Digest: "sha256:2", Metadata: map[string]string{"temper.selftest": `{"pixels":"AAA`}}, nil, SelfTest},
	}
	for _, c := range cases {
		before := value(t, s, "temper_model_load_failures_total", "reason", c.reason)
		s.source.set(c.model, c.err)
		var refused *LoadError
		if err := s.Load(t.Context()); !errors.As(err, &refused) || refused.Reason != c.reason {
			t.Errorf("%s: %v, want reason %s", c.name, err, c.reason)
		}
		if got := value(t, s, "temper_model_load_failures_total", "reason", c.reason); got != before+1 {
			t.Errorf("%s: the metric went from %v to %v", c.name, before, got)
		}
		expect(t, "GET", s.url+"/v2/health/ready", "", 200, "true")
		expect(t, "POST", s.url+"/v2/models/digits/infer", one, 200, `"model_version":"1"`)
		expect(t, "POST", s.adminURL+"/v2/repository/index", "", 200, c.reason)
	}
	if value(t, s, "temper_model_ready") != 1 || value(t, s, "temper_model_info", "digest", good.Digest) != 1 {
		t.Error("the metrics lost the model in service")
	}
	s.source.set(model(t, small, 3), nil)
	expect(t, "POST", s.adminURL+"/v2/repository/models/digits/load", "", 200, "{}")
	expect(t, "POST", s.url+"/v2/models/digits/infer", one, 200, `"model_version":"3"`)
	expect(t, "POST", s.adminURL+"/v2/repository/index", "", 200, `"reason":""`)
}

// A server whose first model is refused was never ready, and ends.
func TestCase55FirstModelRefused(t *testing.T) {
	source := &waiting{answer: make(chan struct{})}
	s, err := New(Options{Name: "digits", Source: source})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(t.Context(), l, nil) }()
	url := "http://" + l.Addr().String()
	expect(t, "GET", url+"/v2/health/live", "", 200, "true")
	expect(t, "GET", url+"/v2/health/ready", "", 503, "no model in service")
	expect(t, "POST", url+"/v2/models/digits/infer", one, 503, "error")
	http.DefaultClient.CloseIdleConnections()
	close(source.answer)
	var refused *LoadError
	if err := <-ended; !errors.As(err, &refused) || refused.Reason != Unverified {
		t.Errorf("ended with %v", err)
	}
}

// waiting is a source whose model is refused, once it is told to answer.
type waiting struct{ answer chan struct{} }

func (w *waiting) Load(context.Context, string) (*Model, error) {
	<-w.answer
	return nil, &LoadError{Unverified, errors.New("no signature")}
}

func series(t *testing.T, g prometheus.Gatherer) int {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range families {
		n += len(f.Metric)
	}
	return n
}

// nowhere is a client that does not listen.
type nowhere struct{ header http.Header }

func (n *nowhere) Header() http.Header         { return n.header }
func (n *nowhere) Write(p []byte) (int, error) { return len(p), nil }
func (n *nowhere) WriteHeader(int)             {}

func TestCase56LabelSetsAreConstant(t *testing.T) {
	s := start(t, model(t, small, 1))
	h := s.Handler()
	ask := func(i int) {
		paths := []string{"/v2/models/m%d", "/v2/models/m%d/infer", "/v2/models/digits/versions/%d/infer", "/%d", "/v2/models/digits/infer/%d", "/v2/models/m%d/ready"}
		r := &http.Request{
			Method: []string{"GET", "POST", fmt.Sprintf("M%d", i)}[i/len(paths)%3],
			URL:    &url.URL{Path: fmt.Sprintf(paths[i%len(paths)], i)},
			Header: http.Header{fmt.Sprintf("X-%d", i): {"x"}, "Ce-Id": {fmt.Sprint(i)}},
			Body:   http.NoBody,
		}
		h.ServeHTTP(&nowhere{http.Header{}}, r)
	}
	for i := range 100 {
		ask(i)
	}
	before := series(t, s.metrics.registry)
	for i := range 100_000 {
		ask(i)
	}
	if after := series(t, s.metrics.registry); after != before {
		t.Errorf("%d series became %d", before, after)
	}
	// Reloading replaces the series of the model in service.
	for i := range 20 {
		s.source.set(model(t, small, uint64(i+2)), nil)
		if err := s.Load(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if after := series(t, s.metrics.registry); after != before {
		t.Errorf("%d series became %d by reloading", before, after)
	}
}

func TestCase57AdminIsNotPublic(t *testing.T) {
	s := start(t, model(t, small, 1))
	for _, path := range []string{"/metrics", "/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/profile?seconds=1", "/debug/pprof/cmdline", "/debug/vars", "/v2/repository/index", "/v2/repository/models/digits/load", "/v2/repository/models/digits/unload"} {
		for _, method := range []string{"GET", "POST"} {
			expect(t, method, s.url+path, "", 404, "error")
		}
	}
	expect(t, "GET", s.url+"/v2/health/ready", "", 200, "true") // nothing was unloaded
	for path, want := range map[string]string{"/metrics": "temper_model_ready 1", "/debug/pprof/": "heap"} {
		if resp, answer := do(t, "GET", s.adminURL+path, ""); resp.StatusCode != 200 || !strings.Contains(answer, want) {
			t.Errorf("admin %s: %d", path, resp.StatusCode)
		}
	}
	expect(t, "POST", s.adminURL+"/v2/models/digits/infer", one, 404, "error")
	if resp, _ := do(t, "GET", s.adminURL+"/debug/pprof/cmdline", ""); resp.StatusCode == 200 {
		t.Error("the command line may hold secrets")
	}
}
