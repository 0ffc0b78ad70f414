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
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"

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

// Description is a network without its weights: what models/zoo holds. Layers
// come in an order in which each finds what it takes before it.
type Description struct {
	Name   string  `yaml:"name" json:"name"`
	Input  Shape   `yaml:"input" json:"input"`
	Layers []Layer `yaml:"layers" json:"layers"`
}

// Limits on a description: far above the networks Temper is for, and low
// enough that a hostile file cannot ask for unbounded memory.
const (
	MaxLayers     = 512
	maxInputs     = 64 // of one layer
	MaxSide       = 1024
	MaxChannels   = 8192
	MaxParameters = 64 << 20
	maxMultiplied = 1 << 34 // multiply-adds of one forward pass
	maxActivity   = 1 << 24 // values of one example over all layers
)

// Shapes returns the input shape followed by each layer's output shape. Each
// layer but the last is taken by a later one; the last makes one value for each
// class.
func (d *Description) Shapes() ([]Shape, error) {
	in := d.Input
	if in.Height < 1 || in.Width < 1 || in.Channels < 1 || in.Height > MaxSide || in.Width > MaxSide || in.Channels > MaxChannels {
		return nil, fmt.Errorf("network %q: input %v: height and width must be 1 to %d, channels 1 to %d", d.Name, in, MaxSide, MaxChannels)
	}
	if len(d.Layers) == 0 || len(d.Layers) > MaxLayers {
		return nil, fmt.Errorf("network %q: %d layers: must be 1 to %d", d.Name, len(d.Layers), MaxLayers)
	}
	shapes := []Shape{in}
	taken := make([]bool, len(d.Layers))
	parameters, multiplied, activity := 0, 0, in.Size()
	for i, l := range d.Layers {
		fail := func(err error) error {
			return fmt.Errorf("network %q: layer %d (%s) on input %v: %w", d.Name, i, l.Kind(), in, err)
		}
		if len(l.From) > maxInputs {
			return nil, fail(fmt.Errorf("from names %d layers: at most %d", len(l.From), maxInputs))
		}
		var inputs []Shape
		for _, from := range d.Inputs(i) {
			if from < -1 || from >= i {
				return nil, fail(fmt.Errorf("from names layer %d: must be an earlier one, or -1 for the network's input", from))
			}
			if from >= 0 {
				taken[from] = true
			}
			inputs = append(inputs, shapes[from+1])
		}
		in = inputs[0]
		out, err := l.Output(inputs...)
		if err != nil {
			return nil, fail(err)
		}
		work := out.Size()
		op, _ := l.operation()
		if w, ok := op.(weighted); ok {
			size := product(w.weightShape(in))
			parameters += size + biasSize(w, in)
			work = size * out.Height * out.Width
		}
		if l.AvgPool != nil {
			work = out.Size() * max(l.AvgPool.Size*l.AvgPool.Size, 1)
		}
		if l.MaxPool != nil {
			work = out.Size() * l.MaxPool.Size * l.MaxPool.Size
		}
		multiplied += work
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
	last := len(d.Layers) - 1
	for i, taken := range taken[:last] {
		if !taken {
			return nil, fmt.Errorf("network %q: layer %d (%s) is taken by no other: remove it or name it in a from", d.Name, i, d.Layers[i].Kind())
		}
	}
	if d.Layers[last].ReLU() {
		return nil, fmt.Errorf("network %q: the last layer must be without relu: its values are the logits", d.Name)
	}
	if in.Height != 1 || in.Width != 1 {
		return nil, fmt.Errorf("network %q: the last layer makes %v: must be a single pixel, its channels are the classes", d.Name, in)
	}
	if in.Channels < 2 {
		return nil, fmt.Errorf("network %q: %d classes: must be at least 2", d.Name, in.Channels)
	}
	return shapes, nil
}

// Inputs are the layers whose outputs a layer takes, -1 for the network's
// input.
func (d *Description) Inputs(layer int) []int {
	if from := d.Layers[layer].From; len(from) > 0 {
		return from
	}
	return []int{layer - 1}
}

// Classes is the number of outputs of the last layer, 0 where the description
// is not valid.
func (d *Description) Classes() int {
	if n := len(d.Layers); n > 0 && d.Layers[n-1].Dense != nil {
		return d.Layers[n-1].Dense.Units
	}
	shapes, err := d.Shapes()
	if err != nil {
		return 0
	}
	return shapes[len(shapes)-1].Channels
}

// Normalised puts a normalisation of the input before the first layer, which
// must not have one. mean and std have one number for all channels or one for
// each, in pixels of [0,1].
func (d Description) Normalised(mean, std []float32) (Description, error) {
	for i, l := range d.Layers {
		if l.Normalise != nil && d.Inputs(i)[0] == -1 {
			return d, fmt.Errorf("network %q normalises its input already: mean %v, std %v", d.Name, l.Normalise.Mean, l.Normalise.Std)
		}
	}
	layers := []Layer{{Normalise: &Normalise{Mean: mean, Std: std}}}
	for _, l := range d.Layers {
		from := slices.Clone(l.From)
		for k := range from {
			from[k]++
		}
		l.From = from
		layers = append(layers, l)
	}
	d.Layers = layers
	_, err := d.Shapes()
	return d, err
}

// Normalised is the network behind a normalisation of its input, with a copy of
// its weights; see (Description).Normalised.
func (n *Network) Normalised(mean, std []float32) (*Network, error) {
	d, err := n.Description.Normalised(mean, std)
	if err != nil {
		return nil, err
	}
	out, err := Zero(d)
	if err != nil {
		return nil, err
	}
	copy(out.flat, n.flat)
	return out, nil
}

func product(shape []int) int {
	size := 1
	for _, s := range shape {
		size *= s
	}
	return size
}

func biasSize(w weighted, in Shape) int {
	shape := w.weightShape(in)
	return shape[len(shape)-1]
}

// Parameter is one weight or bias tensor; Data is a window into the network's
// flat parameter vector.
type Parameter struct {
	Name  string // "LAYER.weight" or "LAYER.bias"
	Layer int
	Shape []int // conv weight [kernel, kernel, in / groups, out], dense weight [in, out], affine weight and any bias [out]
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
	n.flat = make([]float32, d.size(shapes))
	at := 0
	add := func(layer int, kind string, shape ...int) {
		size := product(shape)
		n.Parameters = append(n.Parameters, Parameter{
			Name: fmt.Sprintf("%d.%s", layer, kind), Layer: layer, Shape: shape,
			Data: n.flat[at : at+size : at+size],
		})
		at += size
	}
	for i := range d.Layers {
		if w, in := n.weighted(i, shapes); w != nil {
			add(i, "weight", w.weightShape(in)...)
			add(i, "bias", biasSize(w, in))
		}
	}
	return n, nil
}

// weighted is layer i, with its input's shape, where it has parameters.
func (d *Description) weighted(i int, shapes []Shape) (weighted, Shape) {
	op, err := d.Layers[i].operation()
	if err != nil {
		panic("nn: " + err.Error()) // Shapes refuses such a layer
	}
	w, _ := op.(weighted)
	return w, shapes[d.Inputs(i)[0]+1]
}

// Size is the number of parameters, 0 where the description is not valid.
func (d *Description) Size() int {
	shapes, err := d.Shapes()
	if err != nil {
		return 0
	}
	return d.size(shapes)
}

func (d *Description) size(shapes []Shape) (total int) {
	for i := range d.Layers {
		if w, in := d.weighted(i, shapes); w != nil {
			total += product(w.weightShape(in)) + biasSize(w, in)
		}
	}
	return total
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
		if n.Layers[p.Layer].Affine != nil { // starts as the identity
			if strings.HasSuffix(p.Name, ".weight") {
				for i := range p.Data {
					p.Data[i] = 1
				}
			}
			continue
		}
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

// InputShapes returns the shapes that a layer takes.
func (n *Network) InputShapes(layer int) []Shape {
	var in []Shape
	for _, from := range n.Inputs(layer) {
		in = append(in, n.shapes[from+1])
	}
	return in
}

// Classes is the number of outputs.
func (n *Network) Classes() int { return n.shapes[len(n.shapes)-1].Channels }

// Arithmetic computes a layer: one of the two is nil, the first for a layer
// without parameters, the second for one with. Each call makes one anew, with
// scratch memory of its own.
func (n *Network) Arithmetic(layer int) (kernel.Weighted, kernel.Function) {
	op, err := n.Layers[layer].operation()
	if err != nil {
		panic("nn: " + err.Error()) // Shapes refuses such a layer
	}
	return op.arithmetic(n.InputShapes(layer), n.shapes[layer+1])
}

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

// Model answers and is attacked. Rows of x are images [n, input] with
// n <= Batch(); the rows returned are valid until the next call, and each
// depends on its own image only. It serves one goroutine at a time.
type Model interface {
	Network() *Network
	Batch() int
	Logits(x []float32, n int) ([]float32, error)
	// Gradient returns the logits [n, classes] and the gradient [n, input] of
	// each row's loss with respect to its image.
	Gradient(x []float32, n int, loss Loss) (logits, dx []float32, err error)
}
