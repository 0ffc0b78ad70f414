package dataset

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"image"
	"image/color"
	"image/gif"
	"image/jpeg"
	"image/png"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// tile is an image of one value and its number in the first two pixels.
func tile(number int, value uint8, colour bool) image.Image {
	if !colour {
		img := image.NewGray(image.Rect(0, 0, 6, 4))
		for i := range img.Pix {
			img.Pix[i] = value
		}
		img.Pix[0], img.Pix[1] = uint8(number>>8), uint8(number)
		return img
	}
	img := image.NewRGBA(image.Rect(0, 0, 6, 4))
	for i := range 24 {
		img.SetRGBA(i%6, i/6, color.RGBA{value, 2 * value, 3 * value, 255})
	}
	img.SetRGBA(0, 0, color.RGBA{uint8(number >> 8), uint8(number), 0, 255})
	return img
}

func putImage(t testing.TB, file string, img image.Image) {
	t.Helper()
	var out bytes.Buffer
	var err error
	switch filepath.Ext(file) {
	case ".png":
		err = png.Encode(&out, img)
	case ".gif":
		err = gif.Encode(&out, img, nil)
	default:
		err = jpeg.Encode(&out, img, nil)
	}
	putFile(t, file, out.Bytes())
	if err != nil {
		t.Fatal(err)
	}
}

func putFile(t testing.TB, file string, data []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o777), os.WriteFile(file, data, 0o666)); err != nil {
		t.Fatal(err)
	}
}

// pets writes images of two classes: n of each, and half as many for the test.
func pets(t testing.TB, n int, colour bool) string {
	dir := t.TempDir()
	for i := range n {
		putImage(t, filepath.Join(dir, "train", "cat", fmt.Sprintf("%d.png", i)), tile(i, 10, colour))
		putImage(t, filepath.Join(dir, "train", "dog", fmt.Sprintf("%d.png", i)), tile(i, 60, colour))
		if i%2 == 0 {
			putImage(t, filepath.Join(dir, "test", "cat", fmt.Sprintf("%d.png", i)), tile(1000+i, 10, colour))
			putImage(t, filepath.Join(dir, "test", "dog", fmt.Sprintf("%d.png", i)), tile(1000+i, 60, colour))
		}
	}
	return dir
}

func TestImageFolder(t *testing.T) {
	for _, colour := range []bool{false, true} {
		dir := pets(t, 12, colour)
		s, err := Open(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		channels := 1
		if colour {
			channels = 3
		}
		if s.Train.Len() != 22 || s.Validation.Len() != 2 || s.Test.Len() != 12 || s.Test.Shape.Channels != channels || s.Test.Shape.Height != 4 || s.Test.Shape.Width != 6 {
			t.Fatalf("%d, %d and %d images of %v", s.Train.Len(), s.Validation.Len(), s.Test.Len(), s.Test.Shape)
		}
		if !reflect.DeepEqual(s.Classes(), []string{"cat", "dog"}) {
			t.Errorf("classes %v", s.Classes())
		}
		// Each image has the pixels and the class that it was written with, and
		// classes are mixed.
		changes := 0
		row := make([]float32, s.Test.Shape.Size())
		for i, label := range s.Test.Labels {
			s.Test.Read(row, i, i+1)
			want := []int{10, 60}[label]
			for c := range channels {
				if got := row[len(row)-channels+c]; got != float32(want*(c+1)&255)/255 {
					t.Errorf("image %d of class %d has %v in channel %d", i, label, got, c)
				}
			}
			if i > 0 && s.Test.Labels[i-1] != label {
				changes++
			}
		}
		if changes < 3 {
			t.Errorf("the classes are not mixed: %v", s.Test.Labels)
		}

		// Names of files are no part of the content.
		if err := os.Rename(filepath.Join(dir, "test/cat/0.png"), filepath.Join(dir, "test/cat/z.png")); err != nil {
			t.Fatal(err)
		}
		if again, err := Open(t.Context(), dir, Pin(s.Digest())); err != nil || again.Test.Digest() != s.Test.Digest() {
			t.Errorf("renamed: %v", err)
		}
		// What was read can be written as IDX, with the same digest.
		if again, err := Open(t.Context(), mustWrite(t, s)); err != nil || again.Digest() != s.Digest() {
			t.Errorf("as IDX: %v", err)
		}
	}
}

func TestMixedImagesAreColour(t *testing.T) {
	dir := pets(t, 4, false)
	putImage(t, filepath.Join(dir, "train/dog/red.JPG"), tile(99, 60, true))
	putFile(t, filepath.Join(dir, "train/dog/.DS_Store"), []byte("not an image"))
	palette := image.NewPaletted(image.Rect(0, 0, 6, 4), color.Palette{color.Gray{0}, color.Gray{200}})
	putImage(t, filepath.Join(dir, "train/dog/palette.png"), palette)
	deep := image.NewGray16(image.Rect(0, 0, 6, 4))
	deep.SetGray16(5, 3, color.Gray16{0xabcd})
	putImage(t, filepath.Join(dir, "train/cat/deep.png"), deep)
	s, err := Open(t.Context(), dir, Validation(0))
	if err != nil {
		t.Fatal(err)
	}
	if s.Train.Shape.Channels != 3 || s.Train.Len() != 11 {
		t.Errorf("%d images of %v", s.Train.Len(), s.Train.Shape)
	}
	row, found := make([]float32, s.Train.Shape.Size()), false
	for i := range s.Train.Len() {
		s.Train.Read(row, i, i+1)
		last := row[len(row)-3:]
		found = found || last[0] == 0xab/255. && last[1] == last[0] && last[2] == last[0]
	}
	if !found {
		t.Error("the image of 16 bits is not there")
	}
	if err := os.Remove(filepath.Join(dir, "train/dog/red.JPG")); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(t.Context(), dir); err != nil || s.Train.Shape.Channels != 1 {
		t.Errorf("grey images only: %v (%v)", s, err)
	}
}

func TestClassesFileOrdersFolders(t *testing.T) {
	dir := pets(t, 4, false)
	putFile(t, filepath.Join(dir, classesFile), []byte("dog\ncat\nbird\n"))
	s, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, label := range s.Test.Labels {
		if value := s.Test.Bytes[(i+1)*24-1]; label > 1 || value != []uint8{60, 10}[label] {
			t.Errorf("value %d in class %d", value, label)
		}
	}
	putFile(t, filepath.Join(dir, classesFile), []byte("dog\nbird\n"))
	if _, err := Open(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "folder cat: classes.txt names no such class") {
		t.Errorf("error %v", err)
	}
}

// One folder is divided by its images' content: the same images give the same
// parts whatever they are named, and copies stay together.
func TestFolderIsDividedByContent(t *testing.T) {
	build := func(prefix string, extra int) *Splits {
		dir := t.TempDir()
		for i := range 120 + extra {
			for c, class := range []string{"cat", "dog"} {
				putImage(t, filepath.Join(dir, class, fmt.Sprintf("%s%d.png", prefix, i)), tile(i, uint8(10+50*c), false))
			}
		}
		putImage(t, filepath.Join(dir, "cat", "copy.png"), tile(7, 10, false))
		s, err := Open(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	a, b := build("a", 0), build("zz", 0)
	if a.Digest() != b.Digest() || a.Train.Digest() != b.Train.Digest() {
		t.Error("the parts depend on the names of the files")
	}
	if n := a.Train.Len() + a.Validation.Len() + a.Test.Len(); n != 241 || a.Test.Len() < 241/12 || a.Test.Len() > 241/4 {
		t.Errorf("%d images, %d for the test", n, a.Test.Len())
	}
	if n := Overlap(a.Train, a.Test) + Overlap(a.Validation, a.Test); n > 0 {
		t.Errorf("%d images on both sides", n)
	}
	// With more images, those that were for the test still are.
	if more := build("a", 30); Overlap(more.Test, a.Test) != a.Test.Len() {
		t.Error("images changed sides when others came")
	}
}

func TestCase50ImagesInBothParts(t *testing.T) {
	dir := pets(t, 12, false)
	putImage(t, filepath.Join(dir, "test/cat/leak.jpeg"), tile(3, 10, false)) // JPEG changes it: no copy
	if _, err := Open(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	putImage(t, filepath.Join(dir, "test/cat/leak.png"), tile(3, 10, false))
	if _, err := Open(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "must be disjoint") {
		t.Errorf("error %v", err)
	}
}

// bomb is a PNG whose header claims a size; nothing comes after it.
func bomb(width, height uint32) []byte {
	chunk := append([]byte("IHDR"), make([]byte, 13)...)
	binary.BigEndian.PutUint32(chunk[4:], width)
	binary.BigEndian.PutUint32(chunk[8:], height)
	chunk[12], chunk[13] = 8, 2 // 8 bits, RGB
	out := []byte("\x89PNG\r\n\x1a\n\x00\x00\x00\x0d")
	out = append(out, chunk...)
	return binary.BigEndian.AppendUint32(out, crc32.ChecksumIEEE(chunk))
}

func TestCase20HostileImages(t *testing.T) {
	whole := func(t *testing.T, dir string) []byte {
		data, err := os.ReadFile(filepath.Join(dir, "train/cat/0.png"))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	const file = "train/cat/1.png"
	for name, c := range map[string]struct {
		change func(t *testing.T, dir string)
		want   string
	}{
		"a bomb of 100 million pixels": {func(t *testing.T, dir string) { putFile(t, filepath.Join(dir, file), bomb(10_000, 10_000)) }, file + ": images of 10000x10000"},
		"a bomb of 2^62 pixels":        {func(t *testing.T, dir string) { putFile(t, filepath.Join(dir, file), bomb(1<<31-1, 1<<31-1)) }, file},
		"a header only":                {func(t *testing.T, dir string) { putFile(t, filepath.Join(dir, file), bomb(6, 4)) }, file + ": damaged"},
		"cut": {func(t *testing.T, dir string) {
			d := whole(t, dir)
			putFile(t, filepath.Join(dir, file), d[:len(d)-20])
		}, file + ": damaged"},
		"empty":      {func(t *testing.T, dir string) { putFile(t, filepath.Join(dir, file), nil) }, file + ": not a PNG or JPEG image"},
		"a web page": {func(t *testing.T, dir string) { putFile(t, filepath.Join(dir, file), []byte("<html>")) }, file + ": not a PNG or JPEG image"},
		"a GIF by another name": {func(t *testing.T, dir string) {
			putImage(t, filepath.Join(dir, "x.gif"), tile(1, 1, false))
			if err := errors.Join(os.Remove(filepath.Join(dir, file)), os.Rename(filepath.Join(dir, "x.gif"), filepath.Join(dir, file))); err != nil {
				t.Fatal(err)
			}
		}, file + ": "},
		"another file": {func(t *testing.T, dir string) { putFile(t, filepath.Join(dir, "train/cat/notes.txt"), nil) }, "train/cat/notes.txt: neither a PNG nor a JPEG"},
		"a folder":     {func(t *testing.T, dir string) { putFile(t, filepath.Join(dir, "train/cat/more.png/x"), nil) }, "train/cat/more.png: not a regular file"},
		"another size": {func(t *testing.T, dir string) {
			putImage(t, filepath.Join(dir, "train/dog/wide.png"), image.NewGray(image.Rect(0, 0, 7, 4)))
		}, "train/dog/wide.png: 4 pixels high and 7 wide, but the images before it are 4 and 6: scale all to one size"},
		"transparent": {func(t *testing.T, dir string) {
			img := image.NewNRGBA(image.Rect(0, 0, 6, 4))
			img.SetNRGBA(1, 1, color.NRGBA{255, 0, 0, 9})
			putImage(t, filepath.Join(dir, file), img)
		}, file + ": it is transparent"},
		"too large a file": {func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, file), maxImageFile+1); err != nil {
				t.Fatal(err)
			}
		}, file + ": 16777217 bytes"},
		"a link out of the folder": {func(t *testing.T, dir string) {
			outside := filepath.Join(t.TempDir(), "secret.png")
			putImage(t, outside, tile(1, 1, false))
			if err := errors.Join(os.Remove(filepath.Join(dir, file)), os.Symlink(outside, filepath.Join(dir, file))); err != nil {
				t.Fatal(err)
			}
		}, file},
		"one class": {func(t *testing.T, dir string) {
			if err := errors.Join(os.RemoveAll(filepath.Join(dir, "train/dog")), os.RemoveAll(filepath.Join(dir, "test/dog"))); err != nil {
				t.Fatal(err)
			}
		}, "1 classes: must be 2"},
		"no test images": {func(t *testing.T, dir string) {
			if err := os.RemoveAll(filepath.Join(dir, "test")); err != nil {
				t.Fatal(err)
			}
		}, "no test images: expected"},
		"a class beside the parts": {func(t *testing.T, dir string) { putImage(t, filepath.Join(dir, "bird/1.png"), tile(1, 1, false)) }, "folder bird beside test, train"},
		"IDX files too":            {func(t *testing.T, dir string) { putFile(t, filepath.Join(dir, "test-images-idx3-ubyte"), nil) }, "no magic number"},
		"a class name that a terminal obeys": {func(t *testing.T, dir string) {
			putImage(t, filepath.Join(dir, "train/\x1b[2J/1.png"), tile(1, 1, false))
		}, "printable"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := pets(t, 4, false)
			c.change(t, dir)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := Open(t.Context(), dir)
			runtime.ReadMemStats(&after)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, expected %q", err, c.want)
			}
			if used := after.TotalAlloc - before.TotalAlloc; used > 8<<20 {
				t.Errorf("%d bytes allocated", used)
			}
		})
	}
	if _, err := Open(t.Context(), filepath.Join(pets(t, 4, false), "train")); err == nil || !strings.Contains(err.Error(), "8 images: too few to be divided") {
		t.Errorf("a handful: error %v", err)
	}
}

// Whatever a file holds, decoding it ends, and allocates no more than an image
// of the largest size does.
func FuzzImage(f *testing.F) {
	for _, colour := range []bool{false, true} {
		for _, ext := range []string{".png", ".jpg", ".gif"} {
			file := filepath.Join(f.TempDir(), "x"+ext)
			putImage(f, file, tile(7, 50, colour))
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Add(bomb(10_000, 10_000))
	f.Add(bomb(1024, 1024))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		putFile(t, filepath.Join(dir, "x.png"), data)
		config, err := readConfig(os.DirFS(dir), "x.png")
		if err != nil {
			return
		}
		shape := cifarShape
		shape.Height, shape.Width = config.Height, config.Width
		if err := checkShape(shape); err != nil {
			t.Fatalf("a size that is refused passed: %v", err)
		}
		row := bytes.Repeat([]byte{0xee}, shape.Size()+1)
		if decodeImage(os.DirFS(dir), "x.png", shape, row[:shape.Size()]) == nil && row[shape.Size()] != 0xee {
			t.Fatal("wrote beyond the image")
		}
	})
}

// cifar writes a small folder of CIFAR-10's form.
func cifar(t testing.TB) string {
	dir := t.TempDir()
	number := byte(0)
	for _, file := range []string{"data_batch_1.bin", "data_batch_2.bin", cifarTest} {
		var out []byte
		for range 12 {
			out = append(out, number%10)
			for plane := range byte(3) {
				out = append(out, bytes.Repeat([]byte{number + 100*plane}, 1024)...)
			}
			number++
		}
		putFile(t, filepath.Join(dir, file), out)
	}
	putFile(t, filepath.Join(dir, cifarMeta), []byte("airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"))
	return dir
}

func TestCIFAR(t *testing.T) {
	dir := cifar(t)
	s, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if s.Train.Len() != 22 || s.Validation.Len() != 2 || s.Test.Len() != 12 || s.Test.Shape != cifarShape || s.Classes()[9] != "truck" {
		t.Fatalf("read %d, %d, %d of %v, classes %v", s.Train.Len(), s.Validation.Len(), s.Test.Len(), s.Test.Shape, s.Classes())
	}
	for i := range s.Test.Len() {
		number := byte(24 + i)
		image := s.Test.Bytes[i*3072 : (i+1)*3072]
		want := bytes.Repeat([]byte{number, number + 100, number + 200}, 1024)
		if s.Test.Labels[i] != number%10 || !bytes.Equal(image, want) {
			t.Errorf("image %d: label %d, pixels %v", i, s.Test.Labels[i], image[:6])
		}
	}
	if again, err := Open(t.Context(), mustWrite(t, s)); err != nil || again.Digest() != s.Digest() {
		t.Errorf("as IDX: %v", err)
	}
}

func TestCase20HostileCIFAR(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		data []byte
		want string
	}{
		"cut":                  {cifarTest, make([]byte, 3072), "test_batch.bin: 3072 bytes: CIFAR-10's binary form has 3073 for each image"},
		"empty":                {"data_batch_2.bin", nil, "data_batch_2.bin: 0 bytes"},
		"trailing":             {"data_batch_1.bin", make([]byte, 3074), "data_batch_1.bin: 3074 bytes"},
		"label":                {cifarTest, append([]byte{10}, make([]byte, 3072)...), "image 0 has label 10: CIFAR-10 has 0 to 9"},
		"images in both parts": {cifarTest, slices.Concat([]byte{0}, make([]byte, 1024), bytes.Repeat([]byte{100}, 1024), bytes.Repeat([]byte{200}, 1024)), "must be disjoint"},
		"IDX files too":        {"t10k-labels-idx1-ubyte", nil, "both CIFAR-10's files and IDX files: keep one"},
		"names":                {cifarMeta, []byte("a\nb\n"), "2 classes: CIFAR-10 has 10"},
	} {
		dir := cifar(t)
		putFile(t, filepath.Join(dir, c.file), c.data)
		if _, err := Open(t.Context(), dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, expected %q", name, err, c.want)
		}
	}
	dir := cifar(t)
	if err := os.Truncate(filepath.Join(dir, cifarTest), 3073*400_000); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "at most 1073741824") {
		t.Errorf("a file of holes: error %v", err)
	}
	for _, absent := range []string{cifarMeta, cifarTest} {
		dir := cifar(t)
		if err := os.Remove(filepath.Join(dir, absent)); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), dir); err == nil || !strings.Contains(err.Error(), absent) {
			t.Errorf("without %s: error %v", absent, err)
		}
	}
}

func FuzzCIFAR(f *testing.F) {
	f.Add(append([]byte{3}, bytes.Repeat([]byte{7}, 3072)...))
	f.Add(make([]byte, 2*3073))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		putFile(t, filepath.Join(dir, cifarTest), data)
		s, err := readBatches("x", os.DirFS(dir), cifarTest)
		if err != nil {
			return
		}
		if s.Len()*3073 != len(data) || len(s.Bytes) != s.Len()*3072 || slices.Max(s.Labels) > 9 {
			t.Fatalf("%d images, %d bytes of %d", s.Len(), len(s.Bytes), len(data))
		}
	})
}
