package bundle_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/temper-ml/temper/signing/bundle"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// saved is a signed model and its bundle.
type saved struct {
	key    *sign.Key
	model  string
	policy verify.Policy
	tar    []byte
}

func save(t *testing.T) *saved {
	t.Helper()
	g, err := store.Start(t.Context(), filepath.Join(t.TempDir(), "layout"), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	s := &saved{key: signingtest.Key(t)}
	s.model = signingtest.Pack(t, g.Addr()+"/team/tiny:v1", signingtest.Build(t, 1), s.key)
	s.policy = signingtest.Policy(s.key)
	var b bytes.Buffer
	digest, err := bundle.Write(t.Context(), &b, s.model, s.policy)
	if err != nil || !strings.HasSuffix(s.model, "@"+digest) {
		t.Fatal(digest, err)
	}
	s.tar = b.Bytes()
	s.policy.Repositories = []string{"localhost/team/tiny"}
	return s
}

func TestBundle(t *testing.T) {
	s := save(t)
	var again bytes.Buffer
	if _, err := bundle.Write(t.Context(), &again, s.model, s.policy); err != nil || !bytes.Equal(again.Bytes(), s.tar) {
		t.Errorf("written again: %d bytes, were %d, %v", again.Len(), len(s.tar), err)
	}

	far, err := store.Start(t.Context(), filepath.Join(t.TempDir(), "layout"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	for _, place := range []string{far.Addr() + "/elsewhere/tiny", "oci:" + t.TempDir()} {
		v, err := bundle.Load(t.Context(), bytes.NewReader(s.tar), place+":v1", s.policy)
		if err != nil {
			t.Fatal(err)
		}
		m, err := verify.Load(t.Context(), place+":v1", s.policy)
		if err != nil || m.Digest != v.Digest || m.Network == nil {
			t.Errorf("%s: %+v, %v", place, v, err)
		}
		// From there it goes on: the copy makes the same bundle.
		var copied bytes.Buffer
		if _, err := bundle.Write(t.Context(), &copied, v.Reference, s.policy); err != nil || !bytes.Equal(copied.Bytes(), s.tar) {
			t.Errorf("%s: the copy's bundle has %d bytes, the first %d, %v", place, copied.Len(), len(s.tar), err)
		}
	}
	// The modelcar came along.
	entries := 0
	for r := tar.NewReader(bytes.NewReader(s.tar)); ; entries++ {
		if _, err := r.Next(); err != nil {
			break
		}
	}
	if entries < 15 {
		t.Errorf("%d files", entries)
	}
}

func TestOnlyWhatIsSignedTravels(t *testing.T) {
	s := save(t)
	stranger := signingtest.Key(t)
	for name, p := range map[string]verify.Policy{
		"another key":                    {Keys: signingtest.Policy(stranger).Keys, Repositories: s.policy.Repositories},
		"another repository":             {Keys: s.policy.Keys},
		"revoked":                        {Keys: s.policy.Keys, Repositories: s.policy.Repositories, Revoked: []string{s.model[strings.IndexByte(s.model, '@')+1:]}},
		"figures that are not as wished": {Keys: s.policy.Keys, Repositories: s.policy.Repositories, Robustness: &verify.Requirement{Robust: 0.999}},
	} {
		place := "oci:" + t.TempDir()
		var refused *store.Refused
		if v, err := bundle.Load(t.Context(), bytes.NewReader(s.tar), place+":v1", p); !errors.As(err, &refused) {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
		r, err := store.Open(t.Context(), place)
		if err != nil {
			t.Fatal(err)
		}
		if tags, err := r.Tags(t.Context()); err != nil || len(tags) > 0 {
			t.Errorf("%s: %v, %v", name, tags, err)
		}
		r.Close()
		if name != "another repository" { // where it came from it is in its own
			if _, err := bundle.Write(t.Context(), io.Discard, s.model, p); err == nil {
				t.Errorf("%s: written", name)
			}
		}
	}
}

type entry struct {
	tar.Header
	data string
}

func archive(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func regular(name, data string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data}
}

// refused loads a hostile archive and checks that nothing came of it.
func refused(t *testing.T, name string, data io.Reader, s *saved) {
	t.Helper()
	outside := t.TempDir()
	t.Setenv("TMPDIR", filepath.Join(outside, "tmp"))
	if err := os.MkdirAll(filepath.Join(outside, "tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	place := filepath.Join(outside, "models")
	var no *store.Refused
	if v, err := bundle.Load(t.Context(), data, "oci:"+place+":v1", s.policy); !errors.As(err, &no) {
		t.Errorf("%s: %+v, %v", name, v, err)
	} else if strings.Contains(err.Error(), outside) {
		t.Errorf("%s: the error names the folder: %v", name, err)
	}
	filepath.WalkDir(outside, func(path string, d os.DirEntry, err error) error {
		if err == nil && path != outside && path != filepath.Join(outside, "tmp") {
			t.Errorf("%s: it left %s", name, path)
		}
		return nil
	})
}

func TestCase24HostileArchives(t *testing.T) {
	s := save(t)
	layout := regular("oci-layout", `{"imageLayoutVersion":"1.0.0"}`)
	blob := "blobs/sha256/" + strings.Repeat("a", 64)
	link := func(kind byte, name, to string) entry {
		return entry{tar.Header{Typeflag: kind, Name: name, Linkname: to, Mode: 0o777}, ""}
	}
	hostile := map[string][]entry{
		"parent":                {regular("../evil", "x")},
		"parent below":          {regular("blobs/../../evil", "x")},
		"absolute":              {regular("/tmp/evil", "x")},
		"drive":                 {regular(`C:\evil`, "x")},
		"backslash":             {regular(`blobs\sha256\evil`, "x")},
		"symlink then file":     {link(tar.TypeSymlink, "blobs/sha256", "/tmp"), regular("blobs/sha256/evil", "x")},
		"symlinked blob":        {layout, link(tar.TypeSymlink, blob, "/etc/passwd")},
		"hardlink":              {layout, link(tar.TypeLink, blob, "/etc/passwd")},
		"device":                {entry{tar.Header{Typeflag: tar.TypeChar, Name: blob, Devmajor: 1, Devminor: 3}, ""}},
		"pipe":                  {link(tar.TypeFifo, blob, "")},
		"setuid":                {entry{tar.Header{Typeflag: tar.TypeReg, Name: "oci-layout", Mode: 0o4755}, "{}"}},
		"duplicate":             {layout, layout},
		"another name":          {layout, regular("README.md", "x")},
		"nameless":              {regular("", "x")},
		"folder of another":     {entry{tar.Header{Typeflag: tar.TypeDir, Name: "../x/", Mode: 0o755}, ""}},
		"upper-case digest":     {regular("blobs/sha256/"+strings.Repeat("A", 64), "x")},
		"another algorithm":     {regular("blobs/sha512/"+strings.Repeat("a", 128), "x")},
		"no index":              {layout},
		"nothing":               {},
		"index that is no JSON": {layout, regular("index.json", "{")},
		"index without model":   {layout, regular("index.json", `{"schemaVersion":2,"manifests":[]}`)},
		"index of elsewhere":    {layout, regular("index.json", `{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:../../x","size":1,"annotations":{"org.opencontainers.image.ref.name":"model"}}]}`)},
	}
	for name, entries := range hostile {
		refused(t, name, bytes.NewReader(archive(t, entries...)), s)
	}
	var many []entry
	for i := range 5000 {
		many = append(many, regular(fmt.Sprintf("blobs/sha256/%064x", i), ""))
	}
	refused(t, "many entries", bytes.NewReader(archive(t, many...)), s) // refused at the first: its digest is another
	// A million folders, made as they are read.
	folder := archive(t, entry{tar.Header{Typeflag: tar.TypeDir, Name: "blobs/", Mode: 0o755}, ""})[:512]
	refused(t, "a million folders", io.LimitReader(&repeat{block: folder}, 1_000_000*512), s)
}

// repeat is a block again and again.
type repeat struct {
	block []byte
	at    int
}

func (r *repeat) Read(p []byte) (n int, err error) {
	for n < len(p) {
		c := copy(p[n:], r.block[r.at:])
		n, r.at = n+c, (r.at+c)%len(r.block)
	}
	return n, nil
}

func TestCase25ArchivesUnlikeTheirDigests(t *testing.T) {
	s := save(t)
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	z.Write(s.tar)
	z.Close()
	refused(t, "gzip", bytes.NewReader(zipped.Bytes()), s)
	refused(t, "cut short", bytes.NewReader(s.tar[:len(s.tar)/2]), s)
	refused(t, "bytes after the end", bytes.NewReader(append(bytes.Clone(s.tar), "more"...)), s)
	refused(t, "another archive after the end", bytes.NewReader(append(bytes.Clone(s.tar), s.tar...)), s)
	// A blob's last byte.
	damaged := bytes.Clone(s.tar)
	for at := 0; ; {
		size := 0
		if _, err := fmt.Sscanf(string(damaged[at+124:at+135]), "%o", &size); err != nil {
			t.Fatal(err)
		}
		if name := string(bytes.Trim(damaged[at:at+100], "\x00")); strings.HasPrefix(name, "blobs/sha256/") && size > 1000 {
			damaged[at+512+size-1] ^= 1
			break
		}
		at += 512 + (size+511)/512*512
	}
	refused(t, "another last byte", bytes.NewReader(damaged), s)
	// A header that promises more than anybody has.
	bomb := archive(t, regular("blobs/sha256/"+strings.Repeat("a", 64), "x"))
	copy(bomb[124:136], "77777777777\x00")
	refused(t, "a size of 8 GiB", bytes.NewReader(bomb), s)
}

// FuzzArchive: no archive but a good one is loaded, and none harms.
func FuzzArchive(f *testing.F) {
	f.Add(archive(f, regular("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), regular("index.json", `{"schemaVersion":2,"manifests":[]}`)))
	f.Add(archive(f, regular("../evil", "x")))
	f.Add([]byte{})
	place := "oci:" + f.TempDir()
	policy := signingtest.Policy(signingtest.Key(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		if v, err := bundle.Load(t.Context(), bytes.NewReader(data), place, policy); err == nil {
			t.Errorf("loaded %+v", v)
		}
	})
}
