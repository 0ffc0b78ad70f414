package report

import (
	"strings"
	"testing"
	"time"
)

func TestTradeoffPage(t *testing.T) {
	all := []Tradeoff{
		{Group: "fast", Name: "fast-1", Clean: 0.98, Robust: 0.93, RobustLowerBound: 0.91, Efficient: true, Training: 31 * time.Second},
		{Group: "fast", Name: "fast-2", Clean: 0.97, Robust: 0.92, RobustLowerBound: 0.90},
		{Group: "<script>alert(1)</script>", Name: `"><img src=http://evil>`, Clean: 0.99, Robust: 0.5, RobustLowerBound: 0.48, Efficient: true},
	}
	page := render(t, &Page{Title: "sweep", Tradeoff: all})
	for _, want := range []string{"Trade-off", "robust accuracy", "clean accuracy", "fast-1: 98.00% clean, 93.00% robust", "91.00%", "31.0 s", ">yes<", ">no<"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for _, bad := range []string{"<script", "<img src=http"} { // Case64
		if strings.Contains(page, bad) {
			t.Errorf("the page has %q", bad)
		}
	}
	c, err := tradeoffChart(all)
	if err != nil {
		t.Fatal(err)
	}
	// One line through the efficient ones, from left to right, and a dot each.
	if len(c.Lines) != 3 || strings.Count(c.Lines[0].Path, "M") != 1 || strings.Count(c.Lines[0].Path, "L") != 1 || len(c.Lines[1].Dots) != 2 || len(c.Lines[2].Dots) != 1 {
		t.Errorf("lines %+v", c.Lines)
	}
	if c.Lines[2].Dots[0].X >= c.Lines[1].Dots[0].X || len(c.XTicks) < 3 || len(c.YTicks) < 3 {
		t.Errorf("lines %+v, ticks %v %v", c.Lines, c.XTicks, c.YTicks)
	}
	if _, err := tradeoffChart([]Tradeoff{{Name: "x", Clean: 1.5}}); err == nil {
		t.Error("an impossible accuracy was drawn")
	}
	if _, err := tradeoffChart([]Tradeoff{{Name: "x", Clean: 1, Robust: 1, Efficient: true}}); err != nil {
		t.Error(err)
	}
}
