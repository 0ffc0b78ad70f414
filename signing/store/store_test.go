package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	ggcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestMain(m *testing.M) {
	retryBackoff.Duration = time.Millisecond
	os.Exit(m.Run())
}

const testType = "application/vnd.temper.test.v1+json"

func sample(text string) *Artifact {
	return &Artifact{
		Type:        testType,
		Config:      &Config{MediaType: testType, Data: []byte(`{"text":` + fmt.Sprintf("%q", text) + `}`)},
		Files:       []File{{Name: "a.txt", Data: []byte(text)}, {Name: "dir/b.bin", Data: bytes.Repeat([]byte(text), 1000)}},
		Annotations: map[string]string{"z": "1", "a": "2"},
	}
}

func mustPush(t *testing.T, ref string, a *Artifact) string {
	t.Helper()
	at, err := Push(t.Context(), ref, a)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// places are a folder and a served registry: everything works in both.
func places(t *testing.T) map[string]string {
	t.Helper()
	g, err := Start(t.Context(), filepath.Join(t.TempDir(), "served"), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	memory := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(memory.Close)
	return map[string]string{
		"folder":  "oci:" + filepath.Join(t.TempDir(), "layout"),
		"served":  g.Addr() + "/team/model",
		"foreign": strings.TrimPrefix(memory.URL, "http://") + "/team/model",
	}
}

func TestPushPull(t *testing.T) {
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			at := mustPush(t, place+":v1", sample("one"))
			if again := mustPush(t, place+":v1", sample("one")); again != at {
				t.Errorf("the same artifact again: %s, then %s", at, again)
			}
			if resolved, err := Resolve(ctx, place+":v1"); err != nil || resolved != at {
				t.Errorf("Resolve = %q, %v; want %q", resolved, err, at)
			}
			two := mustPush(t, place+":v1", sample("two"))
			for ref, want := range map[string]string{at: "one", two: "two", place + ":v1": "two"} {
				a, err := Pull(ctx, ref, Want{Type: testType})
				if err != nil {
					t.Fatal(err)
				}
				if got, err := a.File("a.txt"); err != nil || string(got) != want {
					t.Errorf("%s: a.txt = %q, %v", ref, got, err)
				}
				if !strings.Contains(string(a.Config.Data), want) || a.Annotations["a"] != "2" {
					t.Errorf("%s: config %s, annotations %v", ref, a.Config.Data, a.Annotations)
				}
				if _, err := a.File("c"); err == nil || !strings.Contains(err.Error(), "dir/b.bin") {
					t.Errorf("a missing file's error must list what exists: %v", err)
				}
			}
			about := sample("about")
			about.Subject = at[strings.IndexByte(at, '@')+1:]
			if ref := mustPush(t, place, about); !strings.Contains(ref, "@sha256:") {
				t.Errorf("push without a tag: %s", ref)
			}
			r, err := Open(ctx, at)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			index, err := remote.Referrers(r.repository.Digest(r.Digest()), r.Options(ctx)...)
			if err != nil {
				t.Fatal(err)
			}
			if m, err := index.IndexManifest(); err != nil || len(m.Manifests) != 1 {
				t.Errorf("referrers: %v, %v", m, err)
			}
			var absent *NotFound
			if _, err := Pull(ctx, place+":v9", Want{}); !errors.As(err, &absent) {
				t.Errorf("a tag that does not exist: %v", err)
			}
			var refused *Refused
			if _, err := Pull(ctx, at, Want{Type: "application/other"}); !errors.As(err, &refused) {
				t.Errorf("another type: %v", err)
			}
			if _, err := Pull(ctx, at, Want{Bytes: 100}); !errors.As(err, &refused) {
				t.Errorf("more bytes than wanted: %v", err)
			}
			if _, err := Pull(ctx, at, Want{Files: 1}); !errors.As(err, &refused) {
				t.Errorf("more files than wanted: %v", err)
			}
		})
	}
}

// What is written is a layout that other tools read, and the other way round.
func TestLayoutIsStandard(t *testing.T) {
	dir := t.TempDir()
	at := mustPush(t, "oci:"+dir+":v1", sample("one"))
	mustPush(t, "oci:"+dir+":v1", sample("two"))
	path, err := ggcrlayout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	index, err := path.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index, validate.Fast); err != nil {
		t.Error(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	tags := map[string]int{}
	for _, d := range m.Manifests {
		tags[d.Annotations[ocispec.AnnotationRefName]]++
	}
	if len(m.Manifests) != 2 || tags["v1"] != 1 || tags[""] != 1 {
		t.Errorf("index.json: %d manifests, tags %v; want the first without a tag and the second as v1", len(m.Manifests), tags)
	}

	image, err := path.Image(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	foreign := t.TempDir()
	other, err := ggcrlayout.Write(foreign, index)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.AppendImage(image, ggcrlayout.WithAnnotations(map[string]string{ocispec.AnnotationRefName: "theirs"})); err != nil {
		t.Fatal(err)
	}
	got, err := Resolve(t.Context(), "oci:"+foreign+":theirs")
	if err != nil || got[strings.IndexByte(got, '@'):] != at[strings.IndexByte(at, '@'):] {
		t.Errorf("a layout of another tool: %s, %v; want %s", got, err, at)
	}
	if _, err := Open(t.Context(), "oci:"+filepath.Dir(dir)); err == nil {
		t.Error("a folder with files that is no layout was opened")
	}
}

// A restarted registry has everything that was pushed, in every repository.
func TestRegistryRestart(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	g, err := Start(ctx, dir, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, repository := range []string{"a", "a/b", folderRepository} {
		mustPush(t, g.Addr()+"/"+repository+":v1", sample(repository))
	}
	addr := g.Addr()
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	var down *Unavailable
	if _, err := Resolve(ctx, addr+"/a:v1"); !errors.As(err, &down) || !strings.Contains(err.Error(), addr) {
		t.Errorf("a registry that is down: %v", err)
	}
	if g, err = Start(ctx, dir, ""); err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for _, repository := range []string{"a", "a/b", folderRepository} {
		a, err := Pull(ctx, g.Addr()+"/"+repository+":v1", Want{})
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := a.File("a.txt"); string(got) != repository {
			t.Errorf("%s: %q", repository, got)
		}
	}
	if _, err := Resolve(ctx, "oci:"+dir+":v1"); err != nil {
		t.Errorf("the folder while it is served: %v", err)
	}
	r, err := Open(ctx, g.Addr()+"/a/b:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Delete(r.Name(), r.Options(ctx)...); err != nil {
		t.Fatal(err)
	}
	if tags, err := r.Tags(ctx); err != nil || len(tags) != 0 {
		t.Errorf("tags after the only one was deleted: %v, %v", tags, err)
	}
}

// Several processes use one folder: here several registries in one.
func TestOneFolderManyWriters(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	const writers, each = 4, 5
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			for i := range each {
				if _, err := Push(ctx, fmt.Sprintf("oci:%s:w%d-%d", dir, w, i), sample(fmt.Sprint(w, i))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	r, err := Open(ctx, "oci:"+dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if tags, err := r.Tags(ctx); err != nil || len(tags) != writers*each {
		t.Errorf("%d tags of %d, %v", len(tags), writers*each, err)
	}
	if parts, _ := os.ReadDir(filepath.Join(dir, partFolder)); len(parts) != 0 {
		t.Errorf("%d unfinished files left", len(parts))
	}
}

func TestParse(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	good := map[string][3]string{ // reference: place, tag, digest
		"localhost:5000/m:v1":            {"localhost:5000/m", "v1", ""},
		"localhost/m":                    {"localhost/m", "", ""},
		"ghcr.io/a/b@" + digest:          {"ghcr.io/a/b", "", digest},
		"ghcr.io/a/b:v1@" + digest:       {"ghcr.io/a/b", "", digest},
		"oci:dir":                        {"oci:dir", "", ""},
		"oci:/tmp/a@b:v1":                {"oci:/tmp/a@b", "v1", ""},
		"oci:./a/../b@" + digest:         {"oci:b", "", digest},
		"oci:/tmp/with:colon/layout":     {"oci:/tmp/with:colon/layout", "", ""},
		"[::1]:5000/m:v1":                {"[::1]:5000/m", "v1", ""},
		"registry.svc.cluster.local/m:x": {"registry.svc.cluster.local/m", "x", ""},
	}
	for ref, want := range good {
		r, err := parse(ref)
		if err != nil {
			t.Errorf("%s: %v", ref, err)
			continue
		}
		if r.Repository() != want[0] || r.Tag() != want[1] || r.Digest() != want[2] {
			t.Errorf("%s: %q %q %q", ref, r.Repository(), r.Tag(), r.Digest())
		}
	}
	for _, ref := range []string{"", "mnist", "mnist:v1", "a/b:v1", "oci:", "oci::v1", "https://ghcr.io/a/b", "ghcr.io/A/b", "ghcr.io/a:-x", "ghcr.io/a\n:v1", "oci:d:-", strings.Repeat("a", 5000)} {
		if _, err := parse(ref); err == nil {
			t.Errorf("%.50q was accepted", ref)
		}
	}
}

// Only a host that is this machine or a Service in the cluster is asked without
// TLS.
func TestSchemes(t *testing.T) {
	for host, want := range map[string]string{
		"localhost:5000": "http", "registry.registry.svc.cluster.local:5000": "http", "registry.a.svc.cluster.local": "http",
		"ghcr.io": "https", "registry.local:5000": "https", "svc.cluster.local.evil.io:5000": "https", "evilsvc.cluster.local": "https",
	} {
		r, err := parse(host + "/m:v1")
		if err != nil {
			t.Error(err)
		} else if got := r.Name().Context().Scheme(); got != want {
			t.Errorf("%s is asked by %s, not %s", host, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("oci:dir:tag")
	f.Add("localhost:5000/a/b@sha256:" + strings.Repeat("0", 64))
	f.Add("user:secret@host/repo@sha256:../../x")
	f.Fuzz(func(t *testing.T, ref string) {
		r, err := parse(ref)
		if err != nil {
			return
		}
		again, err := parse(r.String())
		if err != nil || again.String() != r.String() || again.Digest() != r.Digest() {
			t.Fatalf("%q reads as %q, which reads as %v, %v", ref, r, again, err)
		}
	})
}

func TestIdentity(t *testing.T) {
	same := map[string]string{
		"localhost:5000/a/m":   "localhost/a/m",
		"127.0.0.1:41234/a/m":  "localhost/a/m",
		"[::1]:41234/a/m":      "localhost/a/m",
		"ghcr.io/a/m":          "ghcr.io/a/m",
		"registry.io:5000/a/m": "registry.io:5000/a/m",
		"localhost.evil.io/m":  "localhost.evil.io/m",
		"not a name":           "",
	}
	for repository, want := range same {
		if got := Identity(repository); got != want {
			t.Errorf("Identity(%q) = %q, want %q", repository, got, want)
		}
	}
}

func TestCase19CredentialsInReference(t *testing.T) {
	digest := "@sha256:" + strings.Repeat("a", 64)
	for _, ref := range []string{
		"user:hunter2@ghcr.io/a/b", "user:hunter2@ghcr.io/a/b" + digest, "user:hunter2@ghcr.io/a/b:v1",
		"https://user:hunter2@ghcr.io/a/b", "user:hunter2@ghcr.io/a@sha256:../x", "hunter2@host\x00/x",
	} {
		_, err := Open(t.Context(), ref)
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v", ref, err)
		}
	}
}

// blobPath is the file of a blob of a layout that is not a manifest.
func blobPath(t *testing.T, dir, content string) string {
	t.Helper()
	d := describe("", []byte(content))
	return filepath.Join(dir, blobFolder, d.Digest.Encoded())
}

func TestCase26HostileLayout(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	cases := map[string]func(t *testing.T, dir string){
		"blob is a link out of the folder": func(t *testing.T, dir string) {
			replaceWith(t, blobPath(t, dir, "one"), func(p string) error { return os.Symlink(secret, p) })
		},
		"blob is a link inside the folder": func(t *testing.T, dir string) {
			p := blobPath(t, dir, "one")
			if err := os.Rename(p, filepath.Join(dir, "elsewhere")); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("../../elsewhere", p); err != nil {
				t.Fatal(err)
			}
		},
		"blob is a pipe": func(t *testing.T, dir string) {
			replaceWith(t, blobPath(t, dir, "one"), func(p string) error { return syscall.Mkfifo(p, 0o600) })
		},
		"blob folder is a link": func(t *testing.T, dir string) {
			if err := os.Rename(filepath.Join(dir, "blobs"), filepath.Join(dir, "real")); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("real", filepath.Join(dir, "blobs")); err != nil {
				t.Fatal(err)
			}
		},
		"blob has other content": func(t *testing.T, dir string) {
			if err := os.WriteFile(blobPath(t, dir, "one"), []byte("two"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"index.json is a link": func(t *testing.T, dir string) {
			if err := os.Rename(filepath.Join(dir, "index.json"), filepath.Join(dir, "i")); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("i", filepath.Join(dir, "index.json")); err != nil {
				t.Fatal(err)
			}
		},
		"digest with a path": func(t *testing.T, dir string) {
			p := filepath.Join(dir, "index.json")
			index, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			var i ocispec.Index
			if err := json.Unmarshal(index, &i); err != nil {
				t.Fatal(err)
			}
			i.Manifests[0].Digest = "sha256:../../../etc/passwd"
			index, _ = json.Marshal(i)
			if err := os.WriteFile(p, index, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			at := mustPush(t, "oci:"+dir+":v1", sample("one"))
			spoil(t, dir)
			if a, err := Pull(t.Context(), at, Want{}); err == nil {
				t.Errorf("pulled %v", a)
			}
		})
	}
	for _, ref := range []string{"oci:d@sha256:../../x", "localhost:5000/a@sha256:../../x", "oci:d@sha256:" + strings.Repeat("A", 64), "localhost:5000/a@sha256:" + strings.Repeat("a", 63)} {
		if _, err := Open(t.Context(), ref); err == nil {
			t.Errorf("%s was opened", ref)
		}
	}
	g, err := Start(t.Context(), t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for _, path := range []string{"/v2/a/blobs/sha256:..%2f..%2fx", "/v2/a/blobs/sha256:../../x", "/v2/a/manifests/..%2fx", "/v2/../blobs/x", "/v2//manifests/x"} {
		resp, err := http.Get("http://" + g.Addr() + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode < 400 {
			t.Errorf("GET %s: %d", path, resp.StatusCode)
		}
	}
}

func replaceWith(t *testing.T, path string, with func(string) error) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := with(path); err != nil {
		t.Fatal(err)
	}
}

func TestCase16FullDiskAndReadOnlyLayout(t *testing.T) {
	failures := map[string]struct {
		create func(root *os.Root, name string) (*os.File, error)
		say    string
	}{
		"full disk": {func(*os.Root, string) (*os.File, error) { return os.OpenFile("/dev/full", os.O_WRONLY, 0) }, "no space left"},
		"read-only": {func(_ *os.Root, name string) (*os.File, error) {
			return nil, &os.PathError{Op: "open", Path: name, Err: syscall.EROFS}
		}, "read-only file system"},
	}
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("this system has no /dev/full")
	}
	for name, failure := range failures {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			before := mustPush(t, "oci:"+dir+":v1", sample("one"))
			r, err := parse("oci:" + dir + ":v1")
			if err != nil {
				t.Fatal(err)
			}
			g, err := newRegistry(dir)
			if err != nil {
				t.Fatal(err)
			}
			g.layout.create = failure.create
			r.transport, r.close = g.inProcess()
			_, err = r.Push(t.Context(), sample("two"))
			if err == nil || !strings.Contains(err.Error(), failure.say) {
				t.Errorf("error %v does not say %q", err, failure.say)
			}
			if at, err := r.Resolve(t.Context()); err != nil || at.String() != before {
				t.Errorf("the tag moved: %v, %v", at, err)
			}
			r.Close()
			if at, err := Resolve(t.Context(), "oci:"+dir+":v1"); err != nil || at != before {
				t.Errorf("after the failure: %v, %v", at, err)
			}
			if parts, _ := os.ReadDir(filepath.Join(dir, partFolder)); len(parts) != 0 {
				t.Errorf("%d unfinished files left", len(parts))
			}
		})
	}
}

// hostile is a registry whose answers a test changes.
func hostile(t *testing.T, change func(w http.ResponseWriter, req *http.Request, next http.Handler)) string {
	t.Helper()
	inner := registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { change(w, req, inner) }))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://") + "/m"
}

func isBlobGet(req *http.Request) bool {
	return req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/")
}

func TestCase25ContentUnlikeItsDescriptor(t *testing.T) {
	big := bytes.Repeat([]byte("x"), 200_000)
	artifact := &Artifact{Type: testType, Files: []File{{Name: "big", Data: big}}}
	cases := map[string]func([]byte) []byte{
		"wrong only at the tail": func(b []byte) []byte { b[len(b)-1]++; return b },
		"bytes after the end":    func(b []byte) []byte { return append(b, 'x') },
		"endless":                func(b []byte) []byte { return bytes.Repeat(b, 50) },
		"shorter":                func(b []byte) []byte { return b[:len(b)-1] },
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			spoiled := false
			place := hostile(t, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
				if !spoiled || !isBlobGet(req) {
					next.ServeHTTP(w, req)
					return
				}
				answer := httptest.NewRecorder()
				next.ServeHTTP(answer, req)
				w.Write(spoil(bytes.Clone(answer.Body.Bytes())))
			})
			at := mustPush(t, place+":v1", artifact)
			if _, err := Pull(t.Context(), at, Want{}); err != nil {
				t.Fatal(err)
			}
			spoiled = true
			_, err := Pull(t.Context(), at, Want{})
			var refused *Refused
			if !errors.As(err, &refused) {
				t.Errorf("error %v, want it refused", err)
			}
		})
	}
	t.Run("descriptor", func(t *testing.T) {
		for name, edit := range map[string]func(m *ocispec.Manifest){
			"size larger":    func(m *ocispec.Manifest) { m.Layers[0].Size++ },
			"size smaller":   func(m *ocispec.Manifest) { m.Layers[0].Size-- },
			"size negative":  func(m *ocispec.Manifest) { m.Layers[0].Size = -1 },
			"size of 1 EiB":  func(m *ocispec.Manifest) { m.Layers[0].Size = 1 << 60 },
			"sizes overflow": func(m *ocispec.Manifest) { m.Layers[0].Size, m.Config.Size = 1<<62, 1<<62 },
			"digest":         func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../../x" },
			"10^5 layers": func(m *ocispec.Manifest) {
				for range 17 {
					m.Layers = append(m.Layers, m.Layers...)
				}
			},
			"twice":        func(m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) },
			"name":         func(m *ocispec.Manifest) { m.Layers[0].Annotations[ocispec.AnnotationTitle] = "../../x" },
			"no name":      func(m *ocispec.Manifest) { m.Layers[0].Annotations = nil },
			"other schema": func(m *ocispec.Manifest) { m.SchemaVersion = 1 },
		} {
			t.Run(name, func(t *testing.T) {
				var manifest []byte
				place := hostile(t, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
					if req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/manifests/") {
						next.ServeHTTP(w, req)
						return
					}
					w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
					w.Write(manifest)
				})
				mustPush(t, place+":v1", artifact)
				data, _, err := artifact.Manifest(nil)
				if err != nil {
					t.Fatal(err)
				}
				var m ocispec.Manifest
				if err := json.Unmarshal(data, &m); err != nil {
					t.Fatal(err)
				}
				edit(&m)
				manifest, _ = json.Marshal(m)
				a, err := Pull(t.Context(), place+":v1", Want{})
				var refused *Refused
				if !errors.As(err, &refused) {
					t.Errorf("pulled %v, error %v, want it refused", a != nil, err)
				}
			})
		}
	})
}

// A registry may keep its blobs elsewhere, at any path, and redirect to there.
func TestCase25OnlyBlobsMayBeLarge(t *testing.T) {
	large := bytes.Repeat([]byte("x"), maxManifest+1<<20)
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(large) }))
	defer storage.Close()
	redirected, to := "", ""
	place := hostile(t, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		if redirected != "" && req.Method == http.MethodGet && strings.Contains(req.URL.Path, redirected) {
			http.Redirect(w, req, storage.URL+to, http.StatusTemporaryRedirect)
			return
		}
		if strings.Contains(req.URL.Path, "/x/blobs/y/manifests/") {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Write(large)
			return
		}
		next.ServeHTTP(w, req)
	})
	at := mustPush(t, place+":v1", &Artifact{Type: testType, Files: []File{{Name: "large", Data: large}}})
	redirected, to = "/blobs/"+digestOf(sha256.Sum256(large)).String(), "/object"
	if a, err := Pull(t.Context(), at, Want{}); err != nil || !bytes.Equal(a.Files[0].Data, large) {
		t.Errorf("a blob that is elsewhere: %v", err)
	}
	redirected, to = "/m/manifests/", "/v2/m/blobs/sha256:0"
	for _, ref := range []string{at, strings.TrimSuffix(place, "/m") + "/x/blobs/y:v1"} {
		var refused *Refused
		if _, err := Pull(t.Context(), ref, Want{}); !errors.As(err, &refused) || !strings.Contains(err.Error(), "larger than") {
			t.Errorf("the manifest %s of %d bytes: %v", ref, len(large), err)
		}
	}
}

func TestCase24FileNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "../x", "a/../../x", "/etc/passwd", `C:\x`, `a\b`, "a//b", "a/", "a\x00b", "a:b", strings.Repeat("a", 300)} {
		a := &Artifact{Type: testType, Files: []File{{Name: name, Data: []byte("x")}}}
		if _, _, err := a.Manifest(nil); err == nil {
			t.Errorf("file name %q was accepted", name)
		}
	}
}

func TestCase36FailingRegistry(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	cases := map[string]struct {
		fail  func(w http.ResponseWriter, req *http.Request) bool // what it answers itself
		tries int32                                               // most requests for one blob
	}{
		"500": {func(w http.ResponseWriter, req *http.Request) bool { w.WriteHeader(500); return true }, 4},
		"429": {func(w http.ResponseWriter, req *http.Request) bool { w.WriteHeader(429); return true }, 4},
		"cut in mid-blob": {func(w http.ResponseWriter, req *http.Request) bool {
			w.Header().Set("Content-Length", "1000000")
			w.Write([]byte("begin"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, 9},
		"silent": {func(w http.ResponseWriter, req *http.Request) bool {
			select {
			case <-release:
			case <-req.Context().Done():
			}
			return true
		}, 9},
		"stalls in mid-blob": {func(w http.ResponseWriter, req *http.Request) bool {
			w.Header().Set("Content-Length", "1000000")
			w.Write([]byte("begin"))
			w.(http.Flusher).Flush()
			select {
			case <-release:
			case <-req.Context().Done():
			}
			return true
		}, 9},
	}
	for name, c := range cases {
		t.Run("pull/"+name, func(t *testing.T) {
			failing, tries := false, atomic.Int32{}
			place := hostile(t, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
				if failing && isBlobGet(req) {
					tries.Add(1)
					c.fail(w, req)
					return
				}
				next.ServeHTTP(w, req)
			})
			at := mustPush(t, place+":v1", &Artifact{Type: testType, Files: []File{{Name: "x", Data: bytes.Repeat([]byte("begin"), 200_000)}}})
			failing = true
			defer func(d time.Duration) { stallTimeout = d }(stallTimeout)
			stallTimeout = 200 * time.Millisecond
			_, err := Pull(t.Context(), at, Want{})
			var down *Unavailable
			if !errors.As(err, &down) {
				t.Errorf("error %v, want Unavailable", err)
			}
			if n := tries.Load(); n < 2 || n > c.tries {
				t.Errorf("%d requests, want 2 to %d", n, c.tries)
			}
		})
	}
	for name, fails := range map[string]func(req *http.Request) bool{
		"upload": func(req *http.Request) bool { return req.Method == http.MethodPatch },
		"commit": func(req *http.Request) bool {
			return req.Method == http.MethodPut && strings.Contains(req.URL.Path, "uploads")
		},
		"manifest": func(req *http.Request) bool {
			return req.Method == http.MethodPut && strings.Contains(req.URL.Path, "/manifests/sha256:")
		},
	} {
		t.Run("push/"+name, func(t *testing.T) {
			var failing atomic.Bool
			place := hostile(t, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
				if failing.Load() && fails(req) {
					w.WriteHeader(503)
					return
				}
				next.ServeHTTP(w, req)
			})
			before := mustPush(t, place+":v1", sample("one"))
			failing.Store(true)
			_, err := Push(t.Context(), place+":v1", sample("two"))
			var down *Unavailable
			if !errors.As(err, &down) || !strings.Contains(err.Error(), strings.TrimSuffix(place, "/m")) {
				t.Errorf("error %v, want Unavailable with the address", err)
			}
			failing.Store(false)
			if at, err := Resolve(t.Context(), place+":v1"); err != nil || at != before {
				t.Errorf("a partial push was tagged: %v, %v", at, err)
			}
			if _, err := Push(t.Context(), place+":v1", sample("two")); err != nil {
				t.Errorf("pushing again: %v", err)
			}
		})
	}
	t.Run("a cancelled push ends at once", func(t *testing.T) {
		place := hostile(t, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
			select {
			case <-release:
			case <-req.Context().Done():
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := Push(ctx, place+":v1", sample("one")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
	})
}

// Neither a registry's silence nor the end of the caller's time is bad input.
func TestCase36TimeoutIsUnavailable(t *testing.T) {
	r, err := Open(t.Context(), "registry.example:5000/m:v1")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_, dial := (&net.Dialer{Timeout: 1}).Dial("tcp", "127.0.0.1:1")
	if !errors.Is(dial, context.DeadlineExceeded) {
		t.Fatalf("dialling ended with %v", dial)
	}
	for _, err := range []error{dial, context.DeadlineExceeded} {
		err := r.Explain(&url.Error{Op: "Get", URL: "https://registry.example:5000/v2/", Err: err})
		var down *Unavailable
		if !errors.As(err, &down) || !strings.Contains(err.Error(), "registry.example:5000") {
			t.Errorf("error %v, want Unavailable with the address", err)
		}
	}
}

// The embedded registry refuses a manifest of blobs that it has not.
func TestCase36PartialPushIsRefused(t *testing.T) {
	g, err := Start(t.Context(), t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	manifest, digest, err := sample("one").Manifest(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"v1", digest} {
		req, _ := http.NewRequest(http.MethodPut, "http://"+g.Addr()+"/v2/a/manifests/"+target, bytes.NewReader(manifest))
		req.Header.Set("Content-Type", ocispec.MediaTypeImageManifest)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("status %d", resp.StatusCode)
		}
	}
}

func TestRegistryRefusesWebPages(t *testing.T) {
	g, err := Start(t.Context(), t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for name, edit := range map[string]func(*http.Request){
		"a name that resolves to loopback": func(r *http.Request) { r.Host = "evil.example:5000" },
		"a form on another site":           func(r *http.Request) { r.Method = "POST"; r.Header.Set("Sec-Fetch-Site", "cross-site") },
	} {
		req, _ := http.NewRequest(http.MethodGet, "http://"+g.Addr()+"/v2/a/blobs/uploads/", nil)
		edit(req)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusForbidden {
			t.Errorf("%s: status %d", name, resp.StatusCode)
		}
	}
}
