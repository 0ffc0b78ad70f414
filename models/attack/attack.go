// Package attack makes adversarial examples: images changed within a threat
// model so that a network misclassifies them.
//
// A threat model is three operations (Ball); every attack is a loop over them
// (Loop), and training uses the same loop. What an attack returns is checked
// against the threat before anyone sees it. Random draws depend on the seed
// and the image's index only, so neither the batch size nor the number of
// processors changes a result.
package attack

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/unknown"
)

// Model is a network under attack. Rows of x are images [n, input] with
// n <= Batch(); the rows returned are valid until the next call, and each
// depends on its own image only.
type Model interface {
	Network() *nn.Network
	Batch() int
	Logits(x []float32, n int) ([]float32, error)
	// Gradient returns the logits [n, classes] and the gradient [n, input] of
	// each row's loss with respect to its image.
	Gradient(x []float32, n int, loss nn.Loss) (logits, dx []float32, err error)
}

// Attack turns images into adversarial ones.
type Attack interface {
	Name() string // as Parse reads it
	// Perturb attacks the images x [len(labels), input]. The result has the
	// same shape and is verified to be within the threat. A gradient that is
	// not finite is an error.
	Perturb(ctx context.Context, m Model, x []float32, labels []uint8, seed uint64) ([]float32, error)
}

// Limits on an attack read from a name, so that a mistyped one is an error
// and not an endless run.
const (
	maxSteps    = 10_000
	maxRestarts = 1_000
)

// noiseDraws is the usual number of draws of the noise attack: what an honest
// gradient attack must beat.
const noiseDraws = 100

// Names are the forms that Parse reads, as examples.
func Names() []string { return []string{"fgsm", "noise", "noise-50", "pgd-20", "pgd-50x10"} }

// Parse reads an attack's name: fgsm, pgd-STEPS, pgd-STEPSxRESTARTS (steps of
// epsilon/8 each), noise (100 draws) or noise-DRAWS.
func Parse(spec string, t Threat) (Attack, error) {
	if err := t.Validate(); err != nil {
		return nil, err
	}
	kind, numbers, given := strings.Cut(spec, "-")
	switch {
	case spec == "fgsm":
		return FGSM(t), nil
	case spec == "noise":
		return Noise(t, noiseDraws), nil
	case kind == "noise" && given:
		draws, err := count(numbers, maxRestarts)
		if err != nil {
			return nil, fmt.Errorf("attack %q: draws: %w", spec, err)
		}
		return Noise(t, draws), nil
	case kind == "pgd" && given:
		first, second, given := strings.Cut(numbers, "x")
		steps, err := count(first, maxSteps)
		if err != nil {
			return nil, fmt.Errorf("attack %q: steps: %w", spec, err)
		}
		restarts := 1
		if given {
			if restarts, err = count(second, maxRestarts); err != nil {
				return nil, fmt.Errorf("attack %q: restarts: %w", spec, err)
			}
		}
		return PGD(t, PGDConfig{Steps: steps, Restarts: restarts}), nil
	}
	return nil, unknown.Name("attack", spec, Names())
}

func count(s string, most int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > most || strconv.Itoa(n) != s {
		return 0, fmt.Errorf("%q is not a number from 1 to %d", s, most)
	}
	return n, nil
}

// check refuses input that no attack can work on, and returns the sizes of an
// image and of a row of logits.
func check(m Model, t Threat, x []float32, labels []uint8) (size, classes int, err error) {
	if err := t.Validate(); err != nil {
		return 0, 0, err
	}
	size, classes = m.Network().Input.Size(), m.Network().Classes()
	if len(x) != len(labels)*size {
		return 0, 0, fmt.Errorf("attack: %d pixels for %d labels: the network takes images of %d", len(x), len(labels), size)
	}
	for i, y := range labels {
		if int(y) >= classes {
			return 0, 0, fmt.Errorf("attack: label %d of image %d: the network has %d classes", y, i, classes)
		}
	}
	for i, v := range x {
		if !(v >= 0 && v <= 1) {
			return 0, 0, fmt.Errorf("attack: pixel %d of image %d is %v: outside of [0,1]", i%size, i/size, v)
		}
	}
	return size, classes, nil
}

// Seed starts rng on the stream that belongs to a seed and two indices, such
// as those of an image and a restart.
func Seed(rng *rand.PCG, seed, i, j uint64) { rng.Seed(seed, mix(mix(i)+j)) }

// mix is the finaliser of SplitMix64 (Steele et al. 2014).
func mix(z uint64) uint64 {
	z += 0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
