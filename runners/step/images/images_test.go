package images

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

	"github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// build builds the runner contract's probe, a small program with dependencies.
func build(t *testing.T, flags ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "probe")
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-o", out}, flags...)
	cmd := exec.Command("go", append(args, "../testdata/probe")...)
	cmd.Env = append(os.Environ(), "GOOS=linux", "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return out
}

func image(t *testing.T, path string) (v1.Image, v1.Hash) {
	t.Helper()
	p, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	i, err := p.Image()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := i.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return i, digest
}

// Two builds, one digest; a program that differs, another.
func TestReproducible(t *testing.T) {
	_, first := image(t, build(t))
	_, second := image(t, build(t))
	if first != second {
		t.Errorf("two builds have the digests %s and %s", first, second)
	}
	if _, other := image(t, build(t, "-ldflags=-s")); other == first {
		t.Errorf("the images of two programs are one: %s", other)
	}
}

func TestImageHoldsOneProgram(t *testing.T) {
	path := build(t)
	i, _ := image(t, path)
	config, err := i.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if c := config.Config; c.User != "65532:65532" || strings.Join(c.Entrypoint, " ") != "/probe" || c.Labels["org.opencontainers.image.title"] != "probe" {
		t.Errorf("configuration is %+v", c)
	}
	layers, err := i.Layers()
	if err != nil {
		t.Fatal(err)
	}
	content := map[string][]byte{}
	for _, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		for archive := tar.NewReader(r); ; {
			h, err := archive.Next()
			if err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			if h.Uid != 0 || h.Gid != 0 || h.Mode&0o022 != 0 && h.Name != "tmp/" {
				t.Errorf("%s: owner %d:%d, mode %o: the program's user could change it", h.Name, h.Uid, h.Gid, h.Mode)
			}
			if h.Typeflag == tar.TypeReg {
				if content[h.Name], err = io.ReadAll(archive); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(content) != 2 || !bytes.Equal(content["probe"], program) {
		t.Errorf("the image holds %d files; want the program and the authorities", len(content))
	}
	if n := bytes.Count(content[authorities], []byte("BEGIN CERTIFICATE")); n < 100 {
		t.Errorf("%d certificate authorities", n)
	}
}

func TestOtherFilesAreRefused(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		text:                          "GOOS=linux",
		dir:                           "not a program",
		filepath.Join(dir, "missing"): "no such file",
		dynamic(t):                    "CGO_ENABLED=0",
	} {
		if _, err := Read(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want an error that says %q", path, err, want)
		}
	}
}

// dynamic is a program that needs a dynamic linker.
func dynamic(t *testing.T) string {
	t.Helper()
	const path = "/bin/ls"
	if _, err := os.Stat(path); err != nil {
		t.Skip(err)
	}
	return path
}

// trust asks for a signature by the key, and for nothing else.
func trust(k *sign.Key) verify.Policy {
	return verify.Policy{Keys: []verify.Key{{Name: "test", PEM: k.PublicKey()}}}
}

func TestPublish(t *testing.T) {
	ctx := t.Context()
	registry, err := store.Start(ctx, t.TempDir(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Close()
	key, folder := signingtest.KeyFolder(t)
	t.Setenv("COSIGN_PASSWORD", signingtest.Password)
	repository := registry.Addr() + "/temper"
	path := build(t)
	publish := func() string {
		var out, narration bytes.Buffer
		if code := step.Run(ctx, Command(), []string{"--repository", repository, "--tag", "v1", "--key", filepath.Join(folder, "cosign.key"), path}, &out, &narration); code != 0 {
			t.Fatalf("exit code %d\n%s", code, &narration)
		}
		return strings.TrimSpace(out.String())
	}
	ref := publish()
	if again := publish(); again != ref {
		t.Errorf("published again: %s, not %s", again, ref)
	}
	if tagged, err := store.Resolve(ctx, repository+"/probe:v1"); err != nil || tagged != ref {
		t.Errorf("the tag is %s (%v), not %s", tagged, err, ref)
	}
	if _, err := verify.Verify(ctx, ref, trust(key)); err != nil {
		t.Error(err)
	}
	if _, err := verify.Verify(ctx, ref, trust(signingtest.Key(t))); err == nil {
		t.Error("the image verifies with another key")
	}

	// The bill of materials is the image's one referrer.
	r, err := store.Open(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	index, err := remote.Referrers(r.Name().Context().Digest(r.Digest()), r.Options(ctx)...)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 {
		t.Fatalf("referrers: %+v", manifest.Manifests)
	}
	a, err := store.Pull(ctx, repository+"/probe@"+manifest.Manifests[0].Digest.String(), store.Want{Type: BillType})
	if err != nil {
		t.Fatal(err)
	}
	var bom cyclonedx.BOM
	if err := json.Unmarshal(a.Files[0].Data, &bom); err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, c := range *bom.Components {
		found[c.Name] = c.PackageURL != "" && c.Version != ""
	}
	if !found["stdlib"] || !found["github.com/spf13/cobra"] {
		t.Errorf("the bill of materials lists %v", found)
	}
}
