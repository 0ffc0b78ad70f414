package train

import (
	"context"
	"fmt"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
)

// heldOut are images that are not trained on, to attack the weights on.
type heldOut struct {
	x      []float32
	labels []uint8
	model  attack.Model
	seed   uint64
}

// holdOut takes the first images of validation, at most so many.
func holdOut(validation *dataset.Set, most int, model attack.Model, seed uint64) heldOut {
	n := min(most, validation.Len())
	h := heldOut{make([]float32, n*validation.Shape.Size()), validation.Labels[:n], model, seed}
	validation.Read(h.x, 0, n)
	return h
}

// accuracy is the share of the images that the attack fails on. It is short
// and not interrupted: see trainer.advance.
func (h *heldOut) accuracy(a attack.Attack) (float64, error) {
	adv, err := a.Perturb(context.Background(), h.model, h.x, h.labels, h.seed)
	if err != nil {
		return 0, err
	}
	size, classes, right := h.model.Network().Input.Size(), h.model.Network().Classes(), 0
	for lo := 0; lo < len(h.labels); lo += h.model.Batch() {
		hi := min(lo+h.model.Batch(), len(h.labels))
		logits, err := h.model.Logits(adv[lo*size:hi*size], hi-lo)
		if err != nil {
			return 0, err
		}
		for i, y := range h.labels[lo:hi] {
			if attack.Predict(logits[i*classes:(i+1)*classes]) == int(y) {
				right++
			}
		}
	}
	return float64(right) / float64(len(h.labels)), nil
}

const (
	bestImages = 1000 // held out
	bestSteps  = 20   // of APGD, which finds what PGD of as many steps overlooks
)

// best keeps the weights that held out best against APGD.
type best struct {
	heldOut
	weights  []float32 // those of step
	step     int       // 0 before the first look
	accuracy float64
}

// look keeps weights, those of a step, where none before withstood the threat
// better. The network is as before afterwards.
func (b *best) look(weights []float32, step int, threat attack.Threat) (accuracy float64, err error) {
	flat := b.model.Network().Flat()
	training := append([]float32(nil), flat...)
	copy(flat, weights)
	accuracy, err = b.heldOut.accuracy(attack.APGD(threat, "apgd-ce", bestSteps, 1))
	if err == nil && (b.step == 0 || accuracy >= b.accuracy) { // of equals the one trained longest
		copy(b.weights, flat)
		b.step, b.accuracy = step, accuracy
	}
	copy(flat, training)
	if err != nil {
		return 0, fmt.Errorf("keep_best: %w", err)
	}
	return accuracy, nil
}
