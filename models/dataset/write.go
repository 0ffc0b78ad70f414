package dataset

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Write stores splits as a folder of uncompressed IDX files that Open reads
// back with the same digests; empty or nil parts are left out. The same splits
// give the same bytes. Files are complete before they get their names: a full
// disk or a kill leaves no truncated file under the name of a whole one.
func Write(dir string, s *Splits) error {
	if err := write(dir, s); err != nil {
		return fmt.Errorf("write dataset %s: %w", s.Name, err)
	}
	return nil
}

func write(dir string, s *Splits) error {
	if s.Test.Len() == 0 {
		return errors.New("no test examples")
	}
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	var staged []*stagedFile
	defer func() {
		for _, f := range staged {
			f.discard()
		}
	}()
	stage := func(name string, content func(io.Writer) error) error {
		f, err := stageFile(filepath.Join(dir, name), content)
		if err == nil {
			staged = append(staged, f)
		}
		return err
	}
	for i, set := range []*Set{s.Train, s.Validation, s.Test} {
		if set.Len() == 0 {
			continue
		}
		if err := set.Validate(); err != nil {
			return err
		}
		prefix := parts[i].prefixes[0]
		dims := []int{set.Len(), set.Shape.Height, set.Shape.Width}
		if set.Shape.Channels != 1 {
			dims = append(dims, set.Shape.Channels)
		}
		kind := "ubyte"
		if set.Floats != nil {
			kind = "float"
		}
		err := stage(fmt.Sprintf("%s-images-idx%d-%s", prefix, len(dims), kind), func(w io.Writer) error {
			return WriteIDX(w, &IDX{Dims: dims, Bytes: set.Bytes, Floats: set.Floats})
		})
		if err != nil {
			return err
		}
		err = stage(prefix+"-labels-idx1-ubyte", func(w io.Writer) error {
			return WriteIDX(w, &IDX{Dims: dims[:1], Bytes: set.Labels})
		})
		if err != nil {
			return err
		}
	}
	classes := strings.Join(s.Test.Classes, "\n") + "\n"
	if _, err := parseClasses(classesFile, classes); err != nil {
		return err
	}
	err := stage(classesFile, func(w io.Writer) error {
		_, err := io.WriteString(w, classes)
		return err
	})
	if err != nil {
		return err
	}
	for _, f := range staged {
		if err := f.commit(); err != nil {
			return err
		}
	}
	return nil
}

// stagedFile is a complete file under a temporary name in its own folder.
type stagedFile struct{ temporary, path string }

func stageFile(path string, content func(io.Writer) error) (*stagedFile, error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".temper-*")
	if err != nil {
		return nil, err
	}
	s := &stagedFile{f.Name(), path}
	err = content(f)
	if err == nil {
		err = f.Chmod(0o644) // CreateTemp's 0600 would hide an artifact from a pod with another user
	}
	if err == nil {
		err = f.Sync() // a rename may reach the disk before the data does
	}
	if closing := f.Close(); err == nil {
		err = closing
	}
	if err != nil {
		s.discard()
		return nil, err
	}
	return s, nil
}

func (s *stagedFile) commit() error { return os.Rename(s.temporary, s.path) }

// discard removes the temporary file; after commit there is none.
func (s *stagedFile) discard() { os.Remove(s.temporary) }

// printable tells whether a name can be shown as it is, in a terminal too.
func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}
