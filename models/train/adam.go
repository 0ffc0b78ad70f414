package train

import (
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/temper-ml/temper/models/nn/kernel"
)

// snapshot is what an optimiser step changes: enough to go back to, or to
// resume from.
type snapshot struct {
	updates int       // optimiser steps so far
	weights []float32 // the network's flat parameter vector
	m, v    []float32 // Adam's running means of the gradient and of its square
	ema     []float32 // moving average of the weights; kept also where the recipe has none
}

func newSnapshot(weights []float32) snapshot {
	n := len(weights)
	return snapshot{weights: weights, m: make([]float32, n), v: make([]float32, n), ema: slices.Clone(weights)}
}

// vectors lists the snapshot's memory in the order of the checkpoint file.
func (s *snapshot) vectors() [][]float32 { return [][]float32{s.weights, s.m, s.v, s.ema} }

func (s *snapshot) copyFrom(o *snapshot) {
	s.updates = o.updates
	for i, to := range s.vectors() {
		copy(to, o.vectors()[i])
	}
}

// chunk is the number of parameters one goroutine works on at a time. It is
// fixed, so that sums over chunks do not depend on the number of processors.
const chunk = 16 << 10

// chunks calls work for every chunk of n values, from all processors.
func chunks(n int, work func(i, lo, hi int)) {
	var next atomic.Int64
	total := (n + chunk - 1) / chunk
	loop := func() {
		for i := int(next.Add(1)) - 1; i < total; i = int(next.Add(1)) - 1 {
			work(i, i*chunk, min((i+1)*chunk, n))
		}
	}
	var wait sync.WaitGroup
	for range min(total, runtime.GOMAXPROCS(0)) - 1 {
		wait.Go(loop)
	}
	loop()
	wait.Wait()
}

// norm is the Euclidean norm of the gradient: NaN or infinite if any of its
// values is. partial holds a sum for each chunk.
func norm(gradient []float32, partial []float64) float64 {
	chunks(len(gradient), func(i, lo, hi int) {
		sum := 0.0
		for _, g := range gradient[lo:hi] {
			sum += float64(g) * float64(g)
		}
		partial[i] = sum
	})
	total := 0.0
	for _, sum := range partial {
		total += sum
	}
	return math.Sqrt(total)
}

// update takes one step of Adam (Kingma and Ba 2015) down the gradient times
// scale, and of the weights' moving average.
//
// The average's decay starts low, (1+t)/(10+t), so that it forgets the first
// weights also in a short training.
func (s *snapshot) update(gradient []float32, scale, rate float64, a Adam, decay float64) {
	s.updates++
	t := float64(s.updates)
	unbias := math.Sqrt(1 - math.Pow(a.Beta2, t))
	c := kernel.AdamStep{
		Beta1: float32(a.Beta1), Rest1: float32(1 - a.Beta1),
		Beta2: float32(a.Beta2), Rest2: float32(1 - a.Beta2),
		Rate:    float32(rate * unbias / (1 - math.Pow(a.Beta1, t))),
		Epsilon: float32(a.Epsilon * unbias),
		Average: float32(1 - min(decay, (1+t)/(10+t))),
		Scale:   float32(scale),
	}
	chunks(len(gradient), func(_, lo, hi int) {
		kernel.Adam(s.weights[lo:hi], s.m[lo:hi], s.v[lo:hi], s.ema[lo:hi], gradient[lo:hi], &c)
	})
}

// Optimiser takes steps of Adam as training does, on all cores.
type Optimiser struct{ state snapshot }

// NewOptimiser makes one for a network's flat vector of weights, which it changes.
func NewOptimiser(weights []float32) *Optimiser { return &Optimiser{newSnapshot(weights)} }

// Step goes down the gradient times scale.
func (o *Optimiser) Step(gradient []float32, scale, rate float64) {
	o.state.update(gradient, scale, rate, Adam{Beta1: 0.9, Beta2: 0.999, Epsilon: 1e-8}, 0.999)
}
