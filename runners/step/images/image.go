package images

import (
	"archive/tar"
	"bytes"
	"debug/buildinfo"
	"debug/elf"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// User is who a program in an image runs as.
const User = "65532:65532"

// authorities is where Go programs look for certificate authorities first.
const authorities = "etc/ssl/certs/ca-certificates.crt"

// maxProgram is a few times the largest runner.
const maxProgram = 1 << 30

// Program is a static program for Linux with what the Go linker says about it.
type Program struct {
	Name string // of the file
	Info *buildinfo.BuildInfo
	path string // all runners at once are a gigabyte: read one after the other
}

// Read reads a program and refuses one that would not run in an empty image.
func Read(path string) (*Program, error) {
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() || info.Size() > maxProgram {
		return nil, fmt.Errorf("%s: not a program of at most %d bytes", path, maxProgram)
	}
	binary, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: not a program for Linux: %w; build it with GOOS=linux", path, err)
	}
	defer binary.Close()
	for _, segment := range binary.Progs {
		if segment.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s is not static and would not run in an image with nothing else: build it with CGO_ENABLED=0", path)
		}
	}
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; build it with go build", path, err)
	}
	return &Program{Name: filepath.Base(path), Info: info, path: path}, nil
}

// setting is one of the settings that the program was built with, or "".
func (p *Program) setting(key string) string {
	for _, s := range p.Info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}

// Image is the program at /NAME, certificate authorities, and a folder for
// temporary files; nothing else. The same program gives the same image.
func (p *Program) Image() (v1.Image, error) {
	if p.setting("GOARCH") == "" {
		return nil, errors.New("the program does not say what processor it is for: build it with go build")
	}
	built := time.Unix(0, 0).UTC()
	if at, err := time.Parse(time.RFC3339, p.setting("vcs.time")); err == nil {
		built = at // of the commit
	}
	base, err := layer(built,
		entry{"etc/", 0o755, nil}, entry{"etc/ssl/", 0o755, nil}, entry{"etc/ssl/certs/", 0o755, nil},
		entry{authorities, 0o444, certificates()},
		entry{"tmp/", 0o1777, nil},
	)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(p.path)
	if err != nil {
		return nil, err
	}
	program, err := layer(built, entry{p.Name, 0o555, data})
	if err != nil {
		return nil, err
	}
	image := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	image = mutate.ConfigMediaType(image, types.OCIConfigJSON)
	image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: p.setting("GOOS"), Architecture: p.setting("GOARCH"), Created: v1.Time{Time: built},
		RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			User:       User,
			Entrypoint: []string{"/" + p.Name},
			WorkingDir: "/tmp",
			Labels:     p.labels(),
		},
	})
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(image, base, program)
}

func (p *Program) labels() map[string]string {
	labels := map[string]string{
		ocispec.AnnotationTitle:    p.Name,
		ocispec.AnnotationSource:   "https://" + p.Info.Main.Path,
		ocispec.AnnotationLicenses: "Apache-2.0",
		ocispec.AnnotationVersion:  p.Info.Main.Version,
	}
	if revision := p.setting("vcs.revision"); revision != "" {
		labels[ocispec.AnnotationRevision] = revision
	}
	return labels
}

// entry is a file in a layer, or a folder where its name ends in a slash.
type entry struct {
	name string
	mode int64
	data []byte
}

func layer(at time.Time, entries ...entry) (v1.Layer, error) {
	var buf bytes.Buffer
	size := 1024 // of the archive: a program is not to be copied again and again
	for _, e := range entries {
		size += 512 + len(e.data) + 511
	}
	buf.Grow(size)
	w := tar.NewWriter(&buf)
	for _, e := range entries { // the archive takes a folder from the slash
		if err := w.WriteHeader(&tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.data)), ModTime: at}); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	data := buf.Bytes()
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil },
		tarball.WithMediaType(types.OCILayer))
}

// certificates are the authorities that Mozilla trusts, without those that it
// trusts with conditions a file cannot say.
func certificates() []byte {
	var all []byte
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			all = append(all, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})...)
		}
	}
	return all
}
