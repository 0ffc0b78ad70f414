package promote_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// object is one of the Kubernetes API's.
type object = map[string]any

// api is as much of the Kubernetes API as a promotion asks: GET, PUT and merge
// patches of single objects, over HTTP, with its optimistic concurrency. A write
// with a resourceVersion that is not the object's is answered with 409, and a
// change of spec is another generation.
type api struct {
	t          *testing.T
	kubeconfig string

	mu      sync.Mutex
	version int
	objects map[string]object // by path
	asked   map[string]bool   // "VERB path"

	// before runs before a request is looked at, without the lock.
	before func(req *http.Request)
	// controller gives an object its status when it is read, as controllers
	// would have meanwhile.
	controller func(path string, o object)
}

const (
	locks    = "/api/v1/namespaces/temper/configmaps/channels"
	servers  = "/apis/apps/v1/namespaces/temper/deployments/serve"
	services = "/apis/serving.kserve.io/v1beta1/namespaces/temper/inferenceservices/mnist"
	behind   = "/apis/apps/v1/namespaces/temper/deployments/mnist-predictor"
)

func newAPI(t *testing.T, objects map[string]string) *api {
	t.Helper()
	a := &api{t: t, objects: map[string]object{}, asked: map[string]bool{}}
	for path, text := range objects {
		var o object
		if err := json.Unmarshal([]byte(text), &o); err != nil {
			t.Fatal(err)
		}
		a.put(path, o)
	}
	s := httptest.NewServer(a)
	t.Cleanup(s.Close)
	a.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	config := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": [{"name": "c", "cluster": {"server": %q}}], "users": [{"name": "c", "user": {}}],
		"contexts": [{"name": "c", "context": {"cluster": "c", "user": "c", "namespace": "temper"}}]}`, s.URL)
	if err := os.WriteFile(a.kubeconfig, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return a
}

func at(o object, path ...string) object {
	for _, key := range path {
		inner, _ := o[key].(object)
		if inner == nil {
			inner = object{}
			o[key] = inner
		}
		o = inner
	}
	return o
}

func clone(o object) (copied object) {
	data, err := json.Marshal(o)
	if err == nil {
		err = json.Unmarshal(data, &copied)
	}
	if err != nil {
		panic(err)
	}
	return copied
}

// merge is RFC 7396.
func merge(into, patch object) {
	for key, value := range patch {
		switch value := value.(type) {
		case nil:
			delete(into, key)
		case object:
			merge(at(into, key), value)
		default:
			into[key] = value
		}
	}
}

// put stores an object; the caller holds the lock, where others could.
func (a *api) put(path string, o object) {
	a.version++
	at(o, "metadata")["resourceVersion"] = strconv.Itoa(a.version)
	old := a.objects[path]
	if old == nil || !reflect.DeepEqual(at(old, "spec"), at(o, "spec")) {
		generation, _ := at(o, "metadata")["generation"].(float64)
		at(o, "metadata")["generation"] = generation + 1
	}
	a.objects[path] = o
}

func (a *api) get(path string) object {
	a.mu.Lock()
	defer a.mu.Unlock()
	return clone(a.objects[path])
}

func (a *api) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if a.before != nil {
		a.before(req)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked[req.Method+" "+req.URL.Path] = true
	answer := func(code int, body any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		if err := json.NewEncoder(w).Encode(body); err != nil {
			a.t.Error(err)
		}
	}
	fail := func(code int, reason string) {
		answer(code, object{"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason})
	}
	now, ok := a.objects[req.URL.Path]
	if !ok {
		fail(http.StatusNotFound, "NotFound")
		return
	}
	if req.Method == http.MethodGet {
		if a.controller != nil {
			a.controller(req.URL.Path, now)
		}
		answer(http.StatusOK, now)
		return
	}
	var change object
	if err := json.NewDecoder(req.Body).Decode(&change); err != nil {
		fail(http.StatusBadRequest, "BadRequest")
		return
	}
	if version, _ := at(change, "metadata")["resourceVersion"].(string); version != "" && version != at(now, "metadata")["resourceVersion"] {
		fail(http.StatusConflict, "Conflict")
		return
	}
	next := change
	switch {
	case req.Method == http.MethodPatch && req.Header.Get("Content-Type") == "application/merge-patch+json":
		next = clone(now)
		merge(next, change)
	case req.Method != http.MethodPut:
		fail(http.StatusUnsupportedMediaType, "UnsupportedMediaType")
		return
	}
	if req.URL.Query().Get("dryRun") == "" {
		a.put(req.URL.Path, next)
	}
	answer(http.StatusOK, next)
}

// verbs are what was asked of the API, which is what a promotion's account
// has to be allowed.
func (a *api) verbs() (list []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for verb := range a.asked {
		list = append(list, verb[:strings.Index(verb, " ")]+" "+verb[strings.LastIndex(verb[:strings.LastIndex(verb, "/")], "/")+1:])
	}
	return list
}
