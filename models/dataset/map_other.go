//go:build !(linux || darwin || freebsd || netbsd || openbsd)

package dataset

import (
	"errors"
	"os"
)

// Elsewhere pixels stay on the heap.
const canMap = false

func mapFile(*os.File, int) ([]byte, error) { return nil, errors.ErrUnsupported }

func unmap([]byte) {}
