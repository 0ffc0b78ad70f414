package promote_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/runners/step/serve"
	"github.com/temper-ml/temper/runners/step/serve/selftest"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/verify"
)

// judged is a model with an honest report on a data set in a folder, whose
// labels are what the first of them answers.
func (p *promoter) judged(seed uint64, folder string) string {
	p.t.Helper()
	fail := func(err error) {
		p.t.Helper()
		if err != nil {
			p.t.Fatal(err)
		}
	}
	b := signingtest.Build(p.t, seed)
	network, _, err := onnx.Unmarshal(b.Model)
	fail(err)
	target, err := graph.NewAttack(network, 50)
	fail(err)
	if _, err := os.Stat(folder); errors.Is(err, os.ErrNotExist) {
		set := func(n int, seed uint64) *dataset.Set {
			s := &dataset.Set{Name: "noise", Shape: network.Input, Classes: []string{"0", "1"}}
			rng := rand.New(rand.NewPCG(seed, 1))
			for range n {
				for range network.Input.Size() {
					s.Bytes = append(s.Bytes, byte(rng.Uint32()))
				}
			}
			s.Labels = make([]uint8, n)
			labels, err := evaluate.Predict(p.t.Context(), target, s)
			fail(err)
			s.Labels = labels
			return s
		}
		fail(dataset.Write(folder, &dataset.Splits{Name: "noise", Train: set(10, 1), Validation: set(10, 2), Test: set(1000, 3)}))
	}
	splits, err := dataset.Open(p.t.Context(), folder)
	fail(err)
	// A report names its model by digest: that of model.onnx.
	old, err := evaluate.Decode(b.Report)
	fail(err)
	report, err := evaluate.Run(p.t.Context(), target, splits.Test, evaluate.Options{
		Threat: attack.Threat{Norm: "linf", Epsilon: 0.01}, Attacks: []string{"fgsm"}, Seed: 1, ModelDigest: old.ModelDigest,
	})
	fail(err)
	b.Report, err = report.Encode()
	fail(err)
	return signingtest.Pack(p.t, fmt.Sprintf("%s:v%d", p.place, seed), b, p.key)
}

// watched is a promoter with a server behind a proxy that a test may spoil.
type watched struct {
	*promoter
	url    string
	models []string
	spoil  func(digest string) bool // whether the answers of a model are spoilt on their way
}

func newWatched(t *testing.T) *watched {
	t.Helper()
	w := &watched{promoter: newPromoter(t, "oci:"+filepath.Join(t.TempDir(), "tiny")), spoil: func(string) bool { return false }}
	folder := filepath.Join(t.TempDir(), "noise")
	text := strings.NewReplacer("dataset: mnist", "dataset: "+folder, "epsilon: 0.3", "epsilon: 0.01",
		"min_clean_accuracy: 0.5", "min_clean_accuracy: 0", "min_robust_accuracy: 0.5", "min_robust_accuracy: 0",
		"max_clean_regression: 0", "max_clean_regression: 1", "max_robust_regression: 0", "max_robust_regression: 1").Replace(signingtest.Definition)
	if err := os.WriteFile(w.policyFile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for seed := uint64(1); len(w.models) < 2; seed++ {
		network, _, err := onnx.Unmarshal(signingtest.Build(t, seed).Model)
		if err != nil {
			t.Fatal(err)
		}
		if selftest.Run(network, "") == nil { // servers refuse those of dead units
			w.models = append(w.models, w.judged(seed, folder))
		}
	}
	if code, _, stderr := w.promote(w.models[0]); code != step.ExitDone {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	source := &serve.Channel{Reference: w.place + ":production", Policy: verify.Policy{Keys: signingtest.Policy(w.key).Keys}}
	s, err := serve.New(serve.Options{Name: "tiny", Source: source, Poll: 20 * time.Millisecond, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l, nil) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: l.Addr().String()})
	proxy.ModifyResponse = func(r *http.Response) error {
		if r.Request.Method != http.MethodPost || !w.spoil(s.Digest()) {
			return nil
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		body = []byte(strings.NewReplacer(`"datatype":"INT64","data":[`, `"datatype":"INT64","data":[7`).Replace(string(body)))
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader(string(body))), int64(len(body))
		r.Header.Set("Content-Length", fmt.Sprint(len(body)))
		return nil
	}
	front := httptest.NewServer(proxy)
	t.Cleanup(front.Close)
	w.url = front.URL
	return w
}

// promote runs the step on the data set of its policy.
func (w *watched) promote(model string, more ...string) (int, promote.Result, string) {
	w.t.Helper()
	return w.run(model, append([]string{"--dataset", ""}, more...)...)
}

func (w *watched) watch(model string) (int, promote.Result, string) {
	w.t.Helper()
	return w.promote(model, "--endpoint", w.url, "--endpoint-model", "tiny", "--endpoint-timeout", "20s")
}

func (w *watched) head() *channel.Head {
	w.t.Helper()
	h, err := channel.Read(w.t.Context(), w.place+":production", verify.Policy{Keys: signingtest.Policy(w.key).Keys})
	if err != nil {
		w.t.Fatal(err)
	}
	return h
}

func digestOf(ref string) string {
	_, digest, _ := strings.Cut(ref, "@")
	return digest
}

func TestWatchedPromotion(t *testing.T) {
	w := newWatched(t)
	code, result, stderr := w.watch(w.models[1])
	if code != step.ExitDone || result.Verdict != promote.Promoted || result.Digest != digestOf(w.models[1]) {
		t.Fatalf("exit code %d, %+v: %s", code, result, stderr)
	}
	if l := result.Live; l == nil || l.Samples != 200 || l.Different != 0 || l.Attack != "fgsm" {
		t.Errorf("%+v", l)
	}
}

// TestRollsBackWorseEndpoint: the endpoint serves the digest and answers
// otherwise than the signed model.
func TestRollsBackWorseEndpoint(t *testing.T) {
	w := newWatched(t)
	w.spoil = func(digest string) bool { return digest == digestOf(w.models[1]) }
	code, result, stderr := w.watch(w.models[1])
	if code != step.ExitDone || result.Verdict != promote.RolledBack || result.Digest != digestOf(w.models[0]) || result.Sequence != 3 || result.Because == "" {
		t.Fatalf("exit code %d, %+v: %s", code, result, stderr)
	}
	if h := w.head(); h.Model != digestOf(w.models[0]) || !h.Rollback || !strings.Contains(h.Reason, "automatic") {
		t.Errorf("%+v", h)
	}
	// With the cause gone it is promoted by name: it was in service before.
	w.spoil = func(string) bool { return false }
	if code, _, _ := w.watch(w.models[1]); code != step.ExitRefused {
		t.Errorf("back without --rollback: exit code %d", code)
	}
}

// TestRollsBackWhatIsNotServed: the servers do not take the model.
func TestRollsBackWhatIsNotServed(t *testing.T) {
	w := newWatched(t)
	elsewhere := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, `{"name":"tiny","parameters":{"digest":%q}}`, digestOf(w.models[0]))
	}))
	defer elsewhere.Close()
	code, result, stderr := w.promote(w.models[1], "--endpoint", w.url+","+elsewhere.URL, "--endpoint-model", "tiny", "--endpoint-timeout", "2s")
	if code != step.ExitDone || result.Verdict != promote.RolledBack || !strings.Contains(result.Because, "it serves "+digestOf(w.models[0])) {
		t.Fatalf("exit code %d, %+v: %s", code, result, stderr)
	}
	if h := w.head(); h.Model != digestOf(w.models[0]) {
		t.Errorf("%+v", h)
	}
}

// TestWatchIsCheckedFirst: what is wrong with the watch is found before the
// channel moves.
func TestWatchIsCheckedFirst(t *testing.T) {
	w := newWatched(t)
	for _, args := range [][]string{
		{"--endpoint", "serve:8080"},
		{"--endpoint", "http://serve", "--endpoint-attack", "pgd-7"}, // not in the report
		{"--endpoint", "http://serve", "--endpoint-attack", "magic"},
		{"--endpoint", "http://serve", "--endpoint-dataset", "mnist"}, // not the report's
	} {
		if code, _, stderr := w.promote(w.models[1], args...); code != step.ExitBadInput {
			t.Errorf("%v: exit code %d: %s", args, code, stderr)
		}
	}
	if h := w.head(); h.Sequence != 1 {
		t.Errorf("%+v", h)
	}
}

func TestCase38WeakerModelIsRefusedWithBothFigures(t *testing.T) {
	p := newPromoter(t, "oci:"+t.TempDir())
	strong := signingtest.Pack(t, p.place+":strong", signingtest.Judged(t, 1, 950), p.key)
	weak := signingtest.Pack(t, p.place+":weak", signingtest.Judged(t, 2, 900), p.key)
	if code, _, stderr := p.run(strong); code != step.ExitDone {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	code, result, stderr := p.run(weak)
	if code != step.ExitDone || result.Verdict != promote.Rejected {
		t.Fatalf("exit code %d, %+v: %s", code, result, stderr)
	}
	both := false
	for _, r := range result.Reasons {
		if !r.Pass && r.Rule == "max_robust_regression" {
			both = r.Figure < r.Threshold && strings.Contains(stderr, fmt.Sprintf("%.4f", r.Figure)) && strings.Contains(stderr, fmt.Sprintf("%.4f", r.Threshold))
		}
	}
	if !both {
		t.Errorf("%+v: %s", result.Reasons, stderr)
	}
	h, err := channel.Read(t.Context(), p.place+":production", signingtest.Policy(p.key))
	if err != nil || h.Model != digestOf(strong) {
		t.Errorf("%+v, %v", h, err)
	}
}
