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

// TestContractOfARunner holds a runner as it is in an image to the contract.
func TestContractOfARunner(t *testing.T) {
	runner := build(t, "runners/train")
	dir := t.TempDir()
	train := func(args ...string) *exec.Cmd {
		cmd := exec.Command(runner, args...)
		cmd.Dir = dir
		return cmd
	}
	if code, stdout, _ := process(t, train("--network", "wong")); code != ExitBadInput || stdout != "" {
		t.Errorf("without --output: exit code %d, stdout %q", code, stdout)
	}
	cmd := train("-o", "json")
	cmd.Env = append(os.Environ(), "TEMPER_NETWORK=wong", "TEMPER_EPOCHS=0.02", "TEMPER_OUTPUT=oci:o:a", "TEMPER_RESULTS=results", "ARGO_PROGRESS_FILE="+filepath.Join(dir, "progress"))
	code, stdout, stderr := process(t, cmd)
	if code != ExitDone {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	var answer struct{ Reference, Digest string }
	if err := json.Unmarshal([]byte(stdout), &answer); err != nil || answer.Reference != "oci:o@"+answer.Digest {
		t.Errorf("stdout %q: %v", stdout, err)
	}
	for line := range strings.Lines(stderr) {
		if !json.Valid([]byte(line)) {
			t.Errorf("stderr line is not JSON: %s", line)
		}
	}
	if got, err := os.ReadFile(filepath.Join(dir, "results", "digest")); err != nil || string(got) != answer.Digest {
		t.Errorf("result digest: %q, %v", got, err)
	}
	progress, err := os.ReadFile(filepath.Join(dir, "progress"))
	if done, total, ok := strings.Cut(strings.TrimSpace(string(progress)), "/"); err != nil || !ok || done != total {
		t.Errorf("progress %q, %v", progress, err)
	}
}

// TestMainsAreThin keeps the runners' programs to a call of their package.
func TestMainsAreThin(t *testing.T) {
	mains, err := filepath.Glob("../*/main.go")
	if err != nil || len(mains) < 9 {
		t.Fatalf("found %q: %v", mains, err)
	}
	for _, path := range mains {
		if path == filepath.Join("..", "temper", "main.go") {
			continue // assembles all of them
		}
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if lines := strings.Count(string(source), "\n"); lines >= 25 || !strings.Contains(string(source), "step.Main(") {
			t.Errorf("%s: %d lines: at most 24, and a call of step.Main", path, lines)
		}
	}
}
