//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/e2e-framework/pkg/env"
	"sigs.k8s.io/e2e-framework/pkg/envconf"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/images"
	"github.com/temper-ml/temper/runners/step/serve/inference"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/store"
)

const (
	namespace = "temper" // of workflows/overlays/kind

	// The registry, by the name that pods use and the one out here.
	registryInside  = "registry.registry.svc.cluster.local:5000"
	registryOutside = "localhost:5001"

	// repository is where the installation in namespace keeps its models.
	repository = registryInside + "/mnist"

	password = signingtest.Password // of all signing keys that are made here
)

// deadline is how long any one thing may take that is waited for: more than
// the slowest workflow on two busy cores.
const deadline = 15 * time.Minute

var (
	testenv env.Environment
	config  *rest.Config
	client  kubernetes.Interface
	keys    string // folder with the key pair of the installation in namespace
)

func TestMain(m *testing.M) {
	testenv = env.NewWithConfig(envconf.New())
	testenv.Setup(func(ctx context.Context, c *envconf.Config) (context.Context, error) {
		return ctx, setup()
	})
	testenv.Finish(func(ctx context.Context, c *envconf.Config) (context.Context, error) {
		return ctx, os.RemoveAll(keys)
	})
	os.Exit(testenv.Run(m))
}

// setup installs Temper as docs/kubernetes.md tells to.
func setup() error {
	var err error
	config, err = clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		return fmt.Errorf("no cluster: %w; run these tests with: go tool task e2e", err)
	}
	config.QPS, config.Burst = 50, 100
	if client, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if keys, err = os.MkdirTemp("", "temper-e2e-*"); err != nil {
		return err
	}
	if err := os.Setenv(sign.PasswordVariable, password); err != nil {
		return err
	}
	if err := keyPair(); err != nil {
		return err
	}
	if _, err := run("", "kubectl", "apply", "--server-side", "--force-conflicts", "-k", "../workflows/controller"); err != nil {
		return err
	}
	// What an earlier run did is to be done again.
	if _, err := run("", "kubectl", "-n", "argo", "patch", "configmap", "memoized-steps", "--type=merge", "-p", `{"data": null}`); err != nil {
		return err
	}
	return install(namespace, "")
}

// keyPair writes the key pair that the cluster has from an earlier run, whose
// models are still there, or else makes one.
func keyPair() error {
	ctx := context.Background()
	secret, err := client.CoreV1().Secrets(namespace).Get(ctx, "signing-key", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return sign.GenerateKeyPair(keys, func(bool) ([]byte, error) { return []byte(password), nil })
	}
	if err != nil {
		return err
	}
	public, err := client.CoreV1().ConfigMaps(namespace).Get(ctx, "trusted-keys", metav1.GetOptions{})
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(keys, sign.PrivateKeyFile), secret.Data[sign.PrivateKeyFile], 0o600),
		os.WriteFile(filepath.Join(keys, sign.PublicKeyFile), []byte(public.Data[sign.PublicKeyFile]), 0o644),
	)
}

// install applies the kustomization for kind to a namespace, with the key pair
// of these tests. More is what else its kustomization.yaml says.
func install(namespace, more string) error {
	if err := kustomize("../workflows/overlays/kind", namespace, more); err != nil {
		return err
	}
	for _, object := range [][]string{
		{"secret", "generic", "signing-key", "--from-file=" + filepath.Join(keys, sign.PrivateKeyFile), "--from-literal=cosign.password=" + password},
		{"configmap", "trusted-keys", "--from-file=" + filepath.Join(keys, sign.PublicKeyFile)},
	} {
		manifest, err := run("", "kubectl", append([]string{"create", "-n", namespace, "--dry-run=client", "-o", "yaml"}, object...)...)
		if err != nil {
			return err
		}
		if err := apply(manifest); err != nil {
			return err
		}
	}
	return nil
}

// kustomize applies a kustomization of this repository to a namespace, with the
// images that were pushed last, by digest.
func kustomize(base, namespace, more string) error {
	dir, err := os.MkdirTemp("", "temper-e2e-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	places, err := os.ReadFile(filepath.Join(base, "images.yaml"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "images.yaml"), places, 0o644); err != nil {
		return err
	}
	if base, err = filepath.Abs(base); err != nil {
		return err
	}
	if base, err = filepath.Rel(dir, base); err != nil {
		return err
	}
	kustomization := fmt.Sprintf("namespace: %s\nresources: [%s]\nconfigurations: [images.yaml]\nimages:\n", namespace, base)
	runners, err := filepath.Glob("../runners/*/main.go")
	if err != nil {
		return err
	}
	for _, main := range runners {
		name := filepath.Base(filepath.Dir(main))
		image := registryInside + "/temper/" + name
		ref, err := store.Resolve(context.Background(), outside(image)+":dev")
		if err != nil {
			return fmt.Errorf("%w; push the images first: go tool task images", err)
		}
		_, digest, _ := strings.Cut(ref, "@")
		for _, known := range []string{image, images.Home + "/" + name} {
			kustomization += fmt.Sprintf("- {name: %q, newName: %q, digest: %q}\n", known, image, digest)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(kustomization+more), 0o644); err != nil {
		return err
	}
	manifests, err := run("", "kubectl", "kustomize", dir)
	if err != nil {
		return err
	}
	return apply(manifests)
}

func apply(manifests string) error {
	_, err := run(manifests, "kubectl", "apply", "--server-side", "--force-conflicts", "-f", "-")
	return err
}

// run runs a command with standard input and returns its standard output.
func run(stdin, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var narration bytes.Buffer
	cmd.Stderr = &narration
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, narration.Bytes())
	}
	return string(out), nil
}

func must(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	out, err := run(stdin, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// poll calls check until it says done, at most for the deadline. What is
// polled has no event to wait for.
func poll(t *testing.T, what string, check func() (done bool, err error)) {
	t.Helper()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	var last error
	for end := time.Now().Add(deadline); time.Now().Before(end); <-tick.C {
		done, err := check()
		if done {
			return
		}
		last = err
	}
	t.Fatalf("gave up waiting for %s: %v", what, last)
}

// workflow is what a test wants to know of one.
type workflow struct {
	Metadata struct{ Name string }
	Status   struct {
		Phase, Message        string
		StartedAt, FinishedAt time.Time
		Outputs               outputs
		Nodes                 map[string]node
	}
}

type node struct {
	ID, DisplayName, TemplateName, Type, Phase, Message string
	TemplateRef                                         struct{ Template string }
	MemoizationStatus                                   struct{ Hit bool }
	Children                                            []string
	Outputs                                             outputs
	StartedAt, FinishedAt                               time.Time
}

// template is the template's name, however it is referred to.
func (n node) template() string { return n.TemplateName + n.TemplateRef.Template }

type outputs struct {
	ExitCode   string
	Parameters []struct{ Name, Value string }
}

func (o outputs) get(name string) string {
	for _, p := range o.Parameters {
		if p.Name == name {
			return p.Value
		}
	}
	return ""
}

// result is an output of the workflow: of its first template.
func (w *workflow) result(name string) string {
	if v := w.Status.Outputs.get(name); v != "" {
		return v
	}
	return w.Status.Nodes[w.Metadata.Name].Outputs.get(name)
}

// pods are the workflow's pods that ran a template.
func (w *workflow) pods(template string) []node {
	var list []node
	for _, n := range w.Status.Nodes {
		if n.Type == "Pod" && n.template() == template && !n.MemoizationStatus.Hit {
			list = append(list, n)
		}
	}
	return list
}

// made is the reference that a step of the workflow put out, remembered from an
// earlier workflow or not.
func (w *workflow) made(t *testing.T, step string) string {
	t.Helper()
	for _, n := range w.Status.Nodes {
		if ref := n.Outputs.get("reference"); n.DisplayName == step && ref != "" {
			return ref
		}
	}
	t.Fatalf("workflow %s has no output of %s", w.Metadata.Name, step)
	return ""
}

// submit starts a workflow from a shipped template, with the stock argo
// command line, and returns its name.
func submit(t *testing.T, namespace, template string, parameters ...string) string {
	t.Helper()
	args := []string{"submit", "-n", namespace, "--from", "workflowtemplate/" + template, "-o", "name"}
	for _, p := range parameters {
		args = append(args, "-p", p)
	}
	return must(t, "", "argo", args...)
}

// finished waits for the end of a workflow, which must be Succeeded.
func finished(t *testing.T, namespace, name string) *workflow {
	t.Helper()
	_, err := run("", "argo", "wait", "-n", namespace, name)
	w := get(t, namespace, name)
	if w.Status.Phase != "Succeeded" {
		for _, n := range w.Status.Nodes {
			if n.Type == "Pod" && n.Phase != "Succeeded" {
				logs, _ := run("", "argo", "logs", "-n", namespace, name, "--no-color", "--tail", "20")
				t.Logf("%s: %s\n%s", n.DisplayName, n.Message, logs)
				break
			}
		}
		tree, _ := run("", "argo", "get", "-n", namespace, name, "--no-color")
		t.Fatalf("workflow %s is %s: %s (%v)\n%s", name, w.Status.Phase, w.Status.Message, err, tree)
	}
	return w
}

func get(t *testing.T, namespace, name string) *workflow {
	t.Helper()
	w := new(workflow)
	if err := json.Unmarshal([]byte(must(t, "", "argo", "get", "-n", namespace, name, "-o", "json")), w); err != nil {
		t.Fatal(err)
	}
	return w
}

// outside is a reference as it is written out here.
func outside(ref string) string { return strings.Replace(ref, registryInside, registryOutside, 1) }

// inside is a reference as pods write it.
func inside(ref string) string { return strings.Replace(ref, registryOutside, registryInside, 1) }

// server asks the model server in a namespace, through the Kubernetes API's
// proxy to the Service.
func server(t *testing.T, namespace string) *inference.Client {
	t.Helper()
	h, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	return &inference.Client{
		URL: config.Host + "/api/v1/namespaces/" + namespace + "/services/serve:8080/proxy", Model: "mnist", HTTP: h,
	}
}

// inService is the digest of the model that answers in a namespace.
func inService(t *testing.T, namespace string) (string, error) {
	t.Helper()
	s := server(t, namespace)
	resp, err := s.HTTP.Get(s.URL + "/v2/models/" + s.Model)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", errors.New(resp.Status)
	}
	var m struct{ Parameters struct{ Digest string } }
	return m.Parameters.Digest, json.NewDecoder(resp.Body).Decode(&m)
}

// waitForModel waits until a model answers in a namespace.
func waitForModel(t *testing.T, namespace, digest string) {
	t.Helper()
	poll(t, "model "+digest+" to be in service", func() (bool, error) {
		now, err := inService(t, namespace)
		if err == nil && now != digest {
			err = fmt.Errorf("in service is %s", now)
		}
		return err == nil, err
	})
}

// digit is the shape of MNIST's images.
var digit = nn.Shape{Height: 28, Width: 28, Channels: 1}

// unique is a word that no other run of the tests has used.
func unique() string { return strings.ToLower(rand.Text()[:8]) }
