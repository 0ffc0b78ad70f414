// Package inference reads and writes the messages of the Open Inference
// Protocol, version 2 (the V2 protocol of KServe and Triton), over HTTP with
// its binary-data extension and over gRPC, as far as image classifiers need it: one input
// tensor of pixels, the outputs "probabilities" and "label".
//
// The input is called "input" and has the shape [N, C, H, W], or
// [N, C*H*W] in the same order. Its datatype says what the values are:
//
//	FP32, FP64            pixels from 0 to 1
//	UINT8, INT32, INT64   bytes from 0 to 255, divided by 255
//
// Everything else is refused with an error that says what is expected; every
// error of Parse, ParseMessage and Images is the sender's fault (HTTP 400).
package inference

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/temper-ml/temper/models/nn"
)

// Names of the tensors of an image classifier.
const (
	Input         = "input"
	Probabilities = "probabilities" // FP32 [N, classes]: the softmax of the logits
	Label         = "label"         // INT64 [N]: the class of the largest probability
	Logits        = "logits"        // FP32 [N, classes]: what the ONNX file itself has
)

// HeaderLength is the HTTP header of the binary-data extension: the length of
// the JSON that comes before the binary tensors.
const HeaderLength = "Inference-Header-Content-Length"

// datatypes lists what Images understands, with the size of a value in bytes.
var datatypes = map[string]int{"FP32": 4, "FP64": 8, "UINT8": 1, "INT32": 4, "INT64": 8}

// Request is an inference request.
type Request struct {
	ID           string
	Parameters   json.RawMessage // the request's parameters as sent; nil when absent
	Inputs       []Tensor
	Outputs      []Output // empty: all outputs
	BinaryOutput bool     // outputs are binary unless they say otherwise
}

// Tensor is one input of a request. Values are as sent: not yet divided by
// 255, not yet checked against a model.
type Tensor struct {
	Name, Datatype string
	Shape          []int
	Values         []float32

	nested   []int // the lengths of nested arrays, outermost first
	depth    int   // of the arrays that hold numbers; -1 while not known
	binary   int   // bytes of binary data; -1 when the data is in the JSON
	hasData  bool
	hasShape bool
}

// Output is an output that a request asks for.
type Output struct {
	Name   string
	Binary bool

	explicit bool // Binary was set by the output itself, not by the request
}

// Parse reads a request into r, reusing r's memory. headerLength is the value
// of the HeaderLength HTTP header, -1 where the header is absent. A request
// may hold at most maxValues values. Nothing in r points into body afterwards.
func (r *Request) Parse(body []byte, headerLength, maxValues int) error {
	r.ID, r.Parameters, r.Outputs, r.BinaryOutput = "", r.Parameters[:0], r.Outputs[:0], false
	inputs := r.Inputs[:0]
	r.Inputs = nil

	header := body
	if headerLength > len(body) {
		return fmt.Errorf("%s is %d, but the body has only %d bytes", HeaderLength, headerLength, len(body))
	}
	if headerLength >= 0 {
		header = body[:headerLength]
	}
	p := &parser{text: header}
	left := maxValues
	err := p.object(func(key []byte) (err error) {
		switch string(key) {
		case "id":
			r.ID, err = p.string()
		case "parameters":
			start := p.at
			if err := p.object(func(key []byte) (err error) {
				if string(key) == "binary_data_output" {
					r.BinaryOutput, err = p.bool()
					return err
				}
				return p.skip(2)
			}); err != nil {
				return err
			}
			if p.at-start > maxEcho {
				return fmt.Errorf("parameters of more than %d bytes", maxEcho)
			}
			r.Parameters = append(r.Parameters, p.text[start:p.at]...)
		case "inputs":
			err = p.array(func() error {
				if len(inputs) == maxTensors {
					return fmt.Errorf("more than %d inputs", maxTensors)
				}
				inputs = slices.Grow(inputs, 1)[:len(inputs)+1] // keeps the memory of the tensor that was here
				t := &inputs[len(inputs)-1]
				if err := p.tensor(t, left); err != nil {
					return err
				}
				left -= len(t.Values)
				return nil
			})
		case "outputs":
			err = p.array(func() error {
				if len(r.Outputs) == maxTensors {
					return fmt.Errorf("more than %d outputs", maxTensors)
				}
				o, err := p.output()
				r.Outputs = append(r.Outputs, o)
				return err
			})
		default:
			err = p.skip(1)
		}
		return err
	})
	if err == nil {
		err = p.end()
	}
	if err != nil {
		return err
	}
	if len(inputs) == 0 {
		return errors.New(`the request has no inputs: send {"inputs": [{"name": "input", "shape": [1, C, H, W], "datatype": "FP32", "data": [...]}]}`)
	}
	rest := body[len(header):]
	for i := range inputs {
		if rest, err = inputs[i].finish(rest, left); err != nil {
			return fmt.Errorf("input %q: %w", inputs[i].Name, err)
		}
		if inputs[i].binary >= 0 {
			left -= len(inputs[i].Values)
		}
	}
	if len(rest) > 0 {
		return fmt.Errorf("%d bytes after the last binary tensor", len(rest))
	}
	for i := range r.Outputs {
		if o := &r.Outputs[i]; !o.explicit {
			o.Binary = r.BinaryOutput
		}
	}
	r.Inputs = inputs
	return nil
}

func (p *parser) output() (o Output, err error) {
	err = p.object(func(key []byte) (err error) {
		switch string(key) {
		case "name":
			o.Name, err = p.string()
		case "parameters":
			err = p.object(func(key []byte) (err error) {
				switch string(key) {
				case "binary_data":
					o.explicit = true
					o.Binary, err = p.bool()
				case "classification":
					err = errors.New(`outputs by "classification" are not supported: ask for "label" or "probabilities"`)
				case "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset":
					err = errors.New("shared memory is not supported")
				default:
					err = p.skip(4)
				}
				return err
			})
		default:
			err = p.skip(3)
		}
		return err
	})
	return o, err
}

// reset forgets all but the memory.
func (t *Tensor) reset() {
	*t = Tensor{Shape: t.Shape[:0], Values: t.Values[:0], nested: t.nested[:0], depth: -1, binary: -1}
}

func (p *parser) tensor(t *Tensor, maxValues int) error {
	t.reset()
	return p.object(func(key []byte) (err error) {
		switch string(key) {
		case "name":
			t.Name, err = p.string()
		case "datatype":
			t.Datatype, err = p.string()
		case "shape":
			t.hasShape = true
			err = p.array(func() error {
				if len(t.Shape) == maxDepth {
					return fmt.Errorf("a shape of more than %d dimensions", maxDepth)
				}
				d, err := p.integer()
				t.Shape = append(t.Shape, d)
				return err
			})
		case "data":
			t.hasData = true
			err = p.data(t, 0, maxValues)
		case "parameters":
			err = p.object(func(key []byte) (err error) {
				switch string(key) {
				case "binary_data_size":
					t.binary, err = p.integer()
				case "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset":
					err = errors.New("shared memory is not supported")
				default:
					err = p.skip(4)
				}
				return err
			})
		default:
			err = p.skip(3)
		}
		return err
	})
}

// data reads the values of a tensor, flat or nested, and notes the shape of
// the nesting. depth counts the arrays around this one.
func (p *parser) data(t *Tensor, depth, maxValues int) error {
	if depth == maxDepth {
		return p.fail("nested deeper than %d", maxDepth)
	}
	if depth == len(t.nested) {
		t.nested = append(t.nested, -1) // length not yet known
	}
	n := 0
	if err := p.array(func() error {
		n++
		nested := p.next() == '['
		if t.depth < 0 && !nested {
			t.depth = depth
		}
		if t.depth >= 0 && nested != (depth < t.depth) {
			return p.fail("data mixes numbers and arrays")
		}
		if nested {
			return p.data(t, depth+1, maxValues)
		}
		for {
			v, err := p.number()
			if err == nil && len(t.Values) == maxValues {
				err = fmt.Errorf("data has more than %d values, the most that one request may hold", maxValues)
			}
			t.Values = append(t.Values, v)
			if err != nil {
				return err
			}
			// Without white space, as most clients write, the next number follows.
			if p.at+1 >= len(p.text) || p.text[p.at] != ',' || p.text[p.at+1]-'0' > 9 {
				return nil
			}
			p.at++
			n++
		}
	}); err != nil {
		return err
	}
	if t.nested[depth] >= 0 && t.nested[depth] != n {
		return fmt.Errorf("data is ragged: an array of %d beside one of %d", n, t.nested[depth])
	}
	t.nested[depth] = n
	return nil
}

// finish takes the tensor's binary data, if any, from the front of rest and
// checks the amount of data against the shape.
func (t *Tensor) finish(rest []byte, maxValues int) ([]byte, error) {
	size, known := datatypes[t.Datatype]
	switch {
	case !known:
		return nil, fmt.Errorf("datatype %q: send FP32 or FP64 (pixels from 0 to 1), or UINT8, INT32 or INT64 (bytes from 0 to 255)", t.Datatype)
	case !t.hasShape:
		return nil, errors.New("no shape")
	case t.hasData && t.binary >= 0:
		return nil, errors.New("both data and binary_data_size: send one")
	case !t.hasData && t.binary < 0:
		return nil, errors.New("no data: send data, or binary_data_size with binary data after the JSON")
	}
	want := 1
	for _, d := range t.Shape {
		if d < 1 || want > math.MaxInt32/d {
			return nil, fmt.Errorf("shape %v: every dimension must be at least 1, and their product fit a request", t.Shape)
		}
		want *= d
	}
	if t.binary >= 0 {
		switch {
		case want > maxValues:
			return nil, fmt.Errorf("shape %v has more than %d values, the most that one request may hold", t.Shape, maxValues)
		case t.binary != want*size:
			return nil, fmt.Errorf("binary_data_size is %d, but %s of shape %v is %d bytes", t.binary, t.Datatype, t.Shape, want*size)
		case t.binary > len(rest):
			return nil, fmt.Errorf("binary_data_size is %d, but only %d bytes are left (is the HTTP header %s set?)", t.binary, len(rest), HeaderLength)
		}
		t.decode(rest[:t.binary], want)
		rest = rest[t.binary:]
	}
	if len(t.Values) != want {
		return nil, fmt.Errorf("shape %v is %d values, but data has %d", t.Shape, want, len(t.Values))
	}
	if len(t.nested) > 1 && !slices.Equal(t.nested, t.Shape) {
		return nil, fmt.Errorf("data is nested as %v, but the shape is %v", t.nested, t.Shape)
	}
	return rest, nil
}

// decode reads n little-endian values. An integer that float32 rounds stays
// far outside 0 to 255, so Images still refuses it.
func (t *Tensor) decode(data []byte, n int) {
	t.Values = slices.Grow(t.Values[:0], n)[:n]
	for i := range t.Values {
		switch t.Datatype {
		case "FP32":
			t.Values[i] = math.Float32frombits(binary.LittleEndian.Uint32(data[4*i:]))
		case "FP64":
			t.Values[i] = float32(math.Float64frombits(binary.LittleEndian.Uint64(data[8*i:])))
		case "UINT8":
			t.Values[i] = float32(data[i])
		case "INT32":
			t.Values[i] = float32(int32(binary.LittleEndian.Uint32(data[4*i:])))
		case "INT64":
			t.Values[i] = float32(int64(binary.LittleEndian.Uint64(data[8*i:])))
		}
	}
}

// Images checks that the request is for images of the given shape, at most
// maxBatch of them, and returns how many there are and their pixels from 0 to
// 1 in package nn's order [n, height, width, channels]. The pixels are in
// dst's memory where that is large enough.
func (r *Request) Images(dst []float32, shape nn.Shape, maxBatch int) (pixels []float32, n int, err error) {
	if len(r.Inputs) != 1 || r.Inputs[0].Name != Input {
		var names []string
		for _, t := range r.Inputs {
			names = append(names, t.Name)
		}
		return nil, 0, fmt.Errorf("inputs %q: the model has exactly one input, %q", names, Input)
	}
	t := &r.Inputs[0]
	c, h, w := shape.Channels, shape.Height, shape.Width
	if s := t.Shape; !(len(s) == 4 && s[1] == c && s[2] == h && s[3] == w) && !(len(s) == 2 && s[1] == c*h*w) {
		return nil, 0, fmt.Errorf("input %q has shape %v: send [N, %d, %d, %d] or [N, %d]", t.Name, s, c, h, w, c*h*w)
	}
	n = t.Shape[0]
	if n > maxBatch {
		return nil, 0, fmt.Errorf("a batch of %d: at most %d examples in one request", n, maxBatch)
	}
	dst = slices.Grow(dst[:0], len(t.Values))[:len(t.Values)]
	if t.Datatype == "FP32" || t.Datatype == "FP64" {
		for i, v := range t.Values {
			if !(v >= 0 && v <= 1) { // also NaN
				return nil, 0, fmt.Errorf("pixel %d is %v: %s pixels are from 0 to 1", i, v, t.Datatype)
			}
		}
		copy(dst, t.Values)
	} else {
		for i, v := range t.Values {
			if !(v >= 0 && v <= 255) || v != float32(uint8(v)) {
				return nil, 0, fmt.Errorf("pixel %d is %v: %s pixels are whole numbers from 0 to 255", i, v, t.Datatype)
			}
			dst[i] = v / 255
		}
	}
	if c > 1 && h*w > 1 {
		channelsLast(dst, t.Values, n, shape)
	}
	return dst, n, nil
}

// channelsLast turns dst from [n, c, h, w] to [n, h, w, c]; scratch is
// overwritten and has the same length.
func channelsLast(dst, scratch []float32, n int, shape nn.Shape) {
	copy(scratch, dst)
	plane := shape.Height * shape.Width
	for i := range n {
		for c := range shape.Channels {
			from := scratch[(i*shape.Channels+c)*plane:][:plane]
			to := dst[i*plane*shape.Channels+c:]
			for j, v := range from {
				to[j*shape.Channels] = v
			}
		}
	}
}

// channelsFirst is the inverse of channelsLast, from src to dst.
func channelsFirst(dst, src []float32, n int, shape nn.Shape) {
	plane := shape.Height * shape.Width
	for i := range n {
		for c := range shape.Channels {
			to := dst[(i*shape.Channels+c)*plane:][:plane]
			from := src[i*plane*shape.Channels+c:]
			for j := range to {
				to[j] = from[j*shape.Channels]
			}
		}
	}
}
