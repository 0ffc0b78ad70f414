// Package report renders a page about an evaluation or an incident: one
// static HTML file without scripts or remote parts (Argo's UI strips
// scripts), with its charts as SVG and its images as PNG inside.
package report

import (
	"bytes"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"image"
	"image/color"
	"image/png"
	"io"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/models/nn"
)

// Page is what there is to show; parts that are empty are left out. All
// accuracies are fractions from 0 to 1. All texts may be hostile: they are
// escaped.
type Page struct {
	Title      string
	Lead       string // one or two sentences under the title
	Figures    []Figure
	Incident   *Incident
	Tradeoff   []Tradeoff
	Accuracies []Accuracy
	Curve      *Curve
	Examples   []Example
	Confusions []Confusion
	Checks     []evaluate.Check
	Verdict    *gate.Verdict
	Models     []Model
	Facts      []Fact // threat model, digests, seed: what the figures rest on
}

// Tone says what a figure or event means.
type Tone string

const (
	Neutral Tone = ""
	Good    Tone = "good"
	Bad     Tone = "bad"
)

// Figure is one headline number.
type Figure struct {
	Label, Value, Note string
	Tone               Tone
}

// Incident is the course of one attack.
type Incident struct {
	Accuracy []Live
	Events   []Event // in order
}

// Live is the accuracy of the answers around a request.
type Live struct {
	Request  int
	Accuracy float64
}

// Event is something that happened.
type Event struct {
	At      time.Duration // since the start
	Request int           // requests answered by then
	Name    string        // a few words
	Text    string        // a sentence, may be empty
	Tone    Tone
}

// Accuracy is one model's accuracy, clean or under an attack.
type Accuracy struct {
	Model, Attack  string // Attack is "none" for clean examples
	Correct, Total int
	Accuracy       float64
	LowerBound     float64
}

// Curve is accuracy over the size of the perturbation.
type Curve struct {
	Epsilon float64 // the threat's, marked; 0 for no mark
	Series  []Series
}

// Series is one line: the hue goes with the model, the dashes with the attack.
type Series struct {
	Model, Attack string
	Points        []evaluate.Point
}

// Example is one image, clean and attacked, with what models made of it.
type Example struct {
	Shape              nn.Shape
	Clean, Adversarial []byte // pixels of Shape, one or three channels
	Label              string
	Predictions        []Prediction
}

// Prediction is one model's answer for both images of an example.
type Prediction struct {
	Model, Clean, Adversarial string
}

// Confusion is a matrix of counts [label][prediction].
type Confusion struct {
	Title   string
	Classes []string
	Counts  [][]int
}

// Model is one row of the table of models.
type Model struct {
	Role, Digest, SignedBy string
	Clean, Robust          float64 // NaN where not measured
}

// Fact is a name and a value.
type Fact struct {
	Name, Value string
}

// Percent writes a fraction as "98.73%", and NaN (not measured) as a dash.
func Percent(v float64) string {
	if math.IsNaN(v) {
		return "–"
	}
	return strconv.FormatFloat(100*v, 'f', 2, 64) + "%"
}

//go:embed page.html
var pageHTML string

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"percent": Percent,
	"count":   count,
	"seconds": func(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 1, 64) + " s" },
	"short":   short,
	"add":     func(a, b int) int { return a + b },
}).Parse(pageHTML))

// Render writes the page; the same page gives the same bytes. Errors: images
// that do not have their shape's pixels, matrices that are not square, points
// outside of their chart, w.
func Render(w io.Writer, p *Page) error {
	v, err := newView(p)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	var out bytes.Buffer // so that an error leaves no half page
	if err := pageTemplate.Execute(&out, v); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	_, err = w.Write(out.Bytes())
	return err
}

// view is the page as the template reads it.
type view struct {
	*Page
	Live     *chart
	Security *chart
	Balance  *chart // of the tradeoff
	Examples []exampleView
	Matrices []matrixView
}

type exampleView struct {
	Example
	CleanURL, AdversarialURL template.URL
}

type matrixView struct {
	Title   string
	Classes []string
	Rows    []matrixRow
	Correct int
	Total   int
}

type matrixRow struct {
	Class string
	Cells []matrixCell
}

type matrixCell struct {
	Count    int
	Diagonal bool
	Shade    string // 0.00 to 1.00
	Strong   bool   // dark enough for light text
}

func newView(p *Page) (*view, error) {
	v := &view{Page: p}
	var err error
	if p.Incident != nil && len(p.Incident.Accuracy) > 1 {
		if v.Live, err = liveChart(p.Incident); err != nil {
			return nil, err
		}
	}
	if p.Curve != nil && len(p.Curve.Series) > 0 {
		if v.Security, err = securityChart(p.Curve); err != nil {
			return nil, err
		}
	}
	if len(p.Tradeoff) > 0 {
		if v.Balance, err = tradeoffChart(p.Tradeoff); err != nil {
			return nil, err
		}
	}
	for i, e := range p.Examples {
		clean, err := pngURL(e.Shape, e.Clean)
		if err != nil {
			return nil, fmt.Errorf("example %d: clean image: %w", i, err)
		}
		adversarial, err := pngURL(e.Shape, e.Adversarial)
		if err != nil {
			return nil, fmt.Errorf("example %d: adversarial image: %w", i, err)
		}
		v.Examples = append(v.Examples, exampleView{e, clean, adversarial})
	}
	for _, c := range p.Confusions {
		m, err := newMatrix(c)
		if err != nil {
			return nil, fmt.Errorf("confusion matrix %q: %w", c.Title, err)
		}
		v.Matrices = append(v.Matrices, m)
	}
	return v, nil
}

// newMatrix shades each cell by the square root of its share of the row, so
// that a few errors in a thousand can be seen.
func newMatrix(c Confusion) (matrixView, error) {
	m := matrixView{Title: c.Title, Classes: c.Classes}
	if len(c.Counts) != len(c.Classes) {
		return m, fmt.Errorf("%d rows for %d classes", len(c.Counts), len(c.Classes))
	}
	for i, counts := range c.Counts {
		if len(counts) != len(c.Classes) {
			return m, fmt.Errorf("row %d has %d entries for %d classes", i, len(counts), len(c.Classes))
		}
		sum := 0
		for _, n := range counts {
			if n < 0 {
				return m, fmt.Errorf("row %d has a count of %d", i, n)
			}
			sum += n
		}
		row := matrixRow{Class: c.Classes[i]}
		for j, n := range counts {
			share := 0.0
			if sum > 0 {
				share = math.Sqrt(float64(n) / float64(sum))
			}
			// The shade leaps where the text turns light, so that it can be
			// read on either side, in both colour schemes.
			strong, shade := share > 0.66, 0.7*share
			if strong {
				shade = 0.4 + 0.6*share
			}
			row.Cells = append(row.Cells, matrixCell{Count: n, Diagonal: i == j, Shade: decimal(shade), Strong: strong})
		}
		m.Rows = append(m.Rows, row)
		m.Correct += counts[i]
		m.Total += sum
	}
	return m, nil
}

// MinWidth is the width in pixels below which the matrix scrolls.
func (m matrixView) MinWidth() int { return 24 * (len(m.Classes) + 1) }

// Accuracy is the share of the matrix's diagonal.
func (m matrixView) Accuracy() float64 {
	if m.Total == 0 {
		return 0
	}
	return float64(m.Correct) / float64(m.Total)
}

// pngURL makes a data URL of pixels with one channel (grey) or three (colour).
func pngURL(s nn.Shape, pixels []byte) (template.URL, error) {
	if s.Height < 1 || s.Width < 1 || s.Height > nn.MaxSide || s.Width > nn.MaxSide || s.Channels != 1 && s.Channels != 3 {
		return "", fmt.Errorf("shape %v: must have 1 or 3 channels and sides of 1 to %d", s, nn.MaxSide)
	}
	if len(pixels) != s.Size() {
		return "", fmt.Errorf("%d pixels: the shape %v has %d", len(pixels), s, s.Size())
	}
	var picture image.Image
	bounds := image.Rect(0, 0, s.Width, s.Height)
	if s.Channels == 1 {
		picture = &image.Gray{Pix: pixels, Stride: s.Width, Rect: bounds}
	} else {
		rgba := image.NewNRGBA(bounds)
		for i := range s.Width * s.Height {
			rgba.Set(i%s.Width, i/s.Width, color.NRGBA{pixels[3*i], pixels[3*i+1], pixels[3*i+2], 255})
		}
		picture = rgba
	}
	var out bytes.Buffer
	if err := png.Encode(&out, picture); err != nil {
		return "", err
	}
	return template.URL("data:image/png;base64," + base64.StdEncoding.EncodeToString(out.Bytes())), nil
}

// count writes 12345 as "12,345".
func count(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// shortDigits are enough to tell digests apart by eye.
const shortDigits = 12

// short cuts a digest for reading: "sha256:0123456789ab".
func short(digest string) string {
	algorithm, hex, ok := strings.Cut(digest, ":")
	if ok && len(hex) > shortDigits {
		return algorithm + ":" + hex[:shortDigits] + "…"
	}
	return digest
}

func decimal(v float64) string { return strconv.FormatFloat(v, 'f', 2, 64) }
