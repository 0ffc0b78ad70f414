// Package lint reads Kubernetes manifests as an attacker would: it decodes them
// strictly and names, by file and line, what must not be in them. There is no
// cluster in it.
package lint

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	wfv1 "github.com/argoproj/argo-workflows/v3/pkg/apis/workflow/v1alpha1"
	pipelinev1 "github.com/tektoncd/pipeline/pkg/apis/pipeline/v1"
	triggersv1 "github.com/tektoncd/triggers/pkg/apis/triggers/v1beta1"
	yamlv3 "go.yaml.in/yaml/v3"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	kustomize "sigs.k8s.io/kustomize/api/types"
	"sigs.k8s.io/yaml"
)

// Finding is something that must not be.
type Finding struct {
	File string
	Line int
	Rule string // its name in the fixtures' folders
	Text string
}

func (f Finding) String() string { return fmt.Sprintf("%s:%d: %s: %s", f.File, f.Line, f.Rule, f.Text) }

// Document is one YAML document.
type Document struct {
	File   string
	Node   *yamlv3.Node // its mapping
	Kind   string
	Name   string
	Object any // decoded strictly into the kind's Go type; nil where that failed
}

// kinds are all that may be shipped: what is not here cannot be checked.
var kinds = map[string]func() any{
	"argoproj.io/v1alpha1/WorkflowTemplate": func() any { return new(wfv1.WorkflowTemplate) },
	"argoproj.io/v1alpha1/CronWorkflow":     func() any { return new(wfv1.CronWorkflow) },
	"argoproj.io/v1alpha1/Workflow":         func() any { return new(wfv1.Workflow) },

	"tekton.dev/v1/Task":        func() any { return new(pipelinev1.Task) },
	"tekton.dev/v1/TaskRun":     func() any { return new(pipelinev1.TaskRun) },
	"tekton.dev/v1/Pipeline":    func() any { return new(pipelinev1.Pipeline) },
	"tekton.dev/v1/PipelineRun": func() any { return new(pipelinev1.PipelineRun) },

	"triggers.tekton.dev/v1beta1/EventListener":   func() any { return new(triggersv1.EventListener) },
	"triggers.tekton.dev/v1beta1/TriggerBinding":  func() any { return new(triggersv1.TriggerBinding) },
	"triggers.tekton.dev/v1beta1/TriggerTemplate": func() any { return new(triggersv1.TriggerTemplate) },

	"v1/Namespace":             func() any { return new(corev1.Namespace) },
	"v1/ServiceAccount":        func() any { return new(corev1.ServiceAccount) },
	"v1/Secret":                func() any { return new(corev1.Secret) },
	"v1/ConfigMap":             func() any { return new(corev1.ConfigMap) },
	"v1/Service":               func() any { return new(corev1.Service) },
	"v1/PersistentVolumeClaim": func() any { return new(corev1.PersistentVolumeClaim) },
	"apps/v1/Deployment":       func() any { return new(appsv1.Deployment) },

	"networking.k8s.io/v1/NetworkPolicy":                               func() any { return new(networkingv1.NetworkPolicy) },
	"rbac.authorization.k8s.io/v1/Role":                                func() any { return new(rbacv1.Role) },
	"rbac.authorization.k8s.io/v1/RoleBinding":                         func() any { return new(rbacv1.RoleBinding) },
	"rbac.authorization.k8s.io/v1/ClusterRole":                         func() any { return new(rbacv1.ClusterRole) },
	"rbac.authorization.k8s.io/v1/ClusterRoleBinding":                  func() any { return new(rbacv1.ClusterRoleBinding) },
	"admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy":        func() any { return new(admissionv1.ValidatingAdmissionPolicy) },
	"admissionregistration.k8s.io/v1/ValidatingAdmissionPolicyBinding": func() any { return new(admissionv1.ValidatingAdmissionPolicyBinding) },

	"serving.kserve.io/v1beta1/InferenceService": func() any { return new(InferenceService) },

	"kustomize.config.k8s.io/v1beta1/Kustomization": func() any { return new(kustomize.Kustomization) },
}

// Read splits a file into documents and decodes each into its kind. What is
// unknown, a field or a kind, is a finding.
func Read(file string) ([]Document, []Finding) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, []Finding{{file, 0, "decode", err.Error()}}
	}
	return Parse(file, data)
}

// Parse is Read for a file's content.
func Parse(file string, data []byte) (docs []Document, findings []Finding) {
	decoder := yamlv3.NewDecoder(bytes.NewReader(data))
	for {
		var root yamlv3.Node
		if err := decoder.Decode(&root); errors.Is(err, io.EOF) {
			return docs, findings
		} else if err != nil {
			return docs, append(findings, Finding{file, 0, "decode", err.Error()})
		}
		d := Document{File: file, Node: root.Content[0]}
		version, kind := text(d.Node, "apiVersion"), text(d.Node, "kind")
		d.Kind, d.Name = kind, text(d.Node, "metadata", "name")
		into, ok := kinds[version+"/"+kind]
		if !ok {
			findings = append(findings, Finding{file, d.Node.Line, "decode", fmt.Sprintf("kind %s/%s is not known to this check", version, kind)})
			docs = append(docs, d)
			continue
		}
		object := into()
		one, err := yamlv3.Marshal(d.Node)
		if err == nil {
			err = yaml.UnmarshalStrict(one, object)
		}
		if err != nil {
			findings = append(findings, Finding{file, d.Node.Line, "decode", err.Error()})
		} else {
			d.Object = object
		}
		docs = append(docs, d)
	}
}

// Check applies every rule to documents.
func Check(docs []Document) (findings []Finding) {
	for _, d := range docs {
		l := &linter{doc: d}
		walk(d.Node, nil, l.shell)
		walk(d.Node, nil, l.containers)
		l.pods()
		l.rights()
		l.keys()
		l.signatures()
		l.parameters()
		findings = append(findings, l.findings...)
	}
	return findings
}

type linter struct {
	doc      Document
	findings []Finding
}

func (l *linter) add(n *yamlv3.Node, rule, format string, args ...any) {
	l.findings = append(l.findings, Finding{l.doc.File, n.Line, rule, fmt.Sprintf(format, args...)})
}

// shells are programs that read commands from their arguments.
var shells = []string{"sh", "bash", "ash", "dash", "zsh", "ksh", "busybox", "python", "python3", "perl", "node", "env", "xargs", "eval"}

// variable is what Argo or Tekton replaces.
var variable = regexp.MustCompile(`\{\{.*\}\}|\$\(.*\)`)

// shell refuses (case 2) every place where text becomes a program: a parameter
// in it would too.
func (l *linter) shell(n *yamlv3.Node, _ []string) {
	for _, key := range []string{"script", "source"} {
		if v := child(n, key); v != nil && (l.doc.Kind != "Kustomization") {
			body := v
			if v.Kind == yamlv3.MappingNode { // Argo's script template is a container with a source
				if body = child(v, "source"); body == nil {
					continue
				}
			}
			if body.Kind != yamlv3.ScalarNode {
				continue
			}
			if variable.MatchString(body.Value) {
				l.add(body, "shell", "a parameter inside %s becomes a part of the program: pass it in args or env", key)
			} else if key == "script" {
				l.add(body, "shell", "%s: there is no shell in any image: use command and args", key)
			}
		}
	}
	command, args := child(n, "command"), child(n, "args")
	words := append(items(command), items(args)...)
	if len(words) == 0 {
		return
	}
	if command != nil && slices.Contains(shells, path.Base(words[0])) {
		l.add(command, "shell", "%s reads a program from its arguments: name the program itself", words[0])
	}
	if i := slices.Index(words, "-c"); i >= 0 && i+1 < len(words) && variable.MatchString(words[i+1]) {
		l.add(n, "shell", "a parameter behind -c becomes a part of a program")
	}
	if command != nil && variable.MatchString(strings.Join(items(command), " ")) {
		l.add(command, "shell", "a parameter in command chooses the program: put it in args")
	}
}

// imageName is one of the project's images, which a kustomization gives a
// place and digest.
var imageName = regexp.MustCompile(`^ghcr\.io/temper-ml/[a-z]+$`)

// containers checks each container (case 3).
func (l *linter) containers(n *yamlv3.Node, at []string) {
	if !container(n, at) {
		return
	}
	image := text(n, "image")
	if !imageName.MatchString(image) && !variable.MatchString(image) && !strings.Contains(image, "@sha256:") {
		l.add(n, "container", "image %q is neither a parameter nor named by digest", image)
	}
	if child(n, "command") == nil {
		l.add(n, "container", "no command: Argo and Tekton would ask the registry for it")
	}
	security := child(n, "securityContext")
	for _, want := range []struct{ key, value string }{{"runAsNonRoot", "true"}, {"readOnlyRootFilesystem", "true"}, {"allowPrivilegeEscalation", "false"}} {
		if text(security, want.key) != want.value {
			l.add(n, "container", "securityContext.%s is not %s", want.key, want.value)
		}
	}
	if !slices.Equal(items(child(security, "capabilities", "drop")), []string{"ALL"}) || child(security, "capabilities", "add") != nil {
		l.add(n, "container", "securityContext.capabilities does not drop ALL")
	}
	if p := text(security, "privileged"); p == "true" {
		l.add(n, "container", "it is privileged")
	}
	resources := child(n, "resources")
	if resources == nil {
		resources = child(n, "computeResources")
	}
	if child(resources, "limits", "memory") == nil || child(resources, "requests", "cpu") == nil {
		l.add(n, "container", "no limit of memory, or no request of CPU")
	}
}

// container tells a container's mapping from others by where it is.
func container(n *yamlv3.Node, at []string) bool {
	if n.Kind != yamlv3.MappingNode || len(at) == 0 || child(n, "image") == nil {
		return false
	}
	switch at[len(at)-1] {
	case "container", "script":
		return true
	case "[]":
		return len(at) > 1 && slices.Contains([]string{"containers", "initContainers", "sidecars", "steps"}, at[len(at)-2])
	}
	return false
}

// tokens are the workloads that talk to the Kubernetes API by themselves.
var tokens = []string{"sentinel"}

// pods checks what a pod may use (case 3): an account of its own, a token only
// where it is needed, nothing of the host, a deadline.
func (l *linter) pods() {
	spec := child(l.doc.Node, "spec")
	switch l.doc.Kind {
	case "WorkflowTemplate", "Workflow":
		if child(spec, "entrypoint") != nil {
			if account := text(spec, "serviceAccountName"); account == "" || account == "default" {
				l.add(spec, "pod", "no serviceAccountName of its own")
			}
			if text(spec, "automountServiceAccountToken") != "false" || text(spec, "executor", "serviceAccountName") == "" {
				l.add(spec, "pod", "its steps get a token: automountServiceAccountToken: false, and an executor.serviceAccountName")
			}
			if child(spec, "activeDeadlineSeconds") == nil {
				l.add(spec, "pod", "no activeDeadlineSeconds")
			}
			for _, key := range []string{"podGC", "ttlStrategy"} {
				if child(spec, key) == nil {
					l.add(spec, "pod", "no %s: what has ended is never cleaned up", key)
				}
			}
		}
		if templates := child(spec, "templates"); templates != nil {
			for _, t := range templates.Content {
				if child(t, "container") == nil {
					continue
				}
				for _, key := range []string{"activeDeadlineSeconds", "retryStrategy"} {
					if child(t, key) == nil {
						l.add(t, "pod", "template %s has no %s", text(t, "name"), key)
					}
				}
				if retry := text(t, "retryStrategy", "expression"); retry != "" && !strings.Contains(retry, "not in [2, 3]") {
					l.add(t, "pod", "template %s tries bad input and refusals again", text(t, "name"))
				}
				if longest := child(t, "retryStrategy", "backoff", "maxDuration"); longest != nil {
					l.add(longest, "pod", "maxDuration counts from the start of the first try: a step that takes longer is never tried again")
				}
			}
		}
	case "Deployment":
		pod := child(spec, "template", "spec")
		if account := text(pod, "serviceAccountName"); account == "" || account == "default" {
			l.add(pod, "pod", "no serviceAccountName of its own")
		}
		if text(pod, "automountServiceAccountToken") != "false" && !slices.Contains(tokens, l.doc.Name) {
			l.add(pod, "pod", "it gets a token: automountServiceAccountToken: false")
		}
	case "Pipeline":
		if tasks := child(spec, "tasks"); tasks != nil {
			for _, t := range tasks.Content {
				if child(t, "timeout") == nil {
					l.add(t, "pod", "task %s has no timeout", text(t, "name"))
				}
			}
		}
	}
	walk(l.doc.Node, nil, func(n *yamlv3.Node, _ []string) {
		for _, key := range []string{"hostNetwork", "hostPID", "hostIPC", "hostPath", "podSpecPatch"} {
			if v := child(n, key); v != nil && v.Value != "false" {
				l.add(v, "pod", "%s opens the node to the pod", key)
			}
		}
	})
}

// rights refuses wildcards and more than is known to be needed (case 4).
func (l *linter) rights() {
	if l.doc.Kind != "Role" && l.doc.Kind != "ClusterRole" {
		return
	}
	walk(child(l.doc.Node, "rules"), nil, func(n *yamlv3.Node, at []string) {
		if n.Kind == yamlv3.ScalarNode && strings.Contains(n.Value, "*") {
			l.add(n, "rights", "a wildcard: list what is needed")
		}
		if n.Kind == yamlv3.ScalarNode && slices.Contains([]string{"secrets", "pods/exec", "impersonate", "escalate", "bind", "serviceaccounts/token"}, n.Value) {
			l.add(n, "rights", "%s is more than anything here needs", n.Value)
		}
	})
}

// signers are the programs that use the private key: the last part of an
// image's name.
var signers = regexp.MustCompile(`/temper(-ml)?/(sign|promote|images)(:|@|$)`)

// keys refuses the signing key anywhere but in a pod that signs (case 4).
func (l *linter) keys() {
	mentions := func(n *yamlv3.Node) *yamlv3.Node {
		var found *yamlv3.Node
		walk(n, nil, func(v *yamlv3.Node, at []string) {
			in := len(at) > 0 && slices.Contains([]string{"secretName", "name"}, at[len(at)-1])
			if v.Kind == yamlv3.ScalarNode && in && (v.Value == "signing-key" || v.Value == "$(params.key-secret)") && slices.Contains(at, "secret") || v.Kind == yamlv3.ScalarNode && slices.Contains(at, "secretKeyRef") && (v.Value == "signing-key" || v.Value == "$(params.key-secret)") {
				found = v
			}
		})
		return found
	}
	pods := []*yamlv3.Node{l.doc.Node}
	if templates := child(l.doc.Node, "spec", "templates"); templates != nil {
		pods = templates.Content
		for _, key := range []string{"volumes"} { // of a workflow: every pod would get them
			if n := mentions(child(l.doc.Node, "spec", key)); n != nil {
				l.add(n, "keys", "every step gets the signing key: mount it in the template that signs")
			}
		}
	}
	for _, p := range pods {
		n := mentions(p)
		if n == nil {
			continue
		}
		signs := false
		walk(p, nil, func(c *yamlv3.Node, at []string) {
			signs = signs || container(c, at) && signers.MatchString(text(c, "image"))
		})
		if !signs {
			l.add(n, "keys", "the signing key in a pod that signs nothing")
		}
	}
}

// signatures refuses (case 7) a trigger that would take an event from anybody.
func (l *linter) signatures() {
	if l.doc.Kind != "EventListener" {
		return
	}
	spec := child(l.doc.Node, "spec")
	if groups := child(spec, "triggerGroups"); groups != nil {
		l.add(groups, "signatures", "triggerGroups are not checked: use triggers")
	}
	triggers := child(spec, "triggers")
	if triggers == nil {
		l.add(l.doc.Node, "signatures", "no triggers")
		return
	}
	for _, t := range triggers.Content {
		interceptors := child(t, "interceptors")
		if interceptors == nil || len(interceptors.Content) == 0 || text(interceptors.Content[0], "ref", "name") != "github" {
			l.add(t, "signatures", "the first interceptor is not github: nothing is verified")
			continue
		}
		secret, events := false, false
		if params := child(interceptors.Content[0], "params"); params != nil {
			for _, p := range params.Content {
				switch text(p, "name") {
				case "secretRef":
					secret = text(p, "value", "secretName") != "" && text(p, "value", "secretKey") != ""
				case "eventTypes":
					events = slices.Equal(items(child(p, "value")), []string{"push"})
				}
			}
		}
		if !secret {
			l.add(interceptors.Content[0], "signatures", "no secretRef: the github interceptor then verifies nothing")
		}
		if !events {
			l.add(interceptors.Content[0], "signatures", "eventTypes is not [push]")
		}
	}
}

// required are the parameters of a workflow that have no default: nothing could
// stand for them.
var required = []string{"model"}

// parameters asks that a person can understand each one from its description,
// and has to give as few as can be.
func (l *linter) parameters() {
	spec := child(l.doc.Node, "spec")
	switch l.doc.Kind {
	case "WorkflowTemplate":
		l.parameterList(child(spec, "arguments", "parameters"), "value")
		if templates := child(spec, "templates"); templates != nil {
			for _, t := range templates.Content {
				l.parameterList(child(t, "inputs", "parameters"), "default")
			}
		}
		if list := child(spec, "arguments", "parameters"); list != nil {
			for _, p := range list.Content {
				if name := text(p, "name"); child(p, "value") == nil && !slices.Contains(required, name) {
					l.add(p, "parameters", "parameter %s has no default", name)
				}
			}
		}
	case "Task", "Pipeline", "TriggerTemplate":
		l.parameterList(child(spec, "params"), "default")
	}
}

func (l *linter) parameterList(list *yamlv3.Node, key string) {
	if list == nil {
		return
	}
	for _, p := range list.Content {
		name, value := text(p, "name"), text(p, key)
		if len(text(p, "description")) < 5 {
			l.add(p, "parameters", "parameter %s has no description", name)
		}
		if enum := items(child(p, "enum")); enum != nil && child(p, key) != nil && !slices.Contains(enum, value) {
			l.add(p, "parameters", "the default of %s is not in its enum", name)
		}
		if strings.HasSuffix(name, "image") && value != "" && !strings.Contains(value, "@sha256:") {
			l.add(p, "parameters", "the default of %s, %s, is not named by digest", name, value)
		}
	}
}

// Bounds on a document: an alias may lead back to itself, or multiply.
const (
	maxDepth  = 100
	maxVisits = 100_000
)

// walk visits a node and all below it, with the keys that lead there; the
// members of a list have the key "[]".
func walk(n *yamlv3.Node, at []string, visit func(*yamlv3.Node, []string)) {
	visits := 0
	var step func(*yamlv3.Node, []string)
	step = func(n *yamlv3.Node, at []string) {
		if visits++; n == nil || visits > maxVisits || len(at) > maxDepth {
			return
		}
		if n.Kind == yamlv3.AliasNode {
			n = n.Alias
		}
		visit(n, at)
		switch n.Kind {
		case yamlv3.MappingNode:
			for i := 0; i+1 < len(n.Content); i += 2 {
				step(n.Content[i+1], append(slices.Clip(at), n.Content[i].Value))
			}
		case yamlv3.SequenceNode, yamlv3.DocumentNode:
			for _, c := range n.Content {
				step(c, append(slices.Clip(at), "[]"))
			}
		}
	}
	step(n, at)
}

// child follows keys through mappings, and aliases; nil where they lead nowhere.
func child(n *yamlv3.Node, keys ...string) *yamlv3.Node {
	if n != nil && n.Kind == yamlv3.AliasNode {
		n = n.Alias
	}
	if len(keys) == 0 {
		return n
	}
	if n == nil || n.Kind != yamlv3.MappingNode {
		return nil
	}
	var next *yamlv3.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == keys[0] {
			next = n.Content[i+1]
		}
	}
	return child(next, keys[1:]...)
}

// text is the scalar that keys lead to, "" for none.
func text(n *yamlv3.Node, keys ...string) string {
	if v := child(n, keys...); v != nil && v.Kind == yamlv3.ScalarNode {
		return v.Value
	}
	return ""
}

// items are the scalars of a list.
func items(n *yamlv3.Node) (all []string) {
	if n == nil || n.Kind != yamlv3.SequenceNode {
		return nil
	}
	for _, c := range n.Content {
		all = append(all, child(c).Value)
	}
	return all
}
