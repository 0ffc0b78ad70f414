package sentinel

import (
	"bytes"
	"container/list"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	cehttp "github.com/cloudevents/sdk-go/v2/protocol/http"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/serve"
	"github.com/temper-ml/temper/runners/step/serve/inference"
)

const (
	// maxBody is one mirrored message: about 1,000 MNIST images as JSON.
	maxBody = 8 << 20
	// maxValues is what a message of maxBody can hold at two bytes a value.
	maxValues = maxBody / 2
	// maxImages is the largest batch that is scored.
	maxImages = 1024
	// maxID is far above a UUID.
	maxID = 256
	// maxBusy messages are in memory at a time, maxQueue wait for their turn,
	// no longer than maxTurn; others are told to come again.
	maxBusy  = 8
	maxQueue = 256
	maxTurn  = 5 * time.Second
	// maxWaiting requests wait for their responses, with at most
	// maxWaitingValues pixels (64 MiB); then the oldest goes on without.
	maxWaiting       = 4096
	maxWaitingValues = 16 << 20
	// maxWait is longer than any answer takes to be mirrored.
	maxWait = 30 * time.Second
	// maxSeen deliveries are remembered to know one that comes again.
	maxSeen = 1 << 16
)

// attributes are the headers of a binary-mode event that are read; all others
// are left, so that no sender fills memory with extensions.
var attributes = []string{"Content-Type", "Ce-Specversion", "Ce-Id", "Ce-Type", "Ce-Source", "Ce-Time"}

// message is one mirrored request or response.
type message struct {
	event.Event
	headerLength int // of the binary-data extension, -1 for none
}

// readMessage reads a CloudEvent in binary or structured mode.
func readMessage(r *http.Request) (*message, error) {
	header := http.Header{}
	for _, name := range attributes {
		if values := r.Header.Values(name); len(values) > 1 {
			return nil, fmt.Errorf("header %s is there %d times", name, len(values))
		} else if len(values) == 1 {
			header[name] = values
		}
	}
	e, err := cehttp.NewEventFromHTTPRequest(&http.Request{Header: header, Body: r.Body})
	if err != nil {
		return nil, fmt.Errorf("not a CloudEvent 1.0 in binary or structured mode: %w", err)
	}
	if err := e.Validate(); err != nil {
		return nil, fmt.Errorf("not a valid CloudEvent: %w", err)
	}
	if e.Type() != serve.RequestEvent && e.Type() != serve.ResponseEvent {
		return nil, fmt.Errorf("event type %.100q: send %s or %s", e.Type(), serve.RequestEvent, serve.ResponseEvent)
	}
	if len(e.ID()) > maxID {
		return nil, fmt.Errorf("event id of %d bytes: at most %d", len(e.ID()), maxID)
	}
	m := &message{*e, -1}
	if text := r.Header.Get(inference.HeaderLength); text != "" {
		if m.headerLength, err = strconv.Atoi(text); err != nil || m.headerLength < 0 {
			return nil, fmt.Errorf("header %s is %.20q: must be a number of bytes", inference.HeaderLength, text)
		}
	}
	return m, nil
}

// images reads a mirrored request.
func (m *message) images(shape nn.Shape) (pixels []float32, n int, err error) {
	var r inference.Request
	if err := r.Parse(m.Data(), m.headerLength, maxValues); err != nil {
		return nil, 0, err
	}
	return r.Images(nil, shape, maxImages)
}

// answer reads what matters of a mirrored response: which version answered,
// and whether the request was answered at all. Binary tensors after the JSON
// are left.
func (m *message) answer() (version string, answered bool, err error) {
	var response struct {
		Version string            `json:"model_version"`
		Outputs []json.RawMessage `json:"outputs"`
	}
	if err := json.NewDecoder(bytes.NewReader(m.Data())).Decode(&response); err != nil {
		return "", false, fmt.Errorf("not an inference response: %w", err)
	}
	if len(response.Version) > maxID {
		return "", false, fmt.Errorf("model version of %d bytes: at most %d", len(response.Version), maxID)
	}
	return response.Version, len(response.Outputs) > 0, nil
}

var errDuplicate = errors.New("this event was delivered before")

// take handles one message: a request is scored when its response is there,
// in whatever order the two arrive, and without it where it does not come.
func (s *Sentinel) take(m *message) error {
	p := &pair{id: m.ID()}
	var err error
	if m.Type() == serve.RequestEvent {
		s.mu.Lock()
		w := s.watch
		s.mu.Unlock()
		if w == nil {
			return ErrNoModel
		}
		p.request = true
		p.pixels, p.n, err = m.images(w.model.Network.Input)
	} else {
		p.response = true
		p.version, p.answered, err = m.answer()
	}
	if err != nil {
		return fmt.Errorf("%s %.64q: %w", m.Type(), m.ID(), err)
	}

	s.mu.Lock()
	if !s.pending.first(m) {
		s.mu.Unlock()
		return errDuplicate
	}
	s.advance(s.config.Now())
	ready := s.pending.join(p, s.clock)
	s.mu.Unlock()
	for _, p := range ready {
		switch {
		case !p.request:
			s.metrics.skipped.WithLabelValues("no_request").Inc()
		case p.response && !p.answered:
			s.metrics.skipped.WithLabelValues("refused").Add(float64(p.n))
		default:
			if err := s.Observe(Observation{ID: p.id, Version: p.version, Pixels: p.pixels, N: p.n}); err != nil {
				return err
			}
		}
	}
	return nil
}

// pair is a request and its response, or the half of it that is there.
type pair struct {
	id       string
	arrived  time.Duration // by the sentinel's clock
	request  bool
	pixels   []float32
	n        int
	response bool
	version  string
	answered bool // the response has outputs: the server did not refuse the request
}

// pending joins requests with their responses.
type pending struct {
	order  *list.List // of *pair, oldest first
	byID   map[string]*list.Element
	values int

	key        []byte              // of the hashes
	seen, old  map[uint64]struct{} // two generations of deliveries
	generation uint64              // of seen
	keep       bool                // whether fresh is wanted
	fresh      []delivery          // since the last write
}

func (q *pending) init() {
	q.order, q.byID = list.New(), map[string]*list.Element{}
	q.key, q.seen, q.old = make([]byte, 32), map[uint64]struct{}{}, map[uint64]struct{}{}
	rand.Read(q.key)
}

func (q *pending) len() int { return q.order.Len() }

// first reports whether a delivery is new. Content and time count, not the id
// alone: an attacker who may choose the id would otherwise go unseen by using
// one id for all requests.
func (q *pending) first(m *message) bool {
	h := sha256.New()
	h.Write(q.key) // so that nobody can make an event that looks like another
	for _, part := range []string{m.Type(), m.Source(), m.ID(), m.Time().String()} {
		io.WriteString(h, part)
		h.Write([]byte{0})
	}
	h.Write(m.Data())
	key := binary.BigEndian.Uint64(h.Sum(nil))
	if _, ok := q.seen[key]; ok {
		return false
	}
	if _, ok := q.old[key]; ok {
		return false
	}
	if len(q.seen) >= maxSeen/2 {
		q.seen, q.old = map[uint64]struct{}{}, q.seen
		q.generation++
	}
	q.seen[key] = struct{}{}
	if q.keep {
		q.fresh = append(q.fresh, delivery{key, q.generation})
	}
	return true
}

// join adds half a pair, and returns the pairs that wait no longer: those that
// have waited too long, for which there is no room, and the one that is
// complete.
func (q *pending) join(p *pair, now time.Duration) (ready []*pair) {
	p.arrived = now
	if e, ok := q.byID[p.id]; ok {
		have := q.remove(e)
		if have.request != p.request {
			if !p.request {
				p.request, p.pixels, p.n = true, have.pixels, have.n
			} else {
				p.response, p.version, p.answered = true, have.version, have.answered
			}
			ready = append(ready, p)
			p = nil
		} else {
			ready = append(ready, have) // another message with the same id takes its place
		}
	}
	if p != nil {
		q.byID[p.id] = q.order.PushBack(p)
		q.values += len(p.pixels)
	}
	for e := q.order.Front(); e != nil; e = q.order.Front() {
		if q.len() <= maxWaiting && q.values <= maxWaitingValues && now-e.Value.(*pair).arrived <= maxWait {
			break
		}
		ready = append(ready, q.remove(e))
	}
	return ready
}

func (q *pending) remove(e *list.Element) *pair {
	p := q.order.Remove(e).(*pair)
	delete(q.byID, p.id)
	q.values -= len(p.pixels)
	return p
}
