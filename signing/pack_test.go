package signing_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"math"
	"path/filepath"
	"strings"
	"testing"

	"github.com/modelpack/model-spec/schema"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/signing"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/store"
)

func pack(t *testing.T, b *signing.Build) *signing.Packed {
	t.Helper()
	packed, err := signing.Pack(t.Context(), "oci:"+filepath.Join(t.TempDir(), "out")+":v1", b)
	if err != nil {
		t.Fatal(err)
	}
	return packed
}

func digestIn(ref string) string { return ref[strings.IndexByte(ref, '@')+1:] }

func TestCase17PackIsReproducible(t *testing.T) {
	one, two := pack(t, signingtest.Build(t, 1)), pack(t, signingtest.Build(t, 1))
	if digestIn(one.ModelPack) != digestIn(two.ModelPack) || digestIn(one.Modelcar) != digestIn(two.Modelcar) {
		t.Errorf("two packs of one build differ: %v, %v", one, two)
	}
	if other := pack(t, signingtest.Build(t, 2)); digestIn(other.ModelPack) == digestIn(one.ModelPack) {
		t.Error("two builds have one digest")
	}
}

func TestModelPackFollowsTheSpecification(t *testing.T) {
	b := signingtest.Build(t, 1)
	packed := pack(t, b)
	r, err := store.Open(t.Context(), packed.ModelPack)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	m, _, err := r.Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if m.MediaType != ocispec.MediaTypeImageManifest || m.ArtifactType != modelspec.ArtifactTypeModelManifest || m.Config.MediaType != modelspec.MediaTypeModelConfig {
		t.Errorf("media types %s, %s, %s", m.MediaType, m.ArtifactType, m.Config.MediaType)
	}
	config, err := r.Blob(t.Context(), m.Config)
	if err != nil {
		t.Fatal(err)
	}
	if err := schema.ValidatorMediaTypeModelConfig.Validate(bytes.NewReader(config)); err != nil {
		t.Errorf("config: %v\n%s", err, config)
	}
	var model modelspec.Model
	if err := json.Unmarshal(config, &model); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		signing.ModelFile:    modelspec.MediaTypeModelWeightRaw,
		signing.TrainingFile: modelspec.MediaTypeModelWeightConfigRaw,
		signing.ZooFile:      modelspec.MediaTypeModelWeightConfigRaw,
		signing.CardFile:     modelspec.MediaTypeModelDocRaw,
		signing.ReportFile:   modelspec.MediaTypeModelDocRaw,
	}
	if len(m.Layers) != len(want) || len(model.ModelFS.DiffIDs) != len(want) {
		t.Fatalf("%d layers, %d diffIds", len(m.Layers), len(model.ModelFS.DiffIDs))
	}
	for i, l := range m.Layers {
		name := l.Annotations[modelspec.AnnotationFilepath]
		if want[name] != l.MediaType || model.ModelFS.DiffIDs[i] != l.Digest {
			t.Errorf("layer %s: %s, diffId %s of %s", name, l.MediaType, model.ModelFS.DiffIDs[i], l.Digest)
		}
		var about modelspec.FileMetadata
		if err := json.Unmarshal([]byte(l.Annotations[modelspec.AnnotationFileMetadata]), &about); err != nil || about.Name != name || about.Size != l.Size {
			t.Errorf("layer %s: metadata %+v, %v", name, about, err)
		}
	}
	if m.Annotations[signing.AnnotationRobust] != "0.9500" || m.Annotations[signing.AnnotationThreat] != "linf 0.3" {
		t.Errorf("annotations %v", m.Annotations)
	}
	a, err := store.Pull(t.Context(), packed.ModelPack, store.Want{Type: modelspec.ArtifactTypeModelManifest})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := a.File(signing.ModelFile); err != nil || !bytes.Equal(got, b.Model) {
		t.Errorf("%s: %d bytes, %v", signing.ModelFile, len(got), err)
	}
}

func TestModelcar(t *testing.T) {
	b := signingtest.Build(t, 1)
	packed := pack(t, b)
	a, err := store.Pull(t.Context(), packed.Modelcar, store.Want{})
	if err != nil {
		t.Fatal(err)
	}
	if digest := digestIn(packed.ModelPack); a.Subject != digest || a.Annotations[signing.AnnotationModelPack] != digest {
		t.Errorf("the modelcar refers to %q and %q, not to %s", a.Subject, a.Annotations[signing.AnnotationModelPack], digest)
	}
	found := map[string][]byte{}
	var names []string
	for r := tar.NewReader(bytes.NewReader(a.Files[0].Data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.ModTime.Unix() != 0 || h.Uid != 0 || h.Uname != "" {
			t.Errorf("%s: metadata that varies: %+v", h.Name, h)
		}
		names = append(names, h.Name)
		if found[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	if want := "models/ models/README.md models/model.onnx models/model.yaml models/report.json models/training.json"; strings.Join(names, " ") != want {
		t.Errorf("files %v, want %s", names, want)
	}
	if !bytes.Equal(found["models/model.onnx"], b.Model) {
		t.Error("models/model.onnx is not the model")
	}
}

func TestCase22DamagedWeightsAreNotPacked(t *testing.T) {
	for name, damage := range map[string]func([]float32){
		"NaN":      func(w []float32) { w[3] = float32(math.NaN()) },
		"Inf":      func(w []float32) { w[3] = float32(math.Inf(1)) },
		"1e38":     func(w []float32) { w[3] = 1e38 },
		"all zero": func(w []float32) { clear(w) },
	} {
		t.Run(name, func(t *testing.T) {
			b := signingtest.Build(t, 1)
			net, metadata, err := onnx.Unmarshal(b.Model)
			if err != nil {
				t.Fatal(err)
			}
			damage(net.Flat())
			if b.Model, err = onnx.Marshal(net, metadata); err != nil {
				return // refused even earlier
			}
			if _, err := signing.Pack(t.Context(), "oci:"+t.TempDir()+":v1", b); err == nil {
				t.Error("packed")
			}
		})
	}
	t.Run("tensor shape", func(t *testing.T) {
		b := signingtest.Build(t, 1)
		b.Model = b.Model[:len(b.Model)-8]
		if _, err := b.ModelPack(); err == nil {
			t.Error("packed")
		}
	})
}

func TestCase23OtherFormatsAreNotPacked(t *testing.T) {
	for name, data := range map[string]string{
		"pickle": "\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x94.",
		"zip":    "PK\x03\x04\x14\x00\x00\x00\x08\x00model.onnx",
		"gob":    "\x0c\xff\x81\x02\x01\x02\xff\x82\x00\x01\x08\x00\x00",
		"text":   "model",
		"empty":  "",
	} {
		b := signingtest.Build(t, 1)
		b.Model = []byte(data)
		if _, err := b.ModelPack(); err == nil {
			t.Errorf("%s was packed", name)
		}
	}
}

func TestPackRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*signing.Build){
		"a report about another model": func(b *signing.Build) { b.Report = signingtest.Build(t, 2).Report },
		"a damaged report":             func(b *signing.Build) { b.Report = []byte("{}") },
		"no card":                      func(b *signing.Build) { b.Card = nil },
		"no name":                      func(b *signing.Build) { b.Name = "" },
		"training that is no JSON":     func(b *signing.Build) { b.Training = []byte("x") },
	} {
		b := signingtest.Build(t, 1)
		spoil(b)
		if _, err := signing.Pack(t.Context(), "oci:"+t.TempDir()+":v1", b); err == nil {
			t.Errorf("%s was packed", name)
		}
	}
}

func TestRobustnessIsThatOfTheReport(t *testing.T) {
	b := signingtest.Build(t, 1)
	r, err := b.Robustness("sha256:"+strings.Repeat("b", 64), "fast", 7)
	if err != nil {
		t.Fatal(err)
	}
	report := signingtest.Report(r.ModelDigest)
	if r.Clean.Accuracy != report.CleanAccuracy || r.Robust.LowerBound != report.RobustAccuracyLowerBound ||
		r.DatasetDigest != report.DatasetDigest || r.Attacks[0].Name != "fgsm" || r.Seed != 7 || r.Threat.Epsilon != 0.3 {
		t.Errorf("%+v", r)
	}
}
