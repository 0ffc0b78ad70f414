// Package graph compiles a network to Gorgonia graphs: one whose output is the
// gradient with respect to the input, for attacks, and one whose output is the
// gradient with respect to the weights, for training.
//
// Gorgonia derives both from the forward graph (symbolic differentiation).
// What the wanted gradient does not need is left out of its program, so an
// attack never computes a weight gradient. Every operator is ours and owns its
// memory; the arithmetic is in package kernel. A program is the list of
// operators in order: Gorgonia's tape machine would run it too, but hands each
// run to another thread, which costs more than the arithmetic of a small
// network (BenchmarkTapeMachine).
//
// A batch is cut into pieces of fixed size. Each goroutine runs a program of
// its own over one piece at a time, so that the activations of a piece stay in
// its core's cache and a step needs one synchronisation only. The pieces do not
// depend on the number of goroutines and their weight gradients are added in
// order, so neither does any result.
package graph

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"gorgonia.org/gorgonia"
	"gorgonia.org/tensor"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/kernel"
)

const (
	minPiece  = 32 // rows: fewer, and the weights are read too often for them
	maxPieces = 8  // bounds the partial weight gradients kept in memory
)

// Attack computes gradients with respect to a network's input. It serves one
// goroutine at a time. Changes to the network's weights count from the next
// call on.
type Attack struct{ *engine }

// Training computes gradients with respect to a network's weights. It serves
// one goroutine at a time. Changes to the network's weights count from the
// next call on.
type Training struct{ *engine }

// NewAttack compiles the gradient with respect to the input for at most batch
// rows at a time.
func NewAttack(net *nn.Network, batch int) (*Attack, error) {
	e, err := newEngine(net, batch, false, false)
	return &Attack{e}, err
}

// NewTraining compiles the gradient with respect to the weights for at most
// batch rows at a time.
func NewTraining(net *nn.Network, batch int) (*Training, error) {
	e, err := newEngine(net, batch, true, false)
	return &Training{e}, err
}

// NewFastAttack is NewAttack for training: what is behind a gradient is computed as
// fast as the kernel path can (kernel.UseFast). Logits without a gradient stay float32.
func NewFastAttack(net *nn.Network, batch int) (*Attack, error) {
	e, err := newEngine(net, batch, false, true)
	return &Attack{e}, err
}

// NewFastTraining is NewTraining with such arithmetic. Weights and their
// gradients are float32 all the same.
func NewFastTraining(net *nn.Network, batch int) (*Training, error) {
	e, err := newEngine(net, batch, true, true)
	return &Training{e}, err
}

// Logits computes the outputs [n, classes] for n rows of x. The result is
// valid until the next call.
func (a *Attack) Logits(x []float32, n int) ([]float32, error) {
	if err := a.run(x, n, 1, nil, nil); err != nil {
		return nil, err
	}
	return a.logits[:n*a.classes], nil
}

// Gradient computes, for n rows of x, the logits [n, classes] and the gradient
// of the loss with respect to each row of x. The results are valid until the
// next call.
func (a *Attack) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	if err := a.run(x, n, 1, loss, nil); err != nil {
		return nil, nil, err
	}
	return a.logits[:n*a.classes], a.dx[:n*a.size], nil
}

// Ascend computes so many times what Gradient does, and after each time calls
// move with the rows lo to hi, their logits [hi-lo, classes] and the gradient of
// the loss with respect to them, for it to move these rows of x. One goroutine
// takes rows through all steps, others at the same time other rows: goroutines
// meet once and not after every step. An error of move ends it.
func (a *Attack) Ascend(x []float32, n, steps int, loss nn.Loss, move func(step, lo, hi int, logits, dx []float32) error) error {
	return a.run(x, n, steps, loss, move)
}

// Parts are models for as many goroutines at the same time as there are cores, each
// for one piece of a batch; a is not to be used meanwhile. Their weights are those of
// now.
func (a *Attack) Parts() []nn.Model {
	a.prepare()
	a.forward[0].Refresh()
	var parts []nn.Model
	for i := range a.machines {
		parts = append(parts, &part{a.engine, i})
	}
	return parts
}

// part is a machine with the piece of that number.
type part struct {
	*engine
	number int
}

func (p *part) Batch() int { return min(p.piece, p.batch-p.number*p.piece) }

func (p *part) Logits(x []float32, n int) ([]float32, error) {
	if err := p.fits(x, n, p.Batch()); err != nil {
		return nil, err
	}
	return p.forward[p.number].Logits(x, n), nil
}

// Follow computes what Logits does; see nn.Trail.
func (p *part) Follow(x []float32, changes []nn.Change) ([]float32, error) {
	if err := p.fits(x, len(changes), p.Batch()); err != nil {
		return nil, err
	}
	return p.forward[p.number].Follow(x, changes), nil
}

func (p *part) Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error) {
	if err := p.fits(x, n, p.Batch()); err != nil {
		return nil, nil, err
	}
	first := p.number * p.piece
	p.machines[p.number].run(x[:n*p.size], p.number, first, first+n, func(logits, grad []float32, lo, hi int) { loss(logits, grad, lo-first, hi-first) })
	return p.logits[first*p.classes:][:n*p.classes], p.dx[first*p.size:][:n*p.size], nil
}

// Step computes, for n rows of x, the logits [n, classes] and, for Gradient,
// the gradient of the summed loss with respect to the weights. A loss that is
// a mean divides by n itself. The result is valid until the next call.
func (t *Training) Step(x []float32, n int, loss nn.Loss) (logits []float32, err error) {
	if err := t.run(x, n, 1, loss, nil); err != nil {
		return nil, err
	}
	t.sum(n)
	return t.logits[:n*t.classes], nil
}

// Gradient is the gradient of the last Step, in the order of the network's
// flat parameter vector.
func (t *Training) Gradient() []float32 { return t.gradient }

// engine runs a network's programs over the pieces of a batch.
type engine struct {
	net            *nn.Network
	batch, piece   int
	size, classes  int
	training       bool
	fast           bool   // kernel.UseFast
	pairsIn        []bool // of each layer, if fast: kernel.UsePairs
	pairsOut       []bool
	logits, dx     []float32     // of the whole batch
	gradient       []float32     // of the weights
	partial        [][]float32   // each piece's share of gradient
	partialTensors []parameters  // the same memory as tensors, by layer
	packed         [][]float32   // each layer's weights, as Forward takes them
	turned         [][]float32   // each layer's weights, arranged for BackwardInput
	arrange        []func()      // refreshes packed and turned
	machines       []*machine    // one a goroutine
	failed         []error       // by machine
	forward        []*nn.Forward // for calls without a loss, one a goroutine
}

type parameters map[int]*tensor.Dense

func newEngine(net *nn.Network, batch int, training, fast bool) (*engine, error) {
	if batch < 1 {
		return nil, fmt.Errorf("batch %d: must be at least 1", batch)
	}
	e := &engine{net: net, batch: batch, size: net.Input.Size(), classes: net.Classes(), training: training, fast: fast}
	e.piece = minPiece
	if training {
		e.piece = max(minPiece, (batch+maxPieces-1)/maxPieces)
	}
	e.piece += e.piece % 2 // pieces start at even rows: see nn.Loss
	pieces := (batch + e.piece - 1) / e.piece
	e.logits = make([]float32, batch*e.classes)
	if training {
		e.gradient = make([]float32, len(net.Flat()))
		for range pieces {
			flat := make([]float32, len(net.Flat()))
			e.partial = append(e.partial, flat)
			at, tensors := 0, parameters{}
			for i := range net.Layers {
				if n := layerParameters(net, i); n > 0 {
					tensors[i] = vector(flat[at : at+n])
					at += n
				}
			}
			e.partialTensors = append(e.partialTensors, tensors)
		}
	} else {
		e.dx = make([]float32, batch*e.size)
	}
	if fast {
		e.usePairs()
	}
	e.packed, e.turned = make([][]float32, len(net.Layers)), make([][]float32, len(net.Layers))
	for i := range net.Layers {
		weighted := e.arithmetic(i)
		if weighted == nil {
			continue
		}
		w, _ := net.Weights(i)
		e.packed[i] = w
		arranged := len(w)
		if packer, ok := weighted.(kernel.Packer); ok {
			arranged = packer.Arranged()
			packed := make([]float32, arranged)
			e.packed[i] = packer.Pack(packed, w)
			e.arrange = append(e.arrange, func() { packer.Pack(packed, w) })
		}
		if training && net.Inputs(i)[0] == -1 { // training never needs the gradient of its input
			continue
		}
		turned := make([]float32, arranged)
		e.turned[i] = turned
		e.arrange = append(e.arrange, func() { weighted.Turn(turned, w) })
	}
	if training && len(e.gradient) == 0 {
		return nil, fmt.Errorf("network %q has no parameters to train", net.Name)
	}
	forward, err := nn.NewForward(net, e.piece)
	if err != nil {
		return nil, err
	}
	for range min(pieces, runtime.GOMAXPROCS(0)) {
		m, err := e.compile()
		if err != nil {
			return nil, fmt.Errorf("network %q: %w", net.Name, err)
		}
		e.machines = append(e.machines, m)
		e.forward = append(e.forward, forward.Another())
	}
	e.failed = make([]error, len(e.machines))
	return e, nil
}

// arithmetic returns that of a layer with parameters, nil for one without.
func (e *engine) arithmetic(layer int) kernel.Weighted {
	weighted, _ := e.net.Arithmetic(layer)
	if pooled := e.net.ConvPool(layer); pooled != nil {
		weighted = pooled
	}
	if e.fast {
		kernel.UseFast(weighted)
		kernel.UsePairs(weighted, e.pairsIn[layer], e.pairsOut[layer])
	} else {
		kernel.UseWinograd(weighted)
	}
	return weighted
}

// usePairs finds the layers between which outputs and gradients are pairs of bfloat16:
// those with parameters of which one alone takes the other's output.
func (e *engine) usePairs() {
	e.pairsIn, e.pairsOut = make([]bool, len(e.net.Layers)), make([]bool, len(e.net.Layers))
	for to := range e.net.Layers {
		last := e.net.Inputs(to)[0]
		from := last
		if from > 0 && e.net.ConvPool(from-1) != nil {
			from--
		}
		if from < 0 || !e.net.TakenOnce(last, to) {
			continue
		}
		if a, b := e.arithmetic(from), e.arithmetic(to); a != nil && b != nil && kernel.FitPairs(a, b) {
			e.pairsOut[from], e.pairsIn[to] = true, true
		}
	}
}

// layerParameters counts a layer's weights and biases, which lie side by side
// in the flat vector.
func layerParameters(net *nn.Network, layer int) int {
	w, b := net.Weights(layer)
	return len(w) + len(b)
}

// Batch is the largest number of rows of one call.
func (e *engine) Batch() int { return e.batch }

// Network is the network whose weights are read.
func (e *engine) Network() *nn.Network { return e.net }

// run works on n rows of x so many times, forward only where loss is nil, and
// each time calls move, if any.
func (e *engine) run(x []float32, n, times int, loss nn.Loss, move func(step, lo, hi int, logits, dx []float32) error) error {
	if err := e.fits(x, n, e.batch); err != nil {
		return err
	}
	if loss == nil {
		e.forward[0].Refresh()
		// Nothing depends on the pieces here: small ones leave the cache to the weights.
		return e.each((n+minPiece-1)/minPiece, func(worker, piece int) error {
			lo := piece * minPiece
			hi := min(lo+minPiece, n)
			copy(e.logits[lo*e.classes:], e.forward[worker].Logits(x[lo*e.size:hi*e.size], hi-lo))
			return nil
		})
	}
	e.prepare()
	return e.each((n+e.piece-1)/e.piece, func(worker, piece int) error {
		lo := piece * e.piece
		hi := min(lo+e.piece, n)
		rows := x[lo*e.size : hi*e.size]
		for step := range times {
			e.machines[worker].run(rows, piece, lo, hi, loss)
			if move == nil {
				continue
			}
			if err := move(step, lo, hi, e.logits[lo*e.classes:hi*e.classes], e.dx[lo*e.size:hi*e.size]); err != nil {
				return err
			}
		}
		return nil
	})
}

// fits refuses rows that x does not have or that are more than there is room for.
func (e *engine) fits(x []float32, n, most int) error {
	if n < 1 || n > most || len(x) < n*e.size {
		return fmt.Errorf("network %q: %d rows of %d values given as %d values: want 1 to %d rows", e.net.Name, n, e.size, len(x), most)
	}
	return nil
}

// prepare arranges the weights as they are now.
func (e *engine) prepare() {
	e.each(len(e.arrange), func(_, i int) error { e.arrange[i](); return nil })
}

// each calls work for 0 to n-1 from as many goroutines as there are machines.
func (e *engine) each(n int, work func(worker, i int) error) error {
	var next atomic.Int64
	loop := func(worker int) {
		e.failed[worker] = nil
		for {
			i := int(next.Add(1)) - 1
			if i >= n {
				return
			}
			if err := work(worker, i); err != nil {
				e.failed[worker] = err
				return
			}
		}
	}
	workers := min(n, len(e.machines))
	var wait sync.WaitGroup
	for w := 1; w < workers; w++ {
		wait.Go(func() { loop(w) })
	}
	loop(0)
	wait.Wait()
	for _, err := range e.failed[:workers] {
		if err != nil {
			return err
		}
	}
	return nil
}

// sum adds the pieces' weight gradients in order.
func (e *engine) sum(n int) {
	pieces := (n + e.piece - 1) / e.piece
	const chunk = 16 << 10
	e.each((len(e.gradient)+chunk-1)/chunk, func(_, i int) error {
		lo, hi := i*chunk, min((i+1)*chunk, len(e.gradient))
		copy(e.gradient[lo:hi], e.partial[0][lo:hi])
		for _, p := range e.partial[1:pieces] {
			kernel.Add(e.gradient[lo:hi], p[lo:hi])
		}
		return nil
	})
}

// machine is a program with what its operators share.
type machine struct {
	*engine
	program []*operator
	input   []float32
	rows    int
	piece   int
	lo      int
	loss    nn.Loss

	graph     *gorgonia.ExprGraph
	gradients gorgonia.Nodes
	operators uint32                           // so far
	sums      map[*gorgonia.Node]*tensor.Dense // results of Gorgonia's additions
	direct    bool                             // the gradient of the only layer that takes the input goes straight to dx
}

func (m *machine) run(x []float32, piece, lo, hi int, loss nn.Loss) {
	copy(m.input, x)
	m.rows, m.piece, m.lo, m.loss = hi-lo, piece, lo, loss
	for _, op := range m.program {
		op.do(op.arguments)
	}
}

func matrix(rows, columns int) *tensor.Dense {
	return tensor.New(tensor.WithShape(rows, columns), tensor.WithBacking(make([]float32, rows*columns)))
}

func vector(data []float32) *tensor.Dense {
	return tensor.New(tensor.WithShape(len(data)), tensor.WithBacking(data))
}

// apply adds an operator whose result is a matrix of the piece's rows.
func (m *machine) apply(name string, columns int, do func(out []float32, in [][]float32), diff func(inputs gorgonia.Nodes, output, grad *gorgonia.Node) (gorgonia.Nodes, error), inputs ...*gorgonia.Node) (*gorgonia.Node, error) {
	result := matrix(m.engine.piece, columns)
	floats := result.Float32s()
	return m.applyTo(name, func() *tensor.Dense { return result }, func(in [][]float32) { do(floats, in) }, diff, inputs...)
}

func (m *machine) applyTo(name string, out func() *tensor.Dense, do func(in [][]float32), diff func(inputs gorgonia.Nodes, output, grad *gorgonia.Node) (gorgonia.Nodes, error), inputs ...*gorgonia.Node) (*gorgonia.Node, error) {
	m.operators++
	op := &operator{name: name, id: m.operators, out: out, do: do, diff: diff}
	for _, in := range inputs {
		op.inputs = append(op.inputs, in.Dims())
		op.arguments = append(op.arguments, m.memory(in))
	}
	return gorgonia.ApplyOp(op, inputs...)
}

// memory is where a node's value is. Where several layers take one value,
// Gorgonia adds their gradients by an operator of its own, which allocates its
// result on every run: list puts one of ours in its place.
func (m *machine) memory(n *gorgonia.Node) []float32 {
	switch op := n.Op().(type) {
	case nil:
		return n.Value().(*tensor.Dense).Float32s()
	case *operator:
		return op.out().Float32s()
	}
	if m.sums[n] == nil {
		m.sums[n] = matrix(m.engine.piece, n.Shape()[1])
	}
	return m.sums[n].Float32s()
}

// list appends to the program what computes a node.
func (m *machine) list(n *gorgonia.Node) error {
	switch op := n.Op().(type) {
	case nil:
		return nil
	case *operator:
		m.program = append(m.program, op)
		return nil
	}
	var terms [][]float32
	for parts := m.graph.From(n.ID()); parts.Next(); {
		terms = append(terms, m.memory(parts.Node().(*gorgonia.Node)))
	}
	if !strings.HasPrefix(n.Op().String(), "+") || len(terms) != 2 {
		return fmt.Errorf("operator %v of %d values in the gradient is not ours", n.Op(), len(terms))
	}
	columns := n.Shape()[1]
	out := m.memory(n)
	m.program = append(m.program, &operator{name: "sum", arguments: terms, do: func(in [][]float32) {
		size := m.rows * columns
		copy(out[:size], in[0])
		kernel.Add(out[:size], in[1][:size])
	}})
	return nil
}

// compile builds the forward graph, lets Gorgonia derive the gradients, and
// lists the operators that the wanted ones need.
func (e *engine) compile() (*machine, error) {
	m := &machine{engine: e, sums: map[*gorgonia.Node]*tensor.Dense{}}
	g := gorgonia.NewGraph()
	values := matrix(e.piece, e.size)
	m.input = values.Float32s()
	x := gorgonia.NewMatrix(g, tensor.Float32, gorgonia.WithShape(e.piece, e.size), gorgonia.WithName("x"), gorgonia.WithValue(values))

	uses := 0
	for i, l := range e.net.Layers {
		for _, from := range e.net.Inputs(i) {
			if from == -1 {
				uses++
				m.direct = uses == 1 && l.Combine == nil
			}
		}
	}
	weights := gorgonia.Nodes{}
	layers, at := gorgonia.Nodes{}, 0
	for i, l := range e.net.Layers {
		var inputs gorgonia.Nodes
		for _, from := range e.net.Inputs(i) {
			if from == -1 {
				inputs = append(inputs, x)
			} else {
				inputs = append(inputs, layers[from])
			}
		}
		if i > 0 && e.net.ConvPool(i-1) != nil {
			layers = append(layers, layers[i-1]) // which has done it
			continue
		}
		var layer *gorgonia.Node
		var err error
		if n := layerParameters(e.net, i); n > 0 {
			w := gorgonia.NewVector(g, tensor.Float32, gorgonia.WithShape(n), gorgonia.WithName(fmt.Sprintf("%d.parameters", i)), gorgonia.WithValue(vector(e.net.Flat()[at:at+n])))
			at += n
			weights = append(weights, w)
			layer, err = m.weighted(i, l, inputs[0], w)
		} else {
			layer, err = m.function(i, l, inputs)
		}
		if err != nil {
			return nil, fmt.Errorf("layer %d (%s): %w", i, l.Kind(), err)
		}
		layers = append(layers, layer)
	}

	last := layers[len(layers)-1]
	seed, err := m.apply("loss", e.classes, func(out []float32, in [][]float32) {
		logits := in[0][:m.rows*e.classes]
		copy(e.logits[m.lo*e.classes:], logits)
		m.loss(logits, out[:len(logits)], m.lo, m.lo+m.rows)
	}, nil, last)
	if err != nil {
		return nil, err
	}
	wanted := gorgonia.Nodes{x}
	if e.training {
		wanted = weights
	}
	gradients, err := gorgonia.Backpropagate(gorgonia.Nodes{last}, gorgonia.Nodes{seed}, wanted)
	if err != nil {
		return nil, err
	}
	m.graph, m.gradients = g, gradients
	nodes, err := gorgonia.Sort(g.ExactSubgraphRoots(gradients...)) // outputs first
	if err != nil {
		return nil, err
	}
	for _, n := range slices.Backward(nodes) {
		if err := m.list(n); err != nil {
			return nil, err
		}
	}
	if !e.training && !m.direct {
		m.program = append(m.program, &operator{name: "input.gradient", arguments: [][]float32{m.memory(gradients[0])}, do: func(in [][]float32) {
			copy(m.dx[m.lo*m.size:][:m.rows*m.size], in[0])
		}})
	}
	return m, nil
}

// toInput tells whether the gradient of a layer's input is the result of the
// whole program, to be written to its place at once.
func (m *machine) toInput(layer, input int) bool {
	return m.direct && !m.training && m.net.Inputs(layer)[input] == -1
}

// masked tells whether the gradient of a layer's output is that before the ReLU which
// the layer ends in: where a layer with parameters, and no other, takes it.
func (m *machine) masked(i int) bool {
	if i < 0 || !m.net.Layers[i].ReLU() {
		return false
	}
	for by := range m.net.Layers {
		if layerParameters(m.net, by) > 0 && m.net.TakenOnce(i, by) {
			return true
		}
	}
	return false
}

// unclamp is the gradient before the ReLU that a layer ends in, if it does.
func (m *machine) unclamp(i int, l nn.Layer, output, grad *gorgonia.Node) (*gorgonia.Node, error) {
	if !l.ReLU() || m.masked(i) {
		return grad, nil
	}
	size := m.net.LayerShapes()[i+1].Size()
	return m.apply(fmt.Sprintf("%d.relu.gradient", i), size, func(dz []float32, in [][]float32) {
		n := m.rows * size
		kernel.MaskPositive(dz[:n], in[0][:n], in[1][:n])
	}, nil, grad, output)
}

// weighted adds a layer with parameters.
func (m *machine) weighted(i int, l nn.Layer, x, w *gorgonia.Node) (*gorgonia.Node, error) {
	in, out := m.net.InputShapes(i)[0], m.net.LayerShapes()[i+1]
	weight, bias := m.net.Weights(i)
	split := len(weight)
	arith := m.arithmetic(i)
	relu, unclamp := l.ReLU(), m.unclamp
	name := fmt.Sprintf("%d.%s", i, l.Kind())
	if m.net.ConvPool(i) != nil {
		out = m.net.LayerShapes()[i+2]
		name += "+pool"
		unclamp = func(_ int, _ nn.Layer, _, grad *gorgonia.Node) (*gorgonia.Node, error) { return grad, nil } // part of the gradients
	}
	diff := func(inputs gorgonia.Nodes, output, grad *gorgonia.Node) (gorgonia.Nodes, error) {
		grad, err := unclamp(i, l, output, grad)
		if err != nil {
			return nil, err
		}
		direct, masked := m.toInput(i, 0), m.masked(m.net.Inputs(i)[0])
		dx, err := m.apply(name+".input.gradient", in.Size(), func(dx []float32, in [][]float32) {
			if direct {
				dx = m.dx[m.lo*m.size:]
			}
			var mask []float32
			if masked {
				mask = in[2]
			}
			arith.BackwardInput(dx, in[0], m.turned[i], mask, m.rows)
		}, nil, grad, inputs[1], inputs[0])
		if err != nil {
			return nil, err
		}
		dw, err := m.applyTo(name+".weight.gradient", func() *tensor.Dense {
			if !m.training {
				return vector(make([]float32, split+len(bias))) // never run: an attack leaves it out
			}
			return m.partialTensors[m.piece][i]
		}, func(args [][]float32) {
			d := m.partialTensors[m.piece][i].Float32s()
			arith.BackwardWeight(d[:split], d[split:], args[0], args[1], m.rows)
		}, nil, inputs[0], grad)
		return gorgonia.Nodes{dx, dw}, err
	}
	return m.apply(name, out.Size(), func(y []float32, in [][]float32) {
		arith.Forward(y, in[0], m.packed[i], in[1][split:], m.rows, relu)
	}, diff, x, w)
}

// function adds a layer without parameters.
func (m *machine) function(i int, l nn.Layer, x gorgonia.Nodes) (*gorgonia.Node, error) {
	shapes, out := m.net.InputShapes(i), m.net.LayerShapes()[i+1]
	_, arith := m.net.Arithmetic(i)
	name := fmt.Sprintf("%d.%s", i, l.Kind())
	diff := func(inputs gorgonia.Nodes, output, grad *gorgonia.Node) (gorgonia.Nodes, error) {
		grad, err := m.unclamp(i, l, output, grad)
		if err != nil {
			return nil, err
		}
		if c := l.Combine; c != nil && c.Operator == "add" && shapes[0] == shapes[1] && inputs[0] != inputs[1] {
			return gorgonia.Nodes{grad, grad}, nil // a sum's gradient is that of each term
		}
		var gradients gorgonia.Nodes
		for k := range inputs {
			direct := m.toInput(i, k)
			dx, err := m.apply(fmt.Sprintf("%s.gradient.%d", name, k), shapes[k].Size(), func(dx []float32, args [][]float32) {
				if direct {
					dx = m.dx[m.lo*m.size:]
				}
				arith.Backward(dx, k, args[0], args[1], args[2:], m.rows)
			}, nil, append(gorgonia.Nodes{grad, output}, inputs...)...)
			if err != nil {
				return nil, err
			}
			gradients = append(gradients, dx)
		}
		return gradients, nil
	}
	return m.apply(name, out.Size(), func(y []float32, in [][]float32) { arith.Forward(y, in, m.rows) }, diff, x...)
}
