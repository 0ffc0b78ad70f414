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
