package serve

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/serve/inference"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// shop is a layout folder with a signing key.
type shop struct {
	t      *testing.T
	folder string // reference of the folder
	pub    string // path of the public key
	key    *sign.Key
	policy verify.Policy
}

// testKey is one for all tests: deriving its file's key takes seconds, by
// design.
var testKey = sync.OnceValues(func() (*sign.Key, error) {
	dir, err := os.MkdirTemp("", "temper-test-key-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	none := func(bool) ([]byte, error) { return nil, nil }
	if err := sign.GenerateKeyPair(dir, none); err != nil {
		return nil, err
	}
	return sign.LoadKey(context.Background(), filepath.Join(dir, sign.PrivateKeyFile), none)
})

func newShop(t *testing.T) *shop {
	t.Helper()
	key, err := testKey()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &shop{
		t: t, folder: "oci:" + filepath.Join(dir, "digits"), pub: filepath.Join(dir, "cosign.pub"), key: key,
		policy: verify.Policy{Keys: []verify.Key{{Name: "test", PEM: key.PublicKey()}}},
	}
	if err := os.WriteFile(s.pub, key.PublicKey(), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// stranger is a public key that signed nothing.
func stranger(t *testing.T) verify.Key {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return verify.Key{Name: "stranger", PEM: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}
}

// push writes a model under a tag.
func (s *shop) push(tag string, seed uint64, signed bool) (ref string) {
	s.t.Helper()
	data, err := onnx.Marshal(network(s.t, small, seed), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.pushFile(tag, data, signed)
}

func (s *shop) pushFile(tag string, data []byte, signed bool) (ref string) {
	s.t.Helper()
	ref, err := store.Push(s.t.Context(), s.folder+":"+tag, &store.Artifact{
		Type:  "application/vnd.cncf.model.manifest.v1+json",
		Files: []store.File{{Name: statement.ModelFile, Data: data}},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	if signed {
		if _, err := s.key.Sign(s.t.Context(), ref); err != nil {
			s.t.Fatal(err)
		}
	}
	return ref
}

func (s *shop) promote(ref string) {
	s.t.Helper()
	if _, err := channel.Promote(s.t.Context(), channel.Promotion{Channel: s.folder + ":production", Model: ref, Policy: s.policy, Signer: s.key}); err != nil {
		s.t.Fatal(err)
	}
}

func digestIn(ref string) string {
	_, digest, _ := strings.Cut(ref, "@")
	return digest
}

func TestCase55ArtifactIsVerified(t *testing.T) {
	s := newShop(t)
	good := s.push("v", 1, true)
	source := &Artifact{Reference: s.folder + ":v", Policy: s.policy}
	m, err := source.Load(t.Context(), "")
	if err != nil || m.Digest != digestIn(good) || m.Version != versionOf(m.Digest) {
		t.Fatalf("%+v, %v", m, err)
	}
	if _, err := source.Load(t.Context(), m.Digest); !errors.Is(err, ErrUnchanged) {
		t.Errorf("the same model again: %v", err)
	}
	refused := func(what, reason string) {
		t.Helper()
		var e *LoadError
		if m, err := source.Load(t.Context(), m.Digest); !errors.As(err, &e) || e.Reason != reason {
			t.Errorf("%s: %+v, %v, want %s", what, m, err, reason)
		}
	}
	s.push("v", 2, false)
	refused("unsigned", Unverified)
	s.pushFile("v", []byte("\x80\x04\x95pickle"), true)
	refused("a signed pickle", Unverified)
	source.Policy.Keys = []verify.Key{stranger(t)}
	s.push("v", 3, true)
	refused("signed by another key", Unverified)
	source.Policy = s.policy
	source.Reference = s.folder + ":absent"
	refused("absent", Unavailable)
	source.Reference = "localhost:1/digits:v"
	refused("registry down", Unavailable)
	source.Reference = ":"
	refused("no reference", Invalid)
}

// TestCase40AgeOfTheRecord: what the alert on a channel that never moves goes by
// is the time of the signed record, however often it is read or served anew.
func TestCase40AgeOfTheRecord(t *testing.T) {
	shop := newShop(t)
	long := time.Now().Add(-40 * 24 * time.Hour)
	promotion := channel.Promotion{Channel: shop.folder + ":production", Model: shop.push("a", 1, true), Policy: shop.policy, Signer: shop.key, Now: func() time.Time { return long }}
	if _, err := channel.Promote(t.Context(), promotion); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a restart makes it no younger
		s := start(t, model(t, small, 9), func(o *Options) { o.Source = &Channel{Reference: promotion.Channel, Policy: shop.policy} })
		for range 2 {
			if got := value(t, s, "temper_model_promoted_timestamp_seconds"); got != float64(long.Unix()) {
				t.Errorf("%v, want %d", got, long.Unix())
			}
			if err := s.Load(t.Context()); err != nil && !errors.Is(err, ErrUnchanged) {
				t.Fatal(err)
			}
		}
	}
}

// TestCase42RevokedModel: what is revoked leaves service at the next look, and
// does not come back by reloading, by starting again, or by hiding the list.
func TestCase42RevokedModel(t *testing.T) {
	shop := newShop(t)
	bad := shop.push("a", 1, true)
	shop.promote(bad)
	source := &Channel{Reference: shop.folder + ":production", Policy: shop.policy}
	s := start(t, model(t, small, 9), func(o *Options) { o.Source = source })
	infer := s.url + "/v2/models/digits/infer"
	expect(t, "POST", infer, one, 200, "label")
	if value(t, s, "temper_model_promoted_timestamp_seconds") == 0 {
		t.Error("no time of the promotion")
	}

	if _, err := channel.Revoke(t.Context(), bad, []string{digestIn(bad)}, "backdoor", shop.policy, shop.key, nil); err != nil {
		t.Fatal(err)
	}
	refused := func(s *Server) {
		t.Helper()
		var e *LoadError
		if err := s.Load(t.Context()); !errors.As(err, &e) || !strings.Contains(err.Error(), "revoked") {
			t.Errorf("%v", err)
		}
		if s.Ready() {
			t.Error("ready with a revoked model")
		}
	}
	refused(s.Server)
	expect(t, "POST", infer, one, 503, "error")
	if got := value(t, s, "temper_model_load_failures_total", "reason", Revoked); got != 1 {
		t.Errorf("%v failures were counted, want 1", got)
	}
	refused(s.Server) // reloading
	for _, source := range []Source{
		&Channel{Reference: shop.folder + ":production", Policy: shop.policy},
		&Artifact{Reference: shop.folder + ":a", Policy: shop.policy},
	} {
		again, err := New(Options{Name: "digits", Source: source})
		if err != nil {
			t.Fatal(err)
		}
		refused(again)
	}
	if code, stderr := runCommand(t.Context(), "--channel", shop.folder+":production", "--key", shop.pub, "--listen", "127.0.0.1:0", "--grpc-listen", "", "--admin-listen", ""); code != step.ExitRefused || !strings.Contains(stderr, "revoked") {
		t.Errorf("started with a revoked model: exit code %d: %s", code, stderr)
	}

	// A registry that hides the list: who saw it goes by it.
	r, err := store.Open(t.Context(), shop.folder+":revoked")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.SetTag(t.Context(), digestIn(bad)); err != nil { // signed, but no list
		t.Fatal(err)
	}
	refused(s.Server)

}

// TestCase42AnotherTakesItsPlace: a promotion ends what a revocation began.
func TestCase42AnotherTakesItsPlace(t *testing.T) {
	shop := newShop(t)
	bad, good := shop.push("a", 1, true), shop.push("b", 2, true)
	shop.promote(bad)
	source := &Channel{Reference: shop.folder + ":production", Policy: shop.policy}
	s := start(t, model(t, small, 9), func(o *Options) { o.Source = source })
	if _, err := channel.Revoke(t.Context(), bad, []string{digestIn(bad)}, "backdoor", shop.policy, shop.key, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Load(t.Context()); err == nil {
		t.Error("a revoked model stays")
	}
	shop.promote(good)
	if err := s.Load(t.Context()); err != nil || s.Digest() != digestIn(good) {
		t.Errorf("%s in service, %v; want %s", s.Digest(), err, good)
	}
}

func TestChannelIsFollowed(t *testing.T) {
	s := newShop(t)
	refs := []string{s.push("a", 1, true), s.push("b", 2, true)}
	s.promote(refs[0])
	source := &Channel{Reference: s.folder + ":production", Policy: s.policy}
	m, err := source.Load(t.Context(), "")
	if err != nil || m.Version != "1" || m.Digest != digestIn(refs[0]) {
		t.Fatalf("%+v, %v", m, err)
	}
	if _, err := source.Load(t.Context(), m.Digest); !errors.Is(err, ErrUnchanged) {
		t.Error(err)
	}
	s.promote(refs[1])
	if m, err = source.Load(t.Context(), m.Digest); err != nil || m.Version != "2" || m.Digest != digestIn(refs[1]) {
		t.Fatalf("%+v, %v", m, err)
	}
	source.seen = 7 // as if the registry had gone back in time
	var e *LoadError
	if _, err := source.Load(t.Context(), m.Digest); !errors.As(err, &e) || e.Reason != Unverified {
		t.Errorf("an old record: %v", err)
	}
}

// TestPromotionsDropNothing promotes a model and the one before, again and
// again, while clients ask: every request is answered.
func TestPromotionsDropNothing(t *testing.T) {
	shop := newShop(t)
	models := []string{shop.push("a", 1, true), shop.push("b", 2, true)}
	shop.promote(models[0])
	s := start(t, model(t, small, 9), func(o *Options) {
		o.Source = &Channel{Reference: shop.folder + ":production", Policy: shop.policy}
		o.Poll = 20 * time.Millisecond
	})
	ctx, cancel := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var answered sync.Map // the versions of the answers
	var answers atomic.Int64
	x := make([]float32, small.Input.Size())
	const users = 4
	transport := &http.Transport{MaxIdleConnsPerHost: users}
	defer transport.CloseIdleConnections()
	for i := range users {
		clients.Go(func() {
			c := inference.Client{URL: s.url, Model: "digits", Binary: i%2 == 0, HTTP: &http.Client{Transport: transport}}
			for ctx.Err() == nil {
				a, err := c.Predict(context.Background(), x, 1, small.Input)
				if err != nil {
					t.Error(err)
					return
				}
				answered.Store(a.Version, true)
				answers.Add(1)
				time.Sleep(time.Millisecond) // the promotions need the cores too
			}
		})
	}
	for i := range 4 {
		to := channel.Promotion{Channel: shop.folder + ":production", Model: models[(i+1)%2], Policy: shop.policy, Signer: shop.key, Rollback: i > 0}
		record, err := channel.Promote(t.Context(), to)
		if err != nil {
			t.Fatal(err)
		}
		for ok := false; !ok && !t.Failed(); time.Sleep(time.Millisecond) {
			_, ok = answered.Load(strconv.Itoa(record.Sequence))
		}
	}
	cancel()
	clients.Wait()
	t.Logf("%d answers", answers.Load())
}

func TestFirstPromotionIsWaitedFor(t *testing.T) {
	shop := newShop(t)
	s, err := New(Options{Name: "digits", Source: &Channel{Reference: shop.folder + ":production", Policy: shop.policy}, Poll: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	public, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, public, nil) }()
	expect(t, "GET", "http://"+public.Addr().String()+"/v2/health/ready", "", 503, "")
	shop.promote(shop.push("a", 1, true))
	for !s.Ready() && len(done) == 0 {
		time.Sleep(time.Millisecond)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// runCommand runs the command as its process would.
func runCommand(ctx context.Context, args ...string) (code int, stderr string) {
	var out, errs syncBuffer
	code = step.Run(ctx, Command(), args, &out, &errs)
	return code, strings.Join(errs.lines(), "\n")
}

func TestCommandExitCodes(t *testing.T) {
	s := newShop(t)
	s.push("good", 1, true)
	s.push("unsigned", 2, false)
	private := filepath.Join(t.TempDir(), "cosign.key")
	if err := os.WriteFile(private, []byte("-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----"), 0o600); err != nil {
		t.Fatal(err)
	}
	anywhere := []string{"--listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0", "--admin-listen", ""}
	for _, c := range []struct {
		code int
		args string
		want string
	}{
		{2, "--key " + s.pub, "channel model"},
		{2, "--model x --channel y --key " + s.pub, "none of the others"},
		{2, "--model " + s.folder + ":good", `\"key\" not set`},
		{2, "--model " + s.folder + ":good --key /nowhere.pub", "no such file"},
		{2, "--model " + s.folder + ":good --key " + private, "it is a private key"},
		{2, "--model " + s.folder + ":good --key " + s.pub + " --policy wang", "did you mean"},
		{2, "--model " + s.folder + ":good --key " + s.pub + " --name a/b", "model name"},
		{2, "--model " + s.folder + ":good --key " + s.pub + " --mirror-fraction NaN", "number from 0 to 1"},
		{2, "--model " + s.folder + ":good --key " + s.pub + " --listen 1.2.3.4:99999", "--listen"},
		{2, "--model " + s.folder + ":absent --key " + s.pub, "does not exist"},
		{3, "--model " + s.folder + ":unsigned --key " + s.pub, "not signed"},
		{3, "--model " + s.folder + ":good --key " + s.pub + " --policy ../../../models/zoo/wong.yaml", "no statement"},
		{4, "--model localhost:1/digits:v --key " + s.pub, "localhost:1"},
	} {
		code, stderr := runCommand(t.Context(), append(anywhere, strings.Fields(c.args)...)...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit code %d, want %d with %q: %s", c.args, code, c.code, c.want, stderr)
		}
	}
}

// Loading may take so long that its time is over before the registry's.
func TestLoadTimeoutIsUnavailable(t *testing.T) {
	cmd := &cobra.Command{RunE: func(*cobra.Command, []string) error {
		return exitError(&LoadError{Unavailable, fmt.Errorf("model: %w", context.DeadlineExceeded)})
	}}
	if code := step.Run(t.Context(), cmd, nil, io.Discard, io.Discard); code != step.ExitUnavailable {
		t.Errorf("exit code %d", code)
	}
}

func TestCommandServesAChannel(t *testing.T) {
	s := newShop(t)
	var mirrored sink
	sink := httptest.NewServer(&mirrored)
	defer sink.Close()
	s.promote(s.push("a", 1, true))
	listener, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	t.Setenv("TEMPER_POLL", "20ms")
	ctx, stop := context.WithCancel(t.Context())
	type end struct {
		code   int
		stderr string
	}
	ended := make(chan end, 1)
	go func() {
		code, stderr := runCommand(ctx, "--channel", s.folder+":production", "--key", s.pub, "--listen", address, "--grpc-listen", "", "--admin-listen", "",
			"--mirror", sink.URL, "--mirror-fraction", "0")
		ended <- end{code, stderr}
	}()
	version := func() string {
		resp, err := http.Get("http://" + address + "/v2/models/digits")
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		var m struct{ Versions []string }
		json.NewDecoder(resp.Body).Decode(&m)
		return fmt.Sprint(m.Versions)
	}
	await := func(want string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); version() != want; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("versions %s, want %s", version(), want)
			}
		}
	}
	await("[1]")
	s.promote(s.push("b", 2, true))
	await("[2]")
	expect(t, "POST", "http://"+address+"/v2/models/digits/infer", one, 200, "label")
	http.DefaultClient.CloseIdleConnections()
	stop()
	if e := <-ended; e.code != 0 {
		t.Errorf("exit code %d: %s", e.code, e.stderr)
	} else {
		for line := range strings.Lines(e.stderr) {
			if !json.Valid([]byte(line)) {
				t.Errorf("not a line of JSON: %s", line)
			}
		}
	}
	if n := len(mirrored.events); n != 0 { // all that was queued was sent before the end
		t.Errorf("%d events of a fraction of 0", n)
	}
}

func TestDefaultName(t *testing.T) {
	for ref, want := range map[string]string{
		"localhost:5000/models/mnist:production": "mnist",
		"localhost:5000/mnist@sha256:0":          "mnist",
		"oci:out:v1":                             "out",
		"oci:a/b@sha256:0":                       "b",
		"":                                       "",
	} {
		if got := DefaultName(ref); got != want {
			t.Errorf("%s: %q, want %q", ref, got, want)
		}
	}
}
