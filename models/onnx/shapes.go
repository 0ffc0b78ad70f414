package onnx

import (
	"fmt"
	"math"
	"slices"
)

// PyTorch writes x.view(x.size(0), -1) as a computation of the new shape from
// the old. The few nodes that such computations consist of are evaluated here,
// with batchSize for the size that is known only later.

const batchSize = math.MinInt64

// ofNumbers tells whether a node computes a shape.
func (b *builder) ofNumbers(n *node) bool {
	switch n.op {
	case "Shape":
		return true
	case "Cast", "Concat", "Gather", "Identity", "Slice", "Squeeze", "Unsqueeze":
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

// compute evaluates such a node. Single numbers are lists of one.
func (b *builder) compute(n *node) ([]int64, error) {
	if err := n.allow(attributes{"axis": kindInt, "axes": kindInts, "start": kindInt, "end": kindInt, "to": kindInt}); err != nil {
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
	arguments := make([][]int64, len(n.inputs))
	for i := 1; i < len(n.inputs) && n.op != "Concat"; i++ {
		if arguments[i], err = b.constants(n.inputs[i]); err != nil {
			return nil, err
		}
	}
	switch n.op {
	case "Cast", "Identity", "Squeeze", "Unsqueeze":
		return in, nil
	case "Concat":
		out := slices.Clone(in)
		for _, name := range n.inputs[1:] {
			more, err := b.numbersOf(name)
			if err != nil {
				return nil, err
			}
			if out = append(out, more...); len(out) > maxRank {
				return nil, fmt.Errorf("a shape of more than %d dimensions", maxRank)
			}
		}
		return out, nil
	case "Gather":
		if len(arguments) != 2 {
			return nil, fmt.Errorf("%d inputs: 2 are expected", len(n.inputs))
		}
		var out []int64
		for _, i := range arguments[1] {
			if i < 0 {
				i += int64(len(in))
			}
			if i < 0 || i >= int64(len(in)) {
				return nil, fmt.Errorf("index %d of %d numbers", i, len(in))
			}
			out = append(out, in[i])
		}
		return out, nil
	}
	// Slice
	if len(arguments) < 3 || len(arguments[1]) != 1 || len(arguments[2]) != 1 || len(arguments) > 4 && !slices.Equal(arguments[4], []int64{1}) {
		return nil, fmt.Errorf("only a start and an end, with step 1, are supported")
	}
	return part(in, arguments[1][0], arguments[2][0])
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
