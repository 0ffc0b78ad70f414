package bundle_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/bundle"
	"github.com/temper-ml/temper/runners/step/verify"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
)

func TestBundleCommands(t *testing.T) {
	key, dir := signingtest.KeyFolder(t)
	public := filepath.Join(dir, sign.PublicKeyFile)
	model := signingtest.Pack(t, "oci:"+filepath.Join(t.TempDir(), "tiny")+":v1", signingtest.Build(t, 1), key)
	_, digest, _ := strings.Cut(model, "@")
	file, to := filepath.Join(t.TempDir(), "tiny.tar"), "oci:"+filepath.Join(t.TempDir(), "far")
	run := func(want int, args ...string) (result bundle.Result) {
		t.Helper()
		var out, errs bytes.Buffer
		code := step.Run(t.Context(), bundle.Command(), append(args, "-o", "json"), &out, &errs)
		if code != want {
			t.Fatalf("%v: exit code %d, want %d: %s", args, code, want, errs.String())
		}
		if code == step.ExitDone {
			if err := json.Unmarshal(out.Bytes(), &result); err != nil {
				t.Fatal(err)
			}
		}
		return result
	}
	if got := run(step.ExitDone, "save", "--model", model, "--key", public, "--output", file); got.Digest != digest {
		t.Errorf("%+v", got)
	}
	if got := run(step.ExitDone, "load", file, "--to", to+":v1", "--key", public); got.Reference != to+"@"+digest {
		t.Errorf("%+v", got)
	}
	var out, errs bytes.Buffer
	if code := step.Run(t.Context(), verify.Command(), []string{"--key", public, to + ":v1"}, &out, &errs); code != step.ExitDone {
		t.Errorf("exit code %d: %s", code, errs.String())
	}
	run(step.ExitBadInput, "load", "/nowhere.tar", "--to", to, "--key", public)
	run(step.ExitRefused, "load", public, "--to", to, "--key", public) // no archive
	if entries, err := os.ReadDir(filepath.Dir(file)); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v: a file of the way was left", entries, err)
	}
}
