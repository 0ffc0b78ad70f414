// Package dataset reads labelled images: the embedded MNIST, folders of IDX
// files, of PNG or JPEG images by class or of CIFAR-10's files, and IDX files
// behind a URL with a pinned digest. Digests are of the
// content (pixels, labels, shape, classes), not of the files that carry it.
package dataset

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"hash/maphash"
	"io"
	"math"
	"slices"

	"github.com/temper-ml/temper/models/nn"
)

// Set is a list of labelled images. Pixels are row-major [n, height, width,
// channels], held either as bytes (0..255, the pixel is b/255; as published
// data sets are) or as floats in [0,1] (as adversarial examples are): exactly
// one of Bytes and Floats is set, unless the set is empty.
type Set struct {
	Name    string
	Shape   nn.Shape
	Classes []string // names; labels index it
	Bytes   []byte
	Floats  []float32
	Labels  []uint8
}

// Len is the number of examples; 0 for nil.
func (s *Set) Len() int {
	if s == nil {
		return 0
	}
	return len(s.Labels)
}

// pixel is the value of each byte.
var pixel = func() (p [256]float32) {
	for b := range p {
		p[b] = float32(b) / 255
	}
	return p
}()

// Read copies the pixels of examples lo to hi (not included) into dst, which
// holds at least (hi-lo) * Shape.Size() values.
func (s *Set) Read(dst []float32, lo, hi int) {
	size := s.Shape.Size()
	dst = dst[:(hi-lo)*size]
	if s.Floats != nil {
		copy(dst, s.Floats[lo*size:hi*size])
		return
	}
	for i, b := range s.Bytes[lo*size : hi*size] {
		dst[i] = pixel[b]
	}
}

// Gather copies the pixels of the examples at index into dst, which holds at
// least len(index) * Shape.Size() values.
func (s *Set) Gather(dst []float32, index []int) {
	size := s.Shape.Size()
	for i, at := range index {
		s.Read(dst[i*size:], at, at+1)
	}
}

// Slice is the window of examples lo to hi (not included); nothing is copied.
func (s *Set) Slice(lo, hi int) *Set {
	size := s.Shape.Size()
	w := *s
	w.Labels = s.Labels[lo:hi:hi]
	if s.Bytes != nil {
		w.Bytes = s.Bytes[lo*size : hi*size : hi*size]
	}
	if s.Floats != nil {
		w.Floats = s.Floats[lo*size : hi*size : hi*size]
	}
	return &w
}

// Validate refuses a set whose parts do not fit together: what every parser
// here calls, and what a hand-made set can call.
func (s *Set) Validate() error {
	if err := checkShape(s.Shape); err != nil {
		return fmt.Errorf("dataset %s: %w", s.Name, err)
	}
	if n := len(s.Classes); n < 2 || n > maxClasses {
		return fmt.Errorf("dataset %s: %d classes: must be 2 to %d", s.Name, n, maxClasses)
	}
	if s.Bytes != nil && s.Floats != nil {
		return fmt.Errorf("dataset %s: pixels both as bytes and as floats", s.Name)
	}
	if values := len(s.Bytes) + len(s.Floats); values != len(s.Labels)*s.Shape.Size() {
		return fmt.Errorf("dataset %s: %d pixels of images of %v, but %d labels", s.Name, values, s.Shape, len(s.Labels))
	}
	for i, l := range s.Labels {
		if int(l) >= len(s.Classes) {
			return fmt.Errorf("dataset %s: label %d of example %d: the classes are 0 to %d", s.Name, l, i, len(s.Classes)-1)
		}
	}
	for i, v := range s.Floats {
		if !(v >= 0 && v <= 1) { // false for NaN too
			return fmt.Errorf("dataset %s: pixel %d of example %d is %v: pixels must be in [0,1]", s.Name, i%s.Shape.Size(), i/s.Shape.Size(), v)
		}
	}
	return nil
}

// maxClasses follows from labels of one byte.
const maxClasses = 256

func checkShape(s nn.Shape) error {
	if s.Height < 1 || s.Width < 1 || s.Channels < 1 || s.Height > nn.MaxSide || s.Width > nn.MaxSide || s.Channels > nn.MaxChannels {
		return fmt.Errorf("images of %v: height and width must be 1 to %d, channels 1 to %d", s, nn.MaxSide, nn.MaxChannels)
	}
	return nil
}

// Digest is "sha256:..." over the shape, the classes, the pixels and the
// labels. The name is not part of it; bytes and floats of equal value differ.
func (s *Set) Digest() string { return digest(s) }

// digest covers sets of one shape and kind as if they were one set.
func digest(sets ...*Set) string {
	h := sha256.New()
	n := 0
	var first *Set
	for _, s := range sets {
		if first == nil && s.Len() > 0 {
			first = s
		}
		n += s.Len()
	}
	if first != nil {
		head, err := json.Marshal(struct {
			Shape   nn.Shape `json:"shape"`
			Classes []string `json:"classes"`
			Floats  bool     `json:"floats"`
			Len     int      `json:"len"`
		}{first.Shape, first.Classes, first.Floats != nil, n})
		if err != nil {
			panic("dataset: " + err.Error()) // strings and numbers always marshal
		}
		h.Write(head)
	}
	for _, s := range sets {
		if s.Len() > 0 {
			h.Write(s.Bytes)
			writeFloats(h, s.Floats)
		}
	}
	for _, s := range sets {
		if s.Len() > 0 {
			h.Write(s.Labels)
		}
	}
	return sum(h)
}

func sum(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// writeFloats writes values big-endian, as IDX holds them.
func writeFloats(w io.Writer, values []float32) error {
	var buf [32 << 10]byte
	for chunk := range slices.Chunk(values, len(buf)/4) {
		for i, v := range chunk {
			binary.BigEndian.PutUint32(buf[4*i:], math.Float32bits(v))
		}
		if _, err := w.Write(buf[:4*len(chunk)]); err != nil {
			return err
		}
	}
	return nil
}

// Splits are the three parts of a data set. Test is never empty; Train and
// Validation are where the source has test examples only (as a folder of
// adversarial examples has).
type Splits struct {
	Name                    string
	Train, Validation, Test *Set
}

// Digest is "sha256:..." over all examples: those of Train and Validation
// together, so that it does not depend on where they are divided, then Test.
func (s *Splits) Digest() string {
	h := sha256.New()
	fmt.Fprintf(h, "train %s\ntest %s\n", digest(s.Train, s.Validation), digest(s.Test))
	return sum(h)
}

// Classes are the names of the classes, shared by the three parts.
func (s *Splits) Classes() []string { return s.Test.Classes }

// maxOverlap is the share of one part that may also be in another: published
// data sets hold a few duplicates, a leak holds many.
const maxOverlap = 0.001

// Check refuses splits of which one part repeats the images of another: a
// model is then judged on what it was trained on.
func (s *Splits) Check() error {
	for _, pair := range []struct{ a, b *Set }{
		{s.Train, s.Test}, {s.Validation, s.Test}, {s.Train, s.Validation},
	} {
		if n := Overlap(pair.a, pair.b); float64(n) > maxOverlap*float64(pair.b.Len()) {
			return fmt.Errorf("dataset %s: %d of the %d images of %s are also in %s: the parts must be disjoint", s.Name, n, pair.b.Len(), pair.b.Name, pair.a.Name)
		}
	}
	return nil
}

// Overlap counts the images of b that are also in a.
func Overlap(a, b *Set) int {
	if a.Len() == 0 || b.Len() == 0 || a.Shape != b.Shape {
		return 0
	}
	seed := maphash.MakeSeed()
	row := make([]float32, a.Shape.Size())
	raw := make([]byte, 4*len(row))
	sameKind := (a.Floats == nil) == (b.Floats == nil)
	image := func(s *Set, i int) uint64 {
		if size := len(row); sameKind && s.Bytes != nil {
			return maphash.Bytes(seed, s.Bytes[i*size:(i+1)*size])
		}
		s.Read(row, i, i+1)
		for j, v := range row {
			binary.LittleEndian.PutUint32(raw[4*j:], math.Float32bits(v+0)) // +0: -0 equals 0
		}
		return maphash.Bytes(seed, raw)
	}
	// 64 random bits: a chance match among 70,000 images has odds of 1 in 10^10.
	seen := make(map[uint64]struct{}, a.Len())
	for i := range a.Len() {
		seen[image(a, i)] = struct{}{}
	}
	n := 0
	for i := range b.Len() {
		if _, ok := seen[image(b, i)]; ok {
			n++
		}
	}
	return n
}
