//go:build unix

package demo

import (
	"os"
	"syscall"
)

// lock takes the file for this process; it fails where another has it. The
// lock ends with the process, however that ends.
func lock(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }
