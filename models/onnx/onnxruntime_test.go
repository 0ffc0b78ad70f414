package onnx

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/temper-ml/temper/models/nn"
)

// onnxruntime answers for many networks at once: node takes a second to start.
type question struct {
	File  string    `json:"file"`
	Shape []int     `json:"shape"` // of x: [N, channels, height, width] or [N, features]
	X     []float32 `json:"x"`
}

// packages is where `go tool task onnxruntime` installs npm's onnxruntime-node.
const packages = "../../.task/onnxruntime"

// ask runs onnxruntime in node. Where it is not installed the test is skipped,
// but not where TEMPER_TEST_ONNXRUNTIME says that it must be there, as in CI.
func ask(t *testing.T, questions []question) (logits [][]float32) {
	must := os.Getenv("TEMPER_TEST_ONNXRUNTIME") != ""
	node, err := exec.LookPath("node")
	if err == nil {
		_, err = os.Stat(filepath.Join(packages, "node_modules", "onnxruntime-node"))
	}
	if err != nil {
		if must {
			t.Fatalf("%v: run `go tool task onnxruntime`", err)
		}
		t.Skipf("not compared with onnxruntime (%v): run `go tool task onnxruntime`, which needs npm", err)
	}
	script, err := filepath.Abs("testdata/onnxruntime/run.js")
	if err != nil {
		t.Fatal(err)
	}
	modules, err := filepath.Abs(filepath.Join(packages, "node_modules"))
	if err != nil {
		t.Fatal(err)
	}
	input, err := json.Marshal(questions)
	if err != nil {
		t.Fatal(err)
	}
	var out, narration bytes.Buffer
	cmd := exec.CommandContext(t.Context(), node, script)
	cmd.Env = append(os.Environ(), "NODE_PATH="+modules)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &out, &narration
	if err := cmd.Run(); err != nil {
		t.Fatalf("onnxruntime: %v\n%s", err, narration.Bytes())
	}
	if err := json.Unmarshal(out.Bytes(), &logits); err != nil || len(logits) != len(questions) {
		t.Fatalf("onnxruntime gave %d answers to %d questions (%v)", len(logits), len(questions), err)
	}
	return logits
}

// onnxruntime gives the same logits for what PyTorch exported, for what Marshal
// makes of it, and for networks of random layers.
func TestOnnxruntimeAgrees(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	const rows = 2
	dir := t.TempDir()
	var questions []question
	var want [][]float32
	add := func(file string, n *nn.Network) {
		f, err := nn.NewForward(n, rows)
		if err != nil {
			t.Fatal(err)
		}
		q := question{File: file, Shape: []int{rows, n.Input.Channels, n.Input.Height, n.Input.Width}}
		if data, err := os.ReadFile(file); err == nil {
			if m, err := parseModel(data); err == nil && len(m.graph.inputs[0].dims) == 2 {
				q.Shape = q.Shape[:2]
			}
		}
		x := make([]float32, rows*n.Input.Size())
		for i := range x {
			x[i] = rng.Float32()
		}
		q.X = make([]float32, len(x))
		for r := range rows { // to channels first
			pixels := n.Input.Height * n.Input.Width
			for c := range n.Input.Channels {
				for p := range pixels {
					q.X[r*n.Input.Size()+c*pixels+p] = x[r*n.Input.Size()+p*n.Input.Channels+c]
				}
			}
		}
		questions = append(questions, q)
		want = append(want, append([]float32(nil), f.Logits(x, rows)...))
	}
	write := func(n *nn.Network) {
		data, err := Marshal(n, nil)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, fmt.Sprintf("%d.onnx", len(questions)))
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		add(file, n)
	}
	for _, pattern := range []string{"testdata/*.onnx", "../nn/graph/testdata/*.onnx", "../nn/graph/testdata/imported/*.onnx"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			n, _, err := Unmarshal(data)
			if err != nil {
				t.Fatal(err)
			}
			if file, err = filepath.Abs(file); err != nil {
				t.Fatal(err)
			}
			add(file, n)
			write(n)
		}
	}
	for i := range 60 {
		n, err := nn.New(randomGraph(rng), uint64(i))
		if err != nil {
			t.Fatal(err)
		}
		jitter(rng, n)
		write(n)
	}
	for i, got := range ask(t, questions) {
		if len(got) != len(want[i]) {
			t.Fatalf("%s: %d logits, ours are %d", questions[i].File, len(got), len(want[i]))
		}
		for k := range got {
			if d := math.Abs(float64(got[k] - want[i][k])); !(d <= 1e-4*max(1, math.Abs(float64(got[k])))) {
				t.Errorf("%s: logit %d is %v, onnxruntime's is %v", questions[i].File, k, want[i][k], got[k])
				break
			}
		}
	}
}
