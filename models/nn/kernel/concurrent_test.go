package kernel

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
)

// Kernels give the same bits while goroutines move between threads and the
// garbage collector runs and grows stacks.
func TestConcurrentUse(t *testing.T) {
	each(t, func(t *testing.T) {
		for _, shape := range []Conv{
			{Channels: 18, Filters: 24, BF16: HasBF16()},
			{Channels: 16, Filters: 32, Winograd: true},
			{Channels: 32, Filters: 32, BF16: HasBF16(), PairsIn: path == "amx", PairsOut: path == "amx"},
		} {
			concurrently(t, shape)
		}
	})
}

func concurrently(t *testing.T, shape Conv) {
	const rows = 2
	rng := rand.New(rand.NewPCG(3, 3))
	shape.Height, shape.Width, shape.OutHeight, shape.OutWidth, shape.Kernel, shape.Stride, shape.Padding = 9, 8, 9, 8, 3, 1, 1
	channels, filters := shape.Channels, shape.Filters
	x, w, bias := fill(rng, rows*9*8*channels), fill(rng, 3*3*channels*filters), fill(rng, filters)
	dy := fill(rng, rows*4*4*filters)
	if shape.PairsIn {
		round(x, fill(rng, len(x)))
		round(dy, fill(rng, len(dy)))
	}
	work := func(depth int) (out []float32) {
		p := ConvPool{Conv: shape, Size: 2}
		packed, turned := make([]float32, p.Arranged()), make([]float32, p.Arranged())
		y, dx, dw := make([]float32, len(dy)), make([]float32, len(x)), make([]float32, len(w))
		deep(depth, func() {
			p.Turn(turned, w)
			p.Forward(y, x, p.Pack(packed, w), bias, rows, true)
			p.BackwardInput(dx, dy, turned, nil, rows)
			p.BackwardWeight(dw, make([]float32, filters), x, dy, rows)
			SignStep(dx, dx, dw[:len(dx)], 0.1, 0.2)
		})
		return slices.Concat(y, dx, dw)
	}
	want := work(0)
	turns := 8
	if testing.Short() {
		turns = 1
	}
	stop := make(chan struct{})
	var collector, workers sync.WaitGroup
	collector.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	})
	for g := range 6 {
		workers.Go(func() {
			for i := range turns {
				if g%2 == 0 { // on a thread of its own, which then ends
					runtime.LockOSThread()
				}
				got := work(i * 50)
				for k := range want {
					if got[k] != want[k] {
						t.Errorf("goroutine %d, turn %d: value %d is %v, alone it was %v", g, i, k, got[k], want[k])
						break
					}
				}
				if g%2 == 0 {
					runtime.UnlockOSThread()
				}
				runtime.Gosched()
			}
		})
	}
	workers.Wait()
	close(stop)
	collector.Wait()
}

// deep calls f with that many more frames on the stack, which makes it move.
//
//go:noinline
func deep(frames int, f func()) {
	var room [128]byte
	if frames == 0 {
		f()
	} else {
		deep(frames-1, f)
	}
	runtime.KeepAlive(&room)
}
