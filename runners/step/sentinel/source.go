package sentinel

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/signing/channel"
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

// Registry is a Source: a signed model in a registry, named by a reference or
// by the head of a channel, with a signed detector beside it. References are
// resolved at each load, so promotions are followed.
type Registry struct {
	Model    string // reference of the model; "": the one that Channel says
	Channel  string // reference of the channel
	Detector string // reference of the detector; "": where DetectorAt puts it
	Policy   verify.Policy

	sequence int // of the channel's last record: an older one is an attack or a mistake
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
	model := g.Model
	if model == "" {
		head, err := channel.Read(ctx, g.Channel, g.Policy)
		if err != nil {
			return Model{}, fmt.Errorf("channel: %w", err)
		}
		if head.Sequence < g.sequence {
			return Model{}, &store.Refused{Reference: g.Channel, Err: fmt.Errorf("it went back from record %d to %d", g.sequence, head.Sequence)}
		}
		g.sequence, model = head.Sequence, head.Reference
	}
	v, err := verify.Verify(ctx, model, g.Policy)
	if err != nil {
		return Model{}, fmt.Errorf("model: %w", err)
	}
	if v.Digest == current {
		return Model{}, ErrUnchanged
	}
	loaded, err := verify.Load(ctx, v.Reference, g.Policy)
	if err != nil {
		return Model{}, fmt.Errorf("model: %w", err)
	}
	m := Model{Version: loaded.Digest, Digest: loaded.Digest, Network: loaded.Network}
	if loaded.Robustness != nil {
		m.ErrorBound = math.Max(1-loaded.Robustness.Clean.LowerBound, minErrorBound)
	}
	where := g.Detector
	if where == "" {
		if where, err = DetectorAt(ctx, v.Reference); err != nil {
			return Model{}, err
		}
	}
	m.Detector, err = loadDetector(ctx, where, g.Policy)
	var absent *store.NotFound
	if errors.As(err, &absent) {
		return Model{}, fmt.Errorf("no detector for model %s: run 'temper sentinel calibrate' and 'temper sign': %w", v.Reference, err)
	}
	return m, err
}

// minErrorBound keeps the alarm on labels from betting against a model that
// made no error on its test: one odd label must not be enough.
const minErrorBound = 0.001

// loadDetector reads a detector, by the digest that was verified.
func loadDetector(ctx context.Context, ref string, p verify.Policy) (*detect.Detector, error) {
	p.Robustness = nil // that is for models
	v, err := verify.Verify(ctx, ref, p)
	if err != nil {
		return nil, fmt.Errorf("detector: %w", err)
	}
	a, err := store.Pull(ctx, v.Reference, store.Want{Type: DetectorType, Files: 2, Bytes: maxDetector})
	if err != nil {
		return nil, fmt.Errorf("detector: %w", err)
	}
	guard, err := a.File(detect.GuardFile)
	if err != nil {
		return nil, &store.Refused{Reference: v.Reference, Err: err}
	}
	calibration, err := a.File(detect.CalibrationFile)
	if err != nil {
		return nil, &store.Refused{Reference: v.Reference, Err: err}
	}
	d, err := detect.Decode(guard, calibration)
	if err != nil {
		return nil, &store.Refused{Reference: v.Reference, Err: err}
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
