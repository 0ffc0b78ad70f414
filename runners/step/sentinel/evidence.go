package sentinel

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"math"
	"net/http"
	"strconv"

	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/runners/step/artifact"
)

// Keeper returns a Config.Keep that pushes an incident's evidence to a
// repository as a data set, tagged evidence-ID, and returns its reference with
// the digest. Its images are the test part, since nothing may be trained on
// them unseen; its labels are the guard's opinion, and nobody's truth.
func Keeper(repository string) func(context.Context, Incident) (string, error) {
	return func(ctx context.Context, i Incident) (string, error) {
		set := &dataset.Set{Name: "evidence", Shape: i.Evidence[0].Shape}
		most := 0
		for _, e := range i.Evidence {
			if e.Shape != set.Shape {
				return "", fmt.Errorf("evidence of %v beside %v", e.Shape, set.Shape)
			}
			set.Floats = append(set.Floats, e.Pixels...)
			set.Labels = append(set.Labels, uint8(e.Guard))
			most = max(most, e.Classes)
		}
		for c := range most {
			set.Classes = append(set.Classes, strconv.Itoa(c))
		}
		ref, _, err := artifact.PushDataset(ctx, repository+":evidence-"+i.ID, &dataset.Splits{Name: "evidence", Test: set}, map[string]string{
			"io.github.temper-ml.incident": i.ID,
			"io.github.temper-ml.cause":    i.Cause,
			"io.github.temper-ml.model":    i.Digest,
			"io.github.temper-ml.labels":   "by the guard",
		})
		return ref, err
	}
}

// Flagged is one of the last flagged requests, as GET /evidence lists it.
type Flagged struct {
	Request uint64  `json:"request"`
	Served  int     `json:"served"` // class by the model in service
	Guard   int     `json:"guard"`
	Score   float64 `json:"score"`
}

// shownEvidence is how many the page shows.
const shownEvidence = 12

// serveEvidence lists the last flagged requests, newest first.
func (s *Sentinel) serveEvidence(w http.ResponseWriter, _ *http.Request) {
	list := []Flagged{}
	all := s.Evidence()
	for k := len(all) - 1; k >= 0 && len(list) < shownEvidence; k-- {
		e := all[k]
		list = append(list, Flagged{e.Request, e.Served, e.Guard, e.Score})
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(list)
}

// serveImage serves a flagged request as a PNG: as it came, or squeezed.
func (s *Sentinel) serveImage(w http.ResponseWriter, r *http.Request) {
	request, err := strconv.ParseUint(r.PathValue("request"), 10, 64)
	if err == nil {
		for _, e := range s.Evidence() {
			if e.Request != request {
				continue
			}
			pixels := e.Pixels
			if r.PathValue("form") == "squeezed.png" {
				pixels = make([]float32, len(e.Pixels))
				detect.Squeeze(pixels, e.Pixels, 1, e.Shape)
			}
			data, err := picture(pixels, e.Shape)
			if err != nil {
				s.log.Error("image", "error", err)
				break
			}
			w.Header().Set("Content-Type", "image/png")
			w.Write(data)
			return
		}
	}
	refuse(w, http.StatusNotFound, fmt.Errorf("no such flagged request"))
}

// picture encodes the pixels of one image, grey or of three colours.
func picture(pixels []float32, s nn.Shape) ([]byte, error) {
	m := image.NewNRGBA(image.Rect(0, 0, s.Width, s.Height))
	at := func(i int) uint8 { return uint8(math.Round(float64(min(max(pixels[i], 0), 1)) * 255)) }
	for y := range s.Height {
		for x := range s.Width {
			i := (y*s.Width + x) * s.Channels
			c := color.NRGBA{at(i), at(i), at(i), 255}
			if s.Channels == 3 {
				c.G, c.B = at(i+1), at(i+2)
			}
			m.SetNRGBA(x, y, c)
		}
	}
	var out bytes.Buffer
	err := png.Encode(&out, m)
	return out.Bytes(), err
}
