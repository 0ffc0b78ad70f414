package report

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// chart is a line chart laid out in SVG user units.
type chart struct {
	ID, Title, Description string
	XLabel, YLabel         string  // of the y axis "accuracy" where it is empty
	Left, Right            float64 // the plot's edges
	Top, Bottom            float64
	XTicks, YTicks         []tick
	Marks                  []mark
	Lines                  []line
	low, high              float64 // of the x axis
}

// Width and Height are those of every chart's view box. Text keeps its size
// on the screen by the style sheet, so there is room for it below the plot.
func (*chart) Width() float64  { return 720 }
func (*chart) Height() float64 { return 296 }

// TickEnd is where the ticks of the x axis end.
func (c *chart) TickEnd() float64 { return c.Bottom + 5 }

type tick struct {
	At    float64
	Label string
	Odd   bool // left out where there is little room
}

// mark is a vertical line with a label on top.
type mark struct {
	X, Y     float64 // Y is of the label's centre
	Label    string
	Numbered bool // the label is a number in a circle
	Tone     Tone
}

type line struct {
	Label string
	Class string // of hue and dashes
	Path  string
	Dots  []dot
}

type dot struct{ X, Y, Value string }

// badge is the height of a mark's label; marks closer than that go on rows.
const badge = 24

// newChart has accuracy from 0 to 100% on the y axis.
func newChart(id, title, xLabel string, low, high float64) (*chart, error) {
	if !(high > low) || math.IsInf(high-low, 0) {
		return nil, fmt.Errorf("chart %q: x axis from %v to %v", title, low, high)
	}
	return &chart{ID: id, Title: title, XLabel: xLabel, Left: 62, Right: 702, Top: 20, Bottom: 262, low: low, high: high}, nil
}

// axes places the ticks, once Top is final.
func (c *chart) axes() {
	for percent := 0; percent <= 100; percent += 25 {
		c.YTicks = append(c.YTicks, tick{c.y(float64(percent) / 100), strconv.Itoa(percent) + "%", false})
	}
	step := niceStep((c.high - c.low) / 8)
	for i := math.Ceil(c.low / step); i*step <= c.high*(1+1e-9); i++ {
		c.XTicks = append(c.XTicks, tick{c.x(i * step), number(i*step, step), len(c.XTicks)%2 == 1})
	}
}

func (c *chart) x(v float64) float64 { return c.Left + (v-c.low)/(c.high-c.low)*(c.Right-c.Left) }
func (c *chart) y(v float64) float64 { return c.Bottom - v*(c.Bottom-c.Top) }

// niceStep is the least of 1, 2, 5 times a power of ten that is at least v.
func niceStep(v float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(v)))
	for _, m := range []float64{1, 2, 5} {
		if v <= m*power*(1+1e-9) {
			return m * power
		}
	}
	return 10 * power
}

// number writes a tick with the decimals that its step needs.
func number(v, step float64) string {
	if step >= 1 {
		return count(int(math.Round(v)))
	}
	return strconv.FormatFloat(v, 'f', int(math.Ceil(-math.Log10(step)-1e-9)), 64)
}

// add draws a line through points of (x, accuracy).
func (c *chart) add(label, class string, points [][2]float64, dots bool) error {
	l := line{Label: label, Class: class}
	var path strings.Builder
	for i, p := range points {
		if !(p[0] >= c.low && p[0] <= c.high) || !(p[1] >= 0 && p[1] <= 1) {
			return fmt.Errorf("chart %q: %s: point %v is impossible", c.Title, label, p)
		}
		x, y := decimal(c.x(p[0])), decimal(c.y(p[1]))
		command := "L"
		if i == 0 {
			command = "M"
		}
		path.WriteString(command + x + " " + y)
		if dots {
			l.Dots = append(l.Dots, dot{x, y, Percent(p[1])})
		}
	}
	l.Path = path.String()
	c.Lines = append(c.Lines, l)
	return nil
}

// liveChart is accuracy over requests; its marks are numbered like the events.
func liveChart(in *Incident) (*chart, error) {
	last := 0
	var points [][2]float64
	for _, a := range in.Accuracy {
		last = max(last, a.Request)
		points = append(points, [2]float64{float64(a.Request), a.Accuracy})
	}
	for _, e := range in.Events {
		last = max(last, e.Request)
	}
	c, err := newChart("live", "Accuracy of the answers over the incident", "requests answered", 0, float64(last))
	if err != nil {
		return nil, err
	}
	rows := 1
	var ends []float64 // of each row of labels
	for i, e := range in.Events {
		if e.Request < 0 {
			return nil, fmt.Errorf("event %q at request %d", e.Name, e.Request)
		}
		x := c.x(float64(e.Request))
		row := slices.IndexFunc(ends, func(end float64) bool { return x-end >= badge })
		if row < 0 {
			row = len(ends)
			ends = append(ends, 0)
		}
		ends[row] = x
		rows = max(rows, row+1)
		c.Marks = append(c.Marks, mark{X: x, Y: 14 + badge*float64(row), Label: strconv.Itoa(i + 1), Numbered: true, Tone: e.Tone})
	}
	c.Top = 20 + badge*float64(rows-1) + 14
	c.axes()
	worst := slices.MinFunc(in.Accuracy, func(a, b Live) int { return cmp.Compare(a.Accuracy, b.Accuracy) })
	c.Description = fmt.Sprintf("From %s at the start down to %s around request %s, and %s at the end, with %d events.",
		Percent(in.Accuracy[0].Accuracy), Percent(worst.Accuracy), count(worst.Request), Percent(in.Accuracy[len(in.Accuracy)-1].Accuracy), len(in.Events))
	return c, c.add("accuracy", "hue-live", points, false)
}

// Hues and dashes, in order of appearance, as classes of the style sheet.
var (
	hues   = []string{"hue-ember", "hue-steel", "hue-violet", "hue-straw"}
	dashes = []string{"dash-none", "dash-long", "dash-dot"}
)

// securityChart is accuracy over epsilon.
func securityChart(curve *Curve) (*chart, error) {
	high := curve.Epsilon
	var models, attacks []string
	for _, s := range curve.Series {
		for _, p := range s.Points {
			high = max(high, p.Epsilon)
		}
		if !slices.Contains(models, s.Model) {
			models = append(models, s.Model)
		}
		if !slices.Contains(attacks, s.Attack) {
			attacks = append(attacks, s.Attack)
		}
	}
	c, err := newChart("security", "Security curve: accuracy over the size of the perturbation", "ε, largest change of a pixel", 0, high)
	if err != nil {
		return nil, err
	}
	if curve.Epsilon > 0 {
		c.Top += 14
		c.Marks = append(c.Marks, mark{X: c.x(curve.Epsilon), Y: 14, Label: "threat model: ε = " + strconv.FormatFloat(curve.Epsilon, 'g', 4, 64)})
	}
	c.axes()
	palette := hues
	if len(models) == 1 {
		palette = hues[1:] // the calm one
	}
	var said []string
	for _, s := range curve.Series {
		class := palette[slices.Index(models, s.Model)%len(palette)] + " " + dashes[slices.Index(attacks, s.Attack)%len(dashes)]
		var points [][2]float64
		for _, p := range s.Points {
			points = append(points, [2]float64{p.Epsilon, p.Accuracy})
		}
		label := s.Model + ", " + s.Attack
		if err := c.add(label, class, points, true); err != nil {
			return nil, err
		}
		if n := len(s.Points); n > 0 {
			said = append(said, fmt.Sprintf("%s: from %s to %s at epsilon %.4g", label, Percent(s.Points[0].Accuracy), Percent(s.Points[n-1].Accuracy), s.Points[n-1].Epsilon))
		}
	}
	c.Description = strings.Join(said, "; ") + "."
	return c, nil
}
