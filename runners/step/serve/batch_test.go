package serve

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/temper-ml/temper/models/nn"
)

// stall takes all passes, so that requests wait until they are released.
func (p *predictor) stall() []*pass {
	p.mu.Lock()
	defer p.mu.Unlock()
	taken := slices.Clone(p.idle)
	p.idle = p.idle[:0]
	return taken
}

func (p *predictor) resume(taken []*pass) {
	for _, f := range taken {
		p.release(f)
	}
}

func (p *predictor) queued() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting)
}

func images(d nn.Description, n int) *rows {
	r := &rows{n: n, pixels: make([]float32, n*d.Input.Size()), probabilities: make([]float32, n*10), labels: make([]int64, n), turn: make(chan *pass, 1)}
	for i := range r.pixels {
		r.pixels[i] = rand.Float32()
	}
	return r
}

// TestQueuedRequestsShareAPass: requests that queue are computed together, and
// each gets what it would have got alone.
func TestQueuedRequestsShareAPass(t *testing.T) {
	p, err := newPredictor(model(t, wong, 1), newMetrics().passes)
	if err != nil {
		t.Fatal(err)
	}
	var all []*rows
	for _, n := range []int{1, 1, 3, 1, 20, 1} { // 27 images: one pass
		all = append(all, images(wong, n))
	}
	taken := p.stall()
	var clients sync.WaitGroup
	for i, r := range all {
		clients.Go(func() {
			if err := p.predict(t.Context(), r); err != nil {
				t.Error(err)
			}
		})
		for p.queued() < i+1 {
			time.Sleep(time.Millisecond)
		}
	}
	p.resume(taken[:1])
	clients.Wait()
	var got dto.Metric
	if err := p.passes.Write(&got); err != nil {
		t.Fatal(err)
	}
	if got := got.GetCounter().GetValue(); got != 1 {
		t.Errorf("%v passes, want 1", got)
	}
	p.resume(taken[1:])
	for _, r := range all {
		again := images(wong, r.n)
		copy(again.pixels, r.pixels)
		if err := p.predict(t.Context(), again); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(r.labels, again.labels) || !slices.Equal(r.probabilities, again.probabilities) {
			t.Errorf("%d images: together %v, alone %v", r.n, r.probabilities, again.probabilities)
		}
	}
}

// TestWaitingEndsWithTheClient: who goes away while waiting gives nothing up
// for the others.
func TestWaitingEndsWithTheClient(t *testing.T) {
	p, err := newPredictor(model(t, wong, 1), newMetrics().passes)
	if err != nil {
		t.Fatal(err)
	}
	taken := p.stall()
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() { gone <- p.predict(ctx, images(wong, 1)) }()
	stays := make(chan error, 1)
	for p.queued() < 1 {
		time.Sleep(time.Millisecond)
	}
	go func() { stays <- p.predict(t.Context(), images(wong, chunk+1)) }()
	for p.queued() < 2 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	p.resume(taken)
	if err := <-stays; err != nil {
		t.Error(err)
	}
}

// TestPassesAreNeverLost: many clients, some of which go away at any moment.
func TestPassesAreNeverLost(t *testing.T) {
	p, err := newPredictor(model(t, wong, 1), newMetrics().passes)
	if err != nil {
		t.Fatal(err)
	}
	passes := len(p.idle)
	var clients sync.WaitGroup
	for range 16 {
		clients.Go(func() {
			for range 50 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(2000))*time.Microsecond)
				err := p.predict(ctx, images(wong, 1+rand.IntN(3)))
				cancel()
				if err != nil && !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
			}
		})
	}
	clients.Wait()
	if len(p.idle) != passes || p.queued() != 0 {
		t.Errorf("%d of %d passes are idle, %d wait", len(p.idle), passes, p.queued())
	}
}

// TestOneBadRowSpoilsNoOther: a row that the model answers with NaN is an
// error of its own request alone.
func TestOneBadRowSpoilsNoOther(t *testing.T) {
	m := model(t, small, 1)
	p, err := newPredictor(m, newMetrics().passes)
	if err != nil {
		t.Fatal(err)
	}
	good, bad := images(small, 1), images(small, 1)
	for i := range bad.pixels {
		bad.pixels[i] = float32(math.Inf(1))
	}
	good.probabilities, bad.probabilities = good.probabilities[:4], bad.probabilities[:4]
	taken := p.stall()
	failed, fine := make(chan error, 1), make(chan error, 1)
	go func() { failed <- p.predict(t.Context(), bad) }()
	go func() { fine <- p.predict(t.Context(), good) }()
	for p.queued() < 2 {
		time.Sleep(time.Millisecond)
	}
	p.resume(taken)
	if err := <-failed; !errors.Is(err, errNotFinite) {
		t.Error(err)
	}
	if err := <-fine; err != nil {
		t.Error(err)
	}
}
