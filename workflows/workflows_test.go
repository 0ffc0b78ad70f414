// Package workflows tests the shipped manifests without a cluster: they are
// decoded strictly, linted, built by kustomize and validated by Argo's own
// code.
package workflows

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	wfv1 "github.com/argoproj/argo-workflows/v3/pkg/apis/workflow/v1alpha1"
	"github.com/argoproj/argo-workflows/v3/workflow/common"
	"github.com/argoproj/argo-workflows/v3/workflow/validate"
	"github.com/google/cel-go/cel"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"

	"github.com/temper-ml/temper/workflows/lint"
)

var read []lint.Document // by shipped: strict decoding takes a second

// shipped are all manifests below this folder, read strictly.
func shipped(t *testing.T) []lint.Document {
	t.Helper()
	if read != nil {
		return read
	}
	var docs []lint.Document
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && (path == "lint" || path == "observability") {
			return fs.SkipDir
		}
		// Configurations of kustomize itself are held to their form by its builds.
		if filepath.Ext(path) != ".yaml" || filepath.Base(path) == "images.yaml" {
			return nil
		}
		found, findings := lint.Read(path)
		for _, f := range findings {
			t.Error(f)
		}
		docs = append(docs, found...)
		return nil
	})
	if err != nil || len(docs) < 30 {
		t.Fatalf("%d manifests, %v", len(docs), err)
	}
	read = docs
	return docs
}

// templates are those of the base, as Argo looks them up.
type templates map[string]*wfv1.WorkflowTemplate

func (t templates) Get(name string) (*wfv1.WorkflowTemplate, error) {
	if w := t[name]; w != nil {
		return w, nil
	}
	return nil, fmt.Errorf("workflow template %q is not shipped", name)
}

type noClusterTemplates struct{}

func (noClusterTemplates) Get(name string) (*wfv1.ClusterWorkflowTemplate, error) {
	return nil, fmt.Errorf("cluster workflow template %q: none is shipped", name)
}

func all(docs []lint.Document) templates {
	found := templates{}
	for _, d := range docs {
		if w, ok := d.Object.(*wfv1.WorkflowTemplate); ok {
			found[w.Name] = w
		}
	}
	return found
}

func TestCase05ManifestsDecodeAndValidate(t *testing.T) {
	docs := shipped(t)
	known := all(docs)
	for _, name := range []string{"steps", "robustify", "defend", "evaluate", "redteam"} {
		if known[name] == nil {
			t.Errorf("no WorkflowTemplate %s", name)
		}
	}
	for _, d := range docs {
		var err error
		switch o := d.Object.(type) {
		case *wfv1.WorkflowTemplate:
			err = validate.ValidateWorkflowTemplate(known, noClusterTemplates{}, o, nil, validate.ValidateOpts{})
		case *wfv1.CronWorkflow:
			err = validate.ValidateCronWorkflow(context.Background(), known, noClusterTemplates{}, o, nil)
			if o.Spec.Schedule != "" || o.Spec.ConcurrencyPolicy != "Forbid" {
				t.Errorf("%s: CronWorkflow %s: plural schedules (the singular is gone in v4), and Forbid", d.File, o.Name)
			}
		}
		if err != nil {
			t.Errorf("%s: %s %s: %v", d.File, d.Kind, d.Name, err)
		}
	}
	// The validation can fail.
	broken := known["robustify"].DeepCopy()
	broken.Spec.Templates[0].Steps[0].Steps[0].Template = "absent"
	if err := validate.ValidateWorkflowTemplate(known, noClusterTemplates{}, broken, nil, validate.ValidateOpts{}); err == nil {
		t.Error("a step without a template is valid")
	}
	for _, w := range known { // what v4 no longer accepts
		data, err := json.Marshal(w)
		if err != nil {
			t.Fatal(err)
		}
		for _, old := range []string{`"mutex":`, `"semaphore":`, `"schedule":`} {
			if strings.Contains(string(data), old) {
				t.Errorf("WorkflowTemplate %s uses %s: write the plural", w.Name, old)
			}
		}
	}
}

func TestCase02Case03Case04ManifestsAreClean(t *testing.T) {
	for _, f := range lint.Check(shipped(t)) {
		t.Error(f)
	}
}

// cacheKey is what Argo takes for a key of memoized results.
var cacheKey = regexp.MustCompile("^[a-zA-Z0-9][-a-zA-Z0-9]*$")

// Outputs by expression see a template's own inputs and steps only.
func TestExpressionsStayInTheirTemplate(t *testing.T) {
	for _, w := range all(shipped(t)) {
		for _, tmpl := range w.Spec.Templates {
			for _, o := range tmpl.Outputs.Parameters {
				if o.ValueFrom != nil && strings.Contains(o.ValueFrom.Expression, "workflow.") {
					t.Errorf("%s/%s: output %s: Argo does not know the workflow's variables there", w.Name, tmpl.Name, o.Name)
				}
			}
		}
	}
}

// leaves are all templates with a container.
func leaves(known templates) map[string]*wfv1.Template {
	found := map[string]*wfv1.Template{}
	for _, w := range known {
		for i := range w.Spec.Templates {
			if t := &w.Spec.Templates[i]; t.Container != nil {
				found[w.Name+"/"+t.Name] = t
			}
		}
	}
	return found
}

// What is remembered of a step was made of all the same: an input that is not in
// the key would give what was made of another. Only the tag is none of them, which
// says where the result goes. What a name stands for, such as a model of the zoo,
// is in the image: that is in the key too, wherever kustomize has it from.
func TestMemoizedIsWhatWouldBeMade(t *testing.T) {
	for _, folder := range []string{"base", "overlays/kind", "overlays/production", "overlays/kserve"} {
		memoized := 0
		for name, tmpl := range leaves(all(build(t, folder))) {
			if tmpl.Memoize == nil {
				continue
			}
			memoized++
			if p := tmpl.Inputs.GetParameterByName("runner"); p == nil || p.Default == nil || p.Default.String() != tmpl.Container.Image {
				t.Errorf("%s: %s: the runner in its key is not %s: %v", folder, name, tmpl.Container.Image, p)
			}
			key := func(changed string) string {
				var arguments wfv1.Arguments
				for _, p := range tmpl.Inputs.Parameters {
					value := "one"
					if p.Name == changed {
						value = "another"
					}
					arguments.Parameters = append(arguments.Parameters, wfv1.Parameter{Name: p.Name, Value: wfv1.AnyStringPtr(value)})
				}
				got, err := common.ProcessArgs(tmpl, &arguments, globals, common.Parameters{}, false, "temper", nil)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				return got.Memoize.Key
			}
			for _, p := range tmpl.Inputs.Parameters {
				if same := key(p.Name) == key(""); same != (p.Name == "tag") {
					t.Errorf("%s: another %s gives the same key: %v", name, p.Name, same)
				}
			}
		}
		if memoized != 4 {
			t.Errorf("%s: %d steps are memoized", folder, memoized)
		}
	}
}

// admits says whether the shipped admission policy takes a value for a parameter of
// robustify.
func admits(t *testing.T, docs []lint.Document, name, value string) bool {
	t.Helper()
	var params map[string]any
	if data, err := json.Marshal(all(docs)["robustify"]); err != nil {
		t.Fatal(err)
	} else if err := json.Unmarshal(data, &params); err != nil {
		t.Fatal(err)
	}
	object := submitted(name, value)
	policy := admission(t, docs, "temper-workflow-parameters")
	for _, c := range policy.MatchConditions {
		if !holds(t, c.Expression, object, nil, params) {
			t.Fatalf("the admission policy is not asked: %s", c.Name)
		}
	}
	return !slices.ContainsFunc(policy.Validations, func(v admissionv1.Validation) bool {
		return !holds(t, v.Expression, object, nil, params)
	})
}

func admission(t *testing.T, docs []lint.Document, name string) admissionv1.ValidatingAdmissionPolicySpec {
	t.Helper()
	for _, d := range docs {
		if policy, ok := d.Object.(*admissionv1.ValidatingAdmissionPolicy); ok && policy.Name == name {
			return policy.Spec
		}
	}
	t.Fatalf("no admission policy %s", name)
	panic("unreachable")
}

// submitted is a workflow of robustify's with one parameter, as CEL sees it.
func submitted(name, value string) map[string]any {
	return map[string]any{"spec": map[string]any{
		"workflowTemplateRef": map[string]any{"name": "robustify"},
		"arguments":           map[string]any{"parameters": []any{map[string]any{"name": name, "value": value}}},
	}}
}

// holds evaluates an expression of the admission policy; old is nil where the
// workflow is new.
func holds(t *testing.T, expression string, object, old, params map[string]any) bool {
	t.Helper()
	request := map[string]any{"namespace": "temper", "userInfo": map[string]any{"username": "system:serviceaccount:temper:sentinel"}}
	vars := map[string]any{"object": object, "oldObject": nil, "params": params, "request": request}
	if old != nil {
		vars["oldObject"] = old
	}
	env, err := cel.NewEnv(cel.Variable("object", cel.DynType), cel.Variable("oldObject", cel.DynType), cel.Variable("params", cel.DynType), cel.Variable("request", cel.DynType))
	if err != nil {
		t.Fatal(err)
	}
	ast, issues := env.Compile(expression)
	if issues.Err() != nil {
		t.Fatal(issues.Err())
	}
	program, err := env.Program(ast)
	if err != nil {
		t.Fatal(err)
	}
	result, _, err := program.Eval(vars)
	if err != nil {
		t.Fatal(err)
	}
	return result.Value() == true
}

// The controller writes its workflows down all the time; the admission policy looks
// at those whose arguments are other ones now, as argo retry -p makes them.
func TestArgumentsAreAdmittedWhenTheyChange(t *testing.T) {
	policy := admission(t, shipped(t), "temper-workflow-parameters")
	for old, want := range map[string]bool{"1": false, "2": true} {
		asked := true
		for _, c := range policy.MatchConditions {
			asked = asked && holds(t, c.Expression, submitted("shards", "1"), submitted("shards", old), nil)
		}
		if asked != want {
			t.Errorf("shards was %s, is 1: the policy is asked: %v", old, asked)
		}
	}
	if rules := policy.MatchConstraints.ResourceRules; !slices.Equal(rules[0].Operations, []admissionv1.OperationType{"CREATE", "UPDATE"}) {
		t.Errorf("the policy is for %v", rules[0].Operations)
	}
}

// A new workflow brings no templates and no results in its status, where Argo would
// take them for its own.
func TestCase06StatusIsTheControllers(t *testing.T) {
	policy := admission(t, shipped(t), "temper-workflow-status")
	for key, want := range map[string]bool{"": true, "startedAt": true, "storedWorkflowTemplateSpec": false, "storedTemplates": false, "nodes": false} {
		w := submitted("shards", "1")
		if key != "" {
			w["status"] = map[string]any{key: map[string]any{}}
		}
		refused := slices.ContainsFunc(policy.Validations, func(v admissionv1.Validation) bool { return !holds(t, v.Expression, w, nil, nil) })
		if refused == want {
			t.Errorf("status.%s: refused: %v", key, refused)
		}
	}
}

// globals are the workflow's variables, which Argo replaces in every step
// before the step's own.
var globals = common.Parameters{"workflow.name": "evil", "workflow.parameters.repository": "evil", "workflow.failures": `"evil"`}

// TestCase01ParametersArriveAsOneArgument puts hostile values through Argo's
// own substitution into every step: those that the admission policy takes. It
// refuses the rest, which Argo would change.
func TestCase01ParametersArriveAsOneArgument(t *testing.T) {
	docs := shipped(t)
	for _, value := range []string{"{{workflow.name}}", "{{ workflow.name}}", "a{{=1+1}}", "{{inputs.parameters.tag}}", `\u007b\u007Bworkflow.name}}`} {
		if admits(t, docs, "source", value) {
			t.Errorf("the admission policy takes %s", value)
		}
	}
	changed, err := common.ProcessArgs(leaves(all(docs))["steps/train"], &wfv1.Arguments{Parameters: []wfv1.Parameter{
		{Name: "definition", Value: wfv1.AnyStringPtr("{{workflow.name}}")}, {Name: "dataset", Value: wfv1.AnyStringPtr("mnist")},
		{Name: "repository", Value: wfv1.AnyStringPtr("r")}, {Name: "tag", Value: wfv1.AnyStringPtr("t")},
	}}, globals, common.Parameters{}, false, "temper", nil)
	if err != nil || changed.Container.Args[0] != "--network=evil" {
		t.Errorf("Argo replaces nothing here (%v): the test shows nothing", err)
	}
	taken := []string{"'; touch /pwn #", "$(id)", "`id`", "a\nb", "\"}], \"command\": [\"/bin/sh\"]", `\`, "{workflow.name}", "}}", "{"}
	long := strings.Repeat("x", 1<<20)
	for _, value := range append(taken, long) {
		if !admits(t, docs, "source", value) {
			t.Errorf("the admission policy refuses %.80q", value)
		}
	}
	for name, tmpl := range leaves(all(docs)) {
		values := slices.Clone(taken)
		if name == "steps/choose" { // the one that takes lists
			values = append(values, long)
		}
		for _, value := range values {
			var arguments wfv1.Arguments
			values := map[string]string{}
			for _, p := range tmpl.Inputs.Parameters {
				values[p.Name] = value
				if len(value) > 1000 && p.Name != "candidates" {
					values[p.Name] = "x"
				}
				arguments.Parameters = append(arguments.Parameters, wfv1.Parameter{Name: p.Name, Value: wfv1.AnyStringPtr(values[p.Name])})
			}
			got, err := common.ProcessArgs(tmpl, &arguments, globals, common.Parameters{}, false, "temper", nil)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if !slices.Equal(got.Container.Command, tmpl.Container.Command) || got.Container.Image != tmpl.Container.Image || len(got.Container.Args) != len(tmpl.Container.Args) {
				t.Fatalf("%s: %.80q changed what runs: %q, %d arguments", name, value, got.Container.Command, len(got.Container.Args))
			}
			for i, arg := range tmpl.Container.Args {
				want := arg
				for _, p := range tmpl.Inputs.Parameters {
					want = strings.ReplaceAll(want, "{{inputs.parameters."+p.Name+"}}", values[p.Name])
				}
				if got.Container.Args[i] != want {
					t.Errorf("%s: argument %.60q became %.100q, not %.100q", name, arg, got.Container.Args[i], want)
				}
			}
			if got.Memoize != nil && !cacheKey.MatchString(got.Memoize.Key) {
				t.Errorf("%s: %.80q makes the key %.100q, which Argo refuses", name, value, got.Memoize.Key)
			}
			if len(got.Container.Env) != len(tmpl.Container.Env) {
				t.Errorf("%s: %.80q changed the environment", name, value)
			}
		}
	}
}

// An artifact is named by its digest: under a tag it may be another one tomorrow,
// and what was made of the one would be remembered for the other.
func TestArtifactsAreNamedByDigest(t *testing.T) {
	docs := shipped(t)
	const digest = "sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd"
	for value, want := range map[string]bool{
		"":                                     true,
		"wong":                                 true,
		"mnist#" + digest:                      true,
		"registry.example.com/mnist@" + digest: true,
		"registry.example.com/mnist:1@" + digest + "?mean=0.1307&std=0.3081": true,
		"https://example.com/digits#" + digest:                               true,
		"registry.example.com/mnist":                                         false,
		"registry.example.com/mnist:latest":                                  false,
		"registry.example.com/mnist@" + digest[:40]:                          false,
		"registry.example.com/mnist@" + digest + "\n":                        false,
		"registry.example.com/mnist@" + digest + "0":                         false,
		"https://example.com/digits":                                         false,
	} {
		for _, name := range []string{"definition", "model", "dataset", "guard"} {
			if got := admits(t, docs, name, value); got != want {
				t.Errorf("%s=%s: taken: %v", name, value, got)
			}
		}
	}
	if !admits(t, docs, "repository", "registry.example.com/mnist") {
		t.Error("a repository has no digest")
	}
}

// A flag that takes a parameter has the form --flag=VALUE, or stands behind
// "--": a value that begins with a dash is no other flag.
func TestCase01ValuesAreNeverFlags(t *testing.T) {
	for name, tmpl := range leaves(all(shipped(t))) {
		separated := false
		for _, arg := range tmpl.Container.Args {
			if arg == "--" {
				separated = true
			} else if strings.HasPrefix(arg, "{{") && !separated {
				t.Errorf("%s: %s may begin with a dash: write --flag=%s, or put it behind --", name, arg, arg)
			}
		}
	}
}

// A gate that dies or says nothing is never a pass: no verdict has a default,
// and what publishes compares with the word.
func TestCase12NoVerdictIsNoPass(t *testing.T) {
	known := all(shipped(t))
	verdicts := 0
	for _, w := range known {
		for _, tmpl := range w.Spec.Templates {
			for _, o := range tmpl.Outputs.Parameters {
				if o.Name != "verdict" {
					continue
				}
				verdicts++
				if o.ValueFrom == nil || o.ValueFrom.Default != nil || o.Value != nil {
					t.Errorf("%s/%s: the verdict has a default", w.Name, tmpl.Name)
				}
			}
			for _, group := range tmpl.Steps {
				for _, s := range group.Steps {
					if s.ContinueOn != nil {
						t.Errorf("%s/%s/%s: goes on after a failure", w.Name, tmpl.Name, s.Name)
					}
					if s.Template == "publish" && s.When != "{{inputs.parameters.verdict}} == pass" {
						t.Errorf("%s/%s/%s publishes when %q", w.Name, tmpl.Name, s.Name, s.When)
					}
					if s.TemplateRef != nil && s.TemplateRef.Template == "promote" && tmpl.Name != "publish" {
						t.Errorf("%s/%s promotes, and is not publish", w.Name, tmpl.Name)
					}
				}
			}
		}
	}
	if verdicts < 6 {
		t.Errorf("%d verdicts: the test looks at the wrong place", verdicts)
	}
}

// builds are what a user applies.
var builds = []string{"base", "controller", "overlays/kind", "overlays/production", "overlays/kserve"}

var built = map[string][]lint.Document{} // a build takes a second

func build(t *testing.T, folder string) []lint.Document {
	t.Helper()
	if docs := built[folder]; docs != nil {
		return docs
	}
	m, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), folder)
	if err != nil {
		t.Fatalf("kustomize build %s: %v", folder, err)
	}
	data, err := m.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	docs, findings := lint.Parse(folder, data)
	for _, f := range findings {
		t.Error(f)
	}
	built[folder] = docs
	return docs
}

func TestCase05Kustomizations(t *testing.T) {
	for _, folder := range builds {
		docs := build(t, folder)
		known := all(docs)
		for _, w := range known {
			if err := validate.ValidateWorkflowTemplate(known, noClusterTemplates{}, w, nil, validate.ValidateOpts{}); err != nil {
				t.Errorf("%s: WorkflowTemplate %s: %v", folder, w.Name, err)
			}
		}
		if !strings.HasPrefix(folder, "overlays/") {
			continue
		}
		for name, tmpl := range leaves(known) {
			if strings.HasPrefix(tmpl.Container.Image, "ghcr.io/temper-ml/") && !strings.Contains(tmpl.Container.Image, "@sha256:") && !strings.Contains(tmpl.Container.Image, ":v") {
				t.Errorf("%s: %s: image %s was given no place", folder, name, tmpl.Container.Image)
			}
		}
	}
	for _, f := range lint.Check(build(t, "overlays/production")) { // every image by digest
		t.Error(f)
	}
}

// Whatever a pod mounts, runs as or refers to is shipped, or is one of the few
// things that an administrator brings.
func TestReferencesExist(t *testing.T) {
	brought := []string{"Secret/signing-key", "ConfigMap/trusted-keys", "Secret/registry-credentials", "ConfigMap/registry-ca"}
	docs := append(build(t, "overlays/kind"), build(t, "controller")...)
	have := map[string]bool{}
	for _, d := range docs {
		name := d.Name
		if d.Kind == "ConfigMap" {
			name, _, _ = strings.Cut(name, "-"+suffix(name)) // without kustomize's hash
		}
		have[d.Kind+"/"+name] = true
	}
	need := map[string]string{}
	for at, tmpl := range leaves(all(docs)) {
		if tmpl.ServiceAccountName != "" {
			need["ServiceAccount/"+tmpl.ServiceAccountName] = at
		}
		for _, v := range tmpl.Volumes {
			switch {
			case v.Secret != nil:
				need["Secret/"+v.Secret.SecretName] = at
			case v.ConfigMap != nil:
				need["ConfigMap/"+v.ConfigMap.Name] = at
			}
		}
		if tmpl.Memoize != nil {
			need["ConfigMap/"+tmpl.Memoize.Cache.ConfigMap.Name] = at
		}
	}
	for _, d := range docs {
		switch o := d.Object.(type) {
		case *wfv1.WorkflowTemplate:
			if o.Spec.ServiceAccountName != "" {
				need["ServiceAccount/"+o.Spec.ServiceAccountName] = d.Name
				need["Secret/"+o.Spec.Executor.ServiceAccountName+".service-account-token"] = d.Name
			}
		case *rbacv1.RoleBinding:
			need["Role/"+o.RoleRef.Name] = "RoleBinding/" + d.Name
		}
	}
	for what, by := range need {
		if !have[what] && !slices.Contains(brought, what) {
			t.Errorf("%s is used by %s and is nowhere", what, by)
		}
	}
}

// suffix is the last word of a generated name.
func suffix(name string) string {
	i := strings.LastIndexByte(name, '-')
	if last := name[i+1:]; i >= 0 && len(last) == 10 {
		return last
	}
	return "\x00"
}

// Executors write results and nothing else; the server and the steps have no
// right at all, but for promote.
func TestCase04WhoMayDoWhat(t *testing.T) {
	want := map[string][]string{
		"executor": {"create workflowtaskresults", "patch workflowtaskresults"},
		"promoter": {"get configmaps channels", "update configmaps channels"},
		"sentinel": {"create workflows", "get workflows", "get workflowtemplates", "list workflows", "watch workflows"},
		"argo":     {"get configmaps memoized-steps", "update configmaps memoized-steps"},
	}
	kserve := maps.Clone(want)
	kserve["promoter"] = []string{"get configmaps channels", "get deployments mnist-predictor", "get inferenceservices mnist", "patch inferenceservices mnist", "update configmaps channels"}
	for overlay, want := range map[string]map[string][]string{"overlays/kind": want, "overlays/production": want, "overlays/kserve": kserve} {
		docs := append(build(t, overlay), build(t, "controller")...)
		roles := map[string][]string{}
		for _, d := range docs {
			if r, ok := d.Object.(*rbacv1.Role); ok {
				for _, rule := range r.Rules {
					for _, resource := range rule.Resources {
						for _, verb := range rule.Verbs {
							roles[r.Name] = append(roles[r.Name], strings.TrimSpace(verb+" "+resource+" "+strings.Join(rule.ResourceNames, ",")))
						}
					}
				}
				slices.Sort(roles[r.Name])
			}
		}
		rights := map[string][]string{}
		for _, d := range docs {
			if b, ok := d.Object.(*rbacv1.RoleBinding); ok {
				for _, s := range b.Subjects {
					rights[s.Name] = append(rights[s.Name], roles[b.RoleRef.Name]...)
				}
			}
		}
		if !maps.EqualFunc(rights, want, slices.Equal) {
			t.Errorf("%s: rights are %v", overlay, rights)
		}
		for name, tmpl := range leaves(all(docs)) {
			for _, v := range tmpl.Volumes {
				if v.Projected == nil {
					continue
				}
				for _, source := range v.Projected.Sources {
					if source.ServiceAccountToken != nil && (tmpl.Name != "promote" || tmpl.ServiceAccountName != "promoter") {
						t.Errorf("%s: %s holds a token", overlay, name)
					}
				}
			}
		}
	}
}

// Case 6 is held on the cluster; here only that the configuration says so.
func TestCase06StrictReferencing(t *testing.T) {
	data, err := os.ReadFile("controller/workflow-controller-configmap.yaml")
	if err != nil || !strings.Contains(string(data), "templateReferencing: Strict") {
		t.Errorf("the controller's configuration does not say templateReferencing: Strict: %v", err)
	}
}

// The examples are submissions that the templates take, and nothing more:
// Argo's strict referencing refuses any other field.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob("../examples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	known := all(shipped(t))
	for _, file := range files {
		docs, findings := lint.Read(file)
		for _, f := range findings {
			t.Error(f)
		}
		for _, d := range docs {
			w, ok := d.Object.(*wfv1.Workflow)
			if !ok || w.Spec.WorkflowTemplateRef == nil {
				t.Errorf("%s: no Workflow from a template", file)
				continue
			}
			if verdict := w.Annotations["temper/verdict"]; verdict != "promoted" && verdict != "rejected" {
				t.Errorf("%s: annotation temper/verdict is %q", file, verdict)
			}
			rest := w.Spec.DeepCopy()
			rest.WorkflowTemplateRef, rest.Arguments = nil, wfv1.Arguments{}
			if data, _ := json.Marshal(rest); string(data) != `{"arguments":{}}` {
				t.Errorf("%s: more than a template and parameters: %s", file, data)
			}
			w.Name = w.GenerateName + "x"
			if err := validate.ValidateWorkflow(known, noClusterTemplates{}, w, nil, validate.ValidateOpts{Submit: true}); err != nil {
				t.Errorf("%s: %v", file, err)
			}
			has := known[w.Spec.WorkflowTemplateRef.Name].Spec.Arguments
			for _, p := range w.Spec.Arguments.Parameters {
				q := has.GetParameterByName(p.Name)
				if q == nil {
					t.Errorf("%s: the template has no parameter %s", file, p.Name)
				} else if len(q.Enum) > 0 && !slices.Contains(q.Enum, *p.Value) {
					t.Errorf("%s: %s is %s: not in its enum", file, p.Name, p.Value)
				}
			}
		}
	}
}
