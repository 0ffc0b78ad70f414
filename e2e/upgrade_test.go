//go:build e2e

package e2e

import (
	"context"
	"strings"
	"testing"

	"sigs.k8s.io/e2e-framework/pkg/features"
)

// Temper is upgraded as docs/kubernetes.md tells, while a model is in service:
// the model stays, and no request fails (case 66). What makes the release another
// one is a label in the server's image.
func TestCase66Upgrade(t *testing.T) {
	const serve = registryOutside + "/temper/serve"
	old := must(t, "", tool(t, "crane"), "digest", serve+":dev")
	t.Cleanup(func() { must(t, "", tool(t, "crane"), "tag", serve+"@"+old, "dev") })
	var model, channel, next string
	testenv.Test(t, features.New("an upgrade under load").
		Assess("Given a model in service", do(func(t *testing.T) {
			promoted(t)
			h := head(t, repository)
			model, channel = h.Model, h.Digest
			waitForModel(t, namespace, model)
		})).
		Assess("When the new release is applied, every request is answered", do(func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			failures, asked := make(chan error, 1), 0
			go func() {
				defer close(failures)
				s, pixels := server(t, namespace), make([]float32, digit.Size())
				for ctx.Err() == nil {
					if _, err := s.Predict(context.WithoutCancel(ctx), pixels, 1, digit); err != nil {
						failures <- err
						return
					}
					asked++
				}
			}()
			next = must(t, "", tool(t, "crane"), "mutate", "--label=release=next-"+unique(), "--tag="+serve+":dev", serve+"@"+old)
			err := install(namespace, "")
			if err == nil {
				_, err = run("", "kubectl", "rollout", "status", "-n", namespace, "--timeout=5m", "deployment/serve")
			}
			stop()
			if failure := <-failures; failure != nil || err != nil || asked == 0 {
				t.Errorf("%v; after %d requests: %v", err, asked, failure)
			}
			t.Logf("%d requests", asked)
		})).
		Assess("Then the new release serves the model of before, and the channel is as it was", do(func(t *testing.T) {
			_, digest, _ := strings.Cut(next, "@")
			images := must(t, "", "kubectl", "get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=serve",
				"--field-selector=status.phase=Running", "-o", "jsonpath={.items[*].spec.containers[*].image}")
			if digest == "" || !strings.Contains(images, digest) {
				t.Errorf("the servers' images are %s, not %s", images, next)
			}
			waitForModel(t, namespace, model)
			if now := head(t, repository); now.Digest != channel {
				t.Errorf("the channel's head was %s and is %s", channel, now.Digest)
			}
		})).
		Feature())
}
