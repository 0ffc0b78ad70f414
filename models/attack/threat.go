package attack

import (
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/temper-ml/temper/models/unknown"
)

// Threat says what an attacker may do: change an image by at most Epsilon in
// the given norm. Pixels are in [0,1] before and after.
type Threat struct {
	Norm    string  `yaml:"norm" json:"norm"`       // "linf"
	Epsilon float64 `yaml:"epsilon" json:"epsilon"` // in pixels of [0,1]; 1 and above allows every image
}

// Norms are the norms a threat can name.
func Norms() []string { return []string{"linf"} }

// Validate reports what is wrong with the threat, naming the key.
func (t Threat) Validate() error {
	if t.Norm != "linf" {
		return fmt.Errorf("threat.norm: %w", unknown.Name("norm", t.Norm, Norms()))
	}
	if !(t.Epsilon >= 0) || math.IsInf(t.Epsilon, 0) {
		return fmt.Errorf("threat.epsilon is %v: must be a number from 0, in pixels of [0,1]", t.Epsilon)
	}
	return nil
}

// Ball returns the threat's three operations.
func (t Threat) Ball() (Ball, error) {
	if err := t.Validate(); err != nil {
		return nil, err
	}
	return Linf(t.Epsilon), nil
}

// Verify checks in float32 that every pixel of adv is in the box [0,1] and
// that adv is within the ball around clean.
func (t Threat) Verify(adv, clean []float32) error {
	if len(adv) != len(clean) {
		return fmt.Errorf("attack: %d adversarial pixels for %d clean ones", len(adv), len(clean))
	}
	epsilon := float32(t.Epsilon)
	for i, v := range adv {
		if !(v >= 0 && v <= 1) {
			return fmt.Errorf("attack: adversarial pixel %d is %v: outside of [0,1]", i, v)
		}
		if d := v - clean[i]; !(d <= epsilon && -d <= epsilon) {
			return fmt.Errorf("attack: pixel %d moved by %v: more than epsilon %v", i, d, epsilon)
		}
	}
	return nil
}

// Ball is a threat model: the images an attacker may turn a clean image into.
// Every attack is a loop over its three operations. All slices hold the
// pixels of one image.
type Ball interface {
	// Project moves x to the nearest image allowed: within the ball around
	// clean and within the box [0,1].
	Project(x, clean []float32)
	// Step moves x by alpha, measured in the ball's norm, in the direction
	// that raises the loss fastest. x may leave the ball.
	Step(x, gradient []float32, alpha float32)
	// RandomStart writes to x an image drawn from the ball around clean.
	RandomStart(x, clean []float32, rng *rand.PCG)
}

// Linf is the ball in the maximum norm: every pixel may change by the radius.
type Linf float32

// Project clips every pixel to [clean-r, clean+r] and [0,1].
func (r Linf) Project(x, clean []float32) {
	reach := r.reach()
	clean = clean[:len(x)]
	for i, v := range x {
		c := clean[i]
		x[i] = min(max(v, c-reach, 0), c+reach, 1)
	}
}

// reach is the radius less what rounding can add: between 0 and 1, c+reach and
// c-reach are rounded by at most 2^-25, so that |x-c| <= r also holds as
// float32 arithmetic computes it. From radius 1 the box alone decides.
func (r Linf) reach() float32 {
	if r >= 1 {
		return 1
	}
	return max(0, math.Nextafter32(float32(r)-1.0/(1<<25), 0))
}

// Step adds alpha times the sign of the gradient; a zero gradient leaves its
// pixel alone.
func (Linf) Step(x, gradient []float32, alpha float32) { signStep(x, gradient, alpha) }

func signStep(x, gradient []float32, alpha float32) {
	gradient = gradient[:len(x)]
	bits := math.Float32bits(alpha)
	for i, g := range gradient {
		if g != 0 {
			x[i] += math.Float32frombits(bits | math.Float32bits(g)&(1<<31))
		}
	}
}

// RandomStart draws every pixel uniformly from [clean-r, clean+r] and clips
// it to the box.
func (r Linf) RandomStart(x, clean []float32, rng *rand.PCG) {
	addNoise(x, clean, float32(min(r, 1)), rng)
	r.Project(x, clean)
}

// addNoise sets x to clean plus noise drawn from U(-r, r), two pixels of
// 32 random bits each a draw.
func addNoise(x, clean []float32, r float32, rng *rand.PCG) {
	scale := r / (1 << 31)
	for i := 0; i < len(x); i += 2 {
		u := rng.Uint64()
		x[i] = clean[i] + float32(int32(u))*scale
		if i+1 < len(x) {
			x[i+1] = clean[i+1] + float32(int32(u>>32))*scale
		}
	}
}

// Noisy is the ball of N-FGSM training (de Jorge et al. 2022, "Make some
// noise"): starts are drawn from twice the radius and only the box is kept,
// not the ball. It is for training only: its images leave the threat model.
type Noisy float32

// Project clips every pixel to [0,1].
func (Noisy) Project(x, clean []float32) {
	for i, v := range x {
		x[i] = min(max(v, 0), 1)
	}
}

// Step adds alpha times the sign of the gradient.
func (Noisy) Step(x, gradient []float32, alpha float32) { signStep(x, gradient, alpha) }

// RandomStart draws every pixel from U(clean-2r, clean+2r), clipped to the box.
func (r Noisy) RandomStart(x, clean []float32, rng *rand.PCG) {
	addNoise(x, clean, 2*float32(min(r, 1)), rng)
	r.Project(x, clean)
}
