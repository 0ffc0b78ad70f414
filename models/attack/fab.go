package attack

import (
	"context"
	"errors"
	"fmt"
	"math"
)

// FAB (Croce and Hein 2020, "Minimally distorted adversarial examples with a
// fast adaptive boundary attack") looks for the nearest misclassified image,
// whatever the epsilon: from the clean image it goes to the network's linear
// boundary with each target class, and back towards the clean image whenever
// it has crossed the true one.

// What AutoAttack uses.
const (
	fabSteps     = 100
	fabMaxBias   = 0.1  // greatest share of the way from the clean image
	fabOvershoot = 1.05 // how far beyond the linear boundary
	fabBack      = 0.9  // share of the way that is kept after a success
)

// FAB is the targeted form of FAB in the maximum norm, towards each of up to
// nine classes. It ends at the first image within the threat.
func FAB(t Threat, steps int) Attack { return fab{t, steps} }

type fab struct {
	threat Threat
	steps  int
}

func (a fab) Name() string {
	if a.steps == fabSteps {
		return "fab-t"
	}
	return fmt.Sprintf("fab-t-%d", a.steps)
}

func (a fab) Perturb(ctx context.Context, m Model, x []float32, labels []uint8, _ uint64) ([]float32, error) {
	if a.threat.Norm != "linf" {
		return nil, errors.New("attack fab-t: is for the norm linf only")
	}
	return walkAll(ctx, m, a.threat, x, labels, true, func() walker { return newFABWalk(a, m.Network().Input.Size()) })
}

type fabWalk struct {
	fab
	targets []uint8
	target  int     // index in targets
	step    int     // towards this target
	back    bool    // the point was reached by going back: whether it is misclassified does not count
	nearest float64 // distance of the nearest misclassified image, infinite for none

	fromHere, fromClean projection
}

func newFABWalk(a fab, size int) *fabWalk {
	return &fabWalk{fab: a, fromHere: newProjection(size), fromClean: newProjection(size)}
}

func (f *fabWalk) begin(w *walk, logits []float32) {
	f.targets = targetsOf(f.targets, logits, w.label)
	f.target, f.step, f.back = 0, 0, true
	f.nearest = math.Inf(1)
}

func (f *fabWalk) slope(w *walk, _, grad []float32) {
	clear(grad)
	grad[f.targets[f.target]]++
	grad[w.label]--
}

func (f *fabWalk) visit(w *walk, logits, gradient []float32) bool {
	if !f.back && Predict(logits) != int(w.label) {
		d := f.threat.Distance(w.x, w.clean)
		if d < f.nearest {
			f.nearest = d
			if d <= float64(float32(f.threat.Epsilon)) {
				copy(w.adv, w.x)
				return false
			}
		}
		for i, c := range w.clean {
			w.x[i] = c + (w.x[i]-c)*fabBack
		}
		f.back = true
		return f.step < f.steps || f.next(w)
	}
	if f.step == f.steps {
		return f.next(w)
	}
	f.step++
	f.back = false

	// The boundary, as the network's gradient has it, is {p: <gradient, p> = b}.
	b := float64(logits[w.label]) - float64(logits[f.targets[f.target]]) + dot(gradient, w.x)
	here := f.fromHere.project(w.x, gradient, b)
	clean := f.fromClean.project(w.clean, gradient, b)
	here, clean = max(here, 1e-8), max(clean, 1e-8)
	bias := float32(min(here/(here+clean), fabMaxBias))
	d1, d2 := f.fromHere.move, f.fromClean.move
	for i, v := range w.x {
		v = (1-bias)*(v+fabOvershoot*d1[i]) + bias*(w.clean[i]+fabOvershoot*d2[i])
		w.x[i] = min(max(v, 0), 1)
	}
	return true
}

// next starts from the clean image towards the next target.
func (f *fabWalk) next(w *walk) bool {
	f.target++
	f.step, f.back = 0, true
	copy(w.x, w.clean)
	return f.target < len(f.targets)
}

// dot sums in four parts: one would wait for each addition.
func dot(a, b []float32) float64 {
	var s0, s1, s2, s3 float64
	for ; len(a) >= 4 && len(b) >= 4; a, b = a[4:], b[4:] {
		s0 += float64(a[0]) * float64(b[0])
		s1 += float64(a[1]) * float64(b[1])
		s2 += float64(a[2]) * float64(b[2])
		s3 += float64(a[3]) * float64(b[3])
	}
	for i, v := range a {
		s0 += float64(v) * float64(b[i])
	}
	return s0 + s1 + s2 + s3
}

// projection is the way from a point to a hyperplane with the least movement
// of any pixel, within the box.
type projection struct {
	move   []float32 // the way
	weight []float32 // |w|
	room   []float32 // how far each pixel can go towards the hyperplane
}

func newProjection(size int) projection {
	return projection{make([]float32, size), make([]float32, size), make([]float32, size)}
}

// project finds the way from p to {q: <w, q> = b} and returns the greatest
// movement of a pixel. Where the box does not reach the hyperplane, every pixel
// goes to the edge of the box.
//
// Pixel i moves by min(t, room_i) against the sign of the distance, for the
// least t with sum |w_i| min(t, room_i) = |<w, p> - b|. That sum is concave and
// piecewise linear in t, so Newton's method from 0 never goes too far and ends
// after a few pieces; it needs no sorting.
func (j *projection) project(p, w []float32, b float64) float64 {
	gap := dot(w, p) - b
	flip := uint32(0) // the sign bit, where a pixel must move with its weight
	if gap < 0 {
		flip, gap = 1<<31, -gap
	}
	// Signs of weights are a coin's throw, which branches would guess wrong half
	// the time: masks instead.
	p, weights, rooms := p[:len(w)], j.weight[:len(w)], j.room[:len(w)]
	for i, v := range w {
		bits := math.Float32bits(v) ^ flip
		size := bits &^ (1 << 31)
		up := uint32(int32(bits) >> 31)       // all ones where the weight is negative
		some := uint32(-int32(size)>>31) >> 1 // all ones but the sign where it is not 0
		room := math.Float32frombits((math.Float32bits(p[i])&^up | math.Float32bits(1-p[i])&up) & some)
		weights[i], rooms[i] = math.Float32frombits(size), room
	}
	t := float32(math.Inf(1))
	if dot(weights, rooms) > gap {
		t = j.solve(gap)
	}
	most := float32(0)
	for i, v := range w {
		d := min(t, rooms[i])
		most = max(most, d)
		down := (math.Float32bits(v) ^ flip ^ 1<<31) & (1 << 31)
		j.move[i] = math.Float32frombits(math.Float32bits(d) | down)
	}
	return float64(most)
}

// solve finds t with sum weight_i min(t, room_i) = gap, which the rooms allow.
func (j *projection) solve(gap float64) float32 {
	t := 0.0
	for {
		limit := float32(t)
		got, slope := 0.0, 0.0
		for i, room := range j.room {
			weight := math.Float32bits(j.weight[i])
			// Of floats that are not negative the larger has the larger bits.
			free := uint32(int32(math.Float32bits(limit)-math.Float32bits(room)) >> 31) // all ones where the room is larger
			slope += float64(math.Float32frombits(weight & free))
			got += float64(math.Float32frombits(weight&^free)) * float64(room)
		}
		if slope == 0 {
			return limit
		}
		// Where this piece of the sum, continued as a line, is the gap.
		next := (gap - got) / slope
		if !(float32(next) > limit) {
			return float32(next)
		}
		t = next
	}
}
