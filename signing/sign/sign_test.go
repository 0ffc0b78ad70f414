package sign_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

func TestGenerateKeyPair(t *testing.T) {
	_, dir := signingtest.KeyFolder(t)
	private := filepath.Join(dir, sign.PrivateKeyFile)
	info, err := os.Stat(private)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v, %v", private, info.Mode(), err)
	}
	before, _ := os.ReadFile(private)
	none := func(bool) ([]byte, error) { return nil, nil }
	if err := sign.GenerateKeyPair(dir, none); err == nil || !strings.Contains(err.Error(), "never replaced") {
		t.Errorf("a second key pair: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, sign.PublicKeyFile)); err != nil {
		t.Fatal(err)
	}
	if err := sign.GenerateKeyPair(dir, none); err == nil {
		t.Error("a private key was replaced")
	}
	if after, _ := os.ReadFile(private); string(after) != string(before) {
		t.Error("the private key changed")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	if err := sign.GenerateKeyPair(filepath.Join(dir, "absent"), none); err == nil {
		t.Error("a folder that does not exist was accepted")
	}
}

func TestLoadKey(t *testing.T) {
	_, dir := signingtest.KeyFolder(t)
	file := filepath.Join(dir, sign.PrivateKeyFile)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TEMPER_TEST_KEY", string(data))
	t.Setenv(sign.PasswordVariable, signingtest.Password)
	for _, ref := range []string{file, "env://TEMPER_TEST_KEY"} {
		if _, err := sign.LoadKey(t.Context(), ref, sign.EnvironmentPassword); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
	}
	for _, ref := range []string{"", "absent.key", filepath.Join(dir, sign.PublicKeyFile), "env://ABSENT", "http://localhost/cosign.key", "nokms://x"} {
		if _, err := sign.LoadKey(t.Context(), ref, sign.EnvironmentPassword); err == nil {
			t.Errorf("%q was loaded", ref)
		}
	}
}

// A key's service that does not answer may answer later; a wrong reference is
// wrong for good.
func TestLoadKeyOutage(t *testing.T) {
	dir := t.TempDir()
	cluster := filepath.Join(dir, "kubeconfig")
	files := map[string]string{
		cluster:                                  kubeconfig,
		filepath.Join(dir, "sigstore-kms-down"):  "#!/bin/sh\necho '{\"errorMessage\":\"dial tcp 10.0.0.1:443: i/o timeout\"}'\nexit 1\n",
		filepath.Join(dir, "sigstore-kms-wrong"): "#!/bin/sh\necho '{\"errorMessage\":\"404: no such key\"}'\nexit 1\n",
	}
	for path, content := range files {
		if err := os.WriteFile(path, []byte(content), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	t.Setenv("KUBECONFIG", cluster)
	for ref, outage := range map[string]bool{
		"k8s://temper/signing-key": true, "down://key": true,
		"wrong://key": false, "absent://key": false, "k8s://malformed": false, "env://TIMEOUT": false, filepath.Join(dir, "timeout"): false,
	} {
		if strings.HasPrefix(ref, "down:") && runtime.GOOS == "windows" {
			continue // no shell for the plugin
		}
		_, err := sign.LoadKey(t.Context(), ref, sign.EnvironmentPassword)
		var down *sign.Unavailable
		if err == nil || errors.As(err, &down) != outage || !strings.Contains(err.Error(), ref) {
			t.Errorf("%s: error %v, an outage: %v", ref, err, outage)
		}
	}
}

// kubeconfig names a cluster that does not answer.
const kubeconfig = `{"apiVersion": "v1", "kind": "Config", "current-context": "c",
"clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
"contexts": [{"name": "c", "context": {"cluster": "c"}}]}`

func TestCase19PasswordInErrors(t *testing.T) {
	_, dir := signingtest.KeyFolder(t)
	const wrong = "hunter2-is-wrong"
	t.Setenv(sign.PasswordVariable, wrong)
	_, err := sign.LoadKey(t.Context(), filepath.Join(dir, sign.PrivateKeyFile), sign.EnvironmentPassword)
	if err == nil || strings.Contains(err.Error(), wrong) || !strings.Contains(err.Error(), sign.PasswordVariable) {
		t.Errorf("error %v", err)
	}
	os.Unsetenv(sign.PasswordVariable)
	if _, err := sign.LoadKey(t.Context(), filepath.Join(dir, sign.PrivateKeyFile), sign.EnvironmentPassword); err == nil || !strings.Contains(err.Error(), "set "+sign.PasswordVariable) {
		t.Errorf("error %v", err)
	}
	// No part of the environment, such as a secret, reaches what is pushed.
	t.Setenv(sign.PasswordVariable, signingtest.Password)
	t.Setenv("PLANTED", "hunter2-is-planted")
	layout := t.TempDir()
	signingtest.Pack(t, "oci:"+layout+":v1", signingtest.Build(t, 1), signingtest.Key(t))
	err = filepath.WalkDir(layout, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		for _, secret := range []string{"hunter2-is-planted", signingtest.Password, "PRIVATE KEY"} {
			if strings.Contains(string(data), secret) {
				t.Errorf("%s holds %q", path, secret)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// layers is how many signatures ("sig") or statements ("att") an artifact has.
func layers(t *testing.T, ref, suffix string) int {
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
	m, _, err := at.Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return len(m.Layers)
}

func TestSigningIsIdempotent(t *testing.T) {
	b, key, other := signingtest.Build(t, 1), signingtest.Key(t), signingtest.Key(t)
	ref := signingtest.Pack(t, "oci:"+t.TempDir()+":v1", b, key)
	for range 2 {
		signingtest.Sign(t, ref, b, key)
	}
	if sig, att := layers(t, ref, "sig"), layers(t, ref, "att"); sig != 1 || att != 2 {
		t.Errorf("signed three times by one key: %d signatures, %d statements", sig, att)
	}
	signingtest.Sign(t, ref, b, other)
	if sig, att := layers(t, ref, "sig"), layers(t, ref, "att"); sig != 2 || att != 4 {
		t.Errorf("signed by two keys: %d signatures, %d statements", sig, att)
	}
	failed := &statement.TestResult{Result: statement.Failed, Configuration: []statement.Resource{}, FailedTests: []string{"robust"}}
	if _, err := key.Attest(t.Context(), ref, statement.TestResultType, failed); err != nil {
		t.Fatal(err)
	}
	if att := layers(t, ref, "att"); att != 4 {
		t.Errorf("a new statement in place of the key's own: %d statements", att)
	}
	if _, err := verify.Verify(t.Context(), ref, signingtest.Policy(key, other)); err == nil {
		t.Error("a failed test result was accepted")
	}
}

// Signers that write at the same moment do not lose each other's signature.
func TestSignersAtOnce(t *testing.T) {
	ref := signingtest.Pack(t, "oci:"+t.TempDir()+":v1", signingtest.Build(t, 1))
	const signers = 3
	var group sync.WaitGroup
	for range signers {
		key := signingtest.Key(t)
		group.Go(func() {
			if _, err := key.Sign(t.Context(), ref); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if n := layers(t, ref, "sig"); n != signers {
		t.Errorf("%d signatures of %d", n, signers)
	}
}

func TestAttestRefusesImpossibleFigures(t *testing.T) {
	b, key := signingtest.Build(t, 1), signingtest.Key(t)
	ref := signingtest.Pack(t, "oci:"+t.TempDir()+":v1", b)
	figures, err := b.Robustness("", "fast", 1)
	if err != nil {
		t.Fatal(err)
	}
	figures.Robust.LowerBound = 2
	if _, err := key.Attest(t.Context(), ref, statement.RobustnessType, figures); err == nil {
		t.Error("a lower bound of 2 was attested")
	}
}
