// Package store keeps artifacts in OCI registries and in OCI image layout
// folders, and names them by digest.
//
// A reference is one of
//
//	HOST/REPOSITORY[:TAG|@sha256:...]   a registry
//	oci:DIR[:TAG|@sha256:...]           an OCI image layout folder
//
// There is one mechanism for both: a folder is opened through a registry in
// this process (see Registry), so that everything above speaks to a registry
// only. A tag is for people: resolve it once, and use the digest from then on.
package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// folderRepository is the repository, in the registry that a layout folder is
// opened through, that holds the folder's entries.
const folderRepository = "layout"

// maxReference is well above the longest valid reference (a 255-byte name, a
// 128-byte tag or a digest, and a path).
const maxReference = 4096 + 512

var (
	digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	tagPattern    = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
)

// Reference is an opened place in a registry or layout folder: a repository,
// and a tag or digest in it. Close it when done.
type Reference struct {
	repository name.Repository
	target     string // a tag, a digest, or "" where neither was written
	folder     string // the layout folder, "" for a registry
	transport  http.RoundTripper
	close      func() error
}

// Open parses a reference and opens its folder, where it is one; the folder is
// created by the first push. It does not contact a registry yet.
func Open(ctx context.Context, ref string) (*Reference, error) {
	r, err := parse(ref)
	if err != nil {
		return nil, err
	}
	if r.folder == "" {
		r.transport, r.close = sharedTransport(), func() error { return nil }
		return r, nil
	}
	registry, err := newRegistry(r.folder)
	if err != nil {
		return nil, err
	}
	r.transport, r.close = registry.inProcess()
	return r, nil
}

// parse reads a reference without opening anything.
func parse(ref string) (*Reference, error) {
	if len(ref) > maxReference {
		return nil, fmt.Errorf("reference of %d bytes: at most %d", len(ref), maxReference)
	}
	if strings.ContainsFunc(ref, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		return nil, fmt.Errorf("reference %q holds a control character", redact(ref))
	}
	r := &Reference{}
	rest, isFolder := strings.CutPrefix(ref, "oci:")
	if at := strings.LastIndexByte(rest, '@'); at >= 0 && (!isFolder || strings.HasPrefix(rest[at+1:], "sha256:")) {
		if digest := rest[at+1:]; digestPattern.MatchString(digest) {
			rest, r.target = rest[:at], digest
		} else if strings.HasPrefix(digest, "sha256:") {
			return nil, fmt.Errorf("reference %q: a digest is sha256: and 64 lower-case hex digits", redact(ref))
		}
	}
	if !isFolder && strings.Contains(rest, "@") {
		return nil, fmt.Errorf("reference %q: only a digest, sha256:..., follows @; credentials do not belong in a reference: use docker login", redact(ref))
	}
	if colon := strings.LastIndexByte(rest, ':'); colon > strings.LastIndexAny(rest, `/\`) && !(isFolder && colon == 1 && filepath.VolumeName(rest) != "") {
		tag := rest[colon+1:]
		if !tagPattern.MatchString(tag) {
			return nil, fmt.Errorf("reference %q: tag %q: a tag is up to 128 letters, digits, '_', '.' and '-'", ref, tag)
		}
		if r.target == "" {
			r.target = tag // a digest beside a tag wins: it says more
		}
		rest = rest[:colon]
	}
	if isFolder {
		if rest == "" {
			return nil, fmt.Errorf("reference %q names no folder: write oci:DIR or oci:DIR:TAG", ref)
		}
		r.folder = filepath.Clean(rest)
		if base := filepath.Base(r.folder); strings.Contains(base, ":") {
			return nil, fmt.Errorf("reference %q: a folder's name holds no ':', which begins the tag: %q", ref, base)
		}
		// The host is never dialled: "localhost" is what a signature over the
		// folder's content says its repository is (see Identity).
		repository, err := name.NewRepository("localhost/"+folderRepository, name.Insecure)
		if err != nil {
			return nil, err
		}
		r.repository = repository
		return r, nil
	}
	if strings.Contains(rest, "://") {
		return nil, fmt.Errorf("reference %q is a URL: write HOST/REPOSITORY without the scheme", redact(ref))
	}
	host, _, ok := strings.Cut(rest, "/")
	if !ok || !strings.ContainsAny(host, ".:") && host != "localhost" {
		return nil, fmt.Errorf("reference %q names no registry: write HOST/REPOSITORY[:TAG], such as localhost:5000/mnist:v1, or oci:DIR[:TAG] for a folder", redact(ref))
	}
	var options []name.Option
	if inCluster(host) {
		options = append(options, name.Insecure)
	}
	repository, err := name.NewRepository(rest, options...)
	if err != nil {
		return nil, fmt.Errorf("reference %q: %w", ref, err)
	}
	r.repository = repository
	return r, nil
}

// redact hides what stands before an @ that no digest follows: it may be a
// password.
func redact(ref string) string {
	at := strings.LastIndexByte(ref, '@')
	if at >= 0 && strings.HasPrefix(ref[at+1:], "sha256:") {
		at = strings.LastIndexByte(ref[:at], '@')
	}
	if at < 0 {
		return ref
	}
	return "***" + ref[at:]
}

// Close releases what Open opened.
func (r *Reference) Close() error { return r.close() }

// At is another tag or digest of the same repository; "" for neither. It is
// open as long as r is, and need not be closed.
func (r *Reference) At(target string) (*Reference, error) {
	if target != "" && !tagPattern.MatchString(target) && !digestPattern.MatchString(target) {
		return nil, fmt.Errorf("%s: %q is neither a tag nor a digest", r.Repository(), target)
	}
	at := *r
	at.target, at.close = target, func() error { return nil }
	return &at, nil
}

// String is the reference as a user writes it.
func (r *Reference) String() string {
	switch {
	case r.target == "":
		return r.Repository()
	case r.Digest() != "":
		return r.Repository() + "@" + r.target
	}
	return r.Repository() + ":" + r.target
}

// Repository is the reference without tag and digest.
func (r *Reference) Repository() string {
	if r.folder != "" {
		return "oci:" + r.folder
	}
	return r.repository.Name()
}

// Digest is the digest in the reference, or "".
func (r *Reference) Digest() string {
	if digestPattern.MatchString(r.target) {
		return r.target
	}
	return ""
}

// Tag is the tag in the reference, or "".
func (r *Reference) Tag() string {
	if r.Digest() != "" {
		return ""
	}
	return r.target
}

// Address is where the reference's registry is: host and port, or oci:DIR.
func (r *Reference) Address() string {
	if r.folder != "" {
		return "oci:" + r.folder
	}
	return r.repository.RegistryStr()
}

// Identity is the repository's name in a signature ("docker-reference"): the
// host and repository, with the port left out where the host is this machine.
// A loopback port is chosen at random and a folder is moved around, so neither
// says what a repository is; a folder is always localhost/layout.
func (r *Reference) Identity() string { return identity(r.repository) }

// Identity is Reference.Identity of a repository's name as it stands in a
// signature, such as one that the cosign command made; "" for a name that is
// none.
func Identity(repository string) string {
	repo, err := name.NewRepository(repository)
	if err != nil {
		return ""
	}
	return identity(repo)
}

func identity(repo name.Repository) string {
	host := repo.RegistryStr()
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if isLoopback(host) {
		return "localhost/" + repo.RepositoryStr()
	}
	return repo.Name()
}

func isLoopback(host string) bool {
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// inCluster says whether a host is a Kubernetes Service by its full name. Such a
// registry may be without TLS: it is asked by HTTPS first and then by HTTP, as
// one on this machine is.
func inCluster(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.HasSuffix(host, ".svc.cluster.local")
}

// Name is the reference for the functions of go-containerregistry and cosign;
// use it together with Options.
func (r *Reference) Name() name.Reference {
	if digest := r.Digest(); digest != "" {
		return r.repository.Digest(digest)
	}
	if r.target == "" {
		return r.repository.Tag("latest")
	}
	return r.repository.Tag(r.target)
}

// Options are the options of every request to the reference's registry:
// credentials, bounded retries and bounded answers.
func (r *Reference) Options(ctx context.Context) []remote.Option {
	options := []remote.Option{
		remote.WithContext(ctx),
		remote.WithTransport(r.transport),
		remote.WithRetryBackoff(retryBackoff),
		remote.WithUserAgent("temper"),
	}
	if r.folder == "" {
		options = append(options, remote.WithAuthFromKeychain(authn.DefaultKeychain))
	}
	return options
}

// Resolve returns the reference with the digest that its tag has now. It fails
// where the digest or tag does not exist.
func (r *Reference) Resolve(ctx context.Context) (*Reference, error) {
	if r.target == "" {
		return nil, fmt.Errorf("%s names neither tag nor digest: add :TAG or @sha256:...", r)
	}
	data, _, err := r.rawManifest(ctx)
	if err != nil {
		return nil, r.Explain(err)
	}
	return r.At(digestOf(sha256.Sum256(data)).String())
}

// Pin makes the reference one by digest, that which its tag has now.
func (r *Reference) Pin(ctx context.Context) error {
	at, err := r.Resolve(ctx)
	if err == nil {
		r.target = at.target
	}
	return err
}

// Tags lists the repository's tags, sorted; none where it does not exist.
func (r *Reference) Tags(ctx context.Context) ([]string, error) {
	tags, err := remote.List(r.repository, r.Options(ctx)...)
	if err = r.Explain(err); err != nil {
		var absent *NotFound
		if errors.As(err, &absent) {
			return nil, nil
		}
		return nil, err
	}
	return tags, nil
}

// Resolve returns ref with the digest that its tag has now.
func Resolve(ctx context.Context, ref string) (string, error) {
	r, err := Open(ctx, ref)
	if err != nil {
		return "", err
	}
	defer r.Close()
	at, err := r.Resolve(ctx)
	if err != nil {
		return "", err
	}
	return at.String(), nil
}
