package attack

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/temper-ml/temper/models/nn/kernel"
	"github.com/temper-ml/temper/models/unknown"
)

// Threat says what an attacker may do: change an image by at most Epsilon in
// the given norm. Pixels are in [0,1] before and after.
type Threat struct {
	Norm    string  `yaml:"norm" json:"norm"`       // "linf" or "l2"
	Epsilon float64 `yaml:"epsilon" json:"epsilon"` // in pixels of [0,1]; in linf 1 and above allows every image
}

// Norms are the norms a threat can name.
func Norms() []string { return []string{"l2", "linf"} }

// Validate reports what is wrong with the threat, naming the key.
func (t Threat) Validate() error {
	if !slices.Contains(Norms(), t.Norm) {
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
	if t.Norm == "l2" {
		return L2(t.Epsilon), nil
	}
	return Linf(t.Epsilon), nil
}

// Verify checks in float32 that every pixel of adv [n, size] is in the box
// [0,1] and that every image is within the ball around the one of clean.
func (t Threat) Verify(adv, clean []float32, size int) error {
	if len(adv) != len(clean) || size < 1 || len(adv)%size != 0 {
		return fmt.Errorf("attack: %d adversarial pixels for %d clean ones, in images of %d", len(adv), len(clean), size)
	}
	for at := 0; at < len(adv); at += size {
		for i, v := range adv[at : at+size] {
			if !(v >= 0 && v <= 1) {
				return fmt.Errorf("attack: pixel %d of adversarial image %d is %v: outside of [0,1]", i, at/size, v)
			}
		}
		if d := t.Distance(adv[at:at+size], clean[at:at+size]); !(d <= float64(float32(t.Epsilon))) {
			return fmt.Errorf("attack: image %d moved by %v in %s: more than epsilon %v", at/size, d, t.Norm, t.Epsilon)
		}
	}
	return nil
}

// Distance is the threat's norm of the difference of two images: of pixels
// subtracted in float32, summed in float64.
func (t Threat) Distance(x, clean []float32) float64 {
	if t.Norm == "l2" {
		return l2Distance(x, clean)
	}
	most := float32(0)
	for i, v := range x {
		d := v - clean[i]
		most = max(most, d, -d) // NaN stays
	}
	return float64(most)
}

// Ball is a threat model: the images an attacker may turn a clean image into.
// Every attack is a loop over its operations. All slices hold the pixels of
// one image.
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

// surfaced is a Ball with APGD's random start: a draw that is stretched to the
// ball's surface, then clipped to the box.
type surfaced interface {
	Ball
	surfaceStart(x, clean []float32, rng *rand.PCG)
}

// Linf is the ball in the maximum norm: every pixel may change by the radius.
type Linf float32

// Project clips every pixel to [clean-r, clean+r] and [0,1].
func (r Linf) Project(x, clean []float32) {
	kernel.SignStep(x, clean, clean, 0, r.reach()) // a step of no length is the projection alone
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

func (r Linf) surfaceStart(x, clean []float32, rng *rand.PCG) {
	clear(x)
	addNoise(x, x, 1, rng)
	most := float32(tiny)
	for _, v := range x {
		most = max(most, v, -v)
	}
	scale := float32(min(r, 1)) / most
	for i, v := range x {
		x[i] = clean[i] + v*scale
	}
	r.Project(x, clean)
}

// L2 is the ball in the Euclidean norm.
type L2 float32

// Project shortens the way from clean to the radius, then clips to the box,
// which shortens it further as clean is in the box.
func (r L2) Project(x, clean []float32) {
	clipBox(x)
	norm := l2Distance(x, clean)
	if norm <= float64(r) {
		return
	}
	// A little less than the radius, for what rounding adds; where the radius
	// is so small that rounding matters more, a lot less.
	for _, scale := range []float64{1 - 1e-6, 1 - 1e-3, 0.5} {
		s := float32(scale * float64(r) / norm)
		for i, v := range x {
			x[i] = min(max(clean[i]+(v-clean[i])*s, 0), 1)
		}
		if norm = l2Distance(x, clean); norm <= float64(r) {
			return
		}
	}
	copy(x, clean)
}

// Step moves by alpha along the gradient; a zero gradient leaves x alone.
func (L2) Step(x, gradient []float32, alpha float32) {
	if norm := l2Norm(gradient); norm > 0 {
		s := float64(alpha) / norm
		for i, g := range gradient {
			x[i] += float32(float64(g) * s)
		}
	}
}

// RandomStart draws uniformly from the ball and clips to the box.
func (r L2) RandomStart(x, clean []float32, rng *rand.PCG) {
	u := rand.New(rng).Float64()
	r.drawAt(float64(r)*math.Pow(u, 1/float64(len(x))), x, clean, rng)
}

func (r L2) surfaceStart(x, clean []float32, rng *rand.PCG) { r.drawAt(float64(r), x, clean, rng) }

// drawAt goes a distance in a random direction.
func (r L2) drawAt(distance float64, x, clean []float32, rng *rand.PCG) {
	normal := rand.New(rng)
	for i := range x {
		x[i] = float32(normal.NormFloat64())
	}
	s := float32(distance / (l2Norm(x) + tiny))
	for i, v := range x {
		x[i] = clean[i] + v*s
	}
	r.Project(x, clean)
}

func l2Norm(x []float32) float64 {
	sum := 0.0
	for _, v := range x {
		sum += float64(v) * float64(v)
	}
	return math.Sqrt(sum)
}

func l2Distance(x, clean []float32) float64 {
	sum := 0.0
	for i, v := range x {
		d := float64(v - clean[i])
		sum += d * d
	}
	return math.Sqrt(sum)
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
func (Noisy) Project(x, clean []float32) { clipBox(x) }

func clipBox(x []float32) {
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
