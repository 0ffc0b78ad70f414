package promote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	typedapps "k8s.io/client-go/kubernetes/typed/apps/v1"
	typedcore "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/kube"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/verify"
)

const (
	// fieldManager is who changes objects, as Kubernetes notes it.
	fieldManager = "temper-promote"
	// modelAnnotation, on a Deployment's pods, is the model by digest. A
	// container takes it from there by the downward API.
	modelAnnotation = "temper-ml.github.io/model"
	// promotionAnnotation, on what was rolled, is CHANNEL#NUMBER of the
	// promotion that did it: no earlier one undoes a later one.
	promotionAnnotation = "temper-ml.github.io/promotion"
	// storageAnnotation, on the pods of an InferenceService, is KServe's own
	// note of the storageUri that they serve.
	storageAnnotation = "internal.serving.kserve.io/storage-initializer-sourceuri"
)

// Cluster is what a promotion does in Kubernetes beside moving the channel.
type Cluster struct {
	Lock             string // ConfigMap, [NAMESPACE/]NAME; "" for none
	Deployment       string // to roll, [NAMESPACE/]NAME; "" for none
	InferenceService string // of KServe, to roll, [NAMESPACE/]NAME; "" for none
	Timeout          time.Duration
	Kubeconfig       string
}

func (c *Cluster) flags(flags *pflag.FlagSet) {
	flags.StringVar(&c.Lock, "lock", "", "ConfigMap, [NAMESPACE/]NAME, that says which record is the channel's last: of two promotions at once one changes it")
	flags.StringVar(&c.Deployment, "deployment", "", "Deployment to roll, [NAMESPACE/]NAME, whose servers do not follow the channel")
	flags.StringVar(&c.InferenceService, "inference-service", "", "InferenceService of KServe to roll, [NAMESPACE/]NAME: its storageUri becomes the modelcar")
	flags.DurationVar(&c.Timeout, "rollout-timeout", 12*time.Minute, "how long a rollout may take before it is rolled back")
	flags.StringVar(&c.Kubeconfig, "kubeconfig", "", kube.Flag)
}

// connection is a Cluster that was opened.
type connection struct {
	lock      channel.Lock // nil for none
	workloads []workload
	timeout   time.Duration
}

// connect opens what the flags name; nothing is asked for yet.
func (c *Cluster) connect() (*connection, error) {
	out := &connection{timeout: c.Timeout}
	if c.Lock == "" && c.Deployment == "" && c.InferenceService == "" {
		return out, nil
	}
	config, namespace, err := kube.Config(c.Kubeconfig)
	if err != nil {
		return nil, err
	}
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON // one for typed and other objects
	core, err := typedcore.NewForConfig(config)
	if err != nil {
		return nil, step.BadInput(fmt.Errorf("kubeconfig: %w", err))
	}
	apps, err := typedapps.NewForConfig(config)
	if err != nil {
		return nil, step.BadInput(fmt.Errorf("kubeconfig: %w", err))
	}
	any, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, step.BadInput(fmt.Errorf("kubeconfig: %w", err))
	}
	place := func(ref string) (string, string) {
		if in, name, ok := strings.Cut(ref, "/"); ok {
			return in, name
		}
		return namespace, ref
	}
	if c.Lock != "" {
		in, name := place(c.Lock)
		out.lock = &configMap{api: core.ConfigMaps(in), name: in + "/" + name, base: name}
	}
	if c.Deployment != "" {
		in, name := place(c.Deployment)
		out.workloads = append(out.workloads, &deployment{api: apps.Deployments(in), name: in + "/" + name, base: name})
	}
	if c.InferenceService != "" {
		in, name := place(c.InferenceService)
		services := schema.GroupVersionResource{Group: "serving.kserve.io", Version: "v1beta1", Resource: "inferenceservices"}
		out.workloads = append(out.workloads, &inferenceService{
			api: any.Resource(services).Namespace(in), deployments: apps.Deployments(in), name: in + "/" + name, base: name,
		})
	}
	return out, nil
}

// workload runs servers that are told which model to serve.
type workload interface {
	// tell names the promotion's model. Dry, it finds out whether it could.
	tell(ctx context.Context, p *promoted, dry bool) error
	// state says what is missing until all servers are those of the model, ""
	// for nothing. That it will never be is a *stuck.
	state(ctx context.Context, p *promoted) (missing string, err error)
	String() string
}

// promoted is a promotion as a workload is told it.
type promoted struct {
	channel  string // reference
	sequence int
	model    string // reference of the ModelPack, by digest
	modelcar string // reference of the modelcar, by digest
}

// stuck says that a rollout failed.
type stuck struct{ error }

// newer refuses to undo a later promotion, by the annotation that it left.
func (p *promoted) newer(annotation string) error {
	name, number, ok := strings.Cut(annotation, "#")
	if sequence, err := strconv.Atoi(number); ok && err == nil && name == p.channel && sequence > p.sequence {
		return &channel.Conflict{Channel: p.channel, Reason: fmt.Sprintf("number %d was rolled out in the place of %d", sequence, p.sequence)}
	}
	return nil
}

func (p *promoted) annotation() string { return fmt.Sprintf("%s#%d", p.channel, p.sequence) }

// modelcar finds the modelcar of a model, where a workload needs it.
func (c *connection) modelcar(ctx context.Context, model *verify.Verified, rules verify.Policy) (string, error) {
	for _, w := range c.workloads {
		if _, ok := w.(*inferenceService); !ok {
			continue
		}
		if strings.HasPrefix(model.Reference, "oci:") {
			return "", step.BadInput(fmt.Errorf("model %s: KServe pulls from a registry, not from a folder", model.Reference))
		}
		car, err := verify.Modelcar(ctx, model, rules)
		if err != nil {
			return "", err
		}
		return car.Reference, nil
	}
	return "", nil
}

// try finds out whether the workloads could be told about a model.
func (c *connection) try(ctx context.Context, p *promoted) error {
	for _, w := range c.workloads {
		if err := w.tell(ctx, p, true); err != nil {
			return err
		}
	}
	return nil
}

// rollEvery is how often a rollout is looked at.
const rollEvery = 500 * time.Millisecond

// roll tells all workloads about a promotion and waits until they serve it. A
// *stuck is a rollout that failed.
func (c *connection) roll(ctx context.Context, s *step.Step, p *promoted) error {
	for _, w := range c.workloads {
		if err := w.tell(ctx, p, false); err != nil {
			return err
		}
	}
	end := time.Now().Add(c.timeout)
	for _, w := range c.workloads {
		told := ""
		for {
			missing, err := w.state(ctx, p)
			switch {
			case err == nil && missing == "":
				s.Log.Info("rolled out", "workload", w.String(), "model", p.model)
			case err != nil && (!kube.Unavailable(err) || time.Now().After(end)):
				return kube.Category(err) // an API that does not answer says nothing about the model
			case time.Now().After(end):
				return &stuck{fmt.Errorf("%s was not rolled out within %v: %s", w, c.timeout, missing)}
			case err != nil:
				missing = "the Kubernetes API does not answer"
			}
			if missing == "" {
				break
			}
			if missing != told {
				s.Log.Info("rolling out", "workload", w.String(), "waiting", missing)
				told = missing
			}
			if err := sleep(ctx, rollEvery); err != nil {
				return err
			}
		}
	}
	return nil
}

// change applies a merge patch that patch makes of what is there, with its
// resourceVersion, and makes it again where that has changed meanwhile.
func change(patch func() (resourceVersion string, content map[string]any, err error), apply func(data []byte) error) error {
	for range maxSwaps {
		version, content, err := patch()
		if err != nil {
			return err
		}
		metadata, _ := content["metadata"].(map[string]any)
		metadata["resourceVersion"] = version
		data, err := json.Marshal(content)
		if err != nil {
			return err
		}
		if err := apply(data); !apierrors.IsConflict(err) {
			return err
		}
	}
	return step.Unavailable(errors.New("others go on changing it: try again"))
}

func patchOptions(dry bool) metav1.PatchOptions {
	o := metav1.PatchOptions{FieldManager: fieldManager}
	if dry {
		o.DryRun = []string{metav1.DryRunAll}
	}
	return o
}

// deployment rolls by its pods' annotation, which names the model.
type deployment struct {
	api        typedapps.DeploymentInterface
	name, base string // NAMESPACE/NAME, NAME
}

func (d *deployment) String() string { return "Deployment " + d.name }

func (d *deployment) tell(ctx context.Context, p *promoted, dry bool) error {
	err := change(func() (string, map[string]any, error) {
		now, err := d.api.Get(ctx, d.base, metav1.GetOptions{})
		if err != nil {
			return "", nil, err
		}
		if now.Spec.Paused {
			return "", nil, step.BadInput(errors.New("it is paused: kubectl rollout resume"))
		}
		if err := p.newer(now.Annotations[promotionAnnotation]); err != nil && !dry {
			return "", nil, err
		}
		return now.ResourceVersion, map[string]any{
			"metadata": map[string]any{"annotations": map[string]string{promotionAnnotation: p.annotation()}},
			"spec":     map[string]any{"template": map[string]any{"metadata": map[string]any{"annotations": map[string]string{modelAnnotation: p.model}}}},
		}, nil
	}, func(data []byte) error {
		_, err := d.api.Patch(ctx, d.base, types.MergePatchType, data, patchOptions(dry))
		return err
	})
	return named(d, err)
}

func (d *deployment) state(ctx context.Context, p *promoted) (string, error) {
	now, err := d.api.Get(ctx, d.base, metav1.GetOptions{})
	if err != nil {
		return "", named(d, err)
	}
	if err := p.newer(now.Annotations[promotionAnnotation]); err != nil {
		return "", err
	}
	if got := now.Spec.Template.Annotations[modelAnnotation]; got != p.model {
		return "", &stuck{fmt.Errorf("%s: somebody changed its model to %.300q", d, got)}
	}
	return rolledOut(now)
}

// rolledOut says what is missing until all pods of a Deployment are new and
// available, as kubectl rollout status does.
func rolledOut(d *appsv1.Deployment) (missing string, err error) {
	s, want := d.Status, int32(1)
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	if s.ObservedGeneration < d.Generation {
		return "its controller has not seen the change", nil
	}
	for _, c := range s.Conditions {
		if c.Type == appsv1.DeploymentProgressing && c.Reason == "ProgressDeadlineExceeded" {
			return "", &stuck{fmt.Errorf("Deployment %s/%s: %s", d.Namespace, d.Name, c.Message)}
		}
	}
	switch {
	case s.UpdatedReplicas < want:
		return fmt.Sprintf("%d of %d pods are new", s.UpdatedReplicas, want), nil
	case s.Replicas > s.UpdatedReplicas:
		return fmt.Sprintf("%d old pods are still there", s.Replicas-s.UpdatedReplicas), nil
	case s.AvailableReplicas < s.UpdatedReplicas:
		return fmt.Sprintf("%d of %d new pods are available", s.AvailableReplicas, s.UpdatedReplicas), nil
	}
	return "", nil
}

// inferenceService rolls by its storageUri, which names the modelcar.
type inferenceService struct {
	api         dynamic.ResourceInterface
	deployments typedapps.DeploymentInterface
	name, base  string // NAMESPACE/NAME, NAME

	before string // Knative's last revision before the last change, "" where nothing changed
}

// service is as much of an InferenceService as is read here.
type service struct {
	Spec struct {
		Predictor struct {
			Model *struct {
				StorageURI string `json:"storageUri"`
			} `json:"model"`
		} `json:"predictor"`
	} `json:"spec"`
	Status struct {
		Conditions     []metav1.Condition `json:"conditions"`
		DeploymentMode string             `json:"deploymentMode"`
		Components     map[string]struct {
			LatestCreatedRevision string `json:"latestCreatedRevision"`
			LatestReadyRevision   string `json:"latestReadyRevision"`
		} `json:"components"`
	} `json:"status"`
}

func (i *inferenceService) String() string { return "InferenceService " + i.name }

func (i *inferenceService) get(ctx context.Context) (*unstructured.Unstructured, *service, error) {
	object, err := i.api.Get(ctx, i.base, metav1.GetOptions{})
	if err != nil {
		return nil, nil, err
	}
	data, err := object.MarshalJSON()
	if err != nil {
		return nil, nil, err
	}
	var s service
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, nil, step.BadInput(err)
	}
	if s.Spec.Predictor.Model == nil {
		return nil, nil, step.BadInput(errors.New("it has no spec.predictor.model, whose storageUri could name the modelcar"))
	}
	return object, &s, nil
}

func uri(modelcar string) string { return "oci://" + modelcar }

func (i *inferenceService) tell(ctx context.Context, p *promoted, dry bool) error {
	err := change(func() (string, map[string]any, error) {
		object, now, err := i.get(ctx)
		if err != nil {
			return "", nil, err
		}
		if err := p.newer(object.GetAnnotations()[promotionAnnotation]); err != nil && !dry {
			return "", nil, err
		}
		i.before = ""
		if now.Spec.Predictor.Model.StorageURI != uri(p.modelcar) {
			i.before = now.Status.Components["predictor"].LatestCreatedRevision
		}
		return object.GetResourceVersion(), map[string]any{
			"metadata": map[string]any{"annotations": map[string]string{promotionAnnotation: p.annotation()}},
			"spec":     map[string]any{"predictor": map[string]any{"model": map[string]any{"storageUri": uri(p.modelcar)}}},
		}, nil
	}, func(data []byte) error {
		_, err := i.api.Patch(ctx, i.base, types.MergePatchType, data, patchOptions(dry))
		return err
	})
	return named(i, err)
}

// state reads what is below the InferenceService: its own status says Ready
// while new pods still start (KServe's issues 4626 and 6081).
func (i *inferenceService) state(ctx context.Context, p *promoted) (string, error) {
	object, now, err := i.get(ctx)
	if err != nil {
		return "", named(i, err)
	}
	if err := p.newer(object.GetAnnotations()[promotionAnnotation]); err != nil {
		return "", err
	}
	if got := now.Spec.Predictor.Model.StorageURI; got != uri(p.modelcar) {
		return "", &stuck{fmt.Errorf("%s: somebody changed its storageUri to %.300q", i, got)}
	}
	switch mode := now.Status.DeploymentMode; mode {
	case "Standard", "RawDeployment": // the same, by its new and its old name
		d, err := i.deployments.Get(ctx, i.base+"-predictor", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return "KServe has made no Deployment", nil
		}
		if err != nil {
			return "", named(i, err)
		}
		if d.Spec.Template.Annotations[storageAnnotation] != uri(p.modelcar) {
			return "KServe has not changed its Deployment", nil
		}
		if missing, err := rolledOut(d); missing != "" || err != nil {
			return missing, err
		}
	case "Knative", "Serverless": // the same, by its new and its old name
		r := now.Status.Components["predictor"]
		if r.LatestCreatedRevision == "" || r.LatestCreatedRevision == i.before {
			return "KServe has made no new revision", nil
		}
		if r.LatestReadyRevision != r.LatestCreatedRevision {
			return "revision " + r.LatestCreatedRevision + " is not ready", nil
		}
	case "":
		return "KServe has not looked at it", nil
	default:
		return "", step.BadInput(fmt.Errorf("%s: deployment mode %q is none that can be watched: use Standard or Knative", i, mode))
	}
	for _, c := range now.Status.Conditions {
		if c.Type == "Ready" && string(c.Status) == string(corev1.ConditionTrue) {
			return "", nil
		}
	}
	return "it is not ready", nil
}

// named puts a workload's name before what went wrong with it.
func named(w workload, err error) error {
	if err == nil {
		return nil
	}
	return kube.Category(fmt.Errorf("%s: %w", w, err))
}
