package onnx

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/temper-ml/temper/models/nn"
)

// Marshal writes a network with metadata. The same network and metadata give
// the same bytes. Weights that (*nn.Network).Check refuses are not written, so
// whatever Marshal writes Unmarshal reads.
func Marshal(n *nn.Network, metadata map[string]string) ([]byte, error) {
	if err := n.Check(); err != nil {
		return nil, fmt.Errorf("onnx: %w", err)
	}
	if len(n.Name) > maxName || !utf8.ValidString(n.Name) || !printable(n.Name) {
		return nil, fmt.Errorf("onnx: network name %q: must be printable UTF-8 of at most %d bytes", n.Name, maxName)
	}
	size := 0
	for key, value := range metadata {
		size += len(key) + len(value)
		if len(key) > maxName || !utf8.ValidString(key) || !utf8.ValidString(value) {
			return nil, fmt.Errorf("onnx: metadata %q: must be UTF-8, the key at most %d bytes", key, maxName)
		}
	}
	if len(metadata) > maxMetadata || size > maxMetadataSize {
		return nil, fmt.Errorf("onnx: metadata: %d entries of %d bytes in all: at most %d of %d", len(metadata), size, maxMetadata, maxMetadataSize)
	}
	nodes, shapes := nodesOf(n)
	in := n.Input
	head := appendMessage(nil, 2, []byte(n.Name))
	tail := appendMessage(shapes, 11, value(inputName, in.Channels, in.Height, in.Width))
	tail = appendMessage(tail, 12, value(outputName, n.Classes()))

	end := appendMessage(nil, 8, appendInt(appendMessage(nil, 1, nil), 2, opset))
	for _, key := range slices.Sorted(maps.Keys(metadata)) {
		entry := appendMessage(nil, 1, []byte(key))
		end = appendMessage(end, 14, appendMessage(entry, 2, []byte(metadata[key])))
	}

	// The weights are most of the file: they are written straight into it, which
	// needs the sizes of the messages around them first.
	graphSize := len(nodes) + len(head) + len(tail)
	for _, p := range n.Parameters {
		graphSize += protowire.SizeTag(5) + protowire.SizeBytes(tensorSize(p))
	}
	start := appendMessage(appendInt(nil, 1, irVersion), 2, []byte(producer))
	start = protowire.AppendVarint(protowire.AppendTag(start, 7, protowire.BytesType), uint64(graphSize))
	model := make([]byte, 0, len(start)+graphSize+len(end))
	model = append(model, start...)
	model = append(model, nodes...)
	model = append(model, head...)
	for _, p := range n.Parameters {
		model = protowire.AppendTag(model, 5, protowire.BytesType)
		model = protowire.AppendVarint(model, uint64(tensorSize(p)))
		model = appendTensor(model, n, p)
	}
	model = append(model, tail...)
	return append(model, end...), nil
}

// nodesOf writes a network's nodes, and the tensors of its reshapes.
func nodesOf(n *nn.Network) (nodes, tensors []byte) {
	value, flat := inputName, false
	add := func(layer int, op string, inputs []string, attributes ...[]byte) {
		var m []byte
		for _, in := range append([]string{value}, inputs...) {
			m = appendMessage(m, 1, []byte(in))
		}
		name := fmt.Sprintf("%d.%s", layer, op)
		if value = name; layer == len(n.Layers)-1 && op == "Gemm" {
			value = outputName // Shapes saw that the last layer is dense without ReLU
		}
		m = appendMessage(m, 2, []byte(value))
		m = appendMessage(m, 3, []byte(name))
		m = appendMessage(m, 4, []byte(op))
		for _, a := range attributes {
			m = appendMessage(m, 5, a)
		}
		nodes = appendMessage(nodes, 1, m)
	}
	for i, l := range n.Layers {
		parameters := []string{fmt.Sprintf("%d.weight", i), fmt.Sprintf("%d.bias", i)}
		if flat && l.Dense == nil {
			// Back to images of one pixel, for a convolution or pool after a dense layer.
			shape := fmt.Sprintf("%d.shape", i)
			add(i, "Reshape", []string{shape})
			var t []byte
			t = appendInt(t, 1, 4)
			t = appendInt(t, 2, typeInt64)
			t = appendMessage(t, 8, []byte(shape))
			var raw []byte
			for _, d := range []uint64{0, uint64(n.LayerShapes()[i].Channels), 1, 1} { // 0 keeps N
				raw = binary.LittleEndian.AppendUint64(raw, d)
			}
			tensors = appendMessage(tensors, 5, appendMessage(t, 9, raw))
			flat = false
		}
		relu := false
		switch {
		case l.Conv != nil:
			c := l.Conv
			add(i, "Conv", parameters, ints("kernel_shape", c.Kernel, c.Kernel), ints("pads", c.Padding, c.Padding, c.Padding, c.Padding), ints("strides", c.Step(), c.Step()))
			relu = c.ReLU
		case l.MaxPool != nil:
			add(i, "MaxPool", nil, ints("kernel_shape", l.MaxPool.Size, l.MaxPool.Size), ints("strides", l.MaxPool.Size, l.MaxPool.Size))
		case l.Dense != nil:
			if !flat {
				add(i, "Flatten", nil, oneInt("axis", 1))
				flat = true
			}
			add(i, "Gemm", parameters, oneInt("transB", 1))
			relu = l.Dense.ReLU
		}
		if relu {
			add(i, "Relu", nil)
		}
	}
	return nodes, tensors
}

// value declares an input or output of the graph: [N, dims...] of float32.
func value(name string, dims ...int) []byte {
	shape := appendMessage(nil, 1, appendMessage(nil, 2, []byte(batchName)))
	for _, d := range dims {
		shape = appendMessage(shape, 1, appendInt(nil, 1, d))
	}
	tensorType := appendMessage(appendInt(nil, 1, typeFloat), 2, shape)
	return appendMessage(appendMessage(nil, 1, []byte(name)), 2, appendMessage(nil, 1, tensorType))
}

func ints(name string, values ...int) []byte {
	m := appendMessage(nil, 1, []byte(name))
	for _, v := range values {
		m = appendInt(m, 8, v)
	}
	return appendInt(m, 20, kindInts)
}

func oneInt(name string, v int) []byte {
	return appendInt(appendInt(appendMessage(nil, 1, []byte(name)), 3, v), 20, kindInt)
}

// tensorHead is a parameter's tensor without its elements.
func tensorHead(p nn.Parameter) []byte {
	dims := p.Shape
	switch len(p.Shape) {
	case 4: // [k, k, in, out]
		dims = []int{p.Shape[3], p.Shape[2], p.Shape[0], p.Shape[1]}
	case 2: // [in, out]
		dims = []int{p.Shape[1], p.Shape[0]}
	}
	var m []byte
	for _, d := range dims {
		m = appendInt(m, 1, d)
	}
	m = appendInt(m, 2, typeFloat)
	return appendMessage(m, 8, []byte(p.Name))
}

func tensorSize(p nn.Parameter) int {
	return len(tensorHead(p)) + protowire.SizeTag(9) + protowire.SizeBytes(4*len(p.Data))
}

// appendTensor appends a parameter in ONNX's layout; b has room for it.
func appendTensor(b []byte, n *nn.Network, p nn.Parameter) []byte {
	b = append(b, tensorHead(p)...)
	b = protowire.AppendTag(b, 9, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(4*len(p.Data)))
	at := len(b)
	b = b[:at+4*len(p.Data)]
	raw := b[at:]
	put := func(here, there int) {
		binary.LittleEndian.PutUint32(raw[4*there:], math.Float32bits(p.Data[here]))
	}
	switch len(p.Shape) {
	case 4:
		convOrder(p.Shape[0], p.Shape[2], p.Shape[3], put)
	case 2:
		denseOrder(n.LayerShapes()[p.Layer], p.Shape[1], true, put)
	default:
		for i := range p.Data {
			put(i, i)
		}
	}
	return b
}

func appendMessage(b []byte, field protowire.Number, message []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), message)
}

func appendInt(b []byte, field protowire.Number, v int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), uint64(v))
}
