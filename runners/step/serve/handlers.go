package serve

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/serve/inference"
)

// serverName is what GET /v2 answers.
const serverName = "temper-serve"

// Handler is the public side: health, metadata and inference.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	s.handleHealth(mux)
	s.handleMetadata(mux, "binary_tensor_data")
	for _, version := range []string{"", "/versions/{version}"} {
		model := "/v2/models/{model}" + version
		s.handle(mux, "GET "+model, "model", s.modelMetadata)
		s.handle(mux, "GET "+model+"/ready", "model_ready", s.modelReady)
		s.handle(mux, "POST "+model+"/infer", "infer", s.infer)
	}
	s.handle(mux, "/", "other", notFound)
	return s.traced(mux)
}

// AdminHandler is the side for operators: health, metrics, profiles and the
// model repository extension. Whoever reaches it can take the model out of
// service, so it must not be exposed.
func (s *Server) AdminHandler() http.Handler {
	mux := http.NewServeMux()
	s.handleHealth(mux)
	s.handleMetadata(mux, "model_repository")
	s.handle(mux, "POST /v2/repository/index", "repository_index", s.repositoryIndex)
	s.handle(mux, "POST /v2/repository/models/{model}/load", "repository_load", s.repositoryLoad)
	s.handle(mux, "POST /v2/repository/models/{model}/unload", "repository_unload", s.repositoryUnload)
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	s.handle(mux, "/", "other", notFound)
	return mux
}

func (s *Server) handleHealth(mux *http.ServeMux) {
	s.handle(mux, "GET /v2/health/live", "live", func(w http.ResponseWriter, r *http.Request) error {
		return writeJSON(w, map[string]bool{"live": true})
	})
	s.handle(mux, "GET /v2/health/ready", "ready", func(w http.ResponseWriter, r *http.Request) error {
		if !s.Ready() {
			return &refusal{http.StatusServiceUnavailable, notReady, errors.New(s.notReadyReason())}
		}
		return writeJSON(w, map[string]bool{"ready": true})
	})
}

func (s *Server) notReadyReason() string {
	if s.draining.Load() {
		return "the server is about to stop"
	}
	if why := s.refusal.Load(); why != nil {
		return "no model in service: the last load failed (see the server's log)" // the reason may name what only operators should see
	}
	return "no model in service"
}

// refusal is an answer other than 200.
type refusal struct {
	code   int
	reason string // of temper_inference_refused_total
	err    error
}

func (r *refusal) Error() string { return r.err.Error() }

func bad(err error) error { return &refusal{http.StatusBadRequest, badRequest, err} }

// handle registers a handler: its error becomes the protocol's {"error": ...},
// and one log line where the client or the server is at fault.
func (s *Server) handle(mux *http.ServeMux, pattern, route string, h func(http.ResponseWriter, *http.Request) error) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if cause := recover(); cause != nil {
				if cause == http.ErrAbortHandler {
					panic(cause)
				}
				// One request must not stop the service for all others.
				s.o.Log.Error("panic in a handler", "cause", fmt.Sprint(cause), "stack", string(debug.Stack()))
				s.refuse(w, r, route, &refusal{http.StatusInternalServerError, internal, errors.New("internal error")})
			}
		}()
		if s.draining.Load() {
			// The client connects again, elsewhere. To close its connection while it is
			// idle could meet its next request.
			w.Header().Set("Connection", "close")
		}
		err := h(w, r)
		if err == nil {
			s.metrics.request(route, http.StatusOK)
			return
		}
		var no *refusal
		if !errors.As(err, &no) {
			no = &refusal{http.StatusInternalServerError, internal, err}
		}
		s.refuse(w, r, route, no)
	})
}

func (s *Server) refuse(w http.ResponseWriter, r *http.Request, route string, no *refusal) {
	s.metrics.request(route, no.code)
	if route == "infer" {
		s.metrics.refused.WithLabelValues(no.reason).Inc()
	}
	if route != "ready" && route != "model_ready" { // probes ask every second
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		s.log.warn("request refused", slog.Int("status", no.code), slog.String("reason", no.reason), slog.String("error", cut(no.Error())),
			slog.String("method", cut(r.Method)), slog.String("path", cut(r.URL.Path)), slog.String("client", host))
	}
	if no.code == http.StatusTooManyRequests || no.code == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	body, err := json.Marshal(map[string]string{"error": no.Error()})
	if err != nil {
		panic("serve: an error that JSON cannot hold: " + err.Error()) // json.Marshal takes every string
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(no.code)
	w.Write(body)
}

func writeJSON(w http.ResponseWriter, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(body) // an error is the client's: nothing is left to tell it
	return nil
}

func notFound(w http.ResponseWriter, r *http.Request) error {
	return &refusal{http.StatusNotFound, badRequest, errors.New("no such endpoint or method: see GET /v2 and the Open Inference Protocol v2")}
}

// handleMetadata answers GET /v2 with the extensions of the protocol that the
// same listener has.
func (s *Server) handleMetadata(mux *http.ServeMux, extensions ...string) {
	answer := func(w http.ResponseWriter, r *http.Request) error {
		return writeJSON(w, struct {
			Name       string   `json:"name"`
			Version    string   `json:"version"`
			Extensions []string `json:"extensions"`
		}{serverName, version(), extensions})
	}
	s.handle(mux, "GET /v2/{$}", "server", answer)
	s.handle(mux, "GET /v2", "server", answer)
}

// version is that of the module, as Go recorded it in the binary.
var version = sync.OnceValue(func() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
})

// find returns the model in service that a request names; version may be "".
func (s *Server) find(model, version string) (*predictor, error) {
	if model != s.o.Name {
		return nil, &refusal{http.StatusNotFound, noSuchModel, fmt.Errorf("unknown model: this server has %q", s.o.Name)}
	}
	p := s.current.Load()
	if p == nil {
		return nil, &refusal{http.StatusServiceUnavailable, notReady, errors.New(s.notReadyReason())}
	}
	if version != "" && version != p.Version {
		return nil, &refusal{http.StatusNotFound, noSuchModel, fmt.Errorf("unknown version: version %q of model %q is in service", p.Version, s.o.Name)}
	}
	return p, nil
}

// tensor describes an input or output of the model.
type tensor struct {
	Name     string  `json:"name"`
	Datatype string  `json:"datatype"`
	Shape    []int64 `json:"shape"`
}

// description is of the model in service.
type description struct {
	Name     string   `json:"name"`
	Versions []string `json:"versions"`
	Platform string   `json:"platform"`
	Inputs   []tensor `json:"inputs"`
	Outputs  []tensor `json:"outputs"`
	// Parameters is only in the protocol's gRPC half, as properties; KServe's
	// servers have it over HTTP too.
	Parameters map[string]string `json:"parameters"`
}

func (s *Server) describe(model, version string) (*description, error) {
	p, err := s.find(model, version)
	if err != nil {
		return nil, err
	}
	in, classes := p.Network.Input, p.Network.Classes()
	return &description{
		Name: s.o.Name, Versions: []string{p.Version}, Platform: "onnx_temper",
		Inputs:     []tensor{{inference.Input, "FP32", []int64{-1, int64(in.Channels), int64(in.Height), int64(in.Width)}}},
		Outputs:    []tensor{{inference.Probabilities, "FP32", []int64{-1, int64(classes)}}, {inference.Label, "INT64", []int64{-1}}},
		Parameters: map[string]string{"digest": p.Digest},
	}, nil
}

func (s *Server) modelMetadata(w http.ResponseWriter, r *http.Request) error {
	m, err := s.describe(r.PathValue("model"), r.PathValue("version"))
	if err != nil {
		return err
	}
	return writeJSON(w, m)
}

// checkReady fails where the model does not answer, or is about to stop.
func (s *Server) checkReady(model, version string) error {
	if _, err := s.find(model, version); err != nil {
		return err
	}
	if s.draining.Load() {
		return &refusal{http.StatusServiceUnavailable, notReady, errors.New(s.notReadyReason())}
	}
	return nil
}

func (s *Server) modelReady(w http.ResponseWriter, r *http.Request) error {
	if err := s.checkReady(r.PathValue("model"), r.PathValue("version")); err != nil {
		return err
	}
	return writeJSON(w, struct {
		Name  string `json:"name"`
		Ready bool   `json:"ready"`
	}{s.o.Name, true})
}

// job is the memory of one inference request, used again by the next.
type job struct {
	body     []byte
	request  inference.Request
	shape    nn.Shape // of an image
	rows     rows
	response []byte
}

var jobs = sync.Pool{New: func() any { return &job{rows: rows{turn: make(chan *pass, 1)}} }}

// maxKept is the largest request, in bytes, whose memory is kept for the next
// one: a batch of 256 must not leave megabytes behind in every slot of the
// pool.
const maxKept = 256 << 10

// free gives the memory to the next request.
func (j *job) free() {
	if cap(j.body)+4*cap(j.rows.pixels) <= maxKept {
		jobs.Put(j)
	}
}

var bothOutputs = []inference.Output{{Name: inference.Probabilities}, {Name: inference.Label}}

// classify admits a request, reads it into j by parse and answers it. It is
// the one way to the model, whatever protocol a request came by.
func (s *Server) classify(ctx context.Context, j *job, model, version string, parse func(maxValues int) error) (inference.Answer, []inference.Output, error) {
	var answer inference.Answer
	select {
	case s.admitted <- struct{}{}:
	default:
		return answer, nil, s.overloaded()
	}
	s.metrics.inFlight.Inc()
	defer func() {
		<-s.admitted
		s.metrics.inFlight.Dec()
	}()
	start := time.Now()

	// The model may have changed while the body came in. From here on the
	// request belongs to this one, whatever is swapped in meanwhile.
	p, err := s.find(model, version)
	if err != nil {
		return answer, nil, err
	}
	shape, classes := p.Network.Input, p.Network.Classes()
	if err := parse(maxBatch * shape.Size()); err != nil {
		return answer, nil, bad(err)
	}
	j.shape = shape
	r := &j.rows
	if r.pixels, r.n, err = j.request.Images(r.pixels, shape, maxBatch); err != nil {
		return answer, nil, bad(err)
	}
	outputs, err := requested(&j.request)
	if err != nil {
		return answer, nil, bad(err)
	}
	r.probabilities = slices.Grow(r.probabilities[:0], r.n*classes)[:r.n*classes]
	r.labels = slices.Grow(r.labels[:0], r.n)[:r.n]
	switch err := p.predict(ctx, r); {
	case ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return answer, nil, &refusal{http.StatusRequestTimeout, slowClient, errors.New("the client went away")}
	case err != nil:
		return answer, nil, err
	}
	s.metrics.examples.Add(float64(r.n))
	s.metrics.duration.Observe(time.Since(start).Seconds())
	return inference.Answer{
		Model: s.o.Name, Version: p.Version, ID: j.request.ID, Parameters: j.request.Parameters,
		Probabilities: r.probabilities, Labels: r.labels, Classes: classes,
	}, outputs, nil
}

func (s *Server) overloaded() error {
	return &refusal{http.StatusTooManyRequests, overload, fmt.Errorf("overloaded: %d requests are in flight", cap(s.admitted))}
}

func (s *Server) infer(w http.ResponseWriter, r *http.Request) error {
	j := jobs.Get().(*job)
	defer j.free()
	model, version := r.PathValue("model"), r.PathValue("version")
	if _, err := s.find(model, version); err != nil {
		return err
	}
	headerLength, err := checkHeaders(r)
	if err != nil {
		return err
	}
	if len(s.admitted) == cap(s.admitted) { // before its body costs as much as its answer
		return s.overloaded()
	}
	release, err := s.read(j, w, r)
	defer release()
	if err != nil {
		return err
	}
	answer, outputs, err := s.classify(r.Context(), j, model, version, func(maxValues int) error {
		return j.request.Parse(j.body, headerLength, maxValues)
	})
	if err != nil {
		return err
	}

	id := newID()
	if answer.ID == "" {
		answer.ID = id
	}
	var binaryHeader int
	j.response, binaryHeader = answer.Append(j.response[:0], outputs)
	request, response := payload{j.body, headerLength}, payload{j.response, binaryHeader}
	if s.mirror.sample() {
		s.mirror.add(id, request, response)
	}

	h := w.Header()
	h["Content-Type"] = []string{response.contentType()}
	h["Content-Length"] = []string{strconv.Itoa(len(j.response))}
	h["X-Request-Id"] = []string{id}
	if binaryHeader >= 0 {
		h.Set(inference.HeaderLength, strconv.Itoa(binaryHeader))
	}
	w.Write(j.response) // an error is the client's: nothing is left to tell it
	return nil
}

// newID makes the id of a request: the X-Request-Id of its answer, the Ce-Id
// of its mirrored events, and the name under which feedback gives its label.
func newID() string {
	var b [16]byte
	binary.NativeEndian.PutUint64(b[:8], rand.Uint64())
	binary.NativeEndian.PutUint64(b[8:], rand.Uint64())
	return hex.EncodeToString(b[:])
}

func checkHeaders(r *http.Request) (headerLength int, err error) {
	// Nothing is decompressed: an image is smaller than the trouble.
	if e := r.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return 0, &refusal{http.StatusUnsupportedMediaType, encoding, fmt.Errorf("content encoding %q: send the body as it is", cut(e))}
	}
	text := r.Header.Get(inference.HeaderLength)
	if text == "" {
		return -1, nil
	}
	headerLength, err = strconv.Atoi(text)
	if err != nil || headerLength < 1 || headerLength > maxBody {
		return 0, bad(fmt.Errorf("%s %q: must be the length of the JSON in bytes", inference.HeaderLength, cut(text)))
	}
	return headerLength, nil
}

// firstRead is how much is read before the size of a body is known to be
// honest: a JSON request for one MNIST image.
const firstRead = 16 << 10

// read reads the request's body into j. It reserves memory as bytes arrive,
// not as a header promises them, so that the memory of all requests together
// is bounded by maxBuffered; release gives the reservation back and is never
// nil.
func (s *Server) read(j *job, w http.ResponseWriter, r *http.Request) (release func(), err error) {
	var reserved int64
	release = func() { s.buffered.Add(-reserved) }
	tooLargeError := &refusal{http.StatusRequestEntityTooLarge, tooLarge, fmt.Errorf("the body is larger than %d bytes", maxBody)}
	if r.ContentLength > maxBody {
		w.Header().Set("Connection", "close") // rather than read it all
		return release, tooLargeError
	}
	body := http.MaxBytesReader(w, r.Body, maxBody)
	j.body = j.body[:0]
	size := firstRead
	for {
		size = min(size, maxBody+1)
		if more := int64(size - len(j.body)); s.buffered.Add(more) > maxBuffered {
			s.buffered.Add(-more)
			return release, &refusal{http.StatusTooManyRequests, overload, errors.New("overloaded: too many large requests at once")}
		} else {
			reserved += more
		}
		j.body = slices.Grow(j.body, size-len(j.body))
		for len(j.body) < size {
			n, err := body.Read(j.body[len(j.body):size])
			j.body = j.body[:len(j.body)+n]
			var limit *http.MaxBytesError
			switch {
			case err == io.EOF:
				return release, nil
			case errors.As(err, &limit):
				return release, tooLargeError
			case errors.Is(err, os.ErrDeadlineExceeded):
				return release, &refusal{http.StatusRequestTimeout, slowClient, fmt.Errorf("the request took longer than %v", readTimeout)}
			case err != nil:
				return release, &refusal{http.StatusBadRequest, slowClient, fmt.Errorf("reading the body: %w", err)}
			}
		}
		size *= 2
	}
}

// requested returns the outputs that the request asks for, both by default.
func requested(r *inference.Request) ([]inference.Output, error) {
	if len(r.Outputs) == 0 {
		if r.BinaryOutput {
			return []inference.Output{{Name: inference.Probabilities, Binary: true}, {Name: inference.Label, Binary: true}}, nil
		}
		return bothOutputs, nil
	}
	for i, o := range r.Outputs {
		if o.Name != inference.Probabilities && o.Name != inference.Label {
			return nil, fmt.Errorf("unknown output %q: the model has %q and %q", o.Name, inference.Probabilities, inference.Label)
		}
		for _, earlier := range r.Outputs[:i] {
			if earlier.Name == o.Name {
				return nil, fmt.Errorf("output %q twice", o.Name)
			}
		}
	}
	return r.Outputs, nil
}
