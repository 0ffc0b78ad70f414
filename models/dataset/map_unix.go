//go:build linux || darwin || freebsd || netbsd || openbsd

package dataset

import (
	"os"
	"syscall"
)

const canMap = true

// mapFile maps a file; changes to the memory stay in memory.
func mapFile(f *os.File, size int) ([]byte, error) {
	return syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE)
}

// unmap gives back what mapFile returned; on the heap it does nothing.
func unmap(b []byte) {
	if len(b) >= mapFrom {
		syscall.Munmap(b)
	}
}
