package serve

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// metrics are the server's, in a registry of its own. No label value comes
// from a request: routes and reasons are constants, and a status code is one
// of those the server writes.
type metrics struct {
	registry *prometheus.Registry

	requests     *prometheus.CounterVec // route, code
	grpc         *prometheus.CounterVec // method, code
	refused      *prometheus.CounterVec // reason
	duration     prometheus.Histogram
	examples     prometheus.Counter
	passes       prometheus.Counter
	inFlight     prometheus.Gauge
	loads        prometheus.Counter
	loadFailures *prometheus.CounterVec // reason
	ready        prometheus.Gauge
	info         *prometheus.GaugeVec // version, digest: one at a time
	loadedAt     prometheus.Gauge
	checkedAt    prometheus.Gauge
	promotedAt   prometheus.Gauge
	mirrored     prometheus.Counter
	notMirrored  *prometheus.CounterVec // reason
}

// Reasons why a request is refused: the label values of
// temper_inference_refused_total.
const (
	badRequest  = "bad_request"
	tooLarge    = "too_large"
	encoding    = "content_encoding"
	noSuchModel = "no_such_model"
	notReady    = "not_ready"
	overload    = "overload"
	slowClient  = "slow_client"
	internal    = "internal"
)

func newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		m.registry.MustRegister(c)
		return c
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		m.registry.MustRegister(c)
		return c
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
		m.registry.MustRegister(g)
		return g
	}
	m.requests = counters("temper_http_requests_total", "HTTP requests by route and status code.", "route", "code")
	m.grpc = counters("temper_grpc_requests_total", "gRPC requests by method and status code.", "method", "code")
	m.refused = counters("temper_inference_refused_total", "Inference requests that got no prediction, by reason.", "reason")
	m.passes = counter("temper_inference_passes_total", "Forward passes; images over passes is the mean batch.")
	m.examples = counter("temper_inference_examples_total", "Images classified.")
	m.inFlight = gauge("temper_inference_in_flight", "Inference requests admitted and not yet answered.")
	m.loads = counter("temper_model_loads_total", "Models put into service.")
	m.loadFailures = counters("temper_model_load_failures_total", "Models refused, by reason; the model in service went on, unless it was revoked.", "reason")
	m.ready = gauge("temper_model_ready", "1 while a verified model is in service.")
	m.loadedAt = gauge("temper_model_loaded_timestamp_seconds", "When the model in service was loaded.")
	m.checkedAt = gauge("temper_model_checked_timestamp_seconds", "When the source last answered which model should be in service.")
	m.promotedAt = gauge("temper_model_promoted_timestamp_seconds", "When the channel came to name the model in service; 0 without a channel.")
	m.mirrored = counter("temper_mirror_requests_total", "Requests mirrored to the sink.")
	m.notMirrored = counters("temper_mirror_dropped_total", "Requests sampled for mirroring that did not reach the sink, by reason.", "reason")
	m.duration = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "temper_inference_duration_seconds",
		Help:    "Time from the request's last byte to the answer.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
	})
	m.info = prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "temper_model_info", Help: "The model in service."}, []string{"version", "digest"})
	m.registry.MustRegister(m.duration, m.info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// Alerts need the zero before the first failure.
	for _, r := range []string{badRequest, tooLarge, encoding, noSuchModel, notReady, overload, slowClient, internal} {
		m.refused.WithLabelValues(r)
	}
	for _, r := range []string{Unavailable, Unverified, Invalid, SelfTest, Revoked} {
		m.loadFailures.WithLabelValues(r)
	}
	for _, r := range []string{mirrorFull, mirrorFailed} {
		m.notMirrored.WithLabelValues(r)
	}
	return m
}

func (m *metrics) request(route string, code int) {
	m.requests.WithLabelValues(route, strconv.Itoa(code)).Inc()
}

// Describe sends what every server's metrics are, for checks of dashboards and
// alert rules.
func Describe(to chan<- *prometheus.Desc) { newMetrics().registry.Describe(to) }
