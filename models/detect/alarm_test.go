package detect

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func mustAlarm(t testing.TB, p, alpha float64) *Alarm {
	t.Helper()
	a, err := NewAlarm(p, alpha)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// delays runs the alarm on streams of hits with a probability that change
// after a quiet time, and returns the number of observations to each alarm.
func delays(t *testing.T, p, alpha, hits float64, runs int) []int {
	a := mustAlarm(t, p, alpha)
	rng := rand.New(rand.NewPCG(1, 2))
	out := make([]int, runs)
	for i := range out {
		a.Reset()
		for range 200 {
			a.Observe(rng.Float64() < 0.02)
		}
		for n := 1; ; n++ {
			if a.Observe(rng.Float64() < hits) {
				out[i] = n
				break
			}
		}
	}
	slices.Sort(out)
	return out
}

// The delays of ROBUSTNESS.md, section 5: p 2.7%, 1/alpha = 1e6, 90% of
// hostile requests flagged, among clean ones at their rate.
func TestDelay(t *testing.T) {
	const p = 0.027
	for _, c := range []struct {
		hostile float64
		want    int
	}{{1, 5}, {0.3, 31}, {0.1, 190}} {
		got := delays(t, p, 1e-6, 0.9*c.hostile+0.02*(1-c.hostile), 500)
		median := got[len(got)/2]
		t.Logf("%3.0f%% hostile: median %d, 95%% of runs within %d", 100*c.hostile, median, got[len(got)*95/100])
		if median > c.want {
			t.Errorf("%v of the traffic hostile: median delay %d requests, want at most %d", c.hostile, median, c.want)
		}
	}
}

// About 5 labels when the error rate goes from 3% to 90%.
func TestDelayOnLabels(t *testing.T) {
	if got := delays(t, 0.03, 1e-6, 0.9, 500); got[len(got)/2] > 6 {
		t.Errorf("median delay %d labels, want about 5", got[len(got)/2])
	}
}

// The average run length to a false alarm is at least 1/alpha even when hits
// come exactly at the bound, independent or in a rhythm that keeps the bound.
func TestRunLength(t *testing.T) {
	const p, alpha, runs = 0.027, 1e-3, 200
	rng := rand.New(rand.NewPCG(3, 4))
	for name, next := range map[string]func(n int) bool{
		"independent": func(int) bool { return rng.Float64() < p },
		"dependent": func(n int) bool { // long quiet times, then hits at the bound
			return n/50%2 == 0 && rng.Float64() < p
		},
	} {
		a := mustAlarm(t, p, alpha)
		total := 0
		for range runs {
			a.Reset()
			for n := 1; ; n++ {
				total++
				if a.Observe(next(n)) {
					break
				}
			}
		}
		mean := float64(total) / runs
		t.Logf("%s: mean run length %.0f", name, mean)
		if mean < 1/alpha {
			t.Errorf("%s: mean run length %.0f, want at least %.0f", name, mean, 1/alpha)
		}
	}
}

// At the real alpha: a million requests at the bound raise at most the one
// alarm that the guarantee allows on average.
func TestQuiet(t *testing.T) {
	if testing.Short() {
		t.Skip("a simulation")
	}
	a := mustAlarm(t, 0.027, DefaultAlpha)
	rng := rand.New(rand.NewPCG(5, 6))
	alarms := 0
	for range 1_000_000 {
		if a.Observe(rng.Float64() < 0.027) {
			alarms++
			a.Reset()
		}
	}
	if alarms > 1 {
		t.Errorf("%d false alarms in a million requests", alarms)
	}
}

// One step computed by hand: with p .2 the bets are on .9 and .5.
func TestAlarmStep(t *testing.T) {
	a := mustAlarm(t, 0.2, 0.01)
	if a.Level() != 0 || math.Abs(a.Limit()-2) > 1e-12 {
		t.Fatalf("level %v, limit %v at the start", a.Level(), a.Limit())
	}
	a.Observe(true)
	m9, m5 := .9/.2, .5/.2
	a.Observe(false)
	m9, m5 = (m9+1)*.1/.8, (m5+1)*.5/.8
	if got, want := a.Level(), math.Log10(1+(m9+m5)/2); math.Abs(got-want) > 1e-12 {
		t.Errorf("level %v, want %v", got, want)
	}
}

func TestAlarmNeverOverflows(t *testing.T) {
	a := mustAlarm(t, 0.027, DefaultAlpha)
	for _, hit := range []bool{true, false} {
		for range 100_000 {
			a.Observe(hit)
			if hit && math.IsInf(a.Level(), 0) || math.IsNaN(a.Level()) {
				t.Fatal("the level is not finite")
			}
		}
	}
}

func TestAlarmRefuses(t *testing.T) {
	for _, c := range [][2]float64{{0, 1e-6}, {-1, 1e-6}, {.9, 1e-6}, {math.NaN(), 1e-6}, {.03, 0}, {.03, 1}, {.03, math.NaN()}} {
		if _, err := NewAlarm(c[0], c[1]); err == nil {
			t.Errorf("p %v, alpha %v: want an error", c[0], c[1])
		}
	}
}

// A restored alarm goes on exactly where the one before stopped.
func TestRestore(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	for _, rate := range []float64{0.01, 0.1, 0.9} {
		a, b := mustAlarm(t, 0.027, DefaultAlpha), mustAlarm(t, 0.027, DefaultAlpha)
		if err := b.Restore(a.Money()); err != nil || b.Level() != 0 {
			t.Fatalf("a new alarm: level %v, error %v", b.Level(), err)
		}
		for i := range 500 {
			hit := rng.Float64() < rate
			raised := a.Observe(hit)
			if i > 100 && (b.Observe(hit) != raised || math.Abs(a.Level()-b.Level()) > 1e-9) {
				t.Fatalf("rate %v, step %d: levels %v and %v", rate, i, a.Level(), b.Level())
			}
			if i == 100 {
				if err := b.Restore(a.Money()); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	a := mustAlarm(t, 0.027, DefaultAlpha)
	for name, money := range map[string][]float64{
		"none": nil, "few": {1}, "negative": {-1, 0, 0, 0, 0}, "NaN": {math.NaN(), 0, 0, 0, 0}, "infinite": {math.Inf(1), 0, 0, 0, 0},
	} {
		if err := a.Restore(money); err == nil {
			t.Errorf("%s: restored", name)
		}
	}
}

// However long an attack was, the alarm falls under half its limit soon after.
func TestAlarmFallsSilent(t *testing.T) {
	a := mustAlarm(t, 0.027, DefaultAlpha)
	for range 1_000_000 {
		a.Observe(true)
	}
	quiet := 0
	for a.Level() > a.Limit()/2 {
		a.Observe(false)
		quiet++
	}
	if quiet < 10 || quiet > 2000 {
		t.Errorf("silent after %d quiet requests", quiet)
	}
}
