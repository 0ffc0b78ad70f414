package serve

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/temper-ml/temper/models/nn"
)

// chunk is how many rows one forward pass takes: enough to read the weights
// once for many rows, few enough for activations to stay in the cache.
const chunk = 32

// predictor is a model in service. It has a forward pass for each core; a
// request that finds one idle takes it, and waits otherwise. Whoever takes a
// pass computes its own rows and those of as many that wait as fit, all at
// once, and then hands the pass to the first that still waits. So requests
// that queue are answered together, and a single one never waits for others.
//
// Requests that began on a predictor finish on it.
type predictor struct {
	*Model
	passes prometheus.Counter // computed

	mu      sync.Mutex
	idle    []*pass
	waiting []*rows // in the order they came; at most as many as are admitted
}

// pass is a forward pass and the memory to put rows of several requests side
// by side.
type pass struct {
	forward *nn.Forward
	pixels  []float32
	batch   []*rows
}

// rows are a request's share of a forward pass.
type rows struct {
	n             int
	pixels        []float32 // [n, height, width, channels], from 0 to 1
	probabilities []float32 // [n, classes], the answer
	labels        []int64   // [n], the answer

	err  error
	turn chan *pass // gets a pass to compute with, or nil when the rows are answered; 1 buffered
}

var errNotFinite = errors.New("the model's output is not finite for this input")

// predict fills the answers of r. Memory of r belongs to others until it
// returns.
func (p *predictor) predict(ctx context.Context, r *rows) error {
	p.mu.Lock()
	last := len(p.idle) - 1
	if last >= 0 {
		f := p.idle[last]
		p.idle = p.idle[:last]
		p.mu.Unlock()
		// Requests that are ready to run come first, and join this pass: where
		// there is none, this costs nothing.
		runtime.Gosched()
		return p.lead(ctx, f, r)
	}
	p.waiting = append(p.waiting, r)
	p.mu.Unlock()
	select {
	case f := <-r.turn:
		return p.follow(ctx, f, r)
	case <-ctx.Done():
	}
	p.mu.Lock()
	i := slices.Index(p.waiting, r)
	if i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
	}
	p.mu.Unlock()
	if i >= 0 {
		return ctx.Err()
	}
	return p.follow(ctx, <-r.turn, r) // somebody has it in hand
}

func (p *predictor) follow(ctx context.Context, f *pass, r *rows) error {
	if f == nil {
		return r.err
	}
	return p.lead(ctx, f, r)
}

// lead computes r and what waits, and hands the pass on.
func (p *predictor) lead(ctx context.Context, f *pass, r *rows) error {
	f.batch = append(f.batch[:0], r)
	defer func() {
		// Also after a panic, which must not leave others waiting for ever.
		for _, other := range f.batch[1:] {
			other.turn <- nil
		}
		clear(f.batch)
		p.release(f)
	}()
	if r.n > chunk {
		return p.alone(ctx, f, r)
	}
	total := r.n
	p.mu.Lock()
	for len(p.waiting) > 0 && total+p.waiting[0].n <= chunk {
		next := p.waiting[0]
		next.err = errNotAnswered
		total += next.n
		f.batch = append(f.batch, next)
		p.waiting = slices.Delete(p.waiting, 0, 1)
	}
	p.mu.Unlock()
	pixels := r.pixels
	if len(f.batch) > 1 {
		pixels = f.pixels[:0]
		for _, b := range f.batch {
			pixels = append(pixels, b.pixels...)
		}
	}
	logits := f.forward.Logits(pixels, total)
	p.passes.Inc()
	classes := p.Network.Classes()
	for _, b := range f.batch {
		b.err = b.fill(0, logits[:b.n*classes], classes)
		logits = logits[b.n*classes:]
	}
	return r.err
}

// release gives a pass to the first that waits.
func (p *predictor) release(f *pass) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) > 0 {
		next := p.waiting[0]
		p.waiting = slices.Delete(p.waiting, 0, 1)
		next.turn <- f
		return
	}
	p.idle = append(p.idle, f)
}

var errNotAnswered = errors.New("the forward pass failed")

// alone computes a request of more rows than a pass takes.
func (p *predictor) alone(ctx context.Context, f *pass, r *rows) error {
	size, classes := p.Network.Input.Size(), p.Network.Classes()
	for lo := 0; lo < r.n; lo += chunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(chunk, r.n-lo)
		p.passes.Inc()
		if err := r.fill(lo, f.forward.Logits(r.pixels[lo*size:(lo+n)*size], n), classes); err != nil {
			return err
		}
	}
	return nil
}

// fill turns logits into the answers from row lo on.
func (r *rows) fill(lo int, logits []float32, classes int) error {
	for i := range len(logits) / classes {
		label, ok := softmax(r.probabilities[(lo+i)*classes:][:classes], logits[i*classes:][:classes])
		if !ok {
			return errNotFinite
		}
		r.labels[lo+i] = int64(label)
	}
	return nil
}
