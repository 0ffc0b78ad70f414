package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/kernel"
	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
)

func TestOneObjectALine(t *testing.T) {
	before := kernel.Path()
	var out bytes.Buffer
	args := strings.Fields("-o json --network wong --batch 3 --seconds 0 --cpu-time --path " + strings.Join(kernel.Paths(), ","))
	if code := step.Run(context.Background(), Command(), args, &out, io.Discard); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	if kernel.Path() != before {
		t.Errorf("the path in use was %s, now it is %s", before, kernel.Path())
	}
	seen := map[string]bool{}
	for _, line := range strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n") {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if len(m) != 7 || m["batch"] != 3.0 {
			t.Errorf("%s", line)
		}
		for _, key := range []string{"images_per_second", "gflops", "peak_share"} {
			if v, ok := m[key].(float64); !ok || !(v > 0) {
				t.Errorf("%s is %v in %s", key, m[key], line)
			}
		}
		seen[m["network"].(string)+" "+m["what"].(string)+" "+m["path"].(string)] = true
	}
	for _, network := range []string{"wong"} {
		for _, path := range kernel.Paths() {
			for _, what := range []string{"attack", "train", "infer"} {
				want := what != "infer" || path != "avx512bf16" && path != "amx"
				if seen[network+" "+what+" "+path] != want {
					t.Errorf("%s %s %s: measured is %v, want %v", network, what, path, !want, want)
				}
			}
		}
	}
}

func TestBadFlags(t *testing.T) {
	for _, args := range []string{"--path abacus", "--network wing", "--batch 0", "--batch 99999999", "--seconds -1"} {
		var errs bytes.Buffer
		if code := step.Run(context.Background(), Command(), strings.Fields(args), io.Discard, &errs); code != step.ExitBadInput {
			t.Errorf("%s: exit code %d: %s", args, code, errs.String())
		}
	}
}

// The counts of operations are those that the networks' papers give.
func TestOperations(t *testing.T) {
	for name, want := range map[string]float64{"wong": 1.22e6, "trades": 19.9e6, "madry": 27.8e6} {
		d, err := zoo.LoadNetwork(name)
		if err != nil {
			t.Fatal(err)
		}
		net, err := nn.Zero(d)
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := operations(net); math.Abs(got-want) > 0.006*want {
			t.Errorf("%s: %v operations, want %v", name, got, want)
		}
	}
}
