package step

import (
	"fmt"
	"log/slog"
	"math/bits"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progressEvery is how often the progress file is written: Argo reads it
// every few seconds, and a training step may report thousands of times.
const progressEvery = 200 * time.Millisecond

// progress keeps a step's progress: 0 <= done <= total, done/total never
// falling.
type progress struct {
	mu          sync.Mutex
	done, total int
	file        string // Argo's progress file, "" for none
	written     time.Time
	log         *slog.Logger
	tell        func(done, total int)                    // the step that this one is a part of; nil for none
	bar         func(total int) *progressbar.ProgressBar // nil where there is no terminal
	drawn       *progressbar.ProgressBar
}

// set moves the progress and reports whether it did.
func (p *progress) set(done, total int) bool {
	if total < 1 {
		return false
	}
	done = min(max(done, 0), total)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.total > 0 && falls(p.done, p.total, done, total) {
		return false
	}
	changed := p.total != total
	p.done, p.total = done, total
	if p.file != "" && (done == total || time.Since(p.written) >= progressEvery) {
		if err := os.WriteFile(p.file, fmt.Appendf(nil, "%d/%d\n", done, total), 0o644); err != nil {
			p.log.Warn("cannot write the progress file: going on without it", "error", err)
			p.file = ""
		}
		p.written = time.Now()
	}
	if p.tell != nil {
		p.tell(done, total)
	}
	if p.bar != nil {
		if p.drawn == nil {
			p.drawn = p.bar(total)
		} else if changed {
			p.drawn.ChangeMax(total)
		}
		p.drawn.Set(done)
	}
	return true
}

// falls reports whether b of n is less than a of m, exactly.
func falls(a, m, b, n int) bool {
	newHi, newLo := bits.Mul64(uint64(b), uint64(m))
	oldHi, oldLo := bits.Mul64(uint64(a), uint64(n))
	return newHi < oldHi || newHi == oldHi && newLo < oldLo
}

// close ends the bar, and brings the file up to the last progress.
func (p *progress) close(done bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.total > 0 && p.file != "" {
		if done {
			p.done = p.total
		}
		os.WriteFile(p.file, fmt.Appendf(nil, "%d/%d\n", p.done, p.total), 0o644) // best effort: a failure was said before
	}
	if p.drawn != nil && !p.drawn.IsFinished() {
		p.drawn.Clear()
	}
	p.drawn = nil
}
