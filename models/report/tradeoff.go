package report

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Tradeoff is a candidate's accuracy on clean images and under attack.
type Tradeoff struct {
	Group                           string // such as its recipe: candidates of one have one hue
	Name                            string
	Clean, Robust, RobustLowerBound float64
	Efficient                       bool // no other candidate beats it: on the line of the plot
	Training                        time.Duration
}

// tradeoffChart has a dot for each candidate, clean over robust accuracy, and a
// line through the efficient ones.
func tradeoffChart(all []Tradeoff) (*chart, error) {
	// Both axes show what the candidates cover, and not all from 0 to 100%: the
	// differences are of few points.
	low, high := [2]float64{1, 1}, [2]float64{0, 0} // robust, clean
	for _, t := range all {
		for i, v := range [2]float64{t.Robust, t.Clean} {
			if !(v >= 0 && v <= 1) {
				return nil, fmt.Errorf("candidate %q: accuracy %v is impossible", t.Name, v)
			}
			low[i], high[i] = min(low[i], v), max(high[i], v)
		}
	}
	for i := range low {
		margin := max(0.005, (high[i]-low[i])/10)
		low[i], high[i] = max(0, low[i]-margin), min(1, high[i]+margin)
	}
	c, err := newChart("tradeoff", "Clean over robust accuracy of the candidates", "robust accuracy", low[0], high[0])
	if err != nil {
		return nil, err
	}
	c.YLabel = "clean accuracy"
	y := func(v float64) float64 { return c.Bottom - (v-low[1])/(high[1]-low[1])*(c.Bottom-c.Top) }
	ticks := func(low, high float64, each func(v float64, label string)) {
		step := niceStep((high - low) / 8)
		for i := math.Ceil(low/step - 1e-9); i*step <= high*(1+1e-9); i++ {
			each(i*step, number(100*i*step, 100*step)+"%")
		}
	}
	ticks(low[0], high[0], func(v float64, label string) {
		c.XTicks = append(c.XTicks, tick{c.x(v), label, len(c.XTicks)%2 == 1})
	})
	ticks(low[1], high[1], func(v float64, label string) { c.YTicks = append(c.YTicks, tick{y(v), label, false}) })

	var groups []string
	var efficient []Tradeoff
	for _, t := range all {
		if !slices.Contains(groups, t.Group) {
			groups = append(groups, t.Group)
		}
		if t.Efficient {
			efficient = append(efficient, t)
		}
	}
	slices.SortStableFunc(efficient, func(a, b Tradeoff) int {
		if a.Robust < b.Robust {
			return -1
		}
		return 1
	})
	var path strings.Builder
	var said []string
	for i, t := range efficient {
		command := "L"
		if i == 0 {
			command = "M"
		}
		path.WriteString(command + decimal(c.x(t.Robust)) + " " + decimal(y(t.Clean)))
		said = append(said, fmt.Sprintf("%s: %s clean, %s robust", t.Name, Percent(t.Clean), Percent(t.Robust)))
	}
	c.Description = "Efficient are " + strings.Join(said, "; ") + "."
	c.Lines = append(c.Lines, line{Label: "efficient", Class: "hue-live dash-long", Path: path.String()})
	for i, group := range groups {
		l := line{Label: group, Class: hues[i%len(hues)]}
		for _, t := range all {
			if t.Group == group {
				l.Dots = append(l.Dots, dot{decimal(c.x(t.Robust)), decimal(y(t.Clean)), fmt.Sprintf("%s: %s clean, %s robust", t.Name, Percent(t.Clean), Percent(t.Robust))})
			}
		}
		c.Lines = append(c.Lines, l)
	}
	return c, nil
}
