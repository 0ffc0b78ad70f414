// Package channel says which model is in service: a channel, such as
// production, is a line of signed records in the repository of its models.
//
// Each record is an artifact that names one model by digest and the record
// before it. Record 7 of channel production has the tag production-000007,
// which is set once, when the record is complete and signed; then the tag
// production is moved to it. A process that ends in between leaves a complete
// record, and whoever reads the channel next finds it.
//
// Beside its channels a repository has one list of revoked digests, which no
// verifier accepts any more (see Revoke).
//
// The tag of a record is the lock of a promotion: of two that race for one
// number, one loses (see store.Reference.Claim). Where the registry cannot be
// relied on for that, a Lock outside of it decides.
package channel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// RecordType is the artifact type of a record.
const RecordType = "application/vnd.temper.promotion.v1+json"

const (
	recordFile = "promotion.json"
	// maxRecord is many times the size of a record.
	maxRecord = 64 << 10
	// maxRecords bounds the walk along a channel: a promotion an hour for a
	// year.
	maxRecords = 10_000
)

// Record is one promotion.
type Record struct {
	Channel  string    `json:"channel"`
	Sequence int       `json:"sequence"`           // 1 for the first
	Model    string    `json:"model"`              // digest
	Report   string    `json:"report,omitempty"`   // digest of the report that the gate decided on
	Previous string    `json:"previous,omitempty"` // digest of the record before, "" for the first
	Rollback bool      `json:"rollback,omitempty"` // on purpose to a model that was in service before, or to a weaker one
	Reason   string    `json:"reason,omitempty"`   // in a person's words
	Time     time.Time `json:"time"`
}

// Head is the record in force.
type Head struct {
	Record
	Digest    string // of the record
	Reference string // of the model, by digest
}

// Read returns the head of a channel, named by its reference such as
// ghcr.io/org/mnist:production. Every record that it relies on must be signed
// as the policy says; whether its model may be used is for verify.Load to
// say (see WithRevoked). A channel without a record is a *store.NotFound.
//
// A registry that hides records can show an old head: a caller that keeps the
// last sequence number it saw finds that out.
func Read(ctx context.Context, channel string, p verify.Policy) (*Head, error) {
	c, err := open(ctx, channel, p)
	if err != nil {
		return nil, err
	}
	defer c.at.Close()
	head, _, err := c.head(ctx)
	if err == nil && head == nil {
		err = &store.NotFound{Reference: c.at.String()}
	}
	return head, err
}

// Previous returns the record before one of a channel, nil for the first.
func Previous(ctx context.Context, channel string, record *Head, p verify.Policy) (*Head, error) {
	c, err := open(ctx, channel, p)
	if err != nil {
		return nil, err
	}
	defer c.at.Close()
	return c.before(ctx, record)
}

// Signer signs what a reference names: a *sign.Key.
type Signer interface {
	Sign(ctx context.Context, ref string) (string, error)
}

// Promotion is what to put into service.
type Promotion struct {
	Channel string        // reference, with the channel as its tag
	Model   string        // reference, in the same repository
	Policy  verify.Policy // that the model must satisfy, and whose keys sign the records
	Signer  Signer        // of the record; one of the policy's keys
	Report  string        // digest of the report that the gate decided on, or ""
	Reason  string        // for the record, or ""

	// InService is the digest of the model that the gate compared with, "" for
	// none: the promotion is refused where that has changed by now. It is nil
	// where nothing was compared.
	InService *string
	// Rollback allows a model that was in service before. The record says that
	// it was asked for, whatever the model.
	Rollback bool
	// Lock decides between promotions at once, whatever the registry does; nil
	// for none. All that promote to a channel must use the same.
	Lock Lock

	Now func() time.Time // time.Now where nil
}

// Conflict says that a promotion does not go with what the channel has become.
type Conflict struct {
	Channel string
	Reason  string
}

func (e *Conflict) Error() string {
	return fmt.Sprintf("channel %s: %s", e.Channel, e.Reason)
}

// Promote verifies a model and makes it the head of a channel. Where it is the
// head already, it stays so without a new record: a promotion that was
// interrupted is completed by running it again.
func Promote(ctx context.Context, p Promotion) (*Head, error) {
	c, err := open(ctx, p.Channel, p.Policy)
	if err != nil {
		return nil, err
	}
	defer c.at.Close()
	model, err := store.Open(ctx, p.Model)
	if err != nil {
		return nil, err
	}
	same := model.Repository() == c.at.Repository()
	model.Close()
	if !same {
		return nil, fmt.Errorf("channel %s and model %s: a channel is in the repository of its models", p.Channel, p.Model)
	}
	rules, err := WithRevoked(ctx, p.Model, p.Policy)
	if err != nil {
		return nil, err
	}
	verified, err := verify.Verify(ctx, p.Model, rules)
	if err != nil {
		return nil, err
	}
	// The lock is read before the line: what it says is on the line by then.
	var locked Place
	if p.Lock != nil {
		if locked, err = p.Lock.Get(ctx, c.at.String()); err != nil {
			return nil, err
		}
	}
	head, tagged, err := c.head(ctx)
	if err != nil {
		return nil, err
	}
	if head, err = c.complete(ctx, head, locked); err != nil {
		return nil, err
	}
	next := Record{Channel: c.at.Tag(), Sequence: 1, Model: verified.Digest, Report: p.Report, Reason: p.Reason, Time: now(p.Now)}
	if head != nil {
		if head.Model == verified.Digest {
			return head, c.move(ctx, head, tagged)
		}
		if p.InService != nil && head.Model != *p.InService {
			with := *p.InService
			if with == "" {
				with = "nothing"
			}
			return nil, &Conflict{p.Channel, fmt.Sprintf("%s is in service, and the gate compared with %s: promote again", head.Model, with)}
		}
		next.Sequence, next.Previous, next.Rollback = head.Sequence+1, head.Digest, p.Rollback
		if !p.Rollback {
			before, err := c.find(ctx, head, verified.Digest)
			if err != nil {
				return nil, err
			}
			if before != nil {
				return nil, &Conflict{p.Channel, fmt.Sprintf("model %s was in service before, as number %d: going back needs an explicit rollback", verified.Digest, before.Sequence)}
			}
		}
	} else if p.InService != nil && *p.InService != "" {
		return nil, &Conflict{p.Channel, "no model is in service, and the gate compared with one"}
	}
	if head, err = c.write(ctx, next, p.Signer); err != nil {
		return nil, err
	}
	if p.Lock != nil {
		if err := p.Lock.Swap(ctx, c.at.String(), locked, Place{head.Sequence, head.Digest}); err != nil {
			return nil, err
		}
	}
	if err := c.claim(ctx, head); err != nil {
		return nil, err
	}
	return head, c.move(ctx, head, "")
}

func now(clock func() time.Time) time.Time {
	if clock == nil {
		clock = time.Now
	}
	return clock().UTC().Truncate(time.Second)
}

type channel struct {
	at *store.Reference
	// policy for records: one of the keys suffices, and nothing is asked about
	// models. A model itself has to satisfy the whole policy.
	policy verify.Policy
}

func open(ctx context.Context, ref string, p verify.Policy) (*channel, error) {
	r, err := store.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	if r.Tag() == "" {
		r.Close()
		return nil, fmt.Errorf("channel %s: write REPOSITORY:CHANNEL, such as %s:production", ref, r.Repository())
	}
	return &channel{at: r, policy: verify.Policy{Keys: p.Keys, Repositories: p.Repositories, Revoked: p.Revoked}}, nil
}

// numbered is the place of a record.
func (c *channel) numbered(sequence int) (*store.Reference, error) {
	return c.at.At(fmt.Sprintf("%s-%06d", c.at.Tag(), sequence))
}

// head returns the last record, nil where there is none, and the digest that
// the channel's tag has, which is an earlier one where a promotion was
// interrupted.
func (c *channel) head(ctx context.Context) (head *Head, tagged string, err error) {
	head, err = c.read(ctx, c.at)
	var absent *store.NotFound
	switch {
	case errors.As(err, &absent):
		head = nil
	case err != nil:
		return nil, "", err
	default:
		tagged = head.Digest
	}
	for range maxRecords {
		want := Record{Sequence: 1}
		if head != nil {
			want = Record{Sequence: head.Sequence + 1, Previous: head.Digest}
		}
		at, err := c.numbered(want.Sequence)
		if err != nil {
			return nil, "", err
		}
		next, err := c.read(ctx, at)
		if errors.As(err, &absent) {
			return head, tagged, nil
		}
		if err != nil {
			return nil, "", err
		}
		if next.Sequence != want.Sequence || next.Previous != want.Previous {
			return nil, "", &store.Refused{Reference: at.String(), Err: fmt.Errorf("it is record %d after %q, where %d after %q belongs", next.Sequence, next.Previous, want.Sequence, want.Previous)}
		}
		head = next
	}
	return nil, "", fmt.Errorf("channel %s: more than %d records after the one that it names", c.at, maxRecords)
}

// read verifies and reads a record.
func (c *channel) read(ctx context.Context, at *store.Reference) (*Head, error) {
	v, err := verify.Verify(ctx, at.String(), c.policy)
	if err != nil {
		return nil, err
	}
	record, err := c.at.At(v.Digest)
	if err != nil {
		return nil, err
	}
	a, err := record.Pull(ctx, store.Want{Type: RecordType, Files: 1, Bytes: maxRecord})
	if err != nil {
		return nil, err
	}
	head := &Head{Digest: v.Digest}
	refuse := func(err error) (*Head, error) { return nil, &store.Refused{Reference: record.String(), Err: err} }
	data, err := a.File(recordFile)
	if err != nil {
		return refuse(err)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&head.Record); err != nil {
		return refuse(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return refuse(errors.New("data after the record's end"))
	}
	model, err := c.at.At(head.Model)
	if err != nil || model.Digest() == "" {
		return refuse(fmt.Errorf("its model is %.100q, not a digest", head.Model))
	}
	if head.Channel != c.at.Tag() || head.Sequence < 1 {
		return refuse(fmt.Errorf("it is record %d of channel %.100q, not of %q", head.Sequence, head.Channel, c.at.Tag()))
	}
	head.Reference = model.String()
	return head, nil
}

// before returns the record that one follows on, nil for the first.
func (c *channel) before(ctx context.Context, record *Head) (*Head, error) {
	if record.Previous == "" {
		return nil, nil
	}
	at, err := c.at.At(record.Previous)
	if err != nil {
		return nil, err
	}
	before, err := c.read(ctx, at)
	if err != nil {
		return nil, err
	}
	if before.Sequence != record.Sequence-1 {
		return nil, &store.Refused{Reference: at.String(), Err: fmt.Errorf("record %d follows on it", record.Sequence)}
	}
	return before, nil
}

// find returns the latest record before head that put a model into service.
func (c *channel) find(ctx context.Context, head *Head, model string) (*Head, error) {
	for range maxRecords {
		before, err := c.before(ctx, head)
		if err != nil || before == nil || before.Model == model {
			return before, err
		}
		head = before
	}
	return nil, fmt.Errorf("channel %s has more than %d records: start a new one", c.at, maxRecords)
}

// write writes and signs a record, which has no place in the line yet.
func (c *channel) write(ctx context.Context, record Record, signer Signer) (*Head, error) {
	digest, err := addSigned(ctx, c.at, RecordType, recordFile, record, signer)
	if err != nil {
		return nil, err
	}
	at, err := c.at.At(digest)
	if err != nil {
		return nil, err
	}
	return c.read(ctx, at) // refuses a signer that is not one of the policy's
}

// claim gives a record its number.
func (c *channel) claim(ctx context.Context, record *Head) error {
	number, err := c.numbered(record.Sequence)
	if err != nil {
		return err
	}
	err = number.Claim(ctx, record.Digest)
	var taken *store.Exists
	if errors.As(err, &taken) {
		return &Conflict{c.at.String(), fmt.Sprintf("another promotion became number %d first: evaluate against it and try again", record.Sequence)}
	}
	return err
}

// move makes the channel's tag name its head.
func (c *channel) move(ctx context.Context, head *Head, tagged string) error {
	if tagged == head.Digest {
		return nil
	}
	return c.at.SetTag(ctx, head.Digest)
}
