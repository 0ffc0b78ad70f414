//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/images"
)

const webhookSecret = "the webhook's secret"

// A push that changes a model runs the pipeline model-commit to its end, once;
// what GitHub did not sign, or what changes no model, runs nothing.
func TestCase08Case09Push(t *testing.T) {
	t.Parallel()
	gitNamespace := "git-" + unique()
	models := registryInside + "/" + gitNamespace + "/mnist" // not those of the model in service
	var commit, uid string
	var good []byte
	testenv.Test(t, features.New("a push event").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			serveGit(t, gitNamespace)
			listen(t)
			patchTemplate(t, "model-commit", fmt.Sprintf(`[{"op": "add", "path": "/spec/resourcetemplates/0/spec/params/-", "value": {"name": "repository", "value": %q}}]`, models))
			return ctx
		}).
		Assess("Given a commit that changes a model, on a git server in the cluster", do(func(t *testing.T) {
			dir := t.TempDir()
			definition, err := os.ReadFile("../models/zoo/wong.yaml")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(filepath.Join(dir, "models/zoo"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "models/zoo/wong.yaml"), definition, 0o644); err != nil {
				t.Fatal(err)
			}
			commit = push(t, gitNamespace, dir)
			good = event(t, gitNamespace, commit, "models/zoo/wong.yaml")
		})).
		Assess("When the commit's own delivery comes, twice", do(func(t *testing.T) {
			uid = starts(t, good, "model-commit-"+commit)
			delivered(t, signed(good), good, http.StatusAccepted)
		})).
		Assess("And deliveries come that GitHub did not sign, or that change no model", do(func(t *testing.T) {
			// The listener answers before it looks who signed, but not what is no JSON.
			forged := func(status int, change func(h http.Header, body []byte) []byte) {
				body := event(t, gitNamespace, hex.EncodeToString(sum(unique()))[:40], "models/zoo/wong.yaml")
				h := signed(body)
				delivered(t, h, change(h, body), status)
			}
			forged(http.StatusAccepted, func(h http.Header, body []byte) []byte { // another secret
				mac := hmac.New(sha256.New, []byte("another secret"))
				mac.Write(body)
				h.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(mac.Sum(nil)))
				return body
			})
			forged(http.StatusAccepted, func(h http.Header, body []byte) []byte { // unsigned
				h.Del("X-Hub-Signature-256")
				return body
			})
			forged(http.StatusAccepted, func(h http.Header, body []byte) []byte { // changed after it was signed
				return bytes.Replace(body, []byte("wong.yaml"), []byte("gnow.yaml"), 1)
			})
			forged(http.StatusAccepted, func(h http.Header, body []byte) []byte { // signed with SHA-1 alone
				h.Del("X-Hub-Signature-256")
				mac := hmac.New(sha1.New, []byte(webhookSecret))
				mac.Write(body)
				h.Set("X-Hub-Signature", "sha1="+hex.EncodeToString(mac.Sum(nil)))
				return body
			})
			forged(http.StatusAccepted, func(h http.Header, body []byte) []byte { // said to be a form
				h.Set("Content-Type", "application/x-www-form-urlencoded")
				return body
			})
			forged(http.StatusBadRequest, func(h http.Header, body []byte) []byte { // a form, signed as JSON
				h.Set("Content-Type", "application/x-www-form-urlencoded")
				return []byte("payload=" + url.QueryEscape(string(body)))
			})
			body := event(t, gitNamespace, hex.EncodeToString(sum(unique()))[:40], "docs/README.md")
			delivered(t, signed(body), body, http.StatusAccepted)
		})).
		Assess("Then model-commit runs to its end, once, and says what was promoted", do(func(t *testing.T) {
			results := resultsOf(t, "model-commit-"+commit)
			if results["CHAINS-GIT_COMMIT"] != commit || results["verdict"] != "promoted" || !strings.HasPrefix(results["MODEL_IMAGE_DIGEST"], "sha256:") {
				t.Errorf("results are %v", results)
			}
			if _, err := name.NewDigest(results["MODEL_IMAGE_URL"] + "@" + results["MODEL_IMAGE_DIGEST"]); err != nil {
				t.Errorf("nothing that Tekton Chains could attest to: %v", err)
			}
			if h := head(t, models); h.Model != results["MODEL_IMAGE_DIGEST"] {
				t.Errorf("the channel names %s", h.Model)
			}
			if made := pipelineRuns(t, gitNamespace); !slices.Equal(made, []string{uid}) {
				t.Errorf("the deliveries made the pipeline runs %v; the commit's was %s", made, uid)
			}
		})).
		Teardown(remove(gitNamespace)).
		Feature())
}

func sum(s string) []byte {
	h := sha256.Sum256([]byte(s))
	return h[:]
}

// event is the body of GitHub's push event, as far as anything reads it.
func event(t *testing.T, gitNamespace, commit, file string) []byte {
	t.Helper()
	body, err := json.Marshal(map[string]any{
		"ref": "refs/heads/main", "before": strings.Repeat("0", 40), "after": commit,
		"repository":  map[string]any{"full_name": "e2e/models", "default_branch": "main", "clone_url": gitURL(gitNamespace)},
		"head_commit": map[string]any{"id": commit},
		"commits":     []any{map[string]any{"id": commit, "added": []string{}, "removed": []string{}, "modified": []string{file}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// signed are the headers of a delivery, as GitHub sends them.
func signed(body []byte) http.Header {
	mac := hmac.New(sha256.New, []byte(webhookSecret))
	mac.Write(body)
	h := http.Header{}
	h.Set("Content-Type", "application/json")
	h.Set("X-GitHub-Event", "push")
	h.Set("X-GitHub-Delivery", unique())
	h.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(mac.Sum(nil)))
	return h
}

// listening installs Tekton's part as docs/kubernetes.md tells to, with kept
// caches: one for all tests. (Caches and sources in two subPaths of one claim would
// pass without the flag, but then Tekton makes an affinity assistant for the last
// of the two workspaces only, and a pod that looks for the other's waits for ever.)
var listening = sync.OnceValue(func() error {
	if _, err := run("", "kubectl", "patch", "-n", "tekton-pipelines", "configmap/feature-flags", "--patch-file", "../tasks/controller/feature-flags.yaml"); err != nil {
		return err
	}
	if _, err := run("", "kubectl", "patch", "-n", "tekton-pipelines", "configmap/feature-flags", "--type=merge", "-p", `{"data": {"coschedule": "pipelineruns"}}`); err != nil {
		return err
	}
	if err := kustomize("../tasks", namespace, ""); err != nil {
		return err
	}
	secret, err := run("", "kubectl", "create", "secret", "generic", "github-webhook", "-n", namespace,
		"--from-literal=secret="+webhookSecret, "--dry-run=client", "-o", "yaml")
	if err != nil {
		return err
	}
	if err := apply(secret); err != nil {
		return err
	}
	_, err = run("", "kubectl", "wait", "-n", namespace, "--for=condition=Ready", "--timeout=5m", "eventlistener/github")
	return err
})

func listen(t *testing.T) {
	t.Helper()
	if err := listening(); err != nil {
		t.Fatal(err)
	}
}

// patchTemplate changes one of the trigger templates, which each are one test's.
func patchTemplate(t *testing.T, name, patch string) {
	t.Helper()
	must(t, "", "kubectl", "patch", "-n", namespace, "triggertemplate/"+name, "--type=json", "-p", patch)
}

// starts delivers an event until there is the pipeline run that comes of it, and
// returns its UID. The listener may not have its routes yet: GitHub tries again
// too.
func starts(t *testing.T, event []byte, name string) (uid string) {
	t.Helper()
	poll(t, "the pipeline run "+name, func() (bool, error) {
		if status := deliver(t, signed(event), event); status != http.StatusAccepted {
			return false, fmt.Errorf("the listener answers %d", status)
		}
		var err error
		uid, err = run("", "kubectl", "get", "-n", namespace, "pipelinerun/"+name, "-o", "jsonpath={.metadata.uid}")
		return err == nil, err
	})
	return uid
}

// resultsOf waits for the end of a pipeline run, which must succeed.
func resultsOf(t *testing.T, name string) map[string]string {
	t.Helper()
	var r struct {
		Status struct {
			Conditions []struct{ Type, Status, Reason, Message string }
			Results    []struct{ Name, Value string }
		}
	}
	poll(t, "the end of "+name, func() (bool, error) {
		out, err := run("", "kubectl", "get", "-n", namespace, "pipelinerun/"+name, "-o", "json")
		if err != nil {
			return false, err
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			return false, err
		}
		for _, c := range r.Status.Conditions {
			if c.Type == "Succeeded" && c.Status == "False" {
				tasks, _ := run("", "kubectl", "get", "-n", namespace, "taskruns", "-l", "tekton.dev/pipelineRun="+name, "-o",
					`jsonpath={range .items[*]}{.metadata.name}: {.status.conditions[*].message}{"\n"}{end}`)
				logs, _ := run("", "kubectl", "logs", "-n", namespace, "-l", "tekton.dev/pipelineRun="+name, "--all-containers", "--prefix", "--tail=20")
				t.Fatalf("%s: %s\n%s\n%s", c.Reason, c.Message, tasks, logs)
			}
			if c.Type == "Succeeded" && c.Status == "True" {
				return true, nil
			}
		}
		return false, fmt.Errorf("%v", r.Status.Conditions)
	})
	results := map[string]string{}
	for _, v := range r.Status.Results {
		results[v.Name] = v.Value
	}
	t.Logf("results: %v", results)
	return results
}

// pipelineRuns are the UIDs of all that are about a git server's repository.
func pipelineRuns(t *testing.T, gitNamespace string) []string {
	t.Helper()
	return strings.Fields(must(t, "", "kubectl", "get", "-n", namespace, "pipelineruns", "-o",
		`jsonpath={.items[?(@.spec.params[0].value=="`+gitURL(gitNamespace)+`")].metadata.uid}`))
}

// delivered is a delivery that the event listener gives an answer to.
func delivered(t *testing.T, h http.Header, body []byte, status int) {
	t.Helper()
	if now := deliver(t, h, body); now != status {
		t.Errorf("the listener answers %d, not %d", now, status)
	}
}

// deliver posts to the event listener's Service and returns the status.
func deliver(t *testing.T, h http.Header, body []byte) int {
	t.Helper()
	c, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, config.Host+"/api/v1/namespaces/"+namespace+"/services/el-github:8080/proxy/", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = h
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func gitURL(ns string) string { return "http://git." + ns + ".svc.cluster.local/models.git" }

// serveGit runs the git server in a namespace.
func serveGit(t *testing.T, ns string) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "gitserver")
	build := exec.Command("go", "build", "-trimpath", "-o", program, "./gitserver")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var ref, narration bytes.Buffer
	if code := step.Run(t.Context(), images.Command(), []string{"--repository", registryOutside + "/e2e", program}, &ref, &narration); code != 0 {
		t.Fatalf("images: exit code %d\n%s", code, &narration)
	}
	image := inside(strings.TrimSpace(ref.String()))
	labels := "{app.kubernetes.io/component: git}"
	if err := apply(fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata: {name: %[1]s}
---
apiVersion: v1
kind: Service
metadata: {name: git, namespace: %[1]s}
spec: {selector: %[3]s, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: git, namespace: %[1]s}
spec:
  selector: {matchLabels: %[3]s}
  template:
    metadata: {labels: %[3]s}
    spec:
      containers:
      - name: git
        image: %[2]s
        command: [/gitserver]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
`, ns, image, labels)); err != nil {
		t.Fatal(err)
	}
	must(t, "", "kubectl", "rollout", "status", "-n", ns, "--timeout=5m", "deployment/git")
}

// push commits the files of a folder to the git server and returns the commit.
func push(t *testing.T, ns, dir string) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	forward := exec.CommandContext(ctx, "kubectl", "port-forward", "-n", ns, "service/git", ":80")
	out, err := forward.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := forward.Start(); err != nil {
		t.Fatal(err)
	}
	defer forward.Wait()
	defer cancel()
	line, err := bufio.NewReader(out).ReadString('\n') // Forwarding from 127.0.0.1:PORT -> 8080
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(line, "127.0.0.1:")
	port, _, _ := strings.Cut(rest, " ")

	git := func(args ...string) string {
		return must(t, "", "git", append([]string{"-C", dir, "-c", "user.name=e2e", "-c", "user.email=e2e@example.com"}, args...)...)
	}
	git("init", "-q", "-b", "main")
	git("add", "--force", ".") // whatever a .gitignore among them says
	git("commit", "-q", "-m", "A change, "+unique())
	// In one request: the server takes no probe of one before a large one.
	git("-c", "http.postBuffer=100M", "push", "-q", "http://127.0.0.1:"+port+"/models.git", "main")
	return git("rev-parse", "HEAD")
}
