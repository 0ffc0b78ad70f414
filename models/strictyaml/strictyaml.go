// Package strictyaml decodes YAML files written by people: a mistyped or
// missing key is an error that names its line and the nearest key.
package strictyaml

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/temper-ml/temper/models/unknown"
)

// MaxBytes bounds a file; the largest of ours has 3 KB.
const MaxBytes = 256 << 10

// maxDepth bounds the nesting of a file; the deepest of ours has 5 levels.
const maxDepth = 32

// Decode reads exactly one YAML document into out, a pointer to a struct.
// Every key must belong to a field with a yaml tag, every field whose tag has
// no omitempty must be there, and no key may be without a value. Anchors and
// aliases are refused. A field of type yaml.Node takes any value: decode it
// with DecodeNode.
func Decode(data []byte, out any) error {
	if len(data) > MaxBytes {
		return fmt.Errorf("%d bytes of YAML: at most %d", len(data), MaxBytes)
	}
	d := yaml.NewDecoder(bytes.NewReader(data))
	var document yaml.Node
	if err := d.Decode(&document); err != nil {
		if errors.Is(err, io.EOF) {
			return errors.New("the YAML is empty")
		}
		return err
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return errors.New("more than one YAML document, or text that is not YAML after the first")
	}
	return DecodeNode(document.Content[0], out)
}

// DecodeNode is Decode for a part of a file.
func DecodeNode(n *yaml.Node, out any) error {
	t := reflect.TypeOf(out).Elem()
	if err := check(n, t, "", 0); err != nil {
		return err
	}
	return n.Decode(out)
}

var nodeType = reflect.TypeFor[yaml.Node]()

// check compares a node with the type it is to be decoded into; path is where
// it is in the file, such as "network.layers[2]".
func check(n *yaml.Node, t reflect.Type, path string, depth int) error {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	fail := func(format string, args ...any) error { return at(n, path, fmt.Errorf(format, args...)) }
	switch {
	case depth > maxDepth:
		return fail("nested deeper than %d levels", maxDepth)
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		return fail("anchors and aliases are not supported: write the value out")
	case n.Kind == yaml.ScalarNode && n.Tag == "!!null":
		return fail("has no value: give one or remove the key")
	case t == nodeType:
		return nil
	}
	switch t.Kind() {
	case reflect.Struct:
		if n.Kind != yaml.MappingNode {
			return fail("must be a mapping of keys and values")
		}
		return checkStruct(n, t, path, depth)
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			return fail("must be a list")
		}
		for i, item := range n.Content {
			if err := check(item, t.Elem(), fmt.Sprintf("%s[%d]", path, i), depth+1); err != nil {
				return err
			}
		}
	default:
		if n.Kind != yaml.ScalarNode {
			return fail("must be a single value")
		}
		v := reflect.New(t)
		fractional := (v.Elem().CanInt() || v.Elem().CanUint()) && n.ShortTag() != "!!int" // the YAML library would cut it off
		if err := n.Decode(v.Interface()); err != nil || fractional {
			return fail("%q is not %s", n.Value, kindName(t))
		}
		if v.Elem().CanFloat() && (math.IsNaN(v.Elem().Float()) || math.IsInf(v.Elem().Float(), 0)) {
			return fail("%q is not a finite number", n.Value)
		}
	}
	return nil
}

func at(n *yaml.Node, path string, err error) error {
	if path == "" {
		return fmt.Errorf("line %d: %w", n.Line, err)
	}
	return fmt.Errorf("line %d: %s: %w", n.Line, path, err)
}

func checkStruct(n *yaml.Node, t reflect.Type, path string, depth int) error {
	var keys, required []string
	fields := map[string]reflect.Type{}
	for i := range t.NumField() {
		tag, options, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		if tag == "" || tag == "-" {
			continue
		}
		keys = append(keys, tag)
		fields[tag] = t.Field(i).Type
		if !slices.Contains(strings.Split(options, ","), "omitempty") {
			required = append(required, tag)
		}
	}
	seen := map[string]bool{}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		field, ok := fields[key.Value]
		if !ok {
			return at(key, path, unknown.Name("key", key.Value, keys))
		}
		if seen[key.Value] {
			return at(key, path, fmt.Errorf("%s is given twice", key.Value))
		}
		seen[key.Value] = true
		if err := check(value, field, join(path, key.Value), depth+1); err != nil {
			return err
		}
	}
	for _, key := range required {
		if !seen[key] {
			return at(n, path, fmt.Errorf("%s is missing", key))
		}
	}
	return nil
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func kindName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "text"
	}
	return "a whole number in range"
}
