package artifact

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/signing/store"
)

// network is a small one for images of 2x2.
func network(t *testing.T) *nn.Network {
	t.Helper()
	n, err := nn.New(nn.Description{Name: "tiny", Input: nn.Shape{Height: 2, Width: 2, Channels: 1}, Layers: []nn.Layer{{Dense: &nn.Dense{Units: 2}}}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func examples() *dataset.Set {
	return &dataset.Set{
		Name: "tiny/test", Shape: nn.Shape{Height: 2, Width: 2, Channels: 1}, Classes: []string{"no", "yes"},
		Floats: []float32{0, 0.25, 0.5, 1, 1, 0.5, 0.125, 0}, Labels: []uint8{0, 1},
	}
}

func TestNetworkThereAndBack(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	training := &Training{Network: "tiny", Dataset: "mnist", DatasetDigest: "sha256:00", RecipeName: "fast", Threat: attack.Threat{Norm: "linf", Epsilon: 0.3}, Seed: 7}
	pushed, err := PushNetwork(ctx, "oci:"+dir+":v1", network(t), nil, training)
	if err != nil {
		t.Fatal(err)
	}
	again, err := PushNetwork(ctx, "oci:"+dir+":v2", network(t), nil, training)
	if err != nil || again.Reference != pushed.Reference {
		t.Errorf("the same network became %s and %s: %v", pushed.Reference, again.Reference, err)
	}
	file := filepath.Join(dir, "copy.onnx")
	if err := os.WriteFile(file, pushed.ONNX, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"oci:" + dir + ":v1", pushed.Reference, file} {
		m, err := ReadModel(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		if m.Digest != pushed.Digest || !reflect.DeepEqual(m.Network.Flat(), network(t).Flat()) {
			t.Errorf("%s: another network came back", ref)
		}
		if ref == file {
			if m.Manifest != "" || m.Reference != file || m.Training != nil {
				t.Errorf("%s: %+v", ref, m)
			}
		} else if m.Reference != pushed.Reference || m.Manifest != pushed.Manifest || !reflect.DeepEqual(m.Training, training) {
			t.Errorf("%s: %+v", ref, m)
		}
	}
}

func TestDatasetThereAndBack(t *testing.T) {
	ctx, ref := t.Context(), "oci:"+t.TempDir()+":adversarial"
	pushed, digest, err := PushDataset(ctx, ref, &dataset.Splits{Name: "tiny", Test: examples()}, map[string]string{"temper.attack": "fgsm"})
	if err != nil || !strings.HasSuffix(pushed, "@"+digest) {
		t.Fatalf("%s, %s: %v", pushed, digest, err)
	}
	splits, err := OpenDataset(ctx, pushed)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := splits.Test.Digest(), examples().Digest(); got != want {
		t.Errorf("digest %s, want %s", got, want)
	}
	if splits.Name != pushed || splits.Test.Name != pushed+"/test" {
		t.Errorf("named %q and %q", splits.Name, splits.Test.Name)
	}
}

func TestArtifactsOfAnotherKindAreRefused(t *testing.T) {
	ctx, ref := t.Context(), "oci:"+t.TempDir()
	push := func(tag string, a *store.Artifact) string {
		t.Helper()
		at, err := store.Push(ctx, ref+":"+tag, a)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	model := func(ctx context.Context, ref string) error { _, err := ReadModel(ctx, ref); return err }
	data := func(ctx context.Context, ref string) error { _, err := OpenDataset(ctx, ref); return err }
	report := func(ctx context.Context, ref string) error { _, err := ReadReport(ctx, ref); return err }
	for name, c := range map[string]struct {
		read func(context.Context, string) error
		ref  string
		want string
	}{
		"model without model.onnx":    {model, push("a", &store.Artifact{Type: NetworkType, Files: []store.File{{Name: "x", Data: []byte("x")}}}), ModelFile},
		"model that is a pickle":      {model, push("b", &store.Artifact{Type: NetworkType, Files: []store.File{{Name: ModelFile, Data: []byte("\x80\x04\x95")}}}), "onnx"},
		"model whose history is none": {model, push("c", &store.Artifact{Type: NetworkType, Files: []store.File{{Name: ModelFile}, {Name: TrainingFile, Data: []byte("{")}}}), TrainingFile},
		"dataset that is a network":   {data, push("d", &store.Artifact{Type: NetworkType}), DatasetType},
		"dataset with a folder":       {data, push("e", &store.Artifact{Type: DatasetType, Files: []store.File{{Name: "a/b", Data: []byte("x")}}}), "no folders"},
		"dataset without images":      {data, push("f", &store.Artifact{Type: DatasetType, Files: []store.File{{Name: "readme", Data: []byte("x")}}}), "no test images"},
		"report that is a network":    {report, push("g", &store.Artifact{Type: NetworkType}), ReportType},
		"report of nonsense":          {report, push("h", &store.Artifact{Type: ReportType, Files: []store.File{{Name: ReportFile, Data: []byte("{}")}}}), "report"},
		"reference without a tag":     {model, ref, "neither tag nor digest"},
		"no such tag":                 {model, ref + ":absent", "does not exist"},
		"no such file":                {model, "absent.onnx", "no such file"},
		"folder as a model":           {model, t.TempDir(), "not a reference"},
		"device as a model":           {model, "/dev/zero", "not a regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.read(ctx, c.ref)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: error %v, want one that says %q", c.ref, err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "temper-dataset-") {
				t.Errorf("the error names a temporary folder: %v", err)
			}
		})
	}
}

func TestReachable(t *testing.T) {
	var down *store.Unavailable
	if err := Reachable(t.Context(), "127.0.0.1:1/a:b"); !errors.As(err, &down) {
		t.Errorf("a closed port: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"oci:" + file + ":a", "oci:" + filepath.Join(file, "below") + ":a", "oci:/proc/nowhere:a", "oci:out@sha256:" + strings.Repeat("0", 64), "oci:out:a:b"} {
		if err := Reachable(t.Context(), ref); err == nil || reflect.TypeOf(err) != reflect.TypeOf(step.BadInput(err)) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if err := Reachable(t.Context(), "oci:"+filepath.Join(t.TempDir(), "not", "there")+":a"); err != nil {
		t.Error(err)
	}
	if err := Reachable(t.Context(), "oci:"+t.TempDir()+":a"); err != nil {
		t.Errorf("an empty folder: %v", err)
	}
	registry, err := store.Start(t.Context(), t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Close()
	if err := Reachable(t.Context(), registry.Addr()+"/never/pushed:a"); err != nil {
		t.Errorf("an empty registry: %v", err)
	}
}

func TestIsReference(t *testing.T) {
	dir := t.TempDir()
	for ref, want := range map[string]bool{
		"oci:out:a": true, "localhost:5000/mnist:a": true, "localhost/mnist": true, "ghcr.io/a/b@sha256:00": true,
		"mnist": false, "mnits": false, "./data": false, "../data/x": false, "data/x": false, "model.onnx": false,
		"https://example.org/digits": false, dir: false,
	} {
		if got := isReference(ref); got != want {
			t.Errorf("isReference(%q) = %v", ref, got)
		}
	}
}

func TestSameRepository(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"oci:out:a", "oci:./out@sha256:" + strings.Repeat("0", 64), true},
		{"oci:out:a", "oci:other:a", false},
		{"localhost:5000/m:a", "localhost:5000/m:b", true},
		{"localhost:5000/m:a", "localhost:5001/m:a", false},
	} {
		if got, err := sameRepository(t.Context(), c.a, c.b); got != c.want || err != nil {
			t.Errorf("sameRepository(%s, %s) = %v, %v", c.a, c.b, got, err)
		}
	}
}

// A model whose training normalised images outside of the network gets a layer
// that does, so that what is attacked are pixels of [0,1].
func TestNormalisedReference(t *testing.T) {
	net := network(t)
	data, err := onnx.Marshal(net, map[string]string{"temper.network": "tiny"})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "model.onnx")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	with := Normalisation{Mean: "0.25", Std: "0.5"}
	m, err := ReadModel(t.Context(), with.Of(file))
	if err != nil {
		t.Fatal(err)
	}
	if m.Digest == Digest(data) || m.Digest != Digest(m.ONNX) {
		t.Error("the normalised model has the digest of the file")
	}
	again, _, err := onnx.Unmarshal(m.ONNX)
	if err != nil {
		t.Fatal(err)
	}
	x := []float32{0, 0.1, 0.7, 1}
	scaled := []float32{-0.5, -0.3, 0.9, 1.5}
	want := logits(t, net, scaled)
	for name, n := range map[string]*nn.Network{"read": m.Network, "written and read": again} {
		for i, got := range logits(t, n, x) {
			if math.Abs(float64(got-want[i])) > 1e-6 {
				t.Errorf("%s: logit %d is %v, %v of the normalised pixels", name, i, got, want[i])
			}
		}
	}
	for _, query := range []string{"?mean=0.5", "?mean=a&std=1", "?mean=0&std=0", "?mean=0&std=1&x=1", "?mean=0,0&std=1"} {
		if _, err := ReadModel(t.Context(), file+query); err == nil {
			t.Errorf("%s: no error", query)
		}
	}
}

func logits(t *testing.T, n *nn.Network, x []float32) []float32 {
	f, err := nn.NewForward(n, 1)
	if err != nil {
		t.Fatal(err)
	}
	return f.Logits(x, 1)
}
