package workflows

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	wfv1 "github.com/argoproj/argo-workflows/v3/pkg/apis/workflow/v1alpha1"
	pipelinev1 "github.com/tektoncd/pipeline/pkg/apis/pipeline/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// host is one end of a connection: a pod, or an address outside of the cluster.
type host struct {
	namespace string
	labels    labels.Set
	address   string // where it is no pod
}

// port is one that a host listens on.
type port struct {
	host
	protocol corev1.Protocol
	name     string
	number   int
}

func selects(t *testing.T, s *metav1.LabelSelector, of labels.Set) bool {
	t.Helper()
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		t.Fatal(err)
	}
	return selector.Matches(of)
}

// allows says whether the policies of one end, me, let it connect with the other:
// none that selects it is for this direction, or one of those has a rule for both
// peer and port.
func allows(t *testing.T, policies []*networkingv1.NetworkPolicy, direction networkingv1.PolicyType, me, peer host, to port) bool {
	t.Helper()
	denied := false
	for _, p := range policies {
		if me.address != "" || me.namespace != p.Namespace || !selects(t, &p.Spec.PodSelector, me.labels) || !slices.Contains(p.Spec.PolicyTypes, direction) {
			continue
		}
		denied = true
		rule := func(peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) bool {
			return (len(peers) == 0 || slices.ContainsFunc(peers, func(p networkingv1.NetworkPolicyPeer) bool { return matches(t, p, me.namespace, peer) })) &&
				(len(ports) == 0 || slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool {
					return *p.Protocol == to.protocol && p.EndPort == nil &&
						(p.Port == nil || *p.Port == intstr.FromInt(to.number) || to.name != "" && *p.Port == intstr.FromString(to.name))
				}))
		}
		if direction == networkingv1.PolicyTypeEgress && slices.ContainsFunc(p.Spec.Egress, func(r networkingv1.NetworkPolicyEgressRule) bool { return rule(r.To, r.Ports) }) ||
			direction == networkingv1.PolicyTypeIngress && slices.ContainsFunc(p.Spec.Ingress, func(r networkingv1.NetworkPolicyIngressRule) bool { return rule(r.From, r.Ports) }) {
			return true
		}
	}
	return !denied
}

func matches(t *testing.T, p networkingv1.NetworkPolicyPeer, namespace string, h host) bool {
	t.Helper()
	if p.IPBlock != nil {
		if h.address == "" {
			return false
		}
		at := netip.MustParseAddr(h.address)
		in := func(cidr string) bool { return netip.MustParsePrefix(cidr).Contains(at) }
		return in(p.IPBlock.CIDR) && !slices.ContainsFunc(p.IPBlock.Except, in)
	}
	if h.address != "" || p.PodSelector != nil && !selects(t, p.PodSelector, h.labels) {
		return false
	}
	if p.NamespaceSelector == nil {
		return h.namespace == namespace
	}
	return selects(t, p.NamespaceSelector, labels.Set{corev1.LabelMetadataName: h.namespace})
}

// Who reaches what, by all policies together: default deny, and nothing open but
// what is written here and in docs/kubernetes.md.
func TestNetworkPolicies(t *testing.T) {
	var policies []*networkingv1.NetworkPolicy
	const ours = "temper"
	from := map[string]host{
		"another":    {namespace: ours},
		"listener":   {namespace: ours, labels: labels.Set{"eventlistener": "github"}},
		"elsewhere":  {namespace: "elsewhere", labels: labels.Set{"app.kubernetes.io/part-of": "temper"}},
		"monitoring": {namespace: "monitoring"},
		"internet":   {address: "203.0.113.1"},
	}
	git := host{namespace: "git", labels: labels.Set{"app.kubernetes.io/component": "git"}}
	to := map[string]port{
		"dns":            {host{namespace: "kube-system", labels: labels.Set{"k8s-app": "kube-dns"}}, corev1.ProtocolUDP, "", 53},
		"registry":       {host{namespace: "registry", labels: labels.Set{"app.kubernetes.io/name": "registry"}}, corev1.ProtocolTCP, "", 5000},
		"kubernetes-api": {host{address: "10.96.0.1"}, corev1.ProtocolTCP, "", 443},
		"interceptors":   {host{namespace: "tekton-pipelines"}, corev1.ProtocolTCP, "", 8443},
		"git":            {git, corev1.ProtocolTCP, "", 8080},
		"internet":       {from["internet"], corev1.ProtocolTCP, "", 443},
		"listener":       {from["listener"], corev1.ProtocolTCP, "", 8080},
		// What nobody has any business with.
		"internet's port 80": {from["internet"], corev1.ProtocolTCP, "", 80},
		"private address":    {host{address: "192.168.1.1"}, corev1.ProtocolTCP, "", 80},
		"metadata":           {host{address: "169.254.169.254"}, corev1.ProtocolTCP, "", 443},
		"elsewhere":          {from["elsewhere"], corev1.ProtocolTCP, "", 443},
		"another":            {from["another"], corev1.ProtocolTCP, "", 8080},
		"kube-system":        {host{namespace: "kube-system"}, corev1.ProtocolTCP, "", 53},
	}
	for _, d := range slices.Concat(build(t, "overlays/kind"), build(t, "../tasks")) {
		switch o := d.Object.(type) {
		case *networkingv1.NetworkPolicy:
			policies = append(policies, o)
		case *appsv1.Deployment: // the server, the sentinel
			pod := host{namespace: ours, labels: o.Spec.Template.Labels}
			from[o.Name] = pod
			for _, p := range o.Spec.Template.Spec.Containers[0].Ports {
				to[o.Name+":"+p.Name] = port{pod, corev1.ProtocolTCP, p.Name, int(p.ContainerPort)}
			}
		case *pipelinev1.Task: // its pods have its labels
			from[o.Name] = host{namespace: ours, labels: o.Labels}
		case *wfv1.WorkflowTemplate:
			for _, leaf := range o.Spec.Templates {
				if leaf.Container != nil {
					from["step "+leaf.Name] = host{namespace: ours, labels: leaf.Metadata.Labels}
				}
			}
		}
	}
	want := map[string]string{
		"serve":           "dns registry sentinel:http",
		"sentinel":        "dns kubernetes-api registry",
		"fetch-source":    "dns git internet registry",
		"build-runners":   "dns git internet registry",
		"check-model":     "dns registry",
		"verify-model":    "dns registry",
		"submit-workflow": "dns kubernetes-api registry",
		"listener":        "dns interceptors kubernetes-api",
		"another":         "dns",
		"elsewhere":       "listener serve:grpc serve:inference",
		"monitoring":      "listener sentinel:http serve:admin serve:grpc serve:inference",
		"internet":        "listener",
	}
	for name, me := range from {
		var reached []string
		for to, port := range to {
			inside := me.namespace == ours || port.namespace == ours // between others none of ours decides
			if inside && allows(t, policies, networkingv1.PolicyTypeEgress, me, port.host, port) && allows(t, policies, networkingv1.PolicyTypeIngress, port.host, me, port) {
				reached = append(reached, to)
			}
		}
		slices.Sort(reached)
		expected, ok := want[name]
		if strings.HasPrefix(name, "step ") {
			expected, ok = "dns kubernetes-api registry", true // the API for Argo's executor beside it
			if name == "step promote" {
				expected += " serve:inference" // it watches and attacks
			}
		}
		if got := strings.Join(reached, " "); !ok || got != expected {
			t.Errorf("%s reaches %q, not %q", name, got, expected)
		}
	}
	for name := range maps.Keys(want) {
		if _, ok := from[name]; !ok {
			t.Errorf("no pods of %s", name)
		}
	}
}
