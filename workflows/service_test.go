package workflows

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

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
