package serve

import (
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"testing"

	"bytes"

	"github.com/temper-ml/temper/runners/step/serve/inference"
)

// BenchmarkInferHTTP is one image a request over keep-alive connections on
// loopback, client included, on as many connections as cores.
func BenchmarkInferHTTP(b *testing.B) {
	for _, binary := range []bool{false, true} {
		b.Run(fmt.Sprintf("binary=%v", binary), func(b *testing.B) {
			s := start(b, model(b, wong, 1), func(o *Options) { o.Log = slog.New(slog.DiscardHandler) })
			x := make([]float32, wong.Input.Size())
			for i := range x {
				x[i] = float32(rand.IntN(256)) / 255
			}
			body, headerLength := inference.AppendRequest(nil, x, 1, wong.Input, binary)
			transport := &http.Transport{MaxIdleConnsPerHost: 64}
			defer transport.CloseIdleConnections()
			b.ReportAllocs()
			b.SetBytes(int64(len(body)))
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					req, err := http.NewRequest("POST", s.url+"/v2/models/digits/infer", bytes.NewReader(body))
					if err != nil {
						b.Fatal(err)
					}
					if headerLength >= 0 {
						req.Header.Set(inference.HeaderLength, strconv.Itoa(headerLength))
					}
					resp, err := transport.RoundTrip(req)
					if err != nil {
						b.Fatal(err)
					}
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					if resp.StatusCode != 200 {
						b.Fatal(resp.Status)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
		})
	}
}

// BenchmarkPredict is the model alone: one image, one core.
func BenchmarkPredict(b *testing.B) {
	p, err := newPredictor(model(b, wong, 1), newMetrics().passes)
	if err != nil {
		b.Fatal(err)
	}
	r := &rows{n: 1, pixels: make([]float32, wong.Input.Size()), probabilities: make([]float32, 10), labels: make([]int64, 1)}
	for b.Loop() {
		if err := p.predict(b.Context(), r); err != nil {
			b.Fatal(err)
		}
	}
}
