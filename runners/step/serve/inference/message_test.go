package inference

import (
	"math"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/temper-ml/temper/runners/step/serve/inference/oip"
)

func grayMessage(change func(*oip.ModelInferRequest)) *oip.ModelInferRequest {
	m := &oip.ModelInferRequest{Inputs: []*oip.ModelInferRequest_InferInputTensor{{
		Name: Input, Datatype: "FP32", Shape: []int64{1, 1, 2, 3},
		Contents: &oip.InferTensorContents{Fp32Contents: []float32{0, 0.5, 1, 0.25, 0.125, 0}},
	}}}
	change(m)
	return m
}

func TestMessageReusesMemory(t *testing.T) {
	var r Request
	for _, n := range []int{2, 1, 2} { // a smaller one after a larger one, and again
		m := grayMessage(func(m *oip.ModelInferRequest) {
			m.Inputs[0].Shape[0] = int64(n)
			for range n - 1 {
				m.Inputs[0].Contents.Fp32Contents = append(m.Inputs[0].Contents.Fp32Contents, 1, 1, 1, 1, 1, 1)
			}
		})
		if err := r.ParseMessage(m, 4*gray.Size()); err != nil {
			t.Fatal(err)
		}
		pixels, got, err := r.Images(nil, gray, 4)
		if err != nil || got != n || pixels[1] != 0.5 || len(pixels) != n*gray.Size() {
			t.Errorf("%v, %d, %v", pixels, got, err)
		}
	}
}

// FuzzMessage: no panic; what is accepted has pixels from 0 to 1.
func FuzzMessage(f *testing.F) {
	for _, change := range []func(*oip.ModelInferRequest){
		func(*oip.ModelInferRequest) {},
		func(m *oip.ModelInferRequest) { m.Inputs[0].Shape = []int64{math.MaxInt64, 1, 2, 3} },
		func(m *oip.ModelInferRequest) { m.Inputs[0].Contents.Fp32Contents[0] = float32(math.NaN()) },
		func(m *oip.ModelInferRequest) { m.Inputs[0] = nil },
		func(m *oip.ModelInferRequest) {
			m.Inputs[0].Contents, m.RawInputContents = nil, [][]byte{make([]byte, 24)}
		},
	} {
		data, err := proto.Marshal(grayMessage(change))
		if err != nil {
			continue // a nil input
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var m oip.ModelInferRequest
		var r Request
		if proto.Unmarshal(data, &m) != nil || r.ParseMessage(&m, 4*gray.Size()) != nil {
			return
		}
		pixels, n, err := r.Images(nil, gray, 4)
		if err != nil {
			return
		}
		if n < 1 || n > 4 || len(pixels) != n*gray.Size() {
			t.Fatalf("%d values for %d images", len(pixels), n)
		}
		for _, v := range pixels {
			if !(v >= 0 && v <= 1) {
				t.Fatalf("pixel %v", v)
			}
		}
	})
}
