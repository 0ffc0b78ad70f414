package channel_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/store"
)

// line is a channel and models that may be promoted to it.
type line struct {
	t      *testing.T
	place  string
	key    *sign.Key
	models []string
}

func newLine(t *testing.T, place string, models int) *line {
	t.Helper()
	l := &line{t: t, place: place, key: signingtest.Key(t)}
	for i := range models {
		l.models = append(l.models, signingtest.Pack(t, fmt.Sprintf("%s:v%d", place, i), signingtest.Build(t, uint64(i)), l.key))
	}
	return l
}

func (l *line) promotion(model int) channel.Promotion {
	return channel.Promotion{
		Channel: l.place + ":production", Model: l.models[model], Policy: signingtest.Policy(l.key), Signer: l.key,
		Now: func() time.Time { return time.Unix(1_000_000_000, 0) },
	}
}

func (l *line) promote(model int) *channel.Head {
	l.t.Helper()
	head, err := channel.Promote(l.t.Context(), l.promotion(model))
	if err != nil {
		l.t.Fatal(err)
	}
	return head
}

func (l *line) read() (*channel.Head, error) {
	return channel.Read(l.t.Context(), l.place+":production", signingtest.Policy(l.key))
}

func digest(ref string) string { return ref[strings.IndexByte(ref, '@')+1:] }

func TestPromote(t *testing.T) {
	g, err := store.Start(t.Context(), filepath.Join(t.TempDir(), "layout"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for _, place := range []string{g.Addr() + "/team/tiny", "oci:" + t.TempDir()} {
		l := newLine(t, place, 2)
		var absent *store.NotFound
		if _, err := l.read(); !errors.As(err, &absent) {
			t.Errorf("a channel without a record: %v", err)
		}
		first := l.promote(0)
		second := l.promote(1)
		if first.Sequence != 1 || second.Sequence != 2 || second.Previous != first.Digest || second.Reference != l.models[1] {
			t.Errorf("%+v, %+v", first, second)
		}
		if again := l.promote(1); *again != *second {
			t.Errorf("promoted again: %+v, was %+v", again, second)
		}
		head, err := l.read()
		if err != nil || *head != *second {
			t.Errorf("head %+v, %v; want %+v", head, err, second)
		}
		at, err := store.Resolve(t.Context(), place+":production")
		if err != nil || digest(at) != second.Digest {
			t.Errorf("the tag names %s, %v", at, err)
		}
	}
}

func TestCase37NoWayBackWithoutRollback(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 3)
	l.promote(0)
	l.promote(1)
	var conflict *channel.Conflict
	if _, err := channel.Promote(t.Context(), l.promotion(0)); !errors.As(err, &conflict) {
		t.Errorf("an older model: %v", err)
	}
	back := l.promotion(0)
	back.Rollback = true
	head, err := channel.Promote(t.Context(), back)
	if err != nil || head.Sequence != 3 || !head.Rollback {
		t.Errorf("rollback: %+v, %v", head, err)
	}
	// What was asked for is on record, whatever the model: the gate did not
	// compare it.
	fresh := l.promotion(2)
	fresh.Rollback = true
	if head, err = channel.Promote(t.Context(), fresh); err != nil || head.Sequence != 4 || !head.Rollback {
		t.Errorf("rollback to a new model: %+v, %v", head, err)
	}
}

// Of those that compared with the same model exactly one wins.
func TestCase39TwoPromotionsRace(t *testing.T) {
	g, err := store.Start(t.Context(), filepath.Join(t.TempDir(), "layout"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for _, place := range []string{g.Addr() + "/team/tiny", "oci:" + t.TempDir()} {
		newLine(t, place, 3).race(nil)
	}
}

// race promotes all models at once, each compared with none in service: exactly
// one wins, and is the head.
func (l *line) race(lock channel.Lock) {
	l.t.Helper()
	var group sync.WaitGroup
	won := make([]*channel.Head, len(l.models))
	for i := range won {
		group.Go(func() {
			p := l.promotion(i)
			p.Lock, p.InService = lock, new("")
			head, err := channel.Promote(l.t.Context(), p)
			var conflict *channel.Conflict
			if err != nil && !errors.As(err, &conflict) {
				l.t.Error(err)
			}
			won[i] = head
		})
	}
	group.Wait()
	head, err := l.read()
	if err != nil {
		l.t.Fatal(err)
	}
	winners := 0
	for _, w := range won {
		if w == nil {
			continue
		}
		if winners++; *w != *head {
			l.t.Errorf("%s: %+v was told that it won, and the head is %+v", l.place, w, head)
		}
	}
	if winners != 1 || head.Sequence != 1 {
		l.t.Errorf("%s: %d won, and the head is %+v", l.place, winners, head)
	}
}

// Promotions that compared with nothing may win one after the other, and each
// that won is on record.
func TestCase39EachWinnerIsOnRecord(t *testing.T) {
	const racers = 4
	l := newLine(t, "oci:"+t.TempDir(), racers)
	var group sync.WaitGroup
	won := make([]bool, racers)
	for i := range racers {
		group.Go(func() {
			p := l.promotion(i)
			_, err := channel.Promote(t.Context(), p)
			var conflict *channel.Conflict
			if err != nil && !errors.As(err, &conflict) {
				t.Error(err)
			}
			won[i] = err == nil
		})
	}
	group.Wait()
	winners := 0
	for _, w := range won {
		if w {
			winners++
		}
	}
	head, err := l.read()
	if err != nil || winners == 0 || head.Sequence != winners {
		t.Errorf("%d won, and the head is %+v, %v", winners, head, err)
	}
	r, err := store.Open(t.Context(), l.place)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	tags, err := r.Tags(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	records := 0
	for _, tag := range tags {
		if strings.HasPrefix(tag, "production-") {
			records++
		}
	}
	if records != winners {
		t.Errorf("%d won, and there are %d records", winners, records)
	}
}

// killed signs until it is told to die.
type killed struct {
	key   *sign.Key
	after bool // dies after signing
}

var errKilled = errors.New("killed")

func (k killed) Sign(ctx context.Context, ref string) (string, error) {
	if k.after {
		if _, err := k.key.Sign(ctx, ref); err != nil {
			return "", err
		}
	}
	return "", errKilled
}

func TestCase41KilledBetweenSignedAndPromoted(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 3)
	first := l.promote(0)
	for _, after := range []bool{false, true} {
		p := l.promotion(1)
		p.Signer = killed{l.key, after}
		if _, err := channel.Promote(t.Context(), p); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		if head, err := l.read(); err != nil || *head != *first {
			t.Errorf("serving changed: %+v, %v", head, err)
		}
	}
	second := l.promote(1)
	// Killed after the record had its number and before the tag moved.
	r, err := store.Open(t.Context(), l.place+":production")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.SetTag(t.Context(), first.Digest); err != nil {
		t.Fatal(err)
	}
	if head, err := l.read(); err != nil || *head != *second {
		t.Errorf("head %+v, %v; want the complete record %+v", head, err, second)
	}
	if again := l.promote(1); *again != *second {
		t.Errorf("running it again: %+v, was %+v", again, second)
	}
	if at, err := r.Resolve(t.Context()); err != nil || at.Digest() != second.Digest {
		t.Errorf("the tag was not moved on: %v, %v", at, err)
	}
	if third := l.promote(2); third.Sequence != 3 {
		t.Errorf("%+v", third)
	}
}

func TestPromoteRefuses(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 2)
	first := l.promote(0)
	unsigned := signingtest.Pack(t, l.place+":unsigned", signingtest.Build(t, 9))
	elsewhere := signingtest.Pack(t, "oci:"+t.TempDir()+":v1", signingtest.Build(t, 1), l.key)
	stranger := signingtest.Key(t)
	for name, edit := range map[string]func(*channel.Promotion){
		"an unsigned model":                func(p *channel.Promotion) { p.Model = unsigned },
		"a model of another repository":    func(p *channel.Promotion) { p.Model = elsewhere },
		"a policy that it does not meet":   func(p *channel.Promotion) { p.Policy.Robustness.Robust = 0.99 },
		"a signer that is not trusted":     func(p *channel.Promotion) { p.Signer = stranger },
		"a channel without a name":         func(p *channel.Promotion) { p.Channel = l.place },
		"a gate that compared with others": func(p *channel.Promotion) { p.InService = new(digest(l.models[1])) },
		"a gate that compared with none":   func(p *channel.Promotion) { p.InService = new("") },
	} {
		p := l.promotion(1)
		edit(&p)
		if head, err := channel.Promote(t.Context(), p); err == nil {
			t.Errorf("%s: promoted as %+v", name, head)
		}
		if head, err := l.read(); err != nil || *head != *first {
			t.Errorf("%s: the head is %+v, %v", name, head, err)
		}
	}
	p := l.promotion(1)
	p.InService = &first.Model
	if _, err := channel.Promote(t.Context(), p); err != nil {
		t.Error(err)
	}
	p = l.promotion(0)
	p.Channel = l.place + ":empty"
	p.InService = &first.Model
	var conflict *channel.Conflict
	if _, err := channel.Promote(t.Context(), p); !errors.As(err, &conflict) {
		t.Errorf("compared with a model where none is in service: %v", err)
	}
	p.InService = new("")
	if _, err := channel.Promote(t.Context(), p); err != nil {
		t.Error(err)
	}
}

// A record that is signed for one channel says nothing about another.
func TestRecordsOfOtherChannels(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 2)
	staging := l.promotion(0)
	staging.Channel = l.place + ":staging"
	record, err := channel.Promote(t.Context(), staging)
	if err != nil {
		t.Fatal(err)
	}
	r, err := store.Open(t.Context(), l.place+":production")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.SetTag(t.Context(), record.Digest); err != nil {
		t.Fatal(err)
	}
	var refused *store.Refused
	if head, err := l.read(); !errors.As(err, &refused) {
		t.Errorf("head %+v, %v", head, err)
	}
	// Nor is a model a record.
	if err := r.SetTag(t.Context(), digest(l.models[0])); err != nil {
		t.Fatal(err)
	}
	if head, err := l.read(); !errors.As(err, &refused) {
		t.Errorf("head %+v, %v", head, err)
	}
}
