package detect

import (
	"bytes"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestEncodeDecode(t *testing.T) {
	d, served := calibrated(t)
	guard, calibration, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d and %d bytes", len(guard), len(calibration))
	back, err := Decode(guard, calibration)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back.Calibration, d.Calibration) {
		t.Error("another calibration came back")
	}
	set := makeImages(10, 3)
	if !reflect.DeepEqual(score(t, back, served, set), score(t, d, served, set)) {
		t.Error("other scores")
	}
	again, calibration2, err := back.Encode()
	if err != nil || !bytes.Equal(again, guard) || !bytes.Equal(calibration2, calibration) {
		t.Error("encoded again, the bytes differ", err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	d, served := calibrated(t)
	guard, calibration, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	other := &Detector{Guard: served, Calibration: d.Calibration}
	if _, _, err := other.Encode(); err == nil {
		t.Error("encoded with another guard")
	}
	edit := func(old, new string) []byte {
		out := strings.Replace(string(calibration), old, new, 1)
		if out == string(calibration) {
			t.Fatalf("%q is not in %.300s", old, calibration)
		}
		return []byte(out)
	}
	for name, c := range map[string][]byte{
		"empty":           {},
		"not JSON":        []byte("guard"),
		"unknown field":   edit(`"model"`, `"temper":1,"model"`),
		"more after it":   append(bytes.Clone(calibration), "{}"...),
		"too large":       append(bytes.Clone(calibration), bytes.Repeat([]byte(" "), maxCalibration)...),
		"another signal":  edit("squeeze-1-bit", "squeeze-2-bit"),
		"NaN":             edit(`"threshold":`, `"threshold":NaN`),
		"huge threshold":  edit(`"threshold":0`, `"threshold":1`),
		"low bound":       edit(`"bound":0.0`, `"bound":0.00`),
		"no trials":       edit(`"trials":2500`, `"trials":0`),
		"another guard":   edit(d.Calibration.Guard, d.Calibration.Model),
		"tree in circles": edit(`"c":[1,`, `"c":[0,0,0,0,0,0,0,0],"s":99},{"c":[1,`),
		"other forest":    edit(`"edges":[[`, `"edges":[[-1e9,`),
		"no precision":    edit(`"precision":[[`, `"precision":[[0],[`),
		"no signals":      []byte(`{"threshold": 1, "bound": 0.02, "trials": 2500}`),
	} {
		if _, err := Decode(guard, c); err == nil {
			t.Errorf("%s: decoded", name)
		}
	}
	if _, err := Decode(guard[:len(guard)-1], calibration); err == nil {
		t.Error("truncated guard: decoded")
	}
}

func FuzzDecode(f *testing.F) {
	d, served := calibrated(f)
	image := makeImages(1, 9).pixels
	for i := range d.Calibration.Signals { // a small file, to fuzz faster
		d.Calibration.Signals[i].Quantiles = []float64{0, .1, .2, .3, .4, .5, .6, .7, .8, 2}
	}
	d.Calibration.Forest.Trees = [][]Node{{{Signal: 0, Children: append([]int{0, 1, 2}, slices.Repeat([]int{1}, binCount-3)...), Hostile: .5}, {Hostile: .1}, {Hostile: .99}}}
	guard, calibration, err := d.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(calibration)
	f.Add([]byte(`{"signals":[{"name":"guard-disagreement","quantiles":[0,1e999]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if d, err := Decode(guard, data); err == nil {
			if _, err := d.Alarm(DefaultAlpha); err != nil {
				t.Errorf("decoded, but gives no alarm: %v", err)
			}
			if _, err := d.DriftAlarm(DefaultAlpha); err != nil {
				t.Errorf("decoded, but gives no alarm on drift: %v", err)
			}
			d.Calibration.Model = Digest(served)
			scorer, err := d.Scorer(served)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := scorer.Score(image, 1); err != nil {
				t.Error(err)
			}
		}
	})
}
