// Package submit is the step that runs an Argo Workflow from one of the
// installed WorkflowTemplates, waits for it, and hands on what it came to.
package submit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	wfv1 "github.com/argoproj/argo-workflows/v3/pkg/apis/workflow/v1alpha1"
	argo "github.com/argoproj/argo-workflows/v3/pkg/client/clientset/versioned/typed/workflow/v1alpha1"
	"github.com/argoproj/argo-workflows/v3/workflow/packer"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/kube"
)

// Limits on an API server that does not answer.
const (
	// outage is how long one may last while a workflow is waited for: an
	// upgrade of a control plane with one node takes about that.
	outage = 5 * time.Minute
	// again is the time between two tries.
	again = 2 * time.Second
)

// Result is what the step prints.
type Result struct {
	Workflow string            `json:"workflow"`
	Phase    string            `json:"phase"`
	Outputs  map[string]string `json:"outputs,omitempty"` // the workflow's output parameters
}

// Job is one workflow.
type Job struct {
	Template   string
	Name       string // "" for one made of template and parameters
	Parameters map[string]string
	Wait       bool
	Seen       func(*wfv1.Workflow) // told of each state of it while it is waited for; nil for nobody

	Namespace string
	API       argo.ArgoprojV1alpha1Interface
}

// Run creates the workflow, unless it is there already, waits until it has
// ended, and says what it came to.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	if j.Name == "" {
		j.Name = Name(j.Template, j.Parameters)
	}
	w, err := j.create(ctx, s)
	if err != nil {
		return err
	}
	if j.Wait {
		if w, err = j.wait(ctx, s, w); err != nil {
			return err
		}
	}
	r := Result{Workflow: w.Name, Phase: string(w.Status.Phase), Outputs: map[string]string{}}
	// A workflow's outputs are those of its first node; status.outputs has only
	// what templates export by a globalName.
	if first := w.Status.Nodes[w.Name]; first.Outputs != nil {
		for _, p := range first.Outputs.Parameters {
			if p.Value != nil {
				r.Outputs[p.Name] = p.Value.String()
			}
		}
	}
	results := map[string]string{"workflow": r.Workflow, "phase": r.Phase}
	maps.Copy(results, r.Outputs)
	if err := s.Results(results); err != nil {
		return err
	}
	return s.Print(r.Workflow, r)
}

// Name is a workflow's name that is the same for the same template and
// parameters: the same request twice is one workflow.
func Name(template string, parameters map[string]string) string {
	data, err := json.Marshal(parameters) // sorted by key
	if err != nil {
		panic(err) // strings always encode
	}
	sum := sha256.Sum256(append([]byte(template+"\n"), data...))
	return template + "-" + hex.EncodeToString(sum[:6])
}

// create makes the workflow. One of that name with the same request is taken
// as it is: the step was run before.
func (j *Job) create(ctx context.Context, s *step.Step) (*wfv1.Workflow, error) {
	w := &wfv1.Workflow{
		ObjectMeta: metav1.ObjectMeta{
			Name: j.Name, Namespace: j.Namespace,
			Labels: map[string]string{"app.kubernetes.io/part-of": "temper"},
		},
		Spec: wfv1.WorkflowSpec{WorkflowTemplateRef: &wfv1.WorkflowTemplateRef{Name: j.Template}},
	}
	for _, name := range slices.Sorted(maps.Keys(j.Parameters)) {
		w.Spec.Arguments.Parameters = append(w.Spec.Arguments.Parameters, wfv1.Parameter{Name: name, Value: wfv1.AnyStringPtr(j.Parameters[name])})
	}
	template, err := j.API.WorkflowTemplates(j.Namespace).Get(ctx, j.Template, metav1.GetOptions{})
	if err != nil {
		return nil, kube.Category(fmt.Errorf("workflow template %s: %w", j.Template, err))
	}
	if err := fits(template, j.Parameters); err != nil {
		return nil, step.BadInput(err)
	}
	made, err := j.API.Workflows(j.Namespace).Create(ctx, w, metav1.CreateOptions{})
	switch {
	case err == nil:
		s.Log.Info("submitted", "workflow", made.Name, "template", j.Template)
		return made, nil
	case !apierrors.IsAlreadyExists(err):
		return nil, kube.Category(fmt.Errorf("create workflow %s: %w", j.Name, err))
	}
	there, err := j.API.Workflows(j.Namespace).Get(ctx, j.Name, metav1.GetOptions{})
	if err != nil {
		return nil, kube.Category(fmt.Errorf("workflow %s: %w", j.Name, err))
	}
	if !sameRequest(w, there) {
		return nil, step.BadInput(fmt.Errorf("workflow %s is there with another template or other parameters: choose another --name", j.Name))
	}
	s.Log.Info("submitted before", "workflow", there.Name, "phase", there.Status.Phase)
	return there, nil
}

// variable is how one of Argo's begins, also as JSON may write it: Argo replaces
// it in a parameter's value, too.
var variable = regexp.MustCompile(`\{\{|\\u007[bB]`)

// fits refuses parameters that the template does not have, or not with this
// value, and variables: Argo itself lets all be (the admission policy in
// workflows/ does not).
func fits(t *wfv1.WorkflowTemplate, parameters map[string]string) error {
	known := map[string]wfv1.Parameter{}
	for _, p := range t.Spec.Arguments.Parameters {
		known[p.Name] = p
		if _, given := parameters[p.Name]; !given && p.Value == nil && p.ValueFrom == nil {
			return fmt.Errorf("workflow template %s needs the parameter %s: %s", t.Name, p.Name, p.Description)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(parameters)) {
		p, ok := known[name]
		if !ok {
			return fmt.Errorf("workflow template %s has no parameter %q: it has %s", t.Name, name, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
		if found := variable.FindString(parameters[name]); found != "" {
			return fmt.Errorf("workflow template %s: parameter %s holds %s: a value is taken as it is written, without variables of Argo's", t.Name, name, found)
		}
		if len(p.Enum) == 0 {
			continue
		}
		var may []string
		for _, e := range p.Enum {
			may = append(may, e.String())
		}
		if !slices.Contains(may, parameters[name]) {
			return fmt.Errorf("workflow template %s: parameter %s is %.80q: must be one of %s", t.Name, name, parameters[name], strings.Join(may, ", "))
		}
	}
	return nil
}

func sameRequest(a, b *wfv1.Workflow) bool {
	if b.Spec.WorkflowTemplateRef == nil || a.Spec.WorkflowTemplateRef.Name != b.Spec.WorkflowTemplateRef.Name {
		return false
	}
	values := func(w *wfv1.Workflow) map[string]string {
		m := map[string]string{}
		for _, p := range w.Spec.Arguments.Parameters {
			m[p.Name] = p.GetValue()
		}
		return m
	}
	return maps.Equal(values(a), values(b))
}

// wait follows a workflow to its end. A watch that ends begins anew; an API
// server that does not answer for longer than outage is unavailable.
func (j *Job) wait(ctx context.Context, s *step.Step, w *wfv1.Workflow) (*wfv1.Workflow, error) {
	told := map[string]wfv1.NodePhase{}
	answered := time.Now()
	for {
		if err := packer.DecompressWorkflow(w); err != nil { // Argo compresses the nodes of a large one
			return nil, fmt.Errorf("workflow %s: %w", w.Name, err)
		}
		tell(s, w, told)
		if j.Seen != nil {
			j.Seen(w)
		}
		if w.Status.Fulfilled() {
			return w, ended(w)
		}
		next, err := j.change(ctx, w)
		switch {
		case ctx.Err() != nil:
			return nil, step.Interrupted(fmt.Errorf("workflow %s goes on without being waited for: run this again", j.Name))
		case err == nil:
			w, answered = next, time.Now()
			continue
		case !kube.Unavailable(err):
			return nil, kube.Category(fmt.Errorf("workflow %s: %w", j.Name, err))
		case time.Since(answered) > outage:
			return nil, step.Unavailable(fmt.Errorf("workflow %s: %w", j.Name, err))
		}
		s.Log.Warn("the Kubernetes API does not answer: trying again", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(again):
		}
	}
}

// quiet is how long a watch may say nothing before the workflow is read: its connection
// can have died without a word.
const quiet = 30 * time.Second

// change waits for another version of the workflow than w. Where a watch ended
// without one, or said nothing for long, it returns what is there now.
func (j *Job) change(ctx context.Context, w *wfv1.Workflow) (*wfv1.Workflow, error) {
	watch, err := j.API.Workflows(j.Namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("metadata.name", j.Name).String(), ResourceVersion: w.ResourceVersion,
	})
	if err == nil {
		defer watch.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(quiet):
				return j.read(ctx, w)
			case e, open := <-watch.ResultChan():
				next, ok := e.Object.(*wfv1.Workflow)
				if !open || !ok { // such as a version that is too old: read it again
					return j.read(ctx, w)
				}
				if e.Type == "DELETED" && next.UID == w.UID {
					return nil, errors.New("it was deleted while it ran")
				}
				if next.Name == j.Name && next.UID == w.UID {
					return next, nil
				}
			}
		}
	}
	if !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		return nil, err
	}
	return j.read(ctx, w)
}

// read returns what is there of w now.
func (j *Job) read(ctx context.Context, w *wfv1.Workflow) (*wfv1.Workflow, error) {
	next, err := j.API.Workflows(j.Namespace).Get(ctx, j.Name, metav1.GetOptions{})
	if err == nil && next.UID != w.UID {
		return nil, errors.New("it was deleted while it ran, and another has its name")
	}
	return next, err
}

// tell narrates what changed since told.
func tell(s *step.Step, w *wfv1.Workflow, told map[string]wfv1.NodePhase) {
	for _, id := range slices.Sorted(maps.Keys(w.Status.Nodes)) {
		n := w.Status.Nodes[id]
		if n.Type != wfv1.NodeTypePod && n.Type != wfv1.NodeTypeSkipped && n.Type != wfv1.NodeTypeSuspend || told[id] == n.Phase {
			continue
		}
		told[id] = n.Phase
		s.Log.Info("step", "name", n.DisplayName, "phase", n.Phase, "message", n.Message)
	}
	if n, m, ok := strings.Cut(string(w.Status.Progress), "/"); ok {
		done, err1 := strconv.Atoi(n)
		total, err2 := strconv.Atoi(m)
		if err1 == nil && err2 == nil && total > 0 {
			s.Progress(done, total)
		}
	}
}

// ended is the error of a workflow that did not succeed, with the category of
// the step that failed last.
func ended(w *wfv1.Workflow) error {
	if w.Status.Successful() {
		return nil
	}
	err := fmt.Errorf("workflow %s: %s: %s", w.Name, w.Status.Phase, w.Status.Message)
	var last *wfv1.NodeStatus
	for _, n := range w.Status.Nodes {
		if n.Type == wfv1.NodeTypePod && n.FailedOrError() && (last == nil || last.FinishedAt.Before(&n.FinishedAt)) {
			last = &n
		}
	}
	if last == nil {
		return err
	}
	err = fmt.Errorf("%w: step %s: %s", err, last.DisplayName, last.Message)
	if last.Outputs == nil || last.Outputs.ExitCode == nil {
		return err
	}
	switch *last.Outputs.ExitCode {
	case strconv.Itoa(step.ExitBadInput):
		return step.BadInput(err)
	case strconv.Itoa(step.ExitRefused):
		return step.Refused(err)
	case strconv.Itoa(step.ExitUnavailable):
		return step.Unavailable(err)
	}
	return err
}
