package attack

import "context"

// FGSM is the fast gradient method (Goodfellow et al. 2015): one step of
// epsilon up the cross-entropy from the clean image; in the maximum norm along
// the gradient's sign.
func FGSM(t Threat) Attack { return fgsm{t} }

type fgsm struct{ threat Threat }

func (fgsm) Name() string { return "fgsm" }

func (a fgsm) Perturb(ctx context.Context, m Model, x []float32, labels []uint8, _ uint64) ([]float32, error) {
	size, classes, err := check(m, a.threat, x, labels)
	if err != nil {
		return nil, err
	}
	ball, err := a.threat.Ball()
	if err != nil {
		return nil, err
	}
	loop := Loop{Model: m, Ball: ball, Alpha: float32(a.threat.Epsilon)}
	adv := append([]float32(nil), x...)
	for lo := 0; lo < len(labels); lo += m.Batch() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		hi := min(lo+m.Batch(), len(labels))
		if err := loop.Ascend(adv[lo*size:hi*size], x[lo*size:hi*size], hi-lo, 1, CrossEntropy(labels[lo:hi], classes)); err != nil {
			return nil, err
		}
	}
	return adv, a.threat.Verify(adv, x, size)
}
