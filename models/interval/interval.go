// Package interval bounds a probability from a count of successes.
package interval

import "gonum.org/v1/gonum/mathext"

// Lower is the one-sided Clopper-Pearson lower bound of a success probability
// after some successes in independent trials: over repeated samples it is at
// most the true probability in at least the fraction confidence of them.
// Counts or a confidence that mean nothing (negative, more successes than
// trials, confidence outside 0 to 1) prove nothing: the bound is 0.
//
// Source: Clopper and Pearson, Biometrika 26 (1934), as Beta quantiles.
func Lower(successes, trials int, confidence float64) float64 {
	if !valid(successes, trials, confidence) || successes == 0 {
		return 0
	}
	if p := mathext.InvRegIncBeta(float64(successes), float64(trials-successes+1), 1-confidence); p >= 0 {
		return p
	}
	return 0 // NaN: counts near 2^62 are beyond the algorithm
}

// Upper is the one-sided Clopper-Pearson upper bound, as Lower; 1 where
// nothing is proven.
func Upper(successes, trials int, confidence float64) float64 {
	if !valid(successes, trials, confidence) || successes == trials {
		return 1
	}
	if p := mathext.InvRegIncBeta(float64(successes+1), float64(trials-successes), confidence); p <= 1 {
		return p
	}
	return 1
}

func valid(successes, trials int, confidence float64) bool {
	return successes >= 0 && successes <= trials && confidence > 0 && confidence < 1
}
