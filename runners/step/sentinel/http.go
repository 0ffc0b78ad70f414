package sentinel

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"time"
)

// Handler serves
//
//	POST /              a CloudEvent: a mirrored inference request or response
//	POST /v2/feedback   a label: {"id": ..., "index": 0, "label": ..., "source": ...}
//	GET /status         how things stand, as JSON
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
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if s.Status().Model == "" {
			refuse(w, http.StatusServiceUnavailable, ErrNoModel)
			return
		}
		io.WriteString(w, "ok\n")
	})
	mux.Handle("GET /metrics", s.metrics.handler)
	return mux
}

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
