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
	w := writer{Network: n, names: map[int]string{-1: inputName}, flat: map[int]bool{}}
	nodes := w.nodes()
	in := n.Input
	head := appendMessage(nil, 2, []byte(n.Name))
	tail := appendMessage(w.constants, 11, declare(inputName, in.Channels, in.Height, in.Width))
	tail = appendMessage(tail, 12, declare(outputName, n.Classes()))

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

// writer writes a network's nodes. A layer's output is either [N, channels,
// height, width] or flat, [N, features] in the same order.
type writer struct {
	*nn.Network
	list      []made
	constants []byte         // tensors that are no parameters
	names     map[int]string // of each layer's output
	flat      map[int]bool   // whether it is flat
}

// made is a node to be written.
type made struct {
	name, op   string
	inputs     []string
	attributes [][]byte
}

// add makes a node and returns its output's name, which is the node's.
func (w *writer) add(name, op string, inputs []string, attributes ...[]byte) string {
	w.list = append(w.list, made{name, op, inputs, attributes})
	return name
}

// constant makes a tensor and returns its name.
func (w *writer) constant(name string, dataType int, raw []byte, dims ...int) string {
	var t []byte
	for _, d := range dims {
		t = appendInt(t, 1, d)
	}
	t = appendInt(t, 2, dataType)
	t = appendMessage(t, 8, []byte(name))
	w.constants = appendMessage(w.constants, 5, appendMessage(t, 9, raw))
	return name
}

func (w *writer) shape(name string, dims ...int) string {
	var raw []byte
	for _, d := range dims {
		raw = binary.LittleEndian.AppendUint64(raw, uint64(d))
	}
	return w.constant(name, typeInt64, raw, len(dims))
}

func (w *writer) floats(name string, values []float32, dims ...int) string {
	return w.constant(name, typeFloat, float32Bytes(nil, values...), dims...)
}

// image returns the name of an input of layer i, not flat.
func (w *writer) image(i, k int) string {
	from := w.Inputs(i)[k]
	if !w.flat[from] {
		return w.names[from]
	}
	name := fmt.Sprintf("%d.", i)
	if k > 0 {
		name += fmt.Sprintf("%d.", k)
	}
	s := w.InputShapes(i)[k]
	return w.add(name+"Reshape", "Reshape", []string{w.names[from], w.shape(name+"shape", 0, s.Channels, s.Height, s.Width)}) // 0 keeps N
}

// vector returns the name of an input of layer i, flat.
func (w *writer) vector(i int) string {
	from := w.Inputs(i)[0]
	if w.flat[from] {
		return w.names[from]
	}
	return w.add(fmt.Sprintf("%d.Flatten", i), "Flatten", []string{w.names[from]}, oneInt("axis", 1))
}

// alike returns the names of all inputs of layer i, either all flat, which they
// may be where each is one pixel, or none.
func (w *writer) alike(i int) (names []string, flat bool) {
	flat = true
	for k, from := range w.Inputs(i) {
		s := w.InputShapes(i)[k]
		flat = flat && w.flat[from] && s.Height*s.Width == 1
	}
	for k, from := range w.Inputs(i) {
		if flat {
			names = append(names, w.names[from])
		} else {
			names = append(names, w.image(i, k))
		}
	}
	return names, flat
}

// nodes writes all of them.
func (w *writer) nodes() []byte {
	for i, l := range w.Layers {
		w.names[i], w.flat[i] = w.layer(i, l)
		if l.ReLU() {
			w.names[i] = w.add(fmt.Sprintf("%d.Relu", i), "Relu", []string{w.names[i]})
		}
	}
	if last := len(w.Layers) - 1; !w.flat[last] {
		w.add("Flatten", "Flatten", []string{w.names[last]}, oneInt("axis", 1))
	}
	var all []byte
	for i, n := range w.list {
		var m []byte
		for _, in := range n.inputs {
			m = appendMessage(m, 1, []byte(in))
		}
		out := n.name
		if i == len(w.list)-1 {
			out = outputName
		}
		m = appendMessage(m, 2, []byte(out))
		m = appendMessage(m, 3, []byte(n.name))
		m = appendMessage(m, 4, []byte(n.op))
		for _, a := range n.attributes {
			m = appendMessage(m, 5, a)
		}
		all = appendMessage(all, 1, m)
	}
	return all
}

// layer makes a layer's nodes and returns the name of its output, before a
// ReLU, and whether that is flat.
func (w *writer) layer(i int, l nn.Layer) (output string, flat bool) {
	named := func(part string) string { return fmt.Sprintf("%d.%s", i, part) }
	parameters := []string{named("weight"), named("bias")}
	switch {
	case l.Conv != nil:
		c := l.Conv
		attributes := [][]byte{ints("kernel_shape", c.Kernel, c.Kernel), ints("pads", c.Padding, c.Padding, c.Padding, c.Padding), ints("strides", c.Step(), c.Step())}
		if c.Dilation > 1 {
			attributes = append(attributes, ints("dilations", c.Dilation, c.Dilation))
		}
		if c.Groups > 1 {
			attributes = append(attributes, oneInt("group", c.Groups))
		}
		return w.add(named("Conv"), "Conv", append([]string{w.image(i, 0)}, parameters...), attributes...), false
	case l.MaxPool != nil:
		return w.pool(i, "MaxPool", l.MaxPool.Size, l.MaxPool.Step(), l.MaxPool.Padding), false
	case l.AvgPool != nil && l.AvgPool.Size == 0:
		return w.add(named("GlobalAveragePool"), "GlobalAveragePool", []string{w.image(i, 0)}), false
	case l.AvgPool != nil:
		p := l.AvgPool
		if p.CountPadding {
			return w.pool(i, "AveragePool", p.Size, p.Step(), p.Padding, oneInt("count_include_pad", 1)), false
		}
		return w.pool(i, "AveragePool", p.Size, p.Step(), p.Padding), false
	case l.Dense != nil:
		return w.add(named("Gemm"), "Gemm", append([]string{w.vector(i)}, parameters...), oneInt("transB", 1)), true
	case l.Affine != nil:
		// A batch normalisation of mean 0 and variance 1.
		in, flat := w.alike(i)
		c := w.LayerShapes()[i+1].Channels
		mean := w.floats(named("mean"), make([]float32, c), c)
		variance := w.floats(named("variance"), slices.Repeat([]float32{1}, c), c)
		return w.add(named("BatchNormalization"), "BatchNormalization", append(append(in, parameters...), mean, variance), oneFloat("epsilon", 0)), flat
	case l.Normalise != nil:
		in, flat := w.alike(i)
		dims := func(values []float32) []int {
			if flat || len(values) == 1 {
				return []int{len(values)}
			}
			return []int{len(values), 1, 1}
		}
		mean, std := l.Normalise.Mean, l.Normalise.Std
		centred := w.add(named("Sub"), "Sub", append(in, w.floats(named("mean"), mean, dims(mean)...)))
		return w.add(named("Div"), "Div", []string{centred, w.floats(named("std"), std, dims(std)...)}), flat
	case l.Activation != nil:
		return w.activation(i, l.Activation)
	case l.Combine != nil:
		in, flat := w.alike(i)
		op := map[string]string{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}[l.Combine.Operator]
		return w.add(named(op), op, in), flat
	case l.Concat != nil:
		in, flat := w.alike(i)
		return w.add(named("Concat"), "Concat", in, oneInt("axis", 1)), flat
	case l.Pad != nil:
		p := l.Pad
		pads := w.shape(named("pads"), 0, 0, p.Top, p.Left, 0, 0, p.Bottom, p.Right)
		return w.add(named("Pad"), "Pad", []string{w.image(i, 0), pads, w.floats(named("value"), []float32{p.Value})}), false
	}
	return w.permute(i, l.Permute), false
}

func (w *writer) pool(i int, op string, size, step, padding int, more ...[]byte) string {
	attributes := [][]byte{ints("kernel_shape", size, size)}
	if padding > 0 {
		attributes = append(attributes, ints("pads", padding, padding, padding, padding))
	}
	attributes = append(append(attributes, ints("strides", step, step)), more...)
	return w.add(fmt.Sprintf("%d.%s", i, op), op, []string{w.image(i, 0)}, attributes...)
}

func (w *writer) activation(i int, a *nn.Activation) (output string, flat bool) {
	from := w.Inputs(i)[0]
	in, flat := []string{w.names[from]}, w.flat[from]
	add := func(op string, attributes ...[]byte) (string, bool) {
		return w.add(fmt.Sprintf("%d.%s", i, op), op, in, attributes...), flat
	}
	switch a.Function {
	case "relu":
		return add("Relu")
	case "leaky_relu":
		return add("LeakyRelu", oneFloat("alpha", a.Slope))
	case "sigmoid":
		return add("Sigmoid")
	case "tanh":
		return add("Tanh")
	case "clip":
		in = append(in, w.floats(fmt.Sprintf("%d.min", i), []float32{a.Min}), w.floats(fmt.Sprintf("%d.max", i), []float32{a.Max}))
		return add("Clip")
	}
	in, flat = []string{w.vector(i)}, true
	return add("Softmax", oneInt("axis", 1))
}

// permute counts through the input in the order of its memory, which is height,
// width, channels, and puts the loops in the order of the output's.
func (w *writer) permute(i int, p *nn.Permute) string {
	named := func(part string) string { return fmt.Sprintf("%d.%s", i, part) }
	order := make([]int, len(p.Sizes)) // loops as they are in the input
	for k := range order {
		order[k] = k
	}
	slices.SortFunc(order, func(a, b int) int { return p.Strides[b] - p.Strides[a] })
	loops, perm := []int{0}, make([]int, len(order)+1)
	for k, loop := range order {
		loops = append(loops, p.Sizes[loop])
		perm[1+loop] = 1 + k
	}
	s := p.Shape
	x := w.add(named("Last"), "Transpose", []string{w.image(i, 0)}, ints("perm", 0, 2, 3, 1))
	x = w.add(named("Loops"), "Reshape", []string{x, w.shape(named("loops"), loops...)})
	x = w.add(named("Permute"), "Transpose", []string{x}, ints("perm", perm...))
	x = w.add(named("Shape"), "Reshape", []string{x, w.shape(named("to"), 0, s.Height, s.Width, s.Channels)})
	return w.add(named("First"), "Transpose", []string{x}, ints("perm", 0, 3, 1, 2))
}

// declare makes an input or output of the graph: [N, dims...] of float32.
func declare(name string, dims ...int) []byte {
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

func oneFloat(name string, v float32) []byte {
	m := protowire.AppendTag(appendMessage(nil, 1, []byte(name)), 2, protowire.Fixed32Type)
	return appendInt(protowire.AppendFixed32(m, math.Float32bits(v)), 20, kindFloat)
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
		denseOrder(places(image(0, n.InputShapes(p.Layer)[0]).axes()), p.Shape[1], true, put)
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
