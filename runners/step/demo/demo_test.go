package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/temper-ml/temper/runners/step"
)

var raceDetector bool

// quick is the default preset with a policy for a training of one epoch.
const quick = `
name: quick
network: wong
dataset: mnist
recipe: {train: standard, retrain: fast}
threat: {norm: linf, epsilon: 0.3}
policy:
  attacks: [fgsm, pgd-20]
  min_clean_accuracy: 0.9
  min_robust_accuracy: 0.4
  max_clean_regression: 0.1
  max_robust_regression: 0.0
  min_samples: 1000
  confidence: 0.95
`

// The whole loop: a model is trained, signed, served, attacked over HTTP, seen
// to be under attack, hardened, gated, signed, promoted under load, and
// attacked again.
func TestCase67WholeLoop(t *testing.T) {
	if raceDetector {
		t.Skip("too slow with the race detector: `go tool task test` runs it by itself")
	}
	t.Setenv("COSIGN_PASSWORD", "")
	dir := t.TempDir()
	model := filepath.Join(dir, "quick.yaml")
	if err := os.WriteFile(model, []byte(quick), 0o600); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(dir, "demo")
	var out, tell bytes.Buffer
	code := step.Run(t.Context(), Command(), []string{"--model", model, "--epochs", "1", "--samples", "2000", "--dir", folder, "-o", "json"}, &out, &tell)
	if code != step.ExitDone {
		t.Fatalf("exit code %d\n%s", code, tell.String())
	}
	var r Result
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("standard output is not one JSON object: %v\n%s", err, out.String())
	}
	t.Logf("%+v", r)
	for what, ok := range map[string]bool{
		"clean accuracy":       r.CleanAccuracy > 0.95,
		"attack works":         r.AttackedAccuracy < 0.5,
		"recovered":            r.RecoveredAccuracy > 0.6,
		"recovered clean":      r.RecoveredCleanAccuracy > 0.9,
		"known by labels":      r.LabelledAccuracy > 0.6 && r.LabelledAccuracy <= 1,
		"detected":             r.DetectionDelayRequests >= 1 && r.DetectionDelayRequests <= 20,
		"no false alarm":       r.FalseAlarms == 0 && r.CleanRequests >= 2000,
		"nothing dropped":      r.DroppedRequests == 0 && r.Requests > 8000,
		"another model":        r.ModelDigest != r.PromotedDigest && strings.HasPrefix(r.PromotedDigest, "sha256:"),
		"second record":        r.Sequence == 2,
		"verdict":              r.Verdict == "pass",
		"phases take the time": len(r.Seconds) > 10 && r.SecondsTotal > r.SecondsToRecover && (r.SecondsToRecover > 0) == (r.PromotedDigest != "") && r.PeakRSSBytes > 0,
	} {
		if !ok {
			t.Errorf("%s: %+v", what, r)
		}
	}
	page, err := os.ReadFile(r.Report)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"<svg", "Confusion", "data:image/png", r.PromotedDigest[:len("sha256:")+12]} {
		if !strings.Contains(string(page), part) {
			t.Errorf("the report has no %s", part)
		}
	}
}

// The default preset keeps the figures that the README promises. It trains for
// two minutes: `go tool task test` runs it by itself, after the others.
func TestFiguresOfDefaultPreset(t *testing.T) {
	if os.Getenv("TEMPER_TEST_FIGURES") == "" {
		t.Skip("TEMPER_TEST_FIGURES is not set")
	}
	t.Setenv("COSIGN_PASSWORD", "")
	var out, tell bytes.Buffer
	code := step.Run(t.Context(), Command(), []string{"--dir", filepath.Join(t.TempDir(), "demo"), "-o", "json"}, &out, &tell)
	if code != step.ExitDone {
		t.Fatalf("exit code %d\n%s", code, tell.String())
	}
	var r Result
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
	for what, ok := range map[string]bool{
		"clean_accuracy >= 0.985":           r.CleanAccuracy >= 0.985,
		"attacked_accuracy <= 0.50":         r.AttackedAccuracy <= 0.50,
		"recovered_accuracy >= 0.93":        r.RecoveredAccuracy >= 0.93,
		"recovered_clean_accuracy >= 0.975": r.RecoveredCleanAccuracy >= 0.975,
		"false_alarms = 0":                  r.FalseAlarms == 0 && r.CleanRequests == 10_000,
		"detection within 10 requests":      r.DetectionDelayRequests >= 1 && r.DetectionDelayRequests <= 10,
		"dropped_requests = 0":              r.DroppedRequests == 0,
		"under 1.5 GiB":                     r.PeakRSSBytes < 3<<29,
	} {
		if !ok {
			t.Errorf("not %s: %+v", what, r)
		}
	}
}

func TestBadInput(t *testing.T) {
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "thesis.tex"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		`did you mean "paper"`: {"--preset", "papr"},
		`did you mean "wong"`:  {"--model", "wog"},
		"name a new or empty":  {"--dir", full},
		"samples":              {"--samples", "10"},
	} {
		var out, tell bytes.Buffer
		if code := step.Run(t.Context(), Command(), args, &out, &tell); code != step.ExitBadInput || !strings.Contains(tell.String(), strings.ReplaceAll(want, `"`, `\"`)) {
			t.Errorf("%v: exit code %d, %s", args, code, tell.String())
		}
		if out.Len() > 0 {
			t.Errorf("%v: standard output %q", args, out.String())
		}
	}
	if _, err := os.Stat(filepath.Join(full, "thesis.tex")); err != nil {
		t.Error("a folder that is no demo's was touched")
	}
}

func TestInterruptedDemoGoesOn(t *testing.T) {
	folder := t.TempDir()
	notes := filepath.Join(folder, "notes.txt")
	progress := filepath.Join(t.TempDir(), "progress")
	t.Setenv("ARGO_PROGRESS_FILE", progress)
	// run interrupts the demo once its first training has made some steps.
	run := func(want int, args ...string) string {
		t.Helper()
		os.Remove(progress)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var out, tell bytes.Buffer
		done := make(chan int)
		go func() {
			done <- step.Run(ctx, Command(), append(args, "--dir", folder, "--epochs", "100"), &out, &tell)
		}()
		for {
			select {
			case code := <-done:
				if code != want {
					t.Fatalf("exit code %d, want %d: %s", code, want, tell.String())
				}
				return tell.String()
			case <-time.After(20 * time.Millisecond):
				if now, err := os.ReadFile(progress); err == nil && !strings.HasPrefix(string(now), "0/") {
					cancel()
				}
			}
		}
	}
	run(step.ExitInterrupted)
	if err := os.WriteFile(notes, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	checkpoint := func() []byte {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(folder, "standard.checkpoint"))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	first := checkpoint()
	if said := run(step.ExitInterrupted, "-q"); strings.Contains(said, "training wong") {
		t.Errorf("-q told the story: %s", said)
	}
	if bytes.Equal(checkpoint(), first) {
		t.Error("the second demo did not go on from the checkpoint of the first")
	}
	if _, err := os.Stat(notes); err != nil {
		t.Error("a file that the demo did not make is gone")
	}
	held, err := os.OpenFile(filepath.Join(folder, mark), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := lock(held); err != nil {
		t.Fatal(err)
	}
	if said := run(step.ExitBadInput); !strings.Contains(said, "another demo is running") {
		t.Errorf("two demos in one folder: %s", said)
	}
}
