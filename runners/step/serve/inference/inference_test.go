package inference

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/nn"
)

var (
	gray  = nn.Shape{Height: 2, Width: 3, Channels: 1}
	color = nn.Shape{Height: 2, Width: 2, Channels: 3}
)

func images(t *testing.T, body string, headerLength int, shape nn.Shape) ([]float32, int, error) {
	t.Helper()
	var r Request
	if err := r.Parse([]byte(body), headerLength, 4*shape.Size()); err != nil {
		return nil, 0, err
	}
	return r.Images(nil, shape, 4)
}

func TestDataFlatAndNested(t *testing.T) {
	want := []float32{0, 0.5, 1, 0.25, 0.125, 1e-3}
	for _, body := range []string{
		`{"inputs":[{"name":"input","shape":[1,1,2,3],"datatype":"FP32","data":[0,0.5,1,0.25,0.125,1e-3]}]}`,
		`{"inputs":[{"data":[[[[0,0.5,1],[0.25,0.125,1E-3]]]],"datatype":"FP64","shape":[1,1,2,3],"name":"input"}]}`,
		`{"inputs":[{"name":"input","shape":[1,6],"datatype":"FP32","data":[[0,0.5,1,0.25,0.125,1e-3]]}]}`,
		` { "id" : null , "x" : [{}, [], "\u00e9", true] , "inputs" : [ { "name" : "in\u0070ut" , "shape":[1,6],"datatype":"FP32","data":[ 0 , 5e-1,1.0,0.25,0.125,0.001] , "parameters":{"a":{"b":[null]}} } ] , "outputs":null } `,
	} {
		got, n, err := images(t, body, -1, gray)
		if err != nil || n != 1 || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %d, %v", body, got, n, err)
		}
	}
}

func TestIntegersAreBytes(t *testing.T) {
	for _, datatype := range []string{"UINT8", "INT32", "INT64"} {
		got, _, err := images(t, `{"inputs":[{"name":"input","shape":[1,6],"datatype":"`+datatype+`","data":[0,51,255,0,0,1]}]}`, -1, gray)
		if want := []float32{0, 51. / 255, 1, 0, 0, 1. / 255}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v", datatype, got, err)
		}
	}
}

func TestChannelsFirstBecomesChannelsLast(t *testing.T) {
	got, n, err := images(t, `{"inputs":[{"name":"input","shape":[2,3,2,2],"datatype":"UINT8","data":[1,2,3,4,5,6,7,8,9,10,11,12,101,102,103,104,105,106,107,108,109,110,111,112]}]}`, -1, color)
	if err != nil || n != 2 {
		t.Fatal(n, err)
	}
	want := []float32{1, 5, 9, 2, 6, 10, 3, 7, 11, 4, 8, 12, 101, 105, 109, 102, 106, 110, 103, 107, 111, 104, 108, 112}
	for i := range want {
		want[i] /= 255
	}
	if !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
}

func TestRequestsRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, shape := range []nn.Shape{gray, color, {Height: 1, Width: 1, Channels: 5}} {
		for _, binary := range []bool{false, true} {
			x := make([]float32, 3*shape.Size())
			for i := range x {
				x[i] = rng.Float32()
			}
			body, headerLength := AppendRequest(nil, x, 3, shape, binary)
			var r Request
			for range 2 { // the second time in used memory
				if err := r.Parse(body, headerLength, len(x)); err != nil {
					t.Fatal(err)
				}
				got, n, err := r.Images(nil, shape, 3)
				if err != nil || n != 3 || !slices.Equal(got, x) {
					t.Fatalf("%v binary %v: %d, %v", shape, binary, n, err)
				}
			}
		}
	}
}

func TestBinaryDatatypes(t *testing.T) {
	header := `{"inputs":[{"name":"input","shape":[1,6],"datatype":%q,"parameters":{"binary_data_size":%d}}],"parameters":{"binary_data_output":true},"outputs":[{"name":"label"},{"name":"probabilities","parameters":{"binary_data":false}}]}`
	for datatype, data := range map[string]string{
		"UINT8": "\x00\xff\x00\x00\x00\x00",
		"INT32": "\x00\x00\x00\x00\xff\x00\x00\x00" + strings.Repeat("\x00", 16),
		"INT64": strings.Repeat("\x00", 8) + "\xff" + strings.Repeat("\x00", 7+32),
		"FP32":  "\x00\x00\x00\x00\x00\x00\x80\x3f" + strings.Repeat("\x00", 16),
		"FP64":  strings.Repeat("\x00", 8) + "\x00\x00\x00\x00\x00\x00\xf0\x3f" + strings.Repeat("\x00", 32),
	} {
		h := fmt.Sprintf(header, datatype, len(data))
		var r Request
		if err := r.Parse([]byte(h+data), len(h), 6); err != nil {
			t.Errorf("%s: %v", datatype, err)
			continue
		}
		got, _, err := r.Images(nil, gray, 1)
		if err != nil || !slices.Equal(got, []float32{0, 1, 0, 0, 0, 0}) {
			t.Errorf("%s: %v, %v", datatype, got, err)
		}
		if !r.Outputs[0].Binary || r.Outputs[1].Binary {
			t.Errorf("outputs %+v: an output's own parameter goes before the request's", r.Outputs)
		}
		if err := r.Parse([]byte(h+data+"x"), len(h), 6); err == nil {
			t.Error("a byte after the tensors was accepted")
		}
		if err := r.Parse([]byte((h + data)[:len(h)+len(data)-1]), len(h), 6); err == nil {
			t.Error("a tensor that is cut short was accepted")
		}
	}
}

// refusals are requests with a part of the error they must give.
var refusals = map[string]string{
	``:                    "ends where",
	`[]`:                  "expected",
	`{}`:                  "no inputs",
	`{"inputs":[]}`:       "no inputs",
	`{"inputs":null}`:     "no inputs",
	`{"inputs":[{}]}`:     "datatype",
	`{"inputs":[{}],}`:    "expected",
	`{"inputs":[{}]} x`:   "after the end",
	`{"id":"a","id":"b"}`: "twice",
	`{"id":"` + "\x01\"}": "control",
	`{"id":"` + "\xff\"}": "UTF-8",
	`{"id":"\x"}`:         "invalid",
	`{"id":1}`:            "expected",
	`{"id":"` + strings.Repeat("a", 300) + `"}`: "more than 256 bytes",
	`{"x":` + strings.Repeat("[", 10_000):       "nested deeper",
	`{"x":` + strings.Repeat(`{"a":`, 10_000):   "nested deeper",
	`{"x":tru}`: "true is expected",
	`{"x":1.}`:  "ends in a point",
	`{"x":01}`:  "leading zeros",
	`{"x":1e}`:  "exponent",
	`{"x":-}`:   "number is expected",
	`{"x":0.` + strings.Repeat("1", 100) + `}`:                                                       "more than 64 characters",
	`{"parameters":{"a":1,"\u0061":1}}`:                                                              "twice",
	`{"parameters":{"a":[` + strings.Repeat(`"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",`, 200) + `0]}}`:    "parameters of more than",
	`{"inputs":[` + strings.Repeat(`{"name":"input","shape":[1],"datatype":"FP32","data":[0]},`, 20): "more than 8 inputs",
	`{"outputs":[` + strings.Repeat(`{"name":"label"},`, 20):                                         "more than 8 outputs",
	`{"outputs":[{"name":"label","parameters":{"classification":3}}]}`:                               "classification",
}

// tensors are inputs with a part of the error they must give.
var tensors = map[string]string{
	`"name":"image","shape":[1,6],"datatype":"FP32","data":[0,0,0,0,0,0]`:                            `exactly one input, "input"`,
	`"name":"input","shape":[6,1],"datatype":"FP32","data":[0,0,0,0,0,0]`:                            "send [N, 1, 2, 3]",
	`"name":"input","shape":[1,1,3,2],"datatype":"FP32","data":[0,0,0,0,0,0]`:                        "send [N, 1, 2, 3]",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":[0,0,0,0,0]`:                              "data has 5",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":[0,0,0,0,0,0,0]`:                          "data has 7",
	`"name":"input","shape":[5,6],"datatype":"FP32","data":[` + strings.Repeat("0,", 29) + `0]`:      "more than 24 values",
	`"name":"input","shape":[0,6],"datatype":"FP32","data":[]`:                                       "at least 1",
	`"name":"input","shape":[-1,6],"datatype":"FP32","data":[]`:                                      "whole number",
	`"name":"input","shape":[1.0,6],"datatype":"FP32","data":[]`:                                     "expected",
	`"name":"input","shape":[2147483647,2147483647],"datatype":"FP32","data":[]`:                     "fit a request",
	`"name":"input","shape":[99999999999,6],"datatype":"FP32","data":[]`:                             "whole number",
	`"name":"input","shape":[1,6],"datatype":"FP16","data":[0]`:                                      "send FP32",
	`"name":"input","shape":[1,6],"datatype":"BYTES","data":["a"]`:                                   "number is expected",
	`"name":"input","shape":[1,6],"datatype":"FP32"`:                                                 "no data",
	`"name":"input","datatype":"FP32","data":[0]`:                                                    "no shape",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":[NaN,0,0,0,0,0]`:                          "NaN",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":[1e999,0,0,0,0,0]`:                        "out of range",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":[-Infinity,0,0,0,0,0]`:                    "number is expected",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":[1.0001,0,0,0,0,0]`:                       "from 0 to 1",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":[-1e-9,0,0,0,0,0]`:                        "from 0 to 1",
	`"name":"input","shape":[1,6],"datatype":"UINT8","data":[256,0,0,0,0,0]`:                         "0 to 255",
	`"name":"input","shape":[1,6],"datatype":"UINT8","data":[0.5,0,0,0,0,0]`:                         "0 to 255",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":[[0,0,0],[0,0,0]]`:                        "nested as [2 3]",
	`"name":"input","shape":[2,3],"datatype":"FP32","data":[[0,0,0],[0,0]]`:                          "ragged",
	`"name":"input","shape":[2,3],"datatype":"FP32","data":[[0,0,0],0,0,0]`:                          "mixes",
	`"name":"input","shape":[2,3],"datatype":"FP32","data":[0,[0]]`:                                  "mixes",
	`"name":"input","shape":[2,3],"datatype":"FP32","data":[0,0,0,0,0,0,]`:                           "number is expected",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":` + strings.Repeat("[", 10_000):           "nested deeper",
	`"name":"input","shape":[1,6],"datatype":"FP32","data":[0],"parameters":{"binary_data_size":24}`: "send one",
	`"name":"input","shape":[1,6],"datatype":"FP32","parameters":{"binary_data_size":24}`:            "only 0 bytes are left",
	`"name":"input","shape":[1,6],"datatype":"FP32","parameters":{"binary_data_size":23}`:            "is 24 bytes",
	`"name":"input","shape":[9,6],"datatype":"FP32","parameters":{"binary_data_size":216}`:           "more than 24 values",
	`"name":"input","shape":[1,6],"datatype":"FP32","parameters":{"shared_memory_region":"x"}`:       "shared memory",
}

func TestRefusals(t *testing.T) {
	all := map[string]string{}
	for body, want := range refusals {
		all[body] = want
	}
	for tensor, want := range tensors {
		all[`{"inputs":[{`+tensor+`}]}`] = want
	}
	for body, want := range all {
		_, _, err := images(t, body, -1, gray)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.120s: %v, want %q", body, err, want)
		}
	}
	if _, _, err := images(t, `{}`, 3, gray); err == nil {
		t.Error("a header length beyond the body was accepted")
	}
}

func TestBinaryNaN(t *testing.T) {
	header := `{"inputs":[{"name":"input","shape":[1,6],"datatype":"FP32","parameters":{"binary_data_size":24}}]}`
	_, _, err := images(t, header+strings.Repeat("\xff\xff\xff\x7f", 6), len(header), gray)
	if err == nil || !strings.Contains(err.Error(), "NaN") {
		t.Error(err)
	}
}

// checkNumber compares number with encoding/json's grammar and strconv's value.
func checkNumber(t *testing.T, text string) {
	t.Helper()
	p := &parser{text: []byte(text)}
	got, err := p.number()
	for _, next := range []string{",", "]", ",0", "]}"} { // as in an array
		q := &parser{text: []byte(text + next)}
		if v, e := q.number(); (e == nil) != (err == nil) || e == nil && (math.Float32bits(v) != math.Float32bits(got) || q.at != p.at) {
			t.Errorf("%q before %q: %v up to byte %d, %v; alone: %v up to byte %d, %v", text, next, v, q.at, e, got, p.at, err)
		}
	}
	if err == nil {
		err = p.end()
	}
	want, wantErr := strconv.ParseFloat(strings.Trim(text, " \t\r\n"), 32)
	if !json.Valid([]byte(text)) {
		wantErr = strconv.ErrSyntax
	}
	if wantErr == nil && err != nil && strings.Contains(err.Error(), "characters") {
		return // longer than any number needs to be
	}
	if (err == nil) != (wantErr == nil) {
		t.Errorf("%q: %v, want %v", text, err, wantErr)
	} else if err == nil && math.Float32bits(got) != math.Float32bits(float32(want)) {
		t.Errorf("%q = %v, want %v", text, got, want)
	}
}

func TestNumbers(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 20_000 {
		f := rng.Float32()
		checkNumber(t, strconv.FormatFloat(float64(f), 'g', -1, 32))
		checkNumber(t, strconv.FormatFloat(rng.Float64(), 'f', rng.IntN(22), 64))
		checkNumber(t, fmt.Sprintf("%de%d", rng.Uint64()>>rng.IntN(64), rng.IntN(60)-50))
		// Halfway between two float32, and a hair beside it.
		halfway := (float64(f) + float64(math.Nextafter32(f, 2))) / 2
		checkNumber(t, strconv.FormatFloat(halfway, 'f', -1, 64))
		checkNumber(t, strconv.FormatFloat(halfway, 'f', 18, 64))
	}
	for _, s := range []string{"0", "-0", "0.0", "00", "-", "+1", ".5", "1.", "1e5", "1E+5", "1e-400", "1e400", "3.4028235e38", "3.5e38", "0x1p3", "1_0", "inf", "nan", "", "9007199254740993", "18446744073709551616", "1e0000000000000000001"} {
		checkNumber(t, s)
	}
}

func TestAnswer(t *testing.T) {
	a := &Answer{Model: "m", Version: "1", ID: `"<é`, Parameters: json.RawMessage(`{"a":1}`), Probabilities: []float32{0.25, 0.75, 1, 1e-20}, Labels: []int64{1, 0}, Classes: 2}
	both := []Output{{Name: Probabilities}, {Name: Label}}
	body, headerLength := a.Append([]byte("kept"), both)
	if string(body[:4]) != "kept" || headerLength != -1 {
		t.Fatalf("%s, %d", body, headerLength)
	}
	got, err := ParseAnswer(body[4:])
	if err != nil || fmt.Sprint(got) != fmt.Sprint(a) {
		t.Errorf("%v, %v", got, err)
	}
	body, headerLength = a.Append([]byte("kept"), []Output{{Name: Label, Binary: true}, {Name: Probabilities, Binary: true}})
	if !json.Valid(body[4:][:headerLength]) || len(body) != 4+headerLength+16+16 {
		t.Errorf("%q, %d", body, headerLength)
	}
	if string(body[4+headerLength:][:16]) != "\x01\x00\x00\x00\x00\x00\x00\x00"+strings.Repeat("\x00", 8) {
		t.Errorf("%q", body[4+headerLength:])
	}
	// Of a server of the ONNX file, such as one that KServe runs.
	got, err = ParseAnswer([]byte(`{"model_name":"m","outputs":[{"name":"logits","datatype":"FP32","shape":[2,3],"data":[-1,5,5,-3,-2,-4]}]}`))
	if err != nil || fmt.Sprint(got.Labels) != "[1 1]" || got.Probabilities != nil {
		t.Errorf("%+v, %v", got, err)
	}
	for _, hostile := range []string{``, `{"outputs":[{"name":"logits","shape":[1,0],"data":[]}]}`, `{"outputs":[{"name":"logits","shape":[1],"data":[1]}]}`, `{"outputs":[{"name":"logits","shape":[2,2],"data":[1,2]}]}`, `{"outputs":[{"name":"label","shape":[2],"data":[1]}]}`, `{"outputs":[{"name":"probabilities","shape":[1,0],"data":[]}]}`, `{"outputs":[{"name":"probabilities","shape":[9223372036854775807,2],"data":[1,0]}]}`} {
		if _, err := ParseAnswer([]byte(hostile)); err == nil {
			t.Errorf("%s: accepted", hostile)
		}
	}
}

// FuzzRequest: no panic; what is accepted is what encoding/json reads, with
// pixels from 0 to 1.
func FuzzRequest(f *testing.F) {
	for body := range refusals {
		f.Add([]byte(body), -1)
	}
	for tensor := range tensors {
		f.Add([]byte(`{"inputs":[{`+tensor+`}]}`), -1)
	}
	for _, binary := range []bool{false, true} {
		for _, shape := range []nn.Shape{gray, color} {
			body, headerLength := AppendRequest(nil, make([]float32, 2*shape.Size()), 2, shape, binary)
			f.Add(body, headerLength)
		}
	}
	f.Fuzz(func(t *testing.T, body []byte, headerLength int) {
		for _, shape := range []nn.Shape{gray, color} {
			var r Request
			if headerLength < -1 || r.Parse(body, headerLength, 4*shape.Size()) != nil {
				continue
			}
			header := body
			if headerLength >= 0 {
				header = body[:headerLength]
			}
			if !json.Valid(header) {
				t.Fatalf("accepted what is not JSON: %q", header)
			}
			if len(r.Parameters) > 0 && !json.Valid(r.Parameters) {
				t.Fatalf("parameters %q are not JSON", r.Parameters)
			}
			x, n, err := r.Images(nil, shape, 4)
			if err != nil {
				continue
			}
			if n < 1 || n > 4 || len(x) != n*shape.Size() {
				t.Fatalf("%d values for %d images", len(x), n)
			}
			for _, v := range x {
				if !(v >= 0 && v <= 1) {
					t.Fatalf("pixel %v", v)
				}
			}
		}
	})
}

func FuzzNumber(f *testing.F) {
	for _, s := range []string{"0", "0.1", "-1e-5", "16777217", "1e999", "0.30000000000000004"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if len(s) > 0 && (s[0] == '-' || s[0] >= '0' && s[0] <= '9') {
			checkNumber(t, s)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	shape := nn.Shape{Height: 28, Width: 28, Channels: 1}
	x := make([]float32, shape.Size())
	for i := range x { // a digit is a fifth of its image
		if i%28 < 6 {
			x[i] = float32(rand.IntN(256)) / 255
		}
	}
	for _, binary := range []bool{false, true} {
		b.Run(fmt.Sprintf("binary=%v", binary), func(b *testing.B) {
			body, headerLength := AppendRequest(nil, x, 1, shape, binary)
			var r Request
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if err := r.Parse(body, headerLength, len(x)); err != nil {
					b.Fatal(err)
				}
				if _, _, err := r.Images(x, shape, 1); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
