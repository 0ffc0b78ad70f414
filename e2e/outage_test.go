//go:build e2e

package e2e

import (
	"testing"

	"sigs.k8s.io/e2e-framework/pkg/features"
)

// While the registry is away the server answers, and a step that needs the
// registry fails with exit code 4 and is tried again, until it is back.
func TestRegistryOutage(t *testing.T) {
	var name, model string
	reachable := func(yes bool) {
		selector := "nothing"
		if yes {
			selector = "registry"
		}
		must(t, "", "kubectl", "patch", "-n", "registry", "service", "registry", "-p", `{"spec": {"selector": {"app.kubernetes.io/name": "`+selector+`"}}}`)
	}
	t.Cleanup(func() { reachable(true) })
	testenv.Test(t, features.New("a registry that is away").
		Assess("Given a model in service", do(func(t *testing.T) {
			promoted(t)
			model = head(t, repository).Model
			waitForModel(t, namespace, model)
		})).
		Assess("When the registry is away while a workflow needs it", do(func(t *testing.T) {
			reachable(false)
			name = submit(t, namespace, "evaluate", "model="+repository+"@"+model, "samples=1001") // not what is remembered
			poll(t, "a step that failed for it", func() (bool, error) {
				for _, n := range get(t, namespace, name).pods("shard") {
					if n.Phase == "Failed" && n.Outputs.ExitCode == "4" {
						return true, nil
					}
				}
				return false, nil
			})
		})).
		Assess("Then the server answers as before", do(func(t *testing.T) {
			waitForModel(t, namespace, model)
			if _, err := server(t, namespace).Predict(t.Context(), make([]float32, digit.Size()), 1, digit); err != nil {
				t.Error(err)
			}
		})).
		Assess("And the workflow succeeds once the registry is back", do(func(t *testing.T) {
			reachable(true)
			if w := finished(t, namespace, name); len(w.pods("shard")) < 2 {
				t.Errorf("shard ran in %d pod(s)", len(w.pods("shard")))
			}
		})).
		Feature())
}
