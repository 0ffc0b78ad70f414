package promote_test

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/signing"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/signingtest"
)

const (
	emptyLock = `{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "channels", "namespace": "temper"}}`
	aServer   = `{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "serve", "namespace": "temper"},
		"spec": {"replicas": 2, "selector": {}, "template": {"metadata": {}, "spec": {"containers": []}}}}`
	aService = `{"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": "mnist", "namespace": "temper"},
		"spec": {"predictor": {"logger": {"mode": "all"}, "model": {"modelFormat": {"name": "onnx"}, "storageUri": "oci://nothing"}}}}`
	aPredictor = `{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "mnist-predictor", "namespace": "temper"},
		"spec": {"replicas": 1, "selector": {}, "template": {"metadata": {}, "spec": {"containers": []}}}}`
)

// plainRegistry is one that keeps no conditions.
func plainRegistry(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://") + "/tiny"
}

// TestCase39ResourceVersionDecides: of two promoters that have both read the
// lock before either wrote it, one wins, though the registry would let both.
func TestCase39ResourceVersionDecides(t *testing.T) {
	p := newPromoter(t, plainRegistry(t))
	models := []string{p.model(1), p.model(2)}
	a := newAPI(t, map[string]string{locks: emptyLock})
	var ready sync.WaitGroup
	ready.Add(len(models))
	var writes, conflicts atomic.Int32
	a.before = func(req *http.Request) {
		if req.Method == http.MethodPut && int(writes.Add(1)) <= len(models) {
			ready.Done()
			ready.Wait()
		}
	}
	var group sync.WaitGroup
	codes, results := make([]int, len(models)), make([]promote.Result, len(models))
	for i, m := range models {
		group.Go(func() {
			var stderr string
			codes[i], results[i], stderr = p.run(m, "--kubeconfig", a.kubeconfig, "--lock", "channels")
			if codes[i] == step.ExitRefused && strings.Contains(stderr, "another promotion became number 1 first") {
				conflicts.Add(1)
			}
		})
	}
	group.Wait()
	won := slices.Index(codes, step.ExitDone)
	if won < 0 || codes[1-won] != step.ExitRefused || conflicts.Load() != 1 || writes.Load() != 2 {
		t.Fatalf("exit codes %v, %d writes", codes, writes.Load())
	}
	h, err := channel.Read(t.Context(), p.place+":production", signingtest.Policy(p.key))
	if err != nil || h.Sequence != 1 || h.Model != results[won].Digest {
		t.Errorf("%+v, %v; %+v was told that it won", h, err, results[won])
	}
	if data := fmt.Sprint(a.get(locks)["data"]); !strings.Contains(data, h.Digest) || !strings.Contains(data, p.place+":production") {
		t.Errorf("the ConfigMap says %s", data)
	}
	if verbs := a.verbs(); slices.ContainsFunc(verbs, func(v string) bool { return v != "GET configmaps/channels" && v != "PUT configmaps/channels" }) {
		t.Errorf("it asked for more than its rights: %v", verbs)
	}
	// The other one, evaluated against it.
	a.before = nil
	if code, result, stderr := p.run(models[1-won], "--kubeconfig", a.kubeconfig, "--lock", "temper/channels"); code != step.ExitDone || result.Sequence != 2 {
		t.Errorf("exit code %d, %+v: %s", code, result, stderr)
	}
}

// TestLockOfOtherChannels: that another channel's entry changed is no reason
// to lose.
func TestLockOfOtherChannels(t *testing.T) {
	p := newPromoter(t, "oci:"+t.TempDir())
	model := p.model(1)
	a := newAPI(t, map[string]string{locks: emptyLock})
	once := sync.OnceFunc(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		o := clone(a.objects[locks])
		at(o, "data")["channel-0000000000000000"] = "{}"
		a.put(locks, o)
	})
	a.before = func(req *http.Request) {
		if req.Method == http.MethodPut {
			once()
		}
	}
	code, result, stderr := p.run(model, "--kubeconfig", a.kubeconfig, "--lock", "channels")
	if code != step.ExitDone || result.Sequence != 1 || len(at(a.get(locks), "data")) != 2 {
		t.Errorf("exit code %d, %+v, %v: %s", code, result, a.get(locks)["data"], stderr)
	}
}

func TestLockMustBeThere(t *testing.T) {
	p := newPromoter(t, "oci:"+t.TempDir())
	model := p.model(1)
	a := newAPI(t, map[string]string{locks: emptyLock})
	if code, _, stderr := p.run(model, "--kubeconfig", a.kubeconfig, "--lock", "none"); code != step.ExitBadInput {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	if code, result, stderr := p.run(model, "--kubeconfig", a.kubeconfig, "--lock", "channels"); code != step.ExitDone {
		t.Fatalf("exit code %d, %+v: %s", code, result, stderr)
	}
	a.mu.Lock()
	for key := range at(a.objects[locks], "data") {
		at(a.objects[locks], "data")[key] = `{"channel": "other:production", "sequence": 1, "record": ""}`
	}
	a.mu.Unlock()
	if code, _, stderr := p.run(p.model(2), "--kubeconfig", a.kubeconfig, "--lock", "channels"); code != step.ExitRefused || !strings.Contains(stderr, "damaged") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// rolls is a Deployment's controller: it takes a few looks at each change, and
// never comes to an end with a model that is bad.
func rolls(path string, bad func(template object) bool) func(string, object) {
	looks := 0
	return func(p string, o object) {
		if p != path {
			return
		}
		status, spec := at(o, "status"), at(o, "spec")
		generation, replicas := at(o, "metadata")["generation"], spec["replicas"]
		if status["observedGeneration"] != generation {
			if looks++; looks < 3 {
				return
			}
			looks = 0
			status["observedGeneration"] = generation
			status["replicas"], status["updatedReplicas"], status["availableReplicas"] = replicas.(float64)+1, float64(1), replicas
			status["conditions"] = []any{}
			return
		}
		if bad(at(spec, "template")) {
			status["conditions"] = []any{object{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "it has timed out progressing"}}
			return
		}
		status["replicas"], status["updatedReplicas"], status["availableReplicas"] = replicas, replicas, replicas
	}
}

const modelOfPods = "temper-ml.github.io/model"

func TestDeploymentIsRolled(t *testing.T) {
	p := newPromoter(t, "oci:"+t.TempDir())
	good, bad := p.model(1), p.model(2)
	a := newAPI(t, map[string]string{servers: aServer})
	a.controller = rolls(servers, func(template object) bool {
		return at(template, "metadata", "annotations")[modelOfPods] == bad
	})
	roll := func(model string, more ...string) (int, promote.Result, string) {
		return p.run(model, append([]string{"--kubeconfig", a.kubeconfig, "--deployment", "serve", "--rollout-timeout", "1m"}, more...)...)
	}
	model := func() any { return at(a.get(servers), "spec", "template", "metadata", "annotations")[modelOfPods] }
	code, result, stderr := roll(good)
	if code != step.ExitDone || result.Verdict != promote.Promoted || model() != good {
		t.Fatalf("exit code %d, %+v, %v: %s", code, result, model(), stderr)
	}
	if status := at(a.get(servers), "status"); status["updatedReplicas"] != float64(2) {
		t.Errorf("it did not wait for the rollout: %v", status)
	}
	if verbs := a.verbs(); slices.ContainsFunc(verbs, func(v string) bool { return v != "GET deployments/serve" && v != "PATCH deployments/serve" }) {
		t.Errorf("it asked for more than its rights: %v", verbs)
	}
	// A rollout that fails is rolled back, channel and pods.
	code, result, stderr = roll(bad)
	if code != step.ExitDone || result.Verdict != promote.RolledBack || result.Sequence != 3 || result.Digest != digestOf(good) || model() != good || !strings.Contains(result.Because, "timed out") {
		t.Fatalf("exit code %d, %+v, %v: %s", code, result, model(), stderr)
	}
	if note := at(a.get(servers), "metadata", "annotations")["temper-ml.github.io/promotion"]; note != p.place+":production#3" {
		t.Errorf("%v", note)
	}
	// What a later promotion did stays.
	a.mu.Lock()
	at(a.objects[servers], "metadata", "annotations")["temper-ml.github.io/promotion"] = p.place + ":production#99"
	a.mu.Unlock()
	if code, _, stderr := roll(p.model(3)); code != step.ExitRefused || model() != good {
		t.Errorf("exit code %d, %v: %s", code, model(), stderr)
	}
}

// TestCase41RolloutGoesOn: a promotion that was killed while it watched is
// watched, and rolled back, by running it again.
func TestCase41RolloutGoesOn(t *testing.T) {
	p := newPromoter(t, "oci:"+t.TempDir())
	good, bad := p.model(1), p.model(2)
	for _, m := range []string{good, bad} { // killed before it told the Deployment
		if code, _, stderr := p.run(m); code != step.ExitDone {
			t.Fatalf("exit code %d: %s", code, stderr)
		}
	}
	a := newAPI(t, map[string]string{servers: aServer})
	a.controller = rolls(servers, func(template object) bool {
		return at(template, "metadata", "annotations")[modelOfPods] == bad
	})
	code, result, stderr := p.run(bad, "--kubeconfig", a.kubeconfig, "--deployment", "temper/serve")
	if code != step.ExitDone || result.Verdict != promote.RolledBack || result.Digest != digestOf(good) {
		t.Fatalf("exit code %d, %+v: %s", code, result, stderr)
	}
}

// TestRolloutIsCheckedFirst: what is wrong with a workload is found before the
// channel moves.
func TestRolloutIsCheckedFirst(t *testing.T) {
	p := newPromoter(t, "oci:"+t.TempDir())
	model := p.model(1)
	a := newAPI(t, map[string]string{servers: strings.Replace(aServer, `"replicas"`, `"paused": true, "replicas"`, 1), services: aService})
	for _, args := range [][]string{
		{"--deployment", "none"},
		{"--deployment", "other/serve"},
		{"--deployment", "serve"},            // paused
		{"--inference-service", "mnist"},     // of a folder
		{"--inference-service", "kube/none"}, // of a folder, too
	} {
		if code, _, stderr := p.run(model, append(args, "--kubeconfig", a.kubeconfig)...); code != step.ExitBadInput {
			t.Errorf("%v: exit code %d: %s", args, code, stderr)
		}
	}
	if h, err := channel.Read(t.Context(), p.place+":production", signingtest.Policy(p.key)); err == nil {
		t.Errorf("%+v", h)
	}
}

// pair packs a model as ModelPack and modelcar, signs both, and returns both.
func (p *promoter) pair(seed uint64) (pack, car string) {
	p.t.Helper()
	b := signingtest.Judged(p.t, seed, 950)
	packed, err := signing.Pack(p.t.Context(), fmt.Sprintf("%s:v%d", p.place, seed), b)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, ref := range []string{packed.ModelPack, packed.Modelcar} {
		signingtest.Sign(p.t, ref, b, p.key)
	}
	return packed.ModelPack, packed.Modelcar
}

func TestInferenceServiceIsRolled(t *testing.T) {
	p := newPromoter(t, plainRegistry(t))
	good, goodCar := p.pair(1)
	bad, badCar := p.pair(2)
	storage := func(a *api) any { return at(a.get(services), "spec", "predictor", "model")["storageUri"] }
	for _, mode := range []string{"Standard", "Knative"} {
		t.Run(mode, func(t *testing.T) {
			p := *p
			p.t = t
			a := newAPI(t, map[string]string{services: aService, behind: aPredictor})
			pods := rolls(behind, func(template object) bool {
				return at(template, "metadata", "annotations")["internal.serving.kserve.io/storage-initializer-sourceuri"] == "oci://"+badCar
			})
			revision := ""
			a.controller = func(path string, o object) { // KServe
				pods(path, o)
				if path != services {
					return
				}
				status, uri := at(o, "status"), at(o, "spec", "predictor", "model")["storageUri"].(string)
				status["deploymentMode"] = mode
				status["conditions"] = []any{object{"type": "Ready", "status": "True"}} // whatever goes on below
				predictor := at(status, "components", "predictor")
				if mode == "Standard" {
					d := clone(a.objects[behind])
					at(d, "spec", "template", "metadata", "annotations")["internal.serving.kserve.io/storage-initializer-sourceuri"] = uri
					if fmt.Sprint(d["spec"]) != fmt.Sprint(a.objects[behind]["spec"]) {
						a.put(behind, d)
					}
					return
				}
				if uri != revision {
					revision = uri
					predictor["latestCreatedRevision"] = "mnist-" + uri[len(uri)-4:]
				} else if uri != "oci://"+badCar {
					predictor["latestReadyRevision"] = predictor["latestCreatedRevision"]
				}
			}
			roll := func(model string, more ...string) (int, promote.Result, string) {
				return p.run(model, append([]string{"--channel", p.place + ":" + strings.ToLower(mode), "--kubeconfig", a.kubeconfig, "--inference-service", "mnist", "--rollout-timeout", "4s"}, more...)...)
			}
			code, result, stderr := roll(good)
			if code != step.ExitDone || result.Verdict != promote.Promoted || result.Modelcar != goodCar || storage(a) != "oci://"+goodCar {
				t.Fatalf("exit code %d, %+v, %v: %s", code, result, storage(a), stderr)
			}
			if logger := at(a.get(services), "spec", "predictor", "logger")["mode"]; logger != "all" {
				t.Errorf("the rest of the InferenceService changed: %v", logger)
			}
			code, result, stderr = roll(bad)
			if code != step.ExitDone || result.Verdict != promote.RolledBack || result.Digest != digestOf(good) || storage(a) != "oci://"+goodCar {
				t.Errorf("exit code %d, %+v, %v: %s", code, result, storage(a), stderr)
			}
			for _, verb := range a.verbs() {
				if !slices.Contains([]string{"GET inferenceservices/mnist", "PATCH inferenceservices/mnist", "GET deployments/mnist-predictor"}, verb) {
					t.Errorf("it asked for more than its rights: %s", verb)
				}
			}
		})
	}
	// A modelcar that nobody signed is none.
	b := signingtest.Judged(t, 3, 950)
	packed, err := signing.Pack(t.Context(), p.place+":v3", b)
	if err != nil {
		t.Fatal(err)
	}
	signingtest.Sign(t, packed.ModelPack, b, p.key)
	a := newAPI(t, map[string]string{services: aService})
	if code, _, stderr := p.run(packed.ModelPack, "--kubeconfig", a.kubeconfig, "--inference-service", "mnist"); code != step.ExitRefused || !strings.Contains(stderr, "no modelcar") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}
