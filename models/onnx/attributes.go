package onnx

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/temper-ml/temper/models/nn"
)

// float is element i.
func (t *tensor) float(i int) float32 {
	return math.Float32frombits(binary.LittleEndian.Uint32(t.data[4*i:]))
}

// elements counts a tensor's; check saw that the shape has no more than fit.
func (t *tensor) elements() int {
	size := 1
	for _, d := range t.dims {
		size *= int(d)
	}
	return size
}

// copyTo copies all elements times factor; a nil tensor copies nothing.
func (t *tensor) copyTo(dst []float32, factor float32) {
	if t == nil {
		return
	}
	for i := range dst {
		dst[i] = factor * t.float(i)
	}
}

func float32Bytes(b []byte, values ...float32) []byte {
	for _, v := range values {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
	}
	return b
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

func (n *node) float(name string, absent float32) float32 {
	if a := n.attribute(name); a != nil {
		return a.float
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
