package sentinel

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/temper-ml/temper/models/detect"
)

// state is what outlives a restart: one file, which one process holds at a
// time. What the sentinel concluded is one JSON value; the deliveries that it
// has seen are keys of two buckets, one for each generation, so that a save
// writes the new ones only. Both are bounded, and bbolt uses freed pages
// again: the file stops growing.
type state struct {
	file    *bbolt.DB
	key     []byte        // of the hashes of deliveries
	saved   time.Duration // the clock at the last save
	written uint64        // the generation of deliveries that was written last
}

const (
	// saveEvery is how often counts and levels are written; a crash forgets
	// less than that. What starts a defence is written before it starts.
	saveEvery = time.Second
	// stateTimeout is how long the file's lock is waited for.
	stateTimeout = 5 * time.Second
	// stateVersion is that of memory's fields.
	stateVersion = 1
)

var (
	mainBucket  = []byte("sentinel")
	memoryKey   = []byte("memory")
	hashKey     = []byte("key")
	seenBuckets = [2][]byte{[]byte("seen-even"), []byte("seen-odd")}
)

// memory is the JSON value. Durations are readings of the sentinel's clock.
type memory struct {
	Version int           `json:"version"`
	Clock   time.Duration `json:"clock"`
	Wall    time.Time     `json:"wall"` // when the clock was read
	Raised  int           `json:"raised"`

	Model    string    `json:"model"` // the version that the next fields are about
	Requests uint64    `json:"requests"`
	Flagged  uint64    `json:"flagged"`
	Shifted  uint64    `json:"shifted"`
	Labels   uint64    `json:"labels"`
	Errors   uint64    `json:"errors"`
	Attack   []float64 `json:"attack,omitempty"` // see detect.Alarm.Money
	Drift    []float64 `json:"drift,omitempty"`
	Accuracy []float64 `json:"accuracy,omitempty"`

	Open      *Incident                `json:"open,omitempty"`
	Incidents []Incident               `json:"incidents,omitempty"`
	Versions  []Version                `json:"versions,omitempty"`
	Cooling   bool                     `json:"cooling,omitempty"`
	Cooled    time.Duration            `json:"cooled,omitempty"`
	Reported  map[string]time.Duration `json:"reported,omitempty"` // the last report of each cause
	Begun     []time.Duration          `json:"begun,omitempty"`    // defences within budgetTime
	Failures  int                      `json:"failures,omitempty"` // in a row
	Broken    string                   `json:"broken,omitempty"`
	Anchors   []float64                `json:"anchors,omitempty"`
	Sources   map[string]tally         `json:"sources,omitempty"`
}

// openState opens or makes the file and returns what it holds.
func openState(path string) (*state, *memory, error) {
	wrap := func(err error) error { return fmt.Errorf("state %s: %w", path, err) }
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: stateTimeout})
	if errors.Is(err, bbolt.ErrTimeout) {
		err = errors.New("another sentinel holds it: stop that one, or name another file")
	}
	if err != nil {
		return nil, nil, wrap(err)
	}
	s, m := &state{file: db}, &memory{Version: stateVersion}
	err = db.Update(func(tx *bbolt.Tx) error {
		main, err := tx.CreateBucketIfNotExists(mainBucket)
		if err != nil {
			return err
		}
		for _, name := range seenBuckets {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		if s.key = append(s.key, main.Get(hashKey)...); len(s.key) == 0 {
			s.key = make([]byte, 32)
			rand.Read(s.key)
			return main.Put(hashKey, s.key)
		}
		data := main.Get(memoryKey)
		if data == nil {
			return nil
		}
		if err := json.Unmarshal(data, m); err != nil {
			return fmt.Errorf("not a sentinel's: %w", err)
		}
		if m.Version != stateVersion {
			return fmt.Errorf("it has version %d, this program reads %d: name another file", m.Version, stateVersion)
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, nil, wrap(err)
	}
	return s, m, nil
}

// loadSeen reads the deliveries back.
func (s *state) loadSeen(q *pending) error {
	return s.file.View(func(tx *bbolt.Tx) error {
		for i, name := range seenBuckets {
			b := tx.Bucket(name)
			into := map[uint64]struct{}{}
			err := b.ForEach(func(k, v []byte) error {
				if len(k) != 8 || len(v) != 8 {
					return errors.New("a delivery of the wrong size")
				}
				into[binary.BigEndian.Uint64(k)] = struct{}{}
				if g := binary.BigEndian.Uint64(v); g > q.generation {
					q.generation = g
				}
				if len(into) > maxSeen {
					return errors.New("too many deliveries")
				}
				return nil
			})
			if err != nil {
				return err
			}
			if i == 0 {
				q.seen = into
			} else {
				q.old = into
			}
		}
		if q.generation%2 == 1 {
			q.seen, q.old = q.old, q.seen
		}
		s.written = q.generation
		return nil
	})
}

// save writes what is remembered, and the deliveries since the last time.
func (s *state) save(m *memory, fresh []delivery) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return s.file.Update(func(tx *bbolt.Tx) error {
		if err := tx.Bucket(mainBucket).Put(memoryKey, data); err != nil {
			return err
		}
		for _, d := range fresh {
			name := seenBuckets[d.generation%2]
			if d.generation > s.written { // the generation before the last one is forgotten
				if err := tx.DeleteBucket(name); err != nil {
					return err
				}
				if _, err := tx.CreateBucket(name); err != nil {
					return err
				}
				s.written = d.generation
			}
			var k, v [8]byte
			binary.BigEndian.PutUint64(k[:], d.hash)
			binary.BigEndian.PutUint64(v[:], d.generation)
			if err := tx.Bucket(name).Put(k[:], v[:]); err != nil {
				return err
			}
		}
		return nil
	})
}

// delivery is an event that was taken.
type delivery struct{ hash, generation uint64 }

// restore opens the state file, where there is one, and goes on from it.
func (s *Sentinel) restore() error {
	if s.config.State == "" {
		return nil
	}
	disk, m, err := openState(s.config.State)
	if err != nil {
		return err
	}
	if err := disk.loadSeen(&s.pending); err != nil {
		disk.file.Close()
		return fmt.Errorf("state %s: %w", s.config.State, err)
	}
	s.disk, s.pending.key, s.pending.keep = disk, disk.key, true
	s.clock, s.read, s.raised = m.Clock, m.Wall, m.Raised
	s.open, s.incidents, s.versions = m.Open, m.Incidents, m.Versions
	s.cooling, s.cooled, s.begun = m.Cooling, m.Cooled, m.Begun
	s.failures, s.broken, s.anchors = m.Failures, m.Broken, m.Anchors
	if m.Reported != nil {
		s.reported = m.Reported
	}
	s.sources.restore(m.Sources)
	s.restored = m
	disk.saved = s.clock
	return nil
}

// goOn gives the watch over the model that was watched before a restart what
// was known then, and goes on with a defence that had not taken the incident.
// Callers hold mu.
func (s *Sentinel) goOn(w *watch) {
	m := s.restored
	s.restored = nil
	if m == nil || m.Model != w.model.Version {
		return
	}
	w.requests, w.flagged, w.shifted, w.labels, w.errors = m.Requests, m.Flagged, m.Shifted, m.Labels, m.Errors
	w.onset = onset{requests: w.requests, flagged: w.flagged}
	for name, a := range map[string]struct {
		alarm *detect.Alarm
		money []float64
	}{Attack: {w.attack, m.Attack}, Drift: {w.drift, m.Drift}, Accuracy: {w.accuracy, m.Accuracy}} {
		if a.alarm == nil || a.money == nil {
			continue
		}
		if err := a.alarm.Restore(a.money); err != nil { // another alpha or calibration than before
			s.log.Warn("the alarm starts anew", "cause", name, "error", err)
		}
	}
	if i := s.open; i != nil && i.Defended && !i.Taken && s.config.Defence != nil {
		s.log.Info("going on with the defence", "incident", i.ID)
		s.launch = append(s.launch, *i)
	}
	if n := len(s.versions); n > 0 && s.versions[n-1].Version == w.model.Version {
		s.versions = s.versions[:n-1] // Use adds it again
	}
}

// memorize returns what writes the state, where it is time to. Callers hold
// mu; they release it before they write.
func (s *Sentinel) memorize(now time.Time) (write func()) {
	if s.disk == nil || !s.urgent && s.clock-s.disk.saved < saveEvery {
		return func() {}
	}
	if s.restored != nil { // no model is watched yet: what is known of the one before must stay
		return func() {}
	}
	s.urgent, s.disk.saved = false, s.clock
	m := &memory{
		Version: stateVersion, Clock: s.clock, Wall: now.Round(0), Raised: s.raised,
		Incidents: slices.Clone(s.incidents), Versions: slices.Clone(s.versions), Cooling: s.cooling, Cooled: s.cooled,
		Reported: maps.Clone(s.reported), Begun: slices.Clone(s.begun), Failures: s.failures, Broken: s.broken,
		Anchors: s.anchors, Sources: s.sources.tallies(),
	}
	if s.open != nil {
		i := *s.open
		m.Open = &i
	}
	if w := s.watch; w != nil {
		m.Model = w.model.Version
		m.Requests, m.Flagged, m.Shifted, m.Labels, m.Errors = w.requests, w.flagged, w.shifted, w.labels, w.errors
		m.Attack, m.Drift = w.attack.Money(), w.drift.Money()
		if w.accuracy != nil {
			m.Accuracy = w.accuracy.Money()
		}
	}
	fresh := s.pending.fresh
	s.pending.fresh = nil
	return func() {
		if err := s.disk.save(m, fresh); err != nil {
			// Watching goes on: an incident's name is the same after a restart,
			// so its defence stays one.
			s.metrics.unsaved.Inc()
			s.log.Error("the state is not written", "error", err)
		}
	}
}
