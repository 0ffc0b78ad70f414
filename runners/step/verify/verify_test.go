package verify_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/runners/step/serve"
	"github.com/temper-ml/temper/runners/step/sign"
	"github.com/temper-ml/temper/runners/step/verify"
	"github.com/temper-ml/temper/signing"
	keys "github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
)

// TestCase32TwoOfThree is docs/supply-chain.md's: two people sign, with a
// command each, and verify, promote and serve ask for both.
func TestCase32TwoOfThree(t *testing.T) {
	t.Setenv(keys.PasswordVariable, signingtest.Password)
	dir := t.TempDir()
	place, policyFile := "oci:"+filepath.Join(dir, "tiny"), filepath.Join(dir, "tiny.yaml")
	if err := os.WriteFile(policyFile, []byte(signingtest.Definition), 0o600); err != nil {
		t.Fatal(err)
	}
	var private, public []string
	for _, name := range []string{"ada", "grace", "joan"} {
		_, folder := signingtest.KeyFolder(t)
		data, err := os.ReadFile(filepath.Join(folder, keys.PublicKeyFile))
		if err != nil {
			t.Fatal(err)
		}
		pub := filepath.Join(dir, name+".pub")
		if err := os.WriteFile(pub, data, 0o644); err != nil {
			t.Fatal(err)
		}
		private, public = append(private, filepath.Join(folder, keys.PrivateKeyFile)), append(public, pub)
	}
	packed, err := signing.Pack(t.Context(), place+":v1", signingtest.Judged(t, 1, 950))
	if err != nil {
		t.Fatal(err)
	}
	model := packed.ModelPack
	run := func(cmd *cobra.Command, args ...string) (int, string) {
		var out, errs bytes.Buffer
		code := step.Run(t.Context(), cmd, args, &out, &errs)
		return code, errs.String()
	}
	signed := func(key string) {
		t.Helper()
		if code, stderr := run(sign.Command(), "--key", key, "--policy", policyFile, model); code != step.ExitDone {
			t.Fatalf("sign: exit code %d: %s", code, stderr)
		}
	}
	trusted := strings.Join(public, ",")
	verified := func(keys string) (int, string) {
		return run(verify.Command(), "--key", keys, "--signers", "2", "--policy", policyFile, "--dataset", signingtest.Dataset, model)
	}
	promoted := func() (int, string) {
		return run(promote.Command(), "--channel", place+":production", "--model", model, "--key", private[0], "--trust", trusted,
			"--signers", "2", "--policy", policyFile, "--dataset", signingtest.Dataset)
	}
	served := func() error {
		rules, err := (&verify.Trust{Keys: public, Threshold: 2, Policy: policyFile, Dataset: signingtest.Dataset}).Rules(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, source := range []serve.Source{&serve.Channel{Reference: place + ":production", Policy: rules}, &serve.Artifact{Reference: model, Policy: rules}} {
			if _, err := source.Load(t.Context(), ""); err != nil {
				return err
			}
		}
		return nil
	}
	twice := filepath.Join(dir, "ada again.pub")
	data, err := os.ReadFile(public[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(twice, data, 0o644); err != nil {
		t.Fatal(err)
	}

	refused := func(what string) {
		t.Helper()
		if code, stderr := verified(trusted); code != step.ExitRefused || !strings.Contains(stderr, "1 of 2 signers") {
			t.Errorf("%s: verify: exit code %d: %s", what, code, stderr)
		}
		if code, stderr := promoted(); code != step.ExitRefused || !strings.Contains(stderr, "1 of 2 signers") {
			t.Errorf("%s: promote: exit code %d: %s", what, code, stderr)
		}
	}
	signed(private[0])
	refused("one signature")
	signed(private[0])
	refused("the same key twice")
	if code, stderr := verified(public[0] + "," + twice); code == step.ExitDone {
		t.Errorf("one key in two files: exit code %d: %s", code, stderr)
	}
	// One key's channel and signature: nothing that a server takes.
	if code, stderr := run(promote.Command(), "--channel", place+":production", "--model", model, "--key", private[0],
		"--policy", policyFile, "--dataset", signingtest.Dataset); code != step.ExitDone {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	if err := served(); err == nil || !strings.Contains(err.Error(), "1 of 2 signers") {
		t.Errorf("served: %v", err)
	}
	signed(private[2])
	if code, stderr := verified(trusted); code != step.ExitDone {
		t.Errorf("two signers: verify: exit code %d: %s", code, stderr)
	}
	if code, stderr := promoted(); code != step.ExitDone {
		t.Errorf("two signers: promote: exit code %d: %s", code, stderr)
	}
	if err := served(); err != nil {
		t.Errorf("two signers: %v", err)
	}
}
