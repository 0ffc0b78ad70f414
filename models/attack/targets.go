package attack

import "slices"

// maxTargets is how many classes a targeted attack tries: those of rank 2 to
// 10, as AutoAttack does.
const maxTargets = 9

// targetsOf lists the classes that a targeted attack tries, those that the
// network finds likeliest first. into is reused.
func targetsOf(into []uint8, logits []float32, label uint8) []uint8 {
	into = into[:0]
	for class := range logits {
		if class != int(label) {
			into = append(into, uint8(class))
		}
	}
	slices.SortStableFunc(into, func(a, b uint8) int {
		switch {
		case logits[a] > logits[b]:
			return -1
		case logits[a] < logits[b]:
			return 1
		}
		return 0
	})
	return into[:min(len(into), maxTargets)]
}
