package promote_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/store"
)

// promoter runs the step with a key and a policy.
type promoter struct {
	t          *testing.T
	key        *sign.Key
	place      string // repository
	keyFile    string
	policyFile string
}

func newPromoter(t *testing.T, place string) *promoter {
	t.Helper()
	key, dir := signingtest.KeyFolder(t)
	p := &promoter{t: t, key: key, place: place, keyFile: filepath.Join(dir, sign.PrivateKeyFile), policyFile: filepath.Join(dir, "tiny.yaml")}
	if err := os.WriteFile(p.policyFile, []byte(signingtest.Definition), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(sign.PasswordVariable, signingtest.Password)
	return p
}

func (p *promoter) model(seed uint64) string {
	p.t.Helper()
	return signingtest.Pack(p.t, fmt.Sprintf("%s:v%d", p.place, seed), signingtest.Judged(p.t, seed, 950), p.key)
}

// run promotes a model and returns the exit code, the result and what was said.
func (p *promoter) run(model string, more ...string) (code int, result promote.Result, stderr string) {
	p.t.Helper()
	var out, errs bytes.Buffer
	args := append([]string{"--channel", p.place + ":production", "--model", model, "--key", p.keyFile,
		"--policy", p.policyFile, "--dataset", signingtest.Dataset, "-o", "json"}, more...)
	code = step.Run(p.t.Context(), promote.Command(), args, &out, &errs)
	if code == step.ExitDone {
		if err := json.Unmarshal(out.Bytes(), &result); err != nil {
			p.t.Fatal(err)
		}
	}
	return code, result, errs.String()
}

// Another model comes into service after this one was compared with nothing.
func TestCase39FirstPromotionsRace(t *testing.T) {
	g, err := store.Start(t.Context(), filepath.Join(t.TempDir(), "layout"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	p := newPromoter(t, g.Addr()+"/tiny")
	late, early := p.model(1), p.model(2)
	_, hex, _ := strings.Cut(late, "@sha256:")
	var verified atomic.Int32
	registry := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: g.Addr()})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		// The second time is when it is about to be promoted.
		if strings.HasSuffix(req.URL.Path, "/manifests/sha256-"+hex+".sig") && verified.Add(1) == 2 {
			_, err := channel.Promote(t.Context(), channel.Promotion{Channel: p.place + ":production", Model: early, Policy: signingtest.Policy(p.key), Signer: p.key})
			if err != nil {
				t.Error(err)
			}
		}
		registry.ServeHTTP(w, req)
	}))
	defer s.Close()
	through := *p
	through.place = strings.TrimPrefix(s.URL, "http://") + "/tiny"
	code, _, stderr := through.run(through.place + "@sha256:" + hex)
	if code != step.ExitRefused || !strings.Contains(stderr, "compared with nothing") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	if code, result, stderr := through.run(through.place + "@sha256:" + hex); code != step.ExitDone || result.Sequence != 2 {
		t.Errorf("promoting again: exit code %d, %+v, %s", code, result, stderr)
	}
}

func TestCase33RevokedModelIsReplaced(t *testing.T) {
	p := newPromoter(t, "oci:"+t.TempDir())
	bad, good := p.model(1), p.model(2)
	if code, _, stderr := p.run(bad); code != step.ExitDone {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	_, revoked, _ := strings.Cut(bad, "@")
	if code, _, stderr := p.run(bad, "--revoked", revoked); code != step.ExitRefused || !strings.Contains(stderr, "revoked") {
		t.Errorf("a revoked model: exit code %d: %s", code, stderr)
	}
	if code, result, stderr := p.run(good, "--revoked", revoked); code != step.ExitDone || result.Sequence != 2 || result.Previous != revoked {
		t.Errorf("in its place: exit code %d, %+v, %s", code, result, stderr)
	}
}

// TestCase60TestSplitIsFixed: figures that were measured on anything but the
// policy's test split, such as one that feedback got into, put nothing into
// service.
func TestCase60TestSplitIsFixed(t *testing.T) {
	p := newPromoter(t, "oci:"+t.TempDir())
	model := p.model(1)
	code, _, stderr := p.run(model, "--dataset", "sha256:"+strings.Repeat("5", 64))
	if code != step.ExitRefused || !strings.Contains(stderr, "measured on data set") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	if h, err := channel.Read(t.Context(), p.place+":production", signingtest.Policy(p.key)); err == nil {
		t.Errorf("%+v", h)
	}
	if code, _, stderr := p.run(model); code != step.ExitDone {
		t.Errorf("on the policy's own: exit code %d: %s", code, stderr)
	}
}
