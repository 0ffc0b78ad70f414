package attack

import (
	"math"

	"github.com/temper-ml/temper/models/nn"
)

// CrossEntropy is the loss against true labels, whose ascent makes a network
// err: gradient softmax(z) - onehot(label) for each row, not divided by the
// number of rows.
func CrossEntropy(labels []uint8, classes int) nn.Loss {
	return func(logits, grad []float32, lo, hi int) {
		Softmax(grad, logits, classes)
		for i, y := range labels[lo:hi] {
			grad[i*classes+int(y)]--
		}
	}
}

// Divergence is KL(target || softmax(z)) for each row, against the rows of
// probabilities in targets [n, classes]: gradient softmax(z) - target, not
// divided by the number of rows.
func Divergence(targets []float32, classes int) nn.Loss {
	return func(logits, grad []float32, lo, hi int) {
		Softmax(grad, logits, classes)
		for i, p := range targets[lo*classes : hi*classes] {
			grad[i] -= p
		}
	}
}

// Softmax writes the probabilities of each row of logits [n, classes] to p.
// Subtracting the row's maximum first keeps it finite for all finite logits.
func Softmax(p, logits []float32, classes int) {
	for at := 0; at < len(logits); at += classes {
		z, p := logits[at:at+classes], p[at:at+classes]
		top, sum := z[Predict(z)], 0.0
		for i, v := range z {
			e := math.Exp(float64(v) - float64(top))
			p[i] = float32(e)
			sum += e
		}
		for i, e := range p {
			p[i] = float32(float64(e) / sum)
		}
	}
}

// Value is the cross-entropy of one row of logits against its label.
func Value(logits []float32, label uint8) float64 {
	top, sum := float64(logits[Predict(logits)]), 0.0
	for _, v := range logits {
		sum += math.Exp(float64(v) - top)
	}
	return math.Log(sum) + top - float64(logits[label])
}

// Predict is the class of one row of logits: the first greatest one.
func Predict(logits []float32) int {
	best := 0
	for i, v := range logits {
		if v > logits[best] {
			best = i
		}
	}
	return best
}
