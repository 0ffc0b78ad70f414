package sweep

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step"
)

// model is a network, a data set and a policy small enough for a test.
const model = `
name: tiny
network: {name: tiny, input: {height: 4, width: 4, channels: 1}, layers: [{dense: {units: 12, relu: true}}, {dense: {units: 4}}]}
dataset: DIR/data
recipe: {train: standard, retrain: fast}
threat: {norm: linf, epsilon: 0.1}
policy: {attacks: [fgsm], min_clean_accuracy: 0, min_robust_accuracy: 0, max_clean_regression: 1, max_robust_regression: 1, min_samples: 1000, confidence: 0.95}
`

func recipe(rate, method string) string {
	return "batch: 20\noptimiser: {learning_rate: " + rate + "}\nschedule: {kind: triangular}\nphases: [" + method + "]\n"
}

// folder has the model, its data and some recipes.
func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	part := func(n int, seed uint64) *dataset.Set {
		s := &dataset.Set{Name: "toy", Shape: nn.Shape{Height: 4, Width: 4, Channels: 1}, Classes: []string{"a", "b", "c", "d"}}
		rng := rand.New(rand.NewPCG(seed, 9))
		for range n { // a bright column says the class
			class := rng.IntN(4)
			for p := range 16 {
				b := rng.IntN(120)
				if p%4 == class {
					b += 100
				}
				s.Bytes = append(s.Bytes, byte(b))
			}
			s.Labels = append(s.Labels, uint8(class))
		}
		return s
	}
	if err := dataset.Write(filepath.Join(dir, "data"), &dataset.Splits{Train: part(800, 1), Validation: part(300, 2), Test: part(20, 3)}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"tiny.yaml":     strings.ReplaceAll(model, "DIR", dir),
		"clean.yaml":    recipe("0.01", "{method: standard, epochs: 4}"),
		"pgd.yaml":      recipe("0.01", "{method: pgd, epochs: 6, steps: 3, alpha: 0.05}"),
		"diverges.yaml": recipe("10, beta2: 0.000000001", "{method: pgd, epochs: 60, steps: 3, alpha: 0.05}"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	return dir
}

func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = step.Run(t.Context(), Command(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestSweep(t *testing.T) {
	dir := folder(t)
	args := []string{"tiny.yaml", "--recipes", "pgd.yaml", "--clean-shares", "0,0.5", "--seeds", "1,2", "--output", "oci:out", "--samples", "300", "--checkpoints", "states", "--report-html", "sweep.html", "--results", "results", "-o", "json"}
	code, stdout, stderr := run(t, args...)
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	var r Result
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Candidates) != 4 || r.Samples != 300 || r.Threat.Epsilon != 0.1 {
		t.Fatalf("result %+v", r)
	}
	seen, efficient := map[string]bool{}, 0
	for i, c := range r.Candidates {
		seen[c.Name], seen[c.Digest] = true, true
		if c.CleanAccuracy < 0.9 || c.RobustAccuracy < 0.5 || c.RobustAccuracy > c.CleanAccuracy || !(c.RobustAccuracyLowerBound < c.RobustAccuracy) || len(c.Attacks) != 2 || c.CleanShare == nil {
			t.Errorf("candidate %+v", c)
		}
		if i > 0 && c.RobustAccuracy > r.Candidates[i-1].RobustAccuracy {
			t.Error("the most robust is not first")
		}
		if c.Efficient {
			efficient++
		}
	}
	if len(seen) != 8 || efficient == 0 || !r.Candidates[0].Efficient {
		t.Errorf("%d names and digests, %d efficient", len(seen), efficient)
	}
	page, err := os.ReadFile(filepath.Join(dir, "sweep.html"))
	if err != nil || !strings.Contains(string(page), "Trade-off") || !strings.Contains(string(page), "sweep-pgd-clean-0.5-seed-2") {
		t.Errorf("the page has no plot (%v)", err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "results", "digest")); err != nil || string(got) != r.Candidates[0].Digest {
		t.Errorf("result %q (%v)", got, err)
	}

	// The same again gives the same digests, from the checkpoints or without.
	for _, args := range [][]string{args, {"tiny.yaml", "--recipes", "pgd.yaml", "--clean-shares", "0,0.5", "--seeds", "1,2", "--output", "oci:again", "-o", "json", "--samples", "300"}} {
		_, stdout, stderr := run(t, args...)
		var again Result
		if err := json.Unmarshal([]byte(stdout), &again); err != nil {
			t.Fatalf("%v: %s", err, stderr)
		}
		for i, c := range again.Candidates {
			if c.Digest != r.Candidates[i].Digest || c.RobustAccuracy != r.Candidates[i].RobustAccuracy {
				t.Errorf("candidate %s differs", c.Name)
			}
		}
	}
}

// A recipe without defence is the more accurate one, or at least no more
// robust; a candidate that diverges does not end the sweep.
func TestSweepOfRecipes(t *testing.T) {
	folder(t)
	code, stdout, stderr := run(t, "tiny.yaml", "--recipes", "clean.yaml,diverges.yaml,pgd.yaml", "--output", "oci:out", "--epsilon", "0.15", "-o", "json")
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	var r Result
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatal(err)
	}
	if last := r.Candidates[2]; !strings.Contains(last.Error, "diverged") || last.Reference != "" || last.Efficient {
		t.Errorf("%+v did not diverge", last)
	}
	if len(r.Candidates) != 3 || r.Candidates[0].Recipe != "pgd.yaml" || r.Candidates[0].CleanShare != nil || r.Threat.Epsilon != 0.15 {
		t.Errorf("result %s", stdout)
	}

	// From a model, as text.
	code, stdout, stderr = run(t, "--model", r.Candidates[1].Reference, "--dataset", "data", "--recipes", "pgd.yaml", "--epsilon", "0.15", "--suite", "standard", "--samples", "40", "--output", "oci:out")
	if code != 0 || !strings.HasPrefix(stdout, "oci:out@sha256:") {
		t.Errorf("exit code %d, printed %q: %s", code, stdout, stderr)
	}
}

func TestSweepRefusesBeforeTraining(t *testing.T) {
	folder(t)
	for want, args := range map[string]string{
		"give either a NETWORK":         "--output oci:out",
		"unknown attack":                "tiny.yaml --recipes pgd.yaml --attacks fgms --output oci:out",
		"unknown suite":                 "tiny.yaml --recipes pgd.yaml --suite standart --output oci:out",
		"unknown recipe":                "tiny.yaml --recipes fats --output oci:out",
		"every phase is standard":       "tiny.yaml --recipes pgd.yaml,clean.yaml --clean-shares 0.5 --output oci:out",
		"clean share \\\"NaN\\\"":       "tiny.yaml --recipes pgd.yaml --clean-shares NaN --output oci:out",
		"seed \\\"-1\\\"":               "tiny.yaml --recipes pgd.yaml --seeds 1,-1 --output oci:out",
		"is there twice":                "tiny.yaml --recipes pgd.yaml --seeds 1,1 --output oci:out",
		"must be 1 to 100":              "tiny.yaml --recipes pgd.yaml --seeds " + strings.Repeat("1,", 100) + "1 --output oci:out",
		"required flag(s) \\\"output\\": "tiny.yaml",
	} {
		code, stdout, stderr := run(t, strings.Fields(args)...)
		if code != 2 || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, %q, %s; want %q", args, code, stdout, stderr, want)
		}
	}
	if entries, err := os.ReadDir("out"); err == nil && len(entries) > 0 {
		t.Error("something was trained")
	}
}

func TestEfficient(t *testing.T) {
	all := []Candidate{
		{Name: "a", CleanAccuracy: 0.9, RobustAccuracy: 0.5},
		{Name: "b", CleanAccuracy: 0.8, RobustAccuracy: 0.6},
		{Name: "worse than a", CleanAccuracy: 0.9, RobustAccuracy: 0.4},
		{Name: "equal to b", CleanAccuracy: 0.8, RobustAccuracy: 0.6},
		{Name: "diverged", Error: "x", CleanAccuracy: 1, RobustAccuracy: 1},
	}
	markEfficient(all)
	for i, want := range []bool{true, true, false, true, false} {
		if all[i].Efficient != want {
			t.Errorf("%s: efficient %v", all[i].Name, all[i].Efficient)
		}
	}
}
