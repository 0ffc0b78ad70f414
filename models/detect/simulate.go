package detect

import (
	"math/rand/v2"
	"slices"
)

// Simulated is what the alarms do on streams drawn from scored requests.
type Simulated struct {
	Requests    int `json:"requests,omitempty"`     // of clean or benignly changed traffic, drawn with replacement
	FalseAlarms int `json:"false_alarms"`           // of an attack, on those
	DriftAlarms int `json:"drift_alarms,omitempty"` // on those

	Delays map[int]Delay `json:"delays,omitempty"` // of an attack's alarm, by the percentage of hostile traffic
	Drift  *Delay        `json:"drift,omitempty"`  // of the alarm of drift, on benignly changed traffic
}

// Delay counts requests from the first hostile or changed one to the alarm.
type Delay struct {
	Median int `json:"median"`
	Most   int `json:"at_95_percent"` // 95% of the runs
}

// simulatedRuns of an attack at each share, or of drift, after quietBefore clean
// requests; none is longer than simulatedLongest.
const simulatedRuns, quietBefore, simulatedLongest = 501, 200, 1_000_000

// simulateBenign runs both alarms on as many requests as are asked for, drawn
// from real ones that are no attack.
func (d *Detector) simulateBenign(scores []Score, requests int, seed uint64) (*Simulated, error) {
	attack, err := d.Alarm(DefaultAlpha)
	if err != nil {
		return nil, err
	}
	drift, err := d.DriftAlarm(DefaultAlpha)
	if err != nil {
		return nil, err
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	s := &Simulated{Requests: requests}
	for range requests {
		score := scores[rng.IntN(len(scores))]
		if attack.Observe(score.Flagged) {
			s.FalseAlarms++
			attack.Reset()
		}
		if drift.Observe(score.Shifted) {
			s.DriftAlarms++
			drift.Reset()
		}
	}
	return s, nil
}

// simulateAttack runs the alarm of an attack on hostile requests that come in
// among clean ones as 100, 30 and 10 percent of the traffic.
func (d *Detector) simulateAttack(clean, hostile []Score, seed uint64) (*Simulated, error) {
	attack, err := d.Alarm(DefaultAlpha)
	if err != nil {
		return nil, err
	}
	s := &Simulated{Delays: map[int]Delay{}}
	for _, share := range []int{100, 30, 10} {
		s.Delays[share] = delay(attack, clean, hostile, share, seed, func(s Score) bool { return s.Flagged })
	}
	return s, nil
}

// simulateDrift runs the alarm of drift on traffic that changes from one
// request to the next.
func (d *Detector) simulateDrift(clean, changed []Score, seed uint64) (*Delay, error) {
	drift, err := d.DriftAlarm(DefaultAlpha)
	if err != nil {
		return nil, err
	}
	found := delay(drift, clean, changed, 100, seed, func(s Score) bool { return s.Shifted })
	return &found, nil
}

// delay is how long an alarm takes where a percentage of the traffic is other
// than usual.
func delay(alarm *Alarm, usual, other []Score, percent int, seed uint64, hit func(Score) bool) Delay {
	rng := rand.New(rand.NewPCG(seed, uint64(percent)))
	delays := make([]int, 0, simulatedRuns)
	for range simulatedRuns {
		alarm.Reset()
		for range quietBefore {
			alarm.Observe(hit(usual[rng.IntN(len(usual))]))
		}
		n := 1
		for ; n < simulatedLongest; n++ {
			from := usual
			if rng.IntN(100) < percent {
				from = other
			}
			if alarm.Observe(hit(from[rng.IntN(len(from))])) {
				break
			}
		}
		if delays = append(delays, n); n == simulatedLongest {
			break // it would be so again and again
		}
	}
	slices.Sort(delays)
	return Delay{delays[len(delays)/2], delays[len(delays)*95/100]}
}
