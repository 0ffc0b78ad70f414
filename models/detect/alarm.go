package detect

import (
	"fmt"
	"math"
)

// DefaultAlpha makes a false alarm an event of once in a million requests.
const DefaultAlpha = 1e-6

// rates are the shares of hits in hostile traffic that the alarm bets on, from
// "nearly all of it is flagged" down to just above the usual rate.
var rates = [...]float64{.9, .5, .2, .08, .045}

// Alarm watches a stream of hits, each true or false, and is raised when they
// come more often than they may. It bets: for each rate q above the bound p
// on the usual rate, one unit of money at every step, and with it all won
// before, on "hits come at rate q". A hit multiplies the money by q/p, a miss
// by (1-q)/(1-p), so while hits come at most at rate p no bet wins on average:
//
//	M_t = (M_{t-1} + 1) e_t
//
// and M_t - t is a supermartingale. The alarm is raised when the average of M
// over the rates reaches 1/alpha, so the average run length to a false alarm
// is at least 1/alpha, whatever the dependence between the hits, as long as
// the chance of each, given all before it, is at most p.
//
// Source: Shin, Ramdas, Rinaldo, "E-detectors" (2022): the e-SR detector.
// Once raised the money stops at 1/alpha squared, so that an alarm falls
// silent some hundred quiet observations after an attack however long that
// was; this touches nothing before the alarm.
//
// An Alarm serves one goroutine at a time.
type Alarm struct {
	alpha float64
	bets  []bet
}

// bet holds logarithms: money passes every float64 within a few thousand hits.
type bet struct{ hit, miss, money float64 }

// NewAlarm watches for hits that come more often than p, an upper bound on
// their usual rate, with an average run length to a false alarm of at least
// 1/alpha observations.
func NewAlarm(p, alpha float64) (*Alarm, error) {
	return newAlarm(p, alpha, rates[:])
}

// newAlarm bets on those of the rates that are above p, the highest first.
func newAlarm(p, alpha float64, rates []float64) (*Alarm, error) {
	if !(p > 0 && p < rates[0]) {
		return nil, fmt.Errorf("usual rate %v: must be above 0 and below %v", p, rates[0])
	}
	if !(alpha > 0 && alpha < 1) {
		return nil, fmt.Errorf("alpha %v: must be above 0 and below 1, such as %v", alpha, DefaultAlpha)
	}
	a := &Alarm{alpha: alpha}
	for _, q := range rates {
		if q > p {
			a.bets = append(a.bets, bet{hit: math.Log(q / p), miss: math.Log((1 - q) / (1 - p))})
		}
	}
	a.Reset()
	return a, nil
}

// Observe takes the next observation and says whether the money is at or
// above 1/alpha.
func (a *Alarm) Observe(hit bool) bool {
	for i := range a.bets {
		b := &a.bets[i]
		b.money = logAdd(b.money, 0)
		if hit {
			b.money += b.hit
		} else {
			b.money += b.miss
		}
		b.money = min(b.money, -2*math.Log(a.alpha))
	}
	return a.money() >= -math.Log(a.alpha)
}

// Reset forgets all observations.
func (a *Alarm) Reset() {
	for i := range a.bets {
		a.bets[i].money = math.Inf(-1)
	}
}

// Money returns what the alarm knows: for each bet log(1 + M), finite and at
// least 0. Restore takes it back.
func (a *Alarm) Money() []float64 {
	out := make([]float64, len(a.bets))
	for i, b := range a.bets {
		out[i] = logAdd(b.money, 0)
	}
	return out
}

// Restore makes the alarm go on from what Money returned. It refuses what no
// alarm with these bets returns.
func (a *Alarm) Restore(money []float64) error {
	if len(money) != len(a.bets) {
		return fmt.Errorf("alarm: money on %d bets, this one has %d", len(money), len(a.bets))
	}
	for _, m := range money {
		if !(m >= 0 && m <= logAdd(-2*math.Log(a.alpha), 0)) {
			return fmt.Errorf("alarm: money %v: must be from 0 to the square of 1/alpha, as logarithms", m)
		}
	}
	for i, m := range money {
		a.bets[i].money = math.Log(math.Expm1(m))
		if m > 30 { // where exp(m)-1 is exp(m), and might overflow
			a.bets[i].money = m
		}
	}
	return nil
}

// Level is the order of magnitude of the money, log10(1 + M): 0 at the start,
// raised at about Limit. On quiet traffic the money wanders around the number
// of observations so far, at most. Level is finite whatever was observed.
func (a *Alarm) Level() float64 { return logAdd(a.money(), 0) / math.Ln10 }

// Limit is the level of an alarm, log10(1/alpha).
func (a *Alarm) Limit() float64 { return -math.Log10(a.alpha) }

// money is the logarithm of the average over the bets.
func (a *Alarm) money() float64 {
	sum := math.Inf(-1)
	for _, b := range a.bets {
		sum = logAdd(sum, b.money)
	}
	return sum - math.Log(float64(len(a.bets)))
}

// logAdd is log(exp(x) + exp(y)) without overflow.
func logAdd(x, y float64) float64 {
	if x < y {
		x, y = y, x
	}
	if math.IsInf(y, -1) {
		return x
	}
	return x + math.Log1p(math.Exp(y-x))
}
