package nn

import (
	"math"
	"strings"
	"testing"
)

func small() Description {
	return Description{Name: "small", Input: Shape{Height: 8, Width: 8, Channels: 1}, Layers: []Layer{
		{Conv: &Conv{Filters: 3, Kernel: 3, Padding: 1, ReLU: true}},
		{MaxPool: &MaxPool{Size: 2}},
		{Dense: &Dense{Units: 4}},
	}}
}

func TestShapes(t *testing.T) {
	d := small()
	shapes, err := d.Shapes()
	if err != nil {
		t.Fatal(err)
	}
	if d.Classes() != 4 {
		t.Errorf("%d classes", d.Classes())
	}
	want := []Shape{{8, 8, 1}, {8, 8, 3}, {4, 4, 3}, {1, 1, 4}}
	for i, s := range shapes {
		if s != want[i] {
			t.Errorf("shape %d is %v, want %v", i, s, want[i])
		}
	}
}

// A shape that does not fit names the layer and the shape that it was given.
func TestImpossibleDescriptionsAreRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(d *Description)
		want   string
	}{
		{"no layers", func(d *Description) { d.Layers = nil }, "0 layers"},
		{"no input", func(d *Description) { d.Input = Shape{} }, "input 0x0x0"},
		{"huge input", func(d *Description) { d.Input.Height = 1 << 40 }, "input"},
		{"empty layer", func(d *Description) { d.Layers[0] = Layer{} }, "layer 0 (empty)"},
		{"two in one", func(d *Description) { d.Layers[0].Dense = &Dense{Units: 1} }, "exactly one of"},
		{"large kernel", func(d *Description) { d.Layers[0].Conv.Kernel = 12; d.Layers[0].Conv.Padding = 0 }, "layer 0 (conv) on input 8x8x1: kernel 12x12 does not fit"},
		{"negative stride", func(d *Description) { d.Layers[0].Conv.Stride = -1 }, "stride -1"},
		{"groups", func(d *Description) { d.Layers[0].Conv.Groups = 2 }, "groups 2: must divide the 1 channels and the 3 filters"},
		{"dilation", func(d *Description) { d.Layers[0].Conv.Dilation = 9 }, "kernel 19x19 does not fit"},
		{"a later layer", func(d *Description) { d.Layers[1].From = []int{1} }, "layer 1 (maxpool) on input 8x8x3: from names layer 1"},
		{"before the input", func(d *Description) { d.Layers[1].From = []int{-2} }, "from names layer -2"},
		{"two inputs", func(d *Description) { d.Layers[1].From = []int{-1, 0} }, "2 inputs: exactly one"},
		{"many inputs", func(d *Description) { d.Layers[1] = Layer{From: make([]int, 65), Concat: &Concat{}} }, "at most 64"},
		{"dead layer", func(d *Description) { d.Layers[1].From = []int{-1} }, "layer 0 (conv) is taken by no other"},
		{"no from", func(d *Description) { d.Layers[1] = Layer{Combine: &Combine{Operator: "add"}} }, "1 inputs: exactly two"},
		{"operator", func(d *Description) {
			d.Layers[1] = Layer{From: []int{0, 0}, Combine: &Combine{Operator: "pow"}}
		}, `operator "pow"`},
		{"shapes", func(d *Description) {
			d.Layers[1] = Layer{From: []int{0, -1}, Combine: &Combine{Operator: "add"}}
		}, "inputs 8x8x3 and 8x8x1"},
		{"function", func(d *Description) { d.Layers[1] = Layer{Activation: &Activation{Function: "gelu"}} }, `function "gelu": must be one of [relu`},
		{"clip", func(d *Description) { d.Layers[1] = Layer{Activation: &Activation{Function: "clip", Min: 1}} }, "min 1, max 0"},
		{"mean", func(d *Description) {
			d.Layers[1] = Layer{Normalise: &Normalise{Mean: []float32{0, 0}, Std: []float32{1}}}
		}, "2 numbers as mean"},
		{"std", func(d *Description) {
			d.Layers[1] = Layer{Normalise: &Normalise{Mean: []float32{0}, Std: []float32{0}}}
		}, "std 0"},
		{"permute", func(d *Description) {
			d.Layers[1] = Layer{Permute: &Permute{Sizes: []int{64, 3}, Strides: []int{3, 3}, Shape: Shape{8, 8, 3}}}
		}, "must visit each of 192 values once"},
		{"permute's shape", func(d *Description) {
			d.Layers[1] = Layer{Permute: &Permute{Sizes: []int{192}, Strides: []int{1}, Shape: Shape{8, 8, 4}}}
		}, "shape 8x8x4"},
		{"several pixels", func(d *Description) { d.Layers = d.Layers[:2] }, "the last layer makes 4x4x3: must be a single pixel"},
		{"negative padding", func(d *Description) { d.Layers[0].Conv.Padding = -1 }, "padding -1"},
		{"window", func(d *Description) { d.Layers[1].MaxPool.Size = 9 }, "layer 1 (maxpool) on input 8x8x3: window 9x9"},
		{"relu at the end", func(d *Description) { d.Layers[2].Dense.ReLU = true }, "last layer"},
		{"one class", func(d *Description) { d.Layers[2].Dense.Units = 1 }, "1 classes"},
		{"too many parameters", func(d *Description) { d.Layers[2].Dense.Units = MaxParameters }, "too large"},
		{"activations", func(d *Description) {
			d.Input = Shape{Height: 1024, Width: 1024, Channels: 1}
			d.Layers = []Layer{{Conv: &Conv{Filters: 8192, Kernel: 1}}, {MaxPool: &MaxPool{Size: 15}}, {MaxPool: &MaxPool{Size: 15}}, {Dense: &Dense{Units: 2}}}
		}, "too large: it makes 1024x1024x8192, 8589934592 activations"},
		{"overflowing parameters", func(d *Description) {
			d.Layers = []Layer{{Dense: &Dense{Units: MaxParameters}}, {Dense: &Dense{Units: MaxParameters}}}
		}, "too large"},
	} {
		d := small()
		conv, pool, dense := *d.Layers[0].Conv, *d.Layers[1].MaxPool, *d.Layers[2].Dense
		d.Layers[0].Conv, d.Layers[1].MaxPool, d.Layers[2].Dense = &conv, &pool, &dense
		c.change(&d)
		if _, err := Zero(d); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", c.name, err, c.want)
		}
	}
}

func TestSameSeedSameWeights(t *testing.T) {
	weights := func(seed uint64) []float32 {
		n, err := New(small(), seed)
		if err != nil {
			t.Fatal(err)
		}
		return n.Flat()
	}
	a, b, c := weights(1), weights(1), weights(2)
	same := true
	for i := range a {
		if a[i] != b[i] {
			t.Fatalf("weight %d is %v, then %v with the same seed", i, a[i], b[i])
		}
		same = same && a[i] == c[i]
	}
	if same {
		t.Error("another seed gives the same weights")
	}
}

func TestCase22WeightsThatNoTrainingGivesAreRefused(t *testing.T) {
	for _, v := range []float32{float32(math.NaN()), float32(math.Inf(1)), float32(math.Inf(-1)), 1e38} {
		n, err := New(small(), 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Check(); err != nil {
			t.Fatalf("sound weights: %v", err)
		}
		n.Parameters[3].Data[1] = v
		if err := n.Check(); err == nil || !strings.Contains(err.Error(), "2.bias[1]") {
			t.Errorf("weight %v: error %v, want one that names 2.bias[1]", v, err)
		}
	}
	n, err := New(small(), 1)
	if err != nil {
		t.Fatal(err)
	}
	clear(n.Parameters[2].Data)
	if err := n.Check(); err == nil || !strings.Contains(err.Error(), "2.weight is all zero") {
		t.Errorf("zero weights: error %v", err)
	}
}

func TestCloneIsIndependent(t *testing.T) {
	n, err := New(small(), 1)
	if err != nil {
		t.Fatal(err)
	}
	c := n.Clone()
	c.Flat()[0]++
	if n.Flat()[0] == c.Flat()[0] {
		t.Error("the clone shares its weights")
	}
}

func BenchmarkForwardOne(b *testing.B) {
	n, err := New(Description{Name: "wong", Input: Shape{28, 28, 1}, Layers: []Layer{
		{Conv: &Conv{Filters: 16, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Conv: &Conv{Filters: 32, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Dense: &Dense{Units: 100, ReLU: true}}, {Dense: &Dense{Units: 10}}}}, 1)
	if err != nil {
		b.Fatal(err)
	}
	f, err := NewForward(n, 1)
	if err != nil {
		b.Fatal(err)
	}
	x := make([]float32, n.Input.Size())
	b.ReportAllocs()
	for b.Loop() {
		f.Logits(x, 1)
	}
}
