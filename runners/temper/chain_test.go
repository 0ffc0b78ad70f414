package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tiny is a model whose recipes and policy fit a test: it learns little, and
// little is asked of it.
const tiny = `
name: tiny
network: wong
dataset: mnist
recipe:
  train: {batch: 64, optimiser: {learning_rate: 0.005}, schedule: {kind: triangular}, phases: [{method: standard, epochs: 0.1}]}
  retrain: {batch: 64, optimiser: {learning_rate: 0.005}, schedule: {kind: triangular}, phases: [{method: n-fgsm, epochs: 0.1}]}
threat: {norm: linf, epsilon: 0.1}
policy:
  attacks: [fgsm]
  min_clean_accuracy: 0.5
  min_robust_accuracy: 0.7
  max_clean_regression: 1
  max_robust_regression: 0.1
  min_samples: 1000
  confidence: 0.95
`

// TestChain does by hand, process by process, what the workflows do: each step
// gets the digest reference that the one before printed.
func TestChain(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "tiny.yaml"), []byte(tiny), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(line string) string {
		t.Helper()
		return must(t, dir, append([]string{"COSIGN_PASSWORD=correct horse"}, strings.Fields(line)...)...)
	}
	result := func(name string) string {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, "results", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	pinned := func(ref string) string {
		t.Helper()
		if !strings.HasPrefix(ref, "oci:out@sha256:") || len(ref) != len("oci:out@sha256:")+64 {
			t.Fatalf("printed %q, want a reference with a digest", ref)
		}
		return ref
	}

	standard := pinned(run("train tiny.yaml --output oci:out:standard"))

	examples := pinned(run("attack --model " + standard + " --epsilon 0.1 --samples 200 --output oci:out:fgsm --results results"))
	attacked := result("robust_accuracy")
	// The examples are a data set like any other: clean accuracy on it is what
	// the attack left.
	var onExamples map[string]any
	if err := json.Unmarshal([]byte(run("evaluate --model "+standard+" --dataset "+examples+" --samples 200 --attacks fgsm -o json -q")), &onExamples); err != nil {
		t.Fatal(err)
	}
	if got, _ := json.Marshal(onExamples["clean_accuracy"]); string(got) != attacked {
		t.Errorf("accuracy on the examples is %s, the attack said %s", got, attacked)
	}

	before := pinned(run("evaluate --model " + standard + " --policy tiny.yaml --output oci:out:before --results results"))
	if got := result("verdict"); got != "fail" {
		t.Errorf("verdict on the standard model: %q", got)
	}
	robust := pinned(run("retrain --model " + standard + " --recipe fast --epochs 0.6 --epsilon 0.1 --clean-share 0.2 --output oci:out:robust"))
	report := pinned(run("evaluate --model " + robust + " --policy tiny.yaml --against " + before + " --output oci:out:report --report-html report.html --results results"))
	if got := result("verdict"); got != "pass" {
		t.Fatalf("verdict on the robust model: %q", got)
	}
	if page, err := os.ReadFile(filepath.Join(dir, "report.html")); err != nil || !strings.Contains(string(page), "<svg") {
		t.Errorf("the page has no chart: %v", err)
	}

	packed := strings.Split(run("pack --model "+robust+" --report "+report+" --output oci:out:model"), "\n")
	if len(packed) != 2 {
		t.Fatalf("pack printed %q", packed)
	}
	model, car := pinned(packed[0]), pinned(packed[1])
	run("keygen --dir keys")
	verify := "verify --key keys/cosign.pub --policy tiny.yaml " + model + " " + car
	if o := temper(t, dir, strings.Fields(verify)...); o.code != 3 || o.stdout != "" {
		t.Errorf("before signing: %v", o)
	}
	if got := run("sign --key keys/cosign.key --policy tiny.yaml " + model + " " + car); got != model+"\n"+car {
		t.Errorf("sign printed %q", got)
	}
	if got := run(verify); got != model+"\n"+car {
		t.Errorf("verify printed %q", got)
	}
	if o := temper(t, dir, strings.Fields(strings.Replace(verify, "tiny.yaml", "wong", 1))...); o.code != 3 {
		t.Errorf("figures below a stricter policy: %v", o)
	}
	run("keygen --dir others")
	if o := temper(t, dir, "verify", "--key", "others/cosign.pub", model); o.code != 3 {
		t.Errorf("another key: %v", o)
	}

	promote := "promote --channel oci:out:production --key keys/cosign.key --policy tiny.yaml --results results --model "
	if got := run(promote + model); got != model || result("verdict") != "promoted" || result("sequence") != "1" {
		t.Errorf("promote printed %q, verdict %q", got, result("verdict"))
	}
	if got := run(promote + model); got != model || result("sequence") != "1" {
		t.Errorf("promoting again printed %q, sequence %s", got, result("sequence"))
	}

	// The standard model is signed too, but weaker: the gate keeps it out.
	weak := strings.Split(run("pack --model "+standard+" --report "+before+" --output oci:out:weak"), "\n")[0]
	if got := run("sign --key keys/cosign.key --policy tiny.yaml --results results " + weak); got != "" || result("verdict") != "rejected" {
		t.Errorf("a model below the policy: sign printed %q, verdict %q", got, result("verdict"))
	}
	lenient := strings.NewReplacer("min_clean_accuracy: 0.5", "min_clean_accuracy: 0", "min_robust_accuracy: 0.7", "min_robust_accuracy: 0").Replace(tiny)
	if err := os.WriteFile(filepath.Join(dir, "lenient.yaml"), []byte(lenient), 0o644); err != nil {
		t.Fatal(err)
	}
	run("sign --key keys/cosign.key --policy lenient.yaml " + weak)
	if got := run(strings.Replace(promote, "tiny.yaml", "lenient.yaml", 1) + weak); got != "" || result("verdict") != "rejected" {
		t.Errorf("a step back: promote printed %q, verdict %q", got, result("verdict"))
	}
	if o := temper(t, dir, append([]string{"COSIGN_PASSWORD=wrong"}, strings.Fields(promote+model)...)...); o.code != 2 || strings.Contains(o.stderr, "correct horse") {
		t.Errorf("a wrong password: %v", o)
	}
	if o := temper(t, dir, append([]string{"COSIGN_PASSWORD=correct horse"}, strings.Fields(promote+car)...)...); o.code != 3 {
		t.Errorf("a modelcar in a channel: %v", o)
	}
}
