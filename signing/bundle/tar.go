package bundle

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	blobPrefix = "blobs/sha256/"
	// maxEntries is that of blobs and the few files and folders beside them.
	maxEntries = maxBlobs + 8
	// maxIndex is many times the index of a bundle.
	maxIndex = 1 << 20
	// maxTrailer is the padding that tools add after the archive's end.
	maxTrailer = 1 << 20
)

// entryPattern is the only names that an archive may have: those of an OCI
// image layout. So no name can leave its folder, on any system.
var entryPattern = regexp.MustCompile(`^(oci-layout|index\.json|blobs/sha256/[0-9a-f]{64})$`)

func digestOf(s string) digest.Digest { return digest.Digest(s) }

// writeTar writes files sorted by name, all else about them constant.
func writeTar(w io.Writer, files map[string][]byte) error {
	t := tar.NewWriter(w)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(files[name])), ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if _, err := t.Write(files[name]); err != nil {
			return err
		}
	}
	return t.Close()
}

// readTar unpacks an archive into an empty folder. Only the files of an OCI
// image layout are taken, each once; blobs must have the content that their
// name says.
func readTar(archive io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.MkdirAll(strings.TrimSuffix(blobPrefix, "/"), 0o700); err != nil {
		return err
	}
	buffered := bufio.NewReaderSize(archive, 64<<10)
	if start, _ := buffered.Peek(512); !Sniff(start) {
		return errors.New("it is no tar archive; one that is compressed has to be unpacked first")
	}
	t := tar.NewReader(buffered)
	seen := map[string]bool{}
	var total int64
	for entries := 0; ; entries++ {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("the archive is damaged: %w", err)
		}
		if entries == maxEntries {
			return fmt.Errorf("more than %d entries", maxEntries)
		}
		if h.Typeflag == tar.TypeDir && (h.Name == "blobs/" || h.Name == blobPrefix) {
			continue
		}
		switch limit := int64(maxBytes); {
		case h.Typeflag != tar.TypeReg:
			return fmt.Errorf("entry %.100q is not a regular file", h.Name)
		case !entryPattern.MatchString(h.Name):
			return fmt.Errorf("entry %.100q is not a file of an OCI image layout", h.Name)
		case seen[h.Name]:
			return fmt.Errorf("entry %.100q comes twice", h.Name)
		case h.FileInfo().Mode()&(os.ModeSetuid|os.ModeSetgid|os.ModeSticky) != 0:
			return fmt.Errorf("entry %.100q has mode %v", h.Name, h.FileInfo().Mode())
		case !strings.HasPrefix(h.Name, blobPrefix) && h.Size > maxIndex:
			return fmt.Errorf("%s is larger than %d bytes", h.Name, maxIndex)
		case h.Size < 0 || h.Size > limit-total:
			return fmt.Errorf("it is larger than %d bytes", limit)
		}
		seen[h.Name] = true
		total += h.Size
		if err := unpack(root, h, t); err != nil {
			return err
		}
	}
	for _, name := range []string{ocispec.ImageLayoutFile, ocispec.ImageIndexFile} {
		if !seen[name] {
			return fmt.Errorf("it holds no %s: a bundle is an OCI image layout", name)
		}
	}
	return trailer(buffered)
}

// unpack writes one file, of exactly the size and, for a blob, the digest that
// its header says.
func unpack(root *os.Root, h *tar.Header, content io.Reader) error {
	f, err := root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, sum), io.LimitReader(content, h.Size))
	if err == nil && n != h.Size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("%s: %w", h.Name, err)
	}
	if want, ok := strings.CutPrefix(h.Name, blobPrefix); ok && hex.EncodeToString(sum.Sum(nil)) != want {
		return fmt.Errorf("%s has other content than its digest says", h.Name)
	}
	return f.Close()
}

// trailer checks that nothing but padding follows the archive's end.
func trailer(r io.Reader) error {
	rest, err := io.ReadAll(io.LimitReader(r, maxTrailer+1))
	if err != nil {
		return err
	}
	if len(rest) > maxTrailer || strings.Trim(string(rest), "\x00") != "" {
		return errors.New("bytes follow the archive's end")
	}
	return nil
}
