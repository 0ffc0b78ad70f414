package onnx

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/temper-ml/temper/models/nn"
)

// The messages of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto),
// as far as classifiers use them, read straight from the wire. Byte slices
// alias the file, so a parsed file costs its nodes and nothing for its weights.
//
// Parsing is strict, because a signed file must mean one thing to every reader:
// a field that onnx.proto does not have, a wrong wire type, or a second value of
// a field that has one, is an error.

// Bounds on a file, far above the networks that nn can hold.
const (
	// MaxSize of a file: the largest network's weights and some for the graph.
	MaxSize = 4*nn.MaxParameters + 16<<20
	// maxNodes allows each layer its operator, activation, reshape and constants.
	maxNodes        = 8 * nn.MaxLayers
	maxInitializers = 4 * nn.MaxLayers
	maxAttributes   = 16   // of one node; Conv, the largest, has 6
	maxPorts        = 64   // inputs or outputs of one node: a Concat of many
	maxRank         = 8    // of a tensor
	maxInts         = 16   // in one attribute: pads of a convolution over 8 dimensions
	maxName         = 4096 // bytes of any name
	maxMetadata     = 256  // entries
	maxMetadataSize = 1 << 20
)

type model struct {
	irVersion int64
	opset     int64
	graph     *graph
	metadata  map[string]string
}

type graph struct {
	name            string
	nodes           []*node
	initializers    []*tensor
	inputs, outputs []*valueInfo
}

type node struct {
	index           int
	name, op        string
	inputs, outputs []string
	attributes      []*attribute
}

// String names a node in errors.
func (n *node) String() string {
	return fmt.Sprintf("node %d %q (%s)", n.index, n.name, n.op)
}

type attribute struct {
	name   string
	kind   int64
	float  float32
	int    int64
	ints   []int64
	bytes  []byte
	tensor *tensor
}

// Kinds of attributes (AttributeProto.AttributeType).
const (
	kindFloat  = 1
	kindInt    = 2
	kindString = 3
	kindTensor = 4
	kindInts   = 7
)

type tensor struct {
	name     string
	dims     []int64
	dataType int64
	data     []byte // little-endian elements, from raw_data or packed float_data
	ints     []int64
}

// Element types of tensors (TensorProto.DataType).
const (
	typeFloat = 1
	typeInt64 = 7
	typeBool  = 9
)

type valueInfo struct {
	name     string
	elemType int64
	dims     dims
}

// dims are the dimensions of an input or output, 0 where one is free.
type dims []int64

func (d dims) String() string {
	names := make([]string, len(d))
	for i, size := range d {
		if names[i] = "?"; size != 0 {
			names[i] = fmt.Sprint(size)
		}
	}
	return "[" + strings.Join(names, " ") + "]"
}

// field is one field on the wire; the member of its wire type is set.
type field struct {
	number protowire.Number
	varint int64
	fixed  uint32
	bytes  []byte
}

// rule says how a field may appear.
type rule struct {
	wire     protowire.Type
	repeated bool
	packed   bool // varints that may also come packed
}

var (
	one     = rule{wire: protowire.BytesType}
	many    = rule{wire: protowire.BytesType, repeated: true}
	number  = rule{wire: protowire.VarintType}
	numbers = rule{wire: protowire.VarintType, repeated: true, packed: true}
	fixed32 = rule{wire: protowire.Fixed32Type}
)

type rules map[protowire.Number]rule

var (
	modelRules     = rules{1: number, 2: one, 3: one, 4: one, 5: number, 6: one, 7: one, 8: many, 14: many, 20: many, 25: many, 26: many}
	graphRules     = rules{1: many, 2: one, 5: many, 10: one, 11: many, 12: many, 13: many, 14: many, 15: many, 16: many}
	nodeRules      = rules{1: many, 2: many, 3: one, 4: one, 5: many, 6: one, 7: one, 8: one, 9: many, 10: many}
	attributeRules = rules{1: one, 2: fixed32, 3: number, 4: one, 5: one, 6: one, 7: one, 8: numbers, 9: many, 10: many, 11: many, 13: one, 14: one, 15: many, 20: number, 21: one, 22: one, 23: many}
	tensorRules    = rules{1: numbers, 2: number, 3: one, 4: one, 5: numbers, 6: many, 7: numbers, 8: one, 9: one, 10: one, 11: numbers, 12: one, 13: many, 14: number, 16: many}
	valueRules     = rules{1: one, 2: one, 3: one, 4: many}
	typeRules      = rules{1: one, 4: one, 5: one, 6: one, 8: one, 9: one}
	tensorType     = rules{1: number, 2: one}
	shapeRules     = rules{1: many}
	dimRules       = rules{1: number, 2: one, 3: one}
	opsetRules     = rules{1: one, 2: number}
	entryRules     = rules{1: one, 2: one}
)

// each calls f for every field of a message, a packed field once an element.
func each(data []byte, message string, known rules, f func(field) error) error {
	var seen uint64 // field numbers are below 32
	for len(data) > 0 {
		num, wire, n := protowire.ConsumeTag(data)
		if n < 0 {
			return fmt.Errorf("%s: damaged: %w", message, protowire.ParseError(n))
		}
		data = data[n:]
		r, ok := known[num]
		if !ok {
			return fmt.Errorf("%s: unknown field %d", message, num)
		}
		if !r.repeated && seen>>num&1 == 1 {
			return fmt.Errorf("%s: field %d is there twice", message, num)
		}
		seen |= 1 << num
		v := field{number: num}
		switch {
		case wire == protowire.VarintType && r.wire == wire:
			var u uint64
			u, n = protowire.ConsumeVarint(data)
			v.varint = int64(u)
		case wire == protowire.Fixed32Type && r.wire == wire:
			v.fixed, n = protowire.ConsumeFixed32(data)
		case wire == protowire.BytesType && (r.wire == wire || r.packed):
			v.bytes, n = protowire.ConsumeBytes(data)
		default:
			return fmt.Errorf("%s: field %d has wire type %d, expected %d", message, num, wire, r.wire)
		}
		if n < 0 {
			return fmt.Errorf("%s: field %d: damaged or truncated: %w", message, num, protowire.ParseError(n))
		}
		data = data[n:]
		if wire == protowire.BytesType && r.packed {
			for packed := v.bytes; len(packed) > 0; packed = packed[n:] {
				var u uint64
				if u, n = protowire.ConsumeVarint(packed); n < 0 {
					return fmt.Errorf("%s: field %d: damaged: %w", message, num, protowire.ParseError(n))
				}
				if err := f(field{number: num, varint: int64(u)}); err != nil {
					return err
				}
			}
			continue
		}
		if err := f(v); err != nil {
			return err
		}
	}
	return nil
}

// text is a name from the file.
func text(b []byte) (string, error) {
	if len(b) > maxName {
		return "", fmt.Errorf("a name of %d bytes: at most %d", len(b), maxName)
	}
	if !utf8.Valid(b) {
		return "", errors.New("a name that is not UTF-8")
	}
	return string(b), nil
}

// printable tells whether a network's name can be shown as it is.
func printable(name string) bool {
	return !strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) })
}

// add appends to a list from the file, up to a limit.
func add[S ~[]T, T any](list *S, item T, limit int, what string) error {
	if len(*list) >= limit {
		return fmt.Errorf("more than %d %s", limit, what)
	}
	*list = append(*list, item)
	return nil
}

func parseModel(data []byte) (*model, error) {
	m := &model{metadata: map[string]string{}}
	metadataSize := 0
	err := each(data, "model", modelRules, func(f field) (err error) {
		switch f.number {
		case 1:
			m.irVersion = f.varint
		case 7:
			m.graph, err = parseGraph(f.bytes)
		case 8:
			err = m.parseOpset(f.bytes)
		case 14:
			var key, value string
			key, value, err = parseEntry(f.bytes)
			metadataSize += len(key) + len(value)
			if _, twice := m.metadata[key]; twice {
				return fmt.Errorf("metadata %q is there twice", key)
			}
			if len(m.metadata) >= maxMetadata || metadataSize > maxMetadataSize {
				return fmt.Errorf("metadata: at most %d entries of %d bytes in all", maxMetadata, maxMetadataSize)
			}
			m.metadata[key] = value
		case 20:
			return errors.New("the model holds training information: export it for inference")
		case 25:
			return errors.New("the model defines functions of its own: export it with standard operators only")
		}
		return err
	})
	return m, err
}

func (m *model) parseOpset(data []byte) error {
	domain, version := "", int64(0)
	err := each(data, "opset_import", opsetRules, func(f field) (err error) {
		if f.number == 1 {
			domain, err = text(f.bytes)
		} else {
			version = f.varint
		}
		return err
	})
	if err != nil {
		return err
	}
	// Other domains may be imported; using their operators is refused at the node.
	if domain == "" || domain == "ai.onnx" {
		if m.opset != 0 {
			return errors.New("opset_import: the standard operators are imported twice")
		}
		m.opset = version
	}
	return nil
}

func parseEntry(data []byte) (key, value string, err error) {
	err = each(data, "metadata", entryRules, func(f field) (err error) {
		if f.number == 1 {
			key, err = text(f.bytes)
			return err
		}
		if len(f.bytes) > maxMetadataSize || !utf8.Valid(f.bytes) {
			return fmt.Errorf("metadata %q: a value must be UTF-8 of at most %d bytes", key, maxMetadataSize)
		}
		value = string(f.bytes)
		return nil
	})
	return key, value, err
}

func parseGraph(data []byte) (*graph, error) {
	g := &graph{}
	err := each(data, "graph", graphRules, func(f field) (err error) {
		switch f.number {
		case 1:
			if len(g.nodes) >= maxNodes {
				return fmt.Errorf("more than %d nodes", maxNodes)
			}
			n := &node{index: len(g.nodes)}
			g.nodes = append(g.nodes, n)
			if err := n.parse(f.bytes); err != nil {
				return fmt.Errorf("%v: %w", n, err)
			}
		case 2:
			if g.name, err = text(f.bytes); err == nil && !printable(g.name) {
				err = fmt.Errorf("its name %q is not printable", g.name)
			}
		case 5:
			var t *tensor
			if t, err = parseTensor(f.bytes); err != nil {
				return err
			}
			err = add(&g.initializers, t, maxInitializers, "initializers")
		case 11, 12:
			list, what := &g.inputs, "inputs of the graph"
			if f.number == 12 {
				list, what = &g.outputs, "outputs of the graph"
			}
			var v *valueInfo
			if v, err = parseValue(f.bytes); err != nil {
				return err
			}
			err = add(list, v, maxInitializers+1, what) // old files list initializers as inputs
		case 14:
			return errors.New("the graph is quantised: export it in float32")
		case 15:
			return errors.New("the graph has sparse initializers: export it with dense ones")
		}
		return err
	})
	return g, err
}

func (n *node) parse(data []byte) error {
	return each(data, "node", nodeRules, func(f field) error {
		switch f.number {
		case 1, 2:
			s, err := text(f.bytes)
			if err != nil {
				return err
			}
			if f.number == 1 {
				return add(&n.inputs, s, maxPorts, "inputs")
			}
			return add(&n.outputs, s, maxPorts, "outputs")
		case 3, 4, 7:
			s, err := text(f.bytes)
			if err != nil {
				return err
			}
			switch {
			case f.number == 3:
				n.name = s
			case f.number == 4:
				n.op = s
			case s != "" && s != "ai.onnx":
				return fmt.Errorf("operator of domain %q: only the standard ones are supported", s)
			}
		case 5:
			a, err := parseAttribute(f.bytes)
			if err != nil {
				return err
			}
			return add(&n.attributes, a, maxAttributes, "attributes")
		case 8:
			if len(f.bytes) > 0 {
				return errors.New("an overloaded function: only standard operators are supported")
			}
		}
		return nil
	})
}

func parseAttribute(data []byte) (*attribute, error) {
	a := &attribute{}
	err := each(data, "attribute", attributeRules, func(f field) (err error) {
		switch f.number {
		case 1:
			a.name, err = text(f.bytes)
		case 2:
			a.float = math.Float32frombits(f.fixed)
		case 3:
			a.int = f.varint
		case 4:
			a.bytes = f.bytes
		case 5:
			a.tensor, err = parseTensor(f.bytes)
		case 8:
			err = add(&a.ints, f.varint, maxInts, "numbers")
		case 20:
			a.kind = f.varint
		case 13: // doc_string
		default:
			err = fmt.Errorf("field %d: graphs, types, lists of floats and strings are not supported", f.number)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("attribute %q: %w", a.name, err)
	}
	return a, nil
}

var errExternal = errors.New("its data is in another file, which is never read: save the model as one file (in PyTorch, torch.onnx.export(..., external_data=False))")

func parseTensor(data []byte) (*tensor, error) {
	t := &tensor{}
	err := each(data, "tensor", tensorRules, func(f field) (err error) {
		switch f.number {
		case 1:
			err = add(&t.dims, f.varint, maxRank, "dimensions")
		case 2:
			t.dataType = f.varint
		case 4, 9: // both hold little-endian elements
			if t.data != nil {
				return errors.New("both raw_data and float_data")
			}
			t.data = f.bytes
			if f.number == 4 && t.dataType != 0 && t.dataType != typeFloat {
				return fmt.Errorf("float_data, but element type %d", t.dataType)
			}
		case 7:
			err = add(&t.ints, f.varint, maxRank, "int64 elements")
		case 5: // a bool is an int32
			if t.data != nil || t.dataType != typeBool {
				return errors.New("int32_data is supported for a single bool only")
			}
			t.data = []byte{byte(min(uint64(f.varint), 1))}
		case 8:
			t.name, err = text(f.bytes)
		case 13:
			return errExternal
		case 14:
			if f.varint != 0 {
				return errExternal
			}
		case 12, 16: // doc_string, metadata
		default:
			err = fmt.Errorf("field %d: only float32 weights and int64 shapes are supported", f.number)
		}
		return err
	})
	if err == nil {
		err = t.check()
	}
	if err != nil {
		return nil, fmt.Errorf("tensor %q: %w", t.name, err)
	}
	return t, nil
}

// check compares a tensor's shape with the elements that are there.
func (t *tensor) check() error {
	size := int64(0)
	switch {
	case t.dataType == typeFloat && t.ints == nil:
		size = 4
	case t.dataType == typeInt64 && (t.ints == nil || t.data == nil):
		size = 8
	case t.dataType == typeBool && t.ints == nil:
		size = 1
	default:
		return fmt.Errorf("element type %d: only float32 (1) weights, int64 (7) shapes and bool (9) are supported", t.dataType)
	}
	elements := int64(1)
	for _, d := range t.dims {
		if d < 0 {
			return fmt.Errorf("shape %v: a dimension is negative", t.dims)
		}
		if d > nn.MaxParameters || elements*d > nn.MaxParameters {
			return fmt.Errorf("shape %v: more than %d elements", t.dims, nn.MaxParameters)
		}
		elements *= d
	}
	have := int64(len(t.data))
	if t.ints != nil {
		have = 8 * int64(len(t.ints))
	}
	if have != elements*size {
		return fmt.Errorf("shape %v needs %d bytes, %d are there", t.dims, elements*size, have)
	}
	return nil
}

// shape returns the elements of an int64 tensor of one dimension or none.
func (t *tensor) shape() ([]int64, error) {
	if t.dataType != typeInt64 || len(t.dims) > 1 || t.elements() > maxRank {
		return nil, fmt.Errorf("tensor %q: a shape is one dimension of at most %d int64", t.name, maxRank)
	}
	if t.ints != nil {
		return t.ints, nil
	}
	var s []int64
	for b := t.data; len(b) > 0; b = b[8:] {
		v, _ := protowire.ConsumeFixed64(b) // check saw that the size is a multiple of 8
		s = append(s, int64(v))
	}
	return s, nil
}

func parseValue(data []byte) (*valueInfo, error) {
	v := &valueInfo{}
	err := each(data, "value", valueRules, func(f field) (err error) {
		switch f.number {
		case 1:
			v.name, err = text(f.bytes)
		case 2:
			err = v.parseType(f.bytes)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("value %q: %w", v.name, err)
	}
	return v, nil
}

func (v *valueInfo) parseType(data []byte) error {
	return each(data, "type", typeRules, func(f field) error {
		switch f.number {
		case 1:
			return each(f.bytes, "tensor type", tensorType, func(f field) error {
				if f.number == 1 {
					v.elemType = f.varint
					return nil
				}
				return each(f.bytes, "shape", shapeRules, func(f field) error {
					var d int64
					err := each(f.bytes, "dimension", dimRules, func(f field) error {
						if f.number == 1 {
							d = f.varint
							if d < 1 {
								return fmt.Errorf("dimension %d: must be at least 1", d)
							}
						}
						return nil
					})
					if err != nil {
						return err
					}
					return add(&v.dims, d, maxRank, "dimensions")
				})
			})
		case 6: // denotation
			return nil
		}
		return errors.New("only tensors are supported")
	})
}

// looksLike names well-known formats that are not ONNX, for errors.
func looksLike(data []byte) string {
	for _, f := range []struct{ magic, name string }{
		{"PK\x03\x04", "a zip archive (a PyTorch .pt or Keras .keras file is one): export the model as ONNX"},
		{"\x1f\x8b", "gzip: unpack it first"},
		{"\x28\xb5\x2f\xfd", "zstd: unpack it first"},
		{"\x89HDF\r\n\x1a\n", "HDF5 (a Keras .h5 file): export the model as ONNX"},
		{"\x93NUMPY", "a NumPy array"},
		{"\x7fELF", "a program"},
		{"GGUF", "GGUF"},
		{"{", "JSON"},
		{"<", "XML or HTML"},
	} {
		if bytes.HasPrefix(data, []byte(f.magic)) {
			return f.name
		}
	}
	// A pickle of protocol 2 or later starts with PROTO and ends with STOP; an
	// ONNX model never starts with 0x80, which would be field 0.
	if len(data) > 1 && data[0] == 0x80 && data[1] <= 5 {
		return "a Python pickle, which can run code when opened: export the model as ONNX"
	}
	if looksLikeGob(data) {
		return "a Go gob stream"
	}
	if len(data) > 262 && string(data[257:262]) == "ustar" {
		return "a tar archive: unpack it first"
	}
	if len(data) > 16 && data[8] == '{' && bytes.Equal(data[4:8], []byte{0, 0, 0, 0}) {
		return "safetensors, which has no graph: export the model as ONNX"
	}
	return ""
}

// looksLikeGob tells whether data starts as a gob stream of a struct does: a
// message's length, the negative number of the type it defines, and the start of
// that definition.
func looksLikeGob(data []byte) bool {
	at := bytes.Index(data[:min(len(data), 10)], []byte{3, 1, 1})
	return at >= 2 && (data[at-1] == 0x7f || data[at-2] == 0xff && data[at-1]&1 == 1)
}
