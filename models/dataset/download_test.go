package dataset

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// server serves the folder dir below /digits; get may answer in its place, by
// returning true.
func server(t *testing.T, dir string, get func(w http.ResponseWriter, r *http.Request) bool) (base string, requests *atomic.Int64) {
	t.Helper()
	requests = new(atomic.Int64)
	files := http.StripPrefix("/digits", http.FileServer(http.Dir(dir)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if get == nil || !get(w, r) {
			files.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s.URL + "/digits", requests
}

// quick makes the pauses between tries too short to notice.
func quick(o *options) { o.pause = time.Millisecond }

func entries(t *testing.T, cache string) []string {
	t.Helper()
	dir, err := os.ReadDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range dir {
		names = append(names, e.Name())
	}
	return names
}

func TestDownload(t *testing.T) {
	for _, floats := range []bool{false, true} {
		want := sample(floats)
		base, requests := server(t, mustWrite(t, want), nil)
		cache := t.TempDir()

		// Without a pin the error says what to pin, and nothing is kept.
		_, err := Open(t.Context(), base, Cache(cache), quick)
		if err == nil || !strings.Contains(err.Error(), base+"#"+want.Digest()) {
			t.Errorf("error %v", err)
		}
		if left := entries(t, cache); len(left) > 0 {
			t.Errorf("%v is in the cache", left)
		}

		for range 2 { // the second time from the cache
			got, err := Open(t.Context(), base+"#"+want.Digest(), Cache(cache), quick)
			if err != nil {
				t.Fatal(err)
			}
			if got.Digest() != want.Digest() || got.Validation.Len() != 4 || got.Name != base {
				t.Errorf("read %+v", got)
			}
			requests.Store(0)
		}
		if n := requests.Load(); n > 0 {
			t.Errorf("%d requests for what is in the cache", n)
		}
		if left := entries(t, cache); len(left) != 1 || "sha256:"+left[0] != want.Digest() {
			t.Errorf("%v is in the cache", left)
		}
	}
}

func TestDownloadOfGzipFiles(t *testing.T) {
	want := sample(false)
	dir := mustWrite(t, want)
	for _, name := range entries(t, dir) {
		if name == classesFile {
			continue
		}
		path := filepath.Join(dir, name)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		z.Write(data)
		z.Close()
		if err := errors.Join(os.Remove(path), os.WriteFile(path+".gz", packed.Bytes(), 0o666)); err != nil {
			t.Fatal(err)
		}
	}
	base, _ := server(t, dir, nil)
	if _, err := Open(t.Context(), base, Pin(want.Digest()), Cache(t.TempDir()), quick); err != nil {
		t.Fatal(err)
	}
}

// Whatever arrives, the cache keeps what it had, and never takes what it did
// not ask for.
func TestBadDownloadNeverReplacesTheCache(t *testing.T) {
	good := sample(false)
	dir := mustWrite(t, good)
	other := sample(false)
	other.Test.Bytes[0]++
	otherDir := mustWrite(t, other)
	cut := func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/t10k-images-idx4-ubyte") {
			return false
		}
		w.Header().Set("Content-Length", "88")
		w.Write([]byte("\x00\x00\x08\x04\x00\x00\x00\x06"))
		return true
	}
	short := func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/t10k-images-idx4-ubyte") {
			return false
		}
		w.Write([]byte("\x00\x00\x08\x04\x00\x00\x00\x06"))
		return true
	}
	for name, c := range map[string]struct {
		dir  string
		get  func(http.ResponseWriter, *http.Request) bool
		want string
	}{
		"connection cut": {dir, cut, "unexpected EOF (tried 4 times)"},
		"file cut":       {dir, short, "truncated"},
		"other content":  {otherDir, nil, "its digest is " + other.Digest() + ", pinned is " + good.Digest()},
		"part is missing": {dir, func(w http.ResponseWriter, r *http.Request) bool {
			return !strings.Contains(r.URL.Path, "/train") && notFound(w)
		}, "no test images"},
		"nothing is there": {dir, func(w http.ResponseWriter, r *http.Request) bool { return notFound(w) }, "no data set there"},
	} {
		t.Run(name, func(t *testing.T) {
			cache := t.TempDir()
			// Another data set is in the cache; the pinned one is there, but damaged.
			broken := filepath.Join(cache, strings.TrimPrefix(good.Digest(), "sha256:"))
			whole := filepath.Join(cache, strings.TrimPrefix(other.Digest(), "sha256:"))
			if err := errors.Join(os.CopyFS(whole, os.DirFS(otherDir)), os.CopyFS(broken, os.DirFS(dir)), os.Truncate(filepath.Join(broken, "t10k-images-idx4-ubyte"), 10)); err != nil {
				t.Fatal(err)
			}
			base, _ := server(t, c.dir, c.get)
			_, err := Open(t.Context(), base, Pin(good.Digest()), Cache(cache), quick)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, expected %q", err, c.want)
			}
			if left := entries(t, cache); len(left) != 2 {
				t.Errorf("%v is in the cache", left)
			}
			if _, err := Open(t.Context(), base, Pin(other.Digest()), Cache(cache), quick); err != nil {
				t.Errorf("the other data set is damaged: %v", err)
			}

			// A good download repairs the damaged entry.
			base, requests := server(t, dir, nil)
			for range 2 {
				if _, err := Open(t.Context(), base, Pin(good.Digest()), Cache(cache), quick); err != nil {
					t.Error(err)
				}
			}
			if requests.Load() == 0 {
				t.Error("a damaged entry was taken from the cache")
			}
			if left := entries(t, cache); len(left) != 2 {
				t.Errorf("%v is in the cache", left)
			}
		})
	}
}

func notFound(w http.ResponseWriter) bool {
	w.WriteHeader(http.StatusNotFound)
	return true
}

func TestDownloadTriesAgain(t *testing.T) {
	want := sample(false)
	dir := mustWrite(t, want)
	fails := func(status, times int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if times <= 0 {
				return false
			}
			times--
			w.WriteHeader(status)
			return true
		}
	}
	for _, c := range []struct {
		status, times int
		unavailable   bool
		requests      int64
	}{
		{503, tries - 1, false, 0},
		{429, tries - 1, false, 0},
		{500, 1000, true, tries},
	} {
		base, requests := server(t, dir, fails(c.status, c.times))
		_, err := Open(t.Context(), base, Pin(want.Digest()), Cache(t.TempDir()), quick)
		var e *Unavailable
		if errors.As(err, &e) != c.unavailable || !c.unavailable && err != nil {
			t.Errorf("%d, %d times: error %v", c.status, c.times, err)
		}
		if c.requests > 0 && requests.Load() != c.requests {
			t.Errorf("%d requests, expected %d", requests.Load(), c.requests)
		}
	}

	// A server that refuses everything is asked once for each file.
	asked := map[string]bool{}
	base, requests := server(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		asked[r.URL.Path] = true
		return fails(403, 1)(w, r)
	})
	_, err := Open(t.Context(), base, Pin(want.Digest()), Cache(t.TempDir()), quick)
	if e := (*Unavailable)(nil); err == nil || errors.As(err, &e) || !strings.Contains(err.Error(), "403") || int(requests.Load()) != len(asked) {
		t.Errorf("403: error %v after %d requests for %d files", err, requests.Load(), len(asked))
	}

	// A server that is not there.
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	_, err = Open(t.Context(), gone.URL, Cache(t.TempDir()), quick)
	if e := (*Unavailable)(nil); !errors.As(err, &e) || !strings.Contains(err.Error(), gone.URL) {
		t.Errorf("no server: error %v", err)
	}

	// A cancelled download ends at once.
	ctx, cancel := context.WithCancel(t.Context())
	base, _ = server(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		cancel()
		w.WriteHeader(503)
		return true
	})
	if _, err := Open(ctx, base, Cache(t.TempDir())); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: error %v", err)
	}
}

// Object stores answer 403 where there is no file, others 410.
func TestDownloadWhereAbsentIsRefused(t *testing.T) {
	want := sample(false)
	dir := mustWrite(t, want)
	for _, status := range []int{http.StatusForbidden, http.StatusGone} {
		refused := 0
		base, _ := server(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
			if _, err := os.Stat(filepath.Join(dir, filepath.Base(r.URL.Path))); err == nil {
				return false
			}
			refused++
			w.WriteHeader(status)
			return true
		})
		if _, err := Open(t.Context(), base, Pin(want.Digest()), Cache(t.TempDir()), quick); err != nil || refused == 0 {
			t.Errorf("%d: error %v, %d refused", status, err, refused)
		}
		// Labels are there, so their images have to be.
		base, _ = server(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "t10k-images") {
				return false
			}
			w.WriteHeader(status)
			return true
		})
		if _, err := Open(t.Context(), base, Pin(want.Digest()), Cache(t.TempDir()), quick); err == nil || !strings.Contains(err.Error(), fmt.Sprint(status)) {
			t.Errorf("%d for images: error %v", status, err)
		}
	}
}

// What trying again cannot mend is tried once and is no *Unavailable.
func TestDownloadGivesUpAtOnce(t *testing.T) {
	requests := 0
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		http.Redirect(w, r, plain.URL, http.StatusFound)
	}))
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	defer secure.Close()
	trusting := secure.Client()
	trusting.CheckRedirect = defaultClient.CheckRedirect
	loop, _ := server(t, "", func(w http.ResponseWriter, r *http.Request) bool {
		requests++
		http.Redirect(w, r, r.URL.Path, http.StatusFound)
		return true
	})
	for name, c := range map[string]struct {
		url      string
		client   *http.Client
		want     string
		requests int
	}{
		"https to http":     {secure.URL, trusting, "from https to http", 1},
		"endless redirects": {loop, defaultClient, "more than 5", maxRedirects},
		"certificate":       {secure.URL, defaultClient, "certificate", 0},
	} {
		requests = 0
		_, err := Open(t.Context(), c.url, Client(c.client), Cache(t.TempDir()), quick)
		if e := (*Unavailable)(nil); err == nil || errors.As(err, &e) || !strings.Contains(err.Error(), c.want) || requests != c.requests {
			t.Errorf("%s: error %v after %d requests, want %q after %d", name, err, requests, c.want, c.requests)
		}
	}
}

// A body without end is cut at the limit, announced or not.
func TestDownloadIsBounded(t *testing.T) {
	for _, announced := range []bool{true, false} {
		base, _ := server(t, "", func(w http.ResponseWriter, r *http.Request) bool {
			if announced {
				w.Header().Set("Content-Length", "1000000000000")
			}
			w.WriteHeader(http.StatusOK)
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					break
				}
			}
			return true
		})
		u, err := url.Parse(base)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		_, err = fetch(t.Context(), u, dir, "file", 1000, options{client: defaultClient})
		if err == nil || !strings.Contains(err.Error(), "000") {
			t.Errorf("error %v", err)
		}
		if left := entries(t, dir); len(left) > 0 {
			t.Errorf("%v was left behind", left)
		}
	}
}

func TestCase19URLSecretsStayOut(t *testing.T) {
	want := sample(false)
	dir := mustWrite(t, want)
	secret := func(base string) string {
		return strings.Replace(base, "http://", "http://me:hunter2@", 1) + "?token=hunter2"
	}
	var seen, reached, leaked atomic.Int64
	check := func(w http.ResponseWriter, r *http.Request) bool {
		if _, password, _ := r.BasicAuth(); password == "hunter2" && r.URL.Query().Get("token") == "hunter2" {
			seen.Add(1)
		}
		return false
	}
	base, _ := server(t, dir, check)
	cache := t.TempDir()
	s, err := Open(t.Context(), secret(base), Pin(want.Digest()), Cache(cache), quick)
	if err != nil {
		t.Fatal(err)
	}
	if seen.Load() == 0 {
		t.Error("the server did not get the credentials")
	}
	if strings.Contains(s.Name+s.Train.Name+s.Test.Name, "hunter2") {
		t.Errorf("the name %s holds the secret", s.Name)
	}

	var failures []error
	_, err = Open(t.Context(), secret(base), Cache(cache), quick) // not pinned
	failures = append(failures, err)
	_, err = Open(t.Context(), secret(base)+"#sha256:"+strings.Repeat("0", 64), Cache(cache), quick)
	failures = append(failures, err)
	_, err = Open(t.Context(), secret(base)+"#bad", Cache(cache), quick)
	failures = append(failures, err)
	_, err = Open(t.Context(), "http://me:hunter2@[::1/%zz?token=hunter2", Cache(cache), quick)
	failures = append(failures, err)
	for _, status := range []int{403, 404, 500} {
		base, _ := server(t, dir, func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(status); return true })
		_, err := Open(t.Context(), secret(base), Cache(cache), quick)
		failures = append(failures, err)
	}
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	_, err = Open(t.Context(), secret(gone.URL), Cache(cache), quick)
	failures = append(failures, err)
	for i, err := range failures {
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("failure %d: error %v", i, err)
		}
	}

	// A redirect takes none of it to another host.
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached.Add(1)
		for _, values := range r.Header {
			if strings.Contains(strings.Join(values, " "), "hunter2") {
				leaked.Add(1)
			}
		}
		if _, password, ok := r.BasicAuth(); ok || password != "" {
			leaked.Add(1)
		}
		http.NotFound(w, r)
	}))
	defer elsewhere.Close()
	base, _ = server(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, strings.Replace(elsewhere.URL, "127.0.0.1", "localhost", 1)+r.URL.Path, http.StatusFound)
		return true
	})
	if _, err := Open(t.Context(), secret(base), Cache(cache), quick); err == nil {
		t.Error("no data set there, but no error")
	}
	if reached.Load() == 0 || leaked.Load() > 0 {
		t.Errorf("a redirect took the secret to another host in %d of %d requests", leaked.Load(), reached.Load())
	}
}
