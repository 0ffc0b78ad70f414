package graph

import (
	"fmt"
	"hash"
	"hash/fnv"

	"github.com/chewxy/hm"
	"gorgonia.org/gorgonia"
	"gorgonia.org/tensor"
)

// operator is a Gorgonia operator that owns the memory of its result, and knows
// that of its inputs. Stock operators allocate their results on every run,
// which costs more than the arithmetic of a small network. It implements Op
// and SDOp.
type operator struct {
	name   string
	id     uint32 // distinguishes operators in the graph's hashing
	inputs []int  // dimensions of each input: 1 for parameters, 2 for activations
	out    func() *tensor.Dense
	do     func(in [][]float32)
	// diff returns, for the gradient of the operator's result, the gradient
	// of each input. It is nil where the operator is itself part of a
	// gradient.
	diff func(inputs gorgonia.Nodes, output, grad *gorgonia.Node) (gorgonia.Nodes, error)

	arguments [][]float32 // the inputs' memory
}

func (o *operator) Arity() int { return len(o.inputs) }

func (o *operator) Type() hm.Type {
	types := make([]hm.Type, 0, len(o.inputs)+1)
	for _, d := range o.inputs {
		types = append(types, gorgonia.TensorType{Dims: d, Of: tensor.Float32})
	}
	return hm.NewFnType(append(types, gorgonia.TensorType{Dims: o.out().Dims(), Of: tensor.Float32})...)
}

func (o *operator) InferShape(...gorgonia.DimSizer) (tensor.Shape, error) {
	return o.out().Shape().Clone(), nil
}

func (o *operator) Do(values ...gorgonia.Value) (gorgonia.Value, error) {
	if len(values) != len(o.inputs) {
		return nil, fmt.Errorf("%s: %d inputs, want %d", o.name, len(values), len(o.inputs))
	}
	arguments := make([][]float32, len(values))
	for i, v := range values {
		arguments[i] = v.(*tensor.Dense).Float32s()
	}
	o.do(arguments)
	return o.out(), nil
}

func (o *operator) DiffWRT(inputs int) []bool {
	wrt := make([]bool, inputs)
	for i := range wrt {
		wrt[i] = o.diff != nil
	}
	return wrt
}

func (o *operator) SymDiff(inputs gorgonia.Nodes, output, grad *gorgonia.Node) (gorgonia.Nodes, error) {
	if o.diff == nil {
		return nil, fmt.Errorf("%s is a gradient and has no derivative here", o.name)
	}
	return o.diff(inputs, output, grad)
}

func (o *operator) ReturnsPtr() bool     { return true }
func (o *operator) CallsExtern() bool    { return false }
func (o *operator) OverwritesInput() int { return -1 }
func (o *operator) WriteHash(h hash.Hash) {
	fmt.Fprintf(h, "%s-%d", o.name, o.id)
}
func (o *operator) Hashcode() uint32 {
	h := fnv.New32a()
	o.WriteHash(h)
	return h.Sum32()
}
func (o *operator) String() string { return o.name }
