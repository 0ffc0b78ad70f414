package verify_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/runners/step/serve"
	"github.com/temper-ml/temper/runners/step/sign"
	"github.com/temper-ml/temper/runners/step/verify"
	"github.com/temper-ml/temper/signing"
	keys "github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/statement"
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

// What a policy asks for beyond accuracies is asked of the signed figures, too.
func TestAllOfThePolicyIsAsked(t *testing.T) {
	t.Setenv(keys.PasswordVariable, signingtest.Password)
	dir := t.TempDir()
	key, folder := signingtest.KeyFolder(t)
	model := signingtest.Pack(t, "oci:"+filepath.Join(dir, "tiny")+":v1", signingtest.Judged(t, 1, 950), key)
	checks := "suite: standard\n  checks: {max_rise: 1, max_unbounded: 1, max_unconverged: 1, max_square_drop: 1, max_escalated_drop: 1, max_masked_drop: 1, max_zero_gradients: 1, max_overlap: 1, min_samples: 1}\n  "
	for name, c := range map[string]struct{ from, to, refusal string }{
		"as it was signed": {"attacks", "attacks", ""},
		"a suite":          {"attacks", "suite: standard\n  attacks", "suite"},
		"a proof":          {"attacks", "min_certified: 0.1\n  attacks", "nothing was proven"},
		"more confidence":  {"min_robust_accuracy: 0.5\n  max_clean_regression: 0\n  max_robust_regression: 0\n  min_samples: 1000\n  confidence: 0.95", "min_robust_accuracy: 0.935\n  max_clean_regression: 0\n  max_robust_regression: 0\n  min_samples: 1000\n  confidence: 0.9999", "robust accuracy"},
		"the same bound":   {"min_robust_accuracy: 0.5", "min_robust_accuracy: 0.935", ""},
		"checks":           {"attacks", checks + "attacks", "suite"},
	} {
		policy := strings.Replace(signingtest.Definition, c.from, c.to, 1)
		file := filepath.Join(t.TempDir(), "policy.yaml")
		if err := os.WriteFile(file, []byte(policy), 0o600); err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		code := step.Run(t.Context(), verify.Command(), []string{"--key", filepath.Join(folder, keys.PublicKeyFile), "--policy", file, "--dataset", signingtest.Dataset, model}, &out, &errs)
		if c.refusal == "" && code != step.ExitDone || c.refusal != "" && (code != step.ExitRefused || !strings.Contains(errs.String(), c.refusal)) {
			t.Errorf("%s: exit code %d: %s", name, code, &errs)
		}
	}
}

// Checks are judged by the policy's thresholds, whatever the signer thought of them.
func TestChecksAreJudgedAnew(t *testing.T) {
	limits := evaluate.DefaultThresholds()
	asked := verify.Requirement(gate.Policy{Checks: &limits}, "")
	var made []statement.Check
	for _, name := range limits.CheckNames() {
		made = append(made, statement.Check{Name: name, Pass: true, Figures: map[string]float64{
			"stated": 1, "fgsm": 1, "pgd-20": 0.5, "clean": 1, "noise": 1, "epsilons": 8, "chance": 0.1, "kinds": 2, "classes": 10, "samples": 1000,
			"rise": 0, "half": 0, "whole": 0, "drop": 0, "escalated_drop": 0, "escalated_samples": 50, "difference": 0, "probabilities": 0, "zero": 0, "overlap": 0, "confused_classes": 0,
		}})
	}
	if err := asked.Checks(made); err != nil {
		t.Error(err)
	}
	for i, c := range made {
		if err := asked.Checks(slices.Delete(slices.Clone(made), i, i+1)); err == nil || !strings.Contains(err.Error(), c.Name) {
			t.Errorf("without %s: %v", c.Name, err)
		}
		spoilt := slices.Clone(made)
		spoilt[i].Figures = nil
		if err := asked.Checks(spoilt); err == nil || !strings.Contains(err.Error(), c.Name) {
			t.Errorf("%s without figures: %v", c.Name, err)
		}
	}
}

// A digest that is none revokes nothing: it is not taken.
func TestRevokedAreDigests(t *testing.T) {
	dir := t.TempDir()
	key, folder := signingtest.KeyFolder(t)
	model := signingtest.Pack(t, "oci:"+filepath.Join(dir, "tiny")+":v1", signingtest.Judged(t, 1, 950), key)
	_, digest, _ := strings.Cut(model, "@")
	for revoked, want := range map[string]int{
		digest: step.ExitRefused, model: step.ExitRefused, "sha256:" + strings.Repeat("0", 64): step.ExitDone,
		strings.TrimPrefix(digest, "sha256:"): step.ExitBadInput, strings.ToUpper(digest): step.ExitBadInput, "zzz": step.ExitBadInput,
	} {
		var out, errs bytes.Buffer
		if code := step.Run(t.Context(), verify.Command(), []string{"--key", filepath.Join(folder, keys.PublicKeyFile), "--revoked", revoked, model}, &out, &errs); code != want {
			t.Errorf("--revoked %s: exit code %d: %s", revoked, code, &errs)
		}
	}
}
