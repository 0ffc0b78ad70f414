package sign_test

import (
	"bytes"
	"encoding/json"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/runners/step/sign"
	signer "github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
)

func run(t *testing.T, args ...string) (code int, result sign.Result, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = step.Run(t.Context(), sign.Command(), append(args, "-o", "json"), &out, &errs)
	if code == step.ExitDone {
		if err := json.Unmarshal(out.Bytes(), &result); err != nil {
			t.Fatal(err)
		}
	}
	return code, result, errs.String()
}

// files are the contents below a folder.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		found[path] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestSign(t *testing.T) {
	_, dir := signingtest.KeyFolder(t)
	t.Setenv(signer.PasswordVariable, signingtest.Password)
	key, rules, layout := filepath.Join(dir, signer.PrivateKeyFile), filepath.Join(dir, "tiny.yaml"), t.TempDir()
	demanding := strings.Replace(signingtest.Definition, "min_robust_accuracy: 0.5", "min_robust_accuracy: 0.8", 1)
	if demanding == signingtest.Definition {
		t.Fatal("the definition is another one now")
	}
	if err := os.WriteFile(rules, []byte(demanding), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("twice changes nothing", func(t *testing.T) {
		ref := signingtest.Pack(t, "oci:"+layout+":v1", signingtest.Judged(t, 1, 950))
		for n := range 2 {
			before := files(t, layout)
			code, result, stderr := run(t, "--key", key, "--policy", rules, ref)
			if code != step.ExitDone || result.Verdict != "signed" {
				t.Fatalf("exit code %d, %+v, %s", code, result, stderr)
			}
			if same := maps.Equal(before, files(t, layout)); same != (n == 1) {
				t.Errorf("time %d: nothing changed: %v", n+1, same)
			}
		}
	})
	t.Run("the reasons are those of the rejected", func(t *testing.T) {
		weak := signingtest.Pack(t, "oci:"+layout+":weak", signingtest.Judged(t, 2, 600))
		good := signingtest.Pack(t, "oci:"+layout+":good", signingtest.Judged(t, 3, 950))
		for _, refs := range [][]string{{weak, good}, {good, weak}} {
			code, result, stderr := run(t, append([]string{"--key", key, "--policy", rules}, refs...)...)
			if code != step.ExitDone || result.Verdict != "rejected" || !slices.ContainsFunc(result.Reasons, func(r gate.Reason) bool { return !r.Pass }) {
				t.Errorf("exit code %d, %+v, %s", code, result, stderr)
			}
		}
	})
}

// Both commands that load a key end alike where its service is down.
func TestKeyOutage(t *testing.T) {
	cluster := filepath.Join(t.TempDir(), "kubeconfig")
	const down = `{"apiVersion": "v1", "kind": "Config", "current-context": "c",
"clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
"contexts": [{"name": "c", "context": {"cluster": "c"}}]}`
	if err := os.WriteFile(cluster, []byte(down), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", cluster)
	for key, code := range map[string]int{"k8s://temper/signing-key": step.ExitUnavailable, "k8s://malformed": step.ExitBadInput, "absent.key": step.ExitBadInput} {
		var errs bytes.Buffer
		signs := step.Run(t.Context(), sign.Command(), []string{"--key", key, "oci:absent:v1"}, io.Discard, &errs)
		promotes := step.Run(t.Context(), promote.Command(), []string{"--key", key, "--channel", "oci:absent:production", "--model", "oci:absent:v1", "--policy", "wong"}, io.Discard, &errs)
		if signs != code || promotes != code {
			t.Errorf("%s: exit codes %d and %d, want %d: %s", key, signs, promotes, code, errs.String())
		}
	}
}
