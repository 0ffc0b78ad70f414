// Package verify decides whether a model may be used: who signed it, for which
// repository, and what they attest about its robustness. It fails closed:
// whatever is missing, malformed or too large is a refusal.
//
// It links no Kubernetes client and no KMS: keys are public keys as PEM.
package verify

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"regexp"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/temper-ml/temper/models/interval"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
)

// Policy says what an artifact must have to be used.
type Policy struct {
	// Keys are those that may sign; at least one.
	Keys []Key
	// Threshold is how many different keys must have signed, and must have
	// made each statement that is required; 0 means 1.
	Threshold int
	// Repositories are those that a signature may be for, besides the one that
	// the artifact is in: HOST/REPOSITORY, or HOST/PREFIX/* for all below a
	// prefix. A signature of another repository was copied here.
	Repositories []string
	// Robustness, where set, is required of the signed statements about the
	// model; nil asks for a signature only.
	Robustness *Requirement
	// Revoked are digests that are never accepted.
	Revoked []string
}

// Key is a public key and the name to report it by.
type Key struct {
	Name string
	PEM  []byte
}

// Requirement is about two statements, both of which must be there: a test
// result, which must be passed, and the robustness figures. Every statement of
// these types by a key of the policy must satisfy it.
type Requirement struct {
	Dataset    string   // digest of the test split measured on; "" accepts any
	Norm       string   // of the threat model; "" accepts any
	Epsilon    float64  // least epsilon of the threat model
	Clean      float64  // least lower bound of clean accuracy
	Robust     float64  // least lower bound of robust accuracy
	Certified  float64  // least lower bound of what is proven; 0 asks for no proof
	Confidence float64  // of these bounds, which are reckoned anew; 0 takes those that were signed
	Attacks    []string // attacks that must have been tried, such as pgd-50x10
	Suite      string   // ensemble that must have been tried; "" asks for none
	Samples    int      // least samples

	// Checks says what is wrong with the checks that the figures were held to, nil
	// for nothing; where it is nil none are asked for.
	Checks func([]statement.Check) error
}

type trusted struct {
	name     string
	identity string // the DER of the public key
	verifier signature.Verifier
}

var repositoryPattern = regexp.MustCompile(`^[a-z0-9.:\[\]-]+(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(/\*)?$`)

// load checks the policy and returns its keys, each once.
func (p *Policy) load() ([]trusted, error) {
	var keys []trusted
	seen := map[string]bool{}
	for _, k := range p.Keys {
		public, err := cryptoutils.UnmarshalPEMToPublicKey(k.PEM)
		if err != nil {
			return nil, fmt.Errorf("policy: key %q is no PEM public key: %w", k.Name, err)
		}
		if err := cryptoutils.ValidatePubKey(public); err != nil {
			return nil, fmt.Errorf("policy: key %q: %w", k.Name, err)
		}
		der, err := x509.MarshalPKIXPublicKey(public)
		if err != nil {
			return nil, fmt.Errorf("policy: key %q: %w", k.Name, err)
		}
		if seen[string(der)] {
			continue // one key twice counts once
		}
		seen[string(der)] = true
		v, err := signature.LoadVerifier(public, crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("policy: key %q: %w", k.Name, err)
		}
		keys = append(keys, trusted{name: k.Name, identity: string(der), verifier: v})
	}
	if len(keys) == 0 {
		return nil, errors.New("policy: no key: name at least one public key")
	}
	if p.Threshold < 0 || p.threshold() > len(keys) {
		return nil, fmt.Errorf("policy: %d signers are required and %d different keys are given", p.Threshold, len(keys))
	}
	for _, r := range p.Repositories {
		if !repositoryPattern.MatchString(r) || !strings.Contains(r, "/") {
			return nil, fmt.Errorf("policy: repository %q: write HOST/REPOSITORY, or HOST/PREFIX/* for all below a prefix", r)
		}
	}
	for _, d := range p.Revoked {
		if _, err := v1.NewHash(d); err != nil {
			return nil, fmt.Errorf("policy: revoked digest %.100q: write sha256: and 64 lower-case hex digits", d)
		}
	}
	if q := p.Robustness; q != nil {
		for name, v := range map[string]float64{"clean": q.Clean, "robust": q.Robust, "certified": q.Certified, "confidence": q.Confidence} {
			if !(v >= 0 && v <= 1) {
				return nil, fmt.Errorf("policy: least %s is %v: must be from 0 to 1", name, v)
			}
		}
		if !(q.Epsilon >= 0) {
			return nil, fmt.Errorf("policy: least epsilon is %v", q.Epsilon)
		}
	}
	return keys, nil
}

func (p *Policy) threshold() int { return max(p.Threshold, 1) }

// accepts says whether a signature for a repository counts for an artifact in
// another, both as store.Identity.
func (p *Policy) accepts(repository, here string) bool {
	if repository == "" {
		return false
	}
	if repository == here {
		return true
	}
	for _, allowed := range p.Repositories {
		if prefix, ok := strings.CutSuffix(allowed, "/*"); ok {
			if strings.HasPrefix(repository, strings.TrimSuffix(store.Identity(prefix+"/x"), "x")) {
				return true
			}
		} else if repository == store.Identity(allowed) {
			return true
		}
	}
	return false
}

// satisfied says what is wrong with the figures, nil for nothing.
func (q *Requirement) satisfied(r *statement.Robustness) error {
	switch {
	case q.Dataset != "" && r.DatasetDigest != q.Dataset:
		return fmt.Errorf("it was measured on data set %s, not %s", r.DatasetDigest, q.Dataset)
	case q.Norm != "" && r.Threat.Norm != q.Norm:
		return fmt.Errorf("it was attacked within norm %.100q, not %q", r.Threat.Norm, q.Norm)
	case !(r.Threat.Epsilon >= q.Epsilon):
		return fmt.Errorf("it was attacked with epsilon %v, less than %v", r.Threat.Epsilon, q.Epsilon)
	case r.Samples < q.Samples:
		return fmt.Errorf("it was measured on %d samples, less than %d", r.Samples, q.Samples)
	case !(q.bound(r, r.Clean) >= q.Clean):
		return fmt.Errorf("its clean accuracy is at least %v, less than %v", q.bound(r, r.Clean), q.Clean)
	case !(q.bound(r, r.Robust) >= q.Robust):
		return fmt.Errorf("its robust accuracy is at least %v, less than %v", q.bound(r, r.Robust), q.Robust)
	case q.Certified > 0 && r.Certified == nil:
		return errors.New("nothing was proven of it, as is required")
	case q.Certified > 0 && !(q.bound(r, *r.Certified) >= q.Certified):
		return fmt.Errorf("its certified accuracy is at least %v, less than %v", q.bound(r, *r.Certified), q.Certified)
	case q.Suite != "" && r.Suite != q.Suite:
		return fmt.Errorf("it was attacked by the suite %.100q, not %s", r.Suite, q.Suite)
	}
	tried := map[string]bool{}
	for _, a := range r.Attacks {
		tried[a.Name] = true
	}
	for _, want := range q.Attacks {
		if !tried[want] {
			return fmt.Errorf("it was not attacked by %s", want)
		}
	}
	if q.Checks != nil {
		return q.Checks(r.Checks)
	}
	return nil
}

// bound is the lower bound of an accuracy with the confidence that is asked for.
func (q *Requirement) bound(r *statement.Robustness, a statement.Accuracy) float64 {
	if q.Confidence == 0 {
		return a.LowerBound
	}
	return interval.Lower(a.Correct, r.Samples, q.Confidence)
}
