package signing_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/temper-ml/temper/signing"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// stockTool builds cosign or crane from its own module and returns its path.
// The first build of cosign takes some five minutes of one core; then it is in
// Go's build cache.
func stockTool(t *testing.T, name string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("building cosign takes minutes the first time")
	}
	build := exec.Command("go", "-C", "../e2e/tools", "tool", "-n", name)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	var narration bytes.Buffer
	build.Stderr = &narration
	out, err := build.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", build, err, narration.Bytes())
	}
	return strings.TrimSpace(string(out))
}

// What Temper writes, the stock tools accept; and what they write, Temper
// accepts.
func TestStockTools(t *testing.T) {
	cosign, crane := stockTool(t, "cosign"), stockTool(t, "crane")
	home := t.TempDir()
	// Any root keeps cosign from looking for sigstore's on the network; a
	// signature by a key needs none.
	env := append(os.Environ(), "HOME="+home, "SIGSTORE_ROOT_FILE="+os.DevNull, "COSIGN_PASSWORD="+signingtest.Password)
	tool := func(t *testing.T, name string, args ...string) (stdout []byte, err error) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Env = env
		var narration bytes.Buffer
		cmd.Stderr = &narration
		stdout, err = cmd.Output()
		if err != nil {
			t.Logf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, narration.Bytes())
		}
		return stdout, err
	}
	must := func(t *testing.T, name string, args ...string) []byte {
		t.Helper()
		out, err := tool(t, name, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}

	dir := filepath.Join(t.TempDir(), "layout")
	g, err := store.Start(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	key, keys := signingtest.KeyFolder(t)
	public := filepath.Join(keys, sign.PublicKeyFile)
	_, others := signingtest.KeyFolder(t)
	b := signingtest.Build(t, 1)
	place := g.Addr() + "/team/tiny"
	model := signingtest.Pack(t, place+":v1", b, key)
	car, err := store.Resolve(t.Context(), place+":v1"+signing.ModelcarSuffix)
	if err != nil {
		t.Fatal(err)
	}

	t.Run("cosign verify", func(t *testing.T) {
		for _, ref := range []string{model, car} {
			out := must(t, cosign, "verify", "--key", public, "--insecure-ignore-tlog=true", ref)
			var payloads []json.RawMessage
			if err := json.Unmarshal(out, &payloads); err != nil || len(payloads) != 1 || !bytes.Contains(out, []byte(digestIn(ref))) {
				t.Errorf("%s: %v: %s", ref, err, out)
			}
		}
		if _, err := tool(t, cosign, "verify", "--key", filepath.Join(others, sign.PublicKeyFile), "--insecure-ignore-tlog=true", model); err == nil {
			t.Error("another key was accepted")
		}
	})
	t.Run("cosign verify-attestation", func(t *testing.T) {
		for _, kind := range []string{statement.TestResultType, statement.RobustnessType} {
			out := must(t, cosign, "verify-attestation", "--key", public, "--insecure-ignore-tlog=true", "--type", kind, model)
			if !bytes.Contains(out, []byte("payload")) {
				t.Errorf("%s: %s", kind, out)
			}
			if _, err := tool(t, cosign, "verify-attestation", "--key", filepath.Join(others, sign.PublicKeyFile), "--insecure-ignore-tlog=true", "--type", kind, model); err == nil {
				t.Errorf("%s: another key was accepted", kind)
			}
		}
		if _, err := tool(t, cosign, "verify-attestation", "--key", public, "--insecure-ignore-tlog=true", "--type", "https://example.com/other", model); err == nil {
			t.Error("a type that was not attested was accepted")
		}
	})
	t.Run("cosign triangulate and tree", func(t *testing.T) {
		out := must(t, cosign, "triangulate", model)
		if want := place + ":" + strings.Replace(digestIn(model), ":", "-", 1) + ".sig"; strings.TrimSpace(string(out)) != want {
			t.Errorf("triangulate: %s, want %s", out, want)
		}
		if out := must(t, cosign, "tree", model); !bytes.Contains(out, []byte(".att")) {
			t.Errorf("tree: %s", out)
		}
	})
	t.Run("crane", func(t *testing.T) {
		if got := strings.TrimSpace(string(must(t, crane, "digest", place+":v1"))); got != digestIn(model) {
			t.Errorf("digest %s, want %s", got, digestIn(model))
		}
		var m struct{ ArtifactType string }
		if err := json.Unmarshal(must(t, crane, "manifest", model), &m); err != nil || m.ArtifactType != "application/vnd.cncf.model.manifest.v1+json" {
			t.Errorf("manifest: %+v, %v", m, err)
		}
		for _, ref := range []string{model, car} {
			must(t, crane, "validate", "--fast", "--remote", ref) // without --fast it takes every layer to be gzip
		}
		files := tar.NewReader(bytes.NewReader(must(t, crane, "export", car, "-")))
		for {
			h, err := files.Next()
			if err != nil {
				t.Fatalf("export: no models/model.onnx: %v", err)
			}
			if h.Name != "models/model.onnx" {
				continue
			}
			if got, err := io.ReadAll(files); err != nil || !bytes.Equal(got, b.Model) {
				t.Errorf("export: models/model.onnx is not the model: %v", err)
			}
			break
		}
		tags := string(must(t, crane, "ls", place))
		if !strings.Contains(tags, "v1\n") || !strings.Contains(tags, "v1-modelcar\n") {
			t.Errorf("ls: %s", tags)
		}
	})
	t.Run("copied by crane", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "pulled")
		must(t, crane, "pull", "--format=oci", place+":v1", out)
		got, err := store.Open(t.Context(), "oci:"+out+"@"+digestIn(model))
		if err != nil {
			t.Fatal(err)
		}
		defer got.Close()
		if a, err := got.Pull(t.Context(), store.Want{}); err != nil || len(a.Files) != 5 {
			t.Errorf("a layout of crane's: %v", err)
		}
		must(t, crane, "copy", place+":v1", g.Addr()+"/other/tiny:v1")
		if _, err := store.Resolve(t.Context(), g.Addr()+"/other/tiny:v1"); err != nil {
			t.Error(err)
		}
	})
	t.Run("signed by cosign", func(t *testing.T) {
		other := signingtest.Pack(t, place+":v2", signingtest.Build(t, 2))
		must(t, cosign, "sign", "--key", filepath.Join(keys, sign.PrivateKeyFile), "--tlog-upload=false", "--yes", other)
		policy := verify.Policy{Keys: []verify.Key{{Name: "a", PEM: key.PublicKey()}}}
		if _, err := verify.Verify(t.Context(), other, policy); err != nil {
			t.Error(err)
		}
	})
	t.Run("two signers", func(t *testing.T) {
		second, theirs := signingtest.KeyFolder(t)
		signed := signingtest.Build(t, 3)
		both := signingtest.Pack(t, place+":v3", signed, key)
		signingtest.Sign(t, both, signed, second)
		for _, folder := range []string{keys, theirs} {
			pub := filepath.Join(folder, sign.PublicKeyFile)
			must(t, cosign, "verify", "--key", pub, "--insecure-ignore-tlog=true", both)
			must(t, cosign, "verify-attestation", "--key", pub, "--insecure-ignore-tlog=true", "--type", statement.RobustnessType, both)
		}
		// Either tool's signature is one of the two.
		other := signingtest.Pack(t, place+":v4", signingtest.Build(t, 4), second)
		must(t, cosign, "sign", "--key", filepath.Join(keys, sign.PrivateKeyFile), "--tlog-upload=false", "--yes", other)
		policy := verify.Policy{Threshold: 2, Keys: []verify.Key{{Name: "a", PEM: key.PublicKey()}, {Name: "b", PEM: second.PublicKey()}}}
		if v, err := verify.Verify(t.Context(), other, policy); err != nil || len(v.Keys) != 2 {
			t.Errorf("%+v, %v", v, err)
		}
	})
	t.Run("a key of cosign's", func(t *testing.T) {
		cmd := exec.Command(cosign, "generate-key-pair")
		cmd.Dir = t.TempDir()
		cmd.Env = append(env, "COSIGN_PASSWORD=theirs")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		k, err := sign.LoadKey(t.Context(), filepath.Join(cmd.Dir, sign.PrivateKeyFile), func(bool) ([]byte, error) { return []byte("theirs"), nil })
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Sign(t.Context(), model); err != nil {
			t.Error(err)
		}
		must(t, cosign, "verify", "--key", filepath.Join(cmd.Dir, sign.PublicKeyFile), "--insecure-ignore-tlog=true", model)
	})
}
