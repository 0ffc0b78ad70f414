// Package kube is how steps reach the Kubernetes API: as whom, and what its
// answers mean for an exit code.
package kube

import (
	"errors"
	"fmt"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/temper-ml/temper/runners/step"
)

// Flag is the usage of a flag --kubeconfig.
const Flag = "kubeconfig file (default: as for kubectl)"

// Config is the pod's service account inside a cluster, elsewhere what the
// kubeconfig says ("" for the usual one), and the namespace that goes with it.
func Config(kubeconfig string) (*rest.Config, string, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{})
	namespace, _, err := loader.Namespace()
	if err != nil {
		return nil, "", step.BadInput(fmt.Errorf("kubeconfig: %w", err))
	}
	config, err := loader.ClientConfig()
	if err != nil {
		return nil, "", step.BadInput(fmt.Errorf("kubeconfig: %w", err))
	}
	return config, namespace, nil
}

// Unavailable tells an API server that does not answer from one that says no.
func Unavailable(err error) bool {
	if status := apierrors.APIStatus(nil); !errors.As(err, &status) {
		return utilnet.IsConnectionRefused(err) || utilnet.IsConnectionReset(err) || utilnet.IsTimeout(err) ||
			utilnet.IsProbableEOF(err) || utilnet.IsHTTP2ConnectionLost(err) || strings.Contains(err.Error(), "no such host")
	}
	return apierrors.IsServerTimeout(err) || apierrors.IsTimeout(err) || apierrors.IsTooManyRequests(err) ||
		apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err)
}

// Category gives an answer of the API its exit code.
func Category(err error) error {
	switch {
	case err == nil:
		return nil
	case Unavailable(err):
		return step.Unavailable(err)
	case apierrors.IsNotFound(err), apierrors.IsInvalid(err), apierrors.IsBadRequest(err), apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return step.BadInput(err)
	}
	return err
}
