package serve

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/serve/selftest"
)

// Model is a network ready to be served, with where it came from.
type Model struct {
	Network  *nn.Network
	Version  string            // in URLs and answers: letters, digits, ".", "_", "-"
	Digest   string            // of the artifact, "sha256:..."
	Metadata map[string]string // of model.onnx
	Promoted time.Time         // when its channel came to name it; zero without a channel
}

// Source is where the server gets its model from.
type Source interface {
	// Load fetches and verifies the model that should be in service. It may
	// return ErrUnchanged where that is the model with the digest current;
	// nothing is in service where current is "". A *LoadError says why a model
	// was refused.
	Load(ctx context.Context, current string) (*Model, error)
}

// ErrUnchanged says that the model in service is the one that should be.
var ErrUnchanged = errors.New("the model is unchanged")

// Reasons of a LoadError: the label values of temper_model_load_failures_total.
const (
	Unavailable = "unavailable" // the registry does not answer: worth trying again
	Unverified  = "unverified"  // signature, attestation or policy
	Invalid     = "invalid"     // the artifact is not a model that can be served
	SelfTest    = "selftest"    // the model does not compute what it should
	Revoked     = "revoked"     // the model in service, which goes out of service
)

// LoadError is a model that does not go into service, or may not stay there.
type LoadError struct {
	Reason string
	Err    error
}

func (e *LoadError) Error() string { return e.Reason + " model: " + e.Err.Error() }
func (e *LoadError) Unwrap() error { return e.Err }

// newPredictor tests a model and prepares it.
func newPredictor(m *Model, passes prometheus.Counter) (*predictor, error) {
	if m == nil || m.Network == nil {
		return nil, &LoadError{Invalid, errors.New("no network")}
	}
	if !validName(m.Version) {
		return nil, &LoadError{Invalid, fmt.Errorf("version %q: must be 1 to %d letters, digits, '.', '_' or '-'", m.Version, maxName)}
	}
	if _, err := m.Network.Shapes(); err != nil {
		return nil, &LoadError{Invalid, err}
	}
	if err := m.Network.Check(); err != nil {
		return nil, &LoadError{Invalid, err}
	}
	if err := selftest.Run(m.Network, m.Metadata[selftest.MetadataKey]); err != nil {
		return nil, &LoadError{SelfTest, err}
	}
	p := &predictor{Model: m, passes: passes}
	for range runtime.GOMAXPROCS(0) {
		f, err := nn.NewForward(m.Network, chunk)
		if err != nil {
			return nil, &LoadError{Invalid, err}
		}
		p.idle = append(p.idle, &pass{forward: f, pixels: make([]float32, chunk*m.Network.Input.Size())})
	}
	return p, nil
}

// softmax fills probabilities and returns the first largest class; ok is
// false where a logit is NaN or +Inf, or all are -Inf.
func softmax(probabilities, logits []float32) (class int, ok bool) {
	for j, v := range logits {
		if v > logits[class] {
			class = j
		}
	}
	sum := 0.0
	for j, v := range logits {
		e := math.Exp(float64(v) - float64(logits[class]))
		probabilities[j] = float32(e)
		sum += e
	}
	if math.IsNaN(sum) { // NaN anywhere, or infinity less infinity
		return 0, false
	}
	for j := range probabilities {
		probabilities[j] = float32(float64(probabilities[j]) / sum)
	}
	return class, true
}
