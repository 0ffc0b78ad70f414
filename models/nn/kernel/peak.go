package kernel

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// Peak measures, for about the given time by the given clock, what all cores
// together reach at the instruction that does most of a path's work, without any
// memory: 10^9 operations a second, a multiply-add being two. No kernel can be
// faster.
func Peak(path string, duration time.Duration, clock func() time.Duration) float64 {
	perTurn, loop := peak(path)
	turns := 1 << 24 / perTurn // few enough that the time is not overstepped, enough that the clock costs nothing
	start := clock()
	var wait sync.WaitGroup
	var done atomic.Int64
	for range runtime.GOMAXPROCS(0) {
		wait.Go(func() {
			for clock()-start < duration {
				loop(turns)
				done.Add(int64(turns))
			}
		})
	}
	wait.Wait()
	return float64(done.Load()) * float64(perTurn) / (clock() - start).Seconds() / 1e9
}

// peakPortable adds products in eight independent sums.
func peakPortable(n int) {
	var sum [8]float32
	x, y := float32(n), 1/float32(n)
	for range n {
		sum[0] += x * y
		sum[1] += x * y
		sum[2] += x * y
		sum[3] += x * y
		sum[4] += x * y
		sum[5] += x * y
		sum[6] += x * y
		sum[7] += x * y
		x, y = y, x
	}
	runtime.KeepAlive(sum) // or the compiler leaves the loop out
}
