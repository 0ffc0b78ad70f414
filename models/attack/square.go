package attack

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/temper-ml/temper/models/nn"
)

// Square (Andriushchenko et al. 2020) is a random search that needs no
// gradient: it changes squares of the image and keeps what lowers the margin.

// What AutoAttack uses.
const (
	squareQueries = 5000
	squareShare   = 0.8 // share of the image that the first squares cover
)

// squareHalvings are the queries after which the share halves.
var squareHalvings = []int{10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000}

// Square looks at a number of images from each of some random starts.
func Square(t Threat, queries, restarts int) Attack { return square{t, queries, max(restarts, 1)} }

type square struct {
	threat            Threat
	queries, restarts int
}

func (a square) Name() string {
	if a.queries == squareQueries && a.restarts == 1 {
		return "square"
	}
	return fmt.Sprintf("square-%d", a.queries) + times(a.restarts)
}

func (a square) Perturb(ctx context.Context, m Model, x []float32, labels []uint8, seed uint64) ([]float32, error) {
	ball, err := a.threat.Ball()
	if err != nil {
		return nil, err
	}
	shape := m.Network().Input
	base := squareWalk{square: a, shape: shape, seed: seed}
	if a.threat.Norm != "l2" {
		return walkAll(ctx, m, a.threat, x, labels, false, func() walker {
			return &squareLinf{squareWalk: base, ball: ball.(Linf), before: make([]float32, shape.Size())}
		})
	}
	bumps := allBumps(base)
	return walkAll(ctx, m, a.threat, x, labels, false, func() walker {
		return &squareL2{squareWalk: base, ball: ball, bumps: bumps, best: make([]float32, shape.Size()), change: make([]float32, shape.Size())}
	})
}

// squareWalk is what the search has in common in all norms.
type squareWalk struct {
	square
	shape   nn.Shape
	seed    uint64
	restart int
	query   int // asked from this start
	margin  float32
	rng     *rand.Rand
}

// side of the square of a query: the share halves as the queries go on.
func (s *squareWalk) side() int {
	share := squareShare
	for _, at := range squareHalvings {
		if s.query > at {
			share /= 2
		}
	}
	side := int(math.RoundToEven(math.Sqrt(share * float64(s.shape.Height*s.shape.Width))))
	return min(max(side, 1), s.shape.Height, s.shape.Width)
}

// begins a start's random stream.
func (s *squareWalk) begins(w *walk) {
	s.rng = rand.New(w.draw(s.seed, uint64(s.restart)))
	s.restart++
	s.query = -1
}

func (s *squareWalk) slope(_ *walk, _, _ []float32) {}

// sign is +1 or -1.
func (s *squareWalk) sign() float32 { return float32(int(s.rng.Uint32()>>31)*2 - 1) }

// squareLinf sets whole squares to the edge of the ball.
type squareLinf struct {
	squareWalk
	ball           Linf
	top, left, now int       // the square of the query, and its side; 0 for a start
	before         []float32 // what it covers
	back           bool      // the square before was taken back
}

func (s *squareLinf) begin(w *walk, _ []float32) {
	s.restart = 0
	s.start(w)
}

// start draws vertical stripes: every column and channel goes up or down by
// epsilon.
func (s *squareLinf) start(w *walk) {
	s.begins(w)
	s.now = 0
	row := s.shape.Width * s.shape.Channels
	for i := range row {
		d := s.sign() * float32(s.ball)
		for at := i; at < len(w.x); at += row {
			w.x[at] = w.clean[at] + d
		}
	}
	s.ball.Project(w.x, w.clean)
}

func (s *squareLinf) visit(w *walk, logits, _ []float32) bool {
	margin := margin(logits, w.label)
	if Predict(logits) != int(w.label) {
		copy(w.adv, w.x)
		return false
	}
	s.back = s.query >= 0 && !(margin < s.margin)
	if s.back {
		s.swap(w)
	} else {
		s.margin = margin
	}
	s.query++
	if s.query == s.queries {
		copy(w.adv, w.x)
		if s.restart == s.restarts {
			return false
		}
		s.start(w)
		return true
	}
	s.now = s.side()
	s.top, s.left = s.rng.IntN(s.shape.Height-s.now+1), s.rng.IntN(s.shape.Width-s.now+1)
	s.keep(w)
	for c := range s.shape.Channels {
		d := 2 * s.sign() * float32(s.ball)
		s.lines(func(at, n int) {
			for i := at + c; i < at+n; i += s.shape.Channels {
				w.x[i] += d
			}
		})
	}
	s.lines(func(at, n int) { s.ball.Project(w.x[at:at+n], w.clean[at:at+n]) })
	return true
}

func (s *squareLinf) changed() (back bool, window nn.Window) {
	return s.back, nn.Window{Top: s.top, Left: s.left, Height: s.now, Width: s.now}
}

// lines calls f for the pixels of each line of the square.
func (s *squareLinf) lines(f func(at, n int)) {
	for y := s.top; y < s.top+s.now; y++ {
		f((y*s.shape.Width+s.left)*s.shape.Channels, s.now*s.shape.Channels)
	}
}

func (s *squareLinf) keep(w *walk) {
	s.lines(func(at, n int) { copy(s.before[at:at+n], w.x[at:at+n]) })
}

// swap takes the square back.
func (s *squareLinf) swap(w *walk) {
	s.lines(func(at, n int) { copy(w.x[at:at+n], s.before[at:at+n]) })
}

// squareL2 moves length of the perturbation from one window to another, as a
// pair of bumps of opposite sign.
type squareL2 struct {
	squareWalk
	ball         Ball
	bumps        map[int][]float32 // by side; shared by all rows, which only read it
	best, change []float32
}

// allBumps makes those of every side that a search has.
func allBumps(base squareWalk) map[int][]float32 {
	s := &squareL2{squareWalk: base}
	bumps := map[int][]float32{s.tile(): bump(s.tile())}
	for _, at := range append([]int{-1}, squareHalvings...) {
		s.query = at + 1
		if side := s.window(); bumps[side] == nil {
			bumps[side] = bump(side)
		}
	}
	return bumps
}

// tile is the side of the first pattern's tiles, five to a line.
func (s *squareL2) tile() int { return max(min(s.shape.Height, s.shape.Width)/5, 1) }

// window is the side of a query's windows: odd where there is room, at least 3.
func (s *squareL2) window() int {
	side := max(s.side(), 3) | 1
	for side > min(s.shape.Height, s.shape.Width) {
		side--
	}
	return side
}

func (s *squareL2) begin(w *walk, _ []float32) {
	s.restart = 0
	s.start(w)
}

// start covers the image with tiles of bumps.
func (s *squareL2) start(w *walk) {
	s.begins(w)
	clear(s.change)
	tile := s.tile()
	for top := s.shape.Height % tile / 2; top+tile <= s.shape.Height; top += tile {
		for left := s.shape.Width % tile / 2; left+tile <= s.shape.Width; left += tile {
			turned := s.rng.Uint32()>>31 == 1
			for c := range s.shape.Channels {
				sign := s.sign()
				s.window2(top, left, tile, c, func(at, y, x int) { s.change[at] = sign * s.at(tile, y, x, turned) })
			}
		}
	}
	s.apply(w)
}

// at is the bump's value at a pixel.
func (s *squareL2) at(side, y, x int, turned bool) float32 {
	if turned {
		y, x = x, y
	}
	return s.bumps[side][y*side+x]
}

// window2 calls f for one channel of the pixels of a window.
func (s *squareL2) window2(top, left, side, channel int, f func(at, y, x int)) {
	for y := range side {
		for x := range side {
			f(((top+y)*s.shape.Width+left+x)*s.shape.Channels+channel, y, x)
		}
	}
}

// apply puts the image at epsilon from the clean one in the direction of change.
func (s *squareL2) apply(w *walk) {
	scale := float32(s.threat.Epsilon / (l2Norm(s.change) + tiny))
	for i, c := range w.clean {
		w.x[i] = c + s.change[i]*scale
	}
	s.ball.Project(w.x, w.clean)
}

func (s *squareL2) visit(w *walk, logits, _ []float32) bool {
	margin := margin(logits, w.label)
	if Predict(logits) != int(w.label) {
		copy(w.adv, w.x)
		return false
	}
	if s.query < 0 || margin < s.margin {
		s.margin = margin
		copy(s.best, w.x)
	}
	s.query++
	if s.query == s.queries {
		copy(w.adv, s.best)
		if s.restart == s.restarts {
			return false
		}
		s.start(w)
		return true
	}
	for i, c := range w.clean {
		s.change[i] = s.best[i] - c
	}
	s.exchange(s.window())
	s.apply(w)
	return true
}

// exchange gives the length of one window's change, and what the ball still
// allows, to another window.
func (s *squareL2) exchange(side int) {
	place := func() (top, left int) {
		return s.rng.IntN(s.shape.Height - side + 1), s.rng.IntN(s.shape.Width - side + 1)
	}
	top, left := place()
	top2, left2 := place()
	turned := s.rng.Uint32()>>31 == 1
	sum := 0.0 // squared length in the two windows together
	square := func(at, _, _ int) { sum += float64(s.change[at]) * float64(s.change[at]) }
	channels := s.shape.Channels
	for c := range channels {
		s.window2(top, left, side, c, square)
		s.window2(top2, left2, side, c, func(at, y, x int) {
			if y, x := top2+y-top, left2+x-left; y < 0 || x < 0 || y >= side || x >= side {
				square(at, 0, 0) // not in the first window too
			}
		})
	}
	total := l2Norm(s.change)
	free := max(s.threat.Epsilon*s.threat.Epsilon-total*total, 0)
	length := math.Sqrt(free/float64(channels) + sum)
	for c := range channels {
		sign := s.sign()
		old := 0.0
		s.window2(top, left, side, c, func(at, _, _ int) { old += float64(s.change[at]) * float64(s.change[at]) })
		old = math.Sqrt(old) + tiny
		now := 0.0
		s.window2(top, left, side, c, func(at, y, x int) {
			v := sign*s.at(side, y, x, turned) + s.change[at]/float32(old)
			s.change[at] = v
			now += float64(v) * float64(v)
		})
		scale := float32(length / (math.Sqrt(now) + tiny))
		s.window2(top, left, side, c, func(at, _, _ int) { s.change[at] *= scale })
		s.window2(top2, left2, side, c, func(at, y, x int) {
			if y, x := top2+y-top, left2+x-left; y < 0 || x < 0 || y >= side || x >= side {
				s.change[at] = 0
			}
		})
	}
}

// bump is a square of length 1 whose upper half is a hill and whose lower half
// is a dale.
func bump(side int) []float32 {
	all := make([]float32, side*side)
	half := side / 2
	hill(all[:half*side], half, side, 1)
	hill(all[half*side:], side-half, side, -1)
	norm := float32(l2Norm(all) + tiny)
	for i := range all {
		all[i] /= norm
	}
	return all
}

// hill adds squares around the middle, the k-th of height 1/k^2, and makes its
// length 1.
func hill(to []float32, height, width int, sign float32) {
	middleY, middleX := height/2, width/2
	for k := 0; k < max(height/2+1, width/2+1); k++ {
		for y := max(middleY-k, 0); y < min(middleY+k+1, height); y++ {
			for x := max(middleX-k, 0); x < min(middleX+k+1, width); x++ {
				to[y*width+x] += 1 / float32((k+1)*(k+1))
			}
		}
	}
	norm := float32(l2Norm(to) + tiny)
	for i := range to {
		to[i] *= sign / norm
	}
}
