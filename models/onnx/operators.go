package onnx

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/temper-ml/temper/models/nn"
)

// operators are what a graph may consist of. Each checks its node and returns
// the value that it makes. Those of ofNumbers compute shapes too.
var operators map[string]func(*builder, *node) (value, error)

func init() {
	operators = map[string]func(*builder, *node) (value, error){
		"Add":                (*builder).arithmetic,
		"AveragePool":        (*builder).averagePool,
		"BatchNormalization": (*builder).batchNormalization,
		"Cast":               notOfValues,
		"Clip":               (*builder).clip,
		"Concat":             (*builder).concat,
		"Constant":           notOfValues, // apply takes it before
		"ConstantOfShape":    notOfValues,
		"Conv":               (*builder).conv,
		"Div":                (*builder).arithmetic,
		"Dropout":            (*builder).dropout,
		"Flatten":            (*builder).flatten,
		"Gather":             notOfValues,
		"Gemm":               (*builder).gemm,
		"GlobalAveragePool":  (*builder).globalAveragePool,
		"Identity":           (*builder).identity,
		"LeakyRelu":          (*builder).leakyRelu,
		"MatMul":             (*builder).matMul,
		"MaxPool":            (*builder).maxPool,
		"Mul":                (*builder).arithmetic,
		"Pad":                (*builder).pad,
		"ReduceMean":         (*builder).reduceMean,
		"Relu":               (*builder).reluNode,
		"Reshape":            (*builder).reshape,
		"Shape":              notOfValues,
		"Sigmoid":            (*builder).sigmoid,
		"Slice":              notOfValues,
		"Softmax":            (*builder).softmax,
		"Squeeze":            (*builder).squeeze,
		"Sub":                (*builder).arithmetic,
		"Tanh":               (*builder).tanh,
		"Transpose":          (*builder).transpose,
		"Unsqueeze":          (*builder).unsqueeze,
	}
}

func supported() string { return strings.Join(slices.Sorted(maps.Keys(operators)), ", ") }

func notOfValues(_ *builder, n *node) (value, error) {
	return value{}, fmt.Errorf("it is supported for computing shapes, not values: supported for values are %s", supported())
}

// constant keeps the tensor of a Constant, or of an Identity: PyTorch names
// equal biases of several layers by it.
func (b *builder) constant(n *node) error {
	if n.op == "Identity" {
		if err := n.allow(nil); err != nil {
			return err
		}
		b.used[n.inputs[0]] = true
		return b.addTensor(n.outputs[0], b.tensors[n.inputs[0]])
	}
	if err := n.allow(attributes{"value": kindTensor, "value_float": kindFloat, "value_int": kindInt, "value_ints": kindInts}); err != nil {
		return err
	}
	if len(n.inputs) != 0 || len(n.attributes) != 1 {
		return errors.New("it must hold one tensor")
	}
	a := n.attributes[0]
	t := a.tensor
	switch {
	case a.kind == kindFloat:
		t = &tensor{name: n.outputs[0], dataType: typeFloat, data: float32Bytes(nil, a.float)}
	case a.kind == kindInt:
		t = &tensor{name: n.outputs[0], dataType: typeInt64, ints: []int64{a.int}}
	case a.kind == kindInts:
		t = &tensor{name: n.outputs[0], dataType: typeInt64, dims: []int64{int64(len(a.ints))}, ints: a.ints}
	case t == nil:
		return errors.New("it must hold one tensor")
	}
	return b.addTensor(n.outputs[0], t)
}

func (b *builder) identity(n *node) (value, error) {
	if err := n.allow(nil); err != nil {
		return value{}, err
	}
	return b.only(n)
}

func (b *builder) dropout(n *node) (value, error) {
	if err := n.allow(attributes{"ratio": kindFloat, "seed": kindInt}); err != nil {
		return value{}, err
	}
	if len(n.inputs) > 1 && n.inputs[1] != "" {
		b.used[n.inputs[1]] = true
	}
	if len(n.inputs) > 2 && n.inputs[2] != "" {
		t := b.tensors[n.inputs[2]]
		if t == nil || t.dataType != typeBool || t.elements() != 1 {
			return value{}, errors.New("training_mode is not a constant of one bool")
		}
		b.used[n.inputs[2]] = true
		if slices.Max(t.data) != 0 {
			return value{}, fmt.Errorf("training_mode is on: %w", errInference)
		}
	}
	return b.value(n, 0)
}

func (b *builder) conv(n *node) (value, error) {
	if err := n.allow(attributes{"auto_pad": kindString, "dilations": kindInts, "group": kindInt, "kernel_shape": kindInts, "pads": kindInts, "strides": kindInts}); err != nil {
		return value{}, err
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	if len(n.inputs) < 2 || len(n.inputs) > 3 {
		return v, fmt.Errorf("%d inputs: 2 (value and weight) or 3 (and bias) are expected", len(n.inputs))
	}
	if v, err = b.image(v); err != nil {
		return v, err
	}
	w, err := b.weight(n.inputs[1], 4)
	if err != nil {
		return v, err
	}
	if w.dims[2] != w.dims[3] || w.dims[2] > nn.MaxSide {
		return v, fmt.Errorf("weight %q has shape %v: the kernel must be square, its side at most %d", w.name, w.dims, nn.MaxSide)
	}
	out, in, k := int(w.dims[0]), int(w.dims[1]), int(w.dims[2])
	group := n.int("group", 1)
	if group < 1 || int64(in)*group != int64(v.size(0)) {
		return v, fmt.Errorf("weight %q has shape %v, for %d input channels in each of %d groups, but its input is %v", w.name, w.dims, in, group, v)
	}
	bias, err := b.bias(n, 2, out, w)
	if err != nil {
		return v, err
	}
	kernel, err := n.same("kernel_shape", 2, k)
	if err != nil {
		return v, err
	}
	if kernel != k {
		return v, fmt.Errorf("kernel_shape %d, but weight %q has shape %v", kernel, w.name, w.dims)
	}
	dilation, err := n.same("dilations", 2, 1)
	if err != nil {
		return v, err
	}
	if dilation < 1 {
		return v, fmt.Errorf("dilation %d: must be at least 1", dilation)
	}
	win, err := n.window(v, [2]int{k, k}, dilation)
	if err != nil {
		return v, err
	}
	c := &nn.Conv{Filters: out, Kernel: k}
	if v, c.Padding, err = b.border(v, win, 0); err != nil {
		return v, err
	}
	if win.stride != 1 {
		c.Stride = win.stride
	}
	if dilation != 1 {
		c.Dilation = dilation
	}
	if group != 1 {
		c.Groups = int(group)
	}
	y, err := b.layer(nn.Layer{Conv: c}, v)
	if err != nil {
		return y, err
	}
	b.fills[y.layer].write = func(weight, biases []float32) {
		convOrder(k, in, out, func(here, there int) { weight[here] = w.float(there) })
		bias.copyTo(biases, 1)
	}
	return y, nil
}

// dense adds a fully connected layer: w is [in, out], or [out, in] where it is
// transposed.
func (b *builder) dense(v value, w, bias *tensor, transposed bool, alpha, beta float32) (value, error) {
	if len(v.dims) != 1 {
		return v, fmt.Errorf("its input is %v, not [N, features]: put a Flatten before it", v)
	}
	size, out := int(w.dims[0]), int(w.dims[1])
	if transposed {
		out, size = size, out
	}
	if size != v.size(0) {
		return v, fmt.Errorf("weight %q has shape %v, for %d inputs, but its input is %v, %d values", w.name, w.dims, size, v, v.size(0))
	}
	y, err := b.layer(nn.Layer{Dense: &nn.Dense{Units: out}}, v)
	if err != nil {
		return y, err
	}
	b.fills[y.layer].write = func(weight, biases []float32) {
		denseOrder(places(v.dims[0]), out, transposed, func(here, there int) { weight[here] = alpha * w.float(there) })
		bias.copyTo(biases, beta)
	}
	return y.ofRank(1), nil
}

func (b *builder) gemm(n *node) (value, error) {
	if err := n.allow(attributes{"alpha": kindFloat, "beta": kindFloat, "transA": kindInt, "transB": kindInt}); err != nil {
		return value{}, err
	}
	if n.int("transA", 0) != 0 {
		return value{}, errors.New("transA: only 0 is supported")
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	if len(n.inputs) < 2 || len(n.inputs) > 3 {
		return v, fmt.Errorf("%d inputs: 2 (value and weight) or 3 (and bias) are expected", len(n.inputs))
	}
	w, err := b.weight(n.inputs[1], 2)
	if err != nil {
		return v, err
	}
	transposed := n.int("transB", 0) != 0
	out := w.dims[1]
	if transposed {
		out = w.dims[0]
	}
	bias, err := b.bias(n, 2, int(out), w)
	if err != nil {
		return v, err
	}
	return b.dense(v, w, bias, transposed, n.float("alpha", 1), n.float("beta", 1))
}

func (b *builder) matMul(n *node) (value, error) {
	if err := n.allow(nil); err != nil {
		return value{}, err
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	if len(n.inputs) != 2 {
		return v, fmt.Errorf("%d inputs: 2 are expected", len(n.inputs))
	}
	w, err := b.weight(n.inputs[1], 2)
	if err != nil {
		return v, err
	}
	return b.dense(v, w, nil, false, 1, 1)
}

func (b *builder) batchNormalization(n *node) (value, error) {
	if err := n.allow(attributes{"epsilon": kindFloat, "momentum": kindFloat, "spatial": kindInt, "training_mode": kindInt}); err != nil {
		return value{}, err
	}
	if n.int("training_mode", 0) != 0 {
		return value{}, fmt.Errorf("training_mode is on: %w", errInference)
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	if len(n.inputs) != 5 || len(v.dims) != 1 && len(v.dims) != 3 || n.int("spatial", 1) != 1 {
		return v, fmt.Errorf("%d inputs, the first %v: [N, channels, height, width] or [N, features], scale, bias, mean and variance are expected", len(n.inputs), v)
	}
	var of [4][]float64
	for i := range of {
		t, err := b.floats(n.inputs[i+1])
		if err != nil {
			return v, err
		}
		if len(t.dims) != 1 || t.elements() != v.size(0) {
			return v, fmt.Errorf("tensor %q has shape %v: one number for each channel of %v is expected", t.name, t.dims, v)
		}
		for k := range t.elements() {
			of[i] = append(of[i], float64(t.float(k)))
		}
	}
	epsilon := float64(n.float("epsilon", 1e-5))
	factor, shift := of[0], of[1]
	for c := range factor {
		variance := of[3][c] + epsilon
		if !(variance > 0) {
			return v, fmt.Errorf("the variance of channel %d is %v: must be positive with epsilon %v", c, of[3][c], epsilon)
		}
		factor[c] /= math.Sqrt(variance)
		shift[c] -= of[2][c] * factor[c]
	}
	return b.affine(v, factor, shift, true)
}

// arithmetic is Add, Sub, Mul and Div, of two values or a value and a constant.
func (b *builder) arithmetic(n *node) (value, error) {
	if err := n.allow(nil); err != nil {
		return value{}, err
	}
	if len(n.inputs) != 2 {
		return value{}, fmt.Errorf("%d inputs: 2 are expected", len(n.inputs))
	}
	constant := -1
	for i, in := range n.inputs {
		if b.tensors[in] != nil {
			constant = i
		}
	}
	if constant < 0 {
		return b.combine(n)
	}
	v, err := b.value(n, 1-constant)
	if err != nil {
		return v, err
	}
	t, err := b.floats(n.inputs[constant])
	if err != nil {
		return v, err
	}
	c, err := channels(t, v)
	if err != nil {
		return v, err
	}
	each := func(f func(float64) float64) []float64 {
		return both(c, []float64{0}, func(x, _ float64) float64 { return f(x) })
	}
	one, none := []float64{1}, []float64{0}
	switch {
	case n.op == "Add":
		return b.affine(v, one, c, false)
	case n.op == "Mul":
		return b.affine(v, c, none, false)
	case n.op == "Sub" && constant == 1:
		return b.affine(v, one, each(func(x float64) float64 { return -x }), false)
	case n.op == "Sub":
		return b.affine(v, []float64{-1}, c, false)
	case constant == 1:
		return b.affine(v, each(func(x float64) float64 { return 1 / x }), none, false)
	}
	return v, fmt.Errorf("it divides constant %q by a value: only the other way round is supported", t.name)
}

func (b *builder) combine(n *node) (value, error) {
	var of [2]value
	for i := range of {
		var err error
		if of[i], err = b.value(n, i); err != nil {
			return of[i], err
		}
	}
	l := nn.Layer{Combine: &nn.Combine{Operator: strings.ToLower(n.op)}}
	if sameView(of[0], of[1]) && b.shapes[of[0].layer+1] == b.shapes[of[1].layer+1] {
		y, err := b.layer(l, of[0], of[1])
		y.dims = of[0].dims
		return y, err
	}
	rank := len(of[0].dims)
	if len(of[1].dims) != rank {
		return of[0], fmt.Errorf("its inputs are %v and %v: as many dimensions are expected", of[0], of[1])
	}
	for i := range of {
		var err error
		if of[i], err = b.plain(of[i]); err != nil {
			return of[i], err
		}
	}
	y, err := b.layer(l, of[0], of[1])
	return y.ofRank(rank), err
}

func (b *builder) concat(n *node) (value, error) {
	if err := n.allow(attributes{"axis": kindInt}); err != nil {
		return value{}, err
	}
	var of []value
	rank := 0
	for i := range n.inputs {
		v, err := b.value(n, i)
		if err != nil {
			return v, err
		}
		if rank = len(v.dims); i > 0 && rank != len(of[0].dims) {
			return v, fmt.Errorf("its inputs are %v and %v: as many dimensions are expected", of[0], v)
		}
		if v, err = b.plain(v); err != nil {
			return v, err
		}
		of = append(of, v)
	}
	if axis := n.int("axis", 0); len(of) == 0 || axis != 1 && axis != int64(-rank) {
		return value{}, fmt.Errorf("axis %d of %d inputs: only axis 1, the channels, is supported", axis, len(of))
	}
	y, err := b.layer(nn.Layer{Concat: &nn.Concat{}}, of...)
	return y.ofRank(rank), err
}

func (b *builder) reluNode(n *node) (value, error) {
	v, err := b.identity(n)
	if err != nil {
		return v, err
	}
	return b.relu(v)
}

func (b *builder) leakyRelu(n *node) (value, error) {
	if err := n.allow(attributes{"alpha": kindFloat}); err != nil {
		return value{}, err
	}
	v, err := b.only(n)
	if err != nil {
		return v, err
	}
	return b.activation(v, nn.Activation{Function: "leaky_relu", Slope: n.float("alpha", 0.01)})
}

func (b *builder) sigmoid(n *node) (value, error) {
	v, err := b.identity(n)
	if err != nil {
		return v, err
	}
	return b.activation(v, nn.Activation{Function: "sigmoid"})
}

func (b *builder) tanh(n *node) (value, error) {
	v, err := b.identity(n)
	if err != nil {
		return v, err
	}
	return b.activation(v, nn.Activation{Function: "tanh"})
}

func (b *builder) clip(n *node) (value, error) {
	if err := n.allow(attributes{"max": kindFloat, "min": kindFloat}); err != nil {
		return value{}, err
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	low, err := b.scalar(n, 1, n.float("min", lowest))
	if err != nil {
		return v, err
	}
	high, err := b.scalar(n, 2, n.float("max", -lowest))
	if err != nil {
		return v, err
	}
	if low == 0 && high >= -lowest {
		return b.relu(v)
	}
	return b.activation(v, nn.Activation{Function: "clip", Min: max(low, lowest), Max: min(high, -lowest)})
}

func (b *builder) softmax(n *node) (value, error) {
	if err := n.allow(attributes{"axis": kindInt}); err != nil {
		return value{}, err
	}
	v, err := b.only(n)
	if err != nil {
		return v, err
	}
	if axis := n.int("axis", -1); len(v.dims) != 1 || axis != 1 && axis != -1 {
		return v, fmt.Errorf("axis %d of %v: only that of the features of [N, features] is supported", axis, v)
	}
	return b.activation(v, nn.Activation{Function: "softmax"})
}

// window is where the taps of a convolution or pool are.
type window struct {
	size   [2]int // height and width
	stride int
	pads   [4]int // top, left, bottom, right
	beyond bool   // the last windows reach beyond the padding (ceil_mode)
}

// window reads the strides and paddings of a node over a value's height and
// width.
func (n *node) window(v value, size [2]int, dilation int) (w window, err error) {
	w.size = size
	if w.stride, err = n.same("strides", 2, 1); err != nil {
		return w, err
	}
	if w.stride < 1 {
		return w, fmt.Errorf("stride %d: must be at least 1", w.stride)
	}
	if pads := n.attribute("pads"); pads != nil {
		if len(pads.ints) != 4 {
			return w, fmt.Errorf("pads %v: 4 numbers are expected", pads.ints)
		}
		for i, p := range pads.ints {
			if p < 0 || p > nn.MaxSide {
				return w, fmt.Errorf("pads %v: must be 0 to %d", pads.ints, nn.MaxSide)
			}
			w.pads[i] = int(p)
		}
	}
	mode := "NOTSET"
	if a := n.attribute("auto_pad"); a != nil && len(a.bytes) > 0 {
		mode = string(a.bytes)
	}
	for k := range 2 {
		in, reach := v.size(1+k), dilation*(size[k]-1)+1
		switch mode {
		case "NOTSET":
		case "VALID":
			w.pads[k], w.pads[2+k] = 0, 0
		case "SAME_UPPER", "SAME_LOWER":
			total := max(((in+w.stride-1)/w.stride-1)*w.stride+reach-in, 0)
			w.pads[k], w.pads[2+k] = total/2, total-total/2
			if mode == "SAME_LOWER" {
				w.pads[k], w.pads[2+k] = w.pads[2+k], w.pads[k]
			}
		default:
			return w, fmt.Errorf("auto_pad %q: supported are NOTSET, VALID, SAME_UPPER and SAME_LOWER", mode)
		}
		room := in + w.pads[k] + w.pads[2+k] - reach
		if room < 0 {
			return w, fmt.Errorf("kernel %d, dilation %d and padding %v do not fit its input %v", size[k], dilation, w.pads, v)
		}
		if n.int("ceil_mode", 0) != 0 && room%w.stride != 0 {
			// One window more, unless it would start in the padding.
			if last := (room/w.stride + 1) * w.stride; last < in+w.pads[k] {
				w.pads[2+k] += last - room
				w.beyond = true
			}
		}
	}
	return w, nil
}

// border returns the padding of a layer, the same on all sides; where the
// sides differ it is none, and a layer of its own adds the border.
func (b *builder) border(v value, w window, fill float32) (value, int, error) {
	p := w.pads
	if p[0] == p[1] && p[0] == p[2] && p[0] == p[3] {
		return v, p[0], nil
	}
	v, err := b.layer(nn.Layer{Pad: &nn.Pad{Top: p[0], Left: p[1], Bottom: p[2], Right: p[3], Value: fill}}, v)
	return v, 0, err
}

// pool reads what the pools have in common.
func (b *builder) pool(n *node, known attributes) (value, window, error) {
	maps.Copy(known, attributes{"auto_pad": kindString, "ceil_mode": kindInt, "dilations": kindInts, "kernel_shape": kindInts, "pads": kindInts, "strides": kindInts})
	if err := n.allow(known); err != nil {
		return value{}, window{}, err
	}
	v, err := b.only(n)
	if err == nil {
		v, err = b.image(v)
	}
	if err != nil {
		return v, window{}, err
	}
	a := n.attribute("kernel_shape")
	if a == nil || len(a.ints) != 2 || slices.Min(a.ints) < 1 || slices.Max(a.ints) > nn.MaxSide {
		return v, window{}, fmt.Errorf("kernel_shape must be two numbers from 1 to %d", nn.MaxSide)
	}
	if dilation, err := n.same("dilations", 2, 1); err != nil || dilation != 1 {
		return v, window{}, errors.Join(err, fmt.Errorf("dilation %d: only 1 is supported", dilation))
	}
	w, err := n.window(v, [2]int{int(a.ints[0]), int(a.ints[1])}, 1)
	return v, w, err
}

// step is a pool's stride, 0 for its size.
func (w window) step() int {
	if w.stride == w.size[0] {
		return 0
	}
	return w.stride
}

func (b *builder) maxPool(n *node) (value, error) {
	v, w, err := b.pool(n, attributes{"storage_order": kindInt})
	if err != nil {
		return v, err
	}
	if w.size[0] != w.size[1] {
		return v, fmt.Errorf("kernel_shape %v: only a square is supported", w.size)
	}
	p := &nn.MaxPool{Size: w.size[0], Stride: w.step()}
	if v, p.Padding, err = b.border(v, w, lowest); err != nil {
		return v, err
	}
	return b.layer(nn.Layer{MaxPool: p}, v)
}

func (b *builder) averagePool(n *node) (value, error) {
	v, w, err := b.pool(n, attributes{"count_include_pad": kindInt})
	if err != nil {
		return v, err
	}
	if w.size == [2]int{v.size(1), v.size(2)} && w.pads == [4]int{} {
		return b.layer(nn.Layer{AvgPool: &nn.AvgPool{}}, v)
	}
	if w.size[0] != w.size[1] {
		return v, fmt.Errorf("kernel_shape %v: only a square, or the whole image, is supported", w.size)
	}
	count := n.int("count_include_pad", 0) != 0
	even := w.pads[0] == w.pads[1] && w.pads[0] == w.pads[2] && w.pads[0] == w.pads[3]
	if w.beyond || !even && !count {
		return v, fmt.Errorf("padding %v with ceil_mode %d and count_include_pad %d: the mean over a border that differs between sides is supported only where it counts and windows fill it", w.pads, n.int("ceil_mode", 0), n.int("count_include_pad", 0))
	}
	p := &nn.AvgPool{Size: w.size[0], Stride: w.step()}
	if v, p.Padding, err = b.border(v, w, 0); err != nil {
		return v, err
	}
	p.CountPadding = count && p.Padding > 0
	return b.layer(nn.Layer{AvgPool: p}, v)
}

func (b *builder) globalAveragePool(n *node) (value, error) {
	v, err := b.identity(n)
	if err == nil {
		v, err = b.image(v)
	}
	if err != nil {
		return v, err
	}
	return b.layer(nn.Layer{AvgPool: &nn.AvgPool{}}, v)
}

// reduceMean over height and width is a GlobalAveragePool.
func (b *builder) reduceMean(n *node) (value, error) {
	if err := n.allow(attributes{"axes": kindInts, "keepdims": kindInt, "noop_with_empty_axes": kindInt}); err != nil {
		return value{}, err
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	axes, err := b.axes(n, len(v.dims)+1)
	if err != nil {
		return v, err
	}
	if slices.Sort(axes); len(v.dims) != 3 || !slices.Equal(axes, []int{2, 3}) {
		return v, fmt.Errorf("axes %v of %v: only those of height and width, 2 and 3, are supported", axes, v)
	}
	if v, err = b.image(v); err != nil {
		return v, err
	}
	v, err = b.layer(nn.Layer{AvgPool: &nn.AvgPool{}}, v)
	if n.int("keepdims", 1) == 0 {
		v = v.ofRank(1)
	}
	return v, err
}

func (b *builder) pad(n *node) (value, error) {
	if err := n.allow(attributes{"mode": kindString, "pads": kindInts, "value": kindFloat}); err != nil {
		return value{}, err
	}
	if a := n.attribute("mode"); a != nil && string(a.bytes) != "constant" {
		return value{}, fmt.Errorf("mode %q: only constant is supported", a.bytes)
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	var pads []int64
	if a := n.attribute("pads"); a != nil {
		pads = a.ints
	} else if len(n.inputs) < 2 {
		return v, errors.New("it has no pads")
	} else if pads, err = b.numbersOf(n.inputs[1]); err != nil {
		return v, err
	}
	if len(n.inputs) > 3 && n.inputs[3] != "" {
		return v, errors.New("axes are not supported: give pads for all dimensions")
	}
	with, err := b.scalar(n, 2, n.float("value", 0))
	if err != nil {
		return v, err
	}
	rank := len(v.dims) + 1
	if len(pads) != 2*rank || slices.Min(pads) < 0 || slices.Max(pads) > nn.MaxSide {
		return v, fmt.Errorf("pads %v of %v: twice as many numbers as dimensions, 0 to %d, are expected", pads, v, nn.MaxSide)
	}
	if slices.Max(pads) == 0 {
		return v, nil
	}
	if rank != 4 || pads[0]+pads[1]+pads[4]+pads[5] != 0 {
		return v, fmt.Errorf("pads %v of %v: only height and width can be padded", pads, v)
	}
	if v, err = b.image(v); err != nil {
		return v, err
	}
	return b.layer(nn.Layer{Pad: &nn.Pad{Top: int(pads[2]), Left: int(pads[3]), Bottom: int(pads[6]), Right: int(pads[7]), Value: with}}, v)
}

// Nodes that change the view of a value only.

func (b *builder) flatten(n *node) (value, error) {
	if err := n.allow(attributes{"axis": kindInt}); err != nil {
		return value{}, err
	}
	v, err := b.only(n)
	if err != nil {
		return v, err
	}
	if axis := n.int("axis", 1); axis != 1 && axis != -int64(len(v.dims)) {
		return v, fmt.Errorf("axis %d of %v: only axis 1, to [N, features], is supported", axis, v)
	}
	return v.reshape([]int{count(v.axes())})
}

func (b *builder) reshape(n *node) (value, error) {
	if err := n.allow(attributes{"allowzero": kindInt}); err != nil {
		return value{}, err
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	if len(n.inputs) != 2 {
		return v, errors.New("only a constant shape, or one computed from the input's, is supported")
	}
	to, err := b.numbersOf(n.inputs[1])
	if err != nil {
		return v, err
	}
	if n.int("allowzero", 0) != 0 && slices.Contains(to, 0) {
		return v, fmt.Errorf("to %v, with allowzero: a size of zero is not supported", names(to))
	}
	total := int64(count(v.axes()))
	if len(to) < 2 {
		return v, fmt.Errorf("from %v to %v: the batch must stay the first dimension", v, names(to))
	}
	var sizes []int
	known, free := int64(1), -1
	for i, d := range to[1:] {
		if d == 0 && i < len(v.dims) { // as in the input
			d = int64(v.size(i))
		}
		switch {
		case d == -1 && free < 0:
			free = i
			d = 1
		case d < 1 || d > total:
			return v, fmt.Errorf("from %v to %v: sizes after the batch must be 1 to %d, or one of them -1", v, names(to), total)
		}
		sizes = append(sizes, int(d))
		if known *= d; known > total {
			break
		}
	}
	if free >= 0 && known <= total {
		sizes[free] = int(total / known)
		known *= total / known
	}
	batch := to[0] == 0 || to[0] == batchSize || to[0] == b.batch && b.batch > 0 || to[0] == -1 && free < 0
	if known != total || !batch {
		return v, fmt.Errorf("from %v to %v: it must keep the batch as first dimension, and %d values", v, names(to), total)
	}
	if to, err := v.reshape(sizes); err == nil {
		return to, nil
	}
	// The new dimensions cut across the old ones: put the values in order first.
	if v, err = v.reshape([]int{int(total)}); err != nil {
		return v, err
	}
	if v, err = b.vector(v); err != nil {
		return v, err
	}
	return v.reshape(sizes)
}

func (b *builder) transpose(n *node) (value, error) {
	if err := n.allow(attributes{"perm": kindInts}); err != nil {
		return value{}, err
	}
	v, err := b.only(n)
	if err != nil {
		return v, err
	}
	perm := n.attribute("perm")
	if perm == nil || len(perm.ints) != len(v.dims)+1 || perm.ints[0] != 0 {
		return v, fmt.Errorf("perm of %v: it must keep the batch as first dimension", v)
	}
	out := value{layer: v.layer, alone: v.alone}
	seen := make([]bool, len(v.dims))
	for _, p := range perm.ints[1:] {
		if p < 1 || p > int64(len(v.dims)) || seen[p-1] {
			return v, fmt.Errorf("perm %v: each dimension of %v must be there once", perm.ints, v)
		}
		seen[p-1] = true
		out.dims = append(out.dims, v.dims[p-1])
	}
	return out, nil
}

func (b *builder) squeeze(n *node) (value, error) {
	if err := n.allow(attributes{"axes": kindInts}); err != nil {
		return value{}, err
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	axes, err := b.axes(n, len(v.dims)+1)
	if err != nil {
		return v, err
	}
	out := value{layer: v.layer, alone: v.alone}
	for i, dim := range v.dims {
		switch {
		case !slices.Contains(axes, i+1):
			out.dims = append(out.dims, dim)
		case count(dim) != 1:
			return v, fmt.Errorf("axes %v of %v: only dimensions of size 1 can go", axes, v)
		}
	}
	return out, nil
}

func (b *builder) unsqueeze(n *node) (value, error) {
	if err := n.allow(attributes{"axes": kindInts}); err != nil {
		return value{}, err
	}
	v, err := b.value(n, 0)
	if err != nil {
		return v, err
	}
	axes, err := b.axes(n, len(v.dims)+2)
	if err != nil {
		return v, err
	}
	if len(axes) != 1 || len(v.dims) >= maxRank {
		return v, fmt.Errorf("axes %v of %v: one, after the batch, is supported", axes, v)
	}
	out := value{layer: v.layer, alone: v.alone}
	out.dims = slices.Insert(slices.Clone(v.dims), axes[0]-1, []axis(nil))
	return out, nil
}

// axes are those that an attribute or the second input names, of so many
// dimensions; the batch's is not among them.
func (b *builder) axes(n *node, rank int) ([]int, error) {
	var given []int64
	if a := n.attribute("axes"); a != nil {
		given = a.ints
	} else if len(n.inputs) > 1 && n.inputs[1] != "" {
		var err error
		if given, err = b.constants(n.inputs[1]); err != nil {
			return nil, err
		}
	}
	var axes []int
	for _, a := range given {
		if a < 0 {
			a += int64(rank)
		}
		if a < 1 || a >= int64(rank) || slices.Contains(axes, int(a)) {
			return nil, fmt.Errorf("axes %v: each of 1 to %d once is supported", given, rank-1)
		}
		axes = append(axes, int(a))
	}
	if len(axes) == 0 {
		return nil, errors.New("axes must be named")
	}
	return axes, nil
}
