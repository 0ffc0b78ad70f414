package serve

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// maxRepositoryBody bounds the body of a model repository request.
const maxRepositoryBody = 64 << 10

// repositoryRequest is the body of a model repository request; it may be
// absent.
type repositoryRequest struct {
	Ready      bool           `json:"ready"`
	Parameters map[string]any `json:"parameters"`
}

func readRepositoryRequest(w http.ResponseWriter, r *http.Request) (q repositoryRequest, err error) {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRepositoryBody))
	if err != nil {
		return q, &refusal{http.StatusRequestEntityTooLarge, tooLarge, fmt.Errorf("the body: %w", err)}
	}
	if len(data) == 0 {
		return q, nil
	}
	if err := json.Unmarshal(data, &q); err != nil {
		return q, bad(fmt.Errorf("the body: %w", err))
	}
	return q, nil
}

func (s *Server) repositoryIndex(w http.ResponseWriter, r *http.Request) error {
	q, err := readRepositoryRequest(w, r)
	if err != nil {
		return err
	}
	type model struct {
		Name    string `json:"name"`
		Version string `json:"version,omitempty"`
		State   string `json:"state"`
		Reason  string `json:"reason"`
	}
	m := model{Name: s.o.Name, State: "UNAVAILABLE"}
	if p := s.current.Load(); p != nil {
		m.Version, m.State = p.Version, "READY"
	}
	if why := s.refusal.Load(); why != nil {
		m.Reason = *why
	}
	models := []model{m}
	if q.Ready && m.State != "READY" {
		models = []model{}
	}
	return writeJSON(w, models)
}

func (s *Server) repositoryLoad(w http.ResponseWriter, r *http.Request) error {
	if err := s.checkRepositoryModel(w, r); err != nil {
		return err
	}
	err := s.Load(r.Context())
	var refused *LoadError
	switch {
	case errors.As(err, &refused) && refused.Reason == Unavailable:
		return &refusal{http.StatusServiceUnavailable, notReady, err}
	case err != nil:
		return &refusal{http.StatusBadRequest, badRequest, err}
	}
	return writeJSON(w, struct{}{})
}

func (s *Server) repositoryUnload(w http.ResponseWriter, r *http.Request) error {
	if err := s.checkRepositoryModel(w, r); err != nil {
		return err
	}
	s.Unload()
	return writeJSON(w, struct{}{})
}

func (s *Server) checkRepositoryModel(w http.ResponseWriter, r *http.Request) error {
	if r.PathValue("model") != s.o.Name {
		return &refusal{http.StatusNotFound, noSuchModel, fmt.Errorf("unknown model: this server has %q", s.o.Name)}
	}
	q, err := readRepositoryRequest(w, r)
	if err == nil && len(q.Parameters) > 0 {
		// A "config" or "file:" parameter would be a way around verification.
		err = bad(errors.New("parameters are not supported: what is loaded is decided by the server's source"))
	}
	return err
}
