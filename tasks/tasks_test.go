// Package tasks tests the shipped Tekton manifests without a cluster: they are
// decoded strictly, linted, validated by Tekton's own code, and an event goes
// through the real interceptors and templates.
package tasks

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io/fs"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	wfv1 "github.com/argoproj/argo-workflows/v3/pkg/apis/workflow/v1alpha1"
	"github.com/expr-lang/expr"
	"github.com/google/go-containerregistry/pkg/name"
	pipelinev1 "github.com/tektoncd/pipeline/pkg/apis/pipeline/v1"
	triggersv1 "github.com/tektoncd/triggers/pkg/apis/triggers/v1beta1"
	"github.com/tektoncd/triggers/pkg/interceptors/cel"
	"github.com/tektoncd/triggers/pkg/interceptors/github"
	"github.com/tektoncd/triggers/pkg/template"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"knative.dev/pkg/apis"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	"github.com/temper-ml/temper/workflows/lint"
)

// shipped are all manifests below this folder, read strictly.
func shipped(t *testing.T) []lint.Document {
	t.Helper()
	var docs []lint.Document
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".yaml" || filepath.Base(path) == "images.yaml" {
			return err
		}
		found, findings := lint.Read(path)
		for _, f := range findings {
			t.Error(f)
		}
		docs = append(docs, found...)
		return nil
	})
	if err != nil || len(docs) < 20 {
		t.Fatalf("%d manifests, %v", len(docs), err)
	}
	return docs
}

func find[T any](t *testing.T, docs []lint.Document, name string) T {
	t.Helper()
	for _, d := range docs {
		if o, ok := d.Object.(T); ok && d.Name == name {
			return o
		}
	}
	var none T
	t.Fatalf("no %T %s", none, name)
	return none
}

func TestCase05ManifestsDecodeAndValidate(t *testing.T) {
	ctx := context.Background()
	for _, d := range shipped(t) {
		o, ok := d.Object.(interface {
			SetDefaults(context.Context)
			Validate(context.Context) *apis.FieldError
		})
		if !ok {
			continue
		}
		o.SetDefaults(ctx)
		if m := d.Object.(metav1.Object); m.GetName() == "" && m.GetGenerateName() != "" {
			m.SetName(m.GetGenerateName() + "x") // as the API server does
		}
		if err := o.Validate(apis.WithinCreate(ctx)); err != nil {
			t.Errorf("%s: %s %s: %v", d.File, d.Kind, d.Name, err)
		}
	}
	broken := find[*pipelinev1.Task](t, shipped(t), "check-model").DeepCopy()
	broken.Spec.Steps[0].Args = append(broken.Spec.Steps[0].Args, "$(params.absent)")
	if broken.Validate(ctx) == nil {
		t.Error("a parameter that does not exist is valid")
	}
}

func TestCase02Case03Case04Case07ManifestsAreClean(t *testing.T) {
	for _, f := range lint.Check(shipped(t)) {
		t.Error(f)
	}
}

// Every reference in a pipeline leads to a task that takes and gives it.
func TestPipelinesFitTheirTasks(t *testing.T) {
	docs := shipped(t)
	for _, d := range docs {
		p, ok := d.Object.(*pipelinev1.Pipeline)
		if !ok {
			continue
		}
		results := map[string][]string{}
		for _, pt := range p.Spec.Tasks {
			task := find[*pipelinev1.Task](t, docs, pt.TaskRef.Name)
			given := map[string]bool{}
			for _, param := range pt.Params {
				given[param.Name] = true
				if !slices.ContainsFunc(task.Spec.Params, func(s pipelinev1.ParamSpec) bool { return s.Name == param.Name }) {
					t.Errorf("%s: %s gives %s to a task that has no such parameter", d.File, pt.Name, param.Name)
				}
			}
			for _, s := range task.Spec.Params {
				if s.Default == nil && !given[s.Name] {
					t.Errorf("%s: %s does not give %s", d.File, pt.Name, s.Name)
				}
			}
			for _, w := range task.Spec.Workspaces {
				if !slices.ContainsFunc(pt.Workspaces, func(b pipelinev1.WorkspacePipelineTaskBinding) bool { return b.Name == w.Name }) {
					t.Errorf("%s: %s has no workspace %s", d.File, pt.Name, w.Name)
				}
			}
			for _, r := range task.Spec.Results {
				results[pt.Name] = append(results[pt.Name], r.Name)
			}
		}
		text, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range strings.Split(string(text), "$(tasks.")[1:] {
			ref, _, _ := strings.Cut(part, ")")
			task, result, ok := strings.Cut(ref, ".results.")
			if !ok || !slices.Contains(results[task], result) {
				t.Errorf("%s: $(tasks.%s) leads nowhere", d.File, ref)
			}
		}
		for _, name := range []string{"CHAINS-GIT_URL", "CHAINS-GIT_COMMIT"} { // what Tekton Chains looks for
			if !slices.ContainsFunc(p.Spec.Results, func(r pipelinev1.PipelineResult) bool { return r.Name == name }) {
				t.Errorf("%s: no result %s", d.File, name)
			}
		}
	}
}

// Tekton Chains attests to MODEL_IMAGE_URL@MODEL_IMAGE_DIGEST: together, as the
// workflow puts them out, they are one reference; of a rejected model neither is
// anything.
func TestChainsFindsTheModel(t *testing.T) {
	const reference, digest = "registry.registry.svc.cluster.local:5000/mnist", "sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd"
	p := find[*pipelinev1.Pipeline](t, shipped(t), "model-commit")
	output := func(result, verdict string) string {
		t.Helper()
		i := slices.IndexFunc(p.Spec.Results, func(r pipelinev1.PipelineResult) bool { return r.Name == result })
		if i < 0 {
			t.Fatalf("no result %s", result)
		}
		parameter := strings.TrimSuffix(strings.TrimPrefix(p.Spec.Results[i].Value.StringVal, "$(tasks.submit.results."), ")")
		docs, _ := lint.Read("../workflows/base/robustify.yaml")
		release := find[*wfv1.WorkflowTemplate](t, docs, "robustify").GetTemplateByName("release")
		for _, o := range release.Outputs.Parameters {
			if o.Name != parameter {
				continue
			}
			outputs := map[string]string{"reference": reference + "@" + digest, "digest": digest}
			v, err := expr.Eval(o.ValueFrom.Expression, map[string]any{
				"inputs": map[string]any{"parameters": map[string]string{"verdict": verdict}},
				"steps":  map[string]any{"publish": map[string]any{"outputs": map[string]any{"parameters": outputs}}},
			})
			if err != nil {
				t.Fatalf("%s: %v", parameter, err)
			}
			return v.(string)
		}
		t.Fatalf("%s is %s, which robustify does not put out", result, parameter)
		return ""
	}
	for verdict, want := range map[string]string{"pass": reference + "@" + digest, "fail": "@"} {
		got := output("MODEL_IMAGE_URL", verdict) + "@" + output("MODEL_IMAGE_DIGEST", verdict)
		if got != want {
			t.Errorf("%s: %s", verdict, got)
		}
		if _, err := name.NewDigest(got); (err == nil) != (verdict == "pass") {
			t.Errorf("%s: %s: %v", verdict, got, err)
		}
	}
}

// The catalog's form: folder, file, labels and annotations.
func TestCatalog(t *testing.T) {
	files, err := filepath.Glob("*/0.1/*.yaml")
	if err != nil || len(files) != 5 {
		t.Fatalf("%q, %v", files, err)
	}
	docs := shipped(t)
	for _, file := range files {
		name := filepath.Dir(filepath.Dir(file))
		if filepath.Base(file) != name+".yaml" {
			t.Errorf("%s: the file is called after the task", file)
		}
		for _, beside := range []string{"README.md", "samples/run.yaml"} {
			if found, _ := filepath.Glob(filepath.Join(name, "0.1", beside)); len(found) != 1 {
				t.Errorf("%s: no %s", name, beside)
			}
		}
		task := find[*pipelinev1.Task](t, docs, name)
		if task.Labels["app.kubernetes.io/version"] != "0.1" || task.Spec.Description == "" {
			t.Errorf("%s: no version or description", name)
		}
		for _, key := range []string{"pipelines.minVersion", "categories", "tags", "displayName", "platforms"} {
			if task.Annotations["tekton.dev/"+key] == "" {
				t.Errorf("%s: no annotation tekton.dev/%s", name, key)
			}
		}
	}
}

func TestCase05Kustomization(t *testing.T) {
	m, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), ".")
	if err != nil {
		t.Fatalf("kustomize build: %v", err)
	}
	data, err := m.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	docs, findings := lint.Parse(".", data)
	for _, f := range append(findings, lint.Check(docs)...) {
		t.Error(f)
	}
	find[*triggersv1.EventListener](t, docs, "github")
}

const (
	secret = "webhook-secret"
	commit = "0123456789abcdef0123456789abcdef01234567"
)

type secrets struct{}

func (secrets) Get(_ context.Context, _ string, ref *triggersv1.SecretRef) ([]byte, error) {
	if ref.SecretName != "github-webhook" || ref.SecretKey != "secret" {
		return nil, fmt.Errorf("no secret %v", ref)
	}
	return []byte(secret), nil
}

// push is an event as GitHub sends it.
func push(ref, after string, files ...string) []byte {
	body, err := json.Marshal(map[string]any{
		"ref": ref, "after": after, "before": strings.Repeat("0", 40),
		"repository": map[string]any{"full_name": "temper-ml/temper", "default_branch": "main", "clone_url": "https://github.com/temper-ml/temper.git"},
		"commits":    []any{map[string]any{"id": after, "added": []string{}, "removed": []string{}, "modified": files}},
	})
	if err != nil {
		panic(err)
	}
	return body
}

func sign(algorithm func() hash.Hash, key string, body []byte) string {
	m := hmac.New(algorithm, []byte(key))
	m.Write(body)
	return hex.EncodeToString(m.Sum(nil))
}

func signed(body []byte) http.Header {
	h := http.Header{}
	h.Set("Content-Type", "application/json")
	h.Set("X-GitHub-Event", "push")
	h.Set("X-Hub-Signature-256", "sha256="+sign(sha256.New, secret, body))
	return h
}

// deliver sends an event through the interceptors of every trigger of the
// listener, as the EventListener does, and returns what it would create.
func deliver(t *testing.T, docs []lint.Document, body []byte, header http.Header) (made []*pipelinev1.PipelineRun) {
	t.Helper()
	listener := find[*triggersv1.EventListener](t, docs, "github")
	interceptors := map[string]triggersv1.InterceptorInterface{"github": github.NewInterceptor(secrets{}), "cel": cel.NewInterceptor(secrets{})}
triggers:
	for _, trigger := range listener.Spec.Triggers {
		request := &triggersv1.InterceptorRequest{
			Body: string(body), Header: header, Extensions: map[string]any{},
			Context: &triggersv1.TriggerContext{EventID: "1", TriggerID: "namespaces/temper/triggers/" + trigger.Name},
		}
		for _, i := range trigger.Interceptors {
			request.InterceptorParams = map[string]any{}
			for _, p := range i.Params {
				var v any
				if err := json.Unmarshal(p.Value.Raw, &v); err != nil {
					t.Fatal(err)
				}
				request.InterceptorParams[p.Name] = v
			}
			response := interceptors[i.Ref.Name].Process(t.Context(), request)
			if !response.Continue {
				continue triggers
			}
			for k, v := range response.Extensions {
				request.Extensions[k] = v
			}
		}
		resolved, err := template.ResolveTrigger(
			triggersv1.Trigger{Spec: triggersv1.TriggerSpec{Bindings: trigger.Bindings, Template: *trigger.Template}},
			func(name string) (*triggersv1.TriggerBinding, error) {
				return find[*triggersv1.TriggerBinding](t, docs, name), nil
			},
			func(name string) (*triggersv1.ClusterTriggerBinding, error) {
				return nil, fmt.Errorf("cluster trigger binding %s", name)
			},
			func(name string) (*triggersv1.TriggerTemplate, error) {
				return find[*triggersv1.TriggerTemplate](t, docs, name), nil
			},
		)
		if err != nil {
			t.Fatal(err)
		}
		params, err := template.ResolveParams(resolved, body, header, request.Extensions, template.NewTriggerContext("1"))
		if err != nil {
			t.Fatal(err)
		}
		for _, resource := range template.ResolveResources(resolved.TriggerTemplate, params) {
			run := &pipelinev1.PipelineRun{}
			if err := yaml.UnmarshalStrict(resource, run); err != nil {
				t.Fatalf("%v\n%s", err, resource)
			}
			run.SetDefaults(t.Context())
			if err := run.Validate(apis.WithinCreate(t.Context())); err != nil {
				t.Errorf("PipelineRun %s: %v", run.Name, err)
			}
			made = append(made, run)
		}
	}
	return made
}

func TestAPushRunsThePipelinesOfWhatItChanged(t *testing.T) {
	docs := shipped(t)
	for files, want := range map[string]string{
		"models/mine.yaml README.md": "model-commit-" + commit,
		"runners/serve/main.go":      "runner-images-" + commit,
		"go.mod":                     "runner-images-" + commit,
		"models/a.go runners/b.go":   "model-commit-" + commit + " runner-images-" + commit,
		"README.md docs/models/x.md": "",
	} {
		body := push("refs/heads/main", commit, strings.Fields(files)...)
		var names []string
		for _, run := range deliver(t, docs, body, signed(body)) {
			names = append(names, run.Name)
			pipeline := find[*pipelinev1.Pipeline](t, docs, run.Spec.PipelineRef.Name)
			for _, p := range run.Spec.Params {
				if !slices.ContainsFunc(pipeline.Spec.Params, func(s pipelinev1.ParamSpec) bool { return s.Name == p.Name }) {
					t.Errorf("%s: its pipeline has no parameter %s", run.Name, p.Name)
				}
			}
			for _, w := range pipeline.Spec.Workspaces {
				if !slices.ContainsFunc(run.Spec.Workspaces, func(b pipelinev1.WorkspaceBinding) bool { return b.Name == w.Name }) {
					t.Errorf("%s: gives its pipeline no workspace %s", run.Name, w.Name)
				}
			}
			for _, w := range run.Spec.Workspaces {
				if w.VolumeClaimTemplate != nil && run.Annotations["tekton.dev/auto-cleanup-pvc"] != "true" {
					t.Errorf("%s: the claim of %s outlives it", run.Name, w.Name)
				}
			}
			for _, s := range run.Spec.TaskRunSpecs {
				if !slices.ContainsFunc(pipeline.Spec.Tasks, func(task pipelinev1.PipelineTask) bool { return task.Name == s.PipelineTaskName }) {
					t.Errorf("%s: its pipeline has no task %s", run.Name, s.PipelineTaskName)
				}
			}
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s: made %q, want %q", files, got, want)
		}
	}
}

func TestCase08EventsThatNobodySigned(t *testing.T) {
	docs := shipped(t)
	body := push("refs/heads/main", commit, "models/mine.yaml")
	with := func(change func(http.Header)) http.Header {
		h := signed(body)
		change(h)
		return h
	}
	for name, c := range map[string]struct {
		body   []byte
		header http.Header
	}{
		"another secret": {body, with(func(h http.Header) { h.Set("X-Hub-Signature-256", "sha256="+sign(sha256.New, "guess", body)) })},
		"no signature":   {body, with(func(h http.Header) { h.Del("X-Hub-Signature-256") })},
		"empty":          {body, with(func(h http.Header) { h.Set("X-Hub-Signature-256", "") })},
		"SHA-1": {body, with(func(h http.Header) {
			h.Del("X-Hub-Signature-256")
			h.Set("X-Hub-Signature", "sha1="+sign(sha1.New, secret, body))
		})},
		"another body":  {bytes.Replace(body, []byte("temper.git"), []byte("other1.git"), 1), signed(body)},
		"a form":        {body, with(func(h http.Header) { h.Set("Content-Type", "application/x-www-form-urlencoded") })},
		"another event": {body, with(func(h http.Header) { h.Set("X-GitHub-Event", "ping") })},
		"not JSON":      {[]byte("models/"), signed([]byte("models/"))},
	} {
		if made := deliver(t, docs, c.body, c.header); len(made) != 0 {
			t.Errorf("%s: made %s", name, made[0].Name)
		}
	}
	if made := deliver(t, docs, body, signed(body)); len(made) != 1 {
		t.Errorf("the signed event made %d runs", len(made))
	}
}

// Tekton's listener reads whatever it is sent: what bounds it is its memory
// limit, and an ingress. What is not plain JSON runs nothing, signed or not.
func TestCase10GzippedAndOversizeEvents(t *testing.T) {
	docs := shipped(t)
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	z.Write(push("refs/heads/main", commit, "models/mine.yaml"))
	z.Close()
	header := signed(zipped.Bytes())
	header.Set("Content-Encoding", "gzip")
	if made := deliver(t, docs, zipped.Bytes(), header); len(made) != 0 {
		t.Errorf("a gzipped event made %s", made[0].Name)
	}
	listener := find[*triggersv1.EventListener](t, docs, "github")
	var pod struct {
		Spec struct {
			Template struct {
				Spec corev1.PodSpec `json:"spec"`
			} `json:"template"`
		} `json:"spec"`
	}
	data, err := json.Marshal(listener.Spec.Resources.KubernetesResource)
	if err == nil {
		err = json.Unmarshal(data, &pod)
	}
	if c := pod.Spec.Template.Spec.Containers; err != nil || len(c) != 1 || c[0].Resources.Limits.Memory().IsZero() {
		t.Errorf("the listener's memory has no limit: %v", err)
	}
}

func TestEventsThatAreSignedAndOfNoUse(t *testing.T) {
	docs := shipped(t)
	for name, body := range map[string][]byte{
		"another branch":   push("refs/heads/wip", commit, "models/mine.yaml"),
		"a tag":            push("refs/tags/main", commit, "models/mine.yaml"),
		"a deleted branch": push("refs/heads/main", strings.Repeat("0", 40), "models/mine.yaml"),
		"no commit":        push("refs/heads/main", "$(touch /pwn)", "models/mine.yaml"),
		"not there":        push("refs/heads/main", commit, "model/mine.yaml", "x/models/y"),
	} {
		if made := deliver(t, docs, body, signed(body)); len(made) != 0 {
			t.Errorf("%s: made %s", name, made[0].Name)
		}
	}
}

// A delivery that comes again, or one that GitHub sends again with other
// headers, makes an object of the same name: the API server refuses it.
func TestCase09ADeliveryMakesOneName(t *testing.T) {
	docs := shipped(t)
	body := push("refs/heads/main", commit, "models/mine.yaml")
	first := deliver(t, docs, body, signed(body))
	header := signed(body)
	header.Set("X-GitHub-Delivery", "another")
	second := deliver(t, docs, body, header)
	if len(first) != 1 || len(second) != 1 || first[0].Name != second[0].Name || first[0].GenerateName != "" {
		t.Errorf("%v and %v", first, second)
	}
}

// Names of files reach the pipeline as one literal value.
func TestCase01FileNamesAreLiteral(t *testing.T) {
	docs := shipped(t)
	for _, file := range []string{`models/'; touch /pwn #`, `models/$(id)`, "models/a\nb", `models/"}],"x":[{"a":"`, `models/\`} {
		body := push("refs/heads/main", commit, file)
		made := deliver(t, docs, body, signed(body))
		if len(made) != 1 {
			t.Errorf("%q made %d runs", file, len(made))
			continue
		}
		for _, p := range made[0].Spec.Params {
			// $$( is how a manifest writes a literal $(.
			if got := strings.ReplaceAll(p.Value.StringVal, "$$(", "$("); p.Name == "changed" && (got != file || strings.Count(p.Value.StringVal, "$(") != strings.Count(p.Value.StringVal, "$$(")) {
				t.Errorf("%q arrived as %q", file, p.Value.StringVal)
			}
		}
		if made[0].Name != "model-commit-"+commit || made[0].Spec.PipelineRef.Name != "model-commit" {
			t.Errorf("%q changed what runs: %s", file, made[0].Name)
		}
	}
	for _, file := range []string{`models/$(tt.params.url)`, `runners/$(uid)`} { // Triggers' own variables
		body := push("refs/heads/main", commit, file)
		if made := deliver(t, docs, body, signed(body)); len(made) != 0 {
			t.Errorf("%q made %d runs", file, len(made))
		}
	}
}
