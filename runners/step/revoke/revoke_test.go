package revoke_test

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/revoke"
	"github.com/temper-ml/temper/runners/step/verify"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
)

func TestCase33RevokeCommand(t *testing.T) {
	key, dir := signingtest.KeyFolder(t)
	t.Setenv(sign.PasswordVariable, signingtest.Password)
	place := "oci:" + filepath.Join(t.TempDir(), "tiny")
	model := signingtest.Pack(t, place+":v1", signingtest.Build(t, 1), key)
	_, digest, _ := strings.Cut(model, "@")
	private, public := filepath.Join(dir, sign.PrivateKeyFile), filepath.Join(dir, sign.PublicKeyFile)

	var out, errs bytes.Buffer
	if code := step.Run(t.Context(), verify.Command(), []string{"--key", public, model}, &out, &errs); code != step.ExitDone {
		t.Fatalf("before: exit code %d: %s", code, errs.String())
	}
	out.Reset()
	code := step.Run(t.Context(), revoke.Command(), []string{"--repository", place, "--key", private, "--reason", "test", "-o", "json", model}, &out, &errs)
	var result revoke.Result
	if err := json.Unmarshal(out.Bytes(), &result); code != step.ExitDone || err != nil || !slices.Equal(result.Revoked, []string{digest}) {
		t.Fatalf("exit code %d, %v, %+v: %s", code, err, result, errs.String())
	}
	errs.Reset()
	if code := step.Run(t.Context(), verify.Command(), []string{"--key", public, model}, &out, &errs); code != step.ExitRefused || !strings.Contains(errs.String(), "revoked") {
		t.Errorf("after: exit code %d: %s", code, errs.String())
	}
	for _, args := range [][]string{
		{"--repository", place, "--key", private, "v1"},
		{"--repository", place, "--key", "/nowhere.key", digest},
		{"--repository", place},
	} {
		if code := step.Run(t.Context(), revoke.Command(), args, &out, &errs); code != step.ExitBadInput {
			t.Errorf("%v: exit code %d", args, code)
		}
	}
}
