package sentinel

import (
	"embed"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"path"
	"time"
)

//go:embed page
var pageFiles embed.FS

// page serves a file of the page, which holds no data.
func page(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeFileFS(w, r, pageFiles, path.Join("page", name))
	})
}

// Handler serves
//
//	POST /              a CloudEvent: a mirrored inference request or response
//	POST /v2/feedback   a label: {"id": ..., "index": 0, "label": ..., "source": ...}
//	GET /               the page, with its parts under /page/
//	GET /status         how things stand, as JSON
//	GET /evidence       the last flagged requests; /evidence/N/{original,squeezed}.png shows one
//	GET /healthz        200 while the process runs
//	GET /readyz         200 while a model is watched
//	GET /metrics        for Prometheus
//
// Errors are {"error": "..."}. An event is answered when it has been counted.
func (s *Sentinel) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /{$}", s.serveEvent)
	mux.HandleFunc("POST /v2/feedback", s.serveFeedback)
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		if err := e.Encode(s.Status()); err != nil {
			s.log.Debug("status not sent", "error", err) // the client is gone
		}
	})
	mux.Handle("GET /{$}", page("index.html"))
	mux.Handle("GET /page/page.css", page("page.css"))
	mux.Handle("GET /page/page.js", page("page.js"))
	mux.HandleFunc("GET /evidence", s.serveEvidence)
	mux.HandleFunc("GET /evidence/{request}/{form}", s.serveImage)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if s.Status().Model == "" {
			refuse(w, http.StatusServiceUnavailable, ErrNoModel)
			return
		}
		io.WriteString(w, "ok\n")
	})
	mux.Handle("GET /metrics", s.metrics.handler)
	return guarded(mux)
}

// guarded tells browsers that what comes from here runs no script but the
// page's own, loads nothing from elsewhere, and is shown in no frame: class
// names, versions and errors come from outside.
func guarded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Referrer-Policy", "no-referrer")
		h.ServeHTTP(w, r)
	})
}

// Admin serves
//
//	POST /approve   closes the circuit: further defences may start
//
// It belongs on a port of its own that only people reach. A browser sends the
// header that it asks for from no other page than the sentinel's.
func (s *Sentinel) Admin() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /approve", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(approveHeader) == "" {
			refuse(w, http.StatusForbidden, errors.New("send the header "+approveHeader+": 'temper sentinel approve' does"))
			return
		}
		s.Approve()
		w.WriteHeader(http.StatusNoContent)
	})
	return guarded(mux)
}

const approveHeader = "X-Temper-Approve"

func (s *Sentinel) serveEvent(w http.ResponseWriter, r *http.Request) {
	if !s.enter(r) {
		s.metrics.events.WithLabelValues("overload").Inc()
		refuse(w, http.StatusServiceUnavailable, errors.New("busy: try again later"))
		return
	}
	defer func() { <-s.busy }()
	var m *message
	body, err := limited(w, r, maxBody)
	if err == nil {
		r.Body = body
		if m, err = readMessage(r); err == nil {
			err = s.take(m)
		}
	}
	var large *http.MaxBytesError
	switch {
	case err == nil:
		s.metrics.events.WithLabelValues("accepted").Inc()
	case errors.Is(err, errDuplicate):
		s.metrics.events.WithLabelValues("duplicate").Inc()
	case errors.Is(err, ErrNoModel):
		s.metrics.events.WithLabelValues("no_model").Inc()
		refuse(w, http.StatusServiceUnavailable, err)
		return
	default:
		status := http.StatusBadRequest
		switch {
		case errors.As(err, &large):
			status = http.StatusRequestEntityTooLarge
		case errors.Is(err, errEncoding):
			status = http.StatusUnsupportedMediaType
		}
		s.metrics.events.WithLabelValues("malformed").Inc()
		s.log.Warn("event refused", "status", status, "error", err)
		refuse(w, status, err)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

// enter waits for its turn to be one of maxBusy, before the body is read.
func (s *Sentinel) enter(r *http.Request) bool {
	select {
	case s.queue <- struct{}{}:
		defer func() { <-s.queue }()
	default:
		return false
	}
	wait := time.NewTimer(maxTurn)
	defer wait.Stop()
	select {
	case s.busy <- struct{}{}:
		return true
	case <-wait.C:
	case <-r.Context().Done():
	}
	return false
}

func (s *Sentinel) serveFeedback(w http.ResponseWriter, r *http.Request) {
	var f Feedback
	body, err := limited(w, r, maxFeedback)
	if err == nil {
		var data []byte
		if data, err = io.ReadAll(body); err == nil {
			if f, err = parseFeedback(data); err == nil {
				err = s.Feedback(f)
			}
		}
	}
	var large *http.MaxBytesError
	status, result := http.StatusBadRequest, "malformed"
	switch {
	case err == nil:
		status, result = http.StatusAccepted, "accepted"
	case errors.As(err, &large):
		status = http.StatusRequestEntityTooLarge
	case errors.Is(err, errEncoding):
		status = http.StatusUnsupportedMediaType
	case errors.Is(err, errUnknown):
		status, result = http.StatusNotFound, "unknown"
	case errors.Is(err, errReplaced):
		status, result = http.StatusConflict, "other_version"
	case errors.Is(err, errLabelled):
		status, result = http.StatusConflict, "duplicate"
	case errors.Is(err, errBanned):
		status, result = http.StatusForbidden, "quarantined"
	case errors.Is(err, errTooMany):
		status, result = http.StatusTooManyRequests, "limited"
	case errors.Is(err, ErrNoModel):
		status, result = http.StatusServiceUnavailable, "no_model"
	}
	s.metrics.labels.WithLabelValues(result).Inc()
	if err == nil {
		w.WriteHeader(status)
		return
	}
	if result == "malformed" {
		s.log.Warn("feedback refused", "status", status, "error", err)
	}
	refuse(w, status, err)
}

var errEncoding = errors.New("send the body without Content-Encoding")

// limited returns a request's body that fails after max bytes.
func limited(w http.ResponseWriter, r *http.Request, max int64) (io.ReadCloser, error) {
	if e := r.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return nil, errEncoding
	}
	if r.ContentLength > max {
		return nil, &http.MaxBytesError{Limit: max}
	}
	return http.MaxBytesReader(w, r.Body, max), nil
}

func refuse(w http.ResponseWriter, status int, err error) {
	if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "1")
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]string{"error": err.Error()})
}
