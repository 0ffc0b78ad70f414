package onnx

import (
	"errors"
	"fmt"
	"math"
	"slices"
)

// PyTorch writes x.view(x.size(0), -1) as a computation of the new shape from
// the old, and the paddings of F.pad as one that turns their order round. The few
// nodes that such computations consist of are evaluated here, with batchSize for
// the size that is known only later.

const batchSize = math.MinInt64

// ofNumbers tells whether a node computes a shape.
func (b *builder) ofNumbers(n *node) bool {
	switch n.op {
	case "Shape":
		return true
	case "Cast", "Concat", "ConstantOfShape", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze":
		for _, in := range n.inputs {
			if _, ok := b.values[in]; ok {
				return false
			}
		}
		if len(n.inputs) == 0 {
			return false
		}
		if _, ok := b.numbers[n.inputs[0]]; ok {
			return true
		}
		t := b.tensors[n.inputs[0]]
		return n.op != "Identity" && t != nil && t.dataType == typeInt64
	}
	return false
}

// compute evaluates such a node. Single numbers are lists of one; a table of two
// dimensions is its rows one after the other, and b.columns its width.
func (b *builder) compute(n *node) ([]int64, error) {
	if err := n.allow(attributes{"allowzero": kindInt, "axis": kindInt, "axes": kindInts, "start": kindInt, "end": kindInt, "perm": kindInts, "to": kindInt, "value": kindTensor}); err != nil {
		return nil, err
	}
	if n.op == "Shape" {
		v, err := b.value(n, 0)
		if err != nil {
			return nil, err
		}
		shape := []int64{batchSize}
		for i := range v.dims {
			shape = append(shape, int64(v.size(i)))
		}
		return part(shape, n.int("start", 0), n.int("end", int64(len(shape))))
	}
	in, err := b.numbersOf(n.inputs[0])
	if err != nil {
		return nil, err
	}
	columns, out := b.columns[n.inputs[0]], n.outputs[0]
	arguments := make([][]int64, 5)
	for i := 1; i < min(len(n.inputs), 5) && n.op != "Concat"; i++ {
		if n.inputs[i] == "" {
			continue
		}
		if arguments[i], err = b.constants(n.inputs[i]); err != nil {
			return nil, err
		}
	}
	switch n.op {
	case "Cast", "Identity":
		b.columns[out] = columns
		return in, nil
	case "Squeeze", "Unsqueeze":
		return in, nil
	case "Reshape":
		switch to := arguments[1]; {
		case slices.Equal(to, []int64{-1}):
		case len(to) == 2 && to[0] == -1 && to[1] > 0 && int64(len(in))%to[1] == 0:
			b.columns[out] = int(to[1])
		default:
			return nil, fmt.Errorf("of a shape to %v: supported are [-1] and [-1 columns]", to)
		}
		return in, nil
	case "Transpose":
		if columns == 0 {
			return in, nil
		}
		rows := len(in) / columns
		b.columns[out] = rows
		turned := make([]int64, len(in))
		for i, v := range in {
			turned[i%columns*rows+i/columns] = v
		}
		return turned, nil
	case "ConstantOfShape":
		if len(in) != 1 || in[0] < 0 || in[0] > maxRank {
			return nil, fmt.Errorf("of shape %v: one dimension of at most %d is supported", names(in), maxRank)
		}
		fill := []int64{0}
		if a := n.attribute("value"); a != nil && a.tensor != nil {
			if fill, err = a.tensor.shape(); err != nil || len(fill) != 1 {
				return nil, fmt.Errorf("its value must be one int64 (%v)", err)
			}
		}
		return slices.Repeat(fill, int(in[0])), nil
	case "Concat":
		all := slices.Clone(in)
		for _, name := range n.inputs[1:] {
			more, err := b.numbersOf(name)
			if err != nil {
				return nil, err
			}
			if all = append(all, more...); len(all) > maxRank {
				return nil, fmt.Errorf("a shape of more than %d dimensions", maxRank)
			}
		}
		return all, nil
	case "Gather":
		var taken []int64
		for _, i := range arguments[1] {
			if i < 0 {
				i += int64(len(in))
			}
			if i < 0 || i >= int64(len(in)) {
				return nil, fmt.Errorf("index %d of %d numbers", i, len(in))
			}
			taken = append(taken, in[i])
		}
		return taken, nil
	}
	// Slice
	start, end, axes, step := arguments[1], arguments[2], arguments[3], arguments[4]
	if len(start) != 1 || len(end) != 1 || len(step) > 1 || len(axes) > 0 && !slices.Equal(axes, []int64{0}) {
		return nil, errors.New("only one start and end, of the first dimension, are supported")
	}
	width := max(columns, 1)
	b.columns[out] = columns
	switch {
	case len(step) == 0 || step[0] == 1:
		if columns > 0 {
			return nil, errors.New("of a table only its turning round is supported")
		}
		return part(in, start[0], end[0])
	case step[0] == -1 && start[0] == -1 && end[0] < -int64(len(in)):
		var back []int64
		for _, row := range slices.Backward(slices.Collect(slices.Chunk(in, width))) {
			back = append(back, row...)
		}
		return back, nil
	}
	return nil, fmt.Errorf("from %v to %v by %v: supported are step 1, and -1 over everything", start, end, step)
}

// part is in[start:end] as ONNX and Python have it.
func part(in []int64, start, end int64) ([]int64, error) {
	n := int64(len(in))
	for _, at := range []*int64{&start, &end} {
		if *at < 0 {
			*at = max(*at, -n) + n
		}
		*at = min(*at, n)
	}
	if start > end {
		return nil, fmt.Errorf("from %d to %d of %d numbers", start, end, n)
	}
	return in[start:end], nil
}

// numbersOf are those that a node computed or that a tensor holds.
func (b *builder) numbersOf(name string) ([]int64, error) {
	if v, ok := b.numbers[name]; ok {
		return v, nil
	}
	return b.constants(name)
}

// constants are those that a tensor holds.
func (b *builder) constants(name string) ([]int64, error) {
	t := b.tensors[name]
	if t == nil {
		return nil, fmt.Errorf("%q is not a constant: only constant shapes, and those computed from an input's, are supported", name)
	}
	b.used[name] = true
	return t.shape()
}

// names writes a shape with its batch as N.
func names(shape []int64) []string {
	out := make([]string, len(shape))
	for i, d := range shape {
		if out[i] = fmt.Sprint(d); d == batchSize {
			out[i] = "N"
		}
	}
	return out
}
