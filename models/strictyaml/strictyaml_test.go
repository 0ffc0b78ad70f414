package strictyaml

import (
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

type file struct {
	Name   string    `yaml:"name"`
	Rate   float64   `yaml:"rate,omitempty"`
	Count  int       `yaml:"count,omitempty"`
	Layers []layer   `yaml:"layers,omitempty,flow"`
	Any    yaml.Node `yaml:"any,omitempty"`
}

type layer struct {
	Conv *conv `yaml:"conv,omitempty"`
}

type conv struct {
	Filters int `yaml:"filters"`
}

func TestDecode(t *testing.T) {
	var f file
	if err := Decode([]byte("name: a\nrate: 0.5\nlayers:\n- conv: {filters: 3}\nany: [1, 2]\n"), &f); err != nil {
		t.Fatal(err)
	}
	if f.Name != "a" || f.Rate != 0.5 || f.Layers[0].Conv.Filters != 3 || f.Any.Kind != yaml.SequenceNode {
		t.Errorf("decoded %+v", f)
	}
}

func TestErrorsNameLineAndFix(t *testing.T) {
	for _, c := range []struct{ yaml, want string }{
		{"", "empty"},
		{"# nothing\n", "empty"},
		{"name: a\nraet: 1\n", `line 2: unknown key "raet": have any, count, layers, name, rate (did you mean "rate"?)`},
		{"rate: 1\n", "line 1: name is missing"},
		{"name: a\nlayers:\n- conv:\n    filter: 3\n", `line 4: layers[0].conv: unknown key "filter": have filters (did you mean "filters"?)`},
		{"name: a\nlayers:\n- conv: {}\n", "line 3: layers[0].conv: filters is missing"},
		{"name: a\nrate:\n", "line 2: rate: has no value"},
		{"name: a\nname: b\n", "line 2: name is given twice"},
		{"name: a\nrate: .nan\n", "not a finite number"},
		{"name: a\nrate: -.inf\n", "not a finite number"},
		{"name: a\nrate: 1e309\n", "rate"},
		{"name: a\nrate: 0,9\n", `line 2: rate: "0,9" is not a number`},
		{"name: a\ncount: 1.5\n", `"1.5" is not a whole number`},
		{"name: a\ncount: [1]\n", "must be a single value"},
		{"name: a\nlayers: 3\n", "must be a list"},
		{"- a\n", "must be a mapping"},
		{"name: &x a\n", "anchors"},
		{"name: a\n---\nname: b\n", "more than one"},
		{"name: a\n<<: {rate: 1}\n", "unknown key"},
		{"name: [\n", "line"},
	} {
		err := Decode([]byte(c.yaml), new(file))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: error %v, want %q", c.yaml, err, c.want)
		}
	}
}

func TestSizeAndDepthAreBounded(t *testing.T) {
	if err := Decode(make([]byte, MaxBytes+1), new(file)); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("large file: %v", err)
	}
	deep := "name: a\nany: " + strings.Repeat("[", 5000) + strings.Repeat("]", 5000)
	if err := Decode([]byte(deep), new(file)); err != nil {
		t.Logf("refused: %v", err) // either way it must come back
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("name: a\nrate: 0.5\nlayers:\n- conv: {filters: 3}\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("? {}\n: x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var out file
		if err := Decode(data, &out); err == nil && !(out.Rate*0 == 0) {
			t.Errorf("%q decodes to %v", data, out.Rate)
		}
	})
}
