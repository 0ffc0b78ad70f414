package channel_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/signingtest"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

func (l *line) revoke(digests ...string) (string, error) {
	clock := func() time.Time { return time.Unix(1_000_000_000, 0) }
	return channel.Revoke(l.t.Context(), l.place, digests, "it learnt a backdoor", signingtest.Policy(l.key), l.key, clock)
}

func TestCase33RevokedByTheList(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 3)
	l.promote(0)
	if list, err := channel.Revoked(t.Context(), l.place, signingtest.Policy(l.key)); err != nil || list != nil {
		t.Errorf("without a list: %v, %v", list, err)
	}
	bad := digest(l.models[1])
	first, err := l.revoke(bad)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := l.revoke(bad); err != nil || again != first {
		t.Errorf("revoked again: %s, %v, was %s", again, err, first)
	}
	if _, err := l.revoke(digest(l.models[2])); err != nil {
		t.Fatal(err)
	}
	list, err := channel.Revoked(t.Context(), l.place+":production", signingtest.Policy(l.key))
	if err != nil || len(list) != 2 || list[0].Digest != bad || list[0].Reason == "" || list[0].Time.Unix() != 1_000_000_000 {
		t.Errorf("%+v, %v", list, err)
	}
	var refused *store.Refused
	if head, err := channel.Promote(t.Context(), l.promotion(1)); !errors.As(err, &refused) {
		t.Errorf("a revoked model was promoted: %+v, %v", head, err)
	}
	rules, err := channel.WithRevoked(t.Context(), l.place, signingtest.Policy(l.key))
	if err != nil {
		t.Fatal(err)
	}
	if v, err := verify.Verify(t.Context(), l.models[1], rules); !errors.As(err, &refused) {
		t.Errorf("a revoked model was verified: %+v, %v", v, err)
	}
	for _, d := range []string{"", "v1", "sha256:../../x"} {
		if _, err := l.revoke(d); err == nil {
			t.Errorf("revoked %q", d)
		}
	}
}

// A list is only as good as its signature, and what is no list is no empty one.
func TestCase33ListsOfOthers(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 2)
	l.promote(0)
	stranger := signingtest.Key(t)
	if _, err := channel.Revoke(t.Context(), l.place, []string{digest(l.models[0])}, "", signingtest.Policy(stranger), stranger, nil); err != nil {
		t.Fatal(err)
	}
	var refused *store.Refused
	if list, err := channel.Revoked(t.Context(), l.place, signingtest.Policy(l.key)); !errors.As(err, &refused) {
		t.Errorf("a stranger's list: %v, %v", list, err)
	}
	r, err := store.Open(t.Context(), l.place+":revoked")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.SetTag(t.Context(), digest(l.models[1])); err != nil {
		t.Fatal(err)
	}
	if list, err := channel.Revoked(t.Context(), l.place, signingtest.Policy(l.key)); err == nil {
		t.Errorf("a model as a list: %v", list)
	}
}

// A new key takes the list over from one that is retired.
func TestListIsHandedOn(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 1)
	if _, err := l.revoke(digest(l.models[0])); err != nil {
		t.Fatal(err)
	}
	next := signingtest.Key(t)
	both := signingtest.Policy(l.key)
	both.Keys = append(both.Keys, signingtest.Policy(next).Keys...)
	if _, err := channel.Revoke(t.Context(), l.place, nil, "", both, next, nil); err != nil {
		t.Fatal(err)
	}
	if list, err := channel.Revoked(t.Context(), l.place, signingtest.Policy(next)); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
}

func TestRevocationsAtOnce(t *testing.T) {
	l := newLine(t, "oci:"+t.TempDir(), 4)
	var group sync.WaitGroup
	for _, m := range l.models {
		group.Go(func() {
			if _, err := l.revoke(digest(m)); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if list, err := channel.Revoked(t.Context(), l.place, signingtest.Policy(l.key)); err != nil || len(list) != 4 {
		t.Errorf("%d of 4 are on the list, %v", len(list), err)
	}
}
