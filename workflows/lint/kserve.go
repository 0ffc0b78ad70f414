package lint

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// InferenceService is as much of KServe's serving.kserve.io/v1beta1 as an
// overlay may use; its Go module would bring an operator with it.
type InferenceService struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Predictor struct {
			MinReplicas        *int32                     `json:"minReplicas,omitempty"`
			MaxReplicas        int32                      `json:"maxReplicas,omitempty"`
			ServiceAccountName string                     `json:"serviceAccountName,omitempty"`
			SecurityContext    *corev1.PodSecurityContext `json:"securityContext,omitempty"`
			Automount          *bool                      `json:"automountServiceAccountToken,omitempty"`
			Logger             *struct {
				URL  string `json:"url"`
				Mode string `json:"mode"` // all, request or response
			} `json:"logger,omitempty"`
			Model *struct {
				ModelFormat struct {
					Name    string `json:"name"`
					Version string `json:"version,omitempty"`
				} `json:"modelFormat"`
				ProtocolVersion string                      `json:"protocolVersion,omitempty"`
				Runtime         string                      `json:"runtime,omitempty"`
				StorageURI      string                      `json:"storageUri"`
				Resources       corev1.ResourceRequirements `json:"resources"`
			} `json:"model"`
		} `json:"predictor"`
	} `json:"spec"`
}
