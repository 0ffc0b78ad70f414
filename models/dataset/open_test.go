package dataset

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/unknown"
)

// sample is a small data set with all three parts.
func sample(floats bool) *Splits {
	return &Splits{Name: "sample", Train: gradient("train", 0, 12, floats), Validation: gradient("validation", 12, 4, floats), Test: gradient("test", 16, 6, floats)}
}

func mustWrite(t *testing.T, s *Splits) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	if err := Write(dir, s); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestFolderRoundTrip(t *testing.T) {
	for _, floats := range []bool{false, true} {
		s := sample(floats)
		dir := mustWrite(t, s)
		got, err := Open(t.Context(), dir+"#"+s.Digest())
		if err != nil {
			t.Fatal(err)
		}
		for _, pair := range [][2]*Set{{s.Train, got.Train}, {s.Validation, got.Validation}, {s.Test, got.Test}} {
			pair[1].Name = pair[0].Name
			if !reflect.DeepEqual(pair[0], pair[1]) {
				t.Errorf("wrote %v, read %v", pair[0], pair[1])
			}
		}
		again := mustWrite(t, s)
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 7 {
			t.Fatalf("%d files (%v)", len(entries), err)
		}
		for _, e := range entries {
			a, errA := os.ReadFile(filepath.Join(dir, e.Name()))
			b, errB := os.ReadFile(filepath.Join(again, e.Name()))
			if errA != nil || errB != nil || string(a) != string(b) {
				t.Errorf("%s differs between two writes (%v, %v)", e.Name(), errA, errB)
			}
		}
	}
}

// A folder of adversarial examples has a test part only.
func TestTestOnlyFolder(t *testing.T) {
	s := &Splits{Name: "adversarial", Test: gradient("test", 0, 5, true)}
	got, err := Open(t.Context(), mustWrite(t, s))
	if err != nil {
		t.Fatal(err)
	}
	if got.Train.Len() != 0 || got.Validation.Len() != 0 || got.Test.Len() != 5 || got.Digest() != s.Digest() {
		t.Errorf("read %+v", got)
	}
}

func TestValidationIsCutOffTheTrainingSet(t *testing.T) {
	all := gradient("train", 0, 24, false)
	s := &Splits{Name: "s", Train: all, Test: gradient("test", 24, 3, false)}
	dir := mustWrite(t, s)
	for _, c := range []struct {
		opts  []Option
		train int
	}{{nil, 22}, {[]Option{Validation(0)}, 24}, {[]Option{Validation(23)}, 1}} {
		got, err := Open(t.Context(), dir, append(c.opts, Pin(s.Digest()))...)
		if err != nil {
			t.Fatal(err)
		}
		if got.Train.Len() != c.train || got.Validation.Len() != 24-c.train {
			t.Errorf("%d training, %d validation examples", got.Train.Len(), got.Validation.Len())
		}
		if n := got.Validation.Len(); n > 0 && got.Validation.Digest() != all.Slice(24-n, 24).Digest() {
			t.Error("validation is not the end of the training set")
		}
	}
	for _, n := range []int{24, 1000} {
		if _, err := Open(t.Context(), dir, Validation(n)); err == nil {
			t.Errorf("a validation part of %d of 24 was accepted", n)
		}
	}
	if _, err := Open(t.Context(), mustWrite(t, sample(false)), Validation(5)); err == nil {
		t.Error("a validation part of 5 was accepted where the folder has its own of 4")
	}
}

func TestUnknownName(t *testing.T) {
	_, err := Open(t.Context(), "mnits")
	var e *unknown.Error
	if !errors.As(err, &e) || !strings.Contains(err.Error(), `did you mean "mnist"?`) {
		t.Errorf("error %v", err)
	}
	for ref, want := range map[string]string{
		"./nowhere":        "no such file",
		"open_test.go":     "not a folder",
		"mnist#sha256:12":  "64 hexadecimal digits",
		"http:///path#x":   "64 hexadecimal digits",
		"https:///nowhere": "not a URL",
		"mnist#sha256:" + strings.Repeat("0", 64): "its digest is sha256:d560",
	} {
		if _, err := Open(t.Context(), ref); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, expected %q", ref, err, want)
		}
	}
	if _, err := Open(t.Context(), "mnist#sha256:"+strings.Repeat("0", 64), Pin("sha256:"+strings.Repeat("1", 64))); err == nil || !strings.Contains(err.Error(), "two digests") {
		t.Errorf("two pins: error %v", err)
	}
}

func TestCase20HostileFolder(t *testing.T) {
	rewrite := func(t *testing.T, dir, name string, a *IDX) {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := WriteIDX(f, a); err != nil {
			t.Fatal(err)
		}
	}
	text := func(t *testing.T, dir, name, content string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	const images, labels = "test-images-idx4-ubyte", "test-labels-idx1-ubyte"
	for name, c := range map[string]struct {
		change func(t *testing.T, dir string)
		want   string
	}{
		"more labels than images": {func(t *testing.T, dir string) {
			rewrite(t, dir, "t10k-labels-idx1-ubyte", &IDX{Dims: []int{7}, Bytes: make([]byte, 7)})
		}, "6 images in t10k-images-idx4-ubyte, but 7 labels"},
		"label beyond the classes": {func(t *testing.T, dir string) {
			rewrite(t, dir, "t10k-labels-idx1-ubyte", &IDX{Dims: []int{6}, Bytes: []byte{0, 1, 2, 3, 0, 0}})
		}, "label 3 of example 3: the classes are 0 to 2"},
		"labels of two dimensions": {func(t *testing.T, dir string) {
			rewrite(t, dir, "t10k-labels-idx1-ubyte", &IDX{Dims: []int{6, 1}, Bytes: make([]byte, 6)})
		}, "one dimension"},
		"float labels": {func(t *testing.T, dir string) {
			rewrite(t, dir, "t10k-labels-idx1-ubyte", &IDX{Dims: []int{6}, Floats: make([]float32, 6)})
		}, "ubyte"},
		"flat images": {func(t *testing.T, dir string) {
			rewrite(t, dir, "t10k-images-idx4-ubyte", &IDX{Dims: []int{6, 12}, Bytes: make([]byte, 72)})
		}, "dimensions [6 12]"},
		"other shape than the training images": {func(t *testing.T, dir string) {
			rewrite(t, dir, "t10k-images-idx4-ubyte", &IDX{Dims: []int{6, 2, 2}, Bytes: make([]byte, 24)})
		}, "train: images of 2x3x2, but those of"},
		"other element type than the training images": {func(t *testing.T, dir string) {
			rewrite(t, dir, "validation-images-idx4-ubyte", &IDX{Dims: []int{4, 2, 3, 2}, Floats: make([]float32, 48)})
		}, "both be bytes or both be floats"},
		"enormous images": {func(t *testing.T, dir string) {
			rewrite(t, dir, "t10k-images-idx4-ubyte", &IDX{Dims: []int{6, 2, 2000}, Bytes: make([]byte, 24000)})
		}, "height and width must be"},
		"truncated": {func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "t10k-images-idx4-ubyte"), 40); err != nil {
				t.Fatal(err)
			}
		}, "t10k-images-idx4-ubyte: idx: truncated"},
		"two files of one part": {func(t *testing.T, dir string) {
			rewrite(t, dir, images, &IDX{Dims: []int{1}, Bytes: []byte{1}})
		}, "both t10k-images-idx4-ubyte and test-images-idx4-ubyte: keep one"},
		"images without labels": {func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "t10k-labels-idx1-ubyte"))
		}, "t10k-images-idx4-ubyte has no labels beside it"},
		"labels without images": {func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "t10k-images-idx4-ubyte"))
		}, "t10k-labels-idx1-ubyte has no images beside it"},
		"no test part": {func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "t10k-images-idx4-ubyte"))
			os.Remove(filepath.Join(dir, "t10k-labels-idx1-ubyte"))
		}, "no test images: expected IDX files (t10k-images*"},
		"link out of the folder": {func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "t10k-labels-idx1-ubyte"))
			outside := filepath.Join(t.TempDir(), "secret")
			text(t, filepath.Dir(outside), "secret", "\x00\x00\x08\x01\x00\x00\x00\x06abcdef")
			if err := os.Symlink(outside, filepath.Join(dir, labels)); err != nil {
				t.Skip(err)
			}
		}, "escapes"},
		"a folder for a file": {func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "t10k-labels-idx1-ubyte"))
			os.Mkdir(filepath.Join(dir, labels), 0o777)
		}, "not a regular file"},
		"one class":             {func(t *testing.T, dir string) { text(t, dir, classesFile, "cat\n") }, "1 classes"},
		"class twice":           {func(t *testing.T, dir string) { text(t, dir, classesFile, "cat\ndog\ncat\n") }, "twice"},
		"empty class":           {func(t *testing.T, dir string) { text(t, dir, classesFile, "cat\n\ndog\n") }, "line 2"},
		"escape code in class":  {func(t *testing.T, dir string) { text(t, dir, classesFile, "cat\n\x1b[2J\n") }, "line 2"},
		"too many classes":      {func(t *testing.T, dir string) { text(t, dir, classesFile, numbered(257)) }, "257 classes"},
		"enormous classes file": {func(t *testing.T, dir string) { text(t, dir, classesFile, strings.Repeat("x", 1<<20)) }, "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := mustWrite(t, sample(false))
			c.change(t, dir)
			if _, err := Open(t.Context(), dir); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, expected %q", err, c.want)
			}
		})
	}
}

func numbered(n int) string {
	var s strings.Builder
	for i := range n {
		fmt.Fprintln(&s, "class", i)
	}
	return s.String()
}

func TestCase20FloatPixels(t *testing.T) {
	dir := mustWrite(t, sample(true))
	file := filepath.Join(dir, "t10k-images-idx4-float")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, bits := range map[string]string{"NaN": "\x7f\xc0\x00\x00", "+Inf": "\x7f\x80\x00\x00", "-1": "\xbf\x80\x00\x00", "1.0000001": "\x3f\x80\x00\x01"} {
		copy(data[len(data)-4:], bits)
		if err := os.WriteFile(file, data, 0o666); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "pixel 11 of example 5 is "+name) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestCase16NoTruncatedFileIsVisible(t *testing.T) {
	dir := t.TempDir()
	full := errors.New("no space left on device")
	if _, err := stageFile(filepath.Join(dir, "t10k-images"), func(w io.Writer) error {
		io.WriteString(w, "half of it")
		return full
	}); !errors.Is(err, full) {
		t.Errorf("error %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("%v was left behind", left)
	}

	// A write that fails half-way leaves what was there before as it was.
	dir = mustWrite(t, sample(false))
	before, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	bad := sample(false)
	bad.Train.Labels[0]++
	bad.Test.Labels[5] = 9
	if err := Write(dir, bad); err == nil {
		t.Fatal("a label beyond the classes was written")
	}
	after, err := Open(t.Context(), dir)
	if err != nil || after.Digest() != before.Digest() {
		t.Errorf("the data set that was there has changed (%v)", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".temper-*")); len(left) > 0 {
		t.Errorf("%v was left behind", left)
	}

	// An output that cannot be written is a clear error.
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := Write(filepath.Join(file, "data"), sample(false)); err == nil || !strings.Contains(err.Error(), "write dataset sample") {
		t.Errorf("error %v", err)
	}
}

func TestOpenWithoutClassNames(t *testing.T) {
	dir := mustWrite(t, sample(false))
	if err := os.Remove(filepath.Join(dir, classesFile)); err != nil {
		t.Fatal(err)
	}
	s, err := Open(context.Background(), dir)
	if err != nil || !reflect.DeepEqual(s.Classes(), []string{"0", "1", "2"}) {
		t.Errorf("classes %v (%v)", s.Classes(), err)
	}
}

func FuzzClasses(f *testing.F) {
	f.Add("cat\ndog\n")
	f.Add("cat\r\ndog")
	f.Add("\n\x00\xff")
	f.Fuzz(func(t *testing.T, text string) {
		classes, err := parseClasses(classesFile, text)
		if err != nil {
			return
		}
		again, err := parseClasses(classesFile, strings.Join(classes, "\n")+"\n")
		if err != nil || !reflect.DeepEqual(classes, again) {
			t.Errorf("%q gave %q, which gave %q (%v)", text, classes, again, err)
		}
	})
}
