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
		for i, y := range labels[lo:hi] {
			crossEntropy(logits[i*classes:(i+1)*classes], grad[i*classes:(i+1)*classes], y)
		}
	}
}

// crossEntropy is the gradient of CrossEntropy for one row.
func crossEntropy(logits, grad []float32, label uint8) {
	Softmax(grad, logits, len(logits))
	grad[label]--
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

// tiny keeps the ratios below defined where all logits are equal.
const tiny = 1e-12

// dlr is the difference of logits ratio (Croce and Hein 2020), which scaling
// the logits does not change: -(z_y - max of the others) / (z_(1) - z_(3)). It
// returns the loss of one row and writes its gradient to grad, unless that is
// nil. It needs three classes.
func dlr(logits, grad []float32, label uint8) float64 {
	top := ranked(logits)
	other := top[0]
	if other == int(label) {
		other = top[1]
	}
	return ratio(logits, grad, int(label), other, func(z []float32) float64 {
		return float64(z[top[0]]) - float64(z[top[2]])
	}, func(grad []float32, d float64) {
		grad[top[0]] += float32(d)
		grad[top[2]] -= float32(d)
	})
}

// targetedDLR is dlr towards one class: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2).
// It needs four classes.
func targetedDLR(logits, grad []float32, label, target uint8) float64 {
	top := ranked(logits)
	return ratio(logits, grad, int(label), int(target), func(z []float32) float64 {
		return float64(z[top[0]]) - (float64(z[top[2]])+float64(z[top[3]]))/2
	}, func(grad []float32, d float64) {
		grad[top[0]] += float32(d)
		grad[top[2]] -= float32(d / 2)
		grad[top[3]] -= float32(d / 2)
	})
}

// ratio is n / d with n = z_other - z_label and d the spread of the logits; add
// adds a multiple of the spread's gradient.
func ratio(logits, grad []float32, label, other int, spread func([]float32) float64, add func([]float32, float64)) float64 {
	n, d := float64(logits[other])-float64(logits[label]), spread(logits)+tiny
	if grad != nil {
		clear(grad)
		grad[other] += float32(1 / d)
		grad[label] -= float32(1 / d)
		add(grad, -n/(d*d))
	}
	return n / d
}

// ranked returns the classes of the four greatest logits, greatest first; of
// equal ones the first is the greater, as for Predict. Missing ones are 0.
func ranked(logits []float32) (top [4]int) {
	n := 0
	for i, v := range logits {
		at := n
		for at > 0 && v > logits[top[at-1]] {
			at--
		}
		if at == len(top) {
			continue
		}
		n = min(n+1, len(top))
		copy(top[at+1:n], top[at:])
		top[at] = i
	}
	return top
}

// margin is how far the label's logit is above that of every other class.
func margin(logits []float32, label uint8) float32 {
	other := float32(math.Inf(-1))
	for i, v := range logits {
		if i != int(label) {
			other = max(other, v)
		}
	}
	return logits[label] - other
}
