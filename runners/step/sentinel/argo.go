package sentinel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	wfv1 "github.com/argoproj/argo-workflows/v3/pkg/apis/workflow/v1alpha1"
	argo "github.com/argoproj/argo-workflows/v3/pkg/client/clientset/versioned/typed/workflow/v1alpha1"
	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/submit"
)

// Argo is a Defence that runs a workflow from a WorkflowTemplate and waits for
// it. The workflow's name is the incident's: however often it is started there
// is one.
type Argo struct {
	Template  string
	Namespace string
	API       argo.ArgoprojV1alpha1Interface
	Step      *step.Step
	Model     string // repository of the model under attack: its reference without the digest
	Channel   string // "" where there is none
}

// verdictRejected is what the workflow's output parameter "verdict" says where
// no candidate passed the gate.
const verdictRejected = "rejected"

// Start implements Defence.
func (a *Argo) Start(ctx context.Context, i Incident) error {
	template, err := a.API.WorkflowTemplates(a.Namespace).Get(ctx, a.Template, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("workflow template %s: %w", a.Template, err)
	}
	// A template declares what it wants to know.
	job := submit.Job{
		Template: a.Template, Name: a.Template + "-" + i.ID, Wait: true,
		Namespace: a.Namespace, API: a.API, Parameters: map[string]string{},
	}
	for name, value := range map[string]string{
		"model": a.Model + "@" + i.Digest, "evidence": i.Kept,
		"repository": a.Model, "channel": strings.TrimPrefix(a.Channel, a.Model+":"),
		// What the attacker chose is for the record: nothing is trained by it.
		"estimate": strconv.FormatFloat(i.Epsilon, 'g', -1, 64), "incident": i.ID,
		"approval": map[bool]string{true: "required", false: "none"}[i.Approval],
	} {
		declared := slices.ContainsFunc(template.Spec.Arguments.Parameters, func(p wfv1.Parameter) bool { return p.Name == name })
		switch {
		case declared && (value != "" && value != "0"): // else the template's default
			job.Parameters[name] = value
		case !declared && name == "approval" && i.Approval:
			return errors.New("a person must approve, and workflow template " + a.Template + ` has no parameter "approval" to be suspended by`)
		}
	}
	noted := map[string]bool{} // also by a sentinel before a restart
	for _, e := range i.Timeline {
		noted[e.Name] = true
	}
	once := func(name, text string) {
		if !noted[name] {
			noted[name] = true
			i.Note(name, text)
		}
	}
	once("workflow", job.Name)
	job.Seen = func(w *wfv1.Workflow) { progress(w, once) }
	var result submit.Result
	run := &cobra.Command{Use: "submit", RunE: func(cmd *cobra.Command, _ []string) error { return job.Run(cmd.Context(), step.From(cmd)) }}
	if err := a.Step.Call(ctx, run, &result, nil); err != nil {
		return err
	}
	if verdict := result.Outputs["verdict"]; strings.TrimSpace(verdict) == verdictRejected {
		return fmt.Errorf("workflow %s: %w", job.Name, ErrRejected)
	}
	once("workflow ended", result.Phase)
	return nil
}

// progress tells what a workflow of the shipped steps has come to: that it
// hardens, what the gate said, and what came of the promotion.
func progress(w *wfv1.Workflow, note func(name, text string)) {
	ended := map[string]map[string]string{} // output parameters by step, of those that succeeded
	for _, n := range w.Status.Nodes {
		if n.TemplateRef == nil {
			continue
		}
		name := n.TemplateRef.Template
		if name == "retrain" && (n.Phase == wfv1.NodeRunning || n.Phase == wfv1.NodeSucceeded) {
			note("retrain", "")
		}
		if n.Phase == wfv1.NodeSucceeded && n.Outputs != nil {
			ended[name] = map[string]string{}
			for _, p := range n.Outputs.Parameters {
				if p.Value != nil {
					ended[name][p.Name] = strings.TrimSpace(p.Value.String())
				}
			}
		}
	}
	switch ended["choose"]["verdict"] {
	case "":
	case "pass":
		note("gate passed", "")
	default:
		note("gate failed", "")
	}
	if verdict := ended["promote"]["verdict"]; verdict != "" {
		note(verdict, ended["promote"]["digest"])
	}
}
