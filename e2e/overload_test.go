//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/temper-ml/temper/runners/step/serve/inference"
	"github.com/temper-ml/temper/runners/step/serve/inference/inferencetest"
)

// nodePort is the address of the model server on the node, by a Service that is
// there as long as the test: the Kubernetes API's proxy would not let half a
// request through.
func nodePort(test, t *testing.T) string {
	t.Helper()
	service, err := client.CoreV1().Services(namespace).Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "overload-"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, Selector: map[string]string{"app.kubernetes.io/component": "serve"},
			Ports: []corev1.ServicePort{{Port: 8080}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	test.Cleanup(func() { must(test, "", "kubectl", "delete", "service", "-n", namespace, service.Name) })
	node := must(t, "", "kubectl", "get", "nodes", "-o", `jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}`)
	address := net.JoinHostPort(node, fmt.Sprint(service.Spec.Ports[0].NodePort))
	poll(t, address, func() (bool, error) {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		return err == nil, err
	})
	return address
}

// servers are the model server's pods: their names, how often they were started
// again and whether they are ready.
func servers(t *testing.T) string {
	t.Helper()
	return must(t, "", "kubectl", "get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=serve", "-o",
		`jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready};{end}`)
}

func TestCase53HalfOpenConnections(test *testing.T) {
	const connections = 500
	var address, before string
	var open []net.Conn
	var err error
	testenv.Test(test, features.New("half-open connections").
		Assess("Given a model in service", do(func(t *testing.T) {
			promoted(t)
			address, before = nodePort(test, t), servers(t)
		})).
		Assess("When clients open connections and send half a request, or nothing", do(func(t *testing.T) {
			if open, err = inferencetest.HalfOpen(address, "mnist", connections); err != nil {
				t.Fatal(err)
			}
		})).
		Assess("Then health and answers are as before while they are open", do(func(t *testing.T) {
			for range 20 {
				resp, err := http.Get("http://" + address + "/v2/health/ready")
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				c := inference.Client{URL: "http://" + address, Model: "mnist"}
				if _, err := c.Predict(t.Context(), make([]float32, digit.Size()), 1, digit); err != nil || resp.StatusCode != http.StatusOK {
					t.Fatal(resp.Status, err)
				}
			}
		})).
		Assess("And the server closes every one of them, and was never started again", do(func(t *testing.T) {
			if err := inferencetest.Closed(open, time.Now().Add(time.Minute)); err != nil { // its limits are 5 and 10 s
				t.Fatal(err)
			}
			if now := servers(t); now != before {
				t.Errorf("pods were %s, are %s", before, now)
			}
		})).
		Feature())
}

func TestCase54TenTimesTheCapacity(test *testing.T) {
	var capacity int // 32 requests for each of the node's cores
	var address, before string
	var full *inferencetest.Load
	run := func(t *testing.T, clients int) *inferencetest.Load {
		t.Helper()
		h, err := rest.HTTPClientFor(config)
		if err != nil {
			t.Fatal(err)
		}
		pod, _, _ := strings.Cut(before, " ")
		s := inferencetest.Server{
			URL: "http://" + address, Model: "mnist", Operator: h, Shape: digit,
			Metrics: config.Host + "/api/v1/namespaces/" + namespace + "/pods/" + pod + ":8081/proxy/metrics",
		}
		l, err := s.Load(t.Context(), clients, 3*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d clients: %+v", clients, *l)
		return l
	}
	testenv.Test(test, features.New("overload").
		Assess("Given a model in service, and as many clients as it admits", do(func(t *testing.T) {
			promoted(t)
			address, before = nodePort(test, t), servers(t)
			if _, err := fmt.Sscan(must(t, "", "kubectl", "get", "nodes", "-o", "jsonpath={.items[0].status.capacity.cpu}"), &capacity); err != nil {
				t.Fatal(err)
			}
			capacity *= 32
			full = run(t, capacity)
		})).
		Assess("When there are ten times as many, some are shed and the others answered nearly as soon", do(func(t *testing.T) {
			if err := run(t, 10*capacity).Bounded(full); err != nil {
				t.Error(err)
			}
		})).
		Assess("Then, when they are gone, all is as before", do(func(t *testing.T) {
			if l := run(t, 1); l.Shed > 0 {
				t.Errorf("%+v", *l)
			}
			if now := servers(t); now != before {
				t.Errorf("pods were %s, are %s", before, now)
			}
		})).
		Feature())
}
