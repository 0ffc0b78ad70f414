package store

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// HTTP's own compression is one that a client undoes unasked.
func TestCase25GzipBomb(t *testing.T) {
	var bomb bytes.Buffer
	z, _ := gzip.NewWriterLevel(&bomb, gzip.BestSpeed)
	for range 128 {
		z.Write(make([]byte, 1<<20))
	}
	z.Close()
	for kind, hit := range map[string]func(*http.Request) bool{
		"blob": isBlobGet,
		"manifest": func(req *http.Request) bool {
			return req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/manifests/")
		},
		"tags": func(req *http.Request) bool { return strings.Contains(req.URL.Path, "/tags/") },
	} {
		t.Run(kind, func(t *testing.T) {
			armed := false
			place := hostile(t, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
				if armed && hit(req) {
					w.Header().Set("Content-Encoding", "gzip")
					w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
					w.Write(bomb.Bytes())
					return
				}
				next.ServeHTTP(w, req)
			})
			mustPush(t, place+":v1", sample("one"))
			armed = true
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			r, err := Open(t.Context(), place+":v1")
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if kind == "tags" {
				_, err = r.Tags(t.Context())
			} else {
				_, err = r.Pull(t.Context(), Want{})
			}
			var refused *Refused
			if err == nil || kind != "tags" && !errors.As(err, &refused) {
				t.Errorf("error %v, want it refused", err)
			}
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
				t.Errorf("%d MiB allocated", n>>20)
			}
		})
	}
}

func TestClaim(t *testing.T) {
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			r, err := Open(t.Context(), place+":lock")
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			const racers = 4
			var digests [racers]string
			for i := range digests {
				at := mustPush(t, place, sample(string(rune('a'+i))))
				digests[i] = at[strings.IndexByte(at, '@')+1:]
			}
			var won atomic.Int32
			if name != "foreign" { // which does not keep If-None-Match
				var group sync.WaitGroup
				for _, d := range digests {
					group.Go(func() {
						err := r.Claim(t.Context(), d)
						var taken *Exists
						if err == nil {
							won.Add(1)
						} else if !errors.As(err, &taken) {
							t.Error(err)
						}
					})
				}
				group.Wait()
				if won.Load() != 1 {
					t.Errorf("%d of %d claimed one tag", won.Load(), racers)
				}
			} else if err := r.Claim(t.Context(), digests[0]); err != nil {
				t.Error(err)
			}
			at, err := r.Resolve(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			var taken *Exists
			other := digests[1]
			if other == at.Digest() { // who has it may say so again
				other = digests[2]
			}
			if err := r.Claim(t.Context(), other); !errors.As(err, &taken) || taken.Digest != at.Digest() {
				t.Errorf("claimed again: %v", err)
			}
		})
	}
}

func FuzzIndex(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"manifests":[]}`))
	f.Add([]byte(`{"manifests":[{"digest":"sha256:` + strings.Repeat("a", 64) + `","size":3,"annotations":{"org.opencontainers.image.ref.name":"v1"}}]}`))
	f.Add([]byte(`{"manifests":[{"digest":"sha256:../../x"}]}`))
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, "index.json"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := openLayout(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer l.close()
		entries, _, err := l.readIndex()
		if err != nil {
			return
		}
		for _, e := range entries {
			if !digestPattern.MatchString(e.descriptor.Digest.String()) || !repositoryPattern.MatchString(e.repository) || e.tag != "" && !tagPattern.MatchString(e.tag) {
				t.Fatalf("entry %+v", e)
			}
		}
	})
}

func FuzzManifest(f *testing.F) {
	data, _, err := sample("one").Manifest(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(bytes.ReplaceAll(data, []byte("a.txt"), []byte("../x")))
	want := Want{Files: 10, Bytes: 1 << 20}
	f.Fuzz(func(t *testing.T, data []byte) {
		var m ocispec.Manifest
		if json.Unmarshal(data, &m) != nil {
			return
		}
		a, err := check("fuzz", &m, want)
		if err != nil {
			return
		}
		if len(a.Files) > want.Files {
			t.Fatalf("%d files", len(a.Files))
		}
		for _, file := range a.Files {
			if !filepath.IsLocal(file.Name) {
				t.Fatalf("file name %q", file.Name)
			}
		}
	})
}
