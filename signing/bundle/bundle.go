// Package bundle carries a model over a gap: the model, its signatures, its
// attestations and what is signed about it, as one archive, an OCI image
// layout in a tar.
package bundle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

const (
	// maxBlobs bounds the content of a bundle: the layers of a model and of
	// what refers to it.
	maxBlobs = 1024
	// maxBytes is a few times the largest model that Temper is for, twice: as
	// ModelPack and as modelcar.
	maxBytes = 2 << 30
	// modelTag names the model in a bundle.
	modelTag = "model"
)

// suffixes are those of the tags under which cosign keeps signatures and
// attestations.
var suffixes = []string{".sig", ".att"}

// content is what a bundle holds.
type content struct {
	manifests []ocispec.Descriptor // the model first, with their tags as annotation
	blobs     map[string][]byte    // by digest, manifests included
	bytes     int64
}

// Write verifies the model that ref names and writes it to w, with everything
// about it that the policy's keys signed. The same content gives the same
// bytes. It returns the model's digest.
func Write(ctx context.Context, w io.Writer, ref string, p verify.Policy) (string, error) {
	v, err := verify.Verify(ctx, ref, p)
	if err != nil {
		return "", err
	}
	r, err := store.Open(ctx, v.Reference)
	if err != nil {
		return "", err
	}
	defer r.Close()
	c := &content{blobs: map[string][]byte{}}
	if err := c.add(ctx, r, modelTag); err != nil {
		return "", err
	}
	about, err := signedReferrers(ctx, r, p)
	if err != nil {
		return "", err
	}
	for _, digest := range append([]string{v.Digest}, about...) {
		at, err := r.At(digest)
		if err != nil {
			return "", err
		}
		if digest != v.Digest {
			if err := c.add(ctx, at, ""); err != nil {
				return "", err
			}
		}
		for _, tag := range attached(digest) {
			at, err := r.At(tag)
			if err != nil {
				return "", err
			}
			var absent *store.NotFound
			if err := c.add(ctx, at, tag); err != nil && !errors.As(err, &absent) {
				return "", err
			}
		}
	}
	return v.Digest, c.write(w)
}

// attached are the tags of an artifact's signatures and attestations.
func attached(digest string) (tags []string) {
	for _, s := range suffixes {
		tags = append(tags, strings.Replace(digest, ":", "-", 1)+s)
	}
	return tags
}

// signedReferrers are the digests of the artifacts about the model that one of
// the policy's keys signed, such as its modelcar, sorted.
func signedReferrers(ctx context.Context, r *store.Reference, p verify.Policy) ([]string, error) {
	referrers, err := r.Referrers(ctx)
	if err != nil {
		return nil, err
	}
	var signed []string
	for _, digest := range referrers {
		at, err := r.At(digest)
		if err != nil {
			return nil, err
		}
		var refused *store.Refused
		_, err = verify.Verify(ctx, at.String(), verify.Policy{Keys: p.Keys, Threshold: p.Threshold, Repositories: p.Repositories, Revoked: p.Revoked})
		switch {
		case err == nil:
			signed = append(signed, digest)
		case !errors.As(err, &refused):
			return nil, err
		}
	}
	return signed, nil
}

// add takes an artifact into the content.
func (c *content) add(ctx context.Context, r *store.Reference, tag string) error {
	m, digest, err := r.Manifest(ctx)
	if err != nil {
		return err
	}
	at, err := r.At(digest)
	if err != nil {
		return err
	}
	raw, err := remote.Get(at.Name(), at.Options(ctx)...)
	if err != nil {
		return at.Explain(err)
	}
	if raw.Digest.String() != digest {
		return &store.Refused{Reference: at.String(), Err: errors.New("the registry sent other content")}
	}
	d := ocispec.Descriptor{MediaType: string(raw.MediaType), Digest: digestOf(digest), Size: int64(len(raw.Manifest)), ArtifactType: m.ArtifactType}
	if tag != "" {
		d.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	}
	c.manifests = append(c.manifests, d)
	c.blobs[digest] = raw.Manifest
	for _, blob := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if _, ok := c.blobs[blob.Digest.String()]; ok {
			continue
		}
		if len(c.blobs) >= maxBlobs || blob.Size < 0 || blob.Size > maxBytes-c.bytes {
			return &store.Refused{Reference: at.String(), Err: fmt.Errorf("a bundle holds at most %d blobs of %d bytes together", maxBlobs, int64(maxBytes))}
		}
		c.bytes += blob.Size
		data, err := at.Blob(ctx, blob)
		if err != nil {
			return err
		}
		c.blobs[blob.Digest.String()] = data
	}
	return nil
}

// write makes the archive.
func (c *content) write(w io.Writer) error {
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: c.manifests})
	if err != nil {
		return err
	}
	layout, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	files := map[string][]byte{ocispec.ImageLayoutFile: layout, ocispec.ImageIndexFile: index}
	for digest, data := range c.blobs {
		files[blobPrefix+strings.TrimPrefix(digest, "sha256:")] = data
	}
	return writeTar(w, files)
}

// Load reads an archive, verifies the model in it, and only then copies it to
// the repository of ref, with what is signed about it. A tag of ref is set
// last. The signatures are for the repository that the model came from: the
// policy must allow that one (see verify.Policy.Repositories). It returns the
// model as verified in its new place.
func Load(ctx context.Context, archive io.Reader, ref string, p verify.Policy) (*verify.Verified, error) {
	dir, err := os.MkdirTemp("", "temper-bundle-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := readTar(archive, dir); err != nil {
		return nil, &store.Refused{Reference: "bundle", Err: err}
	}
	from, err := store.Open(ctx, "oci:"+dir)
	if err != nil {
		return nil, named(&store.Refused{Reference: "bundle", Err: err}, dir)
	}
	defer from.Close()
	model, err := from.At(modelTag)
	if err != nil {
		return nil, err
	}
	v, err := verify.Verify(ctx, model.String(), p)
	var absent *store.NotFound
	if errors.As(err, &absent) {
		err = &store.Refused{Reference: "bundle", Err: errors.New("its index names no model")}
	}
	if err != nil {
		return nil, named(err, dir)
	}
	to, err := store.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer to.Close()
	if want := to.Digest(); want != "" && want != v.Digest {
		return nil, &store.Refused{Reference: to.String(), Err: fmt.Errorf("the bundle holds %s", v.Digest)}
	}
	if model, err = from.At(v.Digest); err != nil { // what was verified is what is copied
		return nil, err
	}
	about, err := signedReferrers(ctx, model, p)
	if err != nil {
		return nil, named(err, dir)
	}
	// Signatures come before what they are about: nobody sees it unsigned.
	for _, digest := range append(about, v.Digest) {
		for _, tag := range append(attached(digest), digest) {
			if err := copyTo(ctx, to, from, tag); err != nil {
				return nil, named(err, dir)
			}
		}
	}
	at, err := to.At(v.Digest)
	if err != nil {
		return nil, err
	}
	if v, err = verify.Verify(ctx, at.String(), p); err != nil {
		return nil, err
	}
	if to.Tag() != "" {
		err = to.SetTag(ctx, v.Digest)
	}
	return v, err
}

// named hides the folder that the archive was unpacked to.
func named(err error, dir string) error {
	var refused *store.Refused
	if errors.As(err, &refused) {
		hide := func(text string) string { return strings.ReplaceAll(text, "oci:"+dir, "bundle") }
		return &store.Refused{Reference: hide(refused.Reference), Err: errors.New(hide(refused.Err.Error()))}
	}
	return fmt.Errorf("bundle: %w", err)
}

// copyTo copies what a tag or digest names, if it is there, under the same
// name.
func copyTo(ctx context.Context, to, from *store.Reference, target string) error {
	source, err := from.At(target)
	if err != nil {
		return err
	}
	image, err := remote.Image(source.Name(), source.Options(ctx)...)
	var absent *store.NotFound
	if err = source.Explain(err); errors.As(err, &absent) && source.Tag() != "" {
		return nil
	}
	if err != nil {
		return err
	}
	if err := valid(image, source); err != nil {
		return err
	}
	at, err := to.At(target)
	if err != nil {
		return err
	}
	return at.Explain(remote.Write(at.Name(), image, at.Options(ctx)...))
}

// valid reads every blob once: the content is that of its digest.
func valid(image v1.Image, source *store.Reference) error {
	layers, err := image.Layers()
	if err != nil {
		return source.Explain(err)
	}
	for _, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			return source.Explain(err)
		}
		_, err = io.Copy(io.Discard, r)
		r.Close()
		if err != nil {
			return &store.Refused{Reference: source.String(), Err: err}
		}
	}
	return nil
}

// Sniff says whether data may be the start of a bundle, rather than something
// compressed or another format.
func Sniff(start []byte) bool {
	return len(start) >= 512 && bytes.Equal(start[257:262], []byte("ustar"))
}
