// Package selftest decides whether a loaded model computes what it computed
// when it was made: a model that passed every signature check can still be
// broken by the machine it runs on, or have been broken before it was signed.
package selftest

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/temper-ml/temper/models/nn"
)

// MetadataKey is the key of the vector in a model's metadata (the
// metadata_props of model.onnx).
const MetadataKey = "temper.selftest"

const (
	maxVector   = 4 << 20 // bytes of a vector: about 20 images of 224x224x3
	maxExamples = 256     // one batch
)

// tolerance of a logit, relative to 1 + its magnitude: another instruction
// set sums in another order, and a damaged weight changes far more.
const tolerance = 1e-3

// vector is known inputs with the logits they must give.
type vector struct {
	Pixels []byte    `json:"pixels"` // [n, height, width, channels], 255 is 1.0; base64 in JSON
	Labels []uint8   `json:"labels"` // [n] the true classes
	Logits []float32 `json:"logits"` // [n, classes]
}

// Vector makes the self-test of a network from a few examples, best some of
// each class: pixels [n, height, width, channels], 255 for 1.0, and labels.
// Put it into the model's metadata under MetadataKey.
func Vector(n *nn.Network, pixels []byte, labels []uint8) (string, error) {
	v := vector{Pixels: pixels, Labels: labels}
	if err := v.check(n); err != nil {
		return "", err
	}
	f, err := nn.NewForward(n, len(labels))
	if err != nil {
		return "", err
	}
	v.Logits = append(v.Logits, f.Logits(v.floats(), len(labels))...)
	if err := finite(v.Logits); err != nil {
		return "", err
	}
	text, err := json.Marshal(v)
	if err == nil && len(text) > maxVector {
		err = fmt.Errorf("a self-test of %d bytes: at most %d, take fewer examples", len(text), maxVector)
	}
	return string(text), err
}

func (v *vector) check(n *nn.Network) error {
	size := n.Input.Size()
	if len(v.Labels) < 1 || len(v.Labels) > maxExamples || len(v.Pixels) != len(v.Labels)*size {
		return fmt.Errorf("a self-test with %d labels and %d bytes of pixels: must be 1 to %d examples of %d bytes", len(v.Labels), len(v.Pixels), maxExamples, size)
	}
	for _, l := range v.Labels {
		if int(l) >= n.Classes() {
			return fmt.Errorf("a self-test with the label %d: the network has %d classes", l, n.Classes())
		}
	}
	return nil
}

func (v *vector) floats() []float32 {
	x := make([]float32, len(v.Pixels))
	for i, b := range v.Pixels {
		x[i] = float32(b) / 255
	}
	return x
}

// Run tests a network: the weights are sane; outputs are finite, depend on
// the input and not on the batch, and are the same twice; and the examples of
// the vector, where there is one ("": none), give the recorded logits and more
// than one class.
func Run(n *nn.Network, text string) error {
	if err := n.Check(); err != nil {
		return err
	}
	const probes = 3 // black, white, noise
	f, err := nn.NewForward(n, probes)
	if err != nil {
		return err
	}
	size, classes := n.Input.Size(), n.Classes()
	x := make([]float32, probes*size)
	noise := rand.New(rand.NewPCG(1, 1))
	for i := range size {
		x[size+i] = 1
		x[2*size+i] = noise.Float32()
	}
	first := append([]float32(nil), f.Logits(x, probes)...)
	if err := finite(first); err != nil {
		return err
	}
	if err := same(f.Logits(x, probes), first, "a second run"); err != nil {
		return err
	}
	constant := true
	for i := range probes {
		row := first[i*classes:][:classes]
		if err := same(f.Logits(x[i*size:], 1), row, "the example alone"); err != nil {
			return err
		}
		for j, v := range row {
			constant = constant && v == first[j]
		}
	}
	if constant {
		return fmt.Errorf("self-test: a black, a white and a noise image give the same outputs: the model ignores its input")
	}
	if text == "" {
		return nil
	}

	var v vector
	if len(text) > maxVector {
		return fmt.Errorf("self-test: the recorded vector is %d bytes: at most %d", len(text), maxVector)
	}
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return fmt.Errorf("self-test: the recorded vector: %w", err)
	}
	if err := v.check(n); err != nil {
		return err
	}
	examples := len(v.Labels)
	if f, err = nn.NewForward(n, examples); err != nil {
		return err
	}
	logits := f.Logits(v.floats(), examples)
	if err := finite(logits); err != nil {
		return err
	}
	if len(v.Logits) != len(logits) {
		return fmt.Errorf("self-test: %d recorded logits for %d examples of %d classes", len(v.Logits), examples, classes)
	}
	if err := same(logits, v.Logits, "the recorded logits"); err != nil {
		return err
	}
	labels, predicted := map[uint8]bool{}, map[int]bool{}
	for i, l := range v.Labels {
		labels[l] = true
		best := 0
		for j, v := range logits[i*classes:][:classes] {
			if v > logits[i*classes+best] {
				best = j
			}
		}
		predicted[best] = true
	}
	// Among a handful of examples of two classes, one answer for all can be bad luck.
	if len(labels) > 2 && len(predicted) == 1 {
		return fmt.Errorf("self-test: examples of %d classes are all put into one", len(labels))
	}
	return nil
}

func finite(logits []float32) error {
	for i, v := range logits {
		if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
			return fmt.Errorf("self-test: output %d is %v", i, v)
		}
	}
	return nil
}

// same compares logits; NaN is never the same.
func same(got, want []float32, what string) error {
	for i, w := range want {
		if d := math.Abs(float64(got[i]) - float64(w)); !(d <= tolerance*(1+math.Abs(float64(w)))) {
			return fmt.Errorf("self-test: output %d is %v, but %v in %s", i, got[i], w, what)
		}
	}
	return nil
}
