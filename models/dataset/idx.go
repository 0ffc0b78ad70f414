package dataset

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// IDX is the array in an IDX file, the format of MNIST: a magic number (0, 0,
// element type, number of dimensions), each dimension as a big-endian uint32,
// and the elements row-major. http://yann.lecun.com/exdb/mnist/
//
// Bytes holds elements of type 0x08 (ubyte), Floats those of type 0x0D
// (float32); exactly one is set, with the product of Dims as its length.
type IDX struct {
	Dims   []int
	Bytes  []byte
	Floats []float32
}

const (
	idxUbyte = 0x08
	idxFloat = 0x0D

	// maxDims is that of colour images: examples, height, width, channels.
	maxDims = 4
	// MaxFile bounds an IDX file, compressed or not: ImageNet at 64x64 does not
	// fit, CIFAR-10 as float32 does, six times over.
	MaxFile = 1 << 30
	// maxDeflate is the best ratio deflate can reach: 258 bytes for two bits.
	maxDeflate = 1032
)

// ParseIDX reads an IDX file from memory; see ReadIDX.
func ParseIDX(data []byte) (*IDX, error) { return ReadIDX(bytes.NewReader(data), int64(len(data))) }

// ReadIDX reads an IDX file of size bytes, plain or gzip, and refuses it, before
// memory for its elements is allocated, where its dimensions do not fit the
// file's size. Large arrays take no heap: see pixels.
func ReadIDX(f io.ReaderAt, size int64) (*IDX, error) {
	if size > MaxFile {
		return nil, fmt.Errorf("idx: %d bytes: at most %d", size, MaxFile)
	}
	in := bufio.NewReader(io.NewSectionReader(f, 0, size))
	if start, _ := in.Peek(2); len(start) == 2 && start[0] == 0x1f && start[1] == 0x8b {
		return readGzip(in, f, size)
	}
	kind, dims, header, err := parseHeader(in)
	if err != nil {
		return nil, err
	}
	if err := checkSize(kind, dims, int(size)-header); err != nil {
		return nil, err
	}
	return elements(kind, dims, in, int(size)-header)
}

// readGzip trusts neither the size in gzip's footer nor the dimensions in the
// IDX header, but they must agree, and be within reach of the compressed size,
// before memory is allocated for them.
func readGzip(in *bufio.Reader, f io.ReaderAt, packed int64) (*IDX, error) {
	z, err := gzip.NewReader(in)
	if err != nil {
		return nil, fmt.Errorf("idx: %w", err)
	}
	z.Multistream(false)
	kind, dims, header, err := parseHeader(z)
	if err != nil {
		return nil, err
	}
	var footer [4]byte
	if _, err := f.ReadAt(footer[:], packed-4); err != nil && err != io.EOF { // parseHeader passed, so the file is longer than that
		return nil, fmt.Errorf("idx: %w", err)
	}
	size := int(binary.LittleEndian.Uint32(footer[:])) - header
	if err := checkSize(kind, dims, size); err != nil {
		return nil, err
	}
	if int64(size/maxDeflate) > packed {
		return nil, fmt.Errorf("idx: dimensions %v need %d bytes: %d compressed bytes cannot hold them", dims, size, packed)
	}
	a, err := elements(kind, dims, z, size)
	if err != nil {
		return nil, err
	}
	if n, err := z.Read(make([]byte, 1)); n != 0 {
		return nil, fmt.Errorf("idx: bytes after the %d of dimensions %v", size, dims)
	} else if err != io.EOF { // EOF comes after gzip's checksum is verified
		return nil, fmt.Errorf("idx: %w", err)
	}
	if n, err := io.Copy(io.Discard, in); n > 0 || err != nil {
		return nil, fmt.Errorf("idx: %d bytes after the end of the gzip stream (%v)", n, err)
	}
	return a, nil
}

func parseHeader(r io.Reader) (kind byte, dims []int, size int, err error) {
	var magic [4]byte
	if _, err := io.ReadFull(r, magic[:]); err != nil {
		return 0, nil, 0, fmt.Errorf("idx: no magic number: %w", err)
	}
	if magic[0] != 0 || magic[1] != 0 {
		return 0, nil, 0, fmt.Errorf("idx: magic number %#x: an IDX file starts with two zero bytes", magic)
	}
	kind = magic[2]
	if kind != idxUbyte && kind != idxFloat {
		return 0, nil, 0, fmt.Errorf("idx: element type %#02x: supported are 0x08 (ubyte) and 0x0d (float32)", kind)
	}
	n := int(magic[3])
	if n < 1 || n > maxDims {
		return 0, nil, 0, fmt.Errorf("idx: %d dimensions: must be 1 to %d", n, maxDims)
	}
	raw := make([]byte, 4*n)
	if _, err := io.ReadFull(r, raw); err != nil {
		return 0, nil, 0, fmt.Errorf("idx: truncated in the dimensions: %w", err)
	}
	for i := range n {
		dims = append(dims, int(binary.BigEndian.Uint32(raw[4*i:])))
	}
	return kind, dims, 4 + len(raw), nil
}

// checkSize compares the bytes that the dimensions need with those there are.
func checkSize(kind byte, dims []int, have int) error {
	need := 1
	if kind == idxFloat {
		need = 4
	}
	for _, d := range dims {
		if d == 0 {
			return fmt.Errorf("idx: dimensions %v: none may be zero", dims)
		}
		if d > MaxFile/need {
			return fmt.Errorf("idx: dimensions %v: more than %d bytes", dims, MaxFile)
		}
		need *= d
	}
	switch {
	case have < need:
		return fmt.Errorf("idx: truncated: dimensions %v need %d bytes, %d are there", dims, need, max(have, 0))
	case have > need:
		return fmt.Errorf("idx: %d bytes after the %d of dimensions %v", have-need, need, dims)
	}
	return nil
}

// elements reads size bytes of r.
func elements(kind byte, dims []int, r io.Reader, size int) (*IDX, error) {
	p, err := newPixels(size)
	if err != nil {
		return nil, fmt.Errorf("idx: %w", err)
	}
	defer p.close()
	buf := make([]byte, min(size, 32<<10))
	for rest := size; rest > 0; {
		part := buf[:min(rest, len(buf))]
		if _, err := io.ReadFull(r, part); err != nil {
			return nil, fmt.Errorf("idx: truncated: dimensions %v need %d bytes: %w", dims, size, err)
		}
		if kind == idxFloat {
			for i := 0; i < len(part); i += 4 {
				binary.NativeEndian.PutUint32(part[i:], binary.BigEndian.Uint32(part[i:]))
			}
		}
		if _, err := p.Write(part); err != nil {
			return nil, fmt.Errorf("idx: %w", err)
		}
		rest -= len(part)
	}
	all, err := p.bytes()
	if err != nil {
		return nil, fmt.Errorf("idx: %w", err)
	}
	if kind == idxFloat {
		return &IDX{Dims: dims, Floats: asFloats(all)}, nil
	}
	return &IDX{Dims: dims, Bytes: all}, nil
}

// WriteIDX writes an array, uncompressed: the same array gives the same bytes.
func WriteIDX(w io.Writer, a *IDX) error {
	kind, have := byte(idxUbyte), len(a.Bytes)
	if a.Floats != nil {
		kind, have = idxFloat, 4*len(a.Floats)
	}
	if a.Bytes != nil && a.Floats != nil {
		return errors.New("idx: elements both as bytes and as floats")
	}
	if len(a.Dims) < 1 || len(a.Dims) > maxDims {
		return fmt.Errorf("idx: %d dimensions: must be 1 to %d", len(a.Dims), maxDims)
	}
	header := []byte{0, 0, kind, byte(len(a.Dims))}
	for _, d := range a.Dims {
		if d < 1 || d > math.MaxUint32 {
			return fmt.Errorf("idx: dimensions %v", a.Dims)
		}
		header = binary.BigEndian.AppendUint32(header, uint32(d))
	}
	if err := checkSize(kind, a.Dims, have); err != nil {
		return err
	}
	out := bufio.NewWriter(w)
	out.Write(header) // bufio keeps the first error for Flush
	out.Write(a.Bytes)
	if err := writeFloats(out, a.Floats); err != nil {
		return err
	}
	return out.Flush()
}
