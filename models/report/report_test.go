package report

import (
	"bytes"
	"flag"
	"math"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
)

var update = flag.Bool("update", false, "write testdata again")

var mnist = sync.OnceValues(dataset.MNIST)

// incident is a page with everything on it.
func incident(t testing.TB) *Page {
	t.Helper()
	p := &Page{
		Title: "An attack on wong, and its end",
		Lead:  "A classifier of handwritten digits was attacked with FGSM at ε = 0.3 while in service. The sentinel raised an alarm; the model was hardened, gated, signed and promoted without dropping a request.",
		Figures: []Figure{
			{"Clean", "98.81%", "before the attack", Neutral},
			{"Attacked", "11.40%", "FGSM, white box", Bad},
			{"Recovered", "95.62%", "the same attacker, the new model", Good},
			{"Detected after", "5", "hostile requests", Neutral},
			{"Dropped", "0", "of 9,120 requests", Good},
		},
		Incident: &Incident{
			Events: []Event{
				{8200 * time.Millisecond, 0, "Standard model in service", "Trained on clean images, signed, verified.", Neutral},
				{21400 * time.Millisecond, 3000, "Attack begins", "FGSM at ε = 0.3, made from the model's own weights.", Bad},
				{21600 * time.Millisecond, 3005, "Alarm", "The betting alarm passes 1/α = 1,000,000.", Bad},
				{22100 * time.Millisecond, 3060, "Hardening begins", "Recipe fast, from the attacked model's weights.", Neutral},
				{61900 * time.Millisecond, 6200, "Promoted", "The gate passes; signed, attested, reloaded without a dropped request.", Good},
				{70300 * time.Millisecond, 9120, "Attack in vain", "The same attacker, now reading the new model's weights.", Good},
			},
		},
		Curve: &Curve{Epsilon: 0.3},
		Models: []Model{
			{"attacked", "sha256:9f2c41d07be35a6c8812f0c4b1d9e7a3305f6b2c4d8e9a1f7c6b5a4938271605", "temper-demo", 0.9881, 0.0003},
			{"in service", "sha256:1b7d0c2e4f6a8091b3d5f7190a2c4e6f8091a3b5c7d9e1f30425466788a9bacb", "temper-demo", 0.9874, 0.9041},
			{"guard", "sha256:c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00", "temper-demo", math.NaN(), math.NaN()},
		},
		Verdict: &gate.Verdict{Pass: true, Reasons: []gate.Reason{
			{Rule: "min_samples", Figure: 10000, Threshold: 1000, Pass: true, Text: "10000 samples, at least 1000 wanted"},
			{Rule: "min_clean_accuracy", Figure: 0.985, Threshold: 0.96, Pass: true, Text: "clean accuracy at least 0.9854 (9874 of 10000), 0.9600 wanted"},
			{Rule: "min_robust_accuracy", Figure: 0.899, Threshold: 0.8, Pass: true, Text: "robust accuracy at least 0.8991 (9041 of 10000), 0.8000 wanted"},
		}},
		Accuracies: []Accuracy{
			{"standard", "none", 9881, 10000, 0.9881, 0.9861},
			{"standard", "worst case", 3, 10000, 0.0003, 0.0001},
			{"hardened", "none", 9874, 10000, 0.9874, 0.9854},
			{"hardened", "fgsm", 9562, 10000, 0.9562, 0.9526},
			{"hardened", "pgd-20", 9043, 10000, 0.9043, 0.8993},
			{"hardened", "worst case", 9041, 10000, 0.9041, 0.8991},
		},
		Facts: []Fact{
			{"Threat model", "linf, ε = 0.3, pixels in [0, 1]"},
			{"Data set", "sha256:33aa1d0c9b8e7f6a5d4c3b2a190f8e7d6c5b4a39281706f5e4d3c2b1a0998877"},
			{"Seed", "1"},
		},
	}
	for i := 0; i <= 9120; i += 120 {
		accuracy := 0.988
		switch {
		case i >= 3000 && i < 6240:
			accuracy = 0.114
		case i >= 6240:
			accuracy = 0.956
		}
		p.Incident.Accuracy = append(p.Incident.Accuracy, Live{i, accuracy + 0.012*math.Sin(float64(i))})
	}
	for _, s := range []struct {
		model, attack string
		accuracy      []float64
	}{
		{"standard", "fgsm", []float64{0.988, 0.93, 0.71, 0.42, 0.2, 0.114, 0.09, 0.08}},
		{"standard", "pgd-20", []float64{0.988, 0.87, 0.31, 0.04, 0, 0, 0, 0}},
		{"hardened", "fgsm", []float64{0.987, 0.984, 0.98, 0.974, 0.966, 0.956, 0.86, 0.62}},
		{"hardened", "pgd-20", []float64{0.987, 0.983, 0.977, 0.965, 0.943, 0.904, 0.48, 0.12}},
	} {
		series := Series{Model: s.model, Attack: s.attack}
		for i, a := range s.accuracy {
			series.Points = append(series.Points, evaluate.Point{Epsilon: 0.06 * float64(i), Accuracy: a})
		}
		p.Curve.Series = append(p.Curve.Series, series)
	}
	splits, err := mnist()
	if err != nil {
		t.Fatal(err)
	}
	digits := splits.Test
	for i := range 8 {
		size := digits.Shape.Size()
		clean := digits.Bytes[i*size : (i+1)*size]
		attacked := make([]byte, size)
		for j, b := range clean {
			step := 76 // epsilon 0.3, with a sign that looks like a gradient's
			if math.Sin(float64(j%28*(i+3))/5)+math.Cos(float64(j/28*(i+2))/4) < 0.2 {
				step = -76
			}
			attacked[j] = byte(max(0, min(255, int(b)+step)))
		}
		label, wrong := digits.Classes[digits.Labels[i]], digits.Classes[(digits.Labels[i]+5)%10]
		e := Example{Shape: digits.Shape, Clean: clean, Adversarial: attacked, Label: label,
			Predictions: []Prediction{{"standard", label, wrong}, {"hardened", label, label}}}
		if i == 5 {
			e.Predictions[1].Adversarial = wrong
		}
		p.Examples = append(p.Examples, e)
	}
	matrix := func(title string, right int) Confusion {
		c := Confusion{Title: title, Classes: digits.Classes, Counts: make([][]int, 10)}
		for i := range c.Counts {
			c.Counts[i] = make([]int, 10)
			left := 1000
			for j := range c.Counts[i] {
				if i != j {
					c.Counts[i][j] = (1000 - right) * ((i*7 + j*3) % 6) / 30
					left -= c.Counts[i][j]
				}
			}
			c.Counts[i][i] = left
		}
		return c
	}
	p.Confusions = []Confusion{matrix("Clean", 988), matrix("Attacked", 120), matrix("Recovered", 956)}
	return p
}

func render(t testing.TB, p *Page) string {
	t.Helper()
	var out bytes.Buffer
	if err := Render(&out, p); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestGolden(t *testing.T) {
	got := render(t, incident(t))
	if again := render(t, incident(t)); again != got {
		t.Error("the same page gives other bytes")
	}
	const golden = "testdata/incident.html"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the page differs from %s; look at it and run go test -update", golden)
	}
}

// Nothing in a page runs or is fetched, whatever its texts say.
func TestCase64HostileTextsAreEscaped(t *testing.T) {
	const hostile = `"'></title></style><script>alert(1)</script><img src=https://evil.example/x.png onerror=alert(2)>`
	p := incident(t)
	p.Title, p.Lead = hostile, hostile
	p.Figures[0] = Figure{hostile, hostile, hostile, hostile}
	p.Incident.Events[0].Name, p.Incident.Events[0].Text, p.Incident.Events[0].Tone = hostile, hostile, hostile
	p.Accuracies[0].Model, p.Accuracies[0].Attack = hostile, hostile
	p.Curve.Series[0].Model, p.Curve.Series[0].Attack = hostile, hostile
	p.Examples[0].Label = hostile
	p.Examples[0].Predictions[0] = Prediction{hostile, hostile, hostile}
	p.Confusions[0].Title = hostile
	p.Confusions[0].Classes = append([]string{hostile}, p.Confusions[0].Classes[1:]...)
	p.Verdict.Reasons[0].Rule, p.Verdict.Reasons[0].Text = hostile, hostile
	p.Models[0] = Model{hostile, hostile, hostile, 0.5, 0.5}
	p.Facts[0] = Fact{hostile, hostile}
	page := render(t, p)
	for _, bad := range []string{"<script", "<img src=https", "<img src=\"https"} {
		if strings.Contains(strings.ToLower(page), bad) {
			t.Errorf("the page contains %s", bad)
		}
	}
	if tags := regexp.MustCompile(`<[^>"]*("[^"]*"[^>"]*)*>`).FindAllString(page, -1); len(tags) < 500 {
		t.Errorf("only %d tags: the test does not see the page", len(tags))
	} else {
		for _, tag := range tags {
			if regexp.MustCompile(`(?i)\son[a-z]+\s*=`).MatchString(regexp.MustCompile(`"[^"]*"`).ReplaceAllString(tag, `""`)) {
				t.Errorf("an event handler in %s", tag)
			}
		}
	}
	for _, src := range regexp.MustCompile(`(?:src|href)="([^"]*)"`).FindAllStringSubmatch(page, -1) {
		if !strings.HasPrefix(src[1], "data:image/png;base64,") {
			t.Errorf("the page fetches %q", src[1])
		}
	}
}

func TestAFewClassesOrNothing(t *testing.T) {
	if page := render(t, &Page{Title: "empty"}); strings.Contains(page, "<section") {
		t.Error("an empty page has sections")
	}
	page := render(t, &Page{Incident: &Incident{Events: []Event{{Name: "one"}}}})
	if !strings.Contains(page, "one") || strings.Contains(page, "<svg") {
		t.Error("an incident without a curve lacks its timeline or has a chart")
	}
}

func TestImpossiblePages(t *testing.T) {
	for want, spoil := range map[string]func(*Page){
		"example 0: clean image": func(p *Page) { p.Examples[0].Clean = p.Examples[0].Clean[1:] },
		"1 or 3 channels":        func(p *Page) { p.Examples[0].Shape.Channels = 2 },
		"9 rows for 10 classes":  func(p *Page) { p.Confusions[0].Counts = p.Confusions[0].Counts[1:] },
		"9 entries":              func(p *Page) { p.Confusions[0].Counts[3] = p.Confusions[0].Counts[3][1:] },
		"count of -1":            func(p *Page) { p.Confusions[0].Counts[3][3] = -1 },
		"accuracy: point":        func(p *Page) { p.Incident.Accuracy[3].Accuracy = math.NaN() },
		"impossible":             func(p *Page) { p.Curve.Series[0].Points[2].Accuracy = 1.5 },
		"x axis":                 func(p *Page) { p.Curve.Series[0].Points[2].Epsilon = math.Inf(1) },
		"at request -5":          func(p *Page) { p.Incident.Events[1].Request = -5 },
	} {
		p := incident(t)
		spoil(p)
		var out bytes.Buffer
		if err := Render(&out, p); err == nil || !strings.Contains(err.Error(), want) || out.Len() > 0 {
			t.Errorf("error %v with %d bytes written, want %q and none", err, out.Len(), want)
		}
	}
}

func TestTicks(t *testing.T) {
	for _, c := range []struct {
		high float64
		want string
	}{{0.42, "0.0 0.1 0.2 0.3 0.4"}, {9120, "0 2,000 4,000 6,000 8,000"}, {1, "0.0 0.2 0.4 0.6 0.8 1.0"}, {7, "0 1 2 3 4 5 6 7"}} {
		chart, err := newChart("x", "x", "x", 0, c.high)
		if err != nil {
			t.Fatal(err)
		}
		chart.axes()
		var labels []string
		for _, tick := range chart.XTicks {
			labels = append(labels, tick.Label)
		}
		if got := strings.Join(labels, " "); got != c.want {
			t.Errorf("0 to %v: ticks %s, want %s", c.high, got, c.want)
		}
	}
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", -1234: "-1,234", 1234567: "1,234,567"} {
		if got := count(n); got != want {
			t.Errorf("count(%d) = %s, want %s", n, got, want)
		}
	}
}
