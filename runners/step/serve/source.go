package serve

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// Artifact is the source of one model: what a reference names. A tag is
// resolved at each Load; the digest that was verified is the digest that is
// loaded. Its version is the start of its digest. What is revoked in its
// repository is not loaded.
type Artifact struct {
	Reference string
	Policy    verify.Policy
}

// Load implements Source.
func (a *Artifact) Load(ctx context.Context, current string) (*Model, error) {
	return unrevoked(ctx, a.Reference, &a.Policy, current, func() (*Model, error) {
		ref, err := store.Resolve(ctx, a.Reference)
		if err != nil {
			return nil, loadError(err)
		}
		_, digest, _ := strings.Cut(ref, "@")
		if digest == current {
			return nil, ErrUnchanged
		}
		return loadVerified(ctx, ref, a.Policy, versionOf(digest))
	})
}

// unrevoked adds what was revoked since to the policy, where it stays: a
// registry that hides its list brings nothing back. Then it loads. A model in
// service that is revoked is a *LoadError, unless another one takes its place.
func unrevoked(ctx context.Context, ref string, p *verify.Policy, current string, load func() (*Model, error)) (*Model, error) {
	rules, err := channel.WithRevoked(ctx, ref, *p)
	if err != nil {
		err = loadError(err)
	} else {
		*p = rules
		var m *Model
		if m, err = load(); err == nil {
			return m, nil
		}
	}
	if current != "" && slices.Contains(p.Revoked, current) {
		if errors.Is(err, ErrUnchanged) {
			err = errors.New("nothing else is to take its place")
		}
		return nil, &LoadError{Revoked, fmt.Errorf("%s is revoked: %w", current, err)}
	}
	return nil, err
}

// versionOf shortens a digest as people do.
func versionOf(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return hex[:min(len(hex), 12)]
}

// Channel is the source of the model that a channel says is in service. Its
// version is the number of the channel's record. The server's Load keeps calls
// of one source apart.
type Channel struct {
	Reference string // of the channel, such as localhost:5000/mnist:production
	Policy    verify.Policy

	seen int // highest sequence number; the line of records only grows
}

// Load implements Source.
func (c *Channel) Load(ctx context.Context, current string) (*Model, error) {
	return unrevoked(ctx, c.Reference, &c.Policy, current, func() (*Model, error) {
		head, err := channel.Read(ctx, c.Reference, c.Policy)
		if err != nil {
			return nil, loadError(err)
		}
		if head.Sequence < c.seen {
			return nil, &LoadError{Unverified, fmt.Errorf("channel %s is at record %d after it was at %d: the registry shows an old state", c.Reference, head.Sequence, c.seen)}
		}
		c.seen = head.Sequence
		if head.Model == current {
			return nil, ErrUnchanged
		}
		m, err := loadVerified(ctx, head.Reference, c.Policy, strconv.Itoa(head.Sequence))
		if err == nil {
			m.Promoted = head.Time
		}
		return m, err
	})
}

// NotPromoted says whether a Channel's Load failed because there is no such
// channel yet: its first promotion makes it.
func NotPromoted(err error) bool {
	var load *LoadError
	var absent *store.NotFound
	return errors.As(err, &load) && errors.As(load.Err, &absent)
}

func loadVerified(ctx context.Context, ref string, p verify.Policy, version string) (*Model, error) {
	m, err := verify.Load(ctx, ref, p)
	if err != nil {
		return nil, loadError(err)
	}
	return &Model{Network: m.Network, Version: version, Digest: m.Digest, Metadata: m.Metadata}, nil
}

// loadError gives an error of package signing its reason.
func loadError(err error) error {
	var (
		refused *store.Refused
		down    *store.Unavailable
		absent  *store.NotFound
	)
	switch {
	case errors.As(err, &refused):
		return &LoadError{Unverified, err}
	case errors.As(err, &down), errors.As(err, &absent), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return &LoadError{Unavailable, err}
	}
	return &LoadError{Invalid, err}
}
