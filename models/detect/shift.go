package detect

import (
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/temper-ml/temper/models/nn"
)

// Shift is a benign change of the images: what a camera, its mount and the
// light do. It must raise drift, and never an attack.
type Shift struct {
	Kind   string  // "noise", "rotation" or "brightness"
	Amount float64 // standard deviation in pixels of [0,1]; degrees, either way; pixels added
}

func (s Shift) String() string { return fmt.Sprintf("%s %v", s.Kind, s.Amount) }

// CalibrationShifts are those that a detector is calibrated on.
var CalibrationShifts = []Shift{
	{"noise", 0.1}, {"noise", 0.2}, {"noise", 0.3},
	{"rotation", 15}, {"rotation", 30}, {"rotation", 45},
	{"brightness", -0.3}, {"brightness", -0.15}, {"brightness", 0.05}, {"brightness", 0.15}, {"brightness", 0.3},
}

// TestShifts are others, to judge a detector by.
var TestShifts = []Shift{
	{"noise", 0.15}, {"noise", 0.25},
	{"rotation", 20}, {"rotation", 25}, {"rotation", 40},
	{"brightness", -0.2}, {"brightness", 0.1}, {"brightness", 0.2},
}

// Apply returns n changed images; pixels stay in [0,1].
func (s Shift) Apply(x []float32, n int, shape nn.Shape, seed uint64) []float32 {
	rng := rand.New(rand.NewPCG(seed, uint64(len(s.Kind))))
	out := make([]float32, len(x))
	size := shape.Size()
	for i := range n {
		from, to := x[i*size:(i+1)*size], out[i*size:(i+1)*size]
		switch s.Kind {
		case "noise":
			for j, v := range from {
				to[j] = v + float32(rng.NormFloat64()*s.Amount)
			}
		case "rotation":
			rotate(to, from, shape, s.Amount*float64(1-2*rng.IntN(2)))
		case "brightness":
			for j, v := range from {
				to[j] = v + float32(s.Amount)
			}
		default:
			panic("detect: no such shift: " + s.Kind)
		}
		for j, v := range to {
			to[j] = min(max(v, 0), 1)
		}
	}
	return out
}

// rotate turns an image about its centre, bilinearly; what comes in from
// outside is 0.
func rotate(dst, x []float32, s nn.Shape, degrees float64) {
	sin, cos := math.Sincos(degrees * math.Pi / 180)
	cy, cx := float64(s.Height-1)/2, float64(s.Width-1)/2
	at := func(y, xx, c int) float64 {
		if y < 0 || y >= s.Height || xx < 0 || xx >= s.Width {
			return 0
		}
		return float64(x[(y*s.Width+xx)*s.Channels+c])
	}
	for y := range s.Height {
		for xx := range s.Width {
			dy, dx := float64(y)-cy, float64(xx)-cx
			fromX, fromY := cos*dx+sin*dy+cx, cos*dy-sin*dx+cy
			x0, y0 := math.Floor(fromX), math.Floor(fromY)
			u, v := fromX-x0, fromY-y0
			for c := range s.Channels {
				top := at(int(y0), int(x0), c)*(1-u) + at(int(y0), int(x0)+1, c)*u
				bottom := at(int(y0)+1, int(x0), c)*(1-u) + at(int(y0)+1, int(x0)+1, c)*u
				dst[(y*s.Width+xx)*s.Channels+c] = float32(top*(1-v) + bottom*v)
			}
		}
	}
}
