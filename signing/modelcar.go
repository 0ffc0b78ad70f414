package signing

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/temper-ml/temper/signing/store"
)

// Modelcar is the build as an image with one layer, the files under /models/.
// modelPack is the digest of the ModelPack of the same build, in the same
// repository.
//
// The image has no program. It is for servers that mount it (a Kubernetes
// image volume) or unpack it.
func (b *Build) Modelcar(modelPack string) (*store.Artifact, error) {
	_, report, err := b.read()
	if err != nil {
		return nil, err
	}
	layer, err := b.layer()
	if err != nil {
		return nil, err
	}
	annotations := b.annotations(report)
	annotations[AnnotationModelPack] = modelPack
	labels := map[string]string{}
	for key, value := range annotations {
		labels[key] = value
	}
	config, err := json.Marshal(ocispec.Image{
		Created:  &epoch,
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		Config:   ocispec.ImageConfig{Labels: labels},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}},
		History:  []ocispec.History{{Created: &epoch, CreatedBy: "temper pack"}},
	})
	if err != nil {
		return nil, err
	}
	return &store.Artifact{
		Config:      &store.Config{MediaType: ocispec.MediaTypeImageConfig, Data: config},
		Files:       []store.File{{Name: "models.tar", MediaType: ocispec.MediaTypeImageLayer, Data: layer}},
		Annotations: annotations,
		Subject:     modelPack,
	}, nil
}

// layer is an uncompressed tar: compression differs between versions of Go.
func (b *Build) layer() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	header := func(name string, kind byte, mode, size int64) error {
		return w.WriteHeader(&tar.Header{Name: name, Typeflag: kind, Mode: mode, Size: size, ModTime: epoch, Format: tar.FormatUSTAR})
	}
	if err := header("models/", tar.TypeDir, 0o755, 0); err != nil {
		return nil, err
	}
	files := b.files()
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.name, b.name) })
	for _, f := range files {
		if err := header("models/"+f.name, tar.TypeReg, fileMode, int64(len(f.data))); err != nil {
			return nil, fmt.Errorf("pack: %s: %w", f.name, err)
		}
		if _, err := w.Write(f.data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
