package serve

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/serve/inference"
	"github.com/temper-ml/temper/runners/step/serve/selftest"
)

// wong is the network of Wong et al., "Fast is better than free" (2020).
var wong = nn.Description{
	Name: "wong", Input: nn.Shape{Height: 28, Width: 28, Channels: 1},
	Layers: []nn.Layer{
		{Conv: &nn.Conv{Filters: 16, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Conv: &nn.Conv{Filters: 32, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Dense: &nn.Dense{Units: 100, ReLU: true}},
		{Dense: &nn.Dense{Units: 10}},
	},
}

// small classifies 2x2 images of 3 channels.
var small = nn.Description{
	Name: "small", Input: nn.Shape{Height: 2, Width: 2, Channels: 3},
	Layers: []nn.Layer{{Dense: &nn.Dense{Units: 8, ReLU: true}}, {Dense: &nn.Dense{Units: 4}}},
}

func network(t testing.TB, d nn.Description, seed uint64) *nn.Network {
	t.Helper()
	n, err := nn.New(d, seed)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// memory is a source that gives what it is told to.
type memory struct {
	mu    sync.Mutex
	model *Model
	err   error
}

func (m *memory) set(model *Model, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.model, m.err = model, err
}

func (m *memory) Load(context.Context, string) (*Model, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.model, m.err
}

func model(t testing.TB, d nn.Description, seed uint64) *Model {
	return &Model{Network: network(t, d, seed), Version: fmt.Sprint(seed), Digest: fmt.Sprintf("sha256:%064d", seed)}
}

// syncBuffer is a log that goroutines share.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) lines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Split(strings.TrimSuffix(s.b.String(), "\n"), "\n")
}

type running struct {
	*Server
	source        *memory
	url, adminURL string
	log           *syncBuffer
	stop          func() error // stops the server and waits for it
}

// start serves the model, on loopback, until the test ends.
func start(t testing.TB, m *Model, change ...func(*Options)) *running {
	t.Helper()
	r := &running{source: &memory{model: m}, log: &syncBuffer{}}
	o := Options{Name: "digits", Source: r.source, Log: slog.New(slog.NewJSONHandler(r.log, nil))}
	for _, c := range change {
		c(&o)
	}
	var err error
	if r.Server, err = New(o); err != nil {
		t.Fatal(err)
	}
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	public, admin := listen(), listen()
	r.url, r.adminURL = "http://"+public.Addr().String(), "http://"+admin.Addr().String()
	if err := r.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Serve(ctx, public, admin) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// do sends a request and returns its answer.
func do(t testing.TB, method, url, body string, headers ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(answer)
}

func expect(t testing.TB, method, url, body string, code int, want string) {
	t.Helper()
	resp, answer := do(t, method, url, body)
	if resp.StatusCode != code || !strings.Contains(answer, want) {
		t.Errorf("%s %s: %d %s, want %d %s", method, url, resp.StatusCode, answer, code, want)
	}
	if resp.Header.Get("Content-Type") != "application/json" || !json.Valid([]byte(answer)) {
		t.Errorf("%s %s: not JSON: %q %s", method, url, resp.Header.Get("Content-Type"), answer)
	}
}

const one = `{"id":"a7","parameters":{"who":"me"},"inputs":[{"name":"input","shape":[1,3,2,2],"datatype":"UINT8","data":[0,1,2,3,4,5,6,7,8,9,10,255]}]}`

func TestProtocol(t *testing.T) {
	s := start(t, model(t, small, 1))
	for _, path := range []string{"/v2", "/v2/"} {
		expect(t, "GET", s.url+path, "", 200, `"extensions":["binary_tensor_data"]`)
		expect(t, "GET", s.adminURL+path, "", 200, `"extensions":["model_repository"]`)
	}
	for _, path := range []string{"/v2/health/live", "/v2/health/ready"} {
		expect(t, "GET", s.url+path, "", 200, "true")
	}
	for _, at := range []string{"/v2/models/digits", "/v2/models/digits/versions/1"} {
		expect(t, "GET", s.url+at, "", 200, `"inputs":[{"name":"input","datatype":"FP32","shape":[-1,3,2,2]}],"outputs":[{"name":"probabilities","datatype":"FP32","shape":[-1,4]},{"name":"label","datatype":"INT64","shape":[-1]}]`)
		expect(t, "GET", s.url+at+"/ready", "", 200, `{"name":"digits","ready":true}`)
		expect(t, "POST", s.url+at+"/infer", one, 200, `"model_name":"digits","model_version":"1","id":"a7","parameters":{"who":"me"}`)
	}
	for _, at := range []string{"/v2/models/other", "/v2/models/digits/versions/2"} {
		expect(t, "GET", s.url+at, "", 404, "error")
		expect(t, "GET", s.url+at+"/ready", "", 404, "error")
		expect(t, "POST", s.url+at+"/infer", one, 404, "error")
	}
	for _, path := range []string{"/", "/v1/models/digits", "/v2/models/digits/infer", "/v2/models", "/v2/models/digits/versions"} {
		expect(t, "GET", s.url+path, "", 404, "error")
	}
	expect(t, "DELETE", s.url+"/v2/models/digits", "", 404, "error")
}

// logits is the reference: one forward pass over pixels in nn's order.
func logits(t testing.TB, n *nn.Network, x []float32) []float32 {
	t.Helper()
	f, err := nn.NewForward(n, len(x)/n.Input.Size())
	if err != nil {
		t.Fatal(err)
	}
	return f.Logits(x, f.Batch())
}

func TestPredictionsAreTheNetworks(t *testing.T) {
	for _, d := range []nn.Description{small, wong} {
		m := model(t, d, 1)
		s := start(t, m)
		const n = chunk + 5 // more than one pass
		x := make([]float32, n*d.Input.Size())
		for i := range x {
			x[i] = rand.Float32()
		}
		want := logits(t, m.Network, x)
		for _, binary := range []bool{false, true} {
			c := inference.Client{URL: s.url, Model: "digits", Binary: binary}
			a, err := c.Predict(t.Context(), x, n, d.Input)
			if err != nil {
				t.Fatal(err)
			}
			classes := m.Network.Classes()
			for i := range n {
				row, sum := want[i*classes:][:classes], 0.0
				for _, v := range row {
					sum += math.Exp(float64(v))
				}
				for j, v := range row {
					if p := math.Exp(float64(v)) / sum; math.Abs(p-float64(a.Probabilities[i*classes+j])) > 1e-6 {
						t.Fatalf("image %d class %d: %v, want %v", i, j, a.Probabilities[i*classes+j], p)
					}
					if v > row[a.Labels[i]] {
						t.Fatalf("image %d: label %d, but %d is likelier", i, a.Labels[i], j)
					}
				}
			}
		}
	}
}

func TestRequestedOutputs(t *testing.T) {
	s := start(t, model(t, small, 1))
	infer := s.url + "/v2/models/digits/infer"
	with := func(outputs string) string { return strings.TrimSuffix(one, "}") + `,"outputs":` + outputs + "}" }
	_, answer := do(t, "POST", infer, with(`[{"name":"label"}]`))
	if a, err := inference.ParseAnswer([]byte(answer)); err != nil || len(a.Labels) != 1 || a.Probabilities != nil {
		t.Errorf("%s: %v", answer, err)
	}
	expect(t, "POST", infer, with(`[{"name":"logits"}]`), 400, "unknown output")
	expect(t, "POST", infer, with(`[{"name":"label"},{"name":"label"}]`), 400, "twice")

	resp, answer := do(t, "POST", infer, with(`[{"name":"label","parameters":{"binary_data":true}}]`))
	var length int
	if _, err := fmt.Sscan(resp.Header.Get(inference.HeaderLength), &length); err != nil || len(answer) != length+8 || resp.Header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("%v %v: %q", resp.Header, err, answer)
	}
	if !json.Valid([]byte(answer[:length])) || !strings.Contains(answer[:length], `"binary_data_size":8`) {
		t.Errorf("%q", answer[:length])
	}
}

func TestRepository(t *testing.T) {
	s := start(t, model(t, small, 1))
	s.Unload()
	index, load := s.adminURL+"/v2/repository/index", s.adminURL+"/v2/repository/models/digits/load"
	unload := s.adminURL + "/v2/repository/models/digits/unload"

	s.source.set(nil, errors.New("connection refused"))
	expect(t, "GET", s.url+"/v2/health/ready", "", 503, "error")
	expect(t, "GET", s.url+"/v2/health/live", "", 200, "true")
	expect(t, "POST", load, "", 503, "connection refused")
	expect(t, "POST", index, "", 200, `[{"name":"digits","state":"UNAVAILABLE","reason":"unavailable model: connection refused"}]`)
	expect(t, "POST", index, `{"ready":true}`, 200, `[]`)
	resp, answer := do(t, "POST", s.url+"/v2/models/digits/infer", one)
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || strings.Contains(answer, "connection refused") {
		t.Errorf("%d %v %s", resp.StatusCode, resp.Header, answer)
	}

	s.source.set(model(t, small, 1), nil)
	expect(t, "POST", load, "", 200, "{}")
	expect(t, "POST", index, `{"ready":true}`, 200, `[{"name":"digits","version":"1","state":"READY","reason":""}]`)
	expect(t, "POST", s.url+"/v2/models/digits/infer", one, 200, "label")
	expect(t, "POST", unload, "", 200, "{}")
	expect(t, "POST", s.url+"/v2/models/digits/infer", one, 503, "error")
	expect(t, "GET", s.url+"/v2/health/ready", "", 503, "error")
	expect(t, "POST", load, `{}`, 200, "{}")
	expect(t, "GET", s.url+"/v2/health/ready", "", 200, "true")

	expect(t, "POST", load, `{"parameters":{"config":"{}"}}`, 400, "not supported")
	expect(t, "POST", load, `{`, 400, "error")
	expect(t, "POST", load, strings.Repeat(" ", maxRepositoryBody+1), 413, "error")
	expect(t, "POST", strings.Replace(load, "digits", "other", 1), "", 404, "unknown model")
	expect(t, "POST", strings.Replace(unload, "digits", "other", 1), "", 404, "unknown model")
}

// TestReloadDropsNothing swaps models under load: every request is answered,
// by one of the models as a whole.
func TestReloadDropsNothing(t *testing.T) {
	models := []*Model{model(t, small, 1), model(t, small, 2), model(t, small, 3)}
	x := make([]float32, small.Input.Size())
	for i := range x {
		x[i] = float32(i) / 12
	}
	want := map[string]float64{} // by version: the probability of class 0
	for _, m := range models {
		l := logits(t, m.Network, x)
		sum := 0.0
		for _, v := range l {
			sum += math.Exp(float64(v))
		}
		want[m.Version] = math.Exp(float64(l[0])) / sum
	}
	s := start(t, models[0], func(o *Options) { o.Poll = 2 * time.Millisecond })

	ctx, cancel := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var answered atomic.Int64
	seen := sync.Map{}
	transport := &http.Transport{MaxIdleConnsPerHost: 8}
	defer transport.CloseIdleConnections()
	for range 8 {
		clients.Go(func() {
			c := inference.Client{URL: s.url, Model: "digits", HTTP: &http.Client{Transport: transport}}
			for ctx.Err() == nil {
				a, err := c.Predict(context.Background(), x, 1, small.Input)
				if err != nil {
					t.Error(err)
					return
				}
				if math.Abs(float64(a.Probabilities[0])-want[a.Version]) > 1e-6 {
					t.Errorf("version %s answered %v, want %v: two models were mixed", a.Version, a.Probabilities[0], want[a.Version])
				}
				seen.Store(a.Version, true)
				answered.Add(1)
			}
		})
	}
	for i := range 150 {
		s.source.set(models[i%3], nil)
		if i%2 == 0 {
			if err := s.Load(t.Context()); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(3 * time.Millisecond)
	}
	cancel()
	clients.Wait()
	for v := range want {
		if _, ok := seen.Load(v); !ok {
			t.Errorf("version %s never answered: the test shows nothing", v)
		}
	}
	t.Logf("%d answers", answered.Load())
}

func TestDrain(t *testing.T) {
	s := start(t, model(t, small, 1), func(o *Options) { o.DrainDelay = 2 * time.Second })
	// A request whose body is still coming in when the server is told to stop.
	reader, writer := io.Pipe()
	answered := make(chan error, 1)
	go func() {
		resp, err := http.Post(s.url+"/v2/models/digits/infer", "application/json", reader)
		if err == nil {
			defer resp.Body.Close()
			if resp.StatusCode != 200 {
				err = errors.New(resp.Status)
			}
		}
		answered <- err
	}()
	io.WriteString(writer, one[:20])
	// A connection that is idle when it stops, and then is not.
	idle, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	answers := bufio.NewReader(idle)
	ask := func() (closes bool) {
		t.Helper()
		fmt.Fprint(idle, "GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
		answer, err := http.ReadResponse(answers, nil)
		if err != nil || answer.StatusCode != 200 {
			t.Fatalf("%v, %v", answer, err)
		}
		if _, err := io.Copy(io.Discard, answer.Body); err != nil {
			t.Fatal(err)
		}
		return answer.Close
	}
	if ask() {
		t.Error("the connection is closed while nothing stops")
	}
	stopped := make(chan error, 1)
	go func() { stopped <- s.stop() }()
	for s.Ready() {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(50 * time.Millisecond) // what would close it, has
	if !ask() {
		t.Error("the client is not told to connect elsewhere")
	}
	expect(t, "GET", s.url+"/v2/health/ready", "", 503, "about to stop")
	expect(t, "POST", s.url+"/v2/models/digits/infer", one, 200, "label") // load balancers have not noticed yet
	for {                                                                 // until the listener is closed
		c, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			break
		}
		c.Close()
		time.Sleep(10 * time.Millisecond)
	}
	select {
	case err := <-stopped:
		t.Fatalf("stopped before the request in flight was answered: %v", err)
	default:
	}
	io.WriteString(writer, one[20:])
	writer.Close()
	if err := <-answered; err != nil {
		t.Error(err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []Options{
		{},
		{Name: "a/b", Source: &memory{}},
		{Name: "a"},
		{Name: "a", Source: &memory{}, Mirror: "sentinel:8080"},
		{Name: "a", Source: &memory{}, Mirror: "file:///etc/passwd"},
		{Name: "a", Source: &memory{}, Mirror: "http://sentinel", MirrorFraction: math.NaN()},
		{Name: "a", Source: &memory{}, Poll: -1},
	} {
		if s, err := New(o); err == nil {
			t.Errorf("%+v: accepted", o)
			s.mirror.close(t.Context())
		}
	}
}

func TestPanicIsOneAnswer(t *testing.T) {
	s, err := New(Options{Name: "digits", Source: &memory{}})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	s.handle(mux, "/", "other", func(http.ResponseWriter, *http.Request) error { panic("bug") })
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if w.Code != 500 || strings.Contains(w.Body.String(), "bug") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// The self-test that training writes into a model is what serving runs.
func TestSelfTestVector(t *testing.T) {
	m := model(t, small, 1)
	pixels := make([]byte, 5*small.Input.Size())
	for i := range pixels {
		pixels[i] = byte(rand.Int())
	}
	text, err := selftest.Vector(m.Network, pixels, []uint8{0, 1, 0, 1, 0})
	if err != nil {
		t.Fatal(err)
	}
	m.Metadata = map[string]string{selftest.MetadataKey: text}
	if _, err := newPredictor(m, newMetrics().passes); err != nil {
		t.Fatal(err)
	}
	m.Network.Parameters[0].Data[3] += 0.5
	var refused *LoadError
	if _, err := newPredictor(m, newMetrics().passes); !errors.As(err, &refused) || refused.Reason != SelfTest {
		t.Errorf("a changed weight passed the self-test: %v", err)
	}
}
