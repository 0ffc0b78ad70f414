// Package inferencetest asks a model server more than it can answer, or half.
package inferencetest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/serve/inference"
)

// retry is how soon a client asks again that was told to come back in a second.
const retry = 100 * time.Millisecond

// Server is where to ask, and where the server's metrics are.
type Server struct {
	URL, Model string
	Metrics    string
	Operator   *http.Client // for the metrics
	Shape      nn.Shape
}

// Load is how a server fared under load.
type Load struct {
	Answered, Shed int64
	Slow           int64         // of what was answered, after more than 2.5 s
	Mean           time.Duration // of what was answered, by the server's clock: clients may queue for the same cores
}

// Load asks about eight images a request, with so many clients for so long, each
// as soon as it was answered. Any answer but the model's and 429 is an error.
func (s *Server) Load(ctx context.Context, clients int, length time.Duration) (*Load, error) {
	before, err := s.metrics(ctx)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{MaxIdleConnsPerHost: clients}
	defer transport.CloseIdleConnections()
	c := inference.Client{URL: s.URL, Model: s.Model, Binary: true, HTTP: &http.Client{Transport: transport, Timeout: time.Minute}}
	const images = 8
	x := make([]float32, images*s.Shape.Size())
	var wait sync.WaitGroup
	var shed atomic.Int64
	failures := make(chan error, clients)
	end := time.Now().Add(length)
	for range clients {
		wait.Go(func() {
			for time.Now().Before(end) {
				_, err := c.Predict(ctx, x, images, s.Shape)
				var status *inference.StatusError
				if errors.As(err, &status) && status.Code == http.StatusTooManyRequests {
					shed.Add(1)
					time.Sleep(retry)
				} else if err != nil {
					failures <- err
					return
				}
			}
		})
	}
	wait.Wait()
	close(failures)
	if err := <-failures; err != nil {
		return nil, err
	}
	after, err := s.metrics(ctx)
	if err != nil {
		return nil, err
	}
	n := after.count - before.count
	if n <= 0 {
		return nil, fmt.Errorf("%d clients: nothing was answered, %d shed", clients, shed.Load())
	}
	return &Load{Answered: int64(n), Shed: shed.Load(), Slow: int64(n - (after.soon - before.soon)), Mean: time.Duration((after.sum - before.sum) / n * float64(time.Second))}, nil
}

// durations are the server's of the requests that it answered, in seconds; soon
// counts those of up to 2.5 s.
type durations struct{ sum, count, soon float64 }

func (s *Server) metrics(ctx context.Context) (d durations, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Metrics, nil)
	if err != nil {
		return d, err
	}
	resp, err := s.Operator.Do(req)
	if err != nil {
		return d, err
	}
	defer resp.Body.Close()
	found := 0
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		for name, value := range map[string]*float64{"sum": &d.sum, "count": &d.count, `bucket{le="2.5"}`: &d.soon} {
			if text, ok := strings.CutPrefix(lines.Text(), "temper_inference_duration_seconds_"+name+" "); ok {
				if _, err := fmt.Sscan(text, value); err != nil {
					return d, err
				}
				found++
			}
		}
	}
	if found != 3 {
		return d, fmt.Errorf("%s: %s, without temper_inference_duration_seconds", s.Metrics, resp.Status)
	}
	return d, nil
}

// Bounded says what is wrong with how a server fared under ten times the clients
// that it admits, after just as many: nothing was shed, or those who were answered
// waited for those who were not. Without shedding they would wait ten times as
// long; knocking clients cost some of the cores.
func (overload *Load) Bounded(full *Load) error {
	if overload.Shed == 0 {
		return fmt.Errorf("nothing was shed, %d answered: that shows nothing", overload.Answered)
	}
	if 100*overload.Slow > overload.Answered {
		return fmt.Errorf("%d of %d admitted requests took more than 2.5 s", overload.Slow, overload.Answered)
	}
	if overload.Mean > 6*full.Mean {
		return fmt.Errorf("an answer took %v under overload, %v before", overload.Mean, full.Mean)
	}
	return nil
}

// HalfOpen opens so many connections, and sends half a header on a third of them,
// half a body on another and nothing on the rest.
func HalfOpen(address, model string, n int) ([]net.Conn, error) {
	open := make([]net.Conn, n)
	for i := range open {
		c, err := net.Dial("tcp", address)
		if err != nil {
			return nil, err
		}
		request := "POST /v2/models/" + model + "/infer HTTP/1.1\r\nHost: x\r\n"
		switch i % 3 {
		case 1:
			io.WriteString(c, request+"X-A: ")
		case 2:
			io.WriteString(c, request+"Content-Length: 8000000\r\n\r\n{\"inputs\":")
		}
		open[i] = c
	}
	return open, nil
}

// Closed waits until the server has closed all connections, and names one that it
// has not at the end.
func Closed(open []net.Conn, end time.Time) error {
	for i, c := range open {
		defer c.Close()
		c.SetReadDeadline(end)
		var n net.Error
		if _, err := io.Copy(io.Discard, c); errors.As(err, &n) && n.Timeout() {
			return fmt.Errorf("connection %d is still open", i)
		}
	}
	return nil
}
