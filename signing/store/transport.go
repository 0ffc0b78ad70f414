package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/net/publicsuffix"
)

// Bounds on requests to a registry.
const (
	// dialTimeout is generous for a registry in another continent.
	dialTimeout = 5 * time.Second
	// maxManifest is what the OCI distribution specification asks registries
	// to accept at least; no manifest of ours is above a few kilobytes.
	maxManifest = 4 << 20
)

// stallTimeout is how long a registry may send nothing, before and during its
// answer. A variable for tests only.
var stallTimeout = 30 * time.Second

// retryBackoff: three tries, 0.2 and 0.6 seconds apart. What takes longer to
// recover is retried by whoever runs the step. A variable for tests only.
var retryBackoff = remote.Backoff{Duration: 200 * time.Millisecond, Factor: 3, Jitter: 0.1, Steps: 3}

var errStalled = errors.New("the registry stopped sending")

type tooLargeError struct{ limit int64 }

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("the registry's answer is larger than %d bytes", e.limit)
}

// sharedTransport keeps connections between references to one registry.
var sharedTransport = sync.OnceValue(func() http.RoundTripper {
	t := remote.DefaultTransport.(*http.Transport).Clone()
	t.DialContext = (&net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}).DialContext
	return &boundedTransport{inner: t}
})

// boundedTransport bounds how long an answer stalls, and how large it is where
// it is not a blob: blobs are bounded by their descriptor.
type boundedTransport struct{ inner http.RoundTripper }

func (t *boundedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	watch := time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	if req.Body != nil && req.Body != http.NoBody {
		body := *req
		body.Body = &watched{ReadCloser: req.Body, ctx: ctx, watch: watch}
		req = &body
	}
	resp, err := t.inner.RoundTrip(req.WithContext(ctx))
	if err != nil {
		watch.Stop()
		cancel(nil)
		if errors.Is(context.Cause(ctx), errStalled) {
			err = fmt.Errorf("%w for %v", errStalled, stallTimeout)
		}
		return nil, err
	}
	if err := checkRealm(req, resp); err != nil {
		watch.Stop()
		resp.Body.Close()
		cancel(nil)
		return nil, err
	}
	watch.Reset(stallTimeout)
	body := &watched{ReadCloser: resp.Body, ctx: ctx, watch: watch, done: func() { watch.Stop(); cancel(nil) }}
	if !forBlob(req) {
		body.limited, body.left = true, maxManifest
	}
	resp.Body = body
	return resp, nil
}

var realmPattern = regexp.MustCompile(`(?i)\brealm="?([^",\s]+)`)

// checkRealm refuses a registry that wants its credentials sent somewhere else:
// the client would send them. A realm is on the registry's own host, or below
// the same registered domain, as auth.docker.io is for index.docker.io.
func checkRealm(req *http.Request, resp *http.Response) error {
	if resp.StatusCode != http.StatusUnauthorized {
		return nil
	}
	for _, challenge := range resp.Header.Values("Www-Authenticate") {
		for _, m := range realmPattern.FindAllStringSubmatch(challenge, -1) {
			realm, err := url.Parse(m[1])
			if err != nil || realm.Host == "" && strings.Contains(strings.ToLower(challenge), "bearer") {
				return &Refused{Reference: req.URL.Host, Err: fmt.Errorf("it asks for a token from %.100q", m[1])}
			}
			if realm.Host != "" && !related(req.URL, realm) {
				return &Refused{Reference: req.URL.Host, Err: fmt.Errorf("it wants credentials to be sent to %.100s: name the registry by its own host", realm.Host)}
			}
		}
	}
	return nil
}

// related tells whether two URLs are of one host, or of one registered domain
// and both safe from readers on the way.
func related(a, b *url.URL) bool {
	if a.Host == b.Host && a.Scheme == b.Scheme {
		return true
	}
	one, err := publicsuffix.EffectiveTLDPlusOne(a.Hostname())
	if err != nil || net.ParseIP(a.Hostname()) != nil || net.ParseIP(b.Hostname()) != nil {
		return false
	}
	other, err := publicsuffix.EffectiveTLDPlusOne(b.Hostname())
	return err == nil && one == other && a.Scheme == "https" && b.Scheme == "https"
}

// blobURL matches the path of a blob: a repository may itself be called x/blobs/y.
var blobURL = regexp.MustCompile(`^/v2/.+/blobs/[^/:]+:[^/]+$`)

// forBlob tells whether a blob was asked for: a registry may redirect to where
// it keeps its blobs, at any path.
func forBlob(req *http.Request) bool {
	for req.Response != nil && req.Response.Request != nil {
		req = req.Response.Request
	}
	return blobURL.MatchString(req.URL.Path)
}

// watched is a request's or answer's body that pushes the stall timer on.
type watched struct {
	io.ReadCloser
	ctx     context.Context
	watch   *time.Timer
	done    func()
	limited bool
	left    int64
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.ReadCloser.Read(p)
	if n > 0 {
		w.watch.Reset(stallTimeout)
	}
	if w.limited {
		if w.left -= int64(n); w.left < 0 {
			return 0, &tooLargeError{limit: maxManifest}
		}
	}
	if err != nil && err != io.EOF && errors.Is(context.Cause(w.ctx), errStalled) {
		err = fmt.Errorf("%w for %v", errStalled, stallTimeout)
	}
	return n, err
}

func (w *watched) Close() error {
	if w.done != nil {
		defer w.done()
	}
	return w.ReadCloser.Close()
}
