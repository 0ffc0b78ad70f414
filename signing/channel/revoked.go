package channel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// A repository has at most one list of revoked digests: a signed artifact with
// the tag "revoked". Entries are only ever added.
const (
	RevokedType = "application/vnd.temper.revoked.v1+json"
	revokedTag  = "revoked"
	revokedFile = "revoked.json"
	// maxRevoked is many times what a repository revokes in its life.
	maxRevoked = 10_000
	// maxRevokedBytes is for that many entries with a reason each.
	maxRevokedBytes = 8 << 20
	// maxReason is a few sentences.
	maxReason = 500
	// maxRevokeTries is how often others may add to the list at the same
	// moment.
	maxRevokeTries = 10
)

// Revocation is an entry of the list.
type Revocation struct {
	Digest string    `json:"digest"`
	Reason string    `json:"reason"` // in a person's words
	Time   time.Time `json:"time"`
}

// Revoked reads the list of the repository that ref is in; none where it has
// no list. The list must be signed by one of the policy's keys.
//
// A registry that hides the list, or shows an old one, makes entries vanish: a
// caller that keeps those that it saw finds nothing lost.
func Revoked(ctx context.Context, ref string, p verify.Policy) ([]Revocation, error) {
	r, err := store.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	list, _, err := revoked(ctx, r, p)
	return list, err
}

// revoked returns the list and its digest, "" where there is none.
func revoked(ctx context.Context, r *store.Reference, p verify.Policy) ([]Revocation, string, error) {
	tag, err := r.At(revokedTag)
	if err != nil {
		return nil, "", err
	}
	v, err := verify.Verify(ctx, tag.String(), verify.Policy{Keys: p.Keys, Repositories: p.Repositories})
	var absent *store.NotFound
	if errors.As(err, &absent) {
		return nil, "", nil
	}
	if refused := (*store.Refused)(nil); errors.As(err, &refused) {
		return nil, "", fmt.Errorf("list of revoked digests, which any one trusted key may have signed (name them all): %w", err)
	}
	if err != nil {
		return nil, "", err
	}
	at, err := r.At(v.Digest)
	if err != nil {
		return nil, "", err
	}
	a, err := at.Pull(ctx, store.Want{Type: RevokedType, Files: 1, Bytes: maxRevokedBytes})
	if err != nil {
		return nil, "", fmt.Errorf("list of revoked digests: %w", err)
	}
	data, err := a.File(revokedFile)
	var list []Revocation
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(data))
		d.DisallowUnknownFields()
		if err = d.Decode(&list); err == nil {
			if _, end := d.Token(); end != io.EOF {
				err = errors.New("data after the list's end")
			}
		}
	}
	for _, e := range list {
		if at, bad := r.At(e.Digest); bad != nil || at.Digest() == "" {
			err = fmt.Errorf("%.100q is not a digest", e.Digest)
		}
	}
	if err != nil {
		return nil, "", &store.Refused{Reference: at.String(), Err: err}
	}
	return list, v.Digest, nil
}

// WithRevoked is the policy with the digests that are revoked in the
// repository that ref is in.
func WithRevoked(ctx context.Context, ref string, p verify.Policy) (verify.Policy, error) {
	list, err := Revoked(ctx, ref, p)
	if err != nil {
		return p, err
	}
	p.Revoked = slices.Clone(p.Revoked)
	for _, e := range list {
		if !slices.Contains(p.Revoked, e.Digest) {
			p.Revoked = append(p.Revoked, e.Digest)
		}
	}
	return p, nil
}

// Revoke adds digests to the list of the repository that ref is in, and
// returns the digest of the list. What is on it already stays as it was; where
// all of it is, the list is signed once more, which hands it on to a new key.
// Several that revoke at once lose nothing, where the registry keeps If-Match
// (see store.Reference.Expecting).
func Revoke(ctx context.Context, ref string, digests []string, reason string, p verify.Policy, signer Signer, clock func() time.Time) (string, error) {
	if len(reason) > maxReason {
		return "", fmt.Errorf("a reason of more than %d bytes", maxReason)
	}
	r, err := store.Open(ctx, ref)
	if err != nil {
		return "", err
	}
	defer r.Close()
	for _, d := range digests {
		if at, err := r.At(d); err != nil || at.Digest() == "" {
			return "", fmt.Errorf("%.100q is not a digest: write sha256:..., as promote prints it", d)
		}
	}
	for range maxRevokeTries {
		list, before, err := revoked(ctx, r, p)
		if err != nil {
			return "", err
		}
		known := len(list)
		for _, d := range digests {
			if !slices.ContainsFunc(list, func(e Revocation) bool { return e.Digest == d }) {
				list = append(list, Revocation{d, reason, now(clock)})
			}
		}
		if len(list) == known {
			if before == "" {
				return "", errors.New("nothing to revoke: name digests")
			}
			at, err := r.At(before)
			if err != nil {
				return "", err
			}
			_, err = signer.Sign(ctx, at.String())
			return before, err
		}
		if len(list) > maxRevoked {
			return "", fmt.Errorf("%s has more than %d revoked digests: start another repository", r.Repository(), maxRevoked)
		}
		digest, err := addSigned(ctx, r, RevokedType, revokedFile, list, signer)
		if err != nil {
			return "", err
		}
		tag, err := r.At(revokedTag)
		if err != nil {
			return "", err
		}
		err = tag.Expecting(before).SetTag(ctx, digest)
		if store.IsChanged(err) {
			continue
		}
		if err != nil {
			return "", err
		}
		if list, _, err = revoked(ctx, r, p); err != nil { // a signer that is not one of the policy's
			return "", err
		}
		if slices.ContainsFunc(digests, func(d string) bool {
			return !slices.ContainsFunc(list, func(e Revocation) bool { return e.Digest == d })
		}) {
			continue // a registry without If-Match let another list win
		}
		return digest, nil
	}
	return "", &Conflict{r.Repository(), "others go on changing its list of revoked digests: try again"}
}

// addSigned writes and signs an artifact of one JSON file, without a tag.
func addSigned(ctx context.Context, r *store.Reference, kind, file string, content any, signer Signer) (digest string, err error) {
	data, err := json.Marshal(content)
	if err != nil {
		return "", err
	}
	untagged, err := r.At("")
	if err != nil {
		return "", err
	}
	digest, err = untagged.Push(ctx, &store.Artifact{
		Type:  kind,
		Files: []store.File{{Name: file, MediaType: "application/json", Data: append(data, '\n')}},
	})
	if err != nil {
		return "", err
	}
	at, err := r.At(digest)
	if err != nil {
		return "", err
	}
	_, err = signer.Sign(ctx, at.String())
	return digest, err
}
