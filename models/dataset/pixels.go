package dataset

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"unsafe"
)

// mapFrom is the size from which pixels lie in a file instead of on the heap:
// MNIST stays on the heap, CIFAR-10 does not.
const mapFrom = 64 << 20

// pixels collects the values of a set, whose size in bytes is known before.
//
// A large set goes to a temporary file without a name, mapped into memory: the
// system drops its pages when memory is short and reads them again when they
// are wanted, so that a set needs no heap. The file is a private copy: nobody
// can change or cut what a digest was taken of.
type pixels struct {
	room int      // bytes not yet written
	heap []byte   // nil where there is a file
	at   int      // in heap
	file *os.File // nil where there is a heap
	size int      // of the file
	out  *bufio.Writer
}

func newPixels(size int) (*pixels, error) {
	p := &pixels{room: size, size: size}
	if size < mapFrom || !canMap {
		floats := make([]float32, (size+3)/4) // aligned for either kind of value
		p.heap = unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(floats))), size)
		return p, nil
	}
	f, err := os.CreateTemp("", "temper-pixels-*")
	if err != nil {
		return nil, p.full(err)
	}
	os.Remove(f.Name()) // the open file stays until it is closed and unmapped
	p.file, p.out = f, bufio.NewWriterSize(f, 1<<20)
	return p, nil
}

func (p *pixels) Write(b []byte) (int, error) {
	if len(b) > p.room {
		return 0, io.ErrShortWrite
	}
	p.room -= len(b)
	if p.heap != nil {
		p.at += copy(p.heap[p.at:], b)
		return len(b), nil
	}
	n, err := p.out.Write(b)
	if err != nil {
		err = p.full(err)
	}
	return n, err
}

func (p *pixels) full(err error) error {
	return fmt.Errorf("no room for %d bytes of pixels: %w: set TMPDIR to a folder that has it", p.size, err)
}

// bytes is what was written, once all of it was. It may be written to.
func (p *pixels) bytes() ([]byte, error) {
	if p.room != 0 {
		return nil, io.ErrUnexpectedEOF
	}
	if p.file == nil {
		return p.heap, nil
	}
	if err := p.out.Flush(); err != nil {
		return nil, p.full(err)
	}
	return mapFile(p.file, p.size)
}

// close gives the file back; what bytes returned stays valid.
func (p *pixels) close() {
	if p.file != nil {
		p.file.Close()
	}
}

// asFloats looks at bytes of pixels as the floats that they were written as.
func asFloats(b []byte) []float32 {
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}
