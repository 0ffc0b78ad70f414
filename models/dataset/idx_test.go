package dataset

import (
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
)

// The files of testdata/hostile are refused, with all the words in the text
// file beside each, and before memory for their claims is allocated.
func TestCase20HostileIDX(t *testing.T) {
	files, err := filepath.Glob("testdata/hostile/*.idx")
	if err != nil || len(files) < 25 {
		t.Fatalf("%d hostile files (%v)", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".idx"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			words, err := os.ReadFile(strings.TrimSuffix(file, ".idx") + ".txt")
			if err != nil {
				t.Fatal(err)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err = ParseIDX(data)
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Fatal("accepted")
			}
			for want := range strings.Lines(string(words)) {
				if want = strings.TrimSpace(want); !strings.Contains(err.Error(), want) {
					t.Errorf("error %q lacks %q", err, want)
				}
			}
			// A gzip reader's own buffers take 40 KiB.
			if used := after.TotalAlloc - before.TotalAlloc; used > 128<<10 {
				t.Errorf("%d bytes allocated for a file of %d", used, len(data))
			}
		})
	}
}

func TestIDXRoundTrip(t *testing.T) {
	for name, a := range map[string]*IDX{
		"ubyte": {Dims: []int{2, 1, 3}, Bytes: []byte{0, 1, 2, 253, 254, 255}},
		"float": {Dims: []int{1, 2, 1, 3}, Floats: []float32{0, 0.1, 0.2, 1, 0.5, 1e-30}},
	} {
		var plain, packed bytes.Buffer
		if err := WriteIDX(&plain, a); err != nil {
			t.Fatal(err)
		}
		z := gzip.NewWriter(&packed)
		z.Write(plain.Bytes())
		z.Close()
		for _, data := range [][]byte{plain.Bytes(), packed.Bytes()} {
			back, err := ParseIDX(data)
			if err != nil || !reflect.DeepEqual(a, back) {
				t.Errorf("%s: wrote %v, read %v (%v)", name, a, back, err)
			}
		}
	}
}

func TestWriteIDXRefusesWhatItCouldNotRead(t *testing.T) {
	for name, a := range map[string]*IDX{
		"no elements":   {Dims: []int{2}},
		"too few":       {Dims: []int{2}, Bytes: []byte{1}},
		"too many":      {Dims: []int{2}, Bytes: []byte{1, 2, 3}},
		"both":          {Dims: []int{1}, Bytes: []byte{1}, Floats: []float32{1}},
		"no dimensions": {Bytes: []byte{1}},
		"negative":      {Dims: []int{-1}, Bytes: []byte{1}},
		"five":          {Dims: []int{1, 1, 1, 1, 1}, Bytes: []byte{1}},
	} {
		var buf bytes.Buffer
		if err := WriteIDX(&buf, a); err == nil || buf.Len() > 0 {
			t.Errorf("%s: error %v, %d bytes written", name, err, buf.Len())
		}
	}
}

func FuzzIDX(f *testing.F) {
	files, err := filepath.Glob("testdata/hostile/*.idx")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("\x00\x00\x08\x01\x00\x00\x00\x02ab"))
	f.Add([]byte("\x00\x00\x0d\x01\x00\x00\x00\x01\x3f\x80\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := ParseIDX(data)
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := WriteIDX(&out, a); err != nil {
			t.Fatal(err)
		}
		if plain := len(data) > 1 && data[0] == 0; plain && !bytes.Equal(data, out.Bytes()) {
			t.Fatal("an accepted file was written otherwise than it was read")
		}
	})
}
