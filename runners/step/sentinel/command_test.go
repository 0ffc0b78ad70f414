package sentinel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// bench is a layout folder with a key.
type bench struct {
	t    *testing.T
	dir  string
	repo string
	key  *sign.Key
	path string // of the public key
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir()}
	b.repo = "oci:" + filepath.Join(b.dir, "layout")
	var err error
	if b.key, err = testKey(); err != nil {
		t.Fatal(err)
	}
	b.path = filepath.Join(b.dir, sign.PublicKeyFile)
	if err := os.WriteFile(b.path, b.key.PublicKey(), 0o600); err != nil {
		t.Fatal(err)
	}
	return b
}

// testKey makes one key for all tests: protecting it with a password takes
// seconds.
var testKey = sync.OnceValues(func() (*sign.Key, error) {
	dir, err := os.MkdirTemp("", "sentinel-key-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	password := func(bool) ([]byte, error) { return nil, nil }
	if err := sign.GenerateKeyPair(dir, password); err != nil {
		return nil, err
	}
	return sign.LoadKey(context.Background(), filepath.Join(dir, sign.PrivateKeyFile), password)
})

func mnistNetwork(t *testing.T, seed uint64) *nn.Network {
	t.Helper()
	n, err := nn.New(nn.Description{Name: "linear", Input: nn.Shape{Height: 28, Width: 28, Channels: 1}, Layers: []nn.Layer{{Dense: &nn.Dense{Units: 10}}}}, seed)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// model pushes, signs and attests a model and returns its reference.
func (b *bench) model(tag string, seed uint64) string {
	b.t.Helper()
	data, err := onnx.Marshal(mnistNetwork(b.t, seed), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	ref, err := store.Push(b.t.Context(), b.repo+":"+tag, &store.Artifact{Type: "application/vnd.temper.network.v1", Files: []store.File{{Name: statement.ModelFile, Data: data}}})
	if err != nil {
		b.t.Fatal(err)
	}
	b.sign(ref)
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(data))
	right := statement.Accuracy{Correct: 980, Accuracy: 0.98, LowerBound: 0.97}
	for kind, predicate := range map[string]any{
		statement.TestResultType: &statement.TestResult{Result: statement.Passed, Configuration: []statement.Resource{}},
		statement.RobustnessType: &statement.Robustness{
			ModelDigest: digest, Network: "linear", Dataset: "mnist", DatasetDigest: digest, ReportDigest: digest,
			Threat: statement.Threat{Norm: "linf", Epsilon: 0.3}, Samples: 1000, Confidence: 0.95,
			Clean: right, Robust: right, Attacks: []statement.Attack{{Name: "fgsm", Accuracy: right}},
		},
	} {
		if _, err := b.key.Attest(b.t.Context(), ref, kind, predicate); err != nil {
			b.t.Fatal(err)
		}
	}
	return ref
}

func (b *bench) sign(ref string) {
	b.t.Helper()
	if _, err := b.key.Sign(b.t.Context(), ref); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) guard() string {
	b.t.Helper()
	data, err := onnx.Marshal(mnistNetwork(b.t, 99), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	path := filepath.Join(b.dir, "guard.onnx")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		b.t.Fatal(err)
	}
	return path
}

func run(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	var out, tell bytes.Buffer
	code = step.Run(ctx, Command(), args, &out, &tell)
	return code, strings.TrimSpace(out.String()), tell.String()
}

func (b *bench) calibrate(model string) string {
	b.t.Helper()
	code, ref, stderr := run(b.t.Context(), "calibrate", "--model", model, "--guard", b.guard())
	if code != 0 {
		b.t.Fatal(code, stderr)
	}
	return ref
}

// output is a buffer that one goroutine writes and another reads.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: ", what)
		}
	}
}

// The command waits for the first promotion of a channel, watches its model
// with the detector beside it, and follows the next one. It measures them on the
// anchor, which the manifests give by this variable.
func TestCommandFollowsPromotion(t *testing.T) {
	t.Setenv("TEMPER_ANCHOR", "mnist")
	b := newBench(t)
	policy := verify.Policy{Keys: []verify.Key{{Name: "test", PEM: b.key.PublicKey()}}, Robustness: &verify.Requirement{}}
	promote := func(model string) {
		if _, err := channel.Promote(t.Context(), channel.Promotion{Channel: b.repo + ":production", Model: model, Policy: policy, Signer: b.key}); err != nil {
			t.Fatal(err)
		}
	}
	first := b.model("v1", 1)
	if code, _, stderr := run(t.Context(), "--model", first, "--key", b.path); code != step.ExitBadInput || !strings.Contains(stderr, "calibrate") {
		t.Errorf("without a detector: exit code %d, %s", code, stderr)
	}
	detector := b.calibrate(first)
	if code, _, stderr := run(t.Context(), "--model", first, "--key", b.path); code != step.ExitRefused {
		t.Errorf("with an unsigned detector: exit code %d, %s", code, stderr)
	}
	b.sign(detector)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var stdout, stderr output
	done := make(chan int, 1)
	go func() {
		done <- step.Run(ctx, Command(), []string{"--channel", b.repo + ":production", "--key", b.path, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--poll", "200ms"}, &stdout, &stderr)
	}()
	eventually(t, "an address", func() bool {
		if len(done) > 0 {
			t.Fatal(stderr.String())
		}
		return strings.Contains(stdout.String(), "\n")
	})
	url := "http://" + strings.TrimSpace(stdout.String())
	status := func() (s Status) {
		resp, err := http.Get(url + "/status")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	resp, err := http.Get(url + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if s := status(); resp.StatusCode != http.StatusServiceUnavailable || s.Model != "" || !strings.Contains(s.Problem, "production") {
		t.Errorf("before the first promotion: %s, %+v", resp.Status, s)
	}
	promote(first)
	eventually(t, "the first promotion is watched", func() bool { return status().Model != "" })
	if s := status(); !strings.HasSuffix(first, s.Digest) || s.Accuracy == nil || s.Problem != "" {
		t.Errorf("watching %+v, want %s", s, first)
	}

	second := b.model("v2", 2)
	promote(second)
	eventually(t, "a problem without the detector of the new model", func() bool { return strings.Contains(status().Problem, "calibrate") })
	b.sign(b.calibrate(second))
	eventually(t, "the promoted model is watched", func() bool { s := status(); return strings.HasSuffix(second, s.Digest) && s.Problem == "" })
	cancel()
	if code := <-done; code != 0 {
		t.Errorf("exit code %d: %s", code, stderr.String())
	}
}

func TestCommandRefuses(t *testing.T) {
	b := newBench(t)
	model := b.model("v1", 1)
	for name, c := range map[string]struct {
		want int
		args []string
	}{
		"no key":               {step.ExitBadInput, []string{"--model", model}},
		"key that is no key":   {step.ExitBadInput, []string{"--model", model, "--key", b.guard()}},
		"key that is a folder": {step.ExitBadInput, []string{"--model", model, "--key", b.dir}},
		"neither":              {step.ExitBadInput, []string{"--key", b.path}},
		"both":                 {step.ExitBadInput, []string{"--model", model, "--channel", model, "--key", b.path}},
		"alpha 0":              {step.ExitBadInput, []string{"--model", model, "--key", b.path, "--alpha", "0"}},
		"webhook":              {step.ExitBadInput, []string{"--model", model, "--key", b.path, "--defend", "file:///etc/passwd"}},
		"no such model":        {step.ExitBadInput, []string{"--model", b.repo + ":v9", "--key", b.path}},
		"registry down":        {step.ExitUnavailable, []string{"--model", "127.0.0.1:1/mnist:v1", "--key", b.path}},
		"guard of other shape": {step.ExitBadInput, []string{"calibrate", "--model", model, "--guard", b.path}},
		"guard is the model":   {step.ExitBadInput, []string{"calibrate", "--model", model, "--guard", model}},
	} {
		if code, _, stderr := run(t.Context(), c.args...); code != c.want {
			t.Errorf("%s: exit code %d, want %d: %s", name, code, c.want, stderr)
		}
	}
}

// The same model, guard and data give the same detector.
func TestCalibrateIsReproducible(t *testing.T) {
	b := newBench(t)
	model := b.model("v1", 1)
	if x, y := b.calibrate(model), b.calibrate(model); x != y || !strings.Contains(x, "@sha256:") {
		t.Errorf("detectors %s and %s", x, y)
	}
}

func TestWebhook(t *testing.T) {
	var mu sync.Mutex
	var ids, bodies []string
	codes := []int{503, 429, 202}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		ids, bodies = append(ids, r.Header.Get("Ce-Id")), append(bodies, string(body))
		w.WriteHeader(codes[len(ids)-1])
	}))
	defer server.Close()
	h, err := NewWebhook(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	h.wait = time.Millisecond
	i := Incident{ID: "incident-1", Cause: Attack, Model: "v1", Evidence: []Evidence{{Pixels: []float32{1}}}}
	if err := h.Start(t.Context(), i); err != nil {
		t.Fatal(err)
	}
	if strings.Join(ids, ",") != "incident-1,incident-1,incident-1" || !strings.Contains(bodies[2], `"cause":"attack"`) {
		t.Errorf("posted %q %q", ids, bodies)
	}
	ids, codes = nil, []int{400}
	if err := h.Start(t.Context(), i); err == nil || len(ids) != 1 {
		t.Errorf("refused: error %v after %d tries", err, len(ids))
	}
	ids, codes = nil, []int{500, 500, 500, 500, 500, 500}
	if err := h.Start(t.Context(), i); err == nil || len(ids) != webhookTries {
		t.Errorf("down: error %v after %d tries", err, len(ids))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Start(ctx, i); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
