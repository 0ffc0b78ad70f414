package evaluate

import (
	"bytes"
	"encoding/json"
	"math"
	"strings"
	"testing"
)

func goodReport(t testing.TB) *Report {
	l := newLinear(t, 1)
	return run(t, l, testSet(t, l, 50), Options{Threat: threat, Attacks: []string{"fgsm"}, Examples: 1, CurvePoints: 4})
}

// A report that somebody changed, or that lacks a figure, is refused.
func TestDecodeRefuses(t *testing.T) {
	data, err := goodReport(t).Encode()
	if err != nil {
		t.Fatal(err)
	}
	set := func(key string, value any) []byte {
		var m map[string]any
		if err := json.Unmarshal(data, &m); err != nil {
			t.Fatal(err)
		}
		if value == nil {
			delete(m, key)
		} else {
			m[key] = value
		}
		out, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"unknown field":      {set("extra", 1), "unknown field"},
		"no samples":         {set("samples", nil), "samples"},
		"no confidence":      {set("confidence", nil), "confidence"},
		"no clean accuracy":  {set("clean_accuracy", nil), "clean_accuracy"},
		"no robust accuracy": {set("robust_accuracy", nil), "robust_accuracy"},
		"no lower bound":     {set("robust_accuracy_lower_bound", nil), "lower bound of robust_accuracy"},
		"no attacks":         {set("attacks", nil), "0 attacks"},
		"no threat":          {set("threat", nil), "norm"},
		"no classes":         {set("classes", nil), "0 classes"},
		"no confusion":       {set("confusion", nil), "confusion matrix"},
		"raised accuracy":    {set("robust_accuracy", 0.999), "robust_accuracy is 0.999"},
		"raised count":       {set("robust_correct", 50), "robust_accuracy"},
		"accuracy as text":   {set("robust_accuracy", "NaN"), "cannot unmarshal"},
		"number too large":   {bytes.Replace(data, []byte(`"seed":0`), []byte(`"seconds":1e999,"seed":0`), 1), "1e999"},
		"text after":         {append(bytes.Clone(data), '{'), "after its end"},
		"not JSON":           {[]byte("\x80\x04pickle"), "invalid character"},
		"empty":              {nil, "EOF"},
		"too large":          {bytes.Repeat([]byte(" "), MaxReportBytes+1), "at most"},
		"fewer pixels":       {set("shape", map[string]int{"height": 5, "width": 5, "channels": 1}), "pixels"},
		"impossible shape":   {set("shape", map[string]int{"height": 1 << 40, "width": 1 << 40, "channels": 1}), "shape"},
		"confidence 1":       {set("confidence", 1), "confidence"},
	} {
		if _, err := Decode(c.data); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
	}
}

func TestEncodeRefusesNaN(t *testing.T) {
	for name, spoil := range map[string]func(*Report){
		"accuracy":    func(r *Report) { r.RobustAccuracy = math.NaN() },
		"lower bound": func(r *Report) { r.CleanAccuracyLowerBound = math.NaN() },
		"attack":      func(r *Report) { r.Attacks[0].SuccessRate = math.NaN() },
		"metric":      func(r *Report) { r.Classes[0].Clean.F1 = math.NaN() },
		"curve":       func(r *Report) { r.Curve[0].Points[1].Accuracy = math.NaN() },
		"epsilon":     func(r *Report) { r.Curve[0].Points[1].Epsilon = math.Inf(1) },
		"threat":      func(r *Report) { r.Threat.Epsilon = math.NaN() },
		"seconds":     func(r *Report) { r.Seconds = math.NaN() },
		"confidence":  func(r *Report) { r.Confidence = math.NaN() },
	} {
		r := goodReport(t)
		spoil(r)
		if data, err := r.Encode(); err == nil {
			t.Errorf("%s: encoded as %s", name, data)
		}
	}
}

func FuzzDecode(f *testing.F) {
	data, err := goodReport(f).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"samples":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Decode(data)
		if err != nil {
			return
		}
		if _, err := r.Encode(); err != nil {
			t.Errorf("decoded, but does not encode: %v", err)
		}
	})
}
