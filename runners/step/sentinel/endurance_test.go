package sentinel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/serve"
)

// observe takes the same images n times.
func (f *fixture) observe(x []float32, n int) {
	f.t.Helper()
	for range n {
		if err := f.Observe(Observation{Pixels: x, N: len(x) / shape.Size()}); err != nil {
			f.t.Fatal(err)
		}
	}
}

// Hostile-looking traffic cannot make its owner retrain again and again: not
// by going on, not by coming and going for three days.
func TestCase59BudgetOfDefences(t *testing.T) {
	d := &defence{make(chan Incident, 1000), errors.New("no better model")}
	f := start(t, func(c *Config) { c.Defence, c.Budget, c.Circuit = d, 3, 1000 })
	quiet := clean(200, 5)
	states := map[string]int{}
	began := f.clock.Now()
	var starts []time.Time
	for f.clock.Now().Sub(began) < 72*time.Hour {
		f.observe(hostile(f.model), 20)
		f.starts.Wait()
		for len(d.started) > 0 {
			<-d.started
			starts = append(starts, f.clock.Now())
		}
		st := f.Status()
		states[st.State]++
		if st.Begun > 3 {
			t.Fatalf("%d defences in 24 hours", st.Begun)
		}
		if st.State == Alarm && st.Open.Held != HeldBudget {
			t.Fatalf("held for %q", st.Open.Held)
		}
		f.observe(quiet, 3) // the attacker pauses until the alarm is over
		f.wait(3 * time.Hour)
	}
	for i, at := range starts {
		if in := slices.IndexFunc(starts[i:], func(s time.Time) bool { return s.Sub(at) >= budgetTime }); in > 3 || in < 0 && len(starts)-i > 3 {
			t.Errorf("more than 3 defences within 24 hours of %v", at)
		}
	}
	if len(starts) < 6 || len(starts) > 12 {
		t.Errorf("%d defences in three days, the budget is 3 a day", len(starts))
	}
	if states[Alarm] == 0 {
		t.Errorf("beyond the budget there was no alert: %v", states)
	}
}

// One attack that does not stop is one incident, and one run is in flight.
func TestCase59OneRunInFlight(t *testing.T) {
	blocked := make(chan struct{})
	var mu sync.Mutex
	running, most, total := 0, 0, 0
	f := start(t, func(c *Config) {
		c.Budget = 1000
		c.Defence = defenceFunc(func(ctx context.Context, i Incident) error {
			mu.Lock()
			running++
			total++
			most = max(most, running)
			mu.Unlock()
			defer func() { mu.Lock(); running--; mu.Unlock() }()
			select {
			case <-blocked:
			case <-ctx.Done():
			}
			return nil
		})
	})
	for range 24 * 4 { // the defence hangs for a day, the incident is given up
		f.observe(hostile(f.model), 20)
		f.wait(15 * time.Minute)
	}
	mu.Lock()
	if most != 1 || total != 1 {
		t.Errorf("%d runs, %d at once, want 1", total, most)
	}
	mu.Unlock()
	if st := f.Status(); st.State == Alarm && st.Open.Held != HeldRunning {
		t.Errorf("held for %q", st.Open.Held)
	}
	close(blocked)
}

type defenceFunc func(context.Context, Incident) error

func (d defenceFunc) Start(ctx context.Context, i Incident) error { return d(ctx, i) }

// Poisoned labels: one client with nearly all labels, flipped ones, and the
// same ones again. They neither raise an alarm nor drown the others.
func TestCase60PoisonedLabels(t *testing.T) {
	for _, flipped := range []float64{0.05, 0.4, 1} {
		f := start(t, nil)
		id := f.send(clean(1000, 21))
		scorer, err := f.model.Detector.Scorer(f.model.Network)
		if err != nil {
			t.Fatal(err)
		}
		scores, err := scorer.Score(clean(1000, 21), 1000)
		if err != nil {
			t.Fatal(err)
		}
		taken := map[string]int{}
		refused := map[error]int{}
		next := 0
		say := func(source string, wrong bool) {
			label := scores[next].Served
			if wrong {
				label = (label + 1) % 3
			}
			err := f.Feedback(Feedback{ID: id, Index: next, Label: label, Source: source})
			if err == nil {
				taken[source]++
				next++
			}
			refused[err]++
		}
		for i := range 400 {
			f.clock.Add(3 * time.Second)
			say(fmt.Sprint("honest-", i%3), false)
			for k := range 9 { // nine of ten labels are the client's
				f.clock.Add(time.Second)
				say("poisoner", float64((i*9+k)%20) < 20*flipped)
			}
			if next >= 990 {
				break
			}
		}
		honest := taken["honest-0"] + taken["honest-1"] + taken["honest-2"]
		if taken["poisoner"] > honest+sourceBurst {
			t.Errorf("%v flipped: %d labels of one client beside %d of all others", flipped, taken["poisoner"], honest)
		}
		st := f.Status()
		if flipped >= 0.4 && (st.Banned != 1 || refused[errBanned] == 0) {
			t.Errorf("%v flipped: no quarantine: %+v", flipped, st)
		}
		if flipped >= 0.4 && taken["poisoner"] > 120 {
			t.Errorf("%v flipped: %d labels before the quarantine", flipped, taken["poisoner"])
		}
		if flipped < 0.4 && st.Banned != 0 {
			t.Errorf("%v flipped: in quarantine for what an honest mistake may be", flipped)
		}
		// Alarms on labels start nothing, and an attack is answered all the same.
		if st.State != Normal || len(f.defence.started) != 0 {
			t.Errorf("%v flipped: %+v", flipped, st)
		}
		if honest < 100 {
			t.Errorf("%v flipped: only %d labels of honest sources were taken", flipped, honest)
		}
		if err := f.Feedback(Feedback{ID: id, Index: 0, Label: 0, Source: "again"}); !errors.Is(err, errLabelled) {
			t.Errorf("the same image again: %v", err)
		}
	}
}

// An honest source is not taken for a poisoner when the model is wrong: then
// all sources contradict it.
func TestCase60HonestSourcesStay(t *testing.T) {
	var s sources
	s.init()
	for i := range 5000 {
		if s.count(fmt.Sprint("source-", i%7), i%3 != 0) {
			t.Fatal("in quarantine for telling the truth")
		}
	}
	if s.banned() != 0 || len(s.told) != 7 || s.total.Labels > maxTally {
		t.Errorf("%+v", s)
	}
}

// labelled is an anchor set: images with the classes that a network gives them.
func labelled(t *testing.T, n *nn.Network) Examples {
	t.Helper()
	x := clean(500, 77)
	f, err := nn.NewForward(n, 500)
	if err != nil {
		t.Fatal(err)
	}
	logits := f.Logits(x, 500)
	e := Examples{Name: "anchors", Shape: shape, Images: x}
	for i := range 500 {
		best := 0
		for c := range 3 {
			if logits[i*3+c] > logits[i*3+best] {
				best = c
			}
		}
		e.Labels = append(e.Labels, uint8(best))
	}
	return e
}

func TestCase61AnchorOfAnotherShape(t *testing.T) {
	first := model(t, "v1", 1)
	e := labelled(t, first.Network)
	e.Shape.Channels = 3
	s, err := New(Config{Anchors: []Examples{e}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Use(first); err == nil || !strings.Contains(err.Error(), "--anchor") {
		t.Errorf("an anchor set with images of another shape: %v", err)
	}
}

// A model that is led astray in small steps, each hardly worse than the one
// before, is compared with where it began: the circuit opens.
func TestCase61SlowDrift(t *testing.T) {
	first := model(t, "v1", 1)
	f := start(t, func(c *Config) { c.Anchors = []Examples{labelled(t, first.Network)} })
	opened := 0
	for step := 1; step <= 12 && opened == 0; step++ {
		m := model(t, fmt.Sprint("step-", step), 1)
		m.Network = m.Network.Clone()
		other := network(t, 50)
		for i := range m.Network.Flat() { // a little more of another network
			m.Network.Flat()[i] += float32(step) * 0.04 * other.Flat()[i]
		}
		before := f.Status()
		d := *m.Detector
		d.Calibration.Model = detect.Digest(m.Network)
		m.Detector = &d
		if err := f.Use(m); err != nil {
			t.Fatal(err)
		}
		a, err := accuracies(m.Network, f.config.Anchors)
		if err != nil {
			t.Fatal(err)
		}
		st := f.Status()
		if (a[0] < 1-DefaultAnchorDrop) != (st.Circuit != "") {
			t.Fatalf("step %d: accuracy %.3f on the anchors, circuit %q", step, a[0], st.Circuit)
		}
		if st.Circuit != "" {
			opened = step
			if before.Circuit != "" || len(st.Incidents) == 0 || st.Incidents[len(st.Incidents)-1].Cause != Anchor {
				t.Errorf("%+v", st)
			}
			f.model = m
		}
	}
	if opened < 2 {
		t.Fatalf("the circuit opened at step %d, want some small steps first", opened)
	}
	// An attack on such a model starts nothing before a person approves
	f.wait(DefaultCooldown)
	f.change(func(now time.Time) {
		f.raise(Attack, now)
		if f.state() != Alarm || f.open.Held != HeldApproval {
			t.Errorf("%s, %+v", f.state(), f.open)
		}
	})
	if len(f.defence.started) != 0 {
		t.Error("a defence started on a model that was led astray")
	}
}

// After N defences that led to no better model none starts until a person
// approves.
func TestCase62CircuitBreaker(t *testing.T) {
	d := &defence{make(chan Incident, 100), fmt.Errorf("robust accuracy is below its floor: %w", ErrRejected)}
	f := start(t, func(c *Config) { c.Defence, c.Budget = d, 100 })
	incident := func() Status {
		t.Helper()
		f.observe(hostile(f.model), 20)
		f.starts.Wait()
		return f.Status()
	}
	for n := range DefaultCircuit {
		st := incident()
		if len(st.Incidents) != n+1 || st.Incidents[n].Outcome != Rejected || (st.Circuit != "") != (n+1 == DefaultCircuit) {
			t.Fatalf("after %d rejected candidates: %+v", n+1, st)
		}
		f.wait(patience * DefaultCooldown)
	}
	st := incident()
	if st.State != Alarm || st.Open.Held != HeldApproval || len(d.started) != DefaultCircuit {
		t.Fatalf("the circuit is open: %+v, %d defences", st, len(d.started))
	}
	for path, h := range map[string]string{"/approve": "", "/": "yes"} { // not on the public port, not from any page
		r := httptest.NewRequest(http.MethodPost, path, nil)
		r.Header.Set(approveHeader, h)
		w := httptest.NewRecorder()
		f.Admin().ServeHTTP(w, r)
		f.Handler().ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/approve", nil))
		if w.Code/100 != 4 || f.Status().Circuit == "" {
			t.Errorf("POST %s: %d", path, w.Code)
		}
	}
	admin := httptest.NewServer(f.Admin())
	defer admin.Close()
	if code, _, stderr := run(t.Context(), "approve", "--admin", strings.TrimPrefix(admin.URL, "http://")); code != step.ExitDone {
		t.Fatal(code, stderr)
	}
	f.starts.Wait()
	if st := f.Status(); st.Circuit != "" || len(d.started) != DefaultCircuit+1 || st.Incidents[len(st.Incidents)-1].Outcome != Rejected {
		t.Errorf("after the approval: %+v", st)
	}
	if err := f.Use(model(t, "v2", 2)); err != nil {
		t.Fatal(err)
	}
}

// A defence that suspends itself starts, and is told that a person must let it
// through; when it led to a better model the circuit is closed.
func TestCase62SuspendedWorkflow(t *testing.T) {
	f := start(t, func(c *Config) { c.Suspends = true })
	f.change(func(time.Time) { f.breakCircuit("a test") })
	f.attack()
	if i := <-f.defence.started; !i.Approval {
		t.Errorf("%+v", i)
	}
	if err := f.Use(model(t, "v2", 2)); err != nil {
		t.Fatal(err)
	}
	if st := f.Status(); st.Circuit != "" {
		t.Errorf("%+v", st)
	}
}

// A sentinel that is killed at any moment goes on where it was: the same
// incident, the same budget, no event counted twice, and the defence of one
// incident under one name.
func TestCase63Restart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sentinel.db")
	now := &clock{now: time.Unix(1e9, 0)}
	d := newDefence()
	m := model(t, "v1", 1)
	open := func() *Sentinel {
		t.Helper()
		s, err := New(Config{Defence: d, Now: now.Now, State: path})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Use(m); err != nil {
			t.Fatal(err)
		}
		return s
	}
	// kill ends it as a crash does: nothing is written any more.
	kill := func(s *Sentinel) {
		s.starts.Wait()
		if err := s.disk.file.Close(); err != nil {
			t.Fatal(err)
		}
	}
	event := func(s *Sentinel, id string) int {
		r := httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(requestBody(clean(1, 1))))
		for k, v := range binaryMode(serve.RequestEvent, id) {
			r.Header.Set(k, v)
		}
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		return s.Status().Waiting
	}
	s := open()
	if event(s, "a") != 1 {
		t.Fatal("an event was not taken")
	}
	for range 3 {
		if err := s.Observe(Observation{Pixels: clean(1, 1), N: 1}); err != nil {
			t.Fatal(err)
		}
	}
	now.Add(2 * saveEvery)
	s.Status()
	if _, err := New(Config{State: path}); err == nil || !strings.Contains(err.Error(), "another sentinel") {
		t.Errorf("two sentinels with one state: %v", err)
	}
	level := s.Status().Attack.Level
	kill(s)

	s = open()
	if st := s.Status(); st.Requests != 3 || level == 0 || st.Attack.Level < level-1e-9 || st.Attack.Level > level+1e-9 {
		t.Fatalf("after a crash: %+v, level %v before", st, level)
	}
	if event(s, "a") != 0 {
		t.Error("an event from before the restart was counted again")
	}
	for range 10 {
		s.Observe(Observation{Pixels: hostile(m), N: 1})
	}
	first := <-d.started
	kill(s) // at once: the incident was written before its defence started

	for _, jump := range []time.Duration{0, 30 * 24 * time.Hour, -60 * 24 * time.Hour} { // and the clock is set
		now.Add(jump)
		s = open()
		for range 50 {
			s.Observe(Observation{Pixels: hostile(m), N: 1})
		}
		s.starts.Wait()
		st := s.Status()
		if st.State != Defending || st.Open.ID != first.ID || st.Begun != 1 {
			t.Fatalf("after a restart and a jump of %v: %+v", jump, st)
		}
		kill(s)
	}
	for len(d.started) > 0 {
		if i := <-d.started; i.ID != first.ID {
			t.Errorf("a second incident %s for one attack, after %s", i.ID, first.ID)
		}
	}

	// It recovers; the cooldown and the budget outlive a restart too.
	s = open()
	v2 := model(t, "v2", 2)
	if err := s.Use(v2); err != nil {
		t.Fatal(err)
	}
	s.Close()
	m = v2
	s = open()
	defer s.Close()
	if st := s.Status(); st.State != Cooldown || st.Begun != 1 || len(st.Incidents) != 1 || st.Incidents[0].Outcome != Recovered {
		t.Errorf("after the recovery: %+v", st)
	}
	for range 50 {
		s.Observe(Observation{Pixels: hostile(m), N: 1})
	}
	if s.Status().Open != nil || len(d.started) != 0 {
		t.Error("an incident in the cooldown")
	}
}

// A wall clock that is set while the sentinel watches ends no incident, starts no
// second defence and renews no budget, ahead or back.
func TestCase63ClockJumpsWhileItWatches(t *testing.T) {
	f := start(t, func(c *Config) { c.Budget = 1 })
	f.attack()
	first := <-f.defence.started
	f.starts.Wait()
	for _, jump := range []time.Duration{30 * 24 * time.Hour, -60 * 24 * time.Hour, 365 * 24 * time.Hour} {
		f.clock.Add(jump)
		f.observe(hostile(f.model), 50)
		if st := f.Status(); st.State != Defending || st.Open.ID != first.ID || st.Begun != 1 {
			t.Fatalf("after a jump of %v: %+v", jump, st)
		}
	}
	f.model = model(t, "v2", 2)
	if err := f.Use(f.model); err != nil {
		t.Fatal(err)
	}
	f.wait(patience * DefaultCooldown)
	f.clock.Add(30 * 24 * time.Hour)
	f.attack() // another one, within the day
	if st := f.Status(); st.State != Alarm || st.Open.Held != HeldBudget || len(f.defence.started) != 0 {
		t.Errorf("a clock that jumped renewed the budget: %+v", st)
	}
}

// A defence that was cut off by a restart goes on, under the same name, with
// the same evidence.
func TestCase63DefenceGoesOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sentinel.db")
	started := make(chan Incident, 9)
	hang := defenceFunc(func(ctx context.Context, i Incident) error { started <- i; <-ctx.Done(); return ctx.Err() })
	m := model(t, "v1", 1)
	kept := 0
	keep := func(context.Context, Incident) (string, error) { kept++; return "oci:evidence@sha256:1", nil }
	s, err := New(Config{Defence: hang, State: path, Keep: keep})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Use(m); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		s.Observe(Observation{Pixels: hostile(m), N: 1})
	}
	first := <-started
	s.Close()
	if s, err = New(Config{Defence: hang, State: path, Keep: keep}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Use(m); err != nil {
		t.Fatal(err)
	}
	again := <-started
	if again.ID != first.ID || again.Kept != first.Kept || again.Kept == "" || kept != 1 || again.Epsilon != first.Epsilon {
		t.Errorf("began %+v, went on with %+v; evidence kept %d times", first, again, kept)
	}
}

// A state file that is damaged, or of another program, is an error that says
// what to do, and never an empty state.
func TestStateRefuses(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.db")
	if err := os.WriteFile(bad, bytes.Repeat([]byte("not a database "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(dir, "good.db")
	s, err := New(Config{State: good})
	if err != nil {
		t.Fatal(err)
	}
	s.disk.save(&memory{Version: stateVersion + 1}, nil)
	s.disk.file.Close()
	for path, want := range map[string]string{bad: "state", good: "name another file", filepath.Join(dir, "no", "folder"): "state"} {
		if _, err := New(Config{State: path}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v", path, err)
		}
	}
}

// Evidence is a data set in a repository, by digest, with what it is about.
func TestEvidenceIsKept(t *testing.T) {
	repository := "oci:" + filepath.Join(t.TempDir(), "layout")
	f := start(t, func(c *Config) { c.Keep = Keeper(repository) })
	f.attack()
	i := <-f.defence.started
	if !strings.Contains(i.Kept, "@sha256:") {
		t.Fatalf("kept as %q", i.Kept)
	}
	splits, err := artifact.OpenDataset(t.Context(), i.Kept)
	if err != nil {
		t.Fatal(err)
	}
	if splits.Test.Len() != len(i.Evidence) || splits.Train.Len() != 0 || !slices.Equal(splits.Test.Floats[:shape.Size()], i.Evidence[0].Pixels) {
		t.Errorf("%d images, %d pieces of evidence", splits.Test.Len(), len(i.Evidence))
	}
	f.starts.Wait()
	if st := f.Status(); st.Open.Kept != i.Kept || st.Open.Share < 0.5 || st.Open.Epsilon < 0.25 || st.Open.Epsilon > 0.35 {
		t.Errorf("%+v", st.Open)
	}
	// A registry that is down does not delay the defence for long.
	f = start(t, func(c *Config) {
		c.Keep = func(context.Context, Incident) (string, error) { return "", errors.New("down") }
	})
	f.attack()
	if i := <-f.defence.started; i.Kept != "" {
		t.Errorf("%+v", i)
	}
}

// Drift comes with evidence too: what was unlike the calibration. It starts
// nothing, and while it lasts it does not fill the registry.
func TestEvidenceOfDrift(t *testing.T) {
	repository := "oci:" + filepath.Join(t.TempDir(), "layout")
	var mu sync.Mutex
	var kept []Incident
	f := start(t, func(c *Config) {
		push := Keeper(repository)
		c.Keep = func(ctx context.Context, i Incident) (string, error) {
			mu.Lock()
			defer mu.Unlock()
			kept = append(kept, i)
			return push(ctx, i)
		}
	})
	scorer, err := f.model.Detector.Scorer(f.model.Network)
	if err != nil {
		t.Fatal(err)
	}
	var unusual []float32 // of brighter images, one that is no attack
	x := clean(500, 41)
	for i := range x {
		x[i] = min(x[i]+0.2, 1)
	}
	scores, err := scorer.Score(x, x.Len())
	if err != nil {
		t.Fatal(err)
	}
	for i, score := range scores {
		if score.Shifted {
			unusual = x.at(i)
		}
	}
	if unusual == nil {
		t.Fatal("no brighter image is unusual")
	}
	drifts := func() (found []Incident) {
		for _, i := range f.Status().Incidents {
			if i.Cause != Drift {
				t.Fatalf("%+v", i)
			}
			found = append(found, i)
		}
		return found
	}
	for n := 0; len(drifts()) == 0; n++ {
		if n == 100 {
			t.Fatal("no drift after 100 unusual requests")
		}
		f.observe(unusual, 1)
	}
	f.starts.Wait()
	i := drifts()[0]
	splits, err := artifact.OpenDataset(t.Context(), i.Kept)
	if err != nil {
		t.Fatalf("%+v: %v", i, err)
	}
	if len(kept) != 1 || splits.Test.Len() != len(kept[0].Evidence) || !slices.Equal(splits.Test.Floats[:shape.Size()], unusual) || len(f.defence.started) != 0 {
		t.Errorf("%d images of %d incidents, %d defences", splits.Test.Len(), len(kept), len(f.defence.started))
	}
	for range 3 * int(driftEvery/DefaultCooldown) { // it lasts
		f.wait(DefaultCooldown)
		f.observe(unusual, 50)
	}
	f.starts.Wait()
	if n := len(kept); n < 2 || n > 4 || len(drifts()) < 2*n {
		t.Errorf("kept %d times in %v, %d times reported", n, 3*driftEvery, len(drifts()))
	}
}

// A million requests with incidents and labels leave memory and disk flat. TEMPER_REQUESTS asks for more: 10 million are what a day brings.
func TestFlatMemoryAndDisk(t *testing.T) {
	if testing.Short() || raceDetector {
		t.Skip("a simulation")
	}
	total := 1_000_000
	if text := os.Getenv("TEMPER_REQUESTS"); text != "" {
		if _, err := fmt.Sscan(text, &total); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "sentinel.db")
	f := start(t, func(c *Config) { c.State, c.Budget, c.Circuit, c.Cooldown = path, 1000, 1000, time.Second })
	x, bad := clean(1000, 31), hostile(f.model)
	measure := func() (heap uint64, disk int64) {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return m.HeapAlloc, info.Size()
	}
	var heap, halfHeap uint64
	var disk, halfDisk int64
	const batch = 1000
	for n := 0; n < total; n += batch {
		f.clock.Add(100 * time.Millisecond)
		id := fmt.Sprint("batch-", n)
		if err := f.Observe(Observation{ID: id, Pixels: x, N: batch}); err != nil {
			t.Fatal(err)
		}
		for k := range 100 { // deliveries and labels as they come
			m := &message{event.New(), -1}
			m.SetID(fmt.Sprint(id, "-", k))
			f.mu.Lock()
			f.pending.first(m)
			f.mu.Unlock()
			f.Feedback(Feedback{ID: id, Index: k, Label: k % 3, Source: fmt.Sprint("source-", (n/batch+k)%3000)})
		}
		if n/batch%100 == 50 {
			f.observe(bad, 20)
		}
		select {
		case <-f.defence.started:
			m := model(t, fmt.Sprint("v", n), 1)
			if err := f.Use(m); err != nil {
				t.Fatal(err)
			}
		default:
		}
		*f.told = nil
		if n == total/2 {
			halfHeap, halfDisk = measure()
		}
	}
	heap, disk = measure()
	t.Logf("%d requests: heap %.1f MB then %.1f MB, disk %.2f MB then %.2f MB, %d incidents", total, float64(halfHeap)/1e6, float64(heap)/1e6, float64(halfDisk)/1e6, float64(disk)/1e6, f.raised)
	// Two generations of deliveries and their copies while one is dropped are
	// 8 MB, which the file grows to in steps; ten times the requests too.
	if heap > halfHeap+8<<20 || disk > 16<<20 {
		t.Errorf("heap %d then %d bytes, disk %d then %d bytes", halfHeap, heap, halfDisk, disk)
	}
	if f.raised < 5 {
		t.Errorf("%d incidents: the simulation is too quiet", f.raised)
	}
}
