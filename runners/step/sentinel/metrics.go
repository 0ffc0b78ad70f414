package sentinel

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics has no label whose values come from outside.
type metrics struct {
	registry  *prometheus.Registry
	handler   http.Handler
	requests  prometheus.Counter
	flagged   prometheus.Counter
	shifted   prometheus.Counter
	unsaved   prometheus.Counter
	banned    prometheus.Counter
	circuit   prometheus.Gauge
	skipped   *prometheus.CounterVec
	events    *prometheus.CounterVec
	labels    *prometheus.CounterVec
	incidents *prometheus.CounterVec
	seconds   prometheus.Histogram
	level     *prometheus.GaugeVec
	limit     prometheus.Gauge
	states    *prometheus.GaugeVec
	waiting   prometheus.Gauge
	ready     prometheus.Gauge
}

func newMetrics() *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "temper_sentinel_" + name, Help: help}, labels)
	}
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "temper_sentinel_" + name, Help: help}, labels)
	}
	requests := counter("requests_total", "Requests that were scored; a batch of N counts N.")
	flagged := counter("flagged_total", "Requests with a score above the threshold.")
	shifted := counter("shifted_total", "Requests that are unlike those of the calibration, and not flagged.")
	unsaved := counter("state_errors_total", "Times that the state could not be written.")
	banned := counter("quarantines_total", "Sources of labels that were put in quarantine.")
	circuit := gauge("circuit_open", "1 while a person must approve the next defence.")
	limit := gauge("alarm_limit", "Level at which an alarm is raised, as a power of ten.")
	waiting := gauge("waiting", "Requests without their response yet, and responses without their request.")
	ready := gauge("ready", "1 when a model is being watched.")
	m := &metrics{
		requests: requests.WithLabelValues(), flagged: flagged.WithLabelValues(), shifted: shifted.WithLabelValues(),
		unsaved: unsaved.WithLabelValues(), banned: banned.WithLabelValues(), circuit: circuit.WithLabelValues(),
		skipped:   counter("skipped_total", "Requests that were not scored.", "reason"),
		events:    counter("events_total", "CloudEvents by what became of them.", "result"),
		labels:    counter("labels_total", "Labels by what became of them.", "result"),
		incidents: counter("incidents_total", "Alarms raised.", "cause"),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "temper_sentinel_score_seconds", Help: "Time to score one inference request.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		level:   gauge("alarm_level", "Evidence for the alarm, as a power of ten.", "cause"),
		limit:   limit.WithLabelValues(),
		states:  gauge("state", "1 for the present state.", "state"),
		waiting: waiting.WithLabelValues(), ready: ready.WithLabelValues(),
	}
	r := prometheus.NewRegistry()
	r.MustRegister(requests, flagged, shifted, unsaved, banned, circuit, m.skipped, m.events, m.labels, m.incidents, m.seconds, m.level, limit, m.states, waiting, ready,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, cause := range []string{Attack, Drift, Accuracy, Anchor} { // an increase is seen from 0 only
		m.incidents.WithLabelValues(cause)
	}
	m.registry, m.handler = r, promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
	return m
}

// Describe sends what every sentinel's metrics are, for checks of dashboards and
// alert rules.
func Describe(to chan<- *prometheus.Desc) { newMetrics().registry.Describe(to) }

// update sets the gauges. Callers hold mu.
func (m *metrics) update(s *Sentinel) {
	for _, state := range []string{Normal, Alarm, Defending, Cooldown} {
		on := 0.0
		if s.state() == state {
			on = 1
		}
		m.states.WithLabelValues(state).Set(on)
	}
	m.circuit.Set(0)
	if s.broken != "" {
		m.circuit.Set(1)
	}
	m.waiting.Set(float64(s.pending.len()))
	if w := s.watch; w != nil {
		m.limit.Set(w.attack.Limit())
		m.level.WithLabelValues(Attack).Set(w.attack.Level())
		m.level.WithLabelValues(Drift).Set(w.drift.Level())
		if w.accuracy != nil {
			m.level.WithLabelValues(Accuracy).Set(w.accuracy.Level())
		}
	}
}
