package serve

import (
	"context"
	"encoding/binary"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/serve/inference"
	"github.com/temper-ml/temper/runners/step/serve/inference/oip"
)

// withGRPC gives a server a gRPC listener and returns a client of it.
func withGRPC(t testing.TB, m *Model, change ...func(*Options)) (*running, oip.GRPCInferenceServiceClient, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, m, append(change, func(o *Options) { o.GRPC = l })...)
	return s, dialGRPC(t, l.Addr().String()), l.Addr().String()
}

func dialGRPC(t testing.TB, address string) oip.GRPCInferenceServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return oip.NewGRPCInferenceServiceClient(conn)
}

// message asks for one image of the network small.
func message() *oip.ModelInferRequest {
	return &oip.ModelInferRequest{
		ModelName: "digits", Id: "a7",
		Inputs: []*oip.ModelInferRequest_InferInputTensor{{
			Name: "input", Datatype: "UINT8", Shape: []int64{1, 3, 2, 2},
			Contents: &oip.InferTensorContents{UintContents: []uint32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255}},
		}},
	}
}

func TestGRPC(t *testing.T) {
	s, c, _ := withGRPC(t, model(t, small, 1))
	ctx := t.Context()
	if live, err := c.ServerLive(ctx, &oip.ServerLiveRequest{}); err != nil || !live.Live {
		t.Error(live, err)
	}
	if ready, err := c.ServerReady(ctx, &oip.ServerReadyRequest{}); err != nil || !ready.Ready {
		t.Error(ready, err)
	}
	if server, err := c.ServerMetadata(ctx, &oip.ServerMetadataRequest{}); err != nil || server.Name != serverName {
		t.Error(server, err)
	}
	for version, want := range map[string]codes.Code{"": codes.OK, "1": codes.OK, "2": codes.NotFound} {
		ready, err := c.ModelReady(ctx, &oip.ModelReadyRequest{Name: "digits", Version: version})
		if status.Code(err) != want || ready.GetReady() != (want == codes.OK) {
			t.Error(version, ready, err)
		}
		about, err := c.ModelMetadata(ctx, &oip.ModelMetadataRequest{Name: "digits", Version: version})
		if status.Code(err) != want || want == codes.OK && (!slices.Equal(about.Inputs[0].Shape, []int64{-1, 3, 2, 2}) || about.Properties["digest"] != s.Digest()) {
			t.Error(version, about, err)
		}
		q := message()
		q.ModelVersion = version
		var header metadata.MD
		answer, err := c.ModelInfer(ctx, q, grpc.Header(&header))
		if status.Code(err) != want {
			t.Error(version, err)
		}
		if want == codes.OK && (answer.Id != "a7" || answer.ModelVersion != "1" || len(answer.Outputs) != 2 || len(header.Get(requestID)) != 1) {
			t.Error(answer, header)
		}
	}

	s.Unload()
	if ready, err := c.ServerReady(ctx, &oip.ServerReadyRequest{}); err != nil || ready.Ready {
		t.Error(ready, err)
	}
	var trailer metadata.MD
	_, err := c.ModelInfer(ctx, message(), grpc.Trailer(&trailer))
	if status.Code(err) != codes.Unavailable || !slices.Equal(trailer.Get(retryPushback), []string{retryMillis}) {
		t.Error(err, trailer)
	}
}

// TestGRPCAnswersAsHTTP: one model, both protocols, both forms of tensors.
func TestGRPCAnswersAsHTTP(t *testing.T) {
	for _, d := range []nn.Description{small, wong} {
		s, c, _ := withGRPC(t, model(t, d, 1))
		const n = 3
		x := images(d, n).pixels
		want, err := (&inference.Client{URL: s.url, Model: "digits"}).Predict(t.Context(), x, n, d.Input)
		if err != nil {
			t.Fatal(err)
		}
		// The raw bytes are those of the binary extension.
		body, headerLength := inference.AppendRequest(nil, x, n, d.Input, true)
		raw := body[headerLength:]
		values := make([]float32, len(raw)/4)
		for i := range values {
			values[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
		}
		q := &oip.ModelInferRequest{
			ModelName: "digits",
			Inputs: []*oip.ModelInferRequest_InferInputTensor{{
				Name: "input", Datatype: "FP32", Shape: []int64{n, int64(d.Input.Channels), int64(d.Input.Height), int64(d.Input.Width)},
				Contents: &oip.InferTensorContents{Fp32Contents: values},
			}},
		}
		answer, err := c.ModelInfer(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		if got := answer.Outputs[0].Contents.Fp32Contents; !slices.Equal(got, want.Probabilities) || answer.RawOutputContents != nil {
			t.Errorf("%v, want %v", got, want.Probabilities)
		}
		if got := answer.Outputs[1].Contents.Int64Contents; !slices.Equal(got, want.Labels) {
			t.Errorf("%v, want %v", got, want.Labels)
		}
		q.Inputs[0].Contents, q.RawInputContents = nil, [][]byte{raw}
		q.Outputs = []*oip.ModelInferRequest_InferRequestedOutputTensor{{Name: "label"}}
		if answer, err = c.ModelInfer(t.Context(), q); err != nil || len(answer.Outputs) != 1 || len(answer.RawOutputContents) != 1 {
			t.Fatal(answer, err)
		}
		for i, l := range want.Labels {
			if got := binary.LittleEndian.Uint64(answer.RawOutputContents[0][8*i:]); int64(got) != l {
				t.Errorf("label %d, want %d", got, l)
			}
		}
	}
}

func TestCase52HostileMessages(t *testing.T) {
	s, c, _ := withGRPC(t, model(t, small, 1))
	tensor := func(change func(*oip.ModelInferRequest_InferInputTensor)) *oip.ModelInferRequest {
		q := message()
		change(q.Inputs[0])
		return q
	}
	nan := &oip.InferTensorContents{Fp32Contents: []float32{float32(math.NaN()), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}}
	for name, q := range map[string]*oip.ModelInferRequest{
		"empty":             {ModelName: "digits"},
		"nil input":         {ModelName: "digits", Inputs: make([]*oip.ModelInferRequest_InferInputTensor, 1)},
		"many inputs":       {ModelName: "digits", Inputs: make([]*oip.ModelInferRequest_InferInputTensor, 1000)},
		"many outputs":      {ModelName: "digits", Inputs: message().Inputs, Outputs: make([]*oip.ModelInferRequest_InferRequestedOutputTensor, 1000)},
		"unknown output":    {ModelName: "digits", Inputs: message().Inputs, Outputs: []*oip.ModelInferRequest_InferRequestedOutputTensor{{Name: "logits"}}},
		"long id":           {ModelName: "digits", Inputs: message().Inputs, Id: strings.Repeat("a", 10_000)},
		"raw and contents":  {ModelName: "digits", Inputs: message().Inputs, RawInputContents: [][]byte{make([]byte, 12)}},
		"raw for no input":  {ModelName: "digits", Inputs: message().Inputs, RawInputContents: make([][]byte, 2)},
		"wrong name":        tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Name = "image" }),
		"no datatype":       tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Datatype = "" }),
		"bytes":             tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Datatype = "BYTES" }),
		"another datatype":  tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Datatype = "FP32" }),
		"no shape":          tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Shape = nil }),
		"negative shape":    tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Shape = []int64{-1, 3, 2, 2} }),
		"overflowing shape": tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Shape = []int64{1 << 32, 1 << 32, 2, 2} }),
		"long shape":        tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Shape = make([]int64, 100_000) }),
		"larger than said":  tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Shape = []int64{2, 3, 2, 2} }),
		"pixel of 256":      tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Contents.UintContents[0] = 256 }),
		"NaN":               tensor(func(t *oip.ModelInferRequest_InferInputTensor) { t.Datatype, t.Contents = "FP32", nan }),
		"large batch": tensor(func(t *oip.ModelInferRequest_InferInputTensor) {
			t.Shape[0], t.Contents.UintContents = maxBatch+1, make([]uint32, 12*(maxBatch+1))
		}),
	} {
		if _, err := c.ModelInfer(t.Context(), q); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	large := message()
	large.RawInputContents = [][]byte{make([]byte, maxMessage)}
	if _, err := c.ModelInfer(t.Context(), large); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message of %d bytes: %v", proto.Size(large), err)
	}
	// The limit is on what comes out of a compressed message.
	if _, err := c.ModelInfer(t.Context(), large, grpc.UseCompressor(gzip.Name)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a bomb of %d bytes: %v", proto.Size(large), err)
	}
	if _, err := c.ModelInfer(t.Context(), message()); err != nil {
		t.Error(err)
	}
	if n := len(s.log.lines()); n > 30 {
		t.Errorf("%d log lines", n)
	}
}

func TestCase54StreamsAreBounded(t *testing.T) {
	s, c, address := withGRPC(t, model(t, small, 1), func(o *Options) { o.MaxInFlight = 2 })
	p := s.current.Load()
	taken := p.stall()
	var waiting sync.WaitGroup
	infer := func(c oip.GRPCInferenceServiceClient) {
		waiting.Go(func() {
			if _, err := c.ModelInfer(t.Context(), message()); err != nil {
				t.Error("an admitted request:", err)
			}
		})
	}
	infer(c)
	infer(c)
	for p.queued() < 2 {
		time.Sleep(time.Millisecond)
	}
	other := dialGRPC(t, address) // a connection may have no more streams than are admitted
	var trailer metadata.MD
	for range 20 {
		_, err := other.ModelInfer(t.Context(), message(), grpc.Trailer(&trailer))
		if status.Code(err) != codes.ResourceExhausted || !slices.Equal(trailer.Get(retryPushback), []string{retryMillis}) {
			t.Error(err, trailer)
		}
	}
	p.resume(taken)
	waiting.Wait()
	if _, err := other.ModelInfer(t.Context(), message()); err != nil {
		t.Error(err)
	}
	if got := value(t, s, "temper_inference_refused_total", "reason", overload); got != 20 {
		t.Errorf("%v refusals were counted, want 20", got)
	}
}

func TestCase56MessagesAddNoSeries(t *testing.T) {
	s, c, _ := withGRPC(t, model(t, small, 1))
	ask := func(i int) {
		name := strings.Repeat("m", i%100+1)
		q := message()
		q.ModelName, q.Id = name, name
		c.ModelInfer(t.Context(), q)
		c.ModelReady(t.Context(), &oip.ModelReadyRequest{Name: name, Version: name})
		c.ModelMetadata(metadata.AppendToOutgoingContext(t.Context(), "x-"+name, name), &oip.ModelMetadataRequest{Name: name})
	}
	for i := range 10 {
		ask(i)
	}
	before := series(t, s.metrics.registry)
	for i := range 1000 {
		ask(i)
	}
	if after := series(t, s.metrics.registry); after != before {
		t.Errorf("%d series became %d", before, after)
	}
}

// Only the inference service is on the gRPC port: no reflection, no channelz,
// no metrics.
func TestCase57GRPCHasNothingElse(t *testing.T) {
	s, _, address := withGRPC(t, model(t, small, 1))
	services := s.grpcServer().GetServiceInfo()
	if _, ok := services["inference.GRPCInferenceService"]; !ok || len(services) != 1 {
		t.Errorf("%v", services)
	}
	client := &http.Client{Timeout: time.Second}
	if resp, err := client.Get("http://" + address + "/metrics"); err == nil {
		resp.Body.Close()
		t.Error("the gRPC port answered HTTP")
	}
}

func TestGRPCDrains(t *testing.T) {
	s, c, _ := withGRPC(t, model(t, small, 1))
	p := s.current.Load()
	taken := p.stall()
	answered := make(chan error, 1)
	go func() {
		_, err := c.ModelInfer(context.Background(), message())
		answered <- err
	}()
	for p.queued() < 1 {
		time.Sleep(time.Millisecond)
	}
	stopped := make(chan error, 1)
	go func() { stopped <- s.stop() }()
	for s.Ready() {
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-stopped:
		t.Fatalf("stopped before the request in flight was answered: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	p.resume(taken)
	if err := <-answered; err != nil {
		t.Error(err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestGRPCIsMirrored(t *testing.T) {
	sink := &sink{}
	web := httptest.NewServer(sink)
	defer web.Close()
	s, c, _ := withGRPC(t, model(t, small, 1), func(o *Options) { o.Mirror = web.URL })
	if _, err := c.ModelInfer(t.Context(), message()); err != nil {
		t.Fatal(err)
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	sink.mu.Lock()
	defer sink.mu.Unlock()
	if len(sink.events) != 2 {
		t.Fatalf("%d events, want the request and the response", len(sink.events))
	}
	var r inference.Request
	first := sink.events[0]
	headerLength, err := strconv.Atoi(first.Get(inference.HeaderLength))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Parse([]byte(first.body), headerLength, 12); err != nil {
		t.Fatal(err)
	}
	pixels, n, err := r.Images(nil, small.Input, 1)
	if err != nil || n != 1 || pixels[small.Input.Size()-1] != 1 {
		t.Error(pixels, n, err)
	}
}

// TestTraces: a request's span continues the caller's trace and reaches the
// collector.
func TestTraces(t *testing.T) {
	var mu sync.Mutex
	var got strings.Builder
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		got.WriteString(r.URL.Path)
		got.Write(body)
	}))
	defer collector.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL)
	traces, stop, err := traceProvider(t.Context(), "digits")
	if err != nil {
		t.Fatal(err)
	}
	s, c, _ := withGRPC(t, model(t, small, 1), func(o *Options) { o.Traces = traces })
	parent := func(id string) string { return "00-" + strings.Repeat(id, 16) + "-0102030405060708-01" }
	if resp, _ := do(t, "POST", s.url+"/v2/models/digits/infer", one, "traceparent", parent("a1")); resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	if _, err := c.ModelInfer(metadata.AppendToOutgoingContext(t.Context(), "traceparent", parent("b2")), message()); err != nil {
		t.Fatal(err)
	}
	do(t, "GET", s.url+"/v2/health/ready", "", "traceparent", parent("c3"))
	if err := stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	for text, want := range map[string]bool{"/v1/traces": true, "digits": true, strings.Repeat("\xa1", 16): true, strings.Repeat("\xb2", 16): true, strings.Repeat("\xc3", 16): false} {
		if strings.Contains(got.String(), text) != want {
			t.Errorf("%q is in what the collector got: %v, want %v", text, !want, want)
		}
	}

	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
	if traces, _, err := traceProvider(t.Context(), "digits"); err != nil || traces != nil {
		t.Errorf("without an endpoint: %v, %v", traces, err)
	}
}
