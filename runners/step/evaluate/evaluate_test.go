package evaluate

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
)

// run is the step as a process runs it.
func run(t *testing.T, want int, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, narration bytes.Buffer
	if code := step.Run(t.Context(), Command(), args, &out, &narration); code != want {
		t.Fatalf("%q: exit code %d, want %d: %s", args, code, want, narration.String())
	}
	return out.String(), narration.String()
}

// Parts that shards made reduce to the report of one run, to its digest.
func TestShardsThroughTheCommand(t *testing.T) {
	net, err := nn.New(nn.Description{
		Name: "tiny", Input: nn.Shape{Height: 28, Width: 28, Channels: 1},
		Layers: []nn.Layer{{Dense: &nn.Dense{Units: 10}}},
	}, 1)
	if err != nil {
		t.Fatal(err)
	}
	model, err := onnx.Marshal(net, nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "model.onnx"), model, 0o644); err != nil {
		t.Fatal(err)
	}
	out := "oci:" + filepath.Join(dir, "out")
	common := []string{"--attacks", "fgsm,pgd-3,square-20", "--samples", "23", "--epsilon", "0.05"}
	measure := func(args ...string) []string { return append(args, common...) }

	whole, _ := run(t, 0, measure("--model", dir, "--output", out+":whole")...) // a folder is a model too
	var parts []string
	for _, shard := range []string{"1/3", "2/3", "3/3"} {
		ref, _ := run(t, 0, measure("--model", filepath.Join(dir, "model.onnx"), "--shard", shard, "--output", out+":part-"+shard[:1])...)
		parts = append(parts, strings.TrimSpace(ref))
	}
	list, err := json.Marshal(parts)
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(parts)
	for _, args := range [][]string{parts, {string(list)}} {
		if got, _ := run(t, 0, append([]string{"--reduce", "--output", out + ":reduced"}, args...)...); got != whole {
			t.Errorf("reduced to %s, one run is %s", got, whole)
		}
	}
	run(t, step.ExitRefused, "--reduce", out+":whole") // a report is no part
	for _, c := range []struct {
		more string
		same bool
	}{{"--seed=0", true}, {"--suite=", true}, {"--seed=1", false}, {"--seed=2", false}} { // what workflows say for "nothing in particular", and draws
		if got, _ := run(t, 0, measure("--model", dir, "--output", out+":whole", c.more)...); (got == whole) != c.same {
			t.Errorf("%s makes %s, without it it is %s", c.more, got, whole)
		}
	}
	if got, _ := run(t, step.ExitFailure, measure("--model", dir, "--output", out+":kept", "--report-html", filepath.Join(dir, "nosuch", "x.html"))...); got != "" {
		t.Errorf("prints %s", got)
	}
	if _, err := artifact.ReadReport(t.Context(), out+":kept"); err != nil {
		t.Errorf("a page that cannot be written loses the report: %v", err)
	}
	all, _ := run(t, 0, "--model", dir, "--attacks", "fgsm", "--samples", "0", "-o", "json")
	if !strings.Contains(all, `"samples": 10000`) {
		t.Errorf("all images are %.200s", all)
	}
	for what, args := range map[string][]string{
		"a part is missing":       {"--reduce", parts[0], parts[1]},
		"none is named":           {"--reduce"},
		"a list that is none":     {"--reduce", `["a",`},
		"an epsilon to reduce":    append([]string{"--reduce", "--epsilon", "0.1"}, parts...),
		"a shard without output":  {"--model", dir, "--shard", "1/2"},
		"a shard beyond the last": {"--model", dir, "--shard", "3/2", "--output", out + ":x"},
		"a shard that is none":    {"--model", dir, "--shard", "1", "--output", out + ":x"},
		"arguments for nothing":   {"--model", dir, "stray"},
		"no model":                {"--samples", "10"},
		"checks without a suite":  {"--model", dir, "--checks", "--samples", "10"},
		"no such suite":           {"--model", dir, "--suite", "standrad", "--samples", "10"},
		"no such norm":            {"--model", dir, "--norm", "l7", "--samples", "10"},
	} {
		if _, stderr := run(t, step.ExitBadInput, args...); !strings.Contains(stderr, "ERROR") {
			t.Errorf("%s: says %s", what, stderr)
		}
	}
}
