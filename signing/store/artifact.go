package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Artifact is a set of named files with one digest: the OCI manifest's.
type Artifact struct {
	Type        string            // artifactType, such as application/vnd.example.report.v1+json
	Config      *Config           // nil for the empty configuration
	Files       []File            // layers, in order
	Annotations map[string]string // of the manifest
	Subject     string            // digest of the artifact in the same repository that this one is about, or ""

	Digest string // of a pulled artifact
}

// Config is the configuration blob of an artifact.
type Config struct {
	MediaType string
	Data      []byte
}

// File is one layer: bytes as they are, not packed or compressed.
type File struct {
	Name        string // a path such as model.onnx or report/curve.svg (see fs.ValidPath)
	MediaType   string // application/octet-stream where empty
	Annotations map[string]string
	Data        []byte
}

// filepathAnnotation is ModelPack's annotation for a layer's name; other
// artifacts use the OCI title.
const filepathAnnotation = "org.cncf.model.filepath"

// FileName is the name of the file that a layer holds, "" where it has none.
func FileName(layer ocispec.Descriptor) string {
	if name := layer.Annotations[ocispec.AnnotationTitle]; name != "" {
		return name
	}
	return layer.Annotations[filepathAnnotation]
}

// File returns a file's content.
func (a *Artifact) File(name string) ([]byte, error) {
	for _, f := range a.Files {
		if f.Name == name {
			return f.Data, nil
		}
	}
	var have []string
	for _, f := range a.Files {
		have = append(have, f.Name)
	}
	return nil, fmt.Errorf("artifact %s has no file %q, but %s", a.Digest, name, strings.Join(have, ", "))
}

// Manifest returns the manifest that Push writes, and its digest. Equal
// artifacts give equal bytes. An artifact with a Subject needs its descriptor.
func (a *Artifact) Manifest(subject *ocispec.Descriptor) ([]byte, string, error) {
	m := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: a.Type,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       []ocispec.Descriptor{},
		Annotations:  a.Annotations,
		Subject:      subject,
	}
	m.Config.Data = nil // the blob is pushed: stock tools fetch it
	if a.Config != nil {
		m.Config = describe(a.Config.MediaType, a.Config.Data)
	}
	names := map[string]bool{}
	for _, f := range a.Files {
		if err := checkName(f.Name); err != nil {
			return nil, "", err
		}
		if names[f.Name] {
			return nil, "", fmt.Errorf("file %q is in the artifact twice", f.Name)
		}
		names[f.Name] = true
		d := describe(f.mediaType(), f.Data)
		d.Annotations = map[string]string{ocispec.AnnotationTitle: f.Name}
		for k, v := range f.Annotations {
			d.Annotations[k] = v
		}
		m.Layers = append(m.Layers, d)
	}
	data, err := json.Marshal(m)
	if err != nil {
		return nil, "", err
	}
	return data, digestOf(sha256.Sum256(data)).String(), nil
}

func (f *File) mediaType() string {
	if f.MediaType == "" {
		return "application/octet-stream"
	}
	return f.MediaType
}

func describe(mediaType string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digestOf(sha256.Sum256(data)), Size: int64(len(data))}
}

// checkName allows names that are safe below any folder on any system.
func checkName(name string) error {
	bad := func(c rune) bool {
		return c < ' ' || c == 0x7f || strings.ContainsRune(`\:*?"<>|`, c)
	}
	if len(name) > maxName || !fs.ValidPath(name) || name == "." || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("file name %.100q: a name is a relative path of at most %d bytes with forward slashes and without '..'", name, maxName)
	}
	return nil
}

// maxName is what common file systems allow for one name.
const maxName = 255

// Push writes an artifact to the reference's repository and returns its
// digest. The files come first, then the manifest by digest, and last the tag,
// where the reference has one: what a tag names is always whole. Pushing the
// same artifact again changes nothing.
func (r *Reference) Push(ctx context.Context, a *Artifact) (string, error) {
	digest, err := r.push(ctx, a)
	return digest, r.Explain(err)
}

func (r *Reference) push(ctx context.Context, a *Artifact) (string, error) {
	var subject *ocispec.Descriptor
	if a.Subject != "" {
		at, err := r.At(a.Subject)
		if err != nil {
			return "", err
		}
		data, mediaType, err := at.rawManifest(ctx)
		if err != nil {
			return "", fmt.Errorf("subject: %w", at.Explain(err))
		}
		d := describe(mediaType, data)
		subject = &d
	}
	manifest, digest, err := a.Manifest(subject)
	if err != nil {
		return "", err
	}
	if want := r.Digest(); want != "" && want != digest {
		return "", fmt.Errorf("%s: what is pushed has the digest %s: name a tag instead", r, digest)
	}
	if len(manifest) > maxManifest {
		return "", fmt.Errorf("%s: the manifest is %d bytes: at most %d", r, len(manifest), maxManifest)
	}
	pusher, err := remote.NewPusher(r.Options(ctx)...)
	if err != nil {
		return "", err
	}
	blobs := []v1.Layer{static.NewLayer([]byte("{}"), ocispec.MediaTypeEmptyJSON)}
	if a.Config != nil {
		blobs[0] = static.NewLayer(a.Config.Data, types.MediaType(a.Config.MediaType))
	}
	for _, f := range a.Files {
		blobs = append(blobs, static.NewLayer(f.Data, types.MediaType(f.mediaType())))
	}
	for _, b := range blobs {
		if err := pusher.Upload(ctx, r.repository, b); err != nil {
			return "", err
		}
	}
	raw := rawManifest{data: manifest, mediaType: ocispec.MediaTypeImageManifest}
	if err := pusher.Put(ctx, r.repository.Digest(digest), raw); err != nil {
		return "", err
	}
	if tag := r.Tag(); tag != "" {
		if err := pusher.Put(ctx, r.repository.Tag(tag), raw); err != nil {
			return "", err
		}
	}
	return digest, nil
}

// SetTag makes the reference's tag name a manifest that is already in its
// repository.
func (r *Reference) SetTag(ctx context.Context, digest string) error {
	if r.Tag() == "" {
		return fmt.Errorf("%s has no tag to set", r)
	}
	at, err := r.At(digest)
	if err != nil {
		return err
	}
	data, mediaType, err := at.rawManifest(ctx)
	if err != nil {
		return at.Explain(err)
	}
	return r.Explain(remote.Put(r.Name(), rawManifest{data, mediaType}, r.Options(ctx)...))
}

// settle is how long a claim waits for others in a registry without
// conditions: longer than one of them takes from reading to writing.
var settle = 3 * time.Second

// Claim makes the reference's tag name a manifest of its repository, where the
// tag does not exist yet or names it already; otherwise the error is *Exists.
// Of several that claim one tag at once exactly one succeeds, where the registry
// keeps If-None-Match, as Registry does, or lets no tag be changed.
//
// Others write regardless. There a claim writes within settle of having seen
// the tag free, and then waits that long before it reads back what came last
// (M. Fischer's algorithm, in L. Lamport, A fast mutual exclusion algorithm,
// 1987). A write that the network holds up for longer than that, after it was
// given up here, can still take the tag from one that was told it has it.
func (r *Reference) Claim(ctx context.Context, digest string) error {
	if r.Tag() == "" {
		return fmt.Errorf("%s has no tag to claim", r)
	}
	began := time.Now()
	by, err := r.holder(ctx)
	if err != nil || by == digest {
		return err
	}
	if by != "" {
		return &Exists{Reference: r.String(), Digest: by}
	}
	soon, cancel := context.WithDeadline(ctx, began.Add(settle))
	defer cancel()
	free := r.Expecting("")
	if err := free.SetTag(soon, digest); err != nil && !IsChanged(err) {
		return err
	}
	// The tag is there now: a registry that keeps conditions says so.
	if err := free.SetTag(soon, digest); !IsChanged(err) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(settle):
		}
	}
	if by, err = r.holder(ctx); err == nil && by != digest {
		err = &Exists{Reference: r.String(), Digest: by}
	}
	return err
}

// holder is the digest that the reference's tag has now, "" where there is no
// such tag.
func (r *Reference) holder(ctx context.Context) (string, error) {
	at, err := r.Resolve(ctx)
	var absent *NotFound
	if errors.As(err, &absent) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return at.Digest(), nil
}

// Expecting is r, but a tag is only written where it names the given digest
// until then, or nothing where that is "". The registry answers otherwise with
// an error for which IsChanged holds, where it keeps If-Match and
// If-None-Match, as Registry does; others write regardless.
func (r *Reference) Expecting(digest string) *Reference {
	at := *r
	at.transport, at.close = expecting{r.transport, digest}, func() error { return nil }
	return &at
}

// IsChanged says whether an error means that a tag did not name what was
// expected.
func IsChanged(err error) bool {
	var status *transport.Error
	return errors.As(err, &status) && status.StatusCode == http.StatusPreconditionFailed
}

type expecting struct {
	http.RoundTripper
	digest string
}

func (t expecting) RoundTrip(req *http.Request) (*http.Response, error) {
	if _, kind, target := split(req.URL.Path); req.Method == http.MethodPut && kind == "manifests" && tagPattern.MatchString(target) {
		req = req.Clone(req.Context())
		if t.digest == "" {
			req.Header.Set("If-None-Match", "*")
		} else {
			req.Header.Set("If-Match", `"`+t.digest+`"`)
		}
	}
	return t.RoundTripper.RoundTrip(req)
}

type rawManifest struct {
	data      []byte
	mediaType string
}

func (m rawManifest) RawManifest() ([]byte, error)        { return m.data, nil }
func (m rawManifest) MediaType() (types.MediaType, error) { return types.MediaType(m.mediaType), nil }

// Push writes an artifact to ref and returns ref with the digest in place of
// its tag.
func Push(ctx context.Context, ref string, a *Artifact) (string, error) {
	r, err := Open(ctx, ref)
	if err != nil {
		return "", err
	}
	defer r.Close()
	digest, err := r.Push(ctx, a)
	if err != nil {
		return "", err
	}
	at, err := r.At(digest)
	if err != nil {
		return "", err
	}
	return at.String(), nil
}

// Want is what a caller of Pull accepts. Zero fields are replaced by the
// limits below.
type Want struct {
	Type  string // artifactType; "" accepts any
	Files int    // most files
	Bytes int64  // most bytes of all files together
}

const (
	maxFiles = 64      // far above the files of any artifact of ours
	maxBytes = 1 << 30 // a few times the largest data set that Temper is for
)

// Pull reads the artifact that the reference names, into memory. Nothing is
// returned unless every size and digest is the promised one.
func (r *Reference) Pull(ctx context.Context, want Want) (*Artifact, error) {
	if want.Files == 0 {
		want.Files = maxFiles
	}
	if want.Bytes == 0 {
		want.Bytes = maxBytes
	}
	m, digest, err := r.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	at, err := r.At(digest)
	if err != nil {
		return nil, err
	}
	a, err := check(at.String(), m, want)
	if err != nil {
		return nil, err
	}
	a.Digest = digest
	puller, err := remote.NewPuller(at.Options(ctx)...)
	if err != nil {
		return nil, err
	}
	if m.Config.MediaType != ocispec.MediaTypeEmptyJSON {
		a.Config = &Config{MediaType: m.Config.MediaType}
		if a.Config.Data, err = at.blob(ctx, puller, m.Config); err != nil {
			return nil, err
		}
	}
	for i, d := range m.Layers {
		if a.Files[i].Data, err = at.blob(ctx, puller, d); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// Pull reads the artifact that ref names, into memory.
func Pull(ctx context.Context, ref string, want Want) (*Artifact, error) {
	r, err := Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return r.Pull(ctx, want)
}

// check refuses a manifest whose files are not wanted, before any is fetched.
func check(ref string, m *ocispec.Manifest, want Want) (*Artifact, error) {
	kind := m.ArtifactType
	if kind == "" {
		kind = m.Config.MediaType // the specification's default
	}
	if want.Type != "" && kind != want.Type {
		return nil, refuse(ref, "it is of type %.200q, where %q is needed", kind, want.Type)
	}
	if len(m.Layers) > want.Files {
		return nil, refuse(ref, "it has %d files: at most %d", len(m.Layers), want.Files)
	}
	a := &Artifact{Type: kind, Annotations: m.Annotations}
	if m.Subject != nil {
		a.Subject = m.Subject.Digest.String()
	}
	names := map[string]bool{}
	var total int64
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if !digestPattern.MatchString(d.Digest.String()) {
			return nil, refuse(ref, "a file has the digest %.100q: only sha256 is supported", d.Digest)
		}
		if d.Size < 0 || d.Size > want.Bytes-total {
			return nil, refuse(ref, "its files are larger than %d bytes together", want.Bytes)
		}
		total += d.Size
	}
	for _, d := range m.Layers {
		name := FileName(d)
		if err := checkName(name); err != nil {
			return nil, &Refused{Reference: ref, Err: err}
		}
		if names[name] {
			return nil, refuse(ref, "it has two files %q", name)
		}
		names[name] = true
		a.Files = append(a.Files, File{Name: name, MediaType: d.MediaType, Annotations: d.Annotations})
	}
	return a, nil
}

// Manifest reads the image manifest that the reference names, and returns it
// with its digest. Its form and the digest are checked, not what it lists.
func (r *Reference) Manifest(ctx context.Context) (*ocispec.Manifest, string, error) {
	data, mediaType, err := r.rawManifest(ctx)
	if err != nil {
		return nil, "", r.Explain(err)
	}
	digest := digestOf(sha256.Sum256(data)).String()
	if mediaType != ocispec.MediaTypeImageManifest && mediaType != string(types.DockerManifestSchema2) {
		return nil, "", refuse(r.String(), "media type %.100q: an artifact is an OCI image manifest", mediaType)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, "", refuse(r.String(), "its manifest is damaged: %v", err)
	}
	if m.SchemaVersion != 2 || m.MediaType != "" && m.MediaType != mediaType {
		return nil, "", refuse(r.String(), "its manifest says media type %.100q and schema version %d", m.MediaType, m.SchemaVersion)
	}
	return &m, digest, nil
}

func (r *Reference) rawManifest(ctx context.Context) (data []byte, mediaType string, err error) {
	err = r.retry(ctx, func() error {
		d, err := remote.Get(r.Name(), r.Options(ctx)...)
		if err == nil {
			data, mediaType = d.Manifest, string(d.MediaType)
		}
		return err
	})
	if err == nil && r.Digest() != "" && r.Digest() != digestOf(sha256.Sum256(data)).String() {
		err = refuse(r.String(), "the registry sent other content")
	}
	return data, mediaType, err
}

// Blob reads a blob of the repository and checks its size and digest. The
// caller has found d.Size acceptable.
func (r *Reference) Blob(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if !digestPattern.MatchString(d.Digest.String()) || d.Size < 0 {
		return nil, refuse(r.String(), "a file has the digest %.100q and %d bytes", d.Digest, d.Size)
	}
	puller, err := remote.NewPuller(r.Options(ctx)...)
	if err != nil {
		return nil, err
	}
	return r.blob(ctx, puller, d)
}

func (r *Reference) blob(ctx context.Context, puller *remote.Puller, d ocispec.Descriptor) ([]byte, error) {
	var data bytes.Buffer
	err := r.retry(ctx, func() error {
		data.Reset()
		layer, err := puller.Layer(ctx, r.repository.Digest(d.Digest.String()))
		if err != nil {
			return err
		}
		body, err := layer.Compressed()
		if err != nil {
			return err
		}
		defer body.Close()
		// Grown as it arrives: a descriptor's size alone reserves no memory.
		_, err = io.Copy(&data, io.LimitReader(body, min(d.Size, math.MaxInt64-1)+1))
		switch {
		case err != nil && interrupted(err):
			return err
		case err != nil: // the client's own check of the digest
			return refuse(r.String(), "file %s: %v", d.Digest, err)
		case int64(data.Len()) != d.Size:
			return refuse(r.String(), "file %s has not the %d bytes that its manifest says", d.Digest, d.Size)
		case digestOf(sha256.Sum256(data.Bytes())) != d.Digest:
			return refuse(r.String(), "file %s has other content than its digest says", d.Digest)
		}
		return nil
	})
	if err != nil {
		return nil, r.Explain(err)
	}
	return data.Bytes(), nil
}

// retry repeats what a broken connection interrupted: the client itself only
// retries up to the first byte of an answer.
func (r *Reference) retry(ctx context.Context, do func() error) error {
	wait := retryBackoff.Duration
	for try := 1; ; try++ {
		err := do()
		var refused *Refused
		if err == nil || try == retryBackoff.Steps || errors.As(err, &refused) || !cutShort(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = time.Duration(float64(wait) * retryBackoff.Factor)
	}
}

func cutShort(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, errStalled)
}

// maxReferrers is a few times what Temper attaches to a model.
const maxReferrers = 32

// Referrers returns the digests of the artifacts that say they are about the
// one that r names by digest, sorted. Nothing about them is verified.
func (r *Reference) Referrers(ctx context.Context) ([]string, error) {
	if r.Digest() == "" {
		return nil, fmt.Errorf("%s is not named by digest", r)
	}
	index, err := remote.Referrers(r.Name().Context().Digest(r.Digest()), r.Options(ctx)...)
	if err != nil {
		return nil, r.Explain(err)
	}
	list, err := index.IndexManifest()
	if err != nil {
		return nil, r.Explain(err)
	}
	if len(list.Manifests) > maxReferrers {
		return nil, refuse(r.String(), "%d artifacts refer to it: at most %d", len(list.Manifests), maxReferrers)
	}
	var digests []string
	for _, d := range list.Manifests {
		digests = append(digests, d.Digest.String())
	}
	slices.Sort(digests)
	return slices.Compact(digests), nil
}
