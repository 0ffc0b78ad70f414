package onnx

import (
	"bytes"
	"encoding/gob"
	"errors"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/temper-ml/temper/models/nn"
)

// corpus runs the files of testdata/hostile: each must be refused, with all
// the words in the text file beside it.
func corpus(t *testing.T) {
	files, err := filepath.Glob("testdata/hostile/*.onnx")
	if err != nil || len(files) < 110 {
		t.Fatalf("%d hostile files (%v)", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".onnx"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			words, err := os.ReadFile(strings.TrimSuffix(file, ".onnx") + ".txt")
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = Unmarshal(data)
			if err == nil {
				t.Fatal("accepted")
			}
			for want := range strings.Lines(string(words)) {
				if want = strings.TrimSpace(want); !strings.Contains(err.Error(), want) {
					t.Errorf("error %q lacks %q", err, want)
				}
			}
		})
	}
}

func TestCase21Case22Case23HostileFiles(t *testing.T) { corpus(t) }

// allocated is what f allocates in all, freed or not.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func TestCase21MillionNodes(t *testing.T) {
	empty := appendMessage(nil, 1, nil)
	g := bytes.Repeat(empty, 1_000_000)
	data := appendMessage(appendInt(nil, 1, irVersion), 7, g)
	var err error
	used := allocated(func() { _, _, err = Unmarshal(data) })
	if err == nil || !strings.Contains(err.Error(), "more than 4096 nodes") {
		t.Errorf("error %v", err)
	}
	if used > 2*uint64(len(data)) {
		t.Errorf("%d bytes allocated for a file of %d", used, len(data))
	}
}

// Lists inside one node, attribute or tensor are bounded too.
func TestCase21LongLists(t *testing.T) {
	name := appendMessage(nil, 1, nil)
	number := appendInt(nil, 8, 1)
	for what, node := range map[string][]byte{
		"inputs":     bytes.Repeat(name, 500_000),
		"attributes": bytes.Repeat(appendMessage(nil, 5, nil), 500_000),
		"numbers":    appendMessage(nil, 5, bytes.Repeat(number, 500_000)),
		"dimensions": appendMessage(nil, 5, appendMessage(nil, 5, appendMessage(nil, 1, bytes.Repeat([]byte{1}, 1_000_000)))),
		"a name":     appendMessage(nil, 3, bytes.Repeat([]byte{'x'}, 1_000_000)),
	} {
		data := appendMessage(appendInt(nil, 1, irVersion), 7, appendMessage(nil, 1, node))
		var err error
		used := allocated(func() { _, _, err = Unmarshal(data) })
		if err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: error %v", what, err)
		}
		if used > 1<<16 {
			t.Errorf("%s: %d bytes allocated for a file of %d", what, used, len(data))
		}
	}
}

// The network is the only large thing that reading allocates, and the file the
// only one that writing does.
func TestCase21Memory(t *testing.T) {
	n, err := nn.New(nn.Description{Input: nn.Shape{Height: 28, Width: 28, Channels: 1}, Layers: []nn.Layer{
		{Conv: &nn.Conv{Filters: 16, Kernel: 5, Padding: 2, ReLU: true}}, {MaxPool: &nn.MaxPool{Size: 2}}, {Dense: &nn.Dense{Units: 512, ReLU: true}}, {Dense: &nn.Dense{Units: 10}}}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	var data []byte
	size := 4 * uint64(len(n.Flat()))
	if used := allocated(func() { data, err = Marshal(n, nil) }); err != nil || used > size*11/10 {
		t.Errorf("%d bytes allocated to write %d (%v)", used, size, err)
	}
	if used := allocated(func() { _, _, err = Unmarshal(data) }); err != nil || used > size*11/10 {
		t.Errorf("%d bytes allocated to read %d (%v)", used, size, err)
	}
}

func TestCase22WeightsAreRefusedBothWays(t *testing.T) {
	for name, v := range map[string]float32{"NaN": float32(math.NaN()), "Inf": float32(math.Inf(-1)), "huge": 1e38} {
		n := small(t)
		good, err := Marshal(n, nil)
		if err != nil {
			t.Fatal(err)
		}
		was := n.Parameters[0].Data[5]
		n.Parameters[0].Data[5] = v
		if _, err := Marshal(n, nil); err == nil || !strings.Contains(err.Error(), "0.weight[5]") {
			t.Errorf("%s: Marshal: %v", name, err)
		}
		// The same weight in a file.
		at := bytes.Index(good, bits(was))
		if at < 0 {
			t.Fatal("the weight is not in the file")
		}
		copy(good[at:], bits(v))
		if _, _, err := Unmarshal(good); err == nil || !strings.Contains(err.Error(), "0.weight[5]") {
			t.Errorf("%s: Unmarshal: %v", name, err)
		}
	}
	n := small(t)
	clear(n.Parameters[0].Data)
	if _, err := Marshal(n, nil); err == nil || !strings.Contains(err.Error(), "all zero") {
		t.Errorf("all zero: Marshal: %v", err)
	}
}

func bits(v float32) []byte { return protowire.AppendFixed32(nil, math.Float32bits(v)) }

func TestCase23Gob(t *testing.T) {
	var buf bytes.Buffer
	if err := gob.NewEncoder(&buf).Encode(small(t)); err != nil {
		t.Fatal(err)
	}
	_, _, err := Unmarshal(buf.Bytes())
	if !errors.Is(err, ErrNotONNX) || !strings.Contains(err.Error(), "gob") {
		t.Errorf("error %v", err)
	}
}

func FuzzUnmarshal(f *testing.F) {
	for _, pattern := range []string{"testdata/*.onnx", "testdata/hostile/*.onnx", "../nn/graph/testdata/*.onnx", "../nn/graph/testdata/imported/*.onnx"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var n *nn.Network
		var metadata map[string]string
		var err error
		n, metadata, err = Unmarshal(data)
		if err != nil {
			return
		}
		if 4*len(n.Flat()) > len(data)+shared {
			t.Fatalf("%d parameters from %d bytes", len(n.Flat()), len(data))
		}
		// What is accepted is written in Temper's own form, which means the same.
		own, err := Marshal(n, metadata)
		if err != nil {
			t.Fatal(err)
		}
		again, _, err := Unmarshal(own)
		if err != nil {
			t.Fatal(err)
		}
		if again.Input != n.Input || again.Classes() != n.Classes() || len(again.Flat()) != len(n.Flat()) {
			t.Fatalf("%v to %d classes with %d parameters became %v, %d and %d on the way through a file", n.Input, n.Classes(), len(n.Flat()), again.Input, again.Classes(), len(again.Flat()))
		}
	})
}
