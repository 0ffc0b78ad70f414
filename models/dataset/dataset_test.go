package dataset

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/nn"
)

func TestMNIST(t *testing.T) {
	s, err := MNIST()
	if err != nil {
		t.Fatal(err)
	}
	if s.Train.Len() != 55_000 || s.Validation.Len() != 5_000 || s.Test.Len() != 10_000 {
		t.Errorf("%d, %d, %d examples", s.Train.Len(), s.Validation.Len(), s.Test.Len())
	}
	if s.Test.Shape != (nn.Shape{Height: 28, Width: 28, Channels: 1}) || len(s.Classes()) != 10 || s.Classes()[9] != "9" {
		t.Errorf("images of %v, classes %v", s.Test.Shape, s.Classes())
	}
	if got := s.Train.Labels[:5]; !slices.Equal(got, []uint8{5, 0, 4, 1, 9}) {
		t.Errorf("first training labels %v", got)
	}
	if got := s.Test.Labels[:5]; !slices.Equal(got, []uint8{7, 2, 1, 0, 4}) {
		t.Errorf("first test labels %v", got)
	}
	// The mean and deviation that everyone normalises MNIST with.
	var sum, squares float64
	for _, set := range []*Set{s.Train, s.Validation} {
		for _, b := range set.Bytes {
			v := float64(pixel[b])
			sum, squares = sum+v, squares+v*v
		}
	}
	n := float64(60_000 * 784)
	mean := sum / n
	if deviation := math.Sqrt(squares/n - mean*mean); math.Abs(mean-0.1307) > 5e-5 || math.Abs(deviation-0.3081) > 5e-5 {
		t.Errorf("mean %v, deviation %v", mean, deviation)
	}
	if err := s.Check(); err != nil {
		t.Error(err)
	}
	// Reports and signatures name these; they must never change.
	if got := s.Digest(); got != "sha256:d560dd751417147e18e16ea68135d8afcafed9516a6bdc1056dd5446c2a61f5e" {
		t.Errorf("digest %s", got)
	}
	if got := s.Test.Digest(); got != "sha256:45c0a9394a00c483c5b7d702006ac9fdfe8075cad18f2b5c8cb905695a3e03ad" {
		t.Errorf("test digest %s", got)
	}
}

// All who hold the embedded set at a time hold the same one.
func TestMNISTIsShared(t *testing.T) {
	open := func(opts ...Option) *Splits {
		t.Helper()
		s, err := Open(t.Context(), "mnist", opts...)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	first := open()
	if open() != first {
		t.Error("the embedded data set is read twice")
	}
	if s := open(Validation(100)); s.Validation.Len() != 100 || first.Validation.Len() != 5_000 || open() != first {
		t.Error("a data set divided in another way is shared")
	}
}

// gradient is a set of n different images of 2x3x2, as bytes or floats.
func gradient(name string, first, n int, floats bool) *Set {
	s := &Set{Name: name, Shape: nn.Shape{Height: 2, Width: 3, Channels: 2}, Classes: []string{"cat", "dog", "bird"}}
	for i := range n {
		s.Labels = append(s.Labels, uint8((first+i)%3))
		for j := range s.Shape.Size() {
			b := uint8(7*(first+i) + j)
			if floats {
				s.Floats = append(s.Floats, pixel[b])
			} else {
				s.Bytes = append(s.Bytes, b)
			}
		}
	}
	return s
}

func TestReadGatherSlice(t *testing.T) {
	for _, floats := range []bool{false, true} {
		s := gradient("s", 0, 10, floats)
		size := s.Shape.Size()
		all := make([]float32, 10*size)
		s.Read(all, 0, 10)
		if all[size] != float32(7)/255 {
			t.Errorf("first pixel of example 1 is %v", all[size])
		}
		some := make([]float32, 3*size)
		s.Gather(some, []int{9, 0, 9})
		if !slices.Equal(some, slices.Concat(all[9*size:], all[:size], all[9*size:])) {
			t.Error("Gather differs from Read")
		}
		w := s.Slice(4, 7).Slice(1, 3)
		got := make([]float32, 2*size)
		w.Read(got, 0, w.Len())
		if w.Len() != 2 || w.Labels[0] != s.Labels[5] || !slices.Equal(got, all[5*size:7*size]) {
			t.Error("Slice differs from Read")
		}
		if err := w.Validate(); err != nil {
			t.Error(err)
		}
	}
	if (*Set)(nil).Len() != 0 {
		t.Error("nil is not empty")
	}
}

func TestDigestIsOfContent(t *testing.T) {
	base := gradient("a", 0, 4, false)
	same := gradient("b", 0, 4, false)
	if base.Digest() != same.Digest() {
		t.Error("the name is part of the digest")
	}
	changes := map[string]func(*Set){
		"pixel":  func(s *Set) { s.Bytes[5]++ },
		"label":  func(s *Set) { s.Labels[1] ^= 1 },
		"class":  func(s *Set) { s.Classes = []string{"cat", "dog", "birds"} },
		"shape":  func(s *Set) { s.Shape.Height, s.Shape.Width = 3, 2 },
		"fewer":  func(s *Set) { *s = *s.Slice(0, 3) },
		"floats": func(s *Set) { *s = *gradient("a", 0, 4, true) },
	}
	seen := map[string]string{base.Digest(): "base"}
	for name, change := range changes {
		s := gradient("a", 0, 4, false)
		change(s)
		if other, taken := seen[s.Digest()]; taken {
			t.Errorf("%s has the digest of %s", name, other)
		}
		seen[s.Digest()] = name
	}
	// Splits: not where training examples are divided, but what they and the test are.
	all := gradient("", 0, 6, false)
	cut := func(n int, test *Set) string {
		return (&Splits{Train: all.Slice(0, n), Validation: all.Slice(n, 6), Test: test}).Digest()
	}
	test := gradient("", 6, 2, false)
	if cut(4, test) != cut(5, test) {
		t.Error("the digest depends on where the training examples are divided")
	}
	if cut(4, test) == cut(4, gradient("", 7, 2, false)) {
		t.Error("the digest does not depend on the test examples")
	}
}

func TestValidate(t *testing.T) {
	for want, change := range map[string]func(*Set){
		"labels":                         func(s *Set) { s.Labels = s.Labels[1:] },
		"the classes are 0 to 2":         func(s *Set) { s.Labels[3] = 3 },
		"height and width":               func(s *Set) { s.Shape.Width = 0 },
		"1 classes":                      func(s *Set) { s.Classes = s.Classes[:1] },
		"both":                           func(s *Set) { s.Bytes = []byte{1} },
		"pixel 2 of example 1 is NaN":    func(s *Set) { s.Floats[14] = float32(math.NaN()) },
		"pixel 0 of example 0 is +Inf":   func(s *Set) { s.Floats[0] = float32(math.Inf(1)) },
		"pixel 11 of example 3 is 1.001": func(s *Set) { s.Floats[47] = 1.001 },
		"is -1e-08":                      func(s *Set) { s.Floats[0] = -1e-8 },
	} {
		s := gradient("s", 0, 4, true)
		if err := s.Validate(); err != nil {
			t.Fatal(err)
		}
		change(s)
		if err := s.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, expected %q", err, want)
		}
	}
}

func TestCase50OverlapIsRefused(t *testing.T) {
	for _, floats := range []bool{false, true} { // a leak through adversarial storage too
		clean := &Splits{Name: "s", Train: gradient("train", 0, 20, false), Validation: gradient("validation", 20, 5, false), Test: gradient("test", 25, 5, floats)}
		if err := clean.Check(); err != nil {
			t.Fatal(err)
		}
		for name, leak := range map[string]*Splits{
			"train in test":       {Train: clean.Train, Validation: clean.Validation, Test: gradient("test", 19, 1, floats)},
			"validation in test":  {Train: clean.Train, Validation: clean.Validation, Test: gradient("test", 24, 5, floats)},
			"train in validation": {Train: clean.Train, Validation: gradient("validation", 10, 5, false), Test: clean.Test},
		} {
			if err := leak.Check(); err == nil || !strings.Contains(err.Error(), "disjoint") {
				t.Errorf("%s: error %v", name, err)
			}
			dir := mustWrite(t, leak)
			base, _ := server(t, dir, nil)
			for _, ref := range []string{dir, base} {
				if _, err := Open(t.Context(), ref, Pin(leak.Digest()), Cache(t.TempDir()), quick); err == nil || !strings.Contains(err.Error(), "disjoint") {
					t.Errorf("%s: opened from %s: error %v", name, ref, err)
				}
			}
		}
	}
	if err := (&Splits{Test: gradient("test", 0, 5, false)}).Check(); err != nil {
		t.Error(err)
	}
}
