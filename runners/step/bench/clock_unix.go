//go:build unix

package bench

import (
	"runtime"
	"syscall"
	"time"
)

// processorTime is what this process has used of each of its processors.
func processorTime() time.Duration {
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		panic("bench: " + err.Error()) // its arguments are constant
	}
	return time.Duration(used.Utime.Nano()+used.Stime.Nano()) / time.Duration(runtime.GOMAXPROCS(0))
}
