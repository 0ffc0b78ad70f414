package store

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	blobFolder = "blobs/sha256"
	// partFolder holds uploads until they are complete and verified.
	partFolder = ".uploads"
	// maxPartAge is when an upload's file must be the remains of a process
	// that was killed.
	maxPartAge = 24 * time.Hour
	// maxIndex holds about a hundred thousand entries.
	maxIndex = 32 << 20

	// repositoryAnnotation names the repository of an entry of index.json
	// where it is not the folder's own.
	repositoryAnnotation = "io.github.temper-ml.repository"
)

// layout is an OCI image layout folder: oci-layout, index.json and
// blobs/sha256. Every path is resolved inside the folder, and what is not a
// regular file is refused, so that a hostile layout reads nothing else.
type layout struct {
	dir  string
	root atomic.Pointer[os.Root] // nil until the folder exists, which the first push makes while others read
	// create makes an upload's file; a variable for tests of a full disk.
	create func(root *os.Root, name string) (*os.File, error)
}

func openLayout(dir string) (*layout, error) {
	l := &layout{dir: dir, create: func(root *os.Root, name string) (*os.File, error) {
		return root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	}}
	switch info, err := os.Stat(dir); {
	case errors.Is(err, fs.ErrNotExist):
		return l, nil
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, fmt.Errorf("oci:%s is a file, not an OCI layout folder", dir)
	}
	return l, l.open()
}

func (l *layout) open() error {
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return err
	}
	marker, err := readRegular(root, ocispec.ImageLayoutFile, 4096)
	if errors.Is(err, fs.ErrNotExist) {
		// Empty, or being made by another process at this moment.
		entries, err := fs.ReadDir(root.FS(), ".")
		if err != nil || slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
			return e.Name() != partFolder && e.Name() != filepath.Dir(blobFolder) && e.Name() != lockFile && e.Name() != ocispec.ImageLayoutFile
		}) {
			root.Close()
			return fmt.Errorf("oci:%s holds files but is no OCI layout (it has no file %s): name an empty or a new folder", l.dir, ocispec.ImageLayoutFile)
		}
		l.root.Store(root)
		return nil
	}
	if err == nil {
		var version ocispec.ImageLayout
		if json.Unmarshal(marker, &version) != nil || version.Version != ocispec.ImageLayoutVersion {
			err = fmt.Errorf("its file %s is not of version %s", ocispec.ImageLayoutFile, ocispec.ImageLayoutVersion)
		}
	}
	if err != nil {
		root.Close()
		return fmt.Errorf("oci:%s: %w", l.dir, err)
	}
	l.root.Store(root)
	return nil
}

// make creates what an empty layout consists of.
func (l *layout) make() error {
	if l.root.Load() == nil {
		if err := os.MkdirAll(l.dir, 0o755); err != nil {
			return err
		}
		if err := l.open(); err != nil {
			return err
		}
	}
	for _, dir := range []string{blobFolder, partFolder} {
		if err := l.root.Load().MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if _, err := l.root.Load().Lstat(ocispec.ImageLayoutFile); errors.Is(err, fs.ErrNotExist) {
		return l.replace(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"`+ocispec.ImageLayoutVersion+`"}`))
	}
	return nil
}

func (l *layout) close() error {
	if l.root.Load() == nil {
		return nil
	}
	return l.root.Load().Close()
}

// clean removes the uploads of processes that were killed.
func (l *layout) clean() {
	if l.root.Load() == nil {
		return
	}
	entries, _ := fs.ReadDir(l.root.Load().FS(), partFolder)
	for _, e := range entries {
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > maxPartAge {
			l.root.Load().Remove(filepath.Join(partFolder, e.Name()))
		}
	}
}

// Stat and Get make layout a ggcr.BlobHandler; repositories share blobs.
func (l *layout) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	f, size, err := l.blob(h)
	if err != nil {
		return 0, err
	}
	return size, f.Close()
}

// Get opens a blob. Reading fails at the end, without the last bytes, where
// the content is not that of the digest.
func (l *layout) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	f, size, err := l.blob(h)
	if err != nil {
		return nil, err
	}
	return &verifiedBlob{File: f, digest: h.Hex, hash: sha256.New(), left: size}, nil
}

func (l *layout) blob(h v1.Hash) (*os.File, int64, error) {
	if l.root.Load() == nil {
		return nil, 0, ggcr.ErrNotFound
	}
	if !digestPattern.MatchString(h.String()) {
		return nil, 0, fmt.Errorf("digest %q: only sha256 is supported", h)
	}
	f, size, err := openRegular(l.root.Load(), blobFolder+"/"+h.Hex)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, ggcr.ErrNotFound
	}
	return f, size, err
}

type verifiedBlob struct {
	*os.File
	digest string
	hash   hash.Hash
	left   int64
}

func (b *verifiedBlob) Read(p []byte) (int, error) {
	n, err := b.File.Read(p)
	b.hash.Write(p[:n])
	if b.left -= int64(n); b.left <= 0 && n > 0 || err == io.EOF {
		if b.left != 0 || hex.EncodeToString(b.hash.Sum(nil)) != b.digest {
			return 0, fmt.Errorf("blob sha256:%s is damaged on disk", b.digest)
		}
	}
	return n, err
}

// WriteTo hides os.File's, which would send the file unverified.
func (b *verifiedBlob) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{b})
}

// openRegular opens a regular file inside root: no link, no device, no pipe
// (opening one would wait for its writer).
func openRegular(root *os.Root, name string) (*os.File, int64, error) {
	for at := name; at != "."; at = filepath.Dir(at) {
		info, err := root.Lstat(at)
		if err != nil {
			return nil, 0, err
		}
		if at == name && !info.Mode().IsRegular() || at != name && !info.IsDir() {
			return nil, 0, fmt.Errorf("%s in the OCI layout is a link or special file: refused", at)
		}
	}
	before, err := root.Lstat(name)
	if err != nil {
		return nil, 0, err
	}
	f, err := root.Open(name)
	if err != nil {
		return nil, 0, err
	}
	after, err := f.Stat()
	if err == nil && !os.SameFile(before, after) {
		err = fmt.Errorf("%s in the OCI layout was replaced while it was opened", name)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, after.Size(), nil
}

func readRegular(root *os.Root, name string, limit int64) ([]byte, error) {
	f, size, err := openRegular(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > limit {
		return nil, fmt.Errorf("%s in the OCI layout is %d bytes: at most %d", name, size, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// replace writes a file so that it is seen whole or not at all.
func (l *layout) replace(name string, data []byte) error {
	p, err := l.newPart()
	if err != nil {
		return err
	}
	defer p.discard()
	if _, err := p.Write(data); err != nil {
		return err
	}
	return p.commit(name)
}

// part is a file on its way into the layout.
type part struct {
	layout *layout
	name   string
	file   *os.File
	hash   hash.Hash
	size   int64
}

func (l *layout) newPart() (*part, error) {
	name := partFolder + "/" + strings.ToLower(rand.Text())
	f, err := l.create(l.root.Load(), name)
	if err != nil {
		return nil, err
	}
	return &part{layout: l, name: name, file: f, hash: sha256.New()}, nil
}

func (p *part) Write(b []byte) (int, error) {
	n, err := p.file.Write(b)
	p.hash.Write(b[:n])
	p.size += int64(n)
	return n, err
}

func (p *part) digest() string { return "sha256:" + hex.EncodeToString(p.hash.Sum(nil)) }

// commit gives the complete file its name.
func (p *part) commit(name string) error {
	if err := p.file.Sync(); err != nil {
		return err
	}
	if err := p.file.Close(); err != nil {
		return err
	}
	return p.layout.root.Load().Rename(p.name, name)
}

// discard removes the file unless it was committed.
func (p *part) discard() {
	p.file.Close()
	p.layout.root.Load().Remove(p.name)
}

// putBlob stores bytes under their digest.
func (l *layout) putBlob(data []byte) error {
	sum := sha256.Sum256(data)
	h := v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
	if old, err := l.Get(context.Background(), "", h); err == nil {
		_, err = io.Copy(io.Discard, old)
		old.Close()
		if err == nil {
			return nil
		}
	}
	return l.replace(blobFolder+"/"+h.Hex, data)
}

// entry is one line of index.json: a manifest in a repository, with a tag or
// without.
type entry struct {
	repository string
	tag        string
	descriptor ocispec.Descriptor
}

// readIndex returns the entries of index.json, and a digest of the file, ""
// where there is none. (Its time and size would not do: two changes can fall
// into one tick of the file system's clock.) Entries that other tools wrote
// are in the folder's own repository.
func (l *layout) readIndex() ([]entry, digest.Digest, error) {
	if l.root.Load() == nil {
		return nil, "", nil
	}
	data, err := readRegular(l.root.Load(), ocispec.ImageIndexFile, maxIndex)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, "", fmt.Errorf("oci:%s: %s: %w", l.dir, ocispec.ImageIndexFile, err)
	}
	entries := make([]entry, 0, len(index.Manifests))
	for _, d := range index.Manifests {
		if !digestPattern.MatchString(d.Digest.String()) || d.Size < 0 || d.Size > maxManifest {
			return nil, "", fmt.Errorf("oci:%s: %s lists a manifest with digest %.100q and %d bytes: refused", l.dir, ocispec.ImageIndexFile, d.Digest, d.Size)
		}
		e := entry{repository: folderRepository, tag: d.Annotations[ocispec.AnnotationRefName], descriptor: d}
		if repo := d.Annotations[repositoryAnnotation]; repositoryPattern.MatchString(repo) {
			e.repository, e.tag = repo, strings.TrimPrefix(strings.TrimPrefix(e.tag, repo), ":")
		}
		if !tagPattern.MatchString(e.tag) {
			e.tag = "" // another tool's name: the digest still finds it
		}
		entries = append(entries, e)
	}
	return entries, digest.FromBytes(data), nil
}

// writeIndex replaces index.json and returns its digest.
func (l *layout) writeIndex(entries []entry) (digest.Digest, error) {
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	index.SchemaVersion = 2
	for _, e := range entries {
		d := e.descriptor
		index.Manifests = append(index.Manifests, d)
	}
	data, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return "", err
	}
	data = append(data, '\n')
	if err := l.replace(ocispec.ImageIndexFile, data); err != nil {
		return "", err
	}
	return digest.FromBytes(data), nil
}

// newEntry describes a manifest as index.json lists it.
func newEntry(repository, tag string, manifest []byte, mediaType string) entry {
	sum := sha256.Sum256(manifest)
	var about struct {
		ArtifactType string `json:"artifactType"`
	}
	_ = json.Unmarshal(manifest, &about) // the caller has parsed it
	e := entry{repository: repository, tag: tag, descriptor: ocispec.Descriptor{
		MediaType:    mediaType,
		ArtifactType: about.ArtifactType,
		Size:         int64(len(manifest)),
		Annotations:  map[string]string{},
	}}
	e.descriptor.Digest = digestOf(sum)
	name := tag
	if repository != folderRepository {
		e.descriptor.Annotations[repositoryAnnotation] = repository
		name = repository + ":" + tag
	}
	if tag != "" {
		e.descriptor.Annotations[ocispec.AnnotationRefName] = name
	}
	return e
}

// with returns the entries with e added: its tag is taken from what had it
// before, which stays listed by digest.
func with(entries []entry, e entry) []entry {
	same := func(o entry) bool {
		return o.repository == e.repository && o.descriptor.Digest == e.descriptor.Digest
	}
	if e.tag == "" && slices.ContainsFunc(entries, same) {
		return entries
	}
	var out []entry
	for _, o := range entries {
		switch {
		case same(o) && (o.tag == "" || o.tag == e.tag):
			continue // e lists it
		case o.repository == e.repository && e.tag != "" && o.tag == e.tag:
			if slices.ContainsFunc(entries, func(p entry) bool {
				return p.repository == o.repository && p.descriptor.Digest == o.descriptor.Digest && p.tag != o.tag
			}) {
				continue // listed once more
			}
			o = o.untagged()
		}
		out = append(out, o)
	}
	return append(out, e)
}

func (e entry) untagged() entry {
	annotations := map[string]string{}
	for k, v := range e.descriptor.Annotations {
		if k != ocispec.AnnotationRefName {
			annotations[k] = v
		}
	}
	e.tag, e.descriptor.Annotations = "", annotations
	return e
}
