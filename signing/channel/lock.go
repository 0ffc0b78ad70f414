package channel

import (
	"context"
	"errors"
	"fmt"

	"github.com/temper-ml/temper/signing/store"
)

// Lock holds, outside of the registry, the place of each channel's last record.
// Whoever changes it has the next number: it is changed by compare-and-swap, by
// exactly one of several at once, and nobody can hold it for longer.
//
// It also remembers what a registry may hide: a line that ends before the place
// is refused.
type Lock interface {
	// Get returns the place that was set last, the zero Place where none was.
	Get(ctx context.Context, channel string) (Place, error)
	// Swap changes the place. Where it is no longer old, the error is a
	// *Conflict.
	Swap(ctx context.Context, channel string, old, next Place) error
}

// Place is a record's place in the line of its channel.
type Place struct {
	Sequence int    `json:"sequence"` // 0 for none
	Record   string `json:"record"`   // digest
}

// complete returns the head as the lock has it. A process that ended between
// the lock and the registry left a record that has no number yet: it gets that
// here.
func (c *channel) complete(ctx context.Context, head *Head, locked Place) (*Head, error) {
	last := Record{}
	digest := ""
	if head != nil {
		last, digest = head.Record, head.Digest
	}
	if locked.Sequence <= last.Sequence {
		return head, nil // somebody promoted without the lock; the line is what servers see
	}
	refuse := func(err error) (*Head, error) {
		return nil, &store.Refused{Reference: c.at.String(), Err: fmt.Errorf("the lock says that record %d is the last, %s, and the registry does not have it: %w; restore the registry, or remove the channel's entry from the lock", locked.Sequence, locked.Record, err)}
	}
	if locked.Sequence > last.Sequence+1 {
		return refuse(fmt.Errorf("its line ends with number %d", last.Sequence))
	}
	at, err := c.at.At(locked.Record)
	if err != nil || at.Digest() == "" {
		return refuse(fmt.Errorf("%.100q is not a digest", locked.Record))
	}
	record, err := c.read(ctx, at)
	var absent *store.NotFound
	switch {
	case errors.As(err, &absent):
		return refuse(err)
	case err != nil:
		return nil, err
	case record.Sequence != locked.Sequence || record.Previous != digest:
		return refuse(fmt.Errorf("it is record %d after %q, and the line ends with number %d, %q", record.Sequence, record.Previous, last.Sequence, digest))
	}
	return record, c.claim(ctx, record)
}
