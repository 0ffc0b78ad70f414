//go:build e2e

package e2e

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/summary"
	"github.com/temper-ml/temper/signing/store"
)

// The nightly attack, of the CronWorkflow but started by hand: a model that meets
// its policy stays in service. The exit handler's summary says what was measured.
func TestRedteam(t *testing.T) {
	t.Parallel()
	var w *workflow
	var channel, model string
	testenv.Test(t, features.New("the nightly attack").
		Assess("Given a model in service", do(func(t *testing.T) {
			promoted(t)
			h := head(t, repository)
			channel, model = h.Digest, h.Model
		})).
		Assess("When redteam attacks it, the verdict is that it passes", do(func(t *testing.T) {
			name := must(t, "", "argo", "submit", "-n", namespace, "--from", "cronwf/redteam", "-p", "suite=", "-o", "name") // the ensemble takes minutes
			w = finished(t, namespace, name)
			if v := w.result("verdict"); v != "pass" || len(w.pods("shard")) != 1 {
				t.Errorf("verdict %q, by %d pods", v, len(w.pods("shard")))
			}
		})).
		Assess("Then nothing is hardened, and the channel is as it was", do(func(t *testing.T) {
			if n := len(w.pods("retrain")); n != 0 {
				t.Errorf("%d pods of retrain ran", n)
			}
			if now := head(t, repository); now.Digest != channel {
				t.Errorf("the channel's head was %s and is %s", channel, now.Digest)
			}
		})).
		Assess("And its report is a referrer of the model, and in the summary", do(func(t *testing.T) {
			report := artifact.DigestOf(w.result("reference"))
			r, err := store.Open(t.Context(), outside(repository)+"@"+model)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if referrers, err := r.Referrers(t.Context()); err != nil || !slices.Contains(referrers, report) {
				t.Errorf("referrers %v, %v; the report is %s", referrers, err, report)
			}
			a, err := store.Pull(t.Context(), outside(repository)+":"+w.Metadata.Name+"-summary", store.Want{Type: summary.Type})
			if err != nil {
				t.Fatal(err)
			}
			data, err := a.File(summary.File)
			if err != nil {
				t.Fatal(err)
			}
			var s summary.Summary
			if err := json.Unmarshal(data, &s); err != nil {
				t.Fatal(err)
			}
			if s.Status != "Succeeded" || len(s.Failures) != 0 || len(s.Reports) != 1 || artifact.DigestOf(s.Reports[0].Reference) != report {
				t.Errorf("the summary is %+v", s)
			}
		})).
		Assess("When its policy asks for more than it has, and than its defence reaches, the verdicts are fail", do(func(t *testing.T) {
			name := must(t, "", "argo", "submit", "-n", namespace, "--from", "cronwf/redteam", "-p", "suite=", "-p", "attack-samples=1000",
				"-p", "definition="+define(t, "redteam-"+unique(), "0.999"), "-p", "retrain-epochs=0.01", "-o", "name")
			w = finished(t, namespace, name)
			if v := w.result("verdict"); v != "fail" || len(w.pods("retrain")) != 1 || len(w.pods("shard")) != 3 { // the model, the candidate, and it once more by the night's seed
				t.Errorf("verdict %q, %d pods of retrain and %d of shard", v, len(w.pods("retrain")), len(w.pods("shard")))
			}
		})).
		Assess("Then nothing is promoted", do(func(t *testing.T) {
			if n := len(w.pods("promote")); n != 0 {
				t.Errorf("%d pods of promote ran", n)
			}
			if now := head(t, repository); now.Digest != channel {
				t.Errorf("the channel's head was %s and is %s", channel, now.Digest)
			}
		})).
		Feature())
}

// A defence that needs a person's approval does nothing until it has it.
func TestDefendWaitsForApproval(t *testing.T) {
	t.Parallel()
	var name string
	testenv.Test(t, features.New("a person's approval").
		Assess("When defend is submitted with approval=required, it is suspended", do(func(t *testing.T) {
			name = submit(t, namespace, "defend", "model="+promoted(t).result("reference"), "approval=required", "channel=approval-"+unique())
			poll(t, name+" to be suspended", func() (bool, error) {
				for _, n := range get(t, namespace, name).Status.Nodes {
					if n.Type == "Suspend" && n.Phase == "Running" {
						return true, nil
					}
				}
				return false, nil
			})
			if n := len(get(t, namespace, name).pods("retrain")); n != 0 {
				t.Errorf("%d pods of retrain ran", n)
			}
		})).
		Assess("Then argo resume starts it", do(func(t *testing.T) {
			must(t, "", "argo", "resume", "-n", namespace, name)
			poll(t, name+" to harden", func() (bool, error) { return len(get(t, namespace, name).pods("retrain")) > 0, nil })
			must(t, "", "argo", "terminate", "-n", namespace, name)
		})).
		Assess("And what was refused at submission is refused when it is retried", do(func(t *testing.T) {
			poll(t, "the end of "+name, func() (bool, error) { return get(t, namespace, name).Status.Phase == "Failed", nil })
			if _, err := run("", "argo", "retry", "-n", namespace, name, "-p", "candidates={{=1+1}}"); err == nil || !strings.Contains(err.Error(), "temper-workflow-parameters") {
				t.Errorf("argo retry: %v", err)
			}
		})).
		Feature())
}
