package top

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/sentinel"
)

func status() *sentinel.Status {
	at := time.Unix(1e9, 0)
	right := 0.912
	return &sentinel.Status{
		State: "defending", Model: "v2\x1b[31m", Digest: "sha256:0123456789abcdef", Requests: 1234, Flagged: 30, Right: &right, Labels: 50, Errors: 4,
		Attack: sentinel.Level{Level: 6.5, Limit: 6}, Begun: 1, Budget: 4, Classes: []string{"one", "seven"}, Circuit: "3 defences in a row led to no better model",
		Open:     &sentinel.Incident{ID: "i", Cause: "attack", Opened: at, Share: 0.3, Epsilon: 0.25, Timeline: []sentinel.Event{{At: at, Name: "alarm"}}},
		Versions: []sentinel.Version{{Version: "v2", Digest: "sha256:0123456789abcdef", About: sentinel.About{SignedBy: []string{"ops"}, Clean: 0.99, Robust: 0.85, Epsilon: 0.3, Curve: []evaluate.Point{{Epsilon: 0, Accuracy: 0.99}, {Epsilon: 0.1, Accuracy: 0.953}}}}},
		History:  []sentinel.Moment{{At: at, Requests: 100}, {At: at.Add(time.Second), Requests: 150, Attack: 6.5}},
	}
}

func run(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	var out, tell bytes.Buffer
	code = step.Run(ctx, Command(), args, &out, &tell)
	return code, out.String(), tell.String()
}

func TestTop(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/status":
			json.NewEncoder(w).Encode(status())
		case "/evidence":
			json.NewEncoder(w).Encode([]sentinel.Flagged{{Request: 77, Served: 1, Guard: 2, Score: 0.981}})
		default:
			http.NotFound(w, r)
		}
	}))
	defer server.Close()
	code, out, stderr := run(t.Context(), "--sentinel", server.URL, "--once")
	if code != step.ExitDone {
		t.Fatal(code, stderr)
	}
	for _, want := range []string{"DEFENDING", "91.2%", "50.0 a second", "6.5 of 6", "signed by ops", "robust 85.0% at 0.3", "share 30%", "3 defences in a row", "▁█", "1 of 4",
		"request 77  model seven, guard 2, score 0.98", "99.0% at 0, 95.3% at 0.1"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Errorf("a text from outside commands the terminal: %q", out)
	}
	code, out, _ = run(t.Context(), "--sentinel", server.URL, "-o", "json")
	var s sentinel.Status
	if err := json.Unmarshal([]byte(out), &s); code != step.ExitDone || err != nil || s.Requests != 1234 {
		t.Errorf("JSON: exit code %d, %v", code, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if code, out, _ := run(ctx, "--sentinel", server.URL, "--every", "10ms"); code != step.ExitDone || strings.Count(out, "DEFENDING") < 2 {
		t.Errorf("again and again: exit code %d, %q", code, out)
	}
	for want, args := range map[int][]string{
		step.ExitBadInput:    {"--sentinel", "sentinel:8090"},
		step.ExitUnavailable: {"--sentinel", "http://127.0.0.1:1", "--once"},
	} {
		if code, _, stderr := run(t.Context(), args...); code != want {
			t.Errorf("%v: exit code %d, want %d: %s", args, code, want, stderr)
		}
	}
}
