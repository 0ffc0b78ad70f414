package interval

import (
	"math"
	"testing"
)

// tail is P(X >= k) for X binomial(n, p), summed from logarithms: independent
// of the Beta quantiles under test.
func tail(k, n int, p float64) float64 {
	sum := 0.0
	for i := k; i <= n; i++ {
		a, _ := math.Lgamma(float64(n + 1))
		b, _ := math.Lgamma(float64(i + 1))
		c, _ := math.Lgamma(float64(n - i + 1))
		sum += math.Exp(a - b - c + float64(i)*math.Log(p) + float64(n-i)*math.Log1p(-p))
	}
	return sum
}

// The bounds are by definition where the binomial tails equal 1 - confidence.
func TestBoundsSolveTheBinomialTails(t *testing.T) {
	for _, n := range []int{1, 10, 300, 1000, 10000} {
		for _, k := range []int{0, 1, n / 50, n / 2, n - 1, n} {
			for _, confidence := range []float64{0.5, 0.95, 0.999} {
				lower, upper := Lower(k, n, confidence), Upper(k, n, confidence)
				if k == 0 && lower != 0 || k == n && upper != 1 {
					t.Errorf("%d of %d: bounds %v, %v", k, n, lower, upper)
				}
				if k > 0 {
					if got := tail(k, n, lower); math.Abs(got-(1-confidence)) > 1e-6 {
						t.Errorf("%d of %d at %v: lower bound %v: tail %v", k, n, confidence, lower, got)
					}
				}
				if k < n {
					if got := 1 - tail(k+1, n, upper); math.Abs(got-(1-confidence)) > 1e-6 {
						t.Errorf("%d of %d at %v: upper bound %v: tail %v", k, n, confidence, upper, got)
					}
				}
			}
		}
	}
}

// The closed forms of no success and of no failure in n trials:
// 1 - 0.05^(1/n) and 0.05^(1/n).
func TestClosedForms(t *testing.T) {
	want := math.Pow(0.05, 0.1)
	if got := Lower(10, 10, 0.95); math.Abs(got-want) > 1e-12 {
		t.Errorf("lower bound of 10 of 10: %v, want %v", got, want)
	}
	if got := Upper(0, 10, 0.95); math.Abs(got-(1-want)) > 1e-12 {
		t.Errorf("upper bound of 0 of 10: %v, want %v", got, 1-want)
	}
}

func TestMeaninglessCountsProveNothing(t *testing.T) {
	for _, c := range []struct {
		successes, trials int
		confidence        float64
	}{{-1, 10, 0.95}, {11, 10, 0.95}, {0, 0, 0.95}, {5, -1, 0.95}, {5, 10, 0}, {5, 10, 1}, {5, 10, math.NaN()}, {5, 10, math.Inf(1)}, {math.MaxInt / 4, math.MaxInt / 2, 0.99}} {
		if l, u := Lower(c.successes, c.trials, c.confidence), Upper(c.successes, c.trials, c.confidence); l != 0 || u != 1 {
			t.Errorf("%+v: bounds %v to %v, want 0 to 1", c, l, u)
		}
	}
}
