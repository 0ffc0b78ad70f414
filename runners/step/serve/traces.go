package serve

import (
	"context"
	"fmt"
	"net/http"
	"os"

	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	noop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.37.0"
	otel "go.opentelemetry.io/otel/trace"
)

// Traces follow the W3C's headers. Metrics are Prometheus' (see metrics.go).
var (
	propagator = propagation.TraceContext{}
	noMetrics  = noop.NewMeterProvider()
)

// traceProvider sends traces to the collector that OpenTelemetry's environment
// variables name, and is nil where they name none. stop sends what is left.
func traceProvider(ctx context.Context, name string) (provider otel.TracerProvider, stop func(context.Context) error, err error) {
	if os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") == "" && os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") == "" {
		return nil, func(context.Context) error { return nil }, nil
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("OTEL_EXPORTER_OTLP_ENDPOINT: %w", err)
	}
	about, err := resource.New(ctx, resource.WithFromEnv(), resource.WithTelemetrySDK())
	if err != nil {
		return nil, nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	// What the variables say wins over the model's name.
	if about, err = resource.Merge(resource.NewSchemaless(semconv.ServiceName(name)), about); err != nil {
		return nil, nil, err
	}
	p := trace.NewTracerProvider(trace.WithBatcher(exporter), trace.WithResource(about))
	return p, p.Shutdown, nil
}

// traced makes a span of each request for the model. Probes are left out: they
// come every second and say nothing.
func (s *Server) traced(h http.Handler) http.Handler {
	if s.o.Traces == nil {
		return h
	}
	return otelhttp.NewHandler(h, "infer",
		otelhttp.WithTracerProvider(s.o.Traces), otelhttp.WithPropagators(propagator), otelhttp.WithMeterProvider(noMetrics),
		otelhttp.WithFilter(func(r *http.Request) bool { return r.Method == http.MethodPost }))
}
