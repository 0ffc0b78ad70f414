package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/cosign/v2/pkg/oci"
	"github.com/sigstore/cosign/v2/pkg/oci/static"
	"github.com/sigstore/cosign/v2/pkg/types"
	"github.com/sigstore/sigstore/pkg/signature/payload"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
)

// Bounds on what is read before anything is trusted.
const (
	// maxSignatures is a few for each of a few signers, and the work of one
	// verification: signatures times keys.
	maxSignatures = 32
	// maxSignature is many times a cosign payload, a few hundred bytes.
	maxSignature = 64 << 10
	// maxStatement is many times the statements that Temper makes.
	maxStatement = 1 << 20
	// maxTotal bounds the memory for all signatures or statements together.
	maxTotal = 4 << 20
)

const signatureMediaType = types.SimpleSigningMediaType

// Verified is an artifact that a policy accepts. Only its Reference is
// verified: what the original tag names may have changed since.
type Verified struct {
	Reference  string   // with the digest
	Digest     string   // "sha256:..."
	Keys       []string // names of the keys that signed
	TestResult *statement.TestResult
	Robustness *statement.Robustness // nil where the policy does not ask for it
}

// Verify resolves ref once and checks the artifact against the policy. A
// refusal is a *store.Refused.
func Verify(ctx context.Context, ref string, p Policy) (*Verified, error) {
	keys, err := p.load()
	if err != nil {
		return nil, err
	}
	r, err := store.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return verify(ctx, r, &p, keys)
}

// Model is a verified model.
type Model struct {
	Verified
	Network  *nn.Network
	Metadata map[string]string // of the ONNX file
	Files    []store.File      // all of the artifact
}

// File returns the content of a file of the artifact.
func (m *Model) File(name string) ([]byte, error) {
	return (&store.Artifact{Digest: m.Digest, Files: m.Files}).File(name)
}

// maxModel bounds a model artifact: its ONNX file and what describes it.
const maxModel = onnx.MaxSize + 64<<20

// Load verifies a model and reads it, both by the same digest.
func Load(ctx context.Context, ref string, p Policy) (*Model, error) {
	keys, err := p.load()
	if err != nil {
		return nil, err
	}
	r, err := store.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	v, err := verify(ctx, r, &p, keys)
	if err != nil {
		return nil, err
	}
	at, err := r.At(v.Digest)
	if err != nil {
		return nil, err
	}
	a, err := at.Pull(ctx, store.Want{Bytes: maxModel})
	if err != nil {
		return nil, err
	}
	m := &Model{Verified: *v, Files: a.Files}
	data, err := a.File(statement.ModelFile)
	if err == nil {
		m.Network, m.Metadata, err = onnx.Unmarshal(data)
	}
	if err != nil {
		return nil, &store.Refused{Reference: v.Reference, Err: err}
	}
	return m, nil
}

// verifySignature and verifyStatement are cosign's; variables for the test of
// a panic in them.
var (
	verifySignature = cosign.VerifyImageSignature
	verifyStatement = cosign.VerifyBlobAttestation
)

func verify(ctx context.Context, r *store.Reference, p *Policy, keys []trusted) (v *Verified, err error) {
	// Code that panics on what a registry sent has not verified it.
	defer func() {
		if problem := recover(); problem != nil {
			v, err = nil, &store.Refused{Reference: r.String(), Err: fmt.Errorf("verification failed: %v", problem)}
		}
	}()
	at, err := r.Resolve(ctx)
	if err != nil {
		return nil, err
	}
	digest := at.Digest()
	v = &Verified{Reference: at.String(), Digest: digest}
	if slices.Contains(p.Revoked, digest) {
		return nil, refuse(at, "it is revoked")
	}
	check := &check{policy: p, keys: keys, at: at}
	if check.digest, err = v1.NewHash(digest); err != nil {
		return nil, err
	}
	if v.Keys, err = check.signatures(ctx); err != nil {
		return nil, err
	}
	if p.Robustness != nil {
		if v.TestResult, v.Robustness, err = check.statements(ctx); err != nil {
			return nil, err
		}
		if err := check.model(ctx, v.Robustness); err != nil {
			return nil, err
		}
	}
	return v, nil
}

func refuse(at *store.Reference, format string, args ...any) error {
	return &store.Refused{Reference: at.String(), Err: fmt.Errorf(format, args...)}
}

// check is one verification.
type check struct {
	policy *Policy
	keys   []trusted
	at     *store.Reference
	digest v1.Hash
}

// signatures returns the names of the keys that signed the artifact for this
// repository.
func (c *check) signatures(ctx context.Context) ([]string, error) {
	layers, err := c.attached(ctx, "sig", signatureMediaType, maxSignature)
	if err != nil {
		return nil, err
	}
	if len(layers) == 0 {
		return nil, refuse(c.at, "it is not signed")
	}
	var reasons []string
	signers := map[string]bool{}
	for _, l := range layers {
		name, err := c.signer(ctx, l)
		if err != nil {
			reasons = append(reasons, err.Error())
			continue
		}
		signers[name] = true
	}
	if len(signers) < c.policy.threshold() {
		return nil, refuse(c.at, "%d of %d signers: %s", len(signers), c.policy.threshold(), summary(reasons))
	}
	var names []string
	for _, k := range c.keys {
		if signers[k.identity] {
			names = append(names, k.name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// signer returns the identity of the key that made a signature of this
// artifact for this repository.
func (c *check) signer(ctx context.Context, l layer) (string, error) {
	// Certificates, bundles and time stamps beside the signature are left out:
	// only the policy's keys are trusted.
	sig, err := static.NewSignature(l.data, l.annotations[static.SignatureAnnotationKey])
	if err != nil {
		return "", err
	}
	key, err := c.anyKey(func(k trusted) error {
		_, err := verifySignature(ctx, sig, c.digest, c.options(k, cosign.SimpleClaimVerifier))
		return err
	})
	if err != nil {
		return "", err
	}
	var claim payload.Cosign
	if err := json.Unmarshal(l.data, &claim); err != nil {
		return "", fmt.Errorf("malformed payload: %w", err)
	}
	if repository := store.Identity(claim.ClaimedIdentity); !c.policy.accepts(repository, c.at.Identity()) {
		return "", fmt.Errorf("a signature is for repository %.300q, not %q", claim.ClaimedIdentity, c.at.Identity())
	}
	return key, nil
}

func (c *check) options(k trusted, claims func(oci.Signature, v1.Hash, map[string]any) error) *cosign.CheckOpts {
	return &cosign.CheckOpts{SigVerifier: k.verifier, IgnoreTlog: true, Offline: true, ClaimVerifier: claims}
}

// anyKey returns the identity of the key that check accepts.
func (c *check) anyKey(check func(trusted) error) (string, error) {
	var reasons []string
	for _, k := range c.keys {
		err := check(k)
		if err == nil {
			return k.identity, nil
		}
		reasons = append(reasons, fmt.Sprintf("key %q: %v", k.name, err))
	}
	return "", errors.New(strings.Join(reasons, "; "))
}

// summary keeps an error readable where a registry holds many bad signatures.
func summary(reasons []string) string {
	slices.Sort(reasons)
	reasons = slices.Compact(reasons)
	const shown = 3
	if len(reasons) > shown {
		reasons = append(reasons[:shown:shown], fmt.Sprintf("and %d more", len(reasons)-shown))
	}
	if len(reasons) == 0 {
		return "no other signature"
	}
	return strings.Join(reasons, "; ")
}

// statements returns the test result and the figures that enough keys attest.
func (c *check) statements(ctx context.Context) (*statement.TestResult, *statement.Robustness, error) {
	layers, err := c.attached(ctx, "att", types.DssePayloadType, maxStatement)
	if err != nil {
		return nil, nil, err
	}
	var (
		reasons []string
		result  *statement.TestResult
		figures *statement.Robustness
		by      = map[string]map[string]bool{} // statement: keys
	)
	for _, l := range layers {
		s, body, keys, err := c.statement(ctx, l)
		if err != nil {
			reasons = append(reasons, err.Error())
			continue
		}
		if by[body] == nil {
			by[body] = map[string]bool{}
		}
		for _, k := range keys {
			by[body][k] = true
		}
		enough := len(by[body]) >= c.policy.threshold()
		// One key's word is enough to refuse.
		switch s.PredicateType {
		case statement.TestResultType:
			t, err := statement.ParseTestResult(s.Predicate)
			if err == nil && t.Result != statement.Passed {
				err = fmt.Errorf("a signed test result is %s (%s)", t.Result, strings.Join(t.FailedTests, ", "))
			}
			if err != nil {
				return nil, nil, refuse(c.at, "%.2000v", err)
			}
			if enough {
				result = t
			}
		case statement.RobustnessType:
			f, err := statement.ParseRobustness(s.Predicate)
			if err == nil {
				err = c.policy.Robustness.satisfied(f)
			}
			if err != nil {
				return nil, nil, refuse(c.at, "%.2000v", err)
			}
			if enough {
				figures = f
			}
		}
	}
	for name, missing := range map[string]bool{statement.TestResultType: result == nil, statement.RobustnessType: figures == nil} {
		if missing {
			return nil, nil, refuse(c.at, "no statement of type %s by %d of the policy's keys: %s", name, c.policy.threshold(), summary(reasons))
		}
	}
	return result, figures, nil
}

// statement returns a statement about this artifact, its bytes, and the keys
// that signed it.
func (c *check) statement(ctx context.Context, l layer) (*statement.Statement, string, []string, error) {
	att, err := static.NewAttestation(l.data)
	if err != nil {
		return nil, "", nil, err
	}
	var keys, reasons []string
	for _, k := range c.keys {
		if _, err := verifyStatement(ctx, att, c.digest, c.options(k, cosign.IntotoSubjectClaimVerifier)); err != nil {
			reasons = append(reasons, fmt.Sprintf("key %q: %v", k.name, err))
			continue
		}
		keys = append(keys, k.identity)
	}
	if len(keys) == 0 {
		return nil, "", nil, errors.New(strings.Join(reasons, "; "))
	}
	var envelope dsse.Envelope
	if err := json.Unmarshal(l.data, &envelope); err != nil {
		return nil, "", nil, err
	}
	body, err := envelope.DecodeB64Payload()
	if err != nil {
		return nil, "", nil, err
	}
	s, err := statement.Parse(body)
	if err != nil {
		return nil, "", nil, err
	}
	return s, string(body), keys, nil
}

// model refuses figures that are about another model than the artifact holds.
// A modelcar, which holds its files in a tar, is judged by its statements alone.
func (c *check) model(ctx context.Context, figures *statement.Robustness) error {
	m, _, err := c.at.Manifest(ctx)
	if err != nil {
		return err
	}
	found := false
	for _, l := range m.Layers {
		if store.FileName(l) != statement.ModelFile {
			continue
		}
		found = true
		if l.Digest.String() != figures.ModelDigest {
			return refuse(c.at, "its %s is %s, and the signed figures are about %s", statement.ModelFile, l.Digest, figures.ModelDigest)
		}
	}
	if !found && (m.ArtifactType == modelspec.ArtifactTypeModelManifest || m.Config.MediaType == modelspec.MediaTypeModelConfig) {
		return refuse(c.at, "it holds no %s, and the signed figures are about one", statement.ModelFile)
	}
	return nil
}

type layer struct {
	data        []byte
	annotations map[string]string
}

// attached reads the signatures ("sig") or statements ("att") that cosign
// stores beside an artifact.
func (c *check) attached(ctx context.Context, suffix, mediaType string, limit int64) ([]layer, error) {
	list, err := c.at.At("sha256-" + c.digest.Hex + "." + suffix)
	if err != nil {
		return nil, err
	}
	m, _, err := list.Manifest(ctx)
	var absent *store.NotFound
	if errors.As(err, &absent) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(m.Layers) > maxSignatures {
		return nil, refuse(c.at, "it has %d signatures in %s: at most %d", len(m.Layers), list, maxSignatures)
	}
	var total int64
	for _, d := range m.Layers {
		if d.Size < 1 || d.Size > limit || d.Size > maxTotal-total {
			return nil, refuse(c.at, "a signature in %s is %d bytes: at most %d, and %d together", list, d.Size, limit, maxTotal)
		}
		total += d.Size
	}
	var layers []layer
	for _, d := range m.Layers {
		if d.MediaType != mediaType {
			continue // not ours to judge; cosign leaves it alone too
		}
		data, err := list.Blob(ctx, d)
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer{data: data, annotations: d.Annotations})
	}
	return layers, nil
}
