//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/verify"
)

// promoting is a namespace with the ConfigMap of the locks, and models in a
// repository of the cluster's registry.
type promoting struct {
	namespace, place, policy, keyFile string
	models                            []string
	key                               *sign.Key
}

func newPromoting(t *testing.T, name string, models int) *promoting {
	t.Helper()
	key, dir := signingtest.KeyFolder(t)
	p := &promoting{namespace: name + "-" + unique(), place: fmt.Sprintf("%s/e2e/%s-%s", registryOutside, name, unique()),
		policy: filepath.Join(dir, "tiny.yaml"), keyFile: filepath.Join(dir, sign.PrivateKeyFile), key: key}
	if err := os.WriteFile(p.policy, []byte(signingtest.Definition), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range models {
		p.models = append(p.models, signingtest.Pack(t, fmt.Sprintf("%s:v%d", p.place, i), signingtest.Judged(t, uint64(i+1), 950), key))
	}
	ctx := t.Context()
	if _, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: p.namespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := run("", "kubectl", "delete", "namespace", p.namespace, "--wait=false"); err != nil {
			t.Error(err)
		}
	})
	locks := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "channels"}}
	if _, err := client.CoreV1().ConfigMaps(p.namespace).Create(ctx, locks, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return p
}

// promote runs the step here, against the cluster's API.
func (p *promoting) promote(t *testing.T, model string, more ...string) (code int, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	args := append([]string{"--channel", p.place + ":production", "--model", model, "--key", p.keyFile, "--policy", p.policy,
		"--dataset", signingtest.Dataset, "--kubeconfig", os.Getenv("KUBECONFIG"), "-o", "json"}, more...)
	code = step.Run(t.Context(), promote.Command(), args, &out, &errs)
	return code, errs.String() + out.String()
}

func (p *promoting) head(t *testing.T) *channel.Head {
	t.Helper()
	h, err := channel.Read(t.Context(), p.place+":production", verify.Policy{Keys: []verify.Key{{Name: "e2e", PEM: p.key.PublicKey()}}})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// Promotions at once, in a registry that decides nothing: the resourceVersion
// does.
func TestCase39PromotionsAtOnce(t *testing.T) {
	t.Parallel()
	p := newPromoting(t, "race", 4)
	var codes []int
	testenv.Test(t, features.New("promotions at once").
		Assess("When four models are promoted at once to a channel that has none", do(func(t *testing.T) {
			codes = make([]int, len(p.models))
			var group sync.WaitGroup
			for i, m := range p.models {
				group.Go(func() {
					var said string
					if codes[i], said = p.promote(t, m, "--lock", p.namespace+"/channels"); codes[i] != step.ExitDone && codes[i] != step.ExitRefused {
						t.Errorf("exit code %d: %s", codes[i], said)
					}
				})
			}
			group.Wait()
		})).
		Assess("Then as many won as there are records, and the ConfigMap names the last", do(func(t *testing.T) {
			won := 0
			for _, c := range codes {
				if c == step.ExitDone {
					won++
				}
			}
			h := p.head(t)
			if won == 0 || h.Sequence != won {
				t.Errorf("exit codes %v, and the head is number %d", codes, h.Sequence)
			}
			locks, err := client.CoreV1().ConfigMaps(p.namespace).Get(t.Context(), "channels", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if text := fmt.Sprint(locks.Data); !strings.Contains(text, h.Digest) {
				t.Errorf("the ConfigMap says %s, the head is %s", text, h.Digest)
			}
		})).
		Feature())
}

// A Deployment is rolled by its pods' annotation, and back where the rollout
// fails.
func TestPromotionRollsADeployment(t *testing.T) {
	t.Parallel()
	p := newPromoting(t, "rollout", 2)
	annotation := func(t *testing.T) string {
		t.Helper()
		d, err := client.AppsV1().Deployments(p.namespace).Get(t.Context(), "server", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return d.Spec.Template.Annotations["temper-ml.github.io/model"]
	}
	testenv.Test(t, features.New("rollout of a Deployment").
		Assess("Given a Deployment", do(func(t *testing.T) {
			installed, err := client.AppsV1().Deployments(namespace).Get(t.Context(), "serve", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			labels := map[string]string{"app": "server"}
			replicas, deadline, zero := int32(1), int32(60), int64(0)
			d := &appsv1.Deployment{
				ObjectMeta: metav1.ObjectMeta{Name: "server"},
				Spec: appsv1.DeploymentSpec{
					Replicas: &replicas, ProgressDeadlineSeconds: &deadline, Selector: &metav1.LabelSelector{MatchLabels: labels},
					Template: corev1.PodTemplateSpec{
						ObjectMeta: metav1.ObjectMeta{Labels: labels},
						Spec: corev1.PodSpec{
							TerminationGracePeriodSeconds: &zero,
							Containers: []corev1.Container{{ // waits for a channel that nobody promotes to
								Name: "server", Image: installed.Spec.Template.Spec.Containers[0].Image, Command: []string{"/serve"},
								Args:         []string{"--listen=:8080", "--channel=" + registryInside + "/e2e/none:production", "--key=/keys/cosign.pub"},
								VolumeMounts: []corev1.VolumeMount{{Name: "keys", MountPath: "/keys"}},
							}},
							Volumes: []corev1.Volume{{Name: "keys", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "keys"}}}}},
						},
					},
				},
			}
			keys := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "keys"}, Data: map[string]string{"cosign.pub": string(p.key.PublicKey())}}
			if _, err := client.CoreV1().ConfigMaps(p.namespace).Create(t.Context(), keys, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			if _, err := client.AppsV1().Deployments(p.namespace).Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		})).
		Assess("When a model is promoted, its pods are new and available", do(func(t *testing.T) {
			if code, said := p.promote(t, p.models[0], "--deployment", p.namespace+"/server"); code != step.ExitDone || !strings.Contains(said, promote.Promoted) {
				t.Fatalf("exit code %d: %s", code, said)
			}
			d, err := client.AppsV1().Deployments(p.namespace).Get(t.Context(), "server", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if annotation(t) != p.models[0] || d.Status.UpdatedReplicas != 1 || d.Status.AvailableReplicas != 1 {
				t.Errorf("%s, %+v", annotation(t), d.Status)
			}
		})).
		Assess("When the next one's pods never come up, the channel and the pods go back", do(func(t *testing.T) {
			// From now on no new pod fits on the node.
			quota := `{"spec": {"template": {"spec": {"containers": [{"name": "server", "resources": {"requests": {"cpu": "1000"}}}]}}}}`
			if _, err := run("", "kubectl", "-n", p.namespace, "patch", "deployment", "server", "-p", quota); err != nil {
				t.Fatal(err)
			}
			code, said := p.promote(t, p.models[1], "--deployment", p.namespace+"/server", "--rollout-timeout", "30s")
			if code != step.ExitDone || !strings.Contains(said, `"verdict": "`+promote.RolledBack) {
				t.Fatalf("exit code %d: %s", code, said)
			}
			if h := p.head(t); annotation(t) != p.models[0] || h.Sequence != 3 || !h.Rollback {
				t.Errorf("%s, %+v", annotation(t), h)
			}
		})).
		Feature())
}
