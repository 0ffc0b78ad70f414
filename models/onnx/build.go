package onnx

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/temper-ml/temper/models/nn"
)

// builder follows a graph's only path from input to output and collects the
// layers on it.
type builder struct {
	graph   *graph
	tensors map[string]*tensor // initializers and constants, by name
	used    map[string]bool    // names of tensors that a node has read
	weights map[*tensor]bool   // tensors that are some layer's weight
	made    map[string]*node   // the node that made each value; nil for the input

	value  string   // what the next node must read
	shape  nn.Shape // of one example of the value, before it was flattened
	flat   bool     // the value is [N, features]
	batch  int64    // the size of N, 0 where it is free
	layers []nn.Layer
	fill   []func(weight, bias []float32) // copies each layer's parameters from the file
}

// operators are what a graph may consist of. Each checks its node, reads the
// value so far, and moves the builder's shape to that of the value it makes.
var operators map[string]func(*builder, *node) error

func init() {
	operators = map[string]func(*builder, *node) error{
		"Constant": (*builder).constant,
		"Conv":     (*builder).conv,
		"Flatten":  (*builder).flatten,
		"Gemm":     (*builder).gemm,
		"Identity": (*builder).identity,
		"MaxPool":  (*builder).maxPool,
		"Relu":     (*builder).relu,
		"Reshape":  (*builder).reshape,
	}
}

// build makes the network that a graph describes.
func build(g *graph) (*nn.Network, error) {
	b := &builder{graph: g, tensors: map[string]*tensor{}, used: map[string]bool{}, weights: map[*tensor]bool{}, made: map[string]*node{}}
	for _, t := range g.initializers {
		if err := b.addTensor(t.name, t); err != nil {
			return nil, err
		}
	}
	if err := b.input(); err != nil {
		return nil, err
	}
	d := nn.Description{Name: g.name, Input: b.shape}
	for _, n := range g.nodes {
		if err := b.apply(n); err != nil {
			return nil, fmt.Errorf("%v: %w", n, err)
		}
	}
	d.Layers = b.layers
	if err := b.output(&d); err != nil {
		return nil, err
	}
	net, err := nn.Zero(d)
	if err != nil {
		return nil, err
	}
	for i, fill := range b.fill {
		if fill != nil {
			fill(net.Weights(i))
		}
	}
	return net, nil
}

func (b *builder) addTensor(name string, t *tensor) error {
	if name == "" {
		return errors.New("a tensor without a name")
	}
	if b.tensors[name] != nil {
		return fmt.Errorf("tensor %q is there twice", name)
	}
	b.tensors[name] = t
	return nil
}

// input finds the graph's only input: files of old versions list initializers
// beside it.
func (b *builder) input() error {
	var in *valueInfo
	for _, v := range b.graph.inputs {
		if b.tensors[v.name] != nil {
			continue
		}
		if in != nil {
			return fmt.Errorf("inputs %q and %q: exactly one, the images, is supported", in.name, v.name)
		}
		in = v
	}
	if in == nil || in.name == "" {
		return errors.New("the graph has no input")
	}
	if in.elemType != typeFloat {
		return fmt.Errorf("input %q has element type %d: only float32 (1) is supported", in.name, in.elemType)
	}
	if len(in.dims) != 2 && len(in.dims) != 4 {
		return fmt.Errorf("input %q has shape %v: supported are [N, channels, height, width] and [N, features]", in.name, in.dims)
	}
	for _, d := range in.dims[1:] {
		if d < 1 || d > nn.MaxParameters {
			return fmt.Errorf("input %q has shape %v: only the first dimension may be free", in.name, in.dims)
		}
	}
	b.value, b.batch = in.name, in.dims[0]
	b.made[in.name] = nil
	if b.flat = len(in.dims) == 2; b.flat {
		b.shape = nn.Shape{Height: 1, Width: 1, Channels: int(in.dims[1])}
	} else {
		b.shape = nn.Shape{Height: int(in.dims[2]), Width: int(in.dims[3]), Channels: int(in.dims[1])}
	}
	return nil
}

// output checks that nothing is left over at the end of the path.
func (b *builder) output(d *nn.Description) error {
	if len(b.graph.outputs) != 1 {
		return fmt.Errorf("the graph has %d outputs: exactly one, the logits, is supported", len(b.graph.outputs))
	}
	out := b.graph.outputs[0]
	if out.name != b.value {
		return fmt.Errorf("the graph's output is %q, but its last node makes %q", out.name, b.value)
	}
	for _, name := range slices.Sorted(maps.Keys(b.tensors)) {
		if !b.used[name] {
			return fmt.Errorf("tensor %q is read by no node: a tensor too many", name)
		}
	}
	if _, err := d.Shapes(); err != nil {
		return err
	}
	if out.elemType != typeFloat || len(out.dims) != 0 && (len(out.dims) != 2 || out.dims[1] != 0 && out.dims[1] != int64(d.Classes())) {
		return fmt.Errorf("output %q is declared as %v of type %d, but the network makes [N %d] of float32 (1)", out.name, out.dims, out.elemType, d.Classes())
	}
	return nil
}

// apply takes one node of the path.
func (b *builder) apply(n *node) error {
	operator := operators[n.op]
	if operator == nil {
		return fmt.Errorf("operator %q is not supported: supported are %s", n.op, strings.Join(slices.Sorted(maps.Keys(operators)), ", "))
	}
	if len(n.outputs) != 1 || n.outputs[0] == "" {
		return fmt.Errorf("%d outputs: exactly one is supported", len(n.outputs))
	}
	out := n.outputs[0]
	if _, twice := b.made[out]; twice || b.tensors[out] != nil {
		return fmt.Errorf("its output %q is already made elsewhere", out)
	}
	if n.op == "Constant" || n.op == "Identity" && len(n.inputs) == 1 && b.tensors[n.inputs[0]] != nil {
		return operator(b, n) // makes a tensor, off the path
	}
	if len(n.inputs) == 0 {
		return errors.New("it has no input")
	}
	if in := n.inputs[0]; in != b.value {
		return b.offPath(in)
	}
	if err := operator(b, n); err != nil {
		return err
	}
	b.value = out
	b.made[out] = n
	return nil
}

// offPath explains why a node cannot read a value.
func (b *builder) offPath(in string) error {
	if b.tensors[in] != nil {
		return fmt.Errorf("it reads tensor %q where the value %q is expected", in, b.value)
	}
	if _, earlier := b.made[in]; earlier {
		return fmt.Errorf("it reads %q, which another node has read: the graph branches, but only a chain is supported", in)
	}
	for _, n := range b.graph.nodes {
		if slices.Contains(n.outputs, in) {
			return fmt.Errorf("it reads %q, which %v makes later: the graph has a cycle or is not in order", in, n)
		}
	}
	return fmt.Errorf("it reads %q, which nothing makes", in)
}

// layer adds a layer whose output has the given shape.
func (b *builder) layer(l nn.Layer, out nn.Shape, fill func(weight, bias []float32)) error {
	if len(b.layers) == nn.MaxLayers {
		return fmt.Errorf("more than %d layers", nn.MaxLayers)
	}
	b.layers = append(b.layers, l)
	b.fill = append(b.fill, fill)
	b.shape = out
	return nil
}

func (b *builder) conv(n *node) error {
	if err := n.allow(attributes{"auto_pad": kindString, "dilations": kindInts, "group": kindInt, "kernel_shape": kindInts, "pads": kindInts, "strides": kindInts}); err != nil {
		return err
	}
	if b.flat {
		return errors.New("its input is [N, features], not [N, channels, height, width]")
	}
	w, bias, err := b.parameters(n, 4)
	if err != nil {
		return err
	}
	if w.dims[2] != w.dims[3] || w.dims[2] > nn.MaxSide {
		return fmt.Errorf("weight %q has shape %v: the kernel must be square, its side at most %d", w.name, w.dims, nn.MaxSide)
	}
	if group := n.int("group", 1); group != 1 {
		return fmt.Errorf("group %d: only 1 is supported", group)
	}
	if err := n.noDilation(); err != nil {
		return err
	}
	out, in, k := int(w.dims[0]), int(w.dims[1]), int(w.dims[2])
	if in != b.shape.Channels {
		return fmt.Errorf("weight %q has shape %v, for %d input channels, but its input is %s", w.name, w.dims, in, b.chw())
	}
	if bias != nil && bias.dims[0] != w.dims[0] {
		return fmt.Errorf("bias %q has shape %v, weight %q %v: as many biases as filters are expected", bias.name, bias.dims, w.name, w.dims)
	}
	kernel, err := n.same("kernel_shape", 2, k)
	if err != nil {
		return err
	}
	if kernel != k {
		return fmt.Errorf("kernel_shape %d, but weight %q has shape %v", kernel, w.name, w.dims)
	}
	stride, err := n.same("strides", 2, 1)
	if err != nil {
		return err
	}
	pad, err := n.padding()
	if err != nil {
		return err
	}
	h, wd := b.shape.Height+2*pad-k, b.shape.Width+2*pad-k
	if h < 0 || wd < 0 || stride < 1 {
		return fmt.Errorf("kernel %d, stride %d and padding %d do not fit its input %s", k, stride, pad, b.chw())
	}
	c := &nn.Conv{Filters: out, Kernel: k, Padding: pad}
	if stride != 1 {
		c.Stride = stride
	}
	return b.layer(nn.Layer{Conv: c}, nn.Shape{Height: h/stride + 1, Width: wd/stride + 1, Channels: out}, func(weight, biases []float32) {
		convOrder(k, in, out, func(here, there int) { weight[here] = w.float(there) })
		bias.copyTo(biases)
	})
}

func (b *builder) gemm(n *node) error {
	if err := n.allow(attributes{"alpha": kindFloat, "beta": kindFloat, "transA": kindInt, "transB": kindInt}); err != nil {
		return err
	}
	for _, a := range n.attributes {
		if a.kind == kindFloat && a.float != 1 || a.name == "transA" && a.int != 0 {
			return fmt.Errorf("%s is not its default: only transB may differ", a.name)
		}
	}
	if !b.flat {
		return errors.New("its input is not [N, features]: put a Flatten before it")
	}
	w, bias, err := b.parameters(n, 2)
	if err != nil {
		return err
	}
	in, size := b.shape, int(w.dims[0])
	out, transposed := int(w.dims[1]), n.int("transB", 0) != 0
	if transposed {
		out, size = size, out
	}
	if size != in.Size() {
		return fmt.Errorf("weight %q has shape %v, for %d inputs, but its input is %s, %d values", w.name, w.dims, size, b.chw(), in.Size())
	}
	if bias != nil && int(bias.dims[0]) != out {
		return fmt.Errorf("bias %q has shape %v, weight %q %v: %d biases are expected", bias.name, bias.dims, w.name, w.dims, out)
	}
	return b.layer(nn.Layer{Dense: &nn.Dense{Units: out}}, nn.Shape{Height: 1, Width: 1, Channels: out}, func(weight, biases []float32) {
		denseOrder(in, out, transposed, func(here, there int) { weight[here] = w.float(there) })
		bias.copyTo(biases)
	})
}

func (b *builder) maxPool(n *node) error {
	if err := n.allow(attributes{"auto_pad": kindString, "ceil_mode": kindInt, "dilations": kindInts, "kernel_shape": kindInts, "pads": kindInts, "storage_order": kindInt, "strides": kindInts}); err != nil {
		return err
	}
	if b.flat || len(n.inputs) != 1 {
		return errors.New("it must have one input, [N, channels, height, width]")
	}
	size, err := n.same("kernel_shape", 2, 0)
	if err != nil {
		return err
	}
	stride, err := n.same("strides", 2, 1)
	if err != nil {
		return err
	}
	if size < 1 || stride != size {
		return fmt.Errorf("kernel %d, stride %d: only windows that do not overlap (stride equal to kernel) are supported", size, stride)
	}
	pad, err := n.padding()
	if err != nil {
		return err
	}
	if pad != 0 {
		return fmt.Errorf("padding %d: only 0 is supported", pad)
	}
	if err := n.noDilation(); err != nil {
		return err
	}
	if n.int("ceil_mode", 0) != 0 && (b.shape.Height%size != 0 || b.shape.Width%size != 0) {
		return fmt.Errorf("ceil_mode: windows of %d do not divide its input %s; only 0 is supported there", size, b.chw())
	}
	if size > b.shape.Height || size > b.shape.Width {
		return fmt.Errorf("windows of %d do not fit its input %s", size, b.chw())
	}
	return b.layer(nn.Layer{MaxPool: &nn.MaxPool{Size: size}}, nn.Shape{Height: b.shape.Height / size, Width: b.shape.Width / size, Channels: b.shape.Channels}, nil)
}

// relu belongs to the layer before it. Pools between them do not matter: the
// maximum of rectified values is the rectified maximum.
func (b *builder) relu(n *node) error {
	if err := n.unary(); err != nil {
		return err
	}
	for _, l := range slices.Backward(b.layers) {
		switch {
		case l.Conv != nil:
			l.Conv.ReLU = true
			return nil
		case l.Dense != nil:
			l.Dense.ReLU = true
			return nil
		}
	}
	return errors.New("it is supported only after a Conv or Gemm")
}

func (b *builder) identity(n *node) error {
	if err := n.unary(); err != nil {
		return err
	}
	// PyTorch names equal biases of several layers by Identity.
	if t := b.tensors[n.inputs[0]]; t != nil {
		b.used[n.inputs[0]] = true
		return b.addTensor(n.outputs[0], t)
	}
	return nil
}

func (b *builder) constant(n *node) error {
	if err := n.allow(attributes{"value": kindTensor}); err != nil {
		return err
	}
	if len(n.inputs) != 0 || len(n.attributes) != 1 || n.attributes[0].tensor == nil {
		return errors.New("it must hold one tensor")
	}
	return b.addTensor(n.outputs[0], n.attributes[0].tensor)
}

func (b *builder) flatten(n *node) error {
	if err := n.allow(attributes{"axis": kindInt}); err != nil {
		return err
	}
	rank := int64(4)
	if b.flat {
		rank = 2
	}
	if axis := n.int("axis", 1); len(n.inputs) != 1 || axis != 1 && axis != 1-rank {
		return fmt.Errorf("axis %d of %d inputs: only axis 1, to [N, features], is supported", axis, len(n.inputs))
	}
	b.flat = true
	return nil
}

// reshape is supported where it is a Flatten, where it changes nothing, and
// where it makes [N, features, 1, 1] of [N, features].
func (b *builder) reshape(n *node) error {
	if err := n.allow(attributes{"allowzero": kindInt}); err != nil {
		return err
	}
	if len(n.inputs) != 2 || b.tensors[n.inputs[1]] == nil {
		return errors.New("only a constant shape is supported")
	}
	b.used[n.inputs[1]] = true
	to, err := b.tensors[n.inputs[1]].shape()
	if err != nil {
		return err
	}
	if n.int("allowzero", 0) != 0 && slices.Contains(to, 0) {
		return fmt.Errorf("to %v, with allowzero: a size of zero is not supported", to)
	}
	c, h, w := int64(b.shape.Channels), int64(b.shape.Height), int64(b.shape.Width)
	from := []int64{b.batch, c, h, w}
	if b.flat {
		from = []int64{b.batch, c * h * w}
	}
	fits := func(want ...int64) bool {
		if len(to) != len(want) {
			return false
		}
		inferred := 0
		for i, d := range to {
			switch {
			case d == -1:
				inferred++
			case d == 0: // as in the input
				if i >= len(from) || from[i] != want[i] {
					return false
				}
			case d != want[i]: // a fixed batch too: 0, free, equals no size
				return false
			}
		}
		return inferred <= 1
	}
	switch {
	case fits(b.batch, c*h*w):
		b.flat = true
	case fits(b.batch, c, h, w):
		b.flat = false
	default:
		return fmt.Errorf("from %s to %v: supported are [N, features] and a shape that changes nothing", b.chw(), to)
	}
	return nil
}

// chw is the value's shape as ONNX writes it.
func (b *builder) chw() string {
	if b.flat {
		return fmt.Sprintf("[N %d]", b.shape.Size())
	}
	return fmt.Sprintf("[N %d %d %d]", b.shape.Channels, b.shape.Height, b.shape.Width)
}

// parameters returns a node's weight, of the given rank, and its bias, nil
// where it has none.
func (b *builder) parameters(n *node, rank int) (weight, bias *tensor, err error) {
	if len(n.inputs) < 2 || len(n.inputs) > 3 {
		return nil, nil, fmt.Errorf("%d inputs: 2 (value and weight) or 3 (and bias) are expected", len(n.inputs))
	}
	get := func(name string, rank int) (*tensor, error) {
		t := b.tensors[name]
		switch {
		case t == nil:
			return nil, fmt.Errorf("its parameter %q is not among the file's tensors", name)
		case t.dataType != typeFloat:
			return nil, fmt.Errorf("tensor %q: element type %d: only float32 (1) is supported", name, t.dataType)
		case len(t.dims) != rank:
			return nil, fmt.Errorf("tensor %q has shape %v: %d dimensions are expected", name, t.dims, rank)
		}
		b.used[name] = true
		return t, nil
	}
	if weight, err = get(n.inputs[1], rank); err != nil {
		return nil, nil, err
	}
	// Sharing would let a small file make a large network.
	if b.weights[weight] {
		return nil, nil, fmt.Errorf("tensor %q is the weight of another node too: shared weights are not supported", n.inputs[1])
	}
	b.weights[weight] = true
	if slices.Contains(weight.dims, 0) {
		return nil, nil, fmt.Errorf("tensor %q has shape %v: it is empty", n.inputs[1], weight.dims)
	}
	if len(n.inputs) == 3 && n.inputs[2] != "" {
		bias, err = get(n.inputs[2], 1)
	}
	return weight, bias, err
}

// float is element i.
func (t *tensor) float(i int) float32 {
	return math.Float32frombits(binary.LittleEndian.Uint32(t.data[4*i:]))
}

// copyTo copies all elements; a nil tensor copies nothing.
func (t *tensor) copyTo(dst []float32) {
	if t == nil {
		return
	}
	for i := range dst {
		dst[i] = t.float(i)
	}
}

// attributes are the names an operator may have, with their kinds.
type attributes map[string]int64

// allow refuses attributes that are unknown, there twice, or of another kind.
func (n *node) allow(known attributes) error {
	seen := map[string]bool{}
	for _, a := range n.attributes {
		kind, ok := known[a.name]
		switch {
		case !ok && len(known) == 0:
			return fmt.Errorf("attribute %q: none is supported", a.name)
		case !ok:
			return fmt.Errorf("attribute %q is not supported: supported are %s", a.name, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		case kind != a.kind:
			return fmt.Errorf("attribute %q is of kind %d, expected %d", a.name, a.kind, kind)
		case seen[a.name]:
			return fmt.Errorf("attribute %q is there twice", a.name)
		}
		seen[a.name] = true
	}
	return nil
}

// unary refuses attributes and more than one input.
func (n *node) unary() error {
	if len(n.inputs) != 1 {
		return fmt.Errorf("%d inputs: one is expected", len(n.inputs))
	}
	return n.allow(nil)
}

func (n *node) attribute(name string) *attribute {
	for _, a := range n.attributes {
		if a.name == name {
			return a
		}
	}
	return nil
}

func (n *node) int(name string, absent int64) int64 {
	if a := n.attribute(name); a != nil {
		return a.int
	}
	return absent
}

// same is the value of an attribute of count equal numbers.
func (n *node) same(name string, count, absent int) (int, error) {
	a := n.attribute(name)
	if a == nil {
		return absent, nil
	}
	if len(a.ints) != count {
		return 0, fmt.Errorf("%s %v: %d numbers are expected", name, a.ints, count)
	}
	for _, v := range a.ints {
		if v != a.ints[0] || v < 0 || v > nn.MaxSide {
			return 0, fmt.Errorf("%s %v: only equal numbers up to %d are supported", name, a.ints, nn.MaxSide)
		}
	}
	return int(a.ints[0]), nil
}

// padding is the number of zeros on every side.
func (n *node) padding() (int, error) {
	pad, err := n.same("pads", 4, 0)
	if a := n.attribute("auto_pad"); err == nil && a != nil {
		switch mode := string(a.bytes); {
		case mode == "NOTSET", mode == "VALID" && pad == 0:
		default:
			return 0, fmt.Errorf("auto_pad %q: only NOTSET, with pads, is supported", mode)
		}
	}
	return pad, err
}

func (n *node) noDilation() error {
	dilation, err := n.same("dilations", 2, 1)
	if err == nil && dilation != 1 {
		err = fmt.Errorf("dilation %d: only 1 is supported", dilation)
	}
	return err
}
