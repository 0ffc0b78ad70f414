package channel_test

import (
	"context"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/store"
)

// memory is a lock in this process. Its after runs when the place has changed,
// and its error is what the promoter dies of.
type memory struct {
	mu    sync.Mutex
	place map[string]channel.Place
	after func() error
}

func (m *memory) Get(_ context.Context, name string) (channel.Place, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.place[name], nil
}

func (m *memory) Swap(_ context.Context, name string, old, next channel.Place) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.place[name] != old {
		return &channel.Conflict{Channel: name, Reason: "changed"}
	}
	if m.place == nil {
		m.place = map[string]channel.Place{}
	}
	m.place[name] = next
	if m.after != nil {
		return m.after()
	}
	return nil
}

// TestCase39LockDecides: with a lock exactly one of those that compared with
// the same model wins, in a registry that decides nothing.
func TestCase39LockDecides(t *testing.T) {
	s := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	newLine(t, strings.TrimPrefix(s.URL, "http://")+"/tiny", 4).race(&memory{})
}

// TestCase41KilledBetweenLockAndRegistry: the record that the lock names gets
// its number from whoever promotes next.
func TestCase41KilledBetweenLockAndRegistry(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 3)
	lock := &memory{}
	promote := func(model int) (*channel.Head, error) {
		p := l.promotion(model)
		p.Lock = lock
		return channel.Promote(t.Context(), p)
	}
	if _, err := promote(0); err != nil {
		t.Fatal(err)
	}
	lock.after = func() error { return errKilled }
	if _, err := promote(1); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	if head, err := l.read(); err != nil || head.Sequence != 1 {
		t.Errorf("serving changed: %+v, %v", head, err)
	}
	lock.after = nil
	// The same again.
	if head, err := promote(1); err != nil || head.Sequence != 2 || head.Model != digest(l.models[1]) {
		t.Errorf("running it again: %+v, %v", head, err)
	}
	if head, err := l.read(); err != nil || head.Sequence != 2 {
		t.Errorf("%+v, %v", head, err)
	}
	// Another one, which follows on the record that was left.
	lock.after = func() error { return errKilled }
	back := l.promotion(0)
	back.Lock, back.Rollback = lock, true
	if _, err := channel.Promote(t.Context(), back); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	lock.after = nil
	if head, err := promote(2); err != nil || head.Sequence != 4 {
		t.Errorf("%+v, %v", head, err)
	}
}

// TestCase37LockRemembers: a registry that shows an earlier state of the line,
// or loses a record, is refused where there is a lock.
func TestCase37LockRemembers(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 2)
	p := l.promotion(0)
	name := l.place + ":production"
	for _, place := range []channel.Place{
		{Sequence: 2, Record: digest(l.models[1])},                 // a gap
		{Sequence: 1, Record: "sha256:" + strings.Repeat("0", 64)}, // lost
		{Sequence: 1, Record: "nonsense"},
		{Sequence: 1, Record: digest(l.models[1])}, // signed, and no record
	} {
		p.Lock = &memory{place: map[string]channel.Place{name: place}}
		var refused *store.Refused
		if head, err := channel.Promote(t.Context(), p); !errors.As(err, &refused) {
			t.Errorf("%+v: %+v, %v", place, head, err)
		}
		var absent *store.NotFound
		if head, err := l.read(); !errors.As(err, &absent) {
			t.Errorf("%+v: there is a head, %+v, %v", place, head, err)
		}
	}
}
