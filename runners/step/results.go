package step

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
)

// MaxResults is how many bytes all results of a step may have together: what
// Tekton can carry in a container's termination message.
const MaxResults = 4096

// resultName is what a result may be called; it is also a file name.
var resultName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{0,63}$`)

// ResultError is a result that the contract does not allow.
type ResultError struct {
	Name   string // "" where all of them together are too large
	Reason string
}

func (e *ResultError) Error() string {
	if e.Name == "" {
		return "results: " + e.Reason
	}
	return fmt.Sprintf("result %.80q: %s", e.Name, e.Reason)
}

// Results writes one file for each result into the folder named by --results;
// without the flag it only checks them. Either all files are written or none.
func (s *Step) Results(results map[string]string) error {
	if err := checkResults(results); err != nil || s.results == "" {
		return err
	}
	if err := writeResults(s.results, results); err != nil {
		return fmt.Errorf("write the results: %w", err)
	}
	return nil
}

func checkResults(results map[string]string) error {
	total := 0
	for name, value := range results {
		if !resultName.MatchString(name) {
			return &ResultError{name, "the name must be a letter followed by up to 63 letters, digits, _ or -"}
		}
		total += len(value)
	}
	if total > MaxResults {
		return &ResultError{"", fmt.Sprintf("%d bytes in all: at most %d; pass anything large as an artifact", total, MaxResults)}
	}
	return nil
}

func writeResults(dir string, results map[string]string) (err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	suffix := ".tmp-" + rand.Text()
	var made []string
	defer func() {
		if err != nil {
			for _, name := range made {
				root.Remove(name)
			}
		}
	}()
	names := slices.Sorted(maps.Keys(results))
	for _, name := range names {
		made = append(made, name+suffix)
		if err := root.WriteFile(name+suffix, []byte(results[name]), 0o644); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := root.Rename(name+suffix, name); err != nil {
			return err
		}
		made = append(made, name)
	}
	return nil
}

// WriteFile writes a file of the user's whole or not at all: no reader sees
// a part of it, and a failure leaves what was there before.
func WriteFile(path string, data []byte, mode fs.FileMode) (err error) {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("write %s: not a regular file", path) // renaming onto it would replace a device or folder
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write %s: %w", path, err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".tmp-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
