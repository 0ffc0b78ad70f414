package onnx

import (
	"fmt"
	"slices"
	"strings"

	"github.com/temper-ml/temper/models/nn"
)

// value is what nodes pass on: a layer's output in the order and grouping that
// ONNX gives it. Flatten, Reshape and Transpose change the view of a value
// only; where a layer needs another order, it gets a permute layer before it.
type value struct {
	layer int      // -1: the network's input
	dims  [][]axis // without the batch: each dimension's axes, the last the fastest
	alone bool     // nothing else reads the layer
}

// axis is a loop over places in a layer's memory, which is height, width,
// channels.
type axis struct{ size, stride int }

// image is the view [N, channels, height, width] of a layer's output.
func image(layer int, s nn.Shape) value {
	return value{layer: layer, alone: true, dims: [][]axis{
		tidy([]axis{{s.Channels, 1}}),
		tidy([]axis{{s.Height, s.Width * s.Channels}}),
		tidy([]axis{{s.Width, s.Channels}}),
	}}
}

// vector is the view [N, features] of a layer whose output is one pixel.
func vector(layer, features int) value {
	return value{layer: layer, alone: true, dims: [][]axis{tidy([]axis{{features, 1}})}}
}

// tidy drops axes of size 1 and joins those that are one loop: equal views are
// then equal lists.
func tidy(axes []axis) []axis {
	var out []axis
	for _, a := range axes {
		n := len(out)
		switch {
		case a.size == 1:
		case n > 0 && out[n-1].stride == a.size*a.stride:
			out[n-1] = axis{out[n-1].size * a.size, a.stride}
		default:
			out = append(out, a)
		}
	}
	return out
}

func (v value) size(dim int) int { return count(v.dims[dim]) }

func count(axes []axis) int {
	size := 1
	for _, a := range axes {
		size *= a.size
	}
	return size
}

// places lists the places in the layer's memory of a dimension's elements.
func places(axes []axis) []int {
	out := []int{0}
	for _, a := range axes {
		next := make([]int, 0, len(out)*a.size)
		for _, at := range out {
			for k := range a.size {
				next = append(next, at+k*a.stride)
			}
		}
		out = next
	}
	return out
}

func sameView(a, b value) bool {
	return slices.EqualFunc(a.dims, b.dims, func(x, y []axis) bool { return slices.Equal(x, y) })
}

// String is the value's shape as ONNX writes it.
func (v value) String() string {
	var b strings.Builder
	b.WriteString("[N")
	for i := range v.dims {
		fmt.Fprintf(&b, " %d", v.size(i))
	}
	return b.String() + "]"
}

// axes are all of a value's, in order.
func (v value) axes() []axis { return slices.Concat(v.dims...) }

// reshape groups a value's elements anew, into dimensions of these sizes.
func (v value) reshape(sizes []int) (value, error) {
	left := tidy(v.axes())
	to := value{layer: v.layer, alone: v.alone}
	for _, need := range sizes {
		var dim []axis
		for need > 1 {
			if len(left) == 0 {
				return v, fmt.Errorf("%v has too few values for %v", v, sizes)
			}
			a := left[0]
			switch {
			case need%a.size == 0:
				dim = append(dim, a)
				need /= a.size
				left = left[1:]
			case a.size%need == 0:
				rest := a.size / need
				dim = append(dim, axis{need, a.stride * rest})
				left = append([]axis{{rest, a.stride}}, left[1:]...)
				need = 1
			default:
				return v, fmt.Errorf("%v to %v cuts across its dimensions", v, sizes)
			}
		}
		to.dims = append(to.dims, tidy(dim))
	}
	if len(left) > 0 {
		return v, fmt.Errorf("%v has too many values for %v", v, sizes)
	}
	return to, nil
}

// image makes a value a view [N, channels, height, width] of a layer of just
// that shape, by a permute layer where it is not.
func (b *builder) image(v value) (value, error) {
	if len(v.dims) != 3 {
		return v, fmt.Errorf("its input is %v, not [N, channels, height, width]", v)
	}
	s := nn.Shape{Height: v.size(1), Width: v.size(2), Channels: v.size(0)}
	if b.shapes[v.layer+1] == s && sameView(v, image(v.layer, s)) {
		return v, nil
	}
	return b.permute(v, s, slices.Concat(v.dims[1], v.dims[2], v.dims[0]))
}

// vector makes a value a view [N, features] of a layer of one pixel, by a
// permute layer where it is not.
func (b *builder) vector(v value) (value, error) {
	if len(v.dims) != 1 {
		return v, fmt.Errorf("its input is %v, not [N, features]: put a Flatten before it", v)
	}
	features := v.size(0)
	s := nn.Shape{Height: 1, Width: 1, Channels: features}
	if b.shapes[v.layer+1] == s && sameView(v, vector(v.layer, features)) {
		return v, nil
	}
	p, err := b.permute(v, s, v.dims[0])
	return value{layer: p.layer, dims: vector(p.layer, features).dims, alone: true}, err
}

func (b *builder) permute(v value, s nn.Shape, axes []axis) (value, error) {
	p := &nn.Permute{Shape: s}
	for _, a := range tidy(axes) {
		p.Sizes, p.Strides = append(p.Sizes, a.size), append(p.Strides, a.stride)
	}
	if p.Sizes == nil {
		p.Sizes, p.Strides = []int{1}, []int{1}
	}
	return b.layer(nn.Layer{Permute: p}, v)
}

// plain makes a value a view of its layer as it is, whatever its rank.
func (b *builder) plain(v value) (value, error) {
	if len(v.dims) == 1 {
		return b.vector(v)
	}
	return b.image(v)
}
