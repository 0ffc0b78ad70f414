package dataset

import (
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// heap is what the program holds on its heap now.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A large set lies in a file: reading it, taking its digest and reading its
// examples leave the heap as it was.
func TestLargeSetNeedsNoHeap(t *testing.T) {
	if !canMap {
		t.Skip("files cannot be mapped here")
	}
	for _, kind := range []byte{idxUbyte, idxFloat} {
		need := 1
		if kind == idxFloat {
			need = 4
		}
		side, n := 256, 0
		for n*side*side*need <= mapFrom {
			n++
		}
		dir := t.TempDir()
		f, err := os.Create(filepath.Join(dir, "test-images-idx3-ubyte"))
		if err != nil {
			t.Fatal(err)
		}
		header := []byte{0, 0, kind, 3}
		for _, d := range []int{n, side, side} {
			header = binary.BigEndian.AppendUint32(header, uint32(d))
		}
		// A file with holes, but for the last value: 1 as float32, or its bytes.
		last := int64(len(header) + n*side*side*need - 4)
		_, errWrite := f.Write(header)
		_, errEnd := f.WriteAt([]byte{0x3f, 0x80, 0, 0}, last)
		if errWrite != nil || errEnd != nil || f.Close() != nil {
			t.Fatal(errWrite, errEnd)
		}
		labels := &IDX{Dims: []int{n}, Bytes: make([]byte, n)}
		g, err := os.Create(filepath.Join(dir, "test-labels-idx1-ubyte"))
		if err != nil {
			t.Fatal(err)
		}
		if err := WriteIDX(g, labels); err != nil || g.Close() != nil {
			t.Fatal(err)
		}

		before := heap()
		s, err := Open(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		s.Digest()
		pixels := make([]float32, side*side)
		s.Test.Read(pixels, n-1, n)
		if got := int64(heap()) - int64(before); got > 8<<20 {
			t.Errorf("%d bytes of heap for a set of %d", got, n*side*side*need)
		}
		want := []float32{0x3f / 255., 0x80 / 255., 0, 0}
		if kind == idxFloat {
			want = []float32{0, 0, 0, 1}
		}
		for i, v := range pixels[side*side-4:] {
			if v != want[i] {
				t.Errorf("pixel %d from the end is %v, want %v", 4-i, v, want[i])
			}
		}
		runtime.KeepAlive(s)
	}
}

// A disk without room is an error that says what to do.
func TestCase16NoRoomForPixels(t *testing.T) {
	if !canMap {
		t.Skip("files cannot be mapped here")
	}
	t.Setenv("TMPDIR", filepath.Join(t.TempDir(), "absent"))
	if _, err := newPixels(mapFrom); err == nil || !strings.Contains(err.Error(), "TMPDIR") {
		t.Errorf("error %v", err)
	}
	if _, err := newPixels(100); err != nil {
		t.Errorf("a small set needs no folder: %v", err)
	}
}

func TestPixelsAreExactlyAsMany(t *testing.T) {
	for _, size := range []int{3, mapFrom} {
		p, err := newPixels(size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.bytes(); err != io.ErrUnexpectedEOF {
			t.Errorf("too few: error %v", err)
		}
		if _, err := p.Write(make([]byte, size)); err != nil {
			t.Error(err)
		}
		if _, err := p.Write([]byte{1}); err != io.ErrShortWrite {
			t.Errorf("one too many: error %v", err)
		}
		b, err := p.bytes()
		p.close()
		if err != nil || len(b) != size {
			t.Errorf("%d bytes (%v)", len(b), err)
		}
		b[0] = 1 // a set may be changed in memory
		unmap(b)
	}
}
