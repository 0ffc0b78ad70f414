// Package attack makes adversarial examples: images changed within a threat
// model so that a network misclassifies them.
//
// A threat model is three operations (Ball): project, step, random start. Every
// attack is one file, a loop over them: walkAll runs one walk for each image,
// and Loop is the one of training. What an attack returns is checked against
// the threat before anyone sees it. Random draws depend on the seed and the
// image only, so neither the batch size nor the number of processors, nor which
// other images are attacked, changes a result.
package attack

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strconv"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/unknown"
)

// Model is a network under attack.
type Model = nn.Model

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
	maxQueries  = 1_000_000
	maxRestarts = 1_000
)

// noiseDraws is the usual number of draws of the noise attack: what an honest
// gradient attack must beat.
const noiseDraws = 100

// kinds are the attacks that Parse knows. A name is a kind, and for some a
// number of steps and one of restarts: KIND-STEPSxRESTARTS.
var kinds = map[string]struct {
	steps    int // where the name has none; 0 means that it must have them
	most     int // steps; 0 means that it has none
	restarts bool
	make     func(t Threat, steps, restarts int) Attack
}{
	"fgsm":     {0, 0, false, func(t Threat, _, _ int) Attack { return FGSM(t) }},
	"noise":    {noiseDraws, maxRestarts, false, func(t Threat, draws, _ int) Attack { return Noise(t, draws) }},
	"pgd":      {0, maxSteps, true, func(t Threat, steps, restarts int) Attack { return PGD(t, PGDConfig{Steps: steps, Restarts: restarts}) }},
	"apgd-ce":  {apgdSteps, maxSteps, true, func(t Threat, steps, restarts int) Attack { return APGD(t, "apgd-ce", steps, restarts) }},
	"apgd-dlr": {apgdSteps, maxSteps, true, func(t Threat, steps, restarts int) Attack { return APGD(t, "apgd-dlr", steps, restarts) }},
	"apgd-t":   {apgdSteps, maxSteps, true, func(t Threat, steps, restarts int) Attack { return APGD(t, "apgd-t", steps, restarts) }},
	"fab-t":    {fabSteps, maxSteps, false, func(t Threat, steps, _ int) Attack { return FAB(t, steps) }},
	"square":   {squareQueries, maxQueries, true, Square},
}

// Standard are the attacks of the standard ensemble in their order: those of
// AutoAttack (Croce and Hein 2020), each meant for what the ones before it did
// not break.
func Standard() []string { return []string{"apgd-ce", "apgd-t", "fab-t", "square"} }

// Names are the forms that Parse reads, as examples.
func Names() []string {
	return []string{"apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "fgsm", "noise", "noise-50", "pgd-20", "pgd-50x10", "square"}
}

var namePattern = regexp.MustCompile(`^([a-z]+(?:-[a-z]+)?)(?:-([0-9]+)(?:x([0-9]+))?)?$`)

// Parse reads an attack's name: fgsm; pgd-STEPS (of epsilon/8 each) or
// pgd-STEPSxRESTARTS; noise or noise-DRAWS; apgd-ce, apgd-dlr, apgd-t (100
// steps), fab-t (100 steps) and square (5,000 queries), as in AutoAttack, or
// with numbers as pgd.
func Parse(spec string, t Threat) (Attack, error) {
	if err := t.Validate(); err != nil {
		return nil, err
	}
	m := namePattern.FindStringSubmatch(spec)
	if m == nil {
		return nil, unknown.Name("attack", spec, Names())
	}
	kind, ok := kinds[m[1]]
	steps, restarts := kind.steps, 1
	if !ok || m[2] != "" && kind.most == 0 || m[3] != "" && !kind.restarts || m[2] == "" && steps == 0 && kind.most > 0 {
		return nil, unknown.Name("attack", spec, Names())
	}
	for _, number := range []struct {
		what, given string
		most        int
		to          *int
	}{{"steps", m[2], kind.most, &steps}, {"restarts", m[3], maxRestarts, &restarts}} {
		if number.given == "" {
			continue
		}
		n, err := count(number.given, number.most)
		if err != nil {
			return nil, fmt.Errorf("attack %q: %s: %w", spec, number.what, err)
		}
		*number.to = n
	}
	return kind.make(t, steps, restarts), nil
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

// Seed starts rng on the stream that belongs to a seed and two numbers, such as
// an image's and a restart's.
func Seed(rng *rand.PCG, seed, i, j uint64) { rng.Seed(seed, mix(mix(i)+j)) }

// mix is the finaliser of SplitMix64 (Steele et al. 2014).
func mix(z uint64) uint64 {
	z += 0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
