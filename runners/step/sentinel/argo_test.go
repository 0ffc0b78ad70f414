package sentinel

import (
	"context"
	"errors"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	wfv1 "github.com/argoproj/argo-workflows/v3/pkg/apis/workflow/v1alpha1"
	"github.com/argoproj/argo-workflows/v3/pkg/client/clientset/versioned/fake"
	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/temper-ml/temper/runners/step"
)

const defendTemplate = `
metadata: {name: defend, namespace: ns}
spec:
  entrypoint: main
  arguments:
    parameters:
    - {name: model}
    - {name: evidence, value: ""}
    - {name: epsilon, value: "0.3"}
    - {name: estimate, value: ""}
    - {name: repository, value: ""}
    - {name: channel, value: ""}
  templates:
  - name: main
    container: {image: defend, command: [/defend], args: ["{{workflow.parameters.model}}"]}
`

// argoDefence is an Argo on a cluster in memory, whose controller ends each
// workflow with a verdict, and with those nodes.
func argoDefence(t *testing.T, verdict string, nodes ...wfv1.Nodes) (*Argo, *fake.Clientset) {
	t.Helper()
	template := &wfv1.WorkflowTemplate{}
	if err := yaml.UnmarshalStrict([]byte(defendTemplate), template); err != nil {
		t.Fatal(err)
	}
	cluster := fake.NewSimpleClientset(template)
	workflows := cluster.ArgoprojV1alpha1().Workflows("ns")
	go func() {
		for t.Context().Err() == nil {
			list, err := workflows.List(t.Context(), metav1.ListOptions{})
			if err != nil {
				return
			}
			for _, w := range list.Items {
				// Again and again: a watch of this cluster, unlike a real one's, tells
				// nothing of what was before it.
				w.Status = wfv1.WorkflowStatus{Phase: wfv1.WorkflowSucceeded, Nodes: wfv1.Nodes{
					w.Name: {Outputs: &wfv1.Outputs{Parameters: []wfv1.Parameter{{Name: "verdict", Value: wfv1.AnyStringPtr(verdict)}}}},
				}}
				for _, n := range nodes {
					maps.Copy(w.Status.Nodes, n)
				}
				workflows.Update(t.Context(), &w, metav1.UpdateOptions{})
			}
			time.Sleep(time.Millisecond)
		}
	}()
	return &Argo{
		Template: "defend", Namespace: "ns", API: cluster.ArgoprojV1alpha1(), Step: step.From(&cobra.Command{}),
		Model: "registry:5000/mnist", Channel: "registry:5000/mnist:production",
	}, cluster
}

// However often a defence is started, there is one workflow, with the
// incident's name and what the template asks for.
func TestArgoIsIdempotent(t *testing.T) {
	a, cluster := argoDefence(t, "promoted")
	i := Incident{ID: "20261122t020000z-abc-1", Digest: "sha256:1", Kept: "registry:5000/mnist@sha256:2", Epsilon: 0.25}
	for range 3 {
		if err := a.Start(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	list, err := cluster.ArgoprojV1alpha1().Workflows("ns").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("%d workflows, error %v", len(list.Items), err)
	}
	w := list.Items[0]
	got := map[string]string{}
	for _, p := range w.Spec.Arguments.Parameters {
		got[p.Name] = p.GetValue()
	}
	want := map[string]string{"model": "registry:5000/mnist@sha256:1", "evidence": i.Kept, "estimate": "0.25", "repository": "registry:5000/mnist", "channel": "production"}
	for name, value := range want {
		if got[name] != value {
			t.Errorf("parameter %s is %q, want %q", name, got[name], value)
		}
	}
	if w.Name != "defend-"+i.ID || w.Spec.WorkflowTemplateRef.Name != "defend" || len(got) != len(want) {
		t.Errorf("workflow %s with %v", w.Name, got)
	}
}

// What depends on the attack, which its author chooses, reaches nothing but the
// channel's record: a faint attack must not lead to a weak model.
func TestCase59AttackChoosesNothingOfTheDefence(t *testing.T) {
	const shipped = "../../../workflows/base/"
	data, err := os.ReadFile(shipped + "defend.yaml")
	if err != nil {
		t.Fatal(err)
	}
	template := &wfv1.WorkflowTemplate{}
	if err := yaml.UnmarshalStrict(data, template); err != nil {
		t.Fatal(err)
	}
	template.Namespace = "ns"
	a, cluster := argoDefence(t, "promoted")
	if _, err := a.API.WorkflowTemplates("ns").Update(t.Context(), template, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	given := map[string]map[string]bool{} // values by parameter
	for _, i := range []Incident{
		{ID: "faint", Digest: "sha256:1", Epsilon: 0.01, Share: 0.01},
		{ID: "strong", Digest: "sha256:1", Epsilon: 0.9, Share: 1, Kept: "registry:5000/mnist@sha256:2"},
	} {
		if err := a.Start(t.Context(), i); err != nil {
			t.Fatal(err)
		}
		w, err := cluster.ArgoprojV1alpha1().Workflows("ns").Get(t.Context(), "defend-"+i.ID, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range template.Spec.Arguments.Parameters {
			value := p.GetValue()
			if q := w.Spec.Arguments.GetParameterByName(p.Name); q != nil {
				value = q.GetValue()
			}
			if given[p.Name] == nil {
				given[p.Name] = map[string]bool{}
			}
			given[p.Name][value] = true
		}
	}
	if len(given["estimate"]) != 2 {
		t.Error("the estimate of epsilon is not reported")
	}
	for _, file := range []string{"defend", "robustify", "evaluate", "promote", "redteam", "steps"} {
		data, err := os.ReadFile(shipped + file + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		for name, values := range given {
			for line := range strings.Lines(string(data)) {
				if len(values) > 1 && strings.Contains(line, "workflow.parameters."+name+"}}") && !strings.Contains(line, "{name: reason,") {
					t.Errorf("%s.yaml: the attack chooses %s", file, strings.TrimSpace(line))
				}
			}
		}
	}
}

// The steps of the defence are on the incident's timeline, each once, also where
// a sentinel that was restarted goes on.
func TestArgoTellsTheTimeline(t *testing.T) {
	node := func(template string, phase wfv1.NodePhase, outputs ...string) wfv1.NodeStatus {
		n := wfv1.NodeStatus{TemplateRef: &wfv1.TemplateRef{Name: "steps", Template: template}, Phase: phase, Outputs: &wfv1.Outputs{}}
		for k := 0; k < len(outputs); k += 2 {
			n.Outputs.Parameters = append(n.Outputs.Parameters, wfv1.Parameter{Name: outputs[k], Value: wfv1.AnyStringPtr(outputs[k+1])})
		}
		return n
	}
	waiting := wfv1.Nodes{"a": node("retrain", wfv1.NodePending), "b": {Phase: wfv1.NodeRunning}}
	training := wfv1.Nodes{"a": node("retrain", wfv1.NodeRunning), "b": node("retrain", wfv1.NodeRunning)}
	chosen := wfv1.Nodes{"a": node("retrain", wfv1.NodeSucceeded), "c": node("choose", wfv1.NodeSucceeded, "verdict", "pass\n")}
	promoting := wfv1.Nodes{"c": chosen["c"], "p": node("promote", wfv1.NodeRunning)}
	promoted := wfv1.Nodes{"a": chosen["a"], "c": chosen["c"], "p": node("promote", wfv1.NodeSucceeded, "verdict", "promoted", "digest", "sha256:2")}
	failed := wfv1.Nodes{"c": node("choose", wfv1.NodeSucceeded, "verdict", "fail")}
	for want, states := range map[string][]wfv1.Nodes{
		"":         {nil, waiting},
		"retrain ": {waiting, training, training},
		"retrain , gate passed , promoted sha256:2": {training, chosen, promoting, promoted, promoted},
		"gate failed ": {failed},
	} {
		var told []string
		once := map[string]bool{}
		for _, nodes := range states {
			progress(&wfv1.Workflow{Status: wfv1.WorkflowStatus{Nodes: nodes}}, func(name, text string) {
				if !once[name] {
					told = append(told, name+" "+text)
				}
				once[name] = true
			})
		}
		if got := strings.Join(told, ", "); got != want {
			t.Errorf("told %q, want %q", got, want)
		}
	}

	a, _ := argoDefence(t, "promoted", promoted)
	i := Incident{ID: "i-1", Digest: "sha256:1"}
	for range 2 {
		i.note = func(name, text string) { i.Timeline = append(i.Timeline, Event{Name: name, Text: text}) }
		if err := a.Start(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	var names []string
	for _, e := range i.Timeline {
		names = append(names, e.Name)
	}
	if got := strings.Join(names, ", "); got != "workflow, retrain, gate passed, promoted, workflow ended" {
		t.Errorf("the timeline is %s", got)
	}
}

func TestArgoSaysWhatCameOfIt(t *testing.T) {
	a, _ := argoDefence(t, "rejected")
	if err := a.Start(t.Context(), Incident{ID: "i-1", Digest: "sha256:1"}); !errors.Is(err, ErrRejected) {
		t.Errorf("a rejected candidate: %v", err)
	}
	// A template that cannot be suspended is not started where a person must approve.
	if err := a.Start(t.Context(), Incident{ID: "i-2", Digest: "sha256:1", Approval: true}); err == nil || !strings.Contains(err.Error(), "approval") {
		t.Errorf("without a person: %v", err)
	}
	a.Template = "absent"
	if err := a.Start(t.Context(), Incident{ID: "i-3", Digest: "sha256:1"}); err == nil || !strings.Contains(err.Error(), "absent") {
		t.Errorf("no template: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a.Template = "defend"
	if err := a.Start(ctx, Incident{ID: "i-4", Digest: "sha256:1"}); err == nil {
		t.Error("a cancelled start is no success")
	}
}
