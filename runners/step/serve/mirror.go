package serve

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/temper-ml/temper/runners/step/serve/inference"
)

// CloudEvents types of KServe's payload logger.
const (
	RequestEvent  = "org.kubeflow.serving.inference.request"
	ResponseEvent = "org.kubeflow.serving.inference.response"
)

// Bounds on what waits for the sink: enough for a second's stall of a busy
// server, little beside its model.
const (
	mirrorQueue   = 1024
	mirrorBytes   = 64 << 20
	mirrorWorkers = 4
	mirrorTimeout = 10 * time.Second // for one event
)

// Reasons of temper_mirror_dropped_total.
const (
	mirrorFull   = "queue_full"
	mirrorFailed = "sink_failed"
)

// mirror sends copies of answered requests to a sink as CloudEvents in binary
// mode: first the request, then the response, with one id. It never makes a
// request wait: what does not fit the queue is dropped and counted.
type mirror struct {
	sink       string
	fraction   float64
	attributes map[string]string
	client     *http.Client
	metrics    *metrics
	log        *limitedLog

	queue   chan mirrored // never closed: a request may outlive the drain time-out
	closing chan struct{}
	waiting atomic.Int64 // bytes in the queue
	workers sync.WaitGroup
	ctx     context.Context
	cancel  context.CancelFunc
}

// payload is a message as it was on the wire; headerLength is -1 without
// binary data.
type payload struct {
	body         []byte
	headerLength int
}

func (p payload) contentType() string {
	if p.headerLength >= 0 {
		return "application/octet-stream"
	}
	return "application/json"
}

type mirrored struct {
	id                string
	at                time.Time
	request, response payload
}

func newMirror(sink string, fraction float64, source string, o Options, m *metrics, log *limitedLog) (*mirror, error) {
	u, err := url.Parse(sink)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("mirror %q: must be an http or https URL, such as http://sentinel:8080", sink)
	}
	if !(fraction > 0 && fraction <= 1) {
		return nil, fmt.Errorf("mirrored fraction %v: must be above 0 and at most 1", fraction)
	}
	mi := &mirror{
		sink: sink, fraction: fraction, metrics: m, log: log,
		attributes: map[string]string{
			"Ce-Specversion":          "1.0",
			"Ce-Source":               source,
			"Ce-Inferenceservicename": o.Name,
			"Ce-Namespace":            o.Namespace,
			"Ce-Component":            "predictor",
			"Ce-Endpoint":             "",
		},
		client: &http.Client{
			Timeout: mirrorTimeout,
			Transport: &http.Transport{
				MaxIdleConnsPerHost: mirrorWorkers,
				IdleConnTimeout:     time.Minute,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // traffic goes to the sink that was named, nowhere else
		},
		queue:   make(chan mirrored, mirrorQueue),
		closing: make(chan struct{}),
	}
	mi.ctx, mi.cancel = context.WithCancel(context.Background())
	for range mirrorWorkers {
		mi.workers.Go(mi.work)
	}
	return mi, nil
}

// sample decides whether a request is mirrored.
func (m *mirror) sample() bool { return m != nil && (m.fraction == 1 || rand.Float64() < m.fraction) }

// add takes copies of both messages.
func (m *mirror) add(id string, request, response payload) {
	size := int64(len(request.body) + len(response.body))
	if m.waiting.Add(size) > mirrorBytes {
		m.waiting.Add(-size)
		m.metrics.notMirrored.WithLabelValues(mirrorFull).Inc()
		return
	}
	request.body, response.body = bytes.Clone(request.body), bytes.Clone(response.body)
	select {
	case m.queue <- mirrored{id, time.Now(), request, response}:
	default:
		m.waiting.Add(-size)
		m.metrics.notMirrored.WithLabelValues(mirrorFull).Inc()
	}
}

func (m *mirror) work() {
	for {
		var e mirrored
		select {
		case e = <-m.queue:
		case <-m.closing:
			select {
			case e = <-m.queue:
			default:
				return
			}
		}
		err := m.send(e, RequestEvent, e.request)
		if err == nil {
			err = m.send(e, ResponseEvent, e.response)
		}
		m.waiting.Add(-int64(len(e.request.body) + len(e.response.body)))
		if err != nil {
			m.metrics.notMirrored.WithLabelValues(mirrorFailed).Inc()
			m.log.warn("mirroring failed", slog.String("error", err.Error()))
			continue
		}
		m.metrics.mirrored.Inc()
	}
}

func (m *mirror) send(e mirrored, kind string, p payload) error {
	req, err := http.NewRequestWithContext(m.ctx, http.MethodPost, m.sink, bytes.NewReader(p.body))
	if err != nil {
		return err
	}
	for k, v := range m.attributes {
		if v != "" {
			req.Header[k] = []string{v}
		}
	}
	req.Header.Set("Ce-Id", e.id)
	req.Header.Set("Ce-Type", kind)
	req.Header.Set("Ce-Time", e.at.UTC().Format(time.RFC3339Nano))
	req.Header.Set("Content-Type", p.contentType())
	if p.headerLength >= 0 {
		req.Header.Set(inference.HeaderLength, strconv.Itoa(p.headerLength))
	}
	resp, err := m.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection is kept
	if resp.StatusCode/100 != 2 {
		return errors.New("the sink answered " + resp.Status)
	}
	return nil
}

// Mirrored says whether nothing waits to be mirrored.
func (s *Server) Mirrored() bool { return s.mirror == nil || s.mirror.waiting.Load() == 0 }

// close sends what is queued, as far as ctx lasts.
func (m *mirror) close(ctx context.Context) {
	if m == nil {
		return
	}
	close(m.closing)
	defer m.cancel()
	defer context.AfterFunc(ctx, m.cancel)()
	m.workers.Wait()
	m.client.CloseIdleConnections()
}
