package demo

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/serve/inference"
)

// users is how many requests the demo's clients have under way at once.
const users = 4

// clients send images to the server over HTTP, one image a request.
type clients struct {
	inference.Client
	shape nn.Shape
}

func newClients(url, model string, shape nn.Shape) *clients {
	return &clients{
		Client: inference.Client{
			URL: url, Model: model, Binary: true, // the machine's cores are for the training
			HTTP: &http.Client{
				Timeout:   30 * time.Second,
				Transport: &http.Transport{MaxIdleConnsPerHost: users, MaxConnsPerHost: users},
			},
		},
		shape: shape,
	}
}

// traffic is what came of a stretch of requests.
type traffic struct {
	sent   int
	labels []int64  // by image
	ids    []string // of the answers
}

// accuracy is the share of the images that were answered with their label.
func (t *traffic) accuracy(labels []uint8) float64 {
	right := 0
	for i, l := range t.labels {
		if l == int64(labels[i]) {
			right++
		}
	}
	return float64(right) / float64(len(t.labels))
}

// burst is how many requests are sent before the sentinel is waited for: fewer
// than the server's mirror can hold, so that each is seen and counted.
const burst = 500

// send asks for the label of each image of pixels, in order, and calls sent
// after each burst, of the images lo to hi (not included).
func (c *clients) send(ctx context.Context, pixels []float32, sent func(t *traffic, lo, hi int) error) (*traffic, error) {
	size := c.shape.Size()
	n := len(pixels) / size
	t := &traffic{sent: n, labels: make([]int64, n), ids: make([]string, n)}
	failed := make([]error, users)
	for lo := 0; lo < t.sent; lo += burst {
		hi := min(lo+burst, t.sent)
		var next atomic.Int64
		var wait sync.WaitGroup
		for u := range users {
			wait.Go(func() {
				for {
					i := lo + int(next.Add(1)) - 1
					if i >= hi {
						return
					}
					answer, err := c.Predict(ctx, pixels[i*size:][:size], 1, c.shape)
					if err != nil {
						failed[u] = err
						return
					}
					t.labels[i], t.ids[i] = answer.Labels[0], answer.ID
				}
			})
		}
		wait.Wait()
		if err := errors.Join(failed...); err != nil {
			return nil, err
		}
		if err := sent(t, lo, hi); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// load keeps requests going in the background, through retraining and the
// reload. Between requests each user waits for pause; a pause of 0 is as fast
// as the server answers.
type load struct {
	pause    atomic.Int64 // nanoseconds
	requests *atomic.Int64
	stop     context.CancelFunc
	done     sync.WaitGroup

	mu      sync.Mutex
	right   []bool // of each answer, in order
	dropped int
	err     error // of the first request that was dropped
}

// start begins to send the images over and over, and counts each in requests.
func (c *clients) start(ctx context.Context, pixels []float32, labels []uint8, pause time.Duration, requests *atomic.Int64) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{stop: cancel, requests: requests}
	l.pause.Store(int64(pause))
	size := c.shape.Size()
	for u := range users {
		l.done.Go(func() {
			for i := u; ctx.Err() == nil; i += users {
				image := i % len(labels)
				// A request under way is let to finish when the load ends.
				answer, err := c.Predict(context.WithoutCancel(ctx), pixels[image*size:][:size], 1, c.shape)
				l.note(answer, err, labels[image])
				if p := time.Duration(l.pause.Load()); p > 0 {
					select {
					case <-time.After(p):
					case <-ctx.Done():
					}
				}
			}
		})
	}
	return l
}

func (l *load) note(answer *inference.Answer, err error, label uint8) {
	l.requests.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.dropped++
		if l.err == nil {
			l.err = err
		}
		return
	}
	l.right = append(l.right, answer.Labels[0] == int64(label))
}

// end waits for the requests under way.
func (l *load) end() {
	l.stop()
	l.done.Wait()
}
