package inference

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/temper-ml/temper/runners/step/serve/inference/oip"
)

// ParseMessage reads a gRPC request into r, reusing r's memory, as Parse reads
// one of HTTP. Nothing in r points into the message afterwards.
func (r *Request) ParseMessage(m *oip.ModelInferRequest, maxValues int) error {
	inputs := r.Inputs[:0]
	*r = Request{ID: m.GetId(), Outputs: r.Outputs[:0]}
	raw := m.GetRawInputContents()
	r.BinaryOutput = len(raw) > 0 // answered as it was asked
	switch {
	case len(r.ID) > maxString:
		return fmt.Errorf("an id of more than %d bytes", maxString)
	case len(m.GetInputs()) == 0:
		return errors.New("the request has no inputs: send one, \"input\" of shape [N, C, H, W]")
	case len(m.GetInputs()) > maxTensors:
		return fmt.Errorf("more than %d inputs", maxTensors)
	case len(m.GetOutputs()) > maxTensors:
		return fmt.Errorf("more than %d outputs", maxTensors)
	case len(raw) > 0 && len(raw) != len(m.GetInputs()):
		return fmt.Errorf("%d inputs and %d raw_input_contents: send one for each, or none", len(m.GetInputs()), len(raw))
	}
	left := maxValues
	for i, in := range m.GetInputs() {
		inputs = slices.Grow(inputs, 1)[:i+1] // keeps the memory of the tensor that was here
		t := &inputs[i]
		t.reset()
		var data []byte
		if len(raw) > 0 {
			data = raw[i]
		}
		if err := t.fromMessage(in, data, len(raw) > 0, left); err != nil {
			return fmt.Errorf("input %q: %w", cut(in.GetName()), err)
		}
		left -= len(t.Values)
	}
	for _, o := range m.GetOutputs() {
		if len(o.GetName()) > maxString {
			return fmt.Errorf("an output's name of more than %d bytes", maxString)
		}
		r.Outputs = append(r.Outputs, Output{Name: o.GetName(), Binary: r.BinaryOutput})
	}
	r.Inputs = inputs
	return nil
}

func cut(s string) string { return s[:min(len(s), maxString)] }

func (t *Tensor) fromMessage(in *oip.ModelInferRequest_InferInputTensor, raw []byte, binary bool, maxValues int) error {
	if len(in.GetShape()) > maxDepth {
		return fmt.Errorf("a shape of more than %d dimensions", maxDepth)
	}
	t.Name, t.Datatype = in.GetName(), in.GetDatatype()
	for _, d := range in.GetShape() {
		if d < 1 || d > math.MaxInt32 {
			return fmt.Errorf("shape %v: every dimension must be at least 1, and their product fit a request", in.GetShape())
		}
		t.Shape = append(t.Shape, int(d))
	}
	t.hasShape = len(t.Shape) > 0
	if _, ok := in.GetParameters()["shared_memory_region"]; ok {
		return errors.New("shared memory is not supported")
	}
	if binary {
		if in.GetContents() != nil {
			return errors.New("both contents and raw_input_contents: send one")
		}
		t.binary = len(raw)
	} else if err := t.contents(in.GetContents(), maxValues); err != nil {
		return err
	}
	_, err := t.finish(raw, maxValues) // takes all of raw, or refuses it
	return err
}

// contents takes the values from the field of the tensor's datatype.
func (t *Tensor) contents(c *oip.InferTensorContents, maxValues int) error {
	t.hasData = true
	switch t.Datatype {
	case "FP32":
		return take(t, c.GetFp32Contents(), maxValues)
	case "FP64":
		return take(t, c.GetFp64Contents(), maxValues)
	case "UINT8":
		return take(t, c.GetUintContents(), maxValues)
	case "INT32":
		return take(t, c.GetIntContents(), maxValues)
	case "INT64":
		return take(t, c.GetInt64Contents(), maxValues)
	}
	return nil // which finish refuses
}

func take[T float32 | float64 | uint32 | int32 | int64](t *Tensor, values []T, maxValues int) error {
	if len(values) > maxValues {
		return fmt.Errorf("contents have more than %d values, the most that one request may hold", maxValues)
	}
	for _, v := range values {
		t.Values = append(t.Values, float32(v))
	}
	return nil
}

// Message is the response with the given outputs (none: both) for gRPC.
func (a *Answer) Message(outputs []Output) *oip.ModelInferResponse {
	m := &oip.ModelInferResponse{ModelName: a.Model, ModelVersion: a.Version, Id: a.ID}
	for _, o := range outputs {
		t := &oip.ModelInferResponse_InferOutputTensor{Name: o.Name, Shape: []int64{int64(len(a.Labels))}}
		var raw []byte
		switch {
		case o.Name == Probabilities:
			t.Datatype, t.Shape = "FP32", append(t.Shape, int64(a.Classes))
			if o.Binary {
				raw = appendBinary(nil, a.Probabilities)
			} else {
				t.Contents = &oip.InferTensorContents{Fp32Contents: append([]float32(nil), a.Probabilities...)}
			}
		default:
			t.Datatype = "INT64"
			if o.Binary {
				for _, l := range a.Labels {
					raw = binary.LittleEndian.AppendUint64(raw, uint64(l))
				}
			} else {
				t.Contents = &oip.InferTensorContents{Int64Contents: append([]int64(nil), a.Labels...)}
			}
		}
		if o.Binary {
			m.RawOutputContents = append(m.RawOutputContents, raw)
		}
		m.Outputs = append(m.Outputs, t)
	}
	return m
}
