package check

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
)

const definition = `
name: mine
network: wong
dataset: mnist
recipe:
  train: {batch: 16, optimiser: {learning_rate: 0.005}, schedule: {kind: triangular}, phases: [{method: standard, epochs: 3}]}
  retrain: {batch: 16, optimiser: {learning_rate: 0.005}, schedule: {kind: triangular}, phases: [{method: fgsm, epochs: 3}]}
threat: {norm: linf, epsilon: 0.25}
policy: {attacks: [fgsm], min_clean_accuracy: 0.5, min_robust_accuracy: 0.5, max_clean_regression: 1, max_robust_regression: 1, min_samples: 1000, confidence: 0.95}
`

// source is a source tree with two definitions, a recipe and a link out of it.
func source(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "models/zoo/recipes"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"models/mine.yaml": definition, "models/zoo/other.yaml": definition, "models/zoo/recipes/fast.yaml": "batch: 1",
		"models/bad.yaml": strings.Replace(definition, "epsilon", "epsilom", 1),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/hostname", filepath.Join(dir, "models/link.yaml")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestWhichFileOfACommitIsChecked(t *testing.T) {
	dir := source(t)
	for changed, want := range map[string]string{
		"models/mine.yaml,README.md":                     "models/mine.yaml",
		"models/zoo/other.yaml,models/removed.yaml":      "models/zoo/other.yaml",
		"models/attack/pgd.go,models/zoo/recipes/x.yaml": "models/mine.yaml", // the fallback
		"":                                  "models/mine.yaml",
		"models/mine.yaml,models/mine.yaml": "models/mine.yaml",
	} {
		got, err := Select(dir, "", "models/mine.yaml", strings.Split(changed, ","))
		if err != nil || got != filepath.Join(dir, want) {
			t.Errorf("%s: %s, %v", changed, got, err)
		}
	}
	for name, c := range map[string]struct{ file, changed string }{
		"two changed":       {"", "models/mine.yaml,models/zoo/other.yaml"},
		"climbs":            {"../x.yaml", ""},
		"absolute":          {"/etc/hostname", ""},
		"a link that leads": {"models/link.yaml", ""},
		"a changed link":    {"", "models/link.yaml"},
		"absent":            {"models/absent.yaml", ""},
	} {
		if got, err := Select(dir, c.file, "models/mine.yaml", strings.Split(c.changed, ",")); err == nil {
			t.Errorf("%s: took %s", name, got)
		}
	}
}

func TestADefinitionIsTriedAndPushed(t *testing.T) {
	dir := source(t)
	run := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := step.Run(t.Context(), Command(), append([]string{"--source=" + dir}, args...), &out, &errs)
		return code, strings.TrimSpace(out.String()), errs.String()
	}
	layout := "oci:" + filepath.Join(t.TempDir(), "out")
	code, ref, stderr := run("--changed=models/mine.yaml", "--output="+layout+":definition", "--results="+filepath.Join(dir, "results"))
	if code != 0 || !strings.HasPrefix(ref, layout+"@sha256:") {
		t.Fatalf("exit code %d, printed %q: %s", code, ref, stderr)
	}
	if epsilon, _ := os.ReadFile(filepath.Join(dir, "results", "epsilon")); string(epsilon) != "0.25" {
		t.Errorf("result epsilon: %q", epsilon)
	}
	m, err := artifact.Definition(t.Context(), ref)
	if err != nil || m.Name != "mine" {
		t.Errorf("%+v, %v", m, err)
	}
	if code, out, stderr := run("--file=models/bad.yaml"); code != step.ExitBadInput || out != "" || !strings.Contains(stderr, "epsilom") {
		t.Errorf("a key that does not exist: exit code %d, %q, %s", code, out, stderr)
	}
	wrong := strings.Replace(definition, "network: wong", "network: {name: w, input: {height: 8, width: 8, channels: 1}, layers: [{dense: {units: 10}}]}", 1)
	os.WriteFile(filepath.Join(dir, "models/wrong.yaml"), []byte(wrong), 0o644)
	if code, _, stderr := run("--file=models/wrong.yaml"); code != step.ExitBadInput || !strings.Contains(stderr, "8x8") {
		t.Errorf("a network that the data set does not fit: exit code %d, %s", code, stderr)
	}
}
