package graph

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
)

// golden is what PyTorch computed for a network that it exported
// (testdata/golden.py): everything channels-first, the loss the mean of the
// cross-entropy.
type golden struct {
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
			n := func(want *golden) float32 { return 1 / float32(want.Batch) } // the mean of the batch
			goldens(t, "testdata/"+name, n)
		})
	}
}

// Networks of other kinds, as PyTorch's exporters write them
// (testdata/imported.py), the loss the sum over the batch.
func TestImportedLogitsAndGradientsFromPyTorch(t *testing.T) {
	files, err := filepath.Glob("testdata/imported/*.onnx")
	if err != nil || len(files) < 15 {
		t.Fatalf("%d networks (%v)", len(files), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(file, ".onnx")
		t.Run(filepath.Base(name), func(t *testing.T) {
			goldens(t, name, func(*golden) float32 { return 1 })
		})
	}
}

// goldens compares NAME.onnx with NAME.json. The loss is a sum times factor.
func goldens(t *testing.T, name string, factor func(*golden) float32) {
	model, err := os.ReadFile(name + ".onnx")
	if err != nil {
		t.Fatal(err)
	}
	net, _, err := onnx.Unmarshal(model)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	var want golden
	if err := json.Unmarshal(data, &want); err != nil {
		t.Fatal(err)
	}
	same := func(t *testing.T, net *nn.Network) {
		n, classes := want.Batch, net.Classes()
		x := channelsLast(want.X, net.Input)
		sum := attack.CrossEntropy(want.Labels, classes)
		loss := func(logits, grad []float32, lo, hi int) {
			sum(logits, grad, lo, hi)
			for i := range grad {
				grad[i] *= factor(&want)
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
		logits, dx, err := input.Gradient(x, n, loss)
		if err != nil {
			t.Fatal(err)
		}
		compare(t, "graph's logit", logits, want.Logits)
		compare(t, "input gradient", dx, channelsLast(want.DX, net.Input))

		training, err := NewTraining(net, n)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := training.Step(x, n, loss); err != nil {
			t.Fatal(err)
		}
		gradient := training.Gradient()
		if len(want.Parameters) != len(net.Parameters) {
			t.Fatalf("PyTorch has %d parameters, ours %d", len(want.Parameters), len(net.Parameters))
		}
		for i, p := range net.Parameters {
			got := gradient[:len(p.Data)]
			gradient = gradient[len(p.Data):]
			compare(t, "gradient of "+p.Name, got, ours(want.Parameters[i].Gradient, want.Parameters[i].Shape, net.InputShapes(p.Layer)[0]))
		}
	}
	same(t, net)
	t.Run("written and read", func(t *testing.T) {
		data, err := onnx.Marshal(net, nil)
		if err != nil {
			t.Fatal(err)
		}
		back, _, err := onnx.Unmarshal(data)
		if err != nil {
			t.Fatal(err)
		}
		same(t, back)
	})
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
