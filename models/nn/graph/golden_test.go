package graph

import (
	"encoding/json"
	"math"
	"os"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
)

// golden is what PyTorch computed for a network that it exported
// (testdata/golden.py): everything channels-first, the loss the mean of the
// cross-entropy.
type golden struct {
	Layout     string    `json:"layout"`
	Batch      int       `json:"batch"`
	X          []float32 `json:"x"`
	Labels     []uint8   `json:"labels"`
	Logits     []float32 `json:"logits"`
	DX         []float32 `json:"dx"`
	Parameters []struct {
		Shape    []int     `json:"shape"`
		Gradient []float32 `json:"gradient"`
	} `json:"parameters"`
}

// channelsLast reorders images [n, c, h, w] to [n, h, w, c].
func channelsLast(x []float32, s nn.Shape) []float32 {
	out := make([]float32, len(x))
	pixels := s.Height * s.Width
	for i := range x {
		n, c, at := i/s.Size(), i%s.Size()/pixels, i%pixels
		out[n*s.Size()+at*s.Channels+c] = x[i]
	}
	return out
}

func TestGoldenLogitsAndGradientsFromPyTorch(t *testing.T) {
	for _, name := range []string{"wong", "paper", "trades", "madry"} {
		t.Run(name, func(t *testing.T) {
			model, err := os.ReadFile("testdata/" + name + ".onnx")
			if err != nil {
				t.Fatal(err)
			}
			net, _, err := onnx.Unmarshal(model)
			if err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile("testdata/" + name + ".json")
			if err != nil {
				t.Fatal(err)
			}
			var want golden
			if err := json.Unmarshal(data, &want); err != nil {
				t.Fatal(err)
			}
			n, classes := want.Batch, net.Classes()
			x := channelsLast(want.X, net.Input)
			sum := attack.CrossEntropy(want.Labels, classes)
			mean := func(logits, grad []float32, lo, hi int) {
				sum(logits, grad, lo, hi)
				for i := range grad {
					grad[i] /= float32(n)
				}
			}

			forward, err := nn.NewForward(net, n)
			if err != nil {
				t.Fatal(err)
			}
			compare(t, "logit", forward.Logits(x, n), want.Logits)
			input, err := NewAttack(net, n)
			if err != nil {
				t.Fatal(err)
			}
			logits, dx, err := input.Gradient(x, n, mean)
			if err != nil {
				t.Fatal(err)
			}
			compare(t, "graph's logit", logits, want.Logits)
			compare(t, "input gradient", dx, channelsLast(want.DX, net.Input))

			training, err := NewTraining(net, n)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := training.Step(x, n, mean); err != nil {
				t.Fatal(err)
			}
			gradient := training.Gradient()
			if len(want.Parameters) != len(net.Parameters) {
				t.Fatalf("PyTorch has %d parameters, ours %d", len(want.Parameters), len(net.Parameters))
			}
			for i, p := range net.Parameters {
				got := gradient[:len(p.Data)]
				gradient = gradient[len(p.Data):]
				compare(t, "gradient of "+p.Name, got, ours(want.Parameters[i].Gradient, want.Parameters[i].Shape, net.LayerShapes()[p.Layer]))
			}
		})
	}
}

// ours reorders PyTorch's conv weight [out, in, h, w], dense weight
// [out, channel-first in] or bias to this package's order.
func ours(w []float32, shape []int, in nn.Shape) []float32 {
	units := shape[0]
	size := len(w) / units
	out := make([]float32, len(w))
	for i, v := range w {
		o, at := i/size, i%size
		switch len(shape) {
		case 4:
			taps := shape[2] * shape[3]
			at = at%taps*shape[1] + at/taps
		case 2:
			pixels := in.Height * in.Width
			at = at%pixels*in.Channels + at/pixels
		}
		out[at*units+o] = v
	}
	return out
}

func compare(t *testing.T, what string, got, want []float32) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d values, want %d", what, len(got), len(want))
	}
	for i := range want {
		if !(math.Abs(float64(got[i]-want[i])) <= 1e-5) {
			t.Fatalf("%s %d: %v, PyTorch has %v", what, i, got[i], want[i])
		}
	}
}
