package nn

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/temper-ml/temper/models/nn/kernel"
)

// Layer is one step of a network; exactly one of its fields but From is set.
type Layer struct {
	// From lists the layers whose outputs this one takes, by their place in the
	// description: 0 is the first, -1 the network's input. Empty means the layer
	// before.
	From []int `yaml:"from,omitempty,flow" json:"from,omitempty"`

	Conv       *Conv       `yaml:"conv,omitempty" json:"conv,omitempty"`
	MaxPool    *MaxPool    `yaml:"maxpool,omitempty" json:"maxpool,omitempty"`
	Dense      *Dense      `yaml:"dense,omitempty" json:"dense,omitempty"`
	Affine     *Affine     `yaml:"affine,omitempty" json:"affine,omitempty"`
	Normalise  *Normalise  `yaml:"normalise,omitempty" json:"normalise,omitempty"`
	Activation *Activation `yaml:"activation,omitempty" json:"activation,omitempty"`
	AvgPool    *AvgPool    `yaml:"avgpool,omitempty" json:"avgpool,omitempty"`
	Combine    *Combine    `yaml:"combine,omitempty" json:"combine,omitempty"`
	Concat     *Concat     `yaml:"concat,omitempty" json:"concat,omitempty"`
	Pad        *Pad        `yaml:"pad,omitempty" json:"pad,omitempty"`
	Permute    *Permute    `yaml:"permute,omitempty" json:"permute,omitempty"`
}

// Conv is a square convolution with bias and zero padding, followed by a ReLU
// where ReLU is set. With Groups, input channels and filters are cut into as
// many parts, each filter reading its own part only. With Dilation, the taps of
// a filter are that many pixels apart.
type Conv struct {
	Filters  int  `yaml:"filters" json:"filters"`
	Kernel   int  `yaml:"kernel" json:"kernel"`
	Stride   int  `yaml:"stride,omitempty" json:"stride,omitempty"` // 0 means 1
	Padding  int  `yaml:"padding,omitempty" json:"padding,omitempty"`
	Dilation int  `yaml:"dilation,omitempty" json:"dilation,omitempty"` // 0 means 1
	Groups   int  `yaml:"groups,omitempty" json:"groups,omitempty"`     // 0 means 1
	ReLU     bool `yaml:"relu,omitempty" json:"relu,omitempty"`
}

// MaxPool takes the maximum over Size x Size windows, Stride apart (0 means
// Size: they do not overlap). The padding is never the maximum; rows and
// columns that do not fill a window are dropped.
type MaxPool struct {
	Size    int `yaml:"size" json:"size"`
	Stride  int `yaml:"stride,omitempty" json:"stride,omitempty"`
	Padding int `yaml:"padding,omitempty" json:"padding,omitempty"`
}

// AvgPool takes the mean over Size x Size windows, Stride apart (0 means
// Size); Size 0 is the whole image. The padding counts as zeros where
// CountPadding is set, else not at all.
type AvgPool struct {
	Size         int  `yaml:"size,omitempty" json:"size,omitempty"`
	Stride       int  `yaml:"stride,omitempty" json:"stride,omitempty"`
	Padding      int  `yaml:"padding,omitempty" json:"padding,omitempty"`
	CountPadding bool `yaml:"count_padding,omitempty" json:"count_padding,omitempty"`
}

// Dense is a fully connected layer with bias over the flattened input,
// followed by a ReLU where ReLU is set.
type Dense struct {
	Units int  `yaml:"units" json:"units"`
	ReLU  bool `yaml:"relu,omitempty" json:"relu,omitempty"`
}

// Affine scales and shifts each channel by trained parameters, followed by a
// ReLU where ReLU is set: a batch normalisation with frozen statistics.
type Affine struct {
	ReLU bool `yaml:"relu,omitempty" json:"relu,omitempty"`
}

// Normalise computes (x - Mean) / Std with one constant for all channels or
// one for each. As the first layer it is the normalisation of the input.
type Normalise struct {
	Mean []float32 `yaml:"mean,flow" json:"mean"`
	Std  []float32 `yaml:"std,flow" json:"std"`
}

// Activation applies a function to each value, or softmax to all of an
// example's values together.
type Activation struct {
	Function string  `yaml:"function" json:"function"`               // one of Functions
	Slope    float32 `yaml:"slope,omitempty" json:"slope,omitempty"` // of leaky_relu, below 0
	Min      float32 `yaml:"min,omitempty" json:"min,omitempty"`     // of clip
	Max      float32 `yaml:"max,omitempty" json:"max,omitempty"`     // of clip
}

// Functions that an Activation may apply.
var Functions = []string{"relu", "leaky_relu", "sigmoid", "tanh", "clip", "softmax"}

// Combine computes an operator of two layers' outputs of one shape, value by
// value, followed by a ReLU where ReLU is set. One of them may have a single
// pixel, which then meets every pixel of the other.
type Combine struct {
	Operator string `yaml:"operator" json:"operator"` // one of Operators
	ReLU     bool   `yaml:"relu,omitempty" json:"relu,omitempty"`
}

// Operators that a Combine may compute.
var Operators = []string{"add", "sub", "mul", "div"}

// Concat joins the channels of its inputs, in order.
type Concat struct{}

// Pad surrounds an image with pixels of one value.
type Pad struct {
	Top    int     `yaml:"top,omitempty" json:"top,omitempty"`
	Left   int     `yaml:"left,omitempty" json:"left,omitempty"`
	Bottom int     `yaml:"bottom,omitempty" json:"bottom,omitempty"`
	Right  int     `yaml:"right,omitempty" json:"right,omitempty"`
	Value  float32 `yaml:"value,omitempty" json:"value,omitempty"`
}

// Permute puts the values of an example in another order and gives them
// another shape. Counting through the loops that Sizes describes, the last the
// fastest, output value i is the input value whose place is the sum of each
// loop's count times its stride.
type Permute struct {
	Sizes   []int `yaml:"sizes,flow" json:"sizes"`
	Strides []int `yaml:"strides,flow" json:"strides"`
	Shape   Shape `yaml:"shape" json:"shape"`
}

// operation is what every kind of layer knows of itself.
type operation interface {
	kind() string
	// output is the shape that the layer makes of its inputs'.
	output(in []Shape) (Shape, error)
	// arithmetic is the layer's, between shapes that output has accepted.
	arithmetic(in []Shape, out Shape) (kernel.Weighted, kernel.Function)
}

// weighted is an operation with parameters.
type weighted interface {
	operation
	weightShape(in Shape) []int // the last dimension is as long as the bias
	relu() bool
}

var errKind = errors.New("a layer is exactly one of conv, maxpool, dense, affine, normalise, activation, avgpool, combine, concat, pad, permute")

func (l Layer) operation() (operation, error) {
	var found []operation
	add := func(set bool, o operation) {
		if set {
			found = append(found, o)
		}
	}
	add(l.Conv != nil, l.Conv)
	add(l.MaxPool != nil, l.MaxPool)
	add(l.Dense != nil, l.Dense)
	add(l.Affine != nil, l.Affine)
	add(l.Normalise != nil, l.Normalise)
	add(l.Activation != nil, l.Activation)
	add(l.AvgPool != nil, l.AvgPool)
	add(l.Combine != nil, l.Combine)
	add(l.Concat != nil, l.Concat)
	add(l.Pad != nil, l.Pad)
	add(l.Permute != nil, l.Permute)
	if len(found) != 1 {
		return nil, errKind
	}
	return found[0], nil
}

// Kind names the layer's operation, as in YAML.
func (l Layer) Kind() string {
	o, err := l.operation()
	if err != nil {
		return "empty"
	}
	return o.kind()
}

// Output is the shape that the layer makes of its inputs'.
func (l Layer) Output(in ...Shape) (Shape, error) {
	op, err := l.operation()
	if err != nil {
		return Shape{}, err
	}
	out, err := op.output(in)
	if err == nil && out.Size() > maxActivity {
		err = fmt.Errorf("too large: it makes %v, %d activations, at most %d", out, out.Size(), maxActivity)
	}
	return out, err
}

// ReLU tells whether the layer ends in a ReLU of its own.
func (l Layer) ReLU() bool {
	switch {
	case l.Conv != nil:
		return l.Conv.ReLU
	case l.Dense != nil:
		return l.Dense.ReLU
	case l.Affine != nil:
		return l.Affine.ReLU
	case l.Combine != nil:
		return l.Combine.ReLU
	}
	return false
}

// one refuses more than one input.
func one(in []Shape) (Shape, error) {
	if len(in) != 1 {
		return Shape{}, fmt.Errorf("%d inputs: exactly one is expected", len(in))
	}
	return in[0], nil
}

func (c *Conv) kind() string { return "conv" }
func (c *Conv) relu() bool   { return c.ReLU }

func (c *Conv) output(inputs []Shape) (Shape, error) {
	in, err := one(inputs)
	if err != nil {
		return Shape{}, err
	}
	s, d, g := c.Step(), max(c.Dilation, 1), c.groups()
	for _, n := range []int{c.Filters, c.Kernel, s, d, g} {
		if n < 1 || n > MaxChannels {
			return Shape{}, fmt.Errorf("filters %d, kernel %d, stride %d, dilation %d, groups %d: each must be 1 to %d", c.Filters, c.Kernel, s, d, g, MaxChannels)
		}
	}
	if c.Padding < 0 || c.Padding > MaxSide || c.Stride < 0 || c.Dilation < 0 || c.Groups < 0 {
		return Shape{}, fmt.Errorf("stride %d, padding %d, dilation %d, groups %d: none may be negative, and padding at most %d", c.Stride, c.Padding, c.Dilation, c.Groups, MaxSide)
	}
	if in.Channels%g != 0 || c.Filters%g != 0 {
		return Shape{}, fmt.Errorf("groups %d: must divide the %d channels and the %d filters", g, in.Channels, c.Filters)
	}
	reach := d*(c.Kernel-1) + 1
	h, w := in.Height+2*c.Padding-reach, in.Width+2*c.Padding-reach
	if h < 0 || w < 0 {
		return Shape{}, fmt.Errorf("kernel %dx%d does not fit", reach, reach)
	}
	return Shape{h/s + 1, w/s + 1, c.Filters}, nil
}

// Step is the convolution's stride, at least 1.
func (c *Conv) Step() int { return max(c.Stride, 1) }

func (c *Conv) groups() int { return max(c.Groups, 1) }

func (c *Conv) weightShape(in Shape) []int {
	return []int{c.Kernel, c.Kernel, in.Channels / c.groups(), c.Filters}
}

func (c *Conv) arithmetic(inputs []Shape, out Shape) (kernel.Weighted, kernel.Function) {
	in := inputs[0]
	g, d := c.groups(), max(c.Dilation, 1)
	if g == 1 && d == 1 && c.Padding < c.Kernel {
		return &kernel.Conv{
			Height: in.Height, Width: in.Width, Channels: in.Channels,
			OutHeight: out.Height, OutWidth: out.Width, Filters: c.Filters,
			Kernel: c.Kernel, Stride: c.Step(), Padding: c.Padding,
		}, nil
	}
	return &kernel.GroupedConv{
		Height: in.Height, Width: in.Width, Channels: in.Channels,
		OutHeight: out.Height, OutWidth: out.Width, Filters: c.Filters,
		Kernel: c.Kernel, Stride: c.Step(), Padding: c.Padding, Dilation: d, Groups: g,
	}, nil
}

// windows is the shape of a pool's output.
func windows(in Shape, size, stride, padding int) (Shape, error) {
	if size < 1 || size > in.Height+2*padding || size > in.Width+2*padding {
		return Shape{}, fmt.Errorf("window %dx%d: must fit", size, size)
	}
	if stride < 1 || padding < 0 || padding >= size {
		return Shape{}, fmt.Errorf("window %dx%d, stride %d, padding %d: the stride must be at least 1 and the padding smaller than the window", size, size, stride, padding)
	}
	return Shape{(in.Height+2*padding-size)/stride + 1, (in.Width+2*padding-size)/stride + 1, in.Channels}, nil
}

func (p *MaxPool) kind() string { return "maxpool" }

// Step is the distance between windows.
func (p *MaxPool) Step() int {
	if p.Stride == 0 {
		return p.Size
	}
	return p.Stride
}

func (p *MaxPool) output(inputs []Shape) (Shape, error) {
	in, err := one(inputs)
	if err != nil {
		return Shape{}, err
	}
	if p.Size > kernel.MaxWindow {
		return Shape{}, fmt.Errorf("window %dx%d: at most %dx%d", p.Size, p.Size, kernel.MaxWindow, kernel.MaxWindow)
	}
	return windows(in, p.Size, p.Step(), p.Padding)
}

func (p *MaxPool) arithmetic(inputs []Shape, out Shape) (kernel.Weighted, kernel.Function) {
	in := inputs[0]
	if p.Step() == p.Size && p.Padding == 0 {
		return nil, kernel.NewMaxPool(kernel.MaxPool{Height: in.Height, Width: in.Width, Channels: in.Channels, Size: p.Size})
	}
	return nil, &kernel.OverlappingMaxPool{Window: window(in, out, p.Size, p.Step(), p.Padding)}
}

func window(in, out Shape, size, stride, padding int) kernel.Window {
	return kernel.Window{
		Height: in.Height, Width: in.Width, Channels: in.Channels, OutHeight: out.Height, OutWidth: out.Width,
		SizeY: size, SizeX: size, Stride: stride, Padding: padding,
	}
}

func (p *AvgPool) kind() string { return "avgpool" }

// Step is the distance between windows.
func (p *AvgPool) Step() int {
	if p.Stride == 0 {
		return p.Size
	}
	return p.Stride
}

func (p *AvgPool) output(inputs []Shape) (Shape, error) {
	in, err := one(inputs)
	if err != nil {
		return Shape{}, err
	}
	if p.Size == 0 {
		if *p != (AvgPool{}) {
			return Shape{}, errors.New("size 0, the whole image, has no stride and no padding")
		}
		return Shape{1, 1, in.Channels}, nil
	}
	return windows(in, p.Size, p.Step(), p.Padding)
}

func (p *AvgPool) arithmetic(inputs []Shape, out Shape) (kernel.Weighted, kernel.Function) {
	in := inputs[0]
	w := window(in, out, p.Size, p.Step(), p.Padding)
	if p.Size == 0 {
		w.SizeY, w.SizeX, w.Stride = in.Height, in.Width, 1
	}
	return nil, &kernel.AvgPool{Window: w, CountPadding: p.CountPadding}
}

func (d *Dense) kind() string { return "dense" }
func (d *Dense) relu() bool   { return d.ReLU }

func (d *Dense) output(inputs []Shape) (Shape, error) {
	if _, err := one(inputs); err != nil {
		return Shape{}, err
	}
	if d.Units < 1 || d.Units > MaxParameters {
		return Shape{}, fmt.Errorf("%d units: must be 1 to %d", d.Units, MaxParameters)
	}
	return Shape{1, 1, d.Units}, nil
}

func (d *Dense) weightShape(in Shape) []int { return []int{in.Size(), d.Units} }

func (d *Dense) arithmetic(in []Shape, _ Shape) (kernel.Weighted, kernel.Function) {
	return &kernel.Dense{In: in[0].Size(), Units: d.Units}, nil
}

func (a *Affine) kind() string                     { return "affine" }
func (a *Affine) relu() bool                       { return a.ReLU }
func (a *Affine) output(in []Shape) (Shape, error) { return one(in) }
func (a *Affine) weightShape(in Shape) []int       { return []int{in.Channels} }

func (a *Affine) arithmetic(in []Shape, _ Shape) (kernel.Weighted, kernel.Function) {
	return &kernel.Affine{Pixels: in[0].Height * in[0].Width, Channels: in[0].Channels}, nil
}

func (n *Normalise) kind() string { return "normalise" }

func (n *Normalise) output(inputs []Shape) (Shape, error) {
	in, err := one(inputs)
	if err != nil {
		return Shape{}, err
	}
	for _, c := range []struct {
		name   string
		values []float32
	}{{"mean", n.Mean}, {"std", n.Std}} {
		if len(c.values) != 1 && len(c.values) != in.Channels {
			return Shape{}, fmt.Errorf("%d numbers as %s: one, or one for each of %d channels, is expected", len(c.values), c.name, in.Channels)
		}
		for _, v := range c.values {
			if a := math.Abs(float64(v)); !(a <= maxWeight) || c.name == "std" && a < 1/maxWeight {
				return Shape{}, fmt.Errorf("%s %v: must be finite, at most %.0e in magnitude, and a std at least %.0e", c.name, v, maxWeight, 1/maxWeight)
			}
		}
	}
	return in, nil
}

func (n *Normalise) arithmetic(in []Shape, _ Shape) (kernel.Weighted, kernel.Function) {
	s := &kernel.Scale{Pixels: in[0].Height * in[0].Width, Factor: make([]float32, in[0].Channels), Shift: make([]float32, in[0].Channels)}
	for c := range s.Factor {
		mean, std := float64(n.Mean[c%len(n.Mean)]), float64(n.Std[c%len(n.Std)])
		s.Factor[c], s.Shift[c] = float32(1/std), float32(-mean/std)
	}
	return nil, s
}

func (a *Activation) kind() string { return "activation" }

func (a *Activation) output(inputs []Shape) (Shape, error) {
	in, err := one(inputs)
	if err != nil {
		return Shape{}, err
	}
	finite := func(v float32) bool { return v-v == 0 }
	switch {
	case !slices.Contains(Functions, a.Function):
		return Shape{}, fmt.Errorf("function %q: must be one of %v", a.Function, Functions)
	case a.Function != "leaky_relu" && a.Slope != 0 || !finite(a.Slope):
		return Shape{}, fmt.Errorf("slope %v: must be finite, and is for leaky_relu only", a.Slope)
	case a.Function != "clip" && (a.Min != 0 || a.Max != 0):
		return Shape{}, fmt.Errorf("min %v, max %v: are for clip only", a.Min, a.Max)
	case a.Function == "clip" && (!(a.Min < a.Max) || !finite(a.Min) || !finite(a.Max)):
		return Shape{}, fmt.Errorf("min %v, max %v: must be finite, and min the smaller", a.Min, a.Max)
	}
	return in, nil
}

func (a *Activation) arithmetic(in []Shape, _ Shape) (kernel.Weighted, kernel.Function) {
	size := in[0].Size()
	switch a.Function {
	case "relu":
		return nil, &kernel.LeakyReLU{Size: size}
	case "leaky_relu":
		return nil, &kernel.LeakyReLU{Size: size, Slope: a.Slope}
	case "sigmoid":
		return nil, &kernel.Sigmoid{Size: size}
	case "tanh":
		return nil, &kernel.Tanh{Size: size}
	case "clip":
		return nil, &kernel.Clip{Size: size, Min: a.Min, Max: a.Max}
	}
	return nil, &kernel.Softmax{Size: size}
}

func (c *Combine) kind() string { return "combine" }

func (c *Combine) output(in []Shape) (Shape, error) {
	if len(in) != 2 {
		return Shape{}, fmt.Errorf("%d inputs: exactly two are expected, name them with from", len(in))
	}
	if !slices.Contains(Operators, c.Operator) {
		return Shape{}, fmt.Errorf("operator %q: must be one of %v", c.Operator, Operators)
	}
	a, b := in[0], in[1]
	pixel := Shape{1, 1, a.Channels}
	switch {
	case a == b || b == pixel:
		return a, nil
	case a == pixel && b.Channels == a.Channels:
		return b, nil
	}
	return Shape{}, fmt.Errorf("inputs %v and %v: must have one shape, or one of them a single pixel and as many channels", a, b)
}

func (c *Combine) arithmetic(in []Shape, out Shape) (kernel.Weighted, kernel.Function) {
	return nil, &kernel.Combine{Operator: c.Operator, ReLU: c.ReLU, Size: out.Size(), Sizes: [2]int{in[0].Size(), in[1].Size()}}
}

func (c *Concat) kind() string { return "concat" }

func (c *Concat) output(in []Shape) (Shape, error) {
	out := in[0]
	for _, s := range in[1:] {
		if s.Height != out.Height || s.Width != out.Width {
			return Shape{}, fmt.Errorf("inputs %v and %v: height and width must be the same", in[0], s)
		}
		out.Channels += s.Channels
	}
	return out, nil
}

func (c *Concat) arithmetic(in []Shape, out Shape) (kernel.Weighted, kernel.Function) {
	k := &kernel.Concat{Pixels: out.Height * out.Width}
	for _, s := range in {
		k.Channels = append(k.Channels, s.Channels)
	}
	return nil, k
}

func (p *Pad) kind() string { return "pad" }

func (p *Pad) output(inputs []Shape) (Shape, error) {
	in, err := one(inputs)
	if err != nil {
		return Shape{}, err
	}
	for _, n := range []int{p.Top, p.Left, p.Bottom, p.Right} {
		if n < 0 || n > MaxSide {
			return Shape{}, fmt.Errorf("top %d, left %d, bottom %d, right %d: each must be 0 to %d", p.Top, p.Left, p.Bottom, p.Right, MaxSide)
		}
	}
	if v := p.Value; v-v != 0 {
		return Shape{}, fmt.Errorf("value %v: must be finite", v)
	}
	return Shape{in.Height + p.Top + p.Bottom, in.Width + p.Left + p.Right, in.Channels}, nil
}

func (p *Pad) arithmetic(in []Shape, out Shape) (kernel.Weighted, kernel.Function) {
	return nil, &kernel.Pad{
		Height: in[0].Height, Row: in[0].Width * in[0].Channels, OutRow: out.Width * out.Channels, OutHeight: out.Height,
		Top: p.Top, Left: p.Left * out.Channels, Value: p.Value,
	}
}

func (p *Permute) kind() string { return "permute" }

// maxLoops is twice what four dimensions, each cut in two, need.
const maxLoops = 16

func (p *Permute) output(inputs []Shape) (Shape, error) {
	in, err := one(inputs)
	if err != nil {
		return Shape{}, err
	}
	s := p.Shape
	if len(p.Sizes) == 0 || len(p.Sizes) != len(p.Strides) || len(p.Sizes) > maxLoops {
		return Shape{}, fmt.Errorf("sizes %v, strides %v: must be as many, 1 to %d", p.Sizes, p.Strides, maxLoops)
	}
	// The loops visit each input value once: by falling stride, each stride is
	// the number of values that those after it visit.
	order := make([]int, len(p.Sizes))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return p.Strides[a] - p.Strides[b] })
	visited := 1
	for _, i := range order {
		if p.Strides[i] != visited || p.Sizes[i] < 2 && len(p.Sizes) > 1 || p.Sizes[i] > in.Size() {
			return Shape{}, fmt.Errorf("sizes %v, strides %v: must visit each of %d values once", p.Sizes, p.Strides, in.Size())
		}
		if visited *= p.Sizes[i]; visited > in.Size() {
			break
		}
	}
	if visited != in.Size() {
		return Shape{}, fmt.Errorf("sizes %v, strides %v: must visit each of %d values once", p.Sizes, p.Strides, in.Size())
	}
	if s.Height < 1 || s.Width < 1 || s.Channels < 1 || s.Height > in.Size() || s.Width > in.Size() || s.Channels > in.Size() || s.Size() != in.Size() {
		return Shape{}, fmt.Errorf("shape %v: must have %d values", s, in.Size())
	}
	return s, nil
}

func (p *Permute) arithmetic(in []Shape, _ Shape) (kernel.Weighted, kernel.Function) {
	return nil, &kernel.Permute{Places: places(p.Sizes, p.Strides)}
}

// places lists the places that loops visit, in order.
func places(sizes, strides []int) []int32 {
	out := []int32{0}
	for i, size := range sizes {
		next := make([]int32, 0, len(out)*size)
		for _, at := range out {
			for k := range size {
				next = append(next, at+int32(k*strides[i]))
			}
		}
		out = next
	}
	return out
}
