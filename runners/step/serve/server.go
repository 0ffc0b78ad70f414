// Package serve serves an image classifier by the Open Inference Protocol v2,
// over HTTP and gRPC. A model goes into service only when its source verified it and
// its self-test passed; reloading swaps models without dropping a request, and
// a refused model leaves the one in service alone. The public listener has the
// protocol's health, metadata and inference endpoints and nothing else;
// metrics, profiles and the model repository are on the admin listener.
package serve

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"
	"golang.org/x/net/netutil"
)

// Limits of a listener. A client that is slower than these is cut off, so
// that half-open connections cannot pile up.
const (
	headerTimeout  = 5 * time.Second
	readTimeout    = 10 * time.Second // the whole request
	writeTimeout   = 30 * time.Second // from the end of the header to the end of the answer
	idleTimeout    = 60 * time.Second
	maxHeader      = 16 << 10
	maxConnections = 4096
)

// Limits of requests.
const (
	maxName         = 128      // characters of a model's name or version
	maxBatch        = 256      // images in a request
	maxBody         = 8 << 20  // bytes of a request; 256 MNIST images are 2 to 4 MB of JSON
	maxBuffered     = 64 << 20 // bytes of all requests being read or computed; their pixels as float32 can be eight times that
	drainTimeout    = 30 * time.Second
	loadTimeout     = 5 * time.Minute // to fetch, verify and test a model
	inFlightPerCore = 32              // requests waiting for a core or on it
)

// Options configure a server.
type Options struct {
	Name   string // of the model, in URLs
	Source Source
	Poll   time.Duration // how often to ask the source for another model; 0: only on request
	Log    *slog.Logger  // nil: discard

	Mirror         string  // URL of the sink for CloudEvents; "": none
	MirrorFraction float64 // share of requests mirrored; 0: all
	Namespace      string  // Kubernetes namespace, an attribute of mirrored events

	GRPC   net.Listener         // for the gRPC half of the protocol, which Serve closes; nil: none
	Traces trace.TracerProvider // gets a span of each request; nil: none

	MaxInFlight int           // requests admitted at once; 0: 32 for each core
	DrainDelay  time.Duration // how long to go on, not ready, before closing: until load balancers notice
}

// Server serves one model.
type Server struct {
	o        Options
	metrics  *metrics
	log      *limitedLog
	mirror   *mirror
	admitted chan struct{} // a token for each request in flight
	buffered atomic.Int64  // bytes of request bodies in memory

	loading  sync.Mutex // one load or unload at a time
	current  atomic.Pointer[predictor]
	unloaded bool // by request: polling must not load again; guarded by loading
	refusal  atomic.Pointer[string]
	draining atomic.Bool
}

// New checks the options and makes a server, without a model so far.
func New(o Options) (*Server, error) {
	switch {
	case !validName(o.Name):
		return nil, fmt.Errorf("model name %q: must be 1 to %d letters, digits, '.', '_' or '-'", o.Name, maxName)
	case o.Source == nil:
		return nil, errors.New("no source for the model")
	case o.Poll < 0 || o.DrainDelay < 0 || o.MaxInFlight < 0:
		return nil, errors.New("poll interval, drain delay and requests in flight must not be negative")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.MaxInFlight == 0 {
		o.MaxInFlight = inFlightPerCore * runtime.GOMAXPROCS(0)
	}
	if o.MirrorFraction == 0 {
		o.MirrorFraction = 1
	}
	s := &Server{o: o, metrics: newMetrics(), log: newLimitedLog(o.Log), admitted: make(chan struct{}, o.MaxInFlight)}
	if o.Mirror != "" {
		var err error
		if s.mirror, err = newMirror(o.Mirror, o.MirrorFraction, "/temper/serve/"+o.Name, o, s.metrics, s.log); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// validName keeps names and versions harmless in URLs, logs and metrics.
func validName(s string) bool {
	if len(s) < 1 || len(s) > maxName || s == "." || s == ".." {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-') {
			return false
		}
	}
	return true
}

// Load asks the source for the model that should be in service and, where it
// is another one, tests it and swaps it in. An error is a *LoadError; it leaves
// the model in service alone, unless that is revoked.
func (s *Server) Load(ctx context.Context) error {
	s.loading.Lock()
	defer s.loading.Unlock()
	s.unloaded = false
	return s.load(ctx)
}

func (s *Server) load(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	was, digest := s.current.Load(), ""
	if was != nil {
		digest = was.Digest
	}
	model, err := s.o.Source.Load(ctx, digest)
	if was != nil && (errors.Is(err, ErrUnchanged) || err == nil && model != nil && model.Digest != "" && model.Digest == digest) {
		s.metrics.checkedAt.SetToCurrentTime()
		s.refusal.Store(nil)
		return nil
	}
	var p *predictor
	if err == nil {
		s.metrics.checkedAt.SetToCurrentTime()
		p, err = newPredictor(model, s.metrics.passes)
	}
	if err != nil {
		var refused *LoadError
		if !errors.As(err, &refused) {
			refused = &LoadError{Unavailable, err}
		}
		reason := refused.Error()
		s.refusal.Store(&reason)
		s.metrics.loadFailures.WithLabelValues(refused.Reason).Inc()
		s.o.Log.Error("model not loaded", "reason", refused.Reason, "error", refused.Err.Error(), "in_service", digest)
		if refused.Reason == Revoked {
			s.withdraw()
		}
		return refused
	}
	s.current.Store(p)
	s.refusal.Store(nil)
	s.metrics.loads.Inc()
	s.metrics.ready.Set(1)
	s.metrics.loadedAt.SetToCurrentTime()
	promoted := 0.0
	if !p.Promoted.IsZero() {
		promoted = float64(p.Promoted.Unix())
	}
	s.metrics.promotedAt.Set(promoted)
	s.metrics.info.Reset()
	s.metrics.info.WithLabelValues(p.Version, p.Digest).Set(1)
	s.o.Log.Info("model in service", "model", s.o.Name, "version", p.Version, "digest", p.Digest, "before", digest)
	return nil
}

// first loads a model where there is none.
func (s *Server) first(ctx context.Context) error {
	s.loading.Lock()
	defer s.loading.Unlock()
	if s.current.Load() != nil || s.unloaded {
		return nil
	}
	return s.load(ctx)
}

// Unload takes the model out of service until Load is called.
func (s *Server) Unload() {
	s.loading.Lock()
	defer s.loading.Unlock()
	s.unloaded = true
	s.withdraw()
}

// withdraw takes the model out of service.
func (s *Server) withdraw() {
	s.current.Store(nil)
	s.metrics.ready.Set(0)
	s.metrics.promotedAt.Set(0)
	s.metrics.info.Reset()
	s.o.Log.Info("model out of service", "model", s.o.Name)
}

// Ready says whether a verified model is in service and the server is not
// about to stop.
func (s *Server) Ready() bool { return s.current.Load() != nil && !s.draining.Load() }

// Digest is that of the model in service, "" without one.
func (s *Server) Digest() string {
	if p := s.current.Load(); p != nil {
		return p.Digest
	}
	return ""
}

// Serve serves on the listeners until ctx ends, then drains: it turns not
// ready, goes on for the drain delay, and returns when the requests in flight
// are answered. Where no model was loaded before, Serve loads it, and ends
// with the error where it is refused; a channel's first promotion is waited
// for. admin may be nil. Serve closes the
// listeners, Options.GRPC among them, and can be called once.
func (s *Server) Serve(ctx context.Context, public, admin net.Listener) error {
	servers := []*http.Server{s.server(s.Handler())}
	listeners := []net.Listener{public}
	if admin != nil {
		a := s.server(s.AdminHandler())
		a.WriteTimeout = loadTimeout + writeTimeout // a load answers when it is done; a CPU profile takes 30 s
		servers, listeners = append(servers, a), append(listeners, admin)
	}
	failed := make(chan error, len(servers)+2)
	for i, hs := range servers {
		go func() { failed <- hs.Serve(netutil.LimitListener(listeners[i], maxConnections)) }()
	}
	drainGRPC := func(context.Context) error { return nil }
	if s.o.GRPC != nil {
		var serve func() error
		serve, drainGRPC = s.serveGRPC(netutil.LimitListener(s.o.GRPC, maxConnections))
		go func() { failed <- serve() }()
	}
	loading, stop := context.WithCancel(ctx)
	defer stop()
	var loader sync.WaitGroup
	loader.Go(func() {
		// Probes can already see that there is no model yet.
		if err := s.first(loading); err != nil && !s.awaitsPromotion(err) {
			failed <- err
			return
		}
		if s.o.Poll > 0 {
			s.poll(loading)
		}
	})

	var err error
	select {
	case err = <-failed:
		if ctx.Err() != nil {
			err = nil // it was told to stop before the first model was there
		}
	case <-ctx.Done():
	}
	stop()
	s.draining.Store(true)
	if err == nil && s.o.DrainDelay > 0 {
		time.Sleep(s.o.DrainDelay)
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	grpcDrained := make(chan error, 1)
	go func() { grpcDrained <- drainGRPC(drain) }()
	for _, hs := range servers {
		if e := hs.Shutdown(drain); e != nil {
			err = errors.Join(err, fmt.Errorf("requests were still open after %v: %w", drainTimeout, e))
			hs.Close()
		}
	}
	if e := <-grpcDrained; e != nil {
		err = errors.Join(err, fmt.Errorf("gRPC requests were still open after %v: %w", drainTimeout, e))
	}
	loader.Wait()
	s.mirror.close(drain)
	return err
}

// awaitsPromotion says whether a load failed because the channel that is
// followed awaits its first promotion.
func (s *Server) awaitsPromotion(err error) bool {
	_, follows := s.o.Source.(*Channel)
	return follows && s.o.Poll > 0 && NotPromoted(err)
}

func (s *Server) server(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          log.New(s.log, "", 0),
	}
}

// poll asks the source again and again. The interval is spread by a tenth, so
// that many servers do not ask at once.
func (s *Server) poll(ctx context.Context) {
	for {
		wait := time.Duration(float64(s.o.Poll) * (0.95 + 0.1*rand.Float64()))
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		s.loading.Lock()
		if !s.unloaded {
			s.load(ctx) // logs and counts its error; the next round tries again
		}
		s.loading.Unlock()
	}
}
