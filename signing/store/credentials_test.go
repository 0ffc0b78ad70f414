package store

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// thief is another host that keeps the Authorization headers that reach it.
type thief struct {
	*httptest.Server
	mu     sync.Mutex
	stolen []string
	asked  int
}

func newThief(t *testing.T, answer http.HandlerFunc) *thief {
	th := &thief{}
	th.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		th.mu.Lock()
		defer th.mu.Unlock()
		th.asked++
		if a := r.Header.Get("Authorization"); a != "" {
			th.stolen = append(th.stolen, a)
		}
		answer(w, r)
	}))
	t.Cleanup(th.Close)
	return th
}

// TestCase35CredentialsStay: whatever a registry answers, its credentials are
// sent to itself only.
func TestCase35CredentialsStay(t *testing.T) {
	blob := []byte("the model")
	other := newThief(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "token") {
			fmt.Fprint(w, `{"token":"t"}`)
			return
		}
		w.Write(blob)
	})
	var answer http.HandlerFunc
	asked := 0
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			asked++
		}
		answer(w, r)
	}))
	defer registry.Close()
	host := strings.TrimPrefix(registry.URL, "http://")
	secret := base64.StdEncoding.EncodeToString([]byte("me:correct horse"))
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, host, secret), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", folder)

	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[{"mediaType":"a/b","digest":"%s","size":%d,"annotations":{"org.opencontainers.image.title":"m"}}]}`, digestOf(sha256.Sum256(blob)), len(blob))
	basic := func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "" {
			w.Header().Set("WWW-Authenticate", `Basic realm="models"`)
			w.WriteHeader(http.StatusUnauthorized)
			return false
		}
		return true
	}
	serve := func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Write(manifest)
	}

	// A blob that is kept elsewhere is fetched from there, without credentials.
	answer = func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !basic(w, r):
		case strings.Contains(r.URL.Path, "/blobs/"):
			http.Redirect(w, r, other.URL+"/object", http.StatusTemporaryRedirect)
		case strings.Contains(r.URL.Path, "/manifests/"):
			serve(w)
		}
	}
	a, err := Pull(t.Context(), host+"/m:v1", Want{})
	if err != nil || string(a.Files[0].Data) != string(blob) {
		t.Errorf("a redirected blob: %+v, %v", a, err)
	}
	if other.asked == 0 || asked == 0 {
		t.Error("no redirect, or no credentials: the test shows nothing")
	}

	// Neither a redirected manifest nor a foreign realm gets them.
	answer = func(w http.ResponseWriter, r *http.Request) {
		if basic(w, r) && r.URL.Path != "/v2/" {
			http.Redirect(w, r, other.URL+r.URL.Path, http.StatusTemporaryRedirect)
		}
	}
	if a, err := Pull(t.Context(), host+"/m:v1", Want{}); err == nil {
		t.Errorf("a redirected manifest: %+v", a)
	}
	for _, realm := range []string{`Bearer realm="%s/token",service="models"`, `bearer service="models", realm="%s/token"`, `Bearer realm=%s/token`} {
		answer = func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(realm, other.URL))
			w.WriteHeader(http.StatusUnauthorized)
		}
		var refused *Refused
		if a, err := Pull(t.Context(), host+"/m:v1", Want{}); !errors.As(err, &refused) || strings.Contains(err.Error(), "correct horse") {
			t.Errorf("%s: %+v, %v", realm, a, err)
		}
	}
	other.mu.Lock()
	defer other.mu.Unlock()
	if len(other.stolen) > 0 {
		t.Errorf("another host got %q", other.stolen)
	}
}

func TestCase35Realms(t *testing.T) {
	for _, c := range []struct {
		registry, realm string
		want            bool
	}{
		{"https://index.docker.io/v2/", "https://auth.docker.io/token", true},
		{"https://registry.gitlab.com/v2/", "https://gitlab.com/jwt/auth", true},
		{"https://ghcr.io/v2/", "https://ghcr.io/token", true},
		{"http://localhost:5000/v2/", "http://localhost:5000/token", true},
		{"http://localhost:5000/v2/", "http://localhost:5001/token", false},
		{"https://ghcr.io/v2/", "http://ghcr.io/token", false},
		{"https://ghcr.io/v2/", "https://evil-ghcr.io/token", false},
		{"https://ghcr.io/v2/", "https://ghcr.io.evil.example/token", false},
		{"https://a.github.io/v2/", "https://b.github.io/token", false}, // each belongs to somebody else
		{"https://10.0.0.1/v2/", "https://10.0.0.2/token", false},
		{"https://a.co.uk/v2/", "https://b.co.uk/token", false},
	} {
		a, _ := url.Parse(c.registry)
		b, _ := url.Parse(c.realm)
		if got := related(a, b); got != c.want {
			t.Errorf("%s for %s: %v, want %v", c.realm, c.registry, got, c.want)
		}
	}
}

// TestCase35OtherContent: a registry that answers otherwise the second time, or
// whose header lies about the digest, is believed by the content alone.
func TestCase35OtherContent(t *testing.T) {
	manifest := func(note string) string {
		return fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[],"annotations":{"note":%q}}`, note)
	}
	header, gets := "", 0
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.URL.Path, "/manifests/") {
			return
		}
		gets++
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		if header != "" {
			w.Header().Set("Docker-Content-Digest", header)
		}
		text := manifest("first")
		if gets > 1 {
			text = manifest("second")
		}
		fmt.Fprint(w, text)
	}))
	defer registry.Close()
	host := strings.TrimPrefix(registry.URL, "http://")
	first := digestOf(sha256.Sum256([]byte(manifest("first")))).String()
	at, err := Resolve(t.Context(), host+"/m:v1")
	if err != nil || at != host+"/m@"+first {
		t.Fatal(at, err)
	}
	if a, err := Pull(t.Context(), at, Want{}); err == nil {
		t.Errorf("other content the second time: %+v, %v", a, err)
	}
	gets, header = 0, digestOf(sha256.Sum256([]byte("lie"))).String()
	if at, err := Resolve(t.Context(), host+"/m:v1"); err == nil && at != host+"/m@"+first {
		t.Errorf("the header's digest was believed: %s", at)
	}
}
