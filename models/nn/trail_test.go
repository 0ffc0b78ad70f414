package nn

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/temper-ml/temper/models/nn/kernel"
)

// Following changes gives the bits of a whole pass, through squares that stay and
// squares that are taken back, on every path.
func TestFollowIsLogits(t *testing.T) {
	for _, c := range []struct {
		name   string
		locals int
		input  Shape
		layers []Layer
	}{
		{"strides", 4, Shape{28, 27, 1}, []Layer{
			{Normalise: &Normalise{Mean: []float32{0.5}, Std: []float32{0.2}}},
			{Activation: &Activation{Function: "sigmoid"}},
			{Conv: &Conv{Filters: 16, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
			{Conv: &Conv{Filters: 20, Kernel: 3, Stride: 3, Padding: 2}},
			{Dense: &Dense{Units: 5}},
		}},
		{"pools", 2, Shape{23, 28, 3}, []Layer{
			{Conv: &Conv{Filters: 8, Kernel: 3, ReLU: true}},
			{MaxPool: &MaxPool{Size: 2}},
			{Conv: &Conv{Filters: 33, Kernel: 5, Padding: 2, ReLU: true}},
			{MaxPool: &MaxPool{Size: 3}},
			{Dense: &Dense{Units: 7, ReLU: true}},
			{Dense: &Dense{Units: 5}},
		}},
		{"tiles", 4, Shape{15, 18, 1}, []Layer{ // of Winograd's algorithm
			{Conv: &Conv{Filters: 16, Kernel: 3, Padding: 2, ReLU: true}},
			{Conv: &Conv{Filters: 16, Kernel: 3, Padding: 1, ReLU: true}},
			{MaxPool: &MaxPool{Size: 2}},
			{Conv: &Conv{Filters: 16, Kernel: 3, Padding: 1}},
			{Conv: &Conv{Filters: 16, Kernel: 3, ReLU: true}},
			{MaxPool: &MaxPool{Size: 3}},
			{Dense: &Dense{Units: 5}},
		}},
		{"gaps", 1, Shape{9, 9, 2}, []Layer{ // pixels that no filter sees
			{Conv: &Conv{Filters: 4, Kernel: 2, Stride: 4, ReLU: true}},
			{Dense: &Dense{Units: 5}},
		}},
		{"all", 2, Shape{6, 6, 1}, []Layer{
			{Conv: &Conv{Filters: 4, Kernel: 3, ReLU: true}},
			{Conv: &Conv{Filters: 5, Kernel: 4}},
		}},
		{"skip", 1, Shape{8, 8, 3}, []Layer{
			{Conv: &Conv{Filters: 4, Kernel: 3, Padding: 1, ReLU: true}},
			{Conv: &Conv{Filters: 4, Kernel: 3, Padding: 1, ReLU: true}},
			{From: []int{0, 1}, Combine: &Combine{Operator: "add"}},
			{Dense: &Dense{Units: 5}},
		}},
		{"input taken twice", 0, Shape{4, 4, 2}, []Layer{
			{Conv: &Conv{Filters: 2, Kernel: 1, ReLU: true}},
			{From: []int{-1, 0}, Combine: &Combine{Operator: "add"}},
			{Dense: &Dense{Units: 5}},
		}},
		{"softmax", 0, Shape{4, 4, 2}, []Layer{{Activation: &Activation{Function: "softmax"}}, {Dense: &Dense{Units: 5}}}},
		{"too large", 1, Shape{100, 100, 3}, []Layer{
			{Conv: &Conv{Filters: 4, Kernel: 9, Stride: 9, ReLU: true}},
			{Conv: &Conv{Filters: 1000, Kernel: 3, Padding: 1, ReLU: true}},
			{Dense: &Dense{Units: 5}},
		}},
	} {
		for _, path := range kernel.Paths() {
			t.Run(c.name+"/"+path, func(t *testing.T) {
				defer kernel.Use(path)()
				n, err := New(Description{Name: c.name, Input: c.input, Layers: c.layers}, 1)
				if err != nil {
					t.Fatal(err)
				}
				const batch = 3
				f, err := NewForward(n, batch)
				if err != nil {
					t.Fatal(err)
				}
				whole, err := NewForward(n, batch)
				if err != nil {
					t.Fatal(err)
				}
				if len(f.locals) != c.locals {
					t.Fatalf("%d layers are local, not %d", len(f.locals), c.locals)
				}
				rng := rand.New(rand.NewPCG(1, 2))
				size := n.Input.Size()
				x := make([]float32, batch*size)
				old, trails := slices.Clone(x), make([]Trail, batch)
				changes := make([]Change, batch)
				for step := range 60 {
					for r := range batch {
						image, before := x[r*size:][:size], old[r*size:][:size]
						c := Change{Trail: &trails[r]}
						if c.Back = step > 0 && rng.IntN(2) == 0 && !changes[r].Window.empty(); c.Back {
							copy(image, before)
						}
						w := Window{Height: n.Input.Height, Width: n.Input.Width}
						if step > 0 && rng.IntN(20) > 0 {
							w.Height, w.Width = 1+rng.IntN(n.Input.Height), 1+rng.IntN(n.Input.Width)
							w.Top, w.Left = rng.IntN(n.Input.Height-w.Height+1), rng.IntN(n.Input.Width-w.Width+1)
							c.Window = w
						}
						copy(before, image)
						for y := range w.Height {
							at := ((w.Top+y)*n.Input.Width + w.Left) * n.Input.Channels
							for i := range w.Width * n.Input.Channels {
								image[at+i] = rng.Float32()
							}
						}
						changes[r] = c
					}
					got := f.Follow(x, changes)
					if want := whole.Logits(x, batch); !slices.Equal(got, want) {
						t.Fatalf("step %d: %v, not %v", step, got, want)
					}
				}
			})
		}
	}
}

// What an answer to an image costs whose 3 x 3 pixels have changed, and a whole one,
// for the network of Wong, Rice and Kolter 2020.
func BenchmarkFollow(b *testing.B) {
	n, err := New(Description{Name: "wong", Input: Shape{28, 28, 1}, Layers: []Layer{
		{Conv: &Conv{Filters: 16, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Conv: &Conv{Filters: 32, Kernel: 4, Stride: 2, Padding: 1, ReLU: true}},
		{Dense: &Dense{Units: 100, ReLU: true}},
		{Dense: &Dense{Units: 10}},
	}}, 1)
	if err != nil {
		b.Fatal(err)
	}
	const batch = 32
	f, err := NewForward(n, batch)
	if err != nil {
		b.Fatal(err)
	}
	x, changes := make([]float32, batch*n.Input.Size()), make([]Change, batch)
	for i := range changes {
		changes[i] = Change{Trail: new(Trail)}
	}
	f.Follow(x, changes)
	rng := rand.New(rand.NewPCG(1, 2))
	b.Run("whole", func(b *testing.B) {
		for b.Loop() {
			f.Logits(x, batch)
		}
	})
	b.Run("change", func(b *testing.B) {
		for b.Loop() {
			for i := range changes {
				changes[i].Back, changes[i].Window = true, Window{rng.IntN(26), rng.IntN(26), 3, 3}
			}
			f.Follow(x, changes)
		}
	})
}
