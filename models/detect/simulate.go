package detect

import (
	"math/rand/v2"
	"slices"
)

// Simulated is what the alarm does on streams drawn from scored requests.
type Simulated struct {
	FalseAlarms int           `json:"false_alarms"` // on the clean requests
	Requests    int           `json:"requests"`     // clean, drawn with replacement
	Delays      map[int]Delay `json:"delays"`       // by the percentage of hostile traffic
}

// Delay counts requests from the first hostile one to the alarm.
type Delay struct {
	Median int `json:"median"`
	Most   int `json:"at_95_percent"` // 95% of the runs
}

// simulatedRuns of an attack at each share, after quietBefore clean requests.
const simulatedRuns, quietBefore = 501, 200

// Simulate runs the detector's alarm on requests drawn from real ones: as many
// clean ones as are asked for, and attacks that come in among clean traffic as
// 100, 30 and 10 percent of it.
func (d *Detector) Simulate(clean, hostile []Score, requests int, seed uint64) (*Simulated, error) {
	alarm, err := d.Alarm(DefaultAlpha)
	if err != nil {
		return nil, err
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	draw := func(from []Score) bool { return from[rng.IntN(len(from))].Flagged }
	s := &Simulated{Requests: requests, Delays: map[int]Delay{}}
	for range requests {
		if alarm.Observe(draw(clean)) {
			s.FalseAlarms++
			alarm.Reset()
		}
	}
	const never = 1_000_000
	for _, share := range []int{100, 30, 10} {
		delays := make([]int, simulatedRuns)
		for i := range delays {
			alarm.Reset()
			for range quietBefore {
				alarm.Observe(draw(clean))
			}
			for n := 1; ; n++ {
				from := clean
				if rng.IntN(100) < share {
					from = hostile
				}
				if alarm.Observe(draw(from)) || n == never {
					delays[i] = n
					break
				}
			}
		}
		slices.Sort(delays)
		s.Delays[share] = Delay{delays[len(delays)/2], delays[len(delays)*95/100]}
	}
	return s, nil
}
