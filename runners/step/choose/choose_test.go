package choose

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/interval"
	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
)

// report writes a report of 1000 samples under the policy of wong.
func report(t *testing.T, clean, robust int) string {
	t.Helper()
	m, err := zoo.Load("wong")
	if err != nil {
		t.Fatal(err)
	}
	const n = 1000
	r := &evaluate.Report{
		ModelDigest: "sha256:" + strings.Repeat("0", 64), Network: "wong", Dataset: "mnist", DatasetDigest: "sha256:" + strings.Repeat("1", 64),
		Threat: m.Threat, Samples: n, Confidence: m.Policy.Confidence, Shape: m.Network.Input,
		CleanCorrect: clean, RobustCorrect: robust,
		Classes:   []evaluate.Class{{Name: "a"}, {Name: "b"}},
		Confusion: evaluate.Confusion{Clean: [][]int{{clean, n - clean}, {0, 0}}, Adversarial: [][]int{{robust, n - robust}, {0, 0}}},
	}
	share := func(k int) (float64, float64) {
		return float64(k) / n, interval.Lower(k, n, r.Confidence)
	}
	r.CleanAccuracy, r.CleanAccuracyLowerBound = share(clean)
	r.RobustAccuracy, r.RobustAccuracyLowerBound = share(robust)
	for _, name := range m.Policy.Attacks {
		a := evaluate.Attack{Name: name, Correct: robust, Broken: clean - robust, SuccessRate: float64(clean-robust) / float64(clean)}
		a.Accuracy, a.AccuracyLowerBound = share(robust)
		r.Attacks = append(r.Attacks, a)
	}
	data, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "report.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// run chooses and returns exit code, verdict and the chosen model.
func run(t *testing.T, candidates string, more ...string) (code int, verdict, model, stderr string) {
	t.Helper()
	dir := t.TempDir()
	var out, errs bytes.Buffer
	code = step.Run(t.Context(), Command(), append([]string{"--policy=wong", "--candidates=" + candidates, "--results=" + dir}, more...), &out, &errs)
	v, _ := os.ReadFile(filepath.Join(dir, "verdict"))
	return code, string(v), strings.TrimSpace(out.String()), errs.String()
}

func candidates(pairs ...string) string {
	var all []string
	for i := 0; i < len(pairs); i += 2 {
		all = append(all, `{"model":"`+pairs[i]+`","report":"`+pairs[i+1]+`","verdict":"pass"}`)
	}
	return "[" + strings.Join(all, ",") + "]"
}

func TestTheBestIsChosen(t *testing.T) {
	strong, accurate, weak := report(t, 990, 930), report(t, 998, 900), report(t, 999, 100)
	inaccurate := report(t, 900, 899) // most robust for its accuracy, and below the clean floor
	for name, c := range map[string]struct{ list, verdict, model string }{
		"most robust":           {candidates("a", accurate, "b", strong, "c", weak), "pass", "b"},
		"passing before robust": {candidates("a", inaccurate, "b", report(t, 990, 880)), "pass", "b"},
		"none passes":           {candidates("a", weak, "b", inaccurate), "fail", "b"},
		"first of equals":       {candidates("a", strong, "b", strong), "pass", "a"},
		"what they claim":       {candidates("a", weak), "fail", "a"},
	} {
		if code, verdict, model, stderr := run(t, c.list); code != 0 || verdict != c.verdict || model != c.model {
			t.Errorf("%s: exit code %d, verdict %q, chose %q: %s", name, code, verdict, model, stderr)
		}
	}
	if _, verdict, _, _ := run(t, candidates("a", accurate), "--against="+strong); verdict != "fail" {
		t.Errorf("a step back from the model in service: verdict %q", verdict)
	}
}

func TestCase11CandidatesThatCannotBeJudged(t *testing.T) {
	good := report(t, 990, 930)
	nan := filepath.Join(t.TempDir(), "nan.json")
	data, _ := os.ReadFile(good)
	broken := regexp.MustCompile(`"robust_accuracy": ?0.93`).ReplaceAll(data, []byte(`"robust_accuracy": NaN`))
	if bytes.Equal(broken, data) {
		t.Fatalf("nothing to break in %s", data)
	}
	os.WriteFile(nan, broken, 0o600)
	for name, list := range map[string]string{
		"empty": "", "no list": "{}", "nothing": "[]", "null": "null", "no report": `[{"model":"a"}]`, "two lists": candidates("a", good) + "[]",
		"a number": `[1]`, "NaN": candidates("a", nan), "one of them": candidates("a", good, "b", nan), "absent": candidates("a", "absent.json"),
		"too many": "[" + strings.Repeat(`{"model":"a","report":"b"},`, maxCandidates) + `{"model":"a","report":"b"}]`,
	} {
		if code, verdict, model, stderr := run(t, list); code != step.ExitBadInput || verdict != "" || model != "" {
			t.Errorf("%s: exit code %d, verdict %q, chose %q: %s", name, code, verdict, model, stderr)
		}
	}
}
