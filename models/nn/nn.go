// Package nn describes image classifiers: their layers, shapes and
// parameters, and a plain forward pass for serving.
//
// Activations are stored row-major as [batch, height, width, channels], so
// that the channels of one pixel are contiguous: a convolution's inner loop
// then runs over consecutive memory. Convolution weights are
// [kernel, kernel, in, out] and dense weights [in, out]; a dense layer reads
// its input in height, width, channel order. Package onnx translates to and
// from the channel-first order of other frameworks.
package nn

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/temper-ml/temper/models/nn/kernel"
)

// Shape is the shape of one example's activation.
type Shape struct {
	Height   int `yaml:"height" json:"height"`
	Width    int `yaml:"width" json:"width"`
	Channels int `yaml:"channels" json:"channels"`
}

// Size is the number of values in an activation of this shape.
func (s Shape) Size() int { return s.Height * s.Width * s.Channels }

func (s Shape) String() string { return fmt.Sprintf("%dx%dx%d", s.Height, s.Width, s.Channels) }

// Description is a network without its weights: what models/zoo holds.
type Description struct {
	Name   string  `yaml:"name" json:"name"`
	Input  Shape   `yaml:"input" json:"input"`
	Layers []Layer `yaml:"layers" json:"layers"`
}

// Layer is one step of a network; exactly one of its fields is set.
type Layer struct {
	Conv    *Conv    `yaml:"conv,omitempty" json:"conv,omitempty"`
	MaxPool *MaxPool `yaml:"maxpool,omitempty" json:"maxpool,omitempty"`
	Dense   *Dense   `yaml:"dense,omitempty" json:"dense,omitempty"`
}

// Conv is a square convolution with bias and zero padding, followed by a ReLU
// where ReLU is set.
type Conv struct {
	Filters int  `yaml:"filters" json:"filters"`
	Kernel  int  `yaml:"kernel" json:"kernel"`
	Stride  int  `yaml:"stride,omitempty" json:"stride,omitempty"` // 0 means 1
	Padding int  `yaml:"padding,omitempty" json:"padding,omitempty"`
	ReLU    bool `yaml:"relu,omitempty" json:"relu,omitempty"`
}

// MaxPool takes the maximum over Size x Size windows that do not overlap;
// rows and columns that do not fill a window are dropped.
type MaxPool struct {
	Size int `yaml:"size" json:"size"`
}

// Dense is a fully connected layer with bias over the flattened input,
// followed by a ReLU where ReLU is set.
type Dense struct {
	Units int  `yaml:"units" json:"units"`
	ReLU  bool `yaml:"relu,omitempty" json:"relu,omitempty"`
}

// Limits on a description: far above the networks Temper is for, and low
// enough that a hostile file cannot ask for unbounded memory.
const (
	MaxLayers     = 256
	MaxSide       = 1024
	MaxChannels   = 8192
	MaxParameters = 64 << 20
	maxMultiplied = 1 << 34 // multiply-adds of one forward pass
	maxActivity   = 1 << 24 // values of one example over all layers
)

// Shapes returns the input shape followed by each layer's output shape. The
// last layer must be dense without ReLU; its units are the classes.
func (d *Description) Shapes() ([]Shape, error) {
	in := d.Input
	if in.Height < 1 || in.Width < 1 || in.Channels < 1 || in.Height > MaxSide || in.Width > MaxSide || in.Channels > MaxChannels {
		return nil, fmt.Errorf("network %q: input %v: height and width must be 1 to %d, channels 1 to %d", d.Name, in, MaxSide, MaxChannels)
	}
	if len(d.Layers) == 0 || len(d.Layers) > MaxLayers {
		return nil, fmt.Errorf("network %q: %d layers: must be 1 to %d", d.Name, len(d.Layers), MaxLayers)
	}
	shapes := []Shape{in}
	parameters, multiplied, activity := 0, 0, in.Size()
	for i, l := range d.Layers {
		out, err := l.output(in)
		if err != nil {
			return nil, fmt.Errorf("network %q: layer %d (%s) on input %v: %w", d.Name, i, l.Kind(), in, err)
		}
		w, b := l.parameterSizes(in)
		parameters += w + b
		multiplied += w
		if l.Conv != nil {
			multiplied += w * (out.Height*out.Width - 1)
		}
		activity += out.Size()
		for _, limit := range []struct {
			what       string
			have, most int
		}{{"parameters", parameters, MaxParameters}, {"multiplications", multiplied, maxMultiplied}, {"activations", activity, maxActivity}} {
			if limit.have > limit.most {
				return nil, fmt.Errorf("network %q: layer %d (%s): too large: %d %s so far, at most %d", d.Name, i, l.Kind(), limit.have, limit.what, limit.most)
			}
		}
		shapes = append(shapes, out)
		in = out
	}
	last := d.Layers[len(d.Layers)-1]
	if last.Dense == nil || last.Dense.ReLU {
		return nil, fmt.Errorf("network %q: the last layer must be dense without relu: its units are the classes", d.Name)
	}
	if last.Dense.Units < 2 {
		return nil, fmt.Errorf("network %q: %d classes: must be at least 2", d.Name, last.Dense.Units)
	}
	return shapes, nil
}

// Classes is the number of outputs of the last layer.
func (d *Description) Classes() int {
	if n := len(d.Layers); n > 0 && d.Layers[n-1].Dense != nil {
		return d.Layers[n-1].Dense.Units
	}
	return 0
}

// Kind names the layer's operation.
func (l Layer) Kind() string {
	switch {
	case l.Conv != nil:
		return "conv"
	case l.MaxPool != nil:
		return "maxpool"
	case l.Dense != nil:
		return "dense"
	}
	return "empty"
}

func (l Layer) output(in Shape) (Shape, error) {
	set := 0
	for _, on := range []bool{l.Conv != nil, l.MaxPool != nil, l.Dense != nil} {
		if on {
			set++
		}
	}
	if set != 1 {
		return Shape{}, errors.New("a layer is exactly one of conv, maxpool, dense")
	}
	switch {
	case l.Conv != nil:
		c := l.Conv
		s := c.Step()
		if c.Filters < 1 || c.Filters > MaxChannels || c.Kernel < 1 || c.Kernel > MaxSide || s < 1 || s > c.Kernel || c.Padding < 0 || c.Padding >= c.Kernel {
			return Shape{}, fmt.Errorf("filters %d, kernel %d, stride %d, padding %d: filters must be 1 to %d, kernel 1 to %d, stride 1 to the kernel, padding below the kernel", c.Filters, c.Kernel, s, c.Padding, MaxChannels, MaxSide)
		}
		h, w := in.Height+2*c.Padding-c.Kernel, in.Width+2*c.Padding-c.Kernel
		if h < 0 || w < 0 {
			return Shape{}, fmt.Errorf("kernel %dx%d does not fit", c.Kernel, c.Kernel)
		}
		return Shape{h/s + 1, w/s + 1, c.Filters}, nil
	case l.MaxPool != nil:
		n := l.MaxPool.Size
		if n < 1 || n > kernel.MaxWindow || n > in.Height || n > in.Width {
			return Shape{}, fmt.Errorf("window %dx%d: must fit and be at most %dx%d", n, n, kernel.MaxWindow, kernel.MaxWindow)
		}
		return Shape{in.Height / n, in.Width / n, in.Channels}, nil
	default:
		u := l.Dense.Units
		if u < 1 || u > MaxParameters {
			return Shape{}, fmt.Errorf("%d units: must be 1 to %d", u, MaxParameters)
		}
		return Shape{1, 1, u}, nil
	}
}

// Step is the convolution's stride, at least 1.
func (c *Conv) Step() int {
	if c.Stride == 0 {
		return 1
	}
	return c.Stride
}

func (l Layer) parameterSizes(in Shape) (weights, biases int) {
	switch {
	case l.Conv != nil:
		return l.Conv.Kernel * l.Conv.Kernel * in.Channels * l.Conv.Filters, l.Conv.Filters
	case l.Dense != nil:
		return in.Size() * l.Dense.Units, l.Dense.Units
	}
	return 0, 0
}

// Parameter is one weight or bias tensor; Data is a window into the network's
// flat parameter vector.
type Parameter struct {
	Name  string // "LAYER.weight" or "LAYER.bias"
	Layer int
	Shape []int // conv weight [kernel, kernel, in, out], dense weight [in, out], bias [out]
	Data  []float32
}

// Network is a description with weights.
type Network struct {
	Description
	Parameters []Parameter
	flat       []float32
	shapes     []Shape
}

// Zero makes a network whose parameters are all zero.
func Zero(d Description) (*Network, error) {
	shapes, err := d.Shapes()
	if err != nil {
		return nil, err
	}
	n := &Network{Description: d, shapes: shapes}
	total := 0
	for i, l := range d.Layers {
		w, b := l.parameterSizes(shapes[i])
		total += w + b
	}
	n.flat = make([]float32, total)
	at := 0
	add := func(layer int, kind string, shape ...int) {
		size := 1
		for _, s := range shape {
			size *= s
		}
		n.Parameters = append(n.Parameters, Parameter{
			Name: fmt.Sprintf("%d.%s", layer, kind), Layer: layer, Shape: shape,
			Data: n.flat[at : at+size : at+size],
		})
		at += size
	}
	for i, l := range d.Layers {
		switch {
		case l.Conv != nil:
			add(i, "weight", l.Conv.Kernel, l.Conv.Kernel, shapes[i].Channels, l.Conv.Filters)
			add(i, "bias", l.Conv.Filters)
		case l.Dense != nil:
			add(i, "weight", shapes[i].Size(), l.Dense.Units)
			add(i, "bias", l.Dense.Units)
		}
	}
	return n, nil
}

// New makes a network with random weights: U(-1/sqrt(fan in), 1/sqrt(fan in))
// for weights and biases, as PyTorch initialises convolutions and dense
// layers. The same description and seed give the same weights.
func New(d Description, seed uint64) (*Network, error) {
	n, err := Zero(d)
	if err != nil {
		return nil, err
	}
	rng := rand.New(rand.NewPCG(seed, 0x6e6e)) // a stream of its own beside those of training
	bound := 0.0
	for _, p := range n.Parameters {
		if len(p.Shape) > 1 {
			fanIn := len(p.Data) / p.Shape[len(p.Shape)-1]
			bound = 1 / math.Sqrt(float64(fanIn))
		}
		for i := range p.Data {
			p.Data[i] = float32((2*rng.Float64() - 1) * bound)
		}
	}
	return n, nil
}

// Flat is the vector of all parameters, in the order of Parameters; writing
// to it changes the network.
func (n *Network) Flat() []float32 { return n.flat }

// LayerShapes returns the input shape followed by each layer's output shape.
func (n *Network) LayerShapes() []Shape { return n.shapes }

// Weights returns a layer's weight and bias, nil for a layer without.
func (n *Network) Weights(layer int) (weight, bias []float32) {
	for i, p := range n.Parameters {
		if p.Layer == layer {
			return p.Data, n.Parameters[i+1].Data
		}
	}
	return nil, nil
}

// Clone copies the network.
func (n *Network) Clone() *Network {
	c, err := Zero(n.Description)
	if err != nil {
		panic("nn: clone of an invalid network: " + err.Error()) // n was built by Zero, so its description is valid
	}
	copy(c.flat, n.flat)
	return c
}

// Check refuses weights that no trained network has: NaN, infinity, a
// magnitude above 1e6, or a tensor of weights that is all zero.
func (n *Network) Check() error {
	for _, p := range n.Parameters {
		zero := true
		for i, v := range p.Data {
			if a := math.Abs(float64(v)); !(a <= maxWeight) {
				return fmt.Errorf("parameter %s[%d] is %v: weights must be finite and at most %.0e in magnitude", p.Name, i, v, maxWeight)
			}
			zero = zero && v == 0
		}
		if zero && len(p.Shape) > 1 {
			return fmt.Errorf("parameter %s is all zero: the model was never trained or is damaged", p.Name)
		}
	}
	return nil
}

// maxWeight is orders of magnitude above any trained weight.
const maxWeight = 1e6

// Loss computes, for rows lo to hi of a batch, the gradient of each row's loss
// with respect to its logits: logits and grad hold those rows only, as
// [hi-lo, classes]. A batch is worked on in pieces by several goroutines, so a
// Loss is called concurrently for different rows; a piece starts at an even
// row, so that rows 2i and 2i+1 of a batch come together (TRADES pairs a clean
// example with its adversarial one). A loss that reports values does so
// through its closure, by row.
type Loss func(logits, grad []float32, lo, hi int)
