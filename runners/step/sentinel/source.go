package sentinel

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/serve"
	"github.com/temper-ml/temper/signing"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// Source is where the sentinel learns which model is in service.
type Source interface {
	// Load fetches and verifies the model in service and its detector. It may
	// return ErrUnchanged where that is still the model with the digest
	// current.
	Load(ctx context.Context, current string) (Model, error)
}

// ErrUnchanged says that the model in service is the one that is watched.
var ErrUnchanged = errors.New("the model is unchanged")

// loadTimeout is for fetching and verifying a model and its detector.
const loadTimeout = 5 * time.Minute

// Load asks the source once and watches what it names.
func (s *Sentinel) Load(ctx context.Context, source Source) error {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	s.mu.Lock()
	current := ""
	if s.watch != nil {
		current = s.watch.model.Digest
	}
	s.mu.Unlock()
	m, err := source.Load(ctx, current)
	if err == nil {
		err = step.BadInput(s.Use(m))
	}
	if errors.Is(err, ErrUnchanged) {
		err = nil
	}
	s.change(func(time.Time) {
		s.problem = ""
		if err != nil {
			s.problem = err.Error()
		}
	})
	return err
}

// Follow loads from the source at an interval until ctx is done. While a load
// fails the model before is watched, and Status names the problem.
func (s *Sentinel) Follow(ctx context.Context, source Source, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := s.Load(ctx, source); err != nil && ctx.Err() == nil {
				s.log.Error("the model in service cannot be watched", "error", err)
			}
		}
	}
}

// Registry is a Source: the signed model that a server serves, with a signed
// detector beside it.
type Registry struct {
	Reference string        // of the model, or of the channel that says which it is
	Served    serve.Source  // of the same reference: *serve.Artifact or *serve.Channel
	Detector  string        // reference of the detector; "": where DetectorAt puts it
	Policy    verify.Policy // for the detector: its keys
}

// DetectorType is the artifact type of a detector.
const DetectorType = "application/vnd.temper.detector.v1"

// maxDetector bounds a detector: a guard is small.
const maxDetector = 64 << 20

// DetectorAt is the reference of the detector of a model: a tag beside it,
// sha256-HEX.detector, named after the model's digest as cosign names the tags
// of signatures. So whoever finds the model finds its detector.
func DetectorAt(ctx context.Context, model string) (string, error) {
	r, err := store.Open(ctx, model)
	if err != nil {
		return "", err
	}
	defer r.Close()
	at, err := r.Resolve(ctx)
	if err != nil {
		return "", err
	}
	tag, err := r.At(strings.Replace(at.Digest(), ":", "-", 1) + ".detector")
	if err != nil {
		return "", err
	}
	return tag.String(), nil
}

// Load implements Source.
func (g *Registry) Load(ctx context.Context, current string) (Model, error) {
	served, err := g.Served.Load(ctx, current)
	if errors.Is(err, serve.ErrUnchanged) {
		return Model{}, ErrUnchanged
	}
	if err != nil {
		return Model{}, err
	}
	r, err := store.Open(ctx, g.Reference)
	if err != nil {
		return Model{}, err
	}
	defer r.Close()
	at, err := r.At(served.Digest)
	if err != nil {
		return Model{}, err
	}
	m := Model{Version: served.Version, Digest: served.Digest, Network: served.Network}
	if err = g.about(ctx, &m, at); err != nil {
		return Model{}, err
	}
	where := g.Detector
	if where == "" {
		if where, err = DetectorAt(ctx, at.String()); err != nil {
			return Model{}, err
		}
	}
	m.Detector, err = loadDetector(ctx, where, g.Policy)
	var absent *store.NotFound
	if errors.As(err, &absent) {
		err = fmt.Errorf("no detector for model %s: run 'temper sentinel calibrate' and 'temper sign': %w", at, err)
	}
	return m, err
}

// about adds what the signed statements say of the model: among it the upper
// bound on its error rate, 0 where it has none, or did not pass its test.
// Whether such a model is served is for the server to say, and it needs
// watching all the more.
func (g *Registry) about(ctx context.Context, m *Model, at *store.Reference) error {
	p := g.Policy
	p.Robustness = &verify.Requirement{}
	v, err := verify.Verify(ctx, at.String(), p)
	var refused *store.Refused
	if errors.As(err, &refused) {
		return nil
	}
	if err != nil {
		return err
	}
	// One odd label is not enough against a model that passed its test without
	// an error, and no bet is to be had against one that is nearly always wrong.
	m.ErrorBound = min(max(1-v.Robustness.Clean.LowerBound, 0.001), 0.5)
	m.About = About{
		SignedBy: v.Keys, Network: v.Robustness.Network, Clean: v.Robustness.Clean.Accuracy,
		Robust: v.Robustness.Robust.Accuracy, Epsilon: v.Robustness.Threat.Epsilon,
	}
	return g.report(ctx, m, at)
}

// maxReport bounds the report that a model carries.
const maxReport = 16 << 20

// report adds the classes' names and the security curve from the report that
// was packed with the model; a model without one has none to show.
func (g *Registry) report(ctx context.Context, m *Model, at *store.Reference) error {
	manifest, _, err := at.Manifest(ctx)
	if err != nil {
		return err
	}
	for _, layer := range manifest.Layers {
		if store.FileName(layer) != signing.ReportFile || layer.Size > maxReport {
			continue
		}
		data, err := at.Blob(ctx, layer)
		if err != nil {
			return err
		}
		r, err := evaluate.Decode(data)
		if err != nil {
			return &store.Refused{Reference: at.String(), Err: err}
		}
		for _, c := range r.Classes {
			m.About.Classes = append(m.About.Classes, c.Name)
		}
		for _, c := range r.Curve {
			if m.About.Curve == nil || c.Attack != "fgsm" { // the strongest that was drawn
				m.About.Curve = c.Points
			}
		}
	}
	return nil
}

// loadDetector reads a detector, by the digest that was verified.
func loadDetector(ctx context.Context, ref string, p verify.Policy) (*detect.Detector, error) {
	p.Robustness = nil // that is for models
	v, err := verify.Verify(ctx, ref, p)
	if err != nil {
		return nil, fmt.Errorf("detector: %w", err)
	}
	return readDetector(ctx, v.Reference)
}

// readDetector reads a detector that is not verified, or was.
func readDetector(ctx context.Context, ref string) (*detect.Detector, error) {
	a, err := store.Pull(ctx, ref, store.Want{Type: DetectorType, Files: 2, Bytes: maxDetector})
	if err != nil {
		return nil, fmt.Errorf("detector: %w", err)
	}
	guard, err := a.File(detect.GuardFile)
	if err != nil {
		return nil, &store.Refused{Reference: ref, Err: err}
	}
	calibration, err := a.File(detect.CalibrationFile)
	if err != nil {
		return nil, &store.Refused{Reference: ref, Err: err}
	}
	d, err := detect.Decode(guard, calibration)
	if err != nil {
		return nil, &store.Refused{Reference: ref, Err: err}
	}
	return d, nil
}

// PushDetector writes a detector to ref and returns ref with its digest.
func PushDetector(ctx context.Context, ref string, d *detect.Detector) (string, error) {
	guard, calibration, err := d.Encode()
	if err != nil {
		return "", err
	}
	return store.Push(ctx, ref, &store.Artifact{
		Type: DetectorType,
		Files: []store.File{
			{Name: detect.GuardFile, Data: guard},
			{Name: detect.CalibrationFile, MediaType: "application/json", Data: calibration},
		},
	})
}
