package summary

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/evaluate"
	"github.com/temper-ml/temper/runners/step/train"
	"github.com/temper-ml/temper/signing/store"
)

// A summary holds the workflow's own reports, not those of another whose name
// begins alike, nor the parts of shards; and what failed, however Argo quotes it.
func TestASummaryOfWhatAWorkflowLeft(t *testing.T) {
	repository := "oci:" + filepath.Join(t.TempDir(), "out")
	run := func(cmd func(args ...string) int, args ...string) {
		t.Helper()
		if code := cmd(args...); code != 0 {
			t.Fatalf("%q: exit code %d", args, code)
		}
	}
	var out, errs bytes.Buffer
	trained := func(args ...string) int { return step.Run(t.Context(), train.Command(), args, &out, &errs) }
	measured := func(args ...string) int { return step.Run(t.Context(), evaluate.Command(), args, &out, &errs) }
	run(trained, "wong", "--epochs=0.02", "--output="+repository+":network")
	run(measured, "--model="+repository+":network", "--samples=20", "--attacks=fgsm", "--output="+repository+":wf-before")
	// Others' reports, and what is none: it would be an error to read it as one.
	for tag, of := range map[string]string{"wf-2-before": "wf-before", "wf-report-x-part-1": "network"} {
		r, err := store.Open(t.Context(), repository+":"+of)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if err := r.Pin(t.Context()); err != nil {
			t.Fatal(err)
		}
		at, err := r.At(tag)
		if err == nil {
			err = at.SetTag(t.Context(), r.Digest())
		}
		if err != nil {
			t.Fatal(err)
		}
	}

	for _, failures := range []string{
		"", "{{workflow.failures}}", `"null"`, `[]`,
		`"[{\"displayName\":\"pack\",\"message\":\"<script>\",\"phase\":\"Failed\"}]"`,
		`[{"displayName":"pack","message":"<script>","phase":"Failed"}]`,
		"no JSON at all",
	} {
		out.Reset()
		code := step.Run(t.Context(), Command(), []string{
			"--workflow=wf", "--status=Failed", "--failures=" + failures, "--repository=" + repository, "--output=" + repository + ":wf-summary", "-o=json",
		}, &out, &errs)
		var sum Summary
		if err := json.Unmarshal(out.Bytes(), &sum); code != 0 || err != nil {
			t.Fatalf("%s: exit code %d, %v: %s", failures, code, err, errs.String())
		}
		if len(sum.Reports) != 1 || sum.Reports[0].Tag != "before" {
			t.Errorf("%s: reports %+v", failures, sum.Reports)
		}
		if want := strings.Count(failures, "pack"); len(sum.Failures) != want {
			t.Errorf("%s: failures %+v", failures, sum.Failures)
		}
		r, err := store.Open(t.Context(), repository+":wf-summary")
		if err != nil {
			t.Fatal(err)
		}
		a, err := r.Pull(t.Context(), store.Want{Type: Type})
		if err != nil {
			t.Fatal(err)
		}
		page, err := a.File(PageFile)
		if err != nil || strings.Contains(string(page), "<script>") || !strings.Contains(string(page), "Failed") {
			t.Errorf("%s: the page shows it unescaped, or not at all: %v", failures, err)
		}
		r.Close()
	}
}
