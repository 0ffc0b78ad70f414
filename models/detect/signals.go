// Package detect notices that a served classifier is under attack: signals on
// each request, one calibrated score from them, and an alarm on the stream of
// scores. Every per-input detector falls to an attacker who knows it, so a
// detector raises alarms and collects evidence; the robust model is the
// defence.
package detect

import (
	"math"

	"github.com/temper-ml/temper/models/nn"
)

// The signals. Each is an L1 distance between two softmax outputs, from 0
// (the same answer) to 2 (certain of different classes).
const (
	Disagreement = iota // the served model and the guard
	BitDepth            // the served model on the input and on it at 1 bit
	Median              // the served model on the input and on its 2x2 median
	signalCount
)

// SignalNames names the signals in files. A change of what a signal measures
// is a new name, so that an old calibration is never read as a new one.
var SignalNames = [signalCount]string{"guard-disagreement", "squeeze-1-bit", "squeeze-median-2x2"}

// farthest is the largest L1 distance between two distributions.
const farthest = 2

// squeezeBit rounds each pixel to 0 or 1, which undoes perturbations smaller
// than the distance to 0.5.
//
// Source: Xu, Evans, Qi, "Feature Squeezing" (NDSS 2018).
func squeezeBit(dst, x []float32) {
	for i, v := range x {
		dst[i] = 0
		if v >= 0.5 {
			dst[i] = 1
		}
	}
}

// squeezeMedian replaces each value of n images by the median of itself and
// its neighbours above, to the left, and above left; edges are repeated. Of
// the two values in the middle it takes the larger, as the source does.
func squeezeMedian(dst, x []float32, n int, s nn.Shape) {
	row := s.Width * s.Channels
	for i := range n {
		from, to := x[i*s.Size():(i+1)*s.Size()], dst[i*s.Size():(i+1)*s.Size()]
		for y := range s.Height {
			up := max(y-1, 0)
			for j := range row {
				left := j - s.Channels
				if left < 0 {
					left = j
				}
				a, b := order(from[y*row+j], from[y*row+left])
				c, d := order(from[up*row+j], from[up*row+left])
				// The second largest of four in two ordered pairs.
				to[y*row+j] = max(min(b, d), max(a, c))
			}
		}
	}
}

func order(a, b float32) (low, high float32) { return min(a, b), max(a, b) }

// softmax writes the softmax of a row of logits to p, and returns the most
// probable class. It reports false where the logits are not finite.
func softmax(p []float64, logits []float32) (label int, ok bool) {
	for i, v := range logits {
		if v > logits[label] {
			label = i
		}
	}
	top, sum := float64(logits[label]), 0.0
	for i, v := range logits {
		p[i] = math.Exp(float64(v) - top)
		sum += p[i]
	}
	for i := range p {
		p[i] /= sum
	}
	return label, !math.IsNaN(sum) && !math.IsInf(top, 0)
}

// distance is the L1 distance between two softmax outputs. A model that
// overflows on an input does not answer, which is as far as answers can be.
func distance(p, q []float64, ok bool) float64 {
	if !ok {
		return farthest
	}
	sum := 0.0
	for i := range p {
		sum += math.Abs(p[i] - q[i])
	}
	return sum
}
