package onnx

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/nn"
)

// random is a network of random layers that fit each other.
func random(rng *rand.Rand) nn.Description {
	d := nn.Description{Name: fmt.Sprintf("random-%d", rng.IntN(1000)), Input: nn.Shape{Height: 1 + rng.IntN(14), Width: 1 + rng.IntN(14), Channels: 1 + rng.IntN(4)}}
	in := d.Input
	for range rng.IntN(6) {
		var l nn.Layer
		switch rng.IntN(3) {
		case 0:
			k := 1 + rng.IntN(4)
			l.Conv = &nn.Conv{Filters: 1 + rng.IntN(5), Kernel: k, Stride: rng.IntN(k + 1), Padding: rng.IntN(k), ReLU: rng.IntN(2) == 0}
			if l.Conv.Stride == 1 {
				l.Conv.Stride = 0 // Unmarshal leaves the default out
			}
		case 1:
			l.MaxPool = &nn.MaxPool{Size: 1 + rng.IntN(3)}
		case 2:
			l.Dense = &nn.Dense{Units: 1 + rng.IntN(9), ReLU: rng.IntN(2) == 0}
		}
		try := nn.Description{Input: in, Layers: []nn.Layer{l, {Dense: &nn.Dense{Units: 2}}}}
		if shapes, err := try.Shapes(); err == nil {
			d.Layers = append(d.Layers, l)
			in = shapes[1]
		}
	}
	d.Layers = append(d.Layers, nn.Layer{Dense: &nn.Dense{Units: 2 + rng.IntN(9)}})
	return d
}

// randomGraph is a network of layers of all kinds that take one another's
// outputs.
func randomGraph(rng *rand.Rand) nn.Description {
	for {
		d := nn.Description{Name: "graph", Input: nn.Shape{Height: 3 + rng.IntN(9), Width: 3 + rng.IntN(9), Channels: 1 + rng.IntN(4)}}
		shapes := []nn.Shape{d.Input}
		open := map[int]bool{-1: true} // taken by no layer so far
		add := func(l nn.Layer, from ...int) bool {
			var in []nn.Shape
			for _, f := range from {
				in = append(in, shapes[f+1])
			}
			if len(from) != 1 || from[0] != len(d.Layers)-1 {
				l.From = from
			}
			out, err := l.Output(in...)
			if err != nil || out.Size() > 4000 {
				return false
			}
			for _, f := range from {
				delete(open, f)
			}
			open[len(d.Layers)] = true
			d.Layers, shapes = append(d.Layers, l), append(shapes, out)
			return true
		}
		for range 4 + rng.IntN(12) {
			from := len(d.Layers) - 1 - rng.IntN(min(3, len(d.Layers)+1))
			in := shapes[from+1]
			k := 1 + rng.IntN(4)
			switch rng.IntN(10) {
			case 0, 1:
				c := &nn.Conv{Filters: 1 + rng.IntN(6), Kernel: k, Stride: rng.IntN(3), Padding: rng.IntN(3), Dilation: rng.IntN(3), ReLU: rng.IntN(2) == 0}
				if g := 1 + rng.IntN(in.Channels); in.Channels%g == 0 && g > 1 {
					c.Groups, c.Filters = g, g*(1+rng.IntN(3))
				}
				add(nn.Layer{Conv: c}, from)
			case 2:
				add(nn.Layer{MaxPool: &nn.MaxPool{Size: k, Stride: rng.IntN(3), Padding: rng.IntN(k) / 2}}, from)
			case 3:
				add(nn.Layer{AvgPool: &nn.AvgPool{Size: k, Stride: rng.IntN(3), Padding: rng.IntN(k) / 2, CountPadding: rng.IntN(2) == 0}}, from)
			case 4:
				add(nn.Layer{Affine: &nn.Affine{ReLU: rng.IntN(2) == 0}}, from)
			case 5:
				n := &nn.Normalise{Mean: []float32{rng.Float32()}}
				for range in.Channels {
					n.Std = append(n.Std, 0.5+rng.Float32())
				}
				add(nn.Layer{Normalise: n}, from)
			case 6:
				a := nn.Activation{Function: nn.Functions[rng.IntN(5)]}
				switch a.Function {
				case "leaky_relu":
					a.Slope = rng.Float32()
				case "clip":
					a.Min, a.Max = -rng.Float32(), rng.Float32()
				}
				add(nn.Layer{Activation: &a}, from)
			case 7:
				other := rng.IntN(len(d.Layers)+1) - 1
				add(nn.Layer{Combine: &nn.Combine{Operator: nn.Operators[rng.IntN(3)], ReLU: rng.IntN(2) == 0}}, from, other)
			case 8:
				add(nn.Layer{Pad: &nn.Pad{Top: rng.IntN(3), Left: rng.IntN(3), Bottom: rng.IntN(3), Right: rng.IntN(3), Value: rng.Float32()}}, from)
			default: // channels before rows and columns
				s := []int{in.Channels, in.Height * in.Width}
				p := &nn.Permute{Sizes: s, Strides: []int{1, in.Channels}, Shape: nn.Shape{Height: in.Width, Width: in.Channels, Channels: in.Height}}
				add(nn.Layer{Permute: p}, from)
			}
		}
		// What no layer took is averaged, flattened to one pixel each, and joined.
		var ends []int
		for i := range len(d.Layers) {
			if open[i] {
				if rng.IntN(2) == 0 {
					add(nn.Layer{AvgPool: &nn.AvgPool{}}, i)
				} else {
					add(nn.Layer{Dense: &nn.Dense{Units: 1 + rng.IntN(5), ReLU: rng.IntN(2) == 0}}, i)
				}
				ends = append(ends, len(d.Layers)-1)
			}
		}
		if len(ends) > 1 {
			add(nn.Layer{Concat: &nn.Concat{}}, ends...)
		}
		add(nn.Layer{Dense: &nn.Dense{Units: 2 + rng.IntN(5)}}, len(d.Layers)-1)
		if rng.IntN(8) == 0 {
			add(nn.Layer{Activation: &nn.Activation{Function: "softmax"}}, len(d.Layers)-1)
		}
		if _, err := d.Shapes(); err == nil && !open[-1] {
			return d
		}
	}
}

// jitter gives scales and biases other values than the ones they start with.
func jitter(rng *rand.Rand, n *nn.Network) {
	for _, p := range n.Parameters {
		if len(p.Shape) == 1 {
			for i := range p.Data {
				p.Data[i] += rng.Float32() - 0.5
			}
		}
	}
}

// A network of any layers means the same after its way through a file, twice.
// Its layers may be others: a layer may be folded into the one before it, or a
// permutation into the weights behind it.
func TestRoundTripOfGraphs(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for i := range 100 {
		n, err := nn.New(randomGraph(rng), uint64(i))
		if err != nil {
			t.Fatal(err)
		}
		jitter(rng, n)
		data, err := Marshal(n, nil)
		if err != nil {
			t.Fatal(err)
		}
		back, _, err := Unmarshal(data)
		if err != nil {
			t.Fatalf("%+v: %v", n.Description, err)
		}
		x := make([]float32, n.Input.Size())
		for k := range x {
			x[k] = rng.Float32()
		}
		own, err := Marshal(back, nil)
		if err != nil {
			t.Fatal(err)
		}
		again, _, err := Unmarshal(own)
		if err != nil {
			t.Fatal(err)
		}
		var logits [3][]float32
		for k, net := range []*nn.Network{n, back, again} {
			f, err := nn.NewForward(net, 1)
			if err != nil {
				t.Fatal(err)
			}
			logits[k] = f.Logits(x, 1)
		}
		for k, want := range logits[0] {
			for way, got := range logits[1:] {
				if d := math.Abs(float64(got[k] - want)); !(d <= 1e-5*max(1, math.Abs(float64(want)))) {
					t.Fatalf("network %d: logit %d is %v, and %v after way %d through a file", i, k, want, got[k], way+1)
				}
			}
		}
	}
}

func TestRoundTripIsExact(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		n, err := nn.New(random(rng), uint64(i))
		if err != nil {
			t.Fatal(err)
		}
		metadata := map[string]string{"temper.seed": fmt.Sprint(i), "b": "", "a": "é\n"}
		data, err := Marshal(n, metadata)
		if err != nil {
			t.Fatal(err)
		}
		back, got, err := Unmarshal(data)
		if err != nil {
			t.Fatalf("%+v: %v", n.Description, err)
		}
		if !reflect.DeepEqual(n, back) {
			t.Fatalf("wrote %+v\nread  %+v", n.Description, back.Description)
		}
		if !reflect.DeepEqual(metadata, got) {
			t.Fatalf("metadata %v, read %v", metadata, got)
		}
		again, err := Marshal(back, got)
		if err != nil || !bytes.Equal(data, again) {
			t.Fatalf("the same network gave other bytes (%v)", err)
		}
	}
}

// logits is the definition of a network, as slow and as plain as can be, in
// float64: x is [N, channels, height, width].
func logits(n *nn.Network, x []float64) []float64 {
	shapes := n.LayerShapes()
	var out []float64
	for size := n.Input.Size(); len(x) > 0; x = x[size:] {
		in := n.Input
		a := make([]float64, size)
		for c := range in.Channels {
			for p := range in.Height * in.Width {
				a[p*in.Channels+c] = x[c*in.Height*in.Width+p]
			}
		}
		for i, l := range n.Layers {
			w, bias := n.Weights(i)
			in, o := shapes[i], shapes[i+1]
			next := make([]float64, o.Size())
			relu := false
			for y := range o.Height {
				for x := range o.Width {
					for f := range o.Channels {
						sum, most := 0.0, math.Inf(-1)
						switch {
						case l.Conv != nil:
							c := l.Conv
							relu = c.ReLU
							for ky := range c.Kernel {
								for kx := range c.Kernel {
									iy, ix := y*c.Step()+ky-c.Padding, x*c.Step()+kx-c.Padding
									if iy < 0 || ix < 0 || iy >= in.Height || ix >= in.Width {
										continue
									}
									for ch := range in.Channels {
										sum += a[(iy*in.Width+ix)*in.Channels+ch] * float64(w[((ky*c.Kernel+kx)*in.Channels+ch)*c.Filters+f])
									}
								}
							}
							sum += float64(bias[f])
						case l.MaxPool != nil:
							for py := range l.MaxPool.Size {
								for px := range l.MaxPool.Size {
									most = max(most, a[((y*l.MaxPool.Size+py)*in.Width+x*l.MaxPool.Size+px)*in.Channels+f])
								}
							}
							sum = most
						default:
							relu = l.Dense.ReLU
							for j, v := range a {
								sum += v * float64(w[j*l.Dense.Units+f])
							}
							sum += float64(bias[f])
						}
						if relu {
							sum = max(sum, 0)
						}
						next[(y*o.Width+x)*o.Channels+f] = sum
					}
				}
			}
			a = next
		}
		out = append(out, a...)
	}
	return out
}

type golden struct {
	X      []float64 `json:"x"`
	Logits []float64 `json:"logits"`
}

// The networks of other frameworks mean here what they mean there: logits are
// PyTorch's, for what its exporter wrote and for what Marshal makes of it.
func TestPyTorchLogits(t *testing.T) {
	cases := map[string]golden{}
	readJSON(t, "testdata/cases.json", &cases)
	files := map[string]string{}
	for name := range cases {
		files[name] = filepath.Join("testdata", name+".onnx")
	}
	for _, name := range []string{"wong", "paper", "trades", "madry"} {
		var g golden
		readJSON(t, "../nn/graph/testdata/"+name+".json", &g)
		cases[name], files[name] = g, "../nn/graph/testdata/"+name+".onnx"
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(files[name])
			if err != nil {
				t.Fatal(err)
			}
			n, _, err := Unmarshal(data)
			if err != nil {
				t.Fatal(err)
			}
			near(t, logits(n, c.X), c.Logits)
			data, err = Marshal(n, nil)
			if err != nil {
				t.Fatal(err)
			}
			if n, _, err = Unmarshal(data); err != nil {
				t.Fatal(err)
			}
			near(t, logits(n, c.X), c.Logits)
		})
	}
}

func near(t *testing.T, got, want []float64) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d logits, expected %d", len(got), len(want))
	}
	for i := range got {
		if math.Abs(got[i]-want[i]) > 1e-7 {
			t.Fatalf("logit %d is %v, PyTorch's is %v", i, got[i], want[i])
		}
	}
}

func readJSON(t *testing.T, path string, v any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatal(err)
	}
}

func small(t testing.TB) *nn.Network {
	t.Helper()
	n, err := nn.New(nn.Description{Name: "small", Input: nn.Shape{Height: 6, Width: 6, Channels: 1}, Layers: []nn.Layer{
		{Conv: &nn.Conv{Filters: 3, Kernel: 3, Padding: 1, ReLU: true}},
		{MaxPool: &nn.MaxPool{Size: 2}},
		{Dense: &nn.Dense{Units: 4}},
	}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestMarshalRefusesMetadataItCouldNotRead(t *testing.T) {
	many := map[string]string{}
	for i := range maxMetadata + 1 {
		many[fmt.Sprint(i)] = ""
	}
	for name, metadata := range map[string]map[string]string{
		"not UTF-8": {"a": "\xff"},
		"too long":  {"a": strings.Repeat("x", maxMetadataSize)},
		"too many":  many,
		"long key":  {strings.Repeat("k", maxName+1): ""},
	} {
		if _, err := Marshal(small(t), metadata); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
