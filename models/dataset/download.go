package dataset

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Unavailable is a server that could not be reached or went on failing: worth
// trying again later, unlike all other errors of this package.
type Unavailable struct {
	URL string // without credentials or query
	Err error
}

func (e *Unavailable) Error() string { return fmt.Sprintf("dataset %s: %v", e.URL, e.Err) }
func (e *Unavailable) Unwrap() error { return e.Err }

const (
	// tries bounds the requests for one file, the first included.
	tries = 4
	// fileTimeout bounds one request with its body: MaxFile at 2 MiB/s.
	fileTimeout = 10 * time.Minute
	// maxRedirects is enough for an http to https and a mirror redirect.
	maxRedirects = 5
)

// defaultClient gives up on a silent server early, and on a slow one at
// fileTimeout.
var defaultClient = &http.Client{
	Transport: &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: 30 * time.Second,
		DisableCompression:    true, // .gz files are to arrive as they are
	},
	CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= maxRedirects {
			return fmt.Errorf("%w: more than %d", errRedirect, maxRedirects)
		}
		if via[0].URL.Scheme == "https" && req.URL.Scheme != "https" {
			return fmt.Errorf("%w: from https to http", errRedirect)
		}
		req.Header.Del("Referer") // it would carry a token in the query to another host
		return nil
	},
}

// errRedirect is a redirect that no second try would make better.
var errRedirect = errors.New("refused a redirect")

func isURL(ref string) bool {
	return strings.HasPrefix(ref, "http://") || strings.HasPrefix(ref, "https://")
}

// public is a reference as errors and reports may show it: without user,
// password and query, which may be secrets.
func public(ref string) string {
	if !isURL(ref) {
		return ref
	}
	u, err := url.Parse(ref)
	if err != nil {
		return "URL"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// download opens the folder behind a URL through the cache. The cache entry is
// named by the pinned digest and is checked against it each time it is read;
// files arrive in a folder of their own, which takes the entry's place only
// when its digest is right.
func download(ctx context.Context, ref string, o options) (*Splits, error) {
	name := public(ref)
	base, err := url.Parse(ref)
	if err != nil || base.Host == "" {
		return nil, fmt.Errorf("dataset %s: not a URL", name)
	}
	cache := o.cache
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("dataset %s: no folder for downloads: %w", name, err)
		}
		cache = filepath.Join(user, "temper", "datasets")
	}
	entry := filepath.Join(cache, strings.TrimPrefix(o.digest, "sha256:"))
	if o.digest != "" {
		if splits, err := readFolder(ctx, name, os.DirFS(entry), o); err == nil && splits.Digest() == o.digest {
			return splits, nil
		}
	}
	if err := os.MkdirAll(cache, 0o777); err != nil {
		return nil, fmt.Errorf("dataset %s: cache: %w", name, err)
	}
	dir, err := os.MkdirTemp(cache, ".download-*")
	if err != nil {
		return nil, fmt.Errorf("dataset %s: cache: %w", name, err)
	}
	defer os.RemoveAll(dir)
	if err := fetchFolder(ctx, base, dir, o); err != nil {
		return nil, err
	}
	splits, err := readFolder(ctx, name, os.DirFS(dir), o)
	if err != nil {
		return nil, err
	}
	got := splits.Digest()
	if o.digest == "" {
		return nil, fmt.Errorf("dataset %s: no digest is pinned, so its content could change unseen; to accept what is there now, use %s#%s", name, name, got)
	}
	if got != o.digest {
		return nil, fmt.Errorf("dataset %s: its digest is %s, pinned is %s", name, got, o.digest)
	}
	if err := replaceFolder(dir, entry); err != nil {
		return nil, fmt.Errorf("dataset %s: cache: %w", name, err)
	}
	return splits, nil
}

// replaceFolder puts dir in the place of entry. Another process may do the
// same at the same time: both hold the same content, so either may win.
func replaceFolder(dir, entry string) error {
	err := os.Rename(dir, entry)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	// The entry that is there could not be read or did not have its digest.
	if err := os.RemoveAll(entry); err != nil {
		return err
	}
	if err := os.Rename(dir, entry); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// The names under which files are looked for at a URL, which cannot be listed.
var (
	labelForms = []string{"idx1-ubyte"}
	imageForms = []string{"idx3-ubyte", "idx4-ubyte", "idx3-float", "idx4-float"}
)

// fetchFolder downloads what base holds of a data set into dir.
func fetchFolder(ctx context.Context, base *url.URL, dir string, o options) error {
	found := false
	var refused error // the first, for a server that refuses everything
	for _, p := range parts {
		for _, prefix := range p.prefixes {
			ok, err := fetchAny(ctx, base, dir, prefix+"-labels-", labelForms, o)
			if errors.Is(err, errRefused) {
				if refused == nil {
					refused = err
				}
				continue
			}
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			found = true
			if _, err := fetchAny(ctx, base, dir, prefix+"-images-", imageForms, o); err != nil {
				return err
			}
			break
		}
	}
	if !found {
		if refused != nil {
			return refused
		}
		return fmt.Errorf("dataset %s: no data set there: expected files such as train-labels-idx1-ubyte.gz and t10k-labels-idx1-ubyte.gz", public(base.String()))
	}
	if _, err := fetch(ctx, base, dir, classesFile, maxClassesFile, o); !errors.Is(err, errRefused) {
		return err
	}
	return nil
}

// errRefused is 403 Forbidden or 410 Gone. Object stores that do not let their
// folders be listed answer so where there is no file, so it is an error only
// where the file has to be there.
var errRefused = errors.New("the server answered")

// fetchAny downloads the first form of a file that exists. The error is
// errRefused where there is none and the server refused one.
func fetchAny(ctx context.Context, base *url.URL, dir, stem string, forms []string, o options) (bool, error) {
	var refused error
	for _, form := range forms {
		for _, suffix := range []string{".gz", ""} {
			ok, err := fetch(ctx, base, dir, stem+form+suffix, MaxFile, o)
			switch {
			case errors.Is(err, errRefused):
				refused = err
			case ok || err != nil:
				return ok, err
			}
		}
	}
	return false, refused
}

// fetch downloads one file; false where the server says that there is none.
// Failures that may pass are tried again, with growing pauses.
func fetch(ctx context.Context, base *url.URL, dir, name string, limit int64, o options) (bool, error) {
	file := base.JoinPath(name)
	pause := o.pause
	for try := 1; ; try++ {
		found, retry, err := fetchOnce(ctx, file, filepath.Join(dir, name), limit, o.client)
		switch {
		case err == nil:
			return found, nil
		case ctx.Err() != nil:
			return false, fmt.Errorf("dataset %s: %w", public(file.String()), ctx.Err())
		case !retry:
			return false, fmt.Errorf("dataset %s: %w", public(file.String()), err)
		case try == tries:
			return false, &Unavailable{public(file.String()), fmt.Errorf("%w (tried %d times)", err, tries)}
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause *= 2
	}
}

func fetchOnce(ctx context.Context, file *url.URL, path string, limit int64, client *http.Client) (found, retry bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, fileTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, file.String(), nil)
	if err != nil {
		return false, false, errors.New("not a URL") // err would repeat it, with its secrets
	}
	resp, err := client.Do(req)
	if err != nil {
		if wrapped := (*url.Error)(nil); errors.As(err, &wrapped) {
			err = wrapped.Err // without the URL and its secrets
		}
		certificate := (*tls.CertificateVerificationError)(nil)
		return false, !errors.Is(err, errRedirect) && !errors.As(err, &certificate), err
	}
	defer resp.Body.Close()
	switch code := resp.StatusCode; {
	case code == http.StatusNotFound:
		return false, false, nil
	case code == http.StatusForbidden || code == http.StatusGone:
		return false, false, fmt.Errorf("%w %s", errRefused, resp.Status)
	case code == http.StatusTooManyRequests || code >= 500:
		return false, true, fmt.Errorf("the server answered %s", resp.Status)
	case code != http.StatusOK:
		return false, false, fmt.Errorf("the server answered %s", resp.Status)
	case resp.ContentLength > limit:
		return false, false, fmt.Errorf("%d bytes: at most %d", resp.ContentLength, limit)
	}
	var n int64
	var reading error
	staged, err := stageFile(path, func(w io.Writer) error {
		body := &countingReader{r: io.LimitReader(resp.Body, limit+1)}
		_, err := io.Copy(w, body)
		n, reading = body.n, body.err
		return err
	})
	switch {
	case err != nil:
		return false, reading != nil, err // a disk that fails is not tried again, a connection is
	case n > limit:
		staged.discard()
		return false, false, fmt.Errorf("more than %d bytes", limit)
	}
	return true, false, staged.commit()
}

// countingReader remembers how much was read and what ended it, so that a
// broken connection can be told from a full disk.
type countingReader struct {
	r   io.Reader
	n   int64
	err error
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if err != nil && err != io.EOF {
		c.err = err
	}
	return n, err
}
