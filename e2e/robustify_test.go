//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/images"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// robustified is the workflow that brought the first model into service: one
// for all tests.
var robustified struct {
	sync.Mutex
	*workflow
}

// promoted runs robustify from nothing, unless it has been run, and returns
// the workflow.
func promoted(t *testing.T) *workflow {
	t.Helper()
	robustified.Lock()
	defer robustified.Unlock()
	if robustified.workflow == nil {
		if digest, err := inService(t, namespace); err == nil {
			t.Logf("the cluster is not new: %s is in service", digest)
		}
		w := finished(t, namespace, submit(t, namespace, "robustify"))
		if v := w.result("verdict"); v != "promoted" {
			t.Fatalf("workflow %s: verdict %q, not promoted", w.Metadata.Name, v)
		}
		t.Logf("robustify took %v", w.Status.FinishedAt.Sub(w.Status.StartedAt))
		robustified.workflow = w
	}
	return robustified.workflow
}

// sentence is one of a test: Given, When or Then.
type sentence = func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context

func do(f func(t *testing.T)) sentence {
	return func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
		t.Helper()
		f(t)
		return ctx
	}
}

// trust is what whoever looks from outside asks for: the signature of the key,
// for a repository by its name in the cluster.
func trust(t *testing.T, repository string) verify.Policy {
	t.Helper()
	public, err := os.ReadFile(filepath.Join(keys, "cosign.pub"))
	if err != nil {
		t.Fatal(err)
	}
	return verify.Policy{Keys: []verify.Key{{Name: "e2e", PEM: public}}, Repositories: []string{repository}}
}

func head(t *testing.T, repository string) *channel.Head {
	t.Helper()
	h, err := channel.Read(t.Context(), outside(repository)+":production", trust(t, repository))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// From nothing to a model in service (case 65).
func TestCase65Robustify(t *testing.T) {
	var w *workflow
	testenv.Test(t, features.New("robustify from nothing").
		Assess("When robustify is submitted with the stock argo command line, it promotes a model", do(func(t *testing.T) {
			w = promoted(t)
		})).
		Assess("Then the channel names that model, signed", do(func(t *testing.T) {
			if h := head(t, repository); h.Model != w.result("digest") || h.Reference != outside(w.result("reference")) {
				t.Errorf("the channel names %s, the workflow %s", h.Reference, w.result("reference"))
			}
		})).
		Assess("And it is in service, and right about clean images", do(func(t *testing.T) {
			waitForModel(t, namespace, w.result("digest"))
			if a := accuracy(t, namespace, "mnist", 200); a < 0.95 {
				t.Errorf("accuracy on clean images is %.3f", a)
			}
		})).
		Feature())
}

// The same submission again trains nothing, and changes nothing in service.
func TestTheSameAgain(t *testing.T) {
	t.Parallel()
	var before *channel.Head
	testenv.Test(t, features.New("the same submission again").
		Assess("Given what robustify promoted", do(func(t *testing.T) {
			promoted(t)
			before = head(t, repository)
		})).
		Assess("When it is submitted again, all that costs much is remembered", do(func(t *testing.T) {
			w := finished(t, namespace, submit(t, namespace, "robustify"))
			for _, step := range []string{"train", "attack", "retrain", "shard"} {
				if n := len(w.pods(step)); n != 0 {
					t.Errorf("%d pods of %s ran", n, step)
				}
			}
			if w.result("digest") != before.Model {
				t.Errorf("workflow %s made %s, the one before %s", w.Metadata.Name, w.result("digest"), before.Model)
			}
		})).
		Assess("Then the channel is as it was", do(func(t *testing.T) {
			if after := head(t, repository); after.Digest != before.Digest {
				t.Errorf("the channel moved from record %s to %s", before.Digest, after.Digest)
			}
		})).
		Feature())
}

// accuracy asks the server of a namespace about the first n test images of a
// data set.
func accuracy(t *testing.T, namespace, ref string, n int) float64 {
	t.Helper()
	splits, err := artifact.OpenDataset(t.Context(), outside(ref))
	if err != nil {
		t.Fatal(err)
	}
	right := 0
	err = ask(t.Context(), t, namespace, splits.Test, n, func(label int64, want uint8) {
		if label == int64(want) {
			right++
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return float64(right) / float64(n)
}

// ask sends the first n images, one a request.
func ask(ctx context.Context, t *testing.T, namespace string, set *dataset.Set, n int, answer func(label int64, want uint8)) error {
	t.Helper()
	s := server(t, namespace)
	pixels := make([]float32, digit.Size())
	for i := range n {
		set.Read(pixels, i, i+1)
		a, err := s.Predict(ctx, pixels, 1, digit)
		if err != nil {
			return err
		}
		answer(a.Labels[0], set.Labels[i])
	}
	return nil
}

// What the gate rejects ends Succeeded and changes nothing.
func TestRejectedCandidate(t *testing.T) {
	t.Parallel()
	var w *workflow
	var before *channel.Head
	testenv.Test(t, features.New("a candidate that is rejected").
		Assess("Given a model in service", do(func(t *testing.T) {
			promoted(t)
			before = head(t, repository)
		})).
		Assess("When robustify ends with a model that its policy rejects", do(func(t *testing.T) {
			// One epoch of hardening against what nothing withstands.
			w = finished(t, namespace, submit(t, namespace, "robustify", "retrain-epochs=1", "candidates="+`[{"recipe": "standard", "seed": "7"}]`))
		})).
		Assess("Then the workflow is Succeeded, its verdict is rejected", do(func(t *testing.T) {
			if v := w.result("verdict"); v != "rejected" {
				t.Errorf("verdict %q", v)
			}
			if n := w.pods("promote"); len(n) != 0 {
				t.Errorf("%d pods of promote ran", len(n))
			}
		})).
		Assess("And the model in service is the one before", do(func(t *testing.T) {
			if after := head(t, repository); after.Digest != before.Digest {
				t.Errorf("the channel moved from record %s to %s", before.Digest, after.Digest)
			}
			waitForModel(t, namespace, before.Model)
		})).
		Feature())
}

// The shipped controller runs shipped templates, as they are.
func TestCase06StrictReferencing(t *testing.T) {
	for name, c := range map[string]struct{ change, refusal string }{
		"another account":       {`{"serviceAccountName": "signer"}`, "fields [ServiceAccountName] are not permitted when using workflowTemplateRef"},
		"the host's network":    {`{"hostNetwork": true}`, "fields [HostNetwork] are not permitted when using workflowTemplateRef"},
		"a patch of the pods":   {`{"podSpecPatch": "{\"hostPID\": true}"}`, "fields [PodSpecPatch] are not permitted when using workflowTemplateRef"},
		"a template of its own": {`{"entrypoint": "own", "templates": [{"name": "own", "container": {"image": "` + registryInside + `/temper/train:dev", "command": ["/train"]}}]}`, "workflows must use workflowTemplateRef"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := map[string]any{}
			if err := json.Unmarshal([]byte(c.change), &spec); err != nil {
				t.Fatal(err)
			}
			spec["workflowTemplateRef"] = map[string]any{"name": "robustify"}
			if name == "a template of its own" {
				delete(spec, "workflowTemplateRef")
			}
			manifest, err := json.Marshal(map[string]any{
				"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow",
				"metadata": map[string]any{"generateName": "case06-", "namespace": namespace},
				"spec":     spec,
			})
			if err != nil {
				t.Fatal(err)
			}
			created := must(t, string(manifest), "kubectl", "create", "-f", "-", "-o", "jsonpath={.metadata.name}")
			poll(t, "the refusal of "+created, func() (bool, error) {
				w := get(t, namespace, created)
				if len(w.Status.Nodes) > 0 || w.Status.Phase == "Succeeded" {
					t.Fatalf("workflow %s ran", created)
				}
				return w.Status.Phase == "Error" && strings.Contains(w.Status.Message, c.refusal), fmt.Errorf("phase %q: %s", w.Status.Phase, w.Status.Message)
			})
		})
	}
}

// What Argo keeps in a workflow's status is not for whoever creates it to say.
func TestCase06StatusIsTheControllers(t *testing.T) {
	t.Parallel()
	own := map[string]any{"name": "train", "container": map[string]any{"image": registryInside + "/temper/train:dev", "command": []any{"/train"}}}
	for key, value := range map[string]map[string]any{
		"storedWorkflowTemplateSpec": {"entrypoint": "train", "templates": []any{own}},
		"storedTemplates":            {"namespaced/steps/train": own},
	} {
		manifest, err := json.Marshal(map[string]any{
			"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow",
			"metadata": map[string]any{"generateName": "case06-", "namespace": namespace},
			"spec":     map[string]any{"workflowTemplateRef": map[string]any{"name": "robustify"}},
			"status":   map[string]any{key: value},
		})
		if err != nil {
			t.Fatal(err)
		}
		out, err := run(string(manifest), "kubectl", "create", "--as", "system:serviceaccount:"+namespace+":sentinel", "-f", "-")
		if err == nil || !strings.Contains(err.Error(), "temper-workflow-status") {
			t.Errorf("%s: created: %s, %v", key, out, err)
		}
	}
}

// A parameter that is not one of its enum, or that does not exist, is refused
// when it is submitted, by the admission policy.
func TestParameterOutOfEnum(t *testing.T) {
	t.Parallel()
	notAdmitted(t, "no such parameter, or not with that value", "shards=3", "absent=1")
}

// A variable of Argo's in a value, which Argo would replace, is refused too.
func TestCase01VariablesAreRefused(t *testing.T) {
	t.Parallel()
	notAdmitted(t, "a parameter's value is taken as it is written",
		"definition={{workflow.name}}", "candidates={{=1+1}}", `candidates=[{"recipe": "\u007b\u007bworkflow.name}}", "seed": "1"}]`)
}

// An artifact by a tag is refused: results are remembered by the digests of what
// they are made from.
func TestArtifactByTag(t *testing.T) {
	t.Parallel()
	notAdmitted(t, "references with their digest", "model="+repository+":production", "dataset=https://example.com/digits")
}

// notAdmitted submits robustify with each parameter, all at once: argo takes ten
// seconds to say that it was refused.
func notAdmitted(t *testing.T, refusal string, parameters ...string) {
	t.Helper()
	var all sync.WaitGroup
	for _, p := range parameters {
		all.Go(func() {
			out, err := run("", "argo", "submit", "-n", namespace, "--from", "workflowtemplate/robustify", "-p", p, "-o", "name")
			if err == nil {
				t.Errorf("argo submit took %s for workflow %s", p, strings.TrimSpace(out))
			} else if text := err.Error(); !strings.Contains(text, "temper-workflow-parameters") || !strings.Contains(text, refusal) {
				t.Errorf("%s: refused for another reason: %v", p, err)
			}
		})
	}
	all.Wait()
}

// Pods are killed in train, pack, sign and promote: one model, one promotion.
func TestCase15PodsKilled(t *testing.T) {
	t.Parallel()
	victims := []string{"train", "pack", "sign", "promote"}
	ns := "killed-" + unique()
	var w *workflow
	testenv.Test(t, features.New("pods killed").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			installIn(t, ns)
			return ctx
		}).
		Assess("When the first pod of each step is killed", do(func(t *testing.T) {
			name := submit(t, ns, "robustify", "repository="+registryInside+"/"+ns, "definition="+define(t, ns, "0"), "retrain-epochs=1")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			killed := make(chan error, 1)
			go func() { killed <- kill(ctx, ns, name, victims) }()
			w = finished(t, ns, name)
			cancel()
			if err := <-killed; err != nil {
				t.Fatal(err)
			}
		})).
		Assess("Then others did their work, and one promotion came of it", do(func(t *testing.T) {
			r, err := store.Open(t.Context(), registryOutside+"/"+ns)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			tags, err := r.Tags(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			var records, models []string
			for _, tag := range tags {
				if strings.HasPrefix(tag, "production-") {
					records = append(records, tag)
				} else if strings.HasPrefix(tag, "sha256-") { // signatures and referrers
					continue
				}
				at, err := r.At(tag)
				if err != nil {
					t.Fatal(err)
				}
				if m, digest, err := at.Manifest(t.Context()); err != nil {
					t.Errorf("%s: %v", tag, err)
				} else if m.ArtifactType == modelspec.ArtifactTypeModelManifest && !slices.Contains(models, digest) {
					models = append(models, digest)
				}
			}
			if w.result("verdict") != "promoted" || len(records) != 1 || !slices.Equal(models, []string{w.result("digest")}) {
				t.Errorf("verdict %q of %s, records %v, packed models %v", w.result("verdict"), w.result("digest"), records, models)
			}
		})).
		Teardown(remove(ns)).
		Feature())
}

// kill deletes the first pod of each template, by force, while its program is
// at work: the node stops the program when it sees it, as most end within a
// second, so that what comes of it another pod did. (Argo gives that one the same
// node where it had not seen the first run.) The templates are in the order in
// which they run. The node knows no namespace: a program is the workflow's if its
// arguments name the repository, which has the namespace's name.
func kill(ctx context.Context, namespace, workflow string, templates []string) error {
	now := int64(0)
	for _, v := range templates {
		stop := exec.CommandContext(ctx, "docker", "exec", "temper-control-plane", "sh", "-c", `until pkill -STOP -f "^/`+v+` .*/`+namespace+`"; do sleep 0.05; done`)
		if out, err := stop.CombinedOutput(); err != nil {
			return fmt.Errorf("%s never ran: %w\n%s", v, err, out)
		}
		pods, err := client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "workflows.argoproj.io/workflow=" + workflow})
		if err != nil {
			return err
		}
		killed := false
		for _, pod := range pods.Items { // named by the workflow, the template, and a number
			if strings.HasPrefix(pod.Name, workflow+"-"+v+"-") {
				if err := client.CoreV1().Pods(namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
					return err
				}
				killed = true
			}
		}
		if !killed {
			return fmt.Errorf("no pod of %s to kill", v)
		}
	}
	return nil
}

// A gate that says nothing promotes nothing.
func TestCase12GateThatDies(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]map[string]any{
		"writes no result": {"args": []string{"--help"}},
		"fails":            {"args": []string{"--no-such-flag"}},
		"takes too long": { // the whole of an evaluation, in place of its last step
			"args":     []string{"--policy=wong", "--samples=10000", "--model={{inputs.parameters.model}}", "--output={{inputs.parameters.repository}}:whole"},
			"deadline": 10,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := "gate-" + unique()
			testenv.Test(t, features.New("a gate that "+name).
				Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
					installIn(t, ns)
					return ctx
				}).
				Assess("When the model is the one in service elsewhere, and the gate "+name, do(func(t *testing.T) {
					steps := map[string]any{}
					if err := json.Unmarshal([]byte(must(t, "", "kubectl", "get", "-n", ns, "workflowtemplate", "steps", "-o", "json")), &steps); err != nil {
						t.Fatal(err)
					}
					for _, e := range steps["spec"].(map[string]any)["templates"].([]any) {
						template := e.(map[string]any)
						if template["name"] == "reduce" {
							template["container"].(map[string]any)["args"] = change["args"]
							if change["deadline"] != nil {
								template["activeDeadlineSeconds"] = change["deadline"] // once: it is not tried again
							} else {
								template["retryStrategy"] = nil
							}
						}
					}
					changed, err := json.Marshal(steps)
					if err != nil {
						t.Fatal(err)
					}
					must(t, string(changed), "kubectl", "replace", "-n", ns, "-f", "-")
					name := submit(t, ns, "robustify", "repository="+registryInside+"/"+ns, "model="+base(t), "epsilons=[]")
					run("", "argo", "wait", "-n", ns, name)
					w := get(t, ns, name)
					if w.Status.Phase == "Succeeded" || w.result("verdict") == "promoted" {
						t.Errorf("the workflow is %s, verdict %q", w.Status.Phase, w.result("verdict"))
					}
					shards, gates := w.pods("shard"), w.pods("reduce")
					if len(shards) != 1 || shards[0].Phase != "Succeeded" || len(gates) != 1 {
						t.Fatalf("the gate was never reached: %v, %v", shards, gates)
					}
					t.Logf("the gate: %s: %s", gates[0].Phase, gates[0].Message)
					if deadline := strings.Contains(gates[0].Message, "deadline"); deadline != (change["deadline"] != nil) {
						t.Errorf("the gate ended for another reason: %s", gates[0].Message)
					}
					for _, later := range []string{"pack", "sign", "promote"} {
						if n := len(w.pods(later)); n != 0 {
							t.Errorf("%d pods of %s ran", n, later)
						}
					}
				})).
				Teardown(remove(ns)).
				Feature())
		})
	}
}

// base is the network that robustify trained first.
func base(t *testing.T) string { return promoted(t).made(t, "train") }

// A model that the installation's key did not sign is neither promoted nor
// served; the same model with its signature is.
func TestUnsignedIsRefused(t *testing.T) {
	t.Parallel()
	const refused, done = 3, 0
	_, otherKey := signingtest.KeyFolder(t)
	other := "other-key-" + unique()
	promote := func(model string) []string {
		return []string{"/promote", "--key=/signing-key/cosign.key", "--trust=/trusted-keys/cosign.pub", "--policy=wong",
			"--channel=" + strings.Split(model, "@")[0] + ":production", "--model=" + model}
	}
	signs := func(model string) []string {
		return []string{"/sign", "--key=/signing-key/cosign.key", "--policy=wong", "--", model}
	}
	var unsigned, wrong, right string
	testenv.Test(t, features.New("a model that is not signed, or by another").
		Assess("Given a model in service, and copies of its ModelPack: unsigned, signed with another key, and with the installation's", do(func(t *testing.T) {
			w := promoted(t)
			must(t, "", "kubectl", "create", "secret", "generic", other, "-n", namespace, "--from-file="+filepath.Join(otherKey, sign.PrivateKeyFile))
			for name, copied := range map[string]*string{"unsigned": &unsigned, "wrong": &wrong, "right": &right} {
				*copied = registryInside + "/" + name + "-" + unique()
				must(t, "", tool(t, "crane"), "copy", outside(w.result("reference")), outside(*copied)+":latest")
				*copied += "@" + w.result("digest")
			}
			ends(t, done, "sign", other, signs(wrong))
			ends(t, done, "sign", "signing-key", signs(right))
		})).
		Assess("When they are given to promote, it refuses with exit code 3, but not the last", do(func(t *testing.T) {
			ends(t, refused, "promote", "signing-key", promote(unsigned))
			ends(t, refused, "promote", "signing-key", promote(wrong))
			ends(t, done, "promote", "signing-key", promote(right))
		})).
		Assess("When they are given to serve, the server refuses with exit code 3", do(func(t *testing.T) {
			for _, model := range []string{unsigned, wrong} {
				ends(t, refused, "serve", "signing-key", []string{"/serve", "--key=/trusted-keys/cosign.pub", "--model=" + model})
			}
		})).
		Teardown(do(func(t *testing.T) { must(t, "", "kubectl", "delete", "secret", "-n", namespace, other) })).
		Feature())
}

// ends runs a runner in a pod as the workflows do, with the signing key of a
// secret, until it ends with an exit code.
func ends(t *testing.T, code int32, runner, secret string, command []string) {
	t.Helper()
	falsehood, truth, user := false, true, int64(65532)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: runner + "-", Labels: map[string]string{"app.kubernetes.io/part-of": "temper"}},
		Spec: corev1.PodSpec{
			RestartPolicy: corev1.RestartPolicyNever, ServiceAccountName: "signer", AutomountServiceAccountToken: &falsehood,
			SecurityContext: &corev1.PodSecurityContext{RunAsNonRoot: &truth, FSGroup: &user, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
			Containers: []corev1.Container{{
				Name: "main", Image: registryInside + "/temper/" + runner + ":dev", Command: command,
				Env: []corev1.EnvVar{{Name: "COSIGN_PASSWORD", Value: password}, {Name: "TMPDIR", Value: "/work"}},
				SecurityContext: &corev1.SecurityContext{
					RunAsUser: &user, AllowPrivilegeEscalation: &falsehood, ReadOnlyRootFilesystem: &truth,
					Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
				},
				VolumeMounts: []corev1.VolumeMount{{Name: "work", MountPath: "/work"}, {Name: "signing-key", MountPath: "/signing-key"}, {Name: "trusted-keys", MountPath: "/trusted-keys"}},
			}},
			Volumes: []corev1.Volume{
				{Name: "work", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
				{Name: "signing-key", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: secret}}},
				{Name: "trusted-keys", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "trusted-keys"}}}},
			},
		},
	}
	ctx := t.Context()
	pods := client.CoreV1().Pods(namespace)
	pod, err := pods.Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer pods.Delete(context.WithoutCancel(ctx), pod.Name, metav1.DeleteOptions{})
	poll(t, "the end of "+pod.Name, func() (bool, error) {
		now, err := pods.Get(ctx, pod.Name, metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		if s := now.Status.ContainerStatuses; len(s) == 1 && s[0].State.Terminated != nil {
			if now := s[0].State.Terminated.ExitCode; now != code {
				logs, _ := pods.GetLogs(pod.Name, &corev1.PodLogOptions{}).DoRaw(ctx)
				t.Errorf("%s ended with %d, not %d\n%s", strings.Join(command, " "), now, code, logs)
			}
			return true, nil
		}
		return false, fmt.Errorf("%s is %s", pod.Name, now.Status.Phase)
	})
}

// tool builds crane or cosign from its own module and returns its path.
func tool(t *testing.T, name string) string {
	t.Helper()
	return must(t, "", "go", "-C", "tools", "tool", "-n", name)
}

// What was promoted is there for everybody else's tools.
func TestFromOutside(t *testing.T) {
	var ref string
	testenv.Test(t, features.New("stock tools from outside the cluster").
		Assess("Given a promoted model", do(func(t *testing.T) { ref = outside(promoted(t).result("reference")) })).
		Assess("Then cosign verifies its signature through the node port", do(func(t *testing.T) {
			cosign(t, "verify", ref)
		})).
		Assess("And those of an image and of its bill of materials, which is the image's referrer", do(func(t *testing.T) {
			var out, narration bytes.Buffer
			if code := step.Run(t.Context(), images.Command(), []string{"--repository", registryOutside + "/temper", "--tag", "dev",
				"--key", filepath.Join(keys, sign.PrivateKeyFile), "../bin/verify"}, &out, &narration); code != 0 {
				t.Fatalf("images: exit code %d\n%s", code, &narration)
			}
			image := strings.TrimSpace(out.String())
			signedAndDescribed(t, image)
		})).
		Assess("And crane pulls it and the images, whole", do(func(t *testing.T) {
			for _, r := range []string{ref, registryOutside + "/temper/serve:dev"} {
				must(t, "", tool(t, "crane"), "pull", "--format=oci", r, filepath.Join(t.TempDir(), "pulled"))
			}
		})).
		Feature())
}

// signedAndDescribed holds an image to its signatures, and to the bill of materials
// that is its one referrer.
func signedAndDescribed(t *testing.T, image string) {
	t.Helper()
	cosign(t, "verify", image)
	cosign(t, "verify-attestation", "--type", images.PredicateType, image)
	r, err := store.Open(t.Context(), image)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	referrers, err := r.Referrers(t.Context())
	if err != nil || len(referrers) != 1 {
		t.Fatalf("referrers %v, %v", referrers, err)
	}
	bill, err := store.Pull(t.Context(), r.Repository()+"@"+referrers[0], store.Want{Type: images.BillType})
	if err != nil || !bytes.Contains(bill.Files[0].Data, []byte(`"bomFormat": "CycloneDX"`)) {
		t.Errorf("bill of materials: %v", err)
	}
}

// cosign runs the stock program with the installation's public key.
func cosign(t *testing.T, verb string, args ...string) {
	t.Helper()
	cmd := exec.Command(tool(t, "cosign"), append([]string{verb, "--key", filepath.Join(keys, sign.PublicKeyFile), "--insecure-ignore-tlog=true"}, args...)...)
	// Any root keeps cosign from looking for sigstore's on the network.
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "SIGSTORE_ROOT_FILE="+os.DevNull)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("cosign %s: %v\n%s", verb, err, out)
	}
}

// installIn installs Temper in a namespace of its own, without server and
// sentinel.
func installIn(t *testing.T, ns string) {
	t.Helper()
	if err := install(ns, "patches:\n- target: {kind: Deployment}\n  patch: '[{\"op\": \"replace\", \"path\": \"/spec/replicas\", \"value\": 0}]'\n"); err != nil {
		t.Fatal(err)
	}
}

func remove(ns string) sentence {
	return do(func(t *testing.T) {
		if t.Failed() {
			return // to be looked at
		}
		if err := client.CoreV1().Namespaces().Delete(context.Background(), ns, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
}
