package train

import (
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
)

// batches makes the rows of each optimiser step. What a step draws depends on
// the seed and the step only, so a resumed training draws the same.
type batches struct {
	train         *dataset.Set
	seed          uint64
	rows          int // images a batch
	shift         int // pixels
	size, classes int
	kept          int // rows that stay clean, but for TRADES
	model         attack.Model

	epoch   int // whose order is in order; -1 for none
	order   []int
	labels  []uint8
	clean   []float32 // [rows, size]
	adv     []float32 // [rows, size]
	paired  []float32 // [2 rows, size], clean and adversarial by turns: for TRADES
	targets []float32 // [rows, classes], probabilities of the clean images
	loop    attack.Loop
	rng     *rand.PCG
}

func newBatches(train *dataset.Set, model attack.Model, recipe Recipe, seed uint64) *batches {
	net := model.Network()
	b := &batches{
		train: train, seed: seed, rows: recipe.Batch, shift: recipe.Shift, size: net.Input.Size(), classes: net.Classes(),
		kept: recipe.CleanRows(), model: model,
		epoch: -1, order: make([]int, train.Len()), labels: make([]uint8, recipe.Batch),
		loop: attack.Loop{Model: model}, rng: rand.NewPCG(0, 0),
	}
	b.clean, b.adv = make([]float32, b.rows*b.size), make([]float32, b.rows*b.size)
	if recipe.Uses("trades") {
		b.paired, b.targets = make([]float32, 2*b.rows*b.size), make([]float32, b.rows*b.classes)
	}
	return b
}

// perEpoch is the number of batches in an epoch. Images that do not fill a
// last batch wait for the next epoch, whose order is another.
func (b *batches) perEpoch() int { return b.train.Len() / b.rows }

// The random streams of an epoch's order and of a step's shifts, apart from
// those of the rows.
const (
	orderStream = math.MaxUint64
	shiftStream = math.MaxUint64 - 1
)

// load reads the clean images of a step.
func (b *batches) load(step int) {
	if epoch := step / b.perEpoch(); epoch != b.epoch {
		b.epoch = epoch
		for i := range b.order {
			b.order[i] = i
		}
		attack.Seed(b.rng, b.seed, uint64(epoch), orderStream)
		rand.New(b.rng).Shuffle(len(b.order), func(i, j int) { b.order[i], b.order[j] = b.order[j], b.order[i] })
	}
	at := step % b.perEpoch() * b.rows
	index := b.order[at : at+b.rows]
	b.train.Gather(b.clean, index)
	for i, at := range index {
		b.labels[i] = b.train.Labels[at]
	}
	if b.shift > 0 {
		attack.Seed(b.rng, b.seed, uint64(step), shiftStream)
		draw := rand.New(b.rng)
		for row := range b.rows {
			down, right := draw.IntN(2*b.shift+1)-b.shift, draw.IntN(2*b.shift+1)-b.shift
			shift(b.clean[row*b.size:][:b.size], b.train.Shape, down, right)
		}
	}
}

// shift moves an image in place; what comes in is black.
func shift(x []float32, s nn.Shape, down, right int) {
	line := s.Width * s.Channels
	by := right * s.Channels
	for i := range s.Height {
		y := i
		if down > 0 {
			y = s.Height - 1 - i // the last first: the row read is not yet written
		}
		to, from := x[y*line:][:line], y-down
		switch {
		case from < 0 || from >= s.Height || by <= -line || by >= line:
			clear(to)
		case by >= 0:
			copy(to[by:], x[from*line:][:line-by])
			clear(to[:by])
		default:
			copy(to, x[from*line-by:][:line+by])
			clear(to[line+by:])
		}
	}
}

// objective is what an optimiser step lowers: rows of images and their loss.
type objective struct {
	x     []float32
	n     int
	loss  nn.Loss                        // gradient of the mean over the batch
	value func(logits []float32) float64 // the mean itself
}

// make prepares a step: it loads clean images and attacks them as m says.
func (b *batches) make(step int, m method) (objective, error) {
	b.load(step)
	if m.ball == nil {
		return b.crossEntropy(b.clean), nil
	}
	kept := b.kept
	if m.trades {
		kept = 0
	}
	copy(b.adv, b.clean)
	adv, clean := b.adv[kept*b.size:], b.clean[kept*b.size:]
	if m.start != nil {
		b.loop.Start(m.start, adv, clean, b.rows-kept, b.seed, uint64(step))
	}
	loss := attack.CrossEntropy(b.labels[kept:], b.classes)
	if m.trades {
		logits, err := b.model.Logits(b.clean, b.rows)
		if err != nil {
			return objective{}, err
		}
		attack.Softmax(b.targets, logits, b.classes)
		loss = attack.Divergence(b.targets, b.classes)
	}
	b.loop.Ball, b.loop.Alpha = m.ball, m.alpha
	if err := b.loop.Ascend(adv, clean, b.rows-kept, m.steps, loss); err != nil {
		return objective{}, err
	}
	if m.trades {
		return b.tradeoff(m.beta), nil
	}
	return b.crossEntropy(b.adv), nil
}

// crossEntropy is the mean cross-entropy of the images x.
func (b *batches) crossEntropy(x []float32) objective {
	sum := attack.CrossEntropy(b.labels, b.classes)
	scale := 1 / float32(b.rows)
	return objective{
		x: x, n: b.rows,
		loss: func(logits, grad []float32, lo, hi int) {
			sum(logits, grad, lo, hi)
			for i := range grad[:(hi-lo)*b.classes] {
				grad[i] *= scale
			}
		},
		value: func(logits []float32) float64 {
			total := 0.0
			for i, y := range b.labels {
				total += attack.Value(logits[i*b.classes:(i+1)*b.classes], y)
			}
			return total / float64(b.rows)
		},
	}
}

// tradeoff is the loss of TRADES (Zhang et al. 2019): the mean of
// CE(clean) + beta KL(p_clean || p_adv), with gradients through both.
func (b *batches) tradeoff(beta float64) objective {
	for row := range b.rows {
		at, end := row*b.size, (row+1)*b.size
		copy(b.paired[2*at:], b.clean[at:end])
		copy(b.paired[2*at+b.size:], b.adv[at:end])
	}
	classes := b.classes
	return objective{
		x: b.paired, n: 2 * b.rows,
		loss: func(logits, grad []float32, lo, hi int) {
			attack.Softmax(grad, logits, classes)
			scale := 1 / float64(b.rows)
			for pair := lo / 2; pair < hi/2; pair++ {
				at := (2*pair - lo) * classes
				p, q := grad[at:at+classes], grad[at+classes:at+2*classes]
				zp, zq := logits[at:at+classes], logits[at+classes:at+2*classes]
				divergence, offset := divergence(p, zp, zq)
				y := int(b.labels[pair])
				for c := range p {
					pc, qc := float64(p[c]), float64(q[c])
					logRatio := float64(zp[c]) - float64(zq[c]) - offset // log p_c - log q_c
					dp := pc + beta*pc*(logRatio-divergence)
					if c == y {
						dp--
					}
					p[c] = float32(scale * dp)
					q[c] = float32(scale * beta * (qc - pc))
				}
			}
		},
		value: func(logits []float32) float64 {
			total, p := 0.0, make([]float32, classes)
			for row, y := range b.labels {
				zp, zq := logits[2*row*classes:(2*row+1)*classes], logits[(2*row+1)*classes:(2*row+2)*classes]
				attack.Softmax(p, zp, classes)
				d, _ := divergence(p, zp, zq)
				total += attack.Value(zp, y) + beta*d
			}
			return total / float64(b.rows)
		},
	}
}

// divergence is KL(p || q) of the softmaxes p of zp and q of zq, by way of
// log p_c - log q_c = zp_c - zq_c - offset, which stays finite where q
// underflows.
func divergence(p, zp, zq []float32) (kl, offset float64) {
	offset = attack.Value(zp, 0) + float64(zp[0]) - attack.Value(zq, 0) - float64(zq[0]) // log sum exp of zp less that of zq
	for c, v := range p {
		kl += float64(v) * (float64(zp[c]) - float64(zq[c]) - offset)
	}
	return kl, offset
}

// method is how the rows of one step are attacked.
type method struct {
	ball   attack.Ball // nil for standard training
	start  attack.Ball // where starts are drawn from; nil to start at the clean image
	alpha  float32
	steps  int
	trades bool
	beta   float64
}

// tradesStart is how far from the clean image TRADES starts: at the image
// itself the divergence has no gradient. (The authors draw from a Gaussian of
// this deviation.)
const tradesStart = 0.001

// rescueSteps is the number of PGD steps that replaces a single-step method
// after catastrophic overfitting.
const rescueSteps = 3

// methodAt is a phase's method for an epsilon, which a ramp may hold below full.
func methodAt(p Phase, epsilon, full float64, rescued bool) method {
	ball := attack.Linf(epsilon)
	alpha := 0.0
	if full > 0 {
		alpha = p.Alpha * epsilon / full
	}
	switch {
	case p.Method == "standard" || p.Method == "ibp": // whose adversary is the bound
		return method{}
	case p.Method == "pgd":
		return method{ball: ball, start: ball, alpha: float32(alpha), steps: p.Steps}
	case p.Method == "trades":
		return method{ball: ball, start: attack.Linf(min(tradesStart, epsilon)), alpha: float32(alpha), steps: p.Steps, trades: true, beta: p.Beta}
	case rescued:
		return method{ball: ball, start: ball, alpha: float32(epsilon / 2), steps: rescueSteps}
	case p.Method == "n-fgsm":
		noisy := attack.Noisy(epsilon)
		return method{ball: noisy, start: noisy, alpha: float32(epsilon), steps: 1}
	case p.Method == "fgsm":
		return method{ball: ball, alpha: float32(epsilon), steps: 1}
	}
	panic(fmt.Sprintf("train: method %q passed Recipe.Validate", p.Method)) // a method was added there and not here
}
