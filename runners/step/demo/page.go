package demo

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/report"
	"github.com/temper-ml/temper/runners/step"
)

// exampleImages is how many attacked images the report shows.
const exampleImages = 8

// writePage writes the report of the incident.
func (d *demo) writePage(first, second *model, test *dataset.Set, hostile []float32) error {
	r := &d.result
	recovered := report.Figure{Label: "Recovered", Value: report.Percent(r.RecoveredAccuracy), Note: "the same attacker, against the promoted model", Tone: report.Good}
	hardened := report.Model{Role: "promoted", Digest: r.PromotedDigest, SignedBy: "demo", Clean: second.report.CleanAccuracy, Robust: second.report.RobustAccuracy}
	if r.PromotedDigest == "" {
		recovered.Label, recovered.Note, recovered.Tone = "Attacked again", "the gate rejected the hardened model", report.Bad
		hardened.Role, hardened.Digest, hardened.SignedBy = "rejected", digestOf(second.network), "nobody"
	}
	p := &report.Page{
		Title: "What happened when the model was attacked",
		Lead: fmt.Sprintf("One incident on %s, network %s, played by temper demo: every request over HTTP, every attack made from the weights of the model in service, each pixel changed by up to %v.",
			d.splits.Name, r.Network, r.Epsilon),
		Figures: []report.Figure{
			{Label: "Clean accuracy", Value: report.Percent(r.CleanAccuracy), Note: "before the attack"},
			{Label: "Under attack", Value: report.Percent(r.AttackedAccuracy), Note: "FGSM, white box", Tone: report.Bad},
			recovered,
			{Label: "Detected after", Value: fmt.Sprint(r.DetectionDelayRequests), Note: fmt.Sprintf("hostile requests; %d false alarms in %d", r.FalseAlarms, r.CleanRequests)},
			{Label: "Dropped", Value: fmt.Sprint(r.DroppedRequests), Note: fmt.Sprintf("of %d requests, reload included", r.Requests)},
		},
		Incident: &report.Incident{Accuracy: d.live, Events: d.events},
		Accuracies: append(report.Accuracies("before", first.report.Report),
			report.Accuracies("after", second.report.Report)...),
		Curve: &report.Curve{Epsilon: r.Epsilon, Series: append(report.CurveSeries("before", first.report.Report),
			report.CurveSeries("after", second.report.Report)...)},
		Examples: d.examples(test, hostile),
		Models: []report.Model{
			{Role: "attacked", Digest: r.ModelDigest, SignedBy: "demo", Clean: first.report.CleanAccuracy, Robust: first.report.RobustAccuracy},
			hardened,
		},
		Facts: report.Provenance(second.report.Report),
	}
	for _, c := range []struct {
		title  string
		labels []int64
	}{
		{"Clean, before", d.answers.before},
		{"Attacked", d.answers.beforeHostile},
		{"Attacked again", d.answers.afterHostile},
	} {
		predictions := make([]uint8, len(c.labels))
		for i, l := range c.labels {
			predictions[i] = uint8(l)
		}
		counts, err := evaluate.ConfusionMatrix(test.Labels[:len(predictions)], predictions, len(test.Classes))
		if err != nil {
			return fmt.Errorf("confusion matrix: %w", err)
		}
		p.Confusions = append(p.Confusions, report.Confusion{Title: c.title, Classes: test.Classes, Counts: counts})
	}
	var page bytes.Buffer
	if err := report.Render(&page, p); err != nil {
		return err
	}
	return step.WriteFile(r.Report, page.Bytes(), 0o644)
}

// examples are the first images that the attack fooled the first model with.
func (d *demo) examples(test *dataset.Set, hostile []float32) (all []report.Example) {
	size := test.Shape.Size()
	name := func(label int64) string {
		if label < 0 || int(label) >= len(test.Classes) {
			return "no answer"
		}
		return test.Classes[label]
	}
	pixels := make([]float32, size)
	for i, label := range test.Labels {
		a := &d.answers
		if len(all) == exampleImages {
			break
		}
		if a.before[i] != int64(label) || a.beforeHostile[i] == int64(label) {
			continue
		}
		test.Read(pixels, i, i+1)
		all = append(all, report.Example{
			Shape: test.Shape, Clean: grey(pixels), Adversarial: grey(hostile[i*size:][:size]), Label: test.Classes[label],
			Predictions: []report.Prediction{
				{Model: "before", Clean: name(a.before[i]), Adversarial: name(a.beforeHostile[i])},
				{Model: "after", Clean: name(a.after[i]), Adversarial: name(a.afterSameImages[i])},
			},
		})
	}
	return all
}

// grey turns pixels from 0 to 1 into bytes.
func grey(pixels []float32) []byte {
	out := make([]byte, len(pixels))
	for i, v := range pixels {
		out[i] = byte(v*255 + 0.5)
	}
	return out
}

// table is the demo's answer for a person.
func (d *demo) table() string {
	r := &d.result
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-34s %s\n", name, fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(&b, "%s, epsilon %v, %d test images over HTTP\n\n", r.Network, r.Epsilon, r.CleanRequests)
	row("clean accuracy", "%s", report.Percent(r.CleanAccuracy))
	row("under attack", "%s", report.Percent(r.AttackedAccuracy))
	row("after the defence, attacked anew", "%s", report.Percent(r.RecoveredAccuracy))
	row("after the defence, clean", "%s", report.Percent(r.RecoveredCleanAccuracy))
	row("hardened model, worst case of gate", "%s (at least %s)", report.Percent(r.PGDAccuracy), report.Percent(r.PGDAccuracyLowerBound))
	row("detected after", "%d hostile requests", r.DetectionDelayRequests)
	if r.SecondsToRecover > 0 {
		row("recovered after", "%.1f s", r.SecondsToRecover)
	}
	row("false alarms", "%d in %d clean requests", r.FalseAlarms, r.CleanRequests)
	row("dropped", "%d of %d requests", r.DroppedRequests, r.Requests)
	row("model", "%s", r.ModelDigest)
	if r.PromotedDigest != "" {
		row("promoted", "%s", r.PromotedDigest)
	} else {
		row("promoted", "nothing: the gate rejected the hardened model")
	}
	fmt.Fprintln(&b)
	for _, name := range d.order {
		row(name, "%6.1f s", r.Seconds[name])
	}
	row("total", "%6.1f s, %d MiB at most", r.SecondsTotal, r.PeakRSSBytes>>20)
	fmt.Fprintf(&b, "\nreport: %s", r.Report)
	return b.String()
}
