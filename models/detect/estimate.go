package detect

import "math"

const (
	// estimateBins are of the distance of a pixel to black or white, 0 to 0.5.
	estimateBins = 128
	// estimateShare is how many of the pixels must lie at one distance before
	// that is taken for an attack's: among clean images of strokes it is 1%.
	estimateShare = 0.05
)

// Epsilon estimates by how much an L-infinity attack changed the pixels of
// images (each a slice of the same length), from where pixels pile up: an
// attack moves most by exactly epsilon, and those that were black or white lie
// there afterwards. It returns 0 where they do not pile up, as in photographs,
// which have few black and white pixels.
func Epsilon(images [][]float32) float64 {
	var count, sum [estimateBins]float64
	total := 0.0
	for _, x := range images {
		for _, v := range x {
			d := float64(min(v, 1-v))
			total++
			if b := int(math.Round(d * 2 * estimateBins)); b > 1 && b < estimateBins {
				count[b]++
				sum[b] += d
			}
		}
	}
	best := 0
	for b := range count {
		if count[b] > count[best] {
			best = b
		}
	}
	if best == 0 || count[best] < estimateShare*total {
		return 0
	}
	return math.Round(1000*sum[best]/count[best]) / 1000
}

// Share estimates the share of hostile requests among n of which some were
// flagged, from the shares of clean and of attacked images that are.
func (d *Detector) Share(flagged, n uint64) float64 {
	c := &d.Calibration
	clean := float64(c.Attack.Exceeded) / float64(max(c.Attack.Trials, 1))
	if n == 0 || c.Caught <= clean {
		return 0
	}
	return min(max((float64(flagged)/float64(n)-clean)/(c.Caught-clean), 0), 1)
}
