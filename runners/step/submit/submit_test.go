package submit

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	wfv1 "github.com/argoproj/argo-workflows/v3/pkg/apis/workflow/v1alpha1"
	"github.com/argoproj/argo-workflows/v3/pkg/client/clientset/versioned"
	"github.com/argoproj/argo-workflows/v3/pkg/client/clientset/versioned/fake"
	"github.com/argoproj/argo-workflows/v3/util/file"
	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/temper-ml/temper/runners/step"
)

const template = `
metadata: {name: tell, namespace: ns}
spec:
  entrypoint: main
  arguments:
    parameters:
    - {name: who, value: nobody}
    - {name: shards, value: "1", enum: ["1", "2"]}
  templates:
  - name: main
    container: {image: tell, command: [/tell], args: ["{{workflow.parameters.who}}"]}
`

// cluster holds the API's objects; the end of a workflow comes from end.
func cluster(t *testing.T) *fake.Clientset {
	t.Helper()
	w := &wfv1.WorkflowTemplate{}
	if err := yaml.UnmarshalStrict([]byte(template), w); err != nil {
		t.Fatal(err)
	}
	return fake.NewSimpleClientset(w)
}

// end gives each workflow that is created a status, as the controller would:
// its outputs are at its first node, and the nodes of a large one compressed.
func end(t *testing.T, c *fake.Clientset, status wfv1.WorkflowStatus) {
	t.Helper()
	workflows := c.ArgoprojV1alpha1().Workflows("ns")
	go func() {
		for t.Context().Err() == nil {
			list, err := workflows.List(t.Context(), metav1.ListOptions{})
			if err != nil {
				return
			}
			for _, w := range list.Items {
				if w.Status.Phase == "" {
					w.Status = wfv1.WorkflowStatus{Phase: wfv1.WorkflowRunning, Progress: "1/2"}
					workflows.Update(t.Context(), &w, metav1.UpdateOptions{})
				} else { // again and again: this API forgets what happened before a watch
					w.Status = status
					nodes := maps.Clone(status.Nodes)
					if nodes == nil {
						nodes = wfv1.Nodes{}
					}
					nodes[w.Name] = wfv1.NodeStatus{ID: w.Name, Type: wfv1.NodeTypeSteps, Phase: wfv1.NodePhase(status.Phase), Outputs: status.Outputs}
					w.Status.Nodes, w.Status.Outputs = nil, nil
					if data, err := json.Marshal(nodes); err == nil {
						w.Status.CompressedNodes = file.CompressEncodeString(string(data))
					}
					workflows.Update(t.Context(), &w, metav1.UpdateOptions{})
				}
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
}

// run submits and returns the exit code, the results' folder and what was told.
func run(ctx context.Context, t *testing.T, c versioned.Interface, j Job) (code int, results, stderr string) {
	t.Helper()
	j.Template, j.Namespace, j.API = "tell", "ns", c.ArgoprojV1alpha1()
	dir := t.TempDir()
	var out, errs bytes.Buffer
	cmd := &cobra.Command{Use: "submit", RunE: func(cmd *cobra.Command, _ []string) error { return j.Run(cmd.Context(), step.From(cmd)) }}
	code = step.Run(ctx, cmd, []string{"--results=" + dir}, &out, &errs)
	return code, dir, errs.String()
}

func result(dir, name string) string {
	data, _ := os.ReadFile(filepath.Join(dir, name))
	return string(data)
}

func outputs(pairs ...string) *wfv1.Outputs {
	o := &wfv1.Outputs{}
	for i := 0; i < len(pairs); i += 2 {
		o.Parameters = append(o.Parameters, wfv1.Parameter{Name: pairs[i], Value: wfv1.AnyStringPtr(pairs[i+1])})
	}
	return o
}

func count(t *testing.T, c *fake.Clientset) int {
	t.Helper()
	list, err := c.ArgoprojV1alpha1().Workflows("ns").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return len(list.Items)
}

func TestOneRequestIsOneWorkflow(t *testing.T) {
	c := cluster(t)
	end(t, c, wfv1.WorkflowStatus{Phase: wfv1.WorkflowSucceeded, Outputs: outputs("verdict", "rejected", "reference", "")})
	hostile := "'; touch /pwn #\n$(id) `id`"
	j := Job{Parameters: map[string]string{"who": hostile}, Wait: true}
	for range 2 {
		code, dir, stderr := run(t.Context(), t, c, j)
		if code != 0 || result(dir, "verdict") != "rejected" || result(dir, "phase") != "Succeeded" {
			t.Fatalf("exit code %d, verdict %q: %s", code, result(dir, "verdict"), stderr)
		}
		if name := result(dir, "workflow"); name != Name("tell", j.Parameters) {
			t.Errorf("workflow %q", name)
		}
	}
	if n := count(t, c); n != 1 {
		t.Errorf("%d workflows after the same request twice", n)
	}
	w, err := c.ArgoprojV1alpha1().Workflows("ns").Get(t.Context(), Name("tell", j.Parameters), metav1.GetOptions{})
	if err != nil || w.Spec.Arguments.Parameters[0].GetValue() != hostile {
		t.Errorf("parameters %+v, %v", w.Spec.Arguments.Parameters, err)
	}
	spec := w.Spec // what templateReferencing: Strict lets through
	spec.Arguments, spec.WorkflowTemplateRef = wfv1.Arguments{}, nil
	if text, _ := yaml.Marshal(spec); strings.TrimSpace(string(text)) != "arguments: {}" {
		t.Errorf("more than a reference and parameters:\n%s", text)
	}
	other := Job{Name: w.Name, Parameters: map[string]string{"who": "somebody"}, Wait: true}
	if code, _, stderr := run(t.Context(), t, c, other); code != step.ExitBadInput || !strings.Contains(stderr, "--name") {
		t.Errorf("the same name for another request: exit code %d, %s", code, stderr)
	}
}

func TestCase11ParametersOutOfTheirEnum(t *testing.T) {
	c := cluster(t)
	for name, value := range map[string]string{"shards": "3", "absent": "1", "who\n": "x"} {
		code, _, stderr := run(t.Context(), t, c, Job{Parameters: map[string]string{name: value}, Wait: true})
		if code != step.ExitBadInput || !strings.Contains(stderr, "shards") {
			t.Errorf("%q=%s: exit code %d, %s", name, value, code, stderr)
		}
	}
	for _, shards := range []string{"", "NaN", "-1", "1e309", "0,9"} {
		if code, _, _ := run(t.Context(), t, c, Job{Parameters: map[string]string{"shards": shards}}); code != step.ExitBadInput {
			t.Errorf("shards %q: exit code %d", shards, code)
		}
	}
	if n := count(t, c); n != 0 {
		t.Errorf("%d workflows were created", n)
	}
}

// Argo would replace a variable in a value.
func TestCase01VariablesAreRefused(t *testing.T) {
	c := cluster(t)
	for _, value := range []string{"{{workflow.name}}", "a{{=1+1}}", `[{"recipe": "\u007b\u007Bworkflow.name}}"}]`} {
		if code, _, stderr := run(t.Context(), t, c, Job{Parameters: map[string]string{"who": value}, Wait: true}); code != step.ExitBadInput || !strings.Contains(stderr, "who") {
			t.Errorf("%s: exit code %d, %s", value, code, stderr)
		}
	}
	if n := count(t, c); n != 0 {
		t.Errorf("%d workflows were created", n)
	}
}

func TestAFailedStepGivesItsExitCode(t *testing.T) {
	at := func(code string) wfv1.Nodes {
		o := &wfv1.Outputs{}
		if code != "" {
			o.ExitCode = &code
		}
		return wfv1.Nodes{
			"first": {Type: wfv1.NodeTypePod, Phase: wfv1.NodeFailed, DisplayName: "first", FinishedAt: metav1.Unix(1, 0), Outputs: &wfv1.Outputs{ExitCode: new("4")}},
			"last":  {Type: wfv1.NodeTypePod, Phase: wfv1.NodeFailed, DisplayName: "promote", FinishedAt: metav1.Unix(2, 0), Outputs: o},
			"main":  {Type: wfv1.NodeTypeSteps, Phase: wfv1.NodeFailed, FinishedAt: metav1.Unix(3, 0)},
		}
	}
	for code, want := range map[string]int{"1": 1, "2": 2, "3": 3, "4": 4, "137": 1, "": 1} {
		c := cluster(t)
		end(t, c, wfv1.WorkflowStatus{Phase: wfv1.WorkflowFailed, Nodes: at(code), Outputs: outputs("verdict", "promoted")})
		got, dir, stderr := run(t.Context(), t, c, Job{Wait: true})
		if got != want || result(dir, "verdict") != "" || !strings.Contains(stderr, "promote") {
			t.Errorf("step's exit code %q: exit code %d, want %d; verdict %q; %s", code, got, want, result(dir, "verdict"), stderr)
		}
	}
}

func TestWaitingIsInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if code, _, stderr := run(ctx, t, cluster(t), Job{Wait: true}); code != step.ExitInterrupted {
		t.Errorf("exit code %d, %s", code, stderr)
	}
}

func TestAnAPIThatDoesNotAnswerIsUnavailable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	c, err := versioned.NewForConfig(&rest.Config{Host: "http://" + l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := run(t.Context(), t, c, Job{Wait: true}); code != step.ExitUnavailable {
		t.Errorf("exit code %d, %s", code, stderr)
	}
}
