package step

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// build compiles a program of this module and returns its path.
func build(t *testing.T, program string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), filepath.Base(program))
	cmd := exec.Command("go", "build", "-o", binary, "github.com/temper-ml/temper/"+program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", program, err, out)
	}
	return binary
}

// process runs a program and returns how it ended.
func process(t *testing.T, cmd *exec.Cmd) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// TestContractOfAProcess holds a process to the contract: what a replacement
// of a step in another language must do too.
func TestContractOfAProcess(t *testing.T) {
	probe := build(t, "runners/step/testdata/probe")
	t.Run("exit codes", func(t *testing.T) {
		for name, want := range map[string]int{"fail": 1, "bad": 2, "refused": 3, "unavailable": 4, "panic": 1, "surplus": 2} {
			code, stdout, stderr := process(t, exec.Command(probe, name))
			if code != want || stdout != "" {
				t.Errorf("%s: exit code %d, want %d; stdout %q", name, code, want, stdout)
			}
			for line := range strings.Lines(stderr) {
				if !json.Valid([]byte(line)) {
					t.Errorf("%s: stderr line is not JSON: %s", name, line)
				}
			}
			if !strings.Contains(stderr, `"level":"ERROR"`) {
				t.Errorf("%s: no error on stderr: %s", name, stderr)
			}
		}
		if code, _, _ := process(t, exec.Command(probe, "crash")); code == 0 {
			t.Error("a crash ended with exit code 0")
		}
	})
	t.Run("outputs", func(t *testing.T) {
		dir := t.TempDir()
		cmd := exec.Command(probe, "done")
		cmd.Env = append(os.Environ(), "TEMPER_RESULTS="+dir, "ARGO_PROGRESS_FILE="+filepath.Join(dir, "progress"))
		code, stdout, stderr := process(t, cmd)
		if code != 0 || stdout != "reference\n" {
			t.Fatalf("exit code %d, stdout %q, stderr %s", code, stdout, stderr)
		}
		for name, want := range map[string]string{"verdict": "rejected", "progress": "4/4\n"} {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		_, stdout, _ = process(t, exec.Command(probe, "done", "-o", "json"))
		var object map[string]string
		if err := json.Unmarshal([]byte(stdout), &object); err != nil {
			t.Errorf("-o json printed %q: %v", stdout, err)
		}
	})
	t.Run("signals", func(t *testing.T) {
		for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
			cmd := exec.Command(probe, "wait")
			errs, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(errs)
			lines.ReadString('\n') // it waits
			cmd.Process.Signal(signal)
			io.Copy(io.Discard, lines)
			cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != ExitInterrupted {
				t.Errorf("%v: exit code %d, want %d", signal, code, ExitInterrupted)
			}
		}
	})
}
