//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/attack"
)

// A model that nothing protects is attacked through its Service: the sentinel
// sees it and starts the defence, which puts a robust model in its place.
func TestAttackIsAnswered(t *testing.T) {
	t.Parallel()
	ns := "attacked-" + unique()
	repository := registryInside + "/" + ns + "/mnist"
	var weak, adversarial, hardened string
	var clean, attacked float64
	testenv.Test(t, features.New("an attack on the model in service").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			promoted(t)
			definition := define(t, ns, "0")
			if err := install(ns, fmt.Sprintf(`configMapGenerator:
- name: serving
  behavior: merge
  literals: [TEMPER_CHANNEL=%[1]s:production, TEMPER_EVIDENCE=%[1]s, "TEMPER_POLICY=%[2]s"]
patches:
- target: {kind: Deployment}
  patch: '[{"op": "replace", "path": "/spec/replicas", "value": 0}]'
`, repository, definition)); err != nil {
				t.Fatal(err)
			}
			// The policy asks for nothing, so the first network is promoted as it is.
			w := finished(t, ns, submit(t, ns, "robustify", "definition="+definition, "repository="+repository, "model="+base(t), "epsilons=[]"))
			weak = w.result("digest")
			must(t, "", "kubectl", "scale", "-n", ns, "--replicas=1", "deployment/serve", "deployment/sentinel")
			must(t, "", "kubectl", "rollout", "status", "-n", ns, "--timeout=5m", "deployment/serve", "deployment/sentinel")
			return ctx
		}).
		Assess("Given a defenceless model in service, right about clean images", do(func(t *testing.T) {
			waitForModel(t, ns, weak)
			if clean = accuracy(t, ns, "mnist", 400); clean < 0.95 {
				t.Errorf("accuracy on clean images is %.3f", clean)
			}
		})).
		Assess("When it is attacked with FGSM through its Service, its answers are wrong", do(func(t *testing.T) {
			// What robustify made of the same network, with the largest epsilon.
			adversarial = promoted(t).made(t, "attack(2:0.3)")
			if attacked = accuracy(t, ns, adversarial, 400); attacked > clean/2 {
				t.Errorf("accuracy under attack is %.3f, clean %.3f: no attack", attacked, clean)
			}
		})).
		Assess("Then the sentinel starts defend, which promotes another model", do(func(t *testing.T) {
			var name string
			poll(t, "a workflow of defend", func() (bool, error) {
				names, err := run("", "kubectl", "get", "workflows", "-n", ns, "-o", "jsonpath={.items[*].metadata.name}")
				for _, n := range strings.Fields(names) {
					if strings.HasPrefix(n, "defend-") {
						name = n
						return true, nil
					}
				}
				accuracy(t, ns, adversarial, 50) // the attacker goes on
				return false, err
			})
			w := finished(t, ns, name)
			if w.result("verdict") != "promoted" || w.result("digest") == weak {
				t.Fatalf("%s: verdict %q, digest %s", name, w.result("verdict"), w.result("digest"))
			}
			waitForModel(t, ns, w.result("digest"))
			hardened = outside(w.result("reference"))
		})).
		Assess("And the same attack finds the answers right", do(func(t *testing.T) {
			recovered := accuracy(t, ns, adversarial, 400)
			t.Logf("accuracy: clean %.3f, attacked %.3f, recovered %.3f", clean, attacked, recovered)
			if recovered < 0.85 {
				t.Errorf("accuracy under the attack is still %.3f", recovered)
			}
		})).
		Assess("And so does one that was made for the new model", do(func(t *testing.T) {
			var out, narration bytes.Buffer
			code := step.Run(t.Context(), attack.Command(), []string{"--model", hardened, "--attack", "pgd-20", "--epsilon", "0.3",
				"--samples", "200", "--output", outside(repository) + ":anew"}, &out, &narration)
			if code != 0 {
				t.Fatalf("attack: exit code %d\n%s", code, &narration)
			}
			anew := accuracy(t, ns, strings.TrimSpace(out.String()), 200)
			t.Logf("accuracy under an attack on the new model: %.3f", anew)
			if anew < 0.8 {
				t.Errorf("accuracy under an attack on the new model is %.3f", anew)
			}
		})).
		Teardown(remove(ns)).
		Feature())
}

// define pushes a definition whose policy asks for so much robustness, "0" for none,
// and returns its reference in the cluster.
func define(t *testing.T, repository, robust string) string {
	t.Helper()
	data, err := os.ReadFile("../models/zoo/wong.yaml")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "wong.yaml")
	changed := strings.Replace(string(data), "min_robust_accuracy: 0.85", "min_robust_accuracy: "+robust, 1)
	if changed == string(data) {
		t.Fatal("the policy is another one now")
	}
	if err := os.WriteFile(path, []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	ref, _, err := artifact.PushDefinition(t.Context(), registryOutside+"/"+repository+"/mnist:definition", path)
	if err != nil {
		t.Fatal(err)
	}
	return inside(ref)
}
