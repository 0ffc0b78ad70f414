package verify_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	ggcr "github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sigstore/cosign/v2/pkg/types"
	"github.com/sigstore/sigstore/pkg/signature"
	sigdsse "github.com/sigstore/sigstore/pkg/signature/dsse"

	"github.com/temper-ml/temper/signing"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// panicVariable asks the test binary to verify a reference in its place, with
// a verifier that panics.
const (
	panicVariable = "TEMPER_TEST_PANIC"
	refVariable   = "TEMPER_TEST_REFERENCE"
	keyVariable   = "TEMPER_TEST_KEY"
)

func TestMain(m *testing.M) {
	where := os.Getenv(panicVariable)
	if where == "" {
		os.Exit(m.Run())
	}
	if where != "nowhere" {
		verify.PanicInVerification(where == "elsewhere")
	}
	v, err := verify.Verify(context.Background(), os.Getenv(refVariable), verify.Policy{Keys: []verify.Key{{Name: "a", PEM: []byte(os.Getenv(keyVariable))}}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		var refused *store.Refused
		if errors.As(err, &refused) {
			os.Exit(3)
		}
		os.Exit(1)
	}
	fmt.Println("verified", v.Digest)
}

func served(t *testing.T) string {
	t.Helper()
	g, err := store.Start(t.Context(), filepath.Join(t.TempDir(), "layout"), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g.Addr()
}

// refusedFor asserts a refusal that says why.
func refusedFor(t *testing.T, err error, why string) {
	t.Helper()
	var refused *store.Refused
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), why) {
		t.Errorf("error %v, want a refusal with %q", err, why)
	}
}

func TestVerifyAndLoad(t *testing.T) {
	key, b := signingtest.Key(t), signingtest.Build(t, 1)
	for _, place := range []string{served(t) + "/team/tiny", "oci:" + t.TempDir()} {
		ref := signingtest.Pack(t, place+":v1", b, key)
		m, err := verify.Load(t.Context(), place+":v1", signingtest.Policy(key))
		if err != nil {
			t.Fatal(err)
		}
		if m.Reference != ref || m.Network == nil || len(m.Keys) != 1 || m.Keys[0] != "a" || m.Robustness.Robust.Correct != 95 || m.TestResult.Result != statement.Passed || m.Metadata["temper.network"] != "tiny" {
			t.Errorf("%+v", m)
		}
		if _, err := verify.Verify(t.Context(), place+":v1-modelcar", verify.Policy{Keys: signingtest.Policy(key).Keys}); err != nil {
			t.Errorf("modelcar: %v", err)
		}
	}
}

// Artifacts that were signed, copied and revoked as case.json in each folder
// says, and the policy that they meet.
func TestCase27Case31Case32Case33Artifacts(t *testing.T) {
	keys := map[string]*sign.Key{}
	for _, name := range []string{"a", "b", "c", "stranger", "retired", "current"} {
		keys[name] = signingtest.Key(t)
	}
	host := served(t)
	corpus(t, "artifact", func(t *testing.T, read func(string) []byte) error {
		c := struct {
			SignedBy     []string          `json:"signed_by"`
			SignatureBy  []string          `json:"signature_by"` // who signs, and makes no statement
			SignedAt     string            `json:"signed_at"`    // the repository that it is copied from
			OtherDigest  bool              `json:"other_digest"` // signatures and statements lie beside another artifact
			Trusted      map[string]string `json:"trusted"`      // names in the policy and their keys
			Threshold    int               `json:"threshold"`
			Repositories []string          `json:"repositories"`
			Revoked      bool              `json:"revoked"`
		}{Trusted: map[string]string{"a": "a"}}
		decoder := json.NewDecoder(bytes.NewReader(read("case.json")))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&c); err != nil {
			t.Fatal(err)
		}
		here := host + "/" + filepath.Base(t.Name())
		at := here
		if c.SignedAt != "" {
			at = host + "/" + c.SignedAt
		}
		var signers []*sign.Key
		for _, name := range c.SignedBy {
			signers = append(signers, keys[name])
		}
		ref := signingtest.Pack(t, at+":v1", signingtest.Build(t, 1), signers...)
		for _, name := range c.SignatureBy {
			if _, err := keys[name].Sign(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
		}
		policy := signingtest.Policy()
		signed := 0 // by keys that the policy names
		for name, key := range c.Trusted {
			policy.Keys = append(policy.Keys, verify.Key{Name: name, PEM: keys[key].PublicKey()})
			if slices.Contains(c.SignedBy, key) {
				signed++
			}
		}
		policy.Threshold, policy.Repositories = c.Threshold, c.Repositories
		if c.Revoked {
			policy.Revoked = []string{ref[strings.IndexByte(ref, '@')+1:]}
		}
		switch {
		case c.OtherDigest:
			other := signingtest.Pack(t, at+":v2", signingtest.Build(t, 2))
			for _, suffix := range []string{".sig", ".att"} {
				copyTag(t, mustTag(t, ref+suffix), mustTag(t, other+suffix).Name())
			}
			ref = other
		case at != here:
			if _, err := verify.Verify(t.Context(), ref, policy); err != nil {
				t.Fatalf("where it was signed: %v", err)
			}
			copyAll(t, ref, here)
			ref = here + ":v1"
		}
		v, err := verify.Verify(t.Context(), ref, policy)
		if err == nil && len(v.Keys) != signed {
			t.Errorf("signed by %v, of %d keys", v.Keys, signed)
		}
		return err
	})
}

// mustTag turns REPO@sha256:HEX.SUFFIX into cosign's tag.
func mustTag(t *testing.T, ref string) name.Tag {
	t.Helper()
	tag, err := name.NewTag(strings.Replace(ref, "@sha256:", ":sha256-", 1))
	if err != nil {
		t.Fatal(err)
	}
	return tag
}

// copyAll copies an artifact with its signatures, as cosign copy does.
func copyAll(t *testing.T, from, to string) {
	t.Helper()
	source, err := name.NewDigest(from)
	if err != nil {
		t.Fatal(err)
	}
	for src, dst := range map[name.Reference]string{
		source:                  to + ":v1",
		mustTag(t, from+".sig"): mustTag(t, to+from[strings.IndexByte(from, '@'):]+".sig").Name(),
		mustTag(t, from+".att"): mustTag(t, to+from[strings.IndexByte(from, '@'):]+".att").Name(),
	} {
		copyTag(t, src, dst)
	}
}

func copyTag(t *testing.T, src name.Reference, dst string) {
	t.Helper()
	image, err := remote.Image(src)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(dst)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, image); err != nil {
		t.Fatal(err)
	}
}

func signatureOf(t *testing.T, k signature.Signer, payload []byte) store.File {
	t.Helper()
	sig, err := k.SignMessage(bytes.NewReader(payload))
	if err != nil {
		t.Fatal(err)
	}
	return store.File{
		MediaType:   types.SimpleSigningMediaType,
		Data:        payload,
		Annotations: map[string]string{"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(sig)},
	}
}

func statementOf(t *testing.T, k signature.Signer, body []byte) store.File {
	t.Helper()
	envelope, err := sigdsse.WrapSigner(k, types.IntotoPayloadType).SignMessage(bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	return store.File{MediaType: types.DssePayloadType, Data: envelope}
}

// attach puts signatures ("sig") or statements ("att") beside an artifact, in
// place of those that it has.
func attach(t *testing.T, ref, suffix string, files ...store.File) {
	t.Helper()
	r, err := store.Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	at, err := r.At(strings.Replace(r.Digest(), ":", "-", 1) + "." + suffix)
	if err != nil {
		t.Fatal(err)
	}
	for i := range files {
		files[i].Name = fmt.Sprint(i)
	}
	if _, err := at.Push(t.Context(), &store.Artifact{Files: files, Config: &store.Config{MediaType: ocispec.MediaTypeImageConfig, Data: []byte("{}")}}); err != nil {
		t.Fatal(err)
	}
}

// corpus runs a test for each folder of testdata/kind. A folder's name ends in
// _fail, with the words of the refusal in its file want, or in _ok. The word
// DIGEST in its files is the model's digest, in hex.
func corpus(t *testing.T, kind string, run func(t *testing.T, read func(file string) []byte) error) {
	folders, err := filepath.Glob(filepath.Join("testdata", kind, "*"))
	if err != nil || len(folders) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, folder := range folders {
		t.Run(filepath.Base(folder), func(t *testing.T) {
			read := func(file string) []byte {
				data, err := os.ReadFile(filepath.Join(folder, file))
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
				return data
			}
			err := run(t, read)
			switch want := strings.TrimSpace(string(read("want"))); {
			case strings.HasSuffix(folder, "_ok"):
				if err != nil {
					t.Error(err)
				}
			case !strings.HasSuffix(folder, "_fail"), want == "":
				t.Fatal("a case is named _ok, or _fail with a file want")
			default:
				refusedFor(t, err, want)
			}
		})
	}
}

// Signatures by a trusted key over the payload in each folder.
func TestCase28MalformedPayloads(t *testing.T) {
	key, signer := signingtest.Signer(t)
	ref := signingtest.Pack(t, served(t)+"/team/tiny:v1", signingtest.Build(t, 1), key)
	digest := ref[strings.LastIndexByte(ref, ':')+1:]
	policy := verify.Policy{Keys: signingtest.Policy(key).Keys, Repositories: []string{"ghcr.io/prod/*", "ghcr.io/exact"}}
	corpus(t, "signature", func(t *testing.T, read func(string) []byte) error {
		sig := signatureOf(t, signer, bytes.ReplaceAll(read("payload"), []byte("DIGEST"), []byte(digest)))
		if b64 := read("signature"); b64 != nil {
			sig.Annotations["dev.cosignproject.cosign/signature"] = string(bytes.TrimSpace(b64))
		}
		attach(t, ref, "sig", sig)
		_, err := verify.Verify(t.Context(), ref, policy)
		return err
	})
}

func TestCase28TooManyAndTooLarge(t *testing.T) {
	key := signingtest.Key(t)
	// A registry that does not check what a manifest says.
	var served atomic.Int64
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") {
			served.Add(1)
		}
		inner.ServeHTTP(w, req)
	}))
	defer s.Close()
	ref := signingtest.Pack(t, strings.TrimPrefix(s.URL, "http://")+"/tiny:v1", signingtest.Build(t, 1), key)
	list := mustTag(t, ref+".sig")
	r, err := store.Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	at, err := r.At(list.TagStr())
	if err != nil {
		t.Fatal(err)
	}
	good, _, err := at.Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	put := func(m ocispec.Manifest) {
		data, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		req, _ := http.NewRequest(http.MethodPut, s.URL+"/v2/tiny/manifests/"+list.TagStr(), bytes.NewReader(data))
		req.Header.Set("Content-Type", ocispec.MediaTypeImageManifest)
		if resp, err := http.DefaultClient.Do(req); err != nil || resp.StatusCode != http.StatusCreated {
			t.Fatal(resp, err)
		}
	}
	policy := verify.Policy{Keys: signingtest.Policy(key).Keys}
	many := func(n int, size int64) ocispec.Manifest {
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: good.Config}
		for range n {
			l := good.Layers[0]
			if size != 0 {
				l.Size = size
			}
			m.Layers = append(m.Layers, l)
		}
		return m
	}
	empty := many(1, 0)
	empty.Layers[0].Size = 0
	put(many(2, 0))
	if _, err := verify.Verify(t.Context(), ref, policy); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		manifest ocispec.Manifest
		why      string
	}{
		"200 signatures":      {many(200, 0), "200 signatures"},
		"10,000 signatures":   {many(10_000, 0), "10000 signatures"},
		"one of 100 MB":       {many(1, 100<<20), "bytes"},
		"of negative size":    {many(1, -1), "bytes"},
		"of size 0":           {empty, "bytes"},
		"size unlike content": {many(1, good.Layers[0].Size+1), ""},
	} {
		t.Run(name, func(t *testing.T) {
			put(c.manifest)
			served.Store(0)
			_, err := verify.Verify(t.Context(), ref, policy)
			refusedFor(t, err, c.why)
			if n := served.Load(); n > 3 {
				t.Errorf("%d blobs were fetched", n)
			}
		})
	}
}

func TestCase29PanicInVerification(t *testing.T) {
	key := signingtest.Key(t)
	ref := signingtest.Pack(t, "oci:"+t.TempDir()+":v1", signingtest.Build(t, 1), key)
	for where, ok := range map[string]bool{"nowhere": true, "here": false, "elsewhere": false} {
		t.Run(where, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), panicVariable+"="+where, refVariable+"="+ref, keyVariable+"="+string(key.PublicKey()))
			out, err := cmd.Output()
			if verified := strings.Contains(string(out), "verified"); verified != ok || (err == nil) != ok {
				t.Errorf("%v: %s", err, out)
			}
			var exit *exec.ExitError
			if where == "here" && (!errors.As(err, &exit) || exit.ExitCode() != 3) {
				t.Errorf("a panic is a refusal: %v", err)
			}
		})
	}
}

// Statements by a trusted key: each folder replaces one of the two that a
// model needs. With a file model-layer.json, which holds annotations, the
// artifact is another: its only layer, with these annotations, is the report.
func TestCase30Statements(t *testing.T) {
	key, signer := signingtest.Signer(t)
	_, stranger := signingtest.Signer(t)
	b := signingtest.Build(t, 1)
	ref := signingtest.Pack(t, served(t)+"/team/tiny:v1", b, key)
	digest := ref[strings.IndexByte(ref, '@')+1:]
	figures, err := b.Robustness("", "fast", 1)
	if err != nil {
		t.Fatal(err)
	}
	corpus(t, "statement", func(t *testing.T, read func(string) []byte) error {
		ref, digest := ref, digest
		if annotations := read("model-layer.json"); annotations != nil {
			ref = relabelled(t, ref, annotations, key)
			digest = ref[strings.IndexByte(ref, '@')+1:]
		}
		by := signer
		if read("stranger") != nil {
			by = stranger
		}
		var files []store.File
		for file, predicate := range map[string]struct {
			kind  string
			value any
		}{
			"test-result.json": {statement.TestResultType, signingtest.Passed()},
			"robustness.json":  {statement.RobustnessType, figures},
		} {
			if body := read(file); body != nil {
				body = bytes.ReplaceAll(body, []byte("MODEL"), []byte(figures.ModelDigest))
				body = bytes.ReplaceAll(body, []byte("DIGEST"), []byte(strings.TrimPrefix(digest, "sha256:")))
				files = append(files, statementOf(t, by, body))
				continue
			}
			if read("without-"+strings.TrimSuffix(file, ".json")) != nil {
				continue
			}
			body, err := statement.New("tiny", digest, predicate.kind, predicate.value)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, statementOf(t, signer, body))
		}
		attach(t, ref, "att", files...)
		_, err := verify.Verify(t.Context(), ref, signingtest.Policy(key))
		return err
	})
}

// relabelled signs a ModelPack like that of ref, of whose layers there is only
// the report, with the given annotations.
func relabelled(t *testing.T, ref string, annotations []byte, key *sign.Key) string {
	t.Helper()
	r, err := store.Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	m, _, err := r.Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m.Layers = slices.DeleteFunc(m.Layers, func(l ocispec.Descriptor) bool { return store.FileName(l) != signing.ReportFile })
	if err := json.Unmarshal(annotations, &m.Layers[0].Annotations); err != nil {
		t.Fatal(err)
	}
	delete(m.Layers[0].Annotations, ocispec.AnnotationTitle)
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	at, err := r.At("sha256:" + hex.EncodeToString(sum[:]))
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Put(at.Name(), manifest(data), at.Options(t.Context())...); err != nil {
		t.Fatal(err)
	}
	if _, err := key.Sign(t.Context(), at.String()); err != nil {
		t.Fatal(err)
	}
	return at.String()
}

// manifest is an image manifest as it is pushed.
type manifest []byte

func (m manifest) RawManifest() ([]byte, error)       { return m, nil }
func (m manifest) MediaType() (ggcr.MediaType, error) { return ggcr.OCIManifestSchema1, nil }

// A policy that would not mean what it seems to is refused.
func TestCase31Case32PoliciesThatAreNone(t *testing.T) {
	key := signingtest.Key(t)
	ref := signingtest.Pack(t, served(t)+"/prod/tiny:v1", signingtest.Build(t, 1), key)
	if _, err := verify.Verify(t.Context(), ref, verify.Policy{}); err == nil {
		t.Error("accepted without a key")
	}
	twice := []verify.Key{{Name: "a", PEM: key.PublicKey()}, {Name: "b", PEM: key.PublicKey()}}
	if _, err := verify.Verify(t.Context(), ref, verify.Policy{Threshold: 2, Keys: twice}); err == nil {
		t.Error("one key under two names counts twice")
	}
	for _, pattern := range []string{"prod", "*", "ghcr.io/*/x", "ghcr.io/prod*", "ghcr.io/.*", "", "https://ghcr.io/x"} {
		policy := verify.Policy{Keys: signingtest.Policy(key).Keys, Repositories: []string{pattern}}
		if _, err := verify.Verify(t.Context(), ref, policy); err == nil {
			t.Errorf("pattern %q was accepted", pattern)
		}
	}
}

// A registry that moves the tag after every time that it was read.
func TestCase34TagMovedBetweenVerifyAndPull(t *testing.T) {
	key := signingtest.Key(t)
	var moving atomic.Bool
	var reads atomic.Int32
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if moving.Load() && strings.HasSuffix(req.URL.Path, "/manifests/v1") && reads.Add(1) > 1 {
			req.URL.Path = strings.TrimSuffix(req.URL.Path, "v1") + "evil"
		}
		inner.ServeHTTP(w, req)
	}))
	defer s.Close()
	place := strings.TrimPrefix(s.URL, "http://") + "/tiny"
	good := signingtest.Pack(t, place+":v1", signingtest.Build(t, 1), key)
	signingtest.Pack(t, place+":evil", signingtest.Build(t, 2))
	moving.Store(true)
	m, err := verify.Load(t.Context(), place+":v1", signingtest.Policy(key))
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := m.File(statement.ModelFile)
	if want := signingtest.Build(t, 1).Model; err != nil || m.Reference != good || !bytes.Equal(loaded, want) {
		t.Errorf("verified %s, loaded %s, %v", good, m.Reference, err)
	}
	if n := reads.Load(); n != 1 {
		t.Errorf("the tag was read %d times", n)
	}
}

func TestUnavailableIsNotRefused(t *testing.T) {
	key := signingtest.Key(t)
	policy := signingtest.Policy(key)
	var down *store.Unavailable
	if _, err := verify.Verify(t.Context(), "127.0.0.1:1/tiny:v1", policy); !errors.As(err, &down) {
		t.Errorf("error %v", err)
	}
	var absent *store.NotFound
	if _, err := verify.Verify(t.Context(), served(t)+"/tiny:v1", policy); !errors.As(err, &absent) {
		t.Errorf("error %v", err)
	}
}

func TestPolicyCombinations(t *testing.T) {
	good := signingtest.Policy(signingtest.Key(t))
	for name, spoil := range map[string]func(*verify.Policy){
		"no keys":              func(p *verify.Policy) { p.Keys = nil },
		"a key that is none":   func(p *verify.Policy) { p.Keys[0].PEM = []byte("x") },
		"threshold above keys": func(p *verify.Policy) { p.Threshold = 2 },
		"negative threshold":   func(p *verify.Policy) { p.Threshold = -1 },
		"accuracy above 1":     func(p *verify.Policy) { p.Robustness.Clean = 98 },
	} {
		p := good
		p.Keys = append([]verify.Key{}, good.Keys...)
		q := *good.Robustness
		p.Robustness = &q
		spoil(&p)
		if _, err := verify.Verify(t.Context(), "oci:"+t.TempDir()+":v1", p); err == nil || !strings.Contains(err.Error(), "policy") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Package serve links this package: it must stay free of Kubernetes and KMS.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range strings.Fields(string(out)) {
		for _, not := range []string{"k8s.io/", "gorgonia.org/", "github.com/sigstore/sigstore/pkg/signature/kms", "golearn"} {
			if strings.HasPrefix(p, not) || not == "golearn" && strings.Contains(p, not) {
				t.Errorf("depends on %s", p)
			}
		}
	}
}
