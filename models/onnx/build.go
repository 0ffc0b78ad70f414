package onnx

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/temper-ml/temper/models/nn"
)

// builder follows a graph's nodes in order and collects the layers they make.
type builder struct {
	graph   *graph
	tensors map[string]*tensor // initializers and constants, by name
	used    map[string]bool    // names of tensors that a node has read
	weights map[*tensor]bool   // tensors that are some layer's weight
	values  map[string]value   // made by nodes, and the input
	numbers map[string][]int64 // shapes and what is computed from them
	columns map[string]int     // of numbers that are a table
	uses    map[string]int     // how often each name is read
	batch   int64              // the size of N, 0 where it is free

	layers []nn.Layer
	shapes []nn.Shape // of the input and of each layer
	alone  []bool     // nothing else reads what this layer takes
	fills  []fill
}

// fill writes a layer's parameters: those of the file, times scale, plus shift,
// each nil or one number for each output channel: what was folded into it.
type fill struct {
	write        func(weight, bias []float32)
	scale, shift []float64
}

func (f *fill) run(weight, bias []float32) {
	f.write(weight, bias)
	if f.scale == nil {
		return
	}
	for i, w := range weight {
		weight[i] = float32(float64(w) * f.scale[i%len(bias)])
	}
	for c, v := range bias {
		bias[c] = float32(float64(v)*f.scale[c] + f.shift[c])
	}
}

// shared is how much larger than its file a network may be: files may name one
// small tensor for several layers, such as biases that are equal.
const shared = 1 << 20

// build makes the network that a graph, in a file of size bytes, describes.
// mean and std, where given, normalise its input.
func build(g *graph, size int, mean, std []float32) (*nn.Network, error) {
	b := &builder{
		graph: g, tensors: map[string]*tensor{}, used: map[string]bool{}, weights: map[*tensor]bool{},
		values: map[string]value{}, numbers: map[string][]int64{}, columns: map[string]int{}, uses: map[string]int{},
	}
	for _, t := range g.initializers {
		if err := b.addTensor(t.name, t); err != nil {
			return nil, err
		}
	}
	for _, n := range g.nodes {
		for _, in := range n.inputs {
			b.uses[in]++
		}
	}
	for _, out := range g.outputs {
		b.uses[out.name]++
	}
	if err := b.input(); err != nil {
		return nil, err
	}
	for _, n := range g.nodes {
		if err := b.apply(n); err != nil {
			return nil, fmt.Errorf("%v: %w", n, err)
		}
	}
	d := nn.Description{Name: g.name, Input: b.shapes[0]}
	if err := b.output(&d); err != nil {
		return nil, err
	}
	first := 0
	if mean != nil || std != nil {
		var err error
		if d, err = d.Normalised(mean, std); err != nil {
			return nil, err
		}
		first = 1
	}
	if parameters := d.Size(); 4*parameters > size+shared {
		return nil, fmt.Errorf("%d parameters from a file of %d bytes: weights that nodes share are not supported", parameters, size)
	}
	net, err := nn.Zero(d)
	if err != nil {
		return nil, err
	}
	for i := range b.fills {
		if f := &b.fills[i]; f.write != nil {
			f.run(net.Weights(first + i))
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
	b.batch = in.dims[0]
	s := nn.Shape{Height: 1, Width: 1, Channels: int(in.dims[1])}
	v := vector(-1, s.Channels)
	if len(in.dims) == 4 {
		s.Height, s.Width = int(in.dims[2]), int(in.dims[3])
		v = image(-1, s)
	}
	b.shapes, b.values[in.name] = []nn.Shape{s}, v
	// A wrong input is an error now, before anything is computed from its size.
	d := nn.Description{Input: s, Layers: []nn.Layer{{AvgPool: &nn.AvgPool{}}, {Dense: &nn.Dense{Units: 2}}}}
	if _, err := d.Shapes(); err != nil {
		return fmt.Errorf("input %q: %w", in.name, err)
	}
	return nil
}

// output checks that nothing is left over, and completes the description.
func (b *builder) output(d *nn.Description) error {
	if len(b.graph.outputs) != 1 {
		return fmt.Errorf("the graph has %d outputs: exactly one, the logits, is supported", len(b.graph.outputs))
	}
	out := b.graph.outputs[0]
	for _, n := range b.graph.nodes {
		if b.uses[n.outputs[0]] == 0 {
			return fmt.Errorf("%v: its output %q is read by no node, and the graph's output is %q", n, n.outputs[0], out.name)
		}
	}
	v, ok := b.values[out.name]
	if !ok {
		return fmt.Errorf("the graph's output %q is made by no node", out.name)
	}
	v, err := b.vector(v)
	if err != nil {
		return fmt.Errorf("output %q: %w", out.name, err)
	}
	for _, name := range slices.Sorted(maps.Keys(b.tensors)) {
		if !b.used[name] {
			return fmt.Errorf("tensor %q is read by no node: a tensor too many", name)
		}
	}
	if v.layer != len(b.layers)-1 {
		return fmt.Errorf("the graph's output %q is not what its last layer makes", out.name)
	}
	d.Layers = b.layers
	if _, err := d.Shapes(); err != nil {
		return err
	}
	if out.elemType != typeFloat || len(out.dims) != 0 && (len(out.dims) != 2 || out.dims[1] != 0 && out.dims[1] != int64(d.Classes())) {
		return fmt.Errorf("output %q is declared as %v of type %d, but the network makes [N %d] of float32 (1)", out.name, out.dims, out.elemType, d.Classes())
	}
	return nil
}

// made tells whether a name is taken.
func (b *builder) made(name string) bool {
	_, value := b.values[name]
	_, numbers := b.numbers[name]
	return value || numbers || b.tensors[name] != nil
}

// apply takes one node.
func (b *builder) apply(n *node) error {
	operator := operators[n.op]
	if operator == nil {
		return fmt.Errorf("operator %q is not supported: supported are %s", n.op, supported())
	}
	if len(n.outputs) == 0 || n.outputs[0] == "" {
		return errors.New("it has no output")
	}
	for _, extra := range n.outputs[1:] { // such as a Dropout's mask
		if b.uses[extra] > 0 && extra != "" {
			return fmt.Errorf("its output %q is read: only the first output is supported", extra)
		}
	}
	out := n.outputs[0]
	if b.made(out) {
		return fmt.Errorf("its output %q is already made elsewhere", out)
	}
	for i, in := range n.inputs {
		if in == "" && i > 0 || b.made(in) {
			continue
		}
		for _, other := range b.graph.nodes {
			if slices.Contains(other.outputs, in) {
				return fmt.Errorf("it reads %q, which %v makes later: the graph has a cycle or is not in order", in, other)
			}
		}
		return fmt.Errorf("it reads %q, which nothing makes", in)
	}
	if b.ofNumbers(n) {
		numbers, err := b.compute(n)
		b.numbers[out] = numbers
		return err
	}
	if n.op == "Constant" || n.op == "Identity" && len(n.inputs) == 1 && b.tensors[n.inputs[0]] != nil {
		return b.constant(n)
	}
	v, err := operator(b, n)
	if err != nil {
		return err
	}
	b.values[out] = v
	return nil
}

// value is a node's input i.
func (b *builder) value(n *node, i int) (value, error) {
	if i >= len(n.inputs) {
		return value{}, fmt.Errorf("%d inputs: at least %d are expected", len(n.inputs), i+1)
	}
	name := n.inputs[i]
	v, ok := b.values[name]
	if !ok {
		return value{}, fmt.Errorf("it reads tensor %q where a value computed from the input is expected", name)
	}
	v.alone = v.alone && b.uses[name] == 1
	return v, nil
}

// only is the value of a node with one input.
func (b *builder) only(n *node) (value, error) {
	if len(n.inputs) != 1 {
		return value{}, fmt.Errorf("%d inputs: one is expected", len(n.inputs))
	}
	return b.value(n, 0)
}

// layer adds a layer on the memory that the values are views of. The result is
// the view [N, channels, height, width].
func (b *builder) layer(l nn.Layer, inputs ...value) (value, error) {
	if len(b.layers) == nn.MaxLayers {
		return value{}, fmt.Errorf("more than %d layers", nn.MaxLayers)
	}
	var shapes []nn.Shape
	for _, v := range inputs {
		l.From = append(l.From, v.layer)
		shapes = append(shapes, b.shapes[v.layer+1])
	}
	if len(l.From) == 1 && l.From[0] == len(b.layers)-1 {
		l.From = nil
	}
	out, err := l.Output(shapes...)
	if err != nil {
		return value{}, err
	}
	b.layers = append(b.layers, l)
	b.shapes = append(b.shapes, out)
	b.alone = append(b.alone, inputs[0].alone)
	b.fills = append(b.fills, fill{})
	return image(len(b.layers)-1, out), nil
}

// affine multiplies each channel by a and adds b: numbers for all channels, or
// one for each. It is folded into the layer before it where that has weights
// and nothing else reads it; else it is a layer of its own, trained where it is
// a batch normalisation and constant where it is arithmetic with constants.
func (b *builder) affine(v value, factor, shift []float64, trained bool) (value, error) {
	if l := v.layer; l >= 0 && v.alone && b.fills[l].write != nil && !b.layers[l].ReLU() && b.isPlain(v) {
		f, channels := &b.fills[l], b.shapes[l+1].Channels
		if f.scale == nil {
			f.scale, f.shift = make([]float64, channels), make([]float64, channels)
			for c := range f.scale {
				f.scale[c] = 1
			}
		}
		for c := range f.scale {
			k := factor[c%len(factor)]
			f.scale[c] *= k
			f.shift[c] = f.shift[c]*k + shift[c%len(shift)]
		}
		return v, nil
	}
	rank := len(v.dims)
	v, err := b.plain(v)
	if err != nil {
		return v, err
	}
	if trained {
		out, err := b.layer(nn.Layer{Affine: &nn.Affine{}}, v)
		if err != nil {
			return v, err
		}
		b.fills[out.layer].write = func(weight, bias []float32) {
			for c := range weight {
				weight[c], bias[c] = float32(factor[c%len(factor)]), float32(shift[c%len(shift)])
			}
		}
		return out.ofRank(rank), nil
	}
	// factor*x + shift is (x - mean) / std. Two in a row, such as the
	// subtraction and the division of a normalisation, are one.
	mean, std := []float64{0}, []float64{1}
	at, last := v, v.layer >= 0 && v.alone && b.layers[v.layer].Normalise != nil && v.layer == len(b.layers)-1
	if last {
		before := b.layers[v.layer].Normalise
		mean, std = wide(before.Mean), wide(before.Std)
		at.layer = -1
		if from := b.layers[v.layer].From; from != nil {
			at.layer = from[0]
		} else {
			at.layer = v.layer - 1
		}
		at.alone = b.alone[v.layer]
	}
	for _, k := range factor {
		if k == 0 {
			return v, errors.New("it multiplies by 0")
		}
	}
	if slices.ContainsFunc(shift, func(s float64) bool { return s != 0 }) {
		mean = both(mean, both(std, both(shift, factor, func(s, k float64) float64 { return s / k }), func(d, s float64) float64 { return d * s }),
			func(m, s float64) float64 { return m - s })
	}
	std = both(std, factor, func(d, k float64) float64 { return d / k })
	if last {
		b.drop()
	}
	out, err := b.layer(nn.Layer{Normalise: &nn.Normalise{Mean: narrow(mean), Std: narrow(std)}}, at)
	return out.ofRank(rank), err
}

// drop forgets the last layer.
func (b *builder) drop() {
	last := len(b.layers) - 1
	b.layers, b.shapes, b.alone, b.fills = b.layers[:last], b.shapes[:last+1], b.alone[:last], b.fills[:last]
}

// both applies f to two lists, each of one number for all channels or one for
// each.
func both(x, y []float64, f func(x, y float64) float64) []float64 {
	out := make([]float64, max(len(x), len(y)))
	for i := range out {
		out[i] = f(x[i%len(x)], y[i%len(y)])
	}
	return out
}

func wide(x []float32) []float64 {
	out := make([]float64, len(x))
	for i, v := range x {
		out[i] = float64(v)
	}
	return out
}

func narrow(x []float64) []float32 {
	out := make([]float32, len(x))
	for i, v := range x {
		out[i] = float32(v)
	}
	return out
}

// isPlain tells whether a value's first dimension is its layer's channels.
func (b *builder) isPlain(v value) bool {
	s := b.shapes[v.layer+1]
	return sameView(v, image(v.layer, s)) || s.Height*s.Width == 1 && sameView(v, vector(v.layer, s.Channels))
}

// ofRank is a view of one pixel as [N, features] where rank is 1.
func (v value) ofRank(rank int) value {
	if rank == 1 && len(v.dims) == 3 {
		v.dims = v.dims[:1]
	}
	return v
}

// relu belongs to the layer before it where that can hold it and nothing else
// reads it. Max-pools between them do not matter: the maximum of rectified
// values is the rectified maximum.
func (b *builder) relu(v value) (value, error) {
	at, alone := v.layer, v.alone
	for at >= 0 && b.layers[at].MaxPool != nil && alone {
		alone = b.alone[at]
		if from := b.layers[at].From; from != nil {
			at = from[0]
		} else {
			at--
		}
	}
	if at >= 0 {
		l := b.layers[at]
		if l.ReLU() {
			return v, nil
		}
		if alone {
			switch {
			case l.Conv != nil:
				l.Conv.ReLU = true
				return v, nil
			case l.Dense != nil:
				l.Dense.ReLU = true
				return v, nil
			case l.Affine != nil:
				l.Affine.ReLU = true
				return v, nil
			case l.Combine != nil:
				l.Combine.ReLU = true
				return v, nil
			}
		}
	}
	return b.activation(v, nn.Activation{Function: "relu"})
}

// activation works value by value, so on any view.
func (b *builder) activation(v value, a nn.Activation) (value, error) {
	out, err := b.layer(nn.Layer{Activation: &a}, v)
	out.dims = v.dims
	return out, err
}

// weight returns a tensor that a layer multiplies by, of the given rank.
func (b *builder) weight(name string, rank int) (*tensor, error) {
	t, err := b.floats(name)
	switch {
	case err != nil:
		return nil, err
	case len(t.dims) != rank:
		return nil, fmt.Errorf("tensor %q has shape %v: %d dimensions are expected", name, t.dims, rank)
	case b.weights[t]: // sharing would let a small file make a large network
		return nil, fmt.Errorf("tensor %q is the weight of another node too: shared weights are not supported", name)
	case slices.Contains(t.dims, 0):
		return nil, fmt.Errorf("tensor %q has shape %v: it is empty", name, t.dims)
	}
	b.weights[t] = true
	return t, nil
}

// bias returns a node's input i as count numbers, nil where it is absent.
func (b *builder) bias(n *node, i, count int, weight *tensor) (*tensor, error) {
	if i >= len(n.inputs) || n.inputs[i] == "" {
		return nil, nil
	}
	t, err := b.floats(n.inputs[i])
	if err != nil {
		return nil, err
	}
	if d := len(t.dims); d == 0 || d > 2 || t.dims[d-1] != int64(count) || t.elements() != count {
		return nil, fmt.Errorf("bias %q has shape %v, weight %q %v: %d biases are expected", t.name, t.dims, weight.name, weight.dims, count)
	}
	return t, nil
}

// floats returns a tensor of float32.
func (b *builder) floats(name string) (*tensor, error) {
	t := b.tensors[name]
	switch {
	case t == nil:
		return nil, fmt.Errorf("its parameter %q is not among the file's tensors", name)
	case t.dataType != typeFloat:
		return nil, fmt.Errorf("tensor %q: element type %d: only float32 (1) is supported", name, t.dataType)
	}
	b.used[name] = true
	return t, nil
}

// scalar returns a node's input i, a tensor of one number, or absent.
func (b *builder) scalar(n *node, i int, absent float32) (float32, error) {
	if i >= len(n.inputs) || n.inputs[i] == "" {
		return absent, nil
	}
	t, err := b.floats(n.inputs[i])
	if err != nil {
		return 0, err
	}
	if t.elements() != 1 {
		return 0, fmt.Errorf("tensor %q has shape %v: one number is expected", t.name, t.dims)
	}
	return t.float(0), nil
}

// channels returns a tensor as one number for all of a value's channels, or one
// for each.
func channels(t *tensor, v value) ([]float64, error) {
	// Broadcasting aligns the last dimensions; the channels are the one after N.
	place := len(t.dims) - len(v.dims)
	for i, d := range t.dims {
		if d != 1 && (i != place || d != int64(v.size(0))) || place > 1 {
			return nil, fmt.Errorf("tensor %q has shape %v, its other input %v: supported are one number, and one for each channel", t.name, t.dims, v)
		}
	}
	out := make([]float64, t.elements())
	for i := range out {
		out[i] = float64(t.float(i))
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("tensor %q is empty", t.name)
	}
	return out, nil
}

var errInference = errors.New("export the model for inference (in PyTorch, model.eval() first)")

// lowest stands for the border of a max-pool.
const lowest = -math.MaxFloat32
