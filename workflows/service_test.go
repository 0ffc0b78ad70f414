package workflows

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/temper-ml/temper/models/dataset"
)

// Every model in service is compared on a fixed data set, as shipped: the one
// that the workflows train on by default, which the sentinel has with it.
func TestCase61SentinelHasAnAnchor(t *testing.T) {
	for _, folder := range []string{"base", "overlays/kind", "overlays/production", "overlays/kserve"} {
		docs := build(t, folder)
		settings := map[string]map[string]string{}
		var from []corev1.EnvFromSource
		for _, d := range docs {
			switch o := d.Object.(type) {
			case *corev1.ConfigMap:
				settings[o.Name] = o.Data
			case *appsv1.Deployment:
				if o.Name == "sentinel" {
					from = o.Spec.Template.Spec.Containers[0].EnvFrom
				}
			}
		}
		anchor := ""
		for _, f := range from {
			if f.ConfigMapRef != nil {
				anchor = settings[f.ConfigMapRef.Name]["TEMPER_ANCHOR"]
			}
		}
		if trained := all(docs)["defend"].Spec.Arguments.GetParameterByName("dataset").GetValue(); anchor != trained {
			t.Errorf("%s: the sentinel's anchor is %q, models are trained on %q", folder, anchor, trained)
		} else if _, err := dataset.Open(t.Context(), anchor); err != nil || strings.Contains(anchor, "://") {
			t.Errorf("%s: anchor %s is not in the image: %v", folder, anchor, err)
		}
	}
}

// What serve's container listens on is what Service and NetworkPolicy let
// through: inference over HTTP and gRPC for everybody in the cluster, the admin
// port for monitoring only.
func TestServeIsReached(t *testing.T) {
	docs := build(t, "overlays/kind")
	listens, serves := map[string]int32{}, map[string]int32{} // ports by their name
	var args, lets []string
	for _, d := range docs {
		switch o := d.Object.(type) {
		case *appsv1.Deployment:
			if o.Name == "serve" {
				args = o.Spec.Template.Spec.Containers[0].Args
				for _, p := range o.Spec.Template.Spec.Containers[0].Ports {
					listens[p.Name] = p.ContainerPort
				}
			}
		case *corev1.Service:
			if o.Name == "serve" {
				for _, p := range o.Spec.Ports {
					serves[p.TargetPort.StrVal] = p.Port
				}
			}
		case *networkingv1.NetworkPolicy:
			if o.Name != "serve" {
				continue
			}
			for _, i := range o.Spec.Ingress {
				if s := i.From[0].NamespaceSelector; len(i.From) == 1 && s != nil && len(s.MatchLabels)+len(s.MatchExpressions) == 0 {
					for _, p := range i.Ports {
						lets = append(lets, p.Port.StrVal)
					}
				}
			}
		}
	}
	for flag, port := range map[string]string{"--listen": "inference", "--grpc-listen": "grpc", "--admin-listen": "admin"} {
		if want := fmt.Sprintf("%s=:%d", flag, listens[port]); !slices.Contains(args, want) {
			t.Errorf("serve is not started with %s: %v", want, args)
		}
	}
	public := maps.Clone(listens)
	delete(public, "admin")
	if slices.Sort(lets); !maps.Equal(serves, public) || !slices.Equal(lets, slices.Sorted(maps.Keys(public))) {
		t.Errorf("serve listens on %v, the Service has %v, the NetworkPolicy lets everybody to %v", listens, serves, lets)
	}
}
