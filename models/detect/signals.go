// Package detect notices that a served classifier is under attack: signals on
// each request, one calibrated score from them, and an alarm on the stream of
// scores. It tells requests that are merely unlike the usual ones (noise, a
// turned camera, another light) from hostile ones. Every per-input detector
// falls to an attacker who knows it, so a detector raises alarms and collects
// evidence; the robust model is the defence.
package detect

import (
	"math"

	"github.com/temper-ml/temper/models/nn"
)

// The signals, cheap to compute and from what a server has anyway. The first
// three are L1 distances between two softmax outputs, from 0 (the same answer)
// to 2 (certain of different classes).
const (
	Disagreement   = iota // the served model and the guard
	BitDepth              // the served model on the input and on it at 1 bit
	Median                // the served model on the input and on its 2x2 median
	Margin                // of the served model's two highest logits
	Energy                // log of the sum of the exponentials of its logits
	Confidence            // its highest probability
	Mahalanobis           // distance of its logits to those of the nearest class
	TotalVariation        // mean absolute difference of neighbouring pixels
	Histogram             // L1 distance of the pixels' histogram to the usual one
	signalCount
)

// SignalNames names the signals in files. A change of what a signal measures
// is a new name, so that an old calibration is never read as a new one.
var SignalNames = [signalCount]string{
	"guard-disagreement", "squeeze-1-bit", "squeeze-median-2x2",
	"margin", "energy", "confidence", "mahalanobis-logits",
	"total-variation", "histogram-16",
}

const (
	// farthest is the largest L1 distance between two distributions.
	farthest = 2
	// histogramBins divide the pixels' range.
	histogramBins = 16
	// limit bounds the signals that have no bound of their own, so that a score
	// is finite for any finite input.
	limit = 1e12
)

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

// Squeeze writes to dst what the squeezers make of n images for people to look
// at: the 2x2 median, rounded to 1 bit.
func Squeeze(dst, x []float32, n int, s nn.Shape) {
	squeezeMedian(dst, x, n, s)
	squeezeBit(dst, dst)
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

// margin and energy of a row of finite logits.
func margin(logits []float32) (margin, energy float64) {
	top, second := math.Inf(-1), math.Inf(-1)
	for _, v := range logits {
		if v := float64(v); v > top {
			top, second = v, top
		} else {
			second = max(second, v)
		}
	}
	sum := 0.0
	for _, v := range logits {
		sum += math.Exp(float64(v) - top)
	}
	return min(top-second, limit), min(max(top+math.Log(sum), -limit), limit)
}

// totalVariation is the mean absolute difference of neighbouring pixels, per
// value of the image.
func totalVariation(x []float32, s nn.Shape) float64 {
	row, sum := s.Width*s.Channels, 0.0
	for y := range s.Height {
		for j := range row {
			v := float64(x[y*row+j])
			if j >= s.Channels {
				sum += math.Abs(v - float64(x[y*row+j-s.Channels]))
			}
			if y > 0 {
				sum += math.Abs(v - float64(x[(y-1)*row+j]))
			}
		}
	}
	return min(sum/float64(s.Size()), limit)
}

// histogram adds the shares of an image's values in each bin.
func histogram(sum *[histogramBins]float64, x []float32) {
	one := 1 / float64(len(x))
	for _, v := range x {
		sum[int(min(max(v*histogramBins, 0), histogramBins-1))] += one
	}
}
