package demo

import (
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/temper-ml/temper/models/report"
)

// expected is how the time of the demo is divided, for its progress; the
// phases that are not here take next to none.
var expected = map[string]int{"train": 8, "guard": 15, "evaluate": 8, "clean": 5, "strike": 5, "retrain": 40, "gate": 8, "recovered": 4, "transfer": 4}

// narrator tells the story: a line for each event, and the progress over all.
type narrator struct {
	out      io.Writer
	silent   bool // tell no story, only errors
	progress func(done, total int)
	began    time.Time
	requests atomic.Int64

	mu     sync.Mutex
	events []report.Event
	took   map[string]time.Duration
	order  []string // of the phases
	weight int      // of the phase under way
	done   int      // weights of those before
}

func newNarrator(out io.Writer, progress func(done, total int), silent bool) *narrator {
	return &narrator{out: out, silent: silent, progress: progress, began: time.Now(), took: map[string]time.Duration{}}
}

// say writes a line.
func (n *narrator) say(format string, args ...any) {
	if n.silent {
		return
	}
	fmt.Fprintf(n.out, "%6.1fs  %s\n", time.Since(n.began).Seconds(), fmt.Sprintf(format, args...))
}

// event writes a line and keeps it for the report's timeline.
func (n *narrator) event(tone report.Tone, name, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	n.say("%s: %s", name, text)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, report.Event{
		At: time.Since(n.began), Request: int(n.requests.Load()), Name: name, Text: text, Tone: tone,
	})
}

// phase does a part of the demo and notes how long it took.
func (n *narrator) phase(name, what string, do func() error, args ...any) error {
	n.say(what, args...)
	n.mu.Lock()
	n.weight = expected[name]
	n.mu.Unlock()
	start := time.Now()
	err := do()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.done += n.weight
	n.weight = 0
	if _, again := n.took[name]; !again {
		n.order = append(n.order, name)
	}
	n.took[name] += time.Since(start)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// part is the progress of the phase under way.
func (n *narrator) part(done, total int) {
	n.mu.Lock()
	all := 10 // what the other phases take
	for _, w := range expected {
		all += w
	}
	const fine = 1000
	at := n.done*fine + n.weight*fine*done/max(total, 1)
	n.mu.Unlock()
	n.progress(min(at, all*fine), all*fine)
}

// seconds are those of each phase, and of all.
func (n *narrator) seconds() (phases map[string]float64, total float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	phases = map[string]float64{}
	for name, took := range n.took {
		phases[name] = took.Seconds()
	}
	return phases, time.Since(n.began).Seconds()
}

// quiet is the log of parts that the story tells of anyway.
func (n *narrator) quiet() *slog.Logger {
	return slog.New(slog.NewTextHandler(n.out, &slog.HandlerOptions{Level: slog.LevelError}))
}
