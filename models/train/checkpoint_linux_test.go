package train

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// TestCase16FullDisk limits the size of the files of this process: writing
// past it fails half-way, as on a full disk.
func TestCase16FullDisk(t *testing.T) {
	folder := t.TempDir()
	file := filepath.Join(folder, "checkpoint")
	ctx, cancel := context.WithCancel(context.Background())
	opts := Options{Checkpoint: file, Progress: func(done, _ int) {
		if done == 20 {
			cancel()
		}
	}}
	if _, _, err := trainToy(t, ctx, mixture(), 1, opts); err == nil {
		t.Fatal("not interrupted")
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}

	signal.Ignore(syscall.SIGXFSZ)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	small := syscall.Rlimit{Cur: 1000, Max: limit.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &small); err != nil {
		t.Fatal(err)
	}
	_, _, err = trainToy(t, context.Background(), mixture(), 1, Options{Checkpoint: file})
	if restored := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); restored != nil {
		t.Fatal(restored)
	}
	if err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "cannot be written") {
		t.Errorf("error %v", err)
	}
	if after, err := os.ReadFile(file); err != nil || !slices.Equal(before, after) {
		t.Errorf("the checkpoint before was damaged: %v", err)
	}
	if entries, _ := os.ReadDir(folder); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}
