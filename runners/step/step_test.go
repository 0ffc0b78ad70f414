package step

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/unknown"
	"github.com/temper-ml/temper/signing/store"
)

// run runs a command made of flags and a body in this process.
func run(t *testing.T, body func(*cobra.Command, *Step) error, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := &cobra.Command{Use: "probe", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error { return body(c, From(c)) }}
	var epsilon float64
	var samples int
	Fraction(cmd.Flags(), &epsilon, "epsilon", 0.3, "size of the perturbation")
	Int(cmd.Flags(), &samples, "samples", 100, 1, 1000, "how many examples")
	var out, errs bytes.Buffer
	code = Run(t.Context(), cmd, args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestErrorsBecomeExitCodes(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		err  error
		code int
	}{
		{nil, 0}, {broken, 1}, {BadInput(broken), 2}, {Refused(broken), 3}, {Unavailable(broken), 4}, {Interrupted(broken), 5},
		{fmt.Errorf("while testing: %w", Refused(broken)), 3},
		{BadInput(&store.Refused{Reference: "reference", Err: broken}), 3}, // the cause wins
		{unknown.Name("attack", "fgms", []string{"fgsm"}), 2},
	} {
		code, stdout, stderr := run(t, func(*cobra.Command, *Step) error { return c.err })
		if code != c.code {
			t.Errorf("%v: exit code %d, want %d", c.err, code, c.code)
		}
		if stdout != "" {
			t.Errorf("%v: stdout %q", c.err, stdout)
		}
		if c.err != nil && !strings.Contains(stderr, c.err.Error()[:6]) {
			t.Errorf("%v: not said on stderr: %q", c.err, stderr)
		}
	}
	for _, mark := range []func(error) error{BadInput, Refused, Unavailable, Interrupted} {
		if mark(nil) != nil {
			t.Error("a marked nil is not nil")
		}
	}
}

func TestPanicIsFailureNeverDone(t *testing.T) {
	code, _, stderr := run(t, func(*cobra.Command, *Step) error { panic("boom") })
	if code != ExitFailure || !strings.Contains(stderr, "boom") {
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
}

func TestUsageErrorsAreBadInput(t *testing.T) {
	for _, args := range [][]string{{"--epsilom=1"}, {"surplus"}, {"-o", "xml"}} {
		code, _, stderr := run(t, func(*cobra.Command, *Step) error { return nil }, args...)
		if code != ExitBadInput || !strings.Contains(stderr, "probe --help") {
			t.Errorf("%q: exit code %d, stderr %q", args, code, stderr)
		}
	}
}

func TestCase11NumbersOutsideTheirBounds(t *testing.T) {
	never := func(*cobra.Command, *Step) error { t.Error("the step ran"); return nil }
	for _, value := range []string{"NaN", "-1", "1e309", "0,9", "", "+Inf", "0x", " 0.3", "1.0001"} {
		code, stdout, stderr := run(t, never, "--epsilon", value)
		if code != ExitBadInput || stdout != "" || !strings.Contains(stderr, "from 0 to 1") {
			t.Errorf("--epsilon %q: exit code %d, stderr %q", value, code, stderr)
		}
	}
	for _, value := range []string{"0", "-1", "1001", "1e2", "", "99999999999999999999"} {
		if code, _, _ := run(t, never, "--samples", value); code != ExitBadInput {
			t.Errorf("--samples %q: exit code %d", value, code)
		}
		t.Setenv("TEMPER_SAMPLES", value)
		code, _, stderr := run(t, never)
		if code != ExitBadInput || !strings.Contains(stderr, "TEMPER_SAMPLES") {
			t.Errorf("TEMPER_SAMPLES=%q: exit code %d, stderr %q", value, code, stderr)
		}
	}
}

func TestFlagOverVariableOverDefault(t *testing.T) {
	read := func(args ...string) (got string) {
		run(t, func(c *cobra.Command, _ *Step) error { got = c.Flag("epsilon").Value.String(); return nil }, args...)
		return got
	}
	if got := read(); got != "0.3" {
		t.Errorf("default: %s", got)
	}
	t.Setenv("TEMPER_EPSILON", "0.2")
	if got := read(); got != "0.2" {
		t.Errorf("variable: %s", got)
	}
	if got := read("--epsilon=0.1"); got != "0.1" {
		t.Errorf("flag: %s", got)
	}
}

func TestPrintIsTextOrOneObject(t *testing.T) {
	body := func(_ *cobra.Command, s *Step) error {
		s.Log.Info("narration")
		return s.Print("reference", map[string]string{"digest": "<sha256>"})
	}
	if _, out, _ := run(t, body); out != "reference\n" {
		t.Errorf("text: %q", out)
	}
	_, out, stderr := run(t, body, "-o", "json")
	var v map[string]string
	if err := json.Unmarshal([]byte(out), &v); err != nil || v["digest"] != "<sha256>" {
		t.Errorf("json: %q: %v", out, err)
	}
	for line := range strings.Lines(stderr) {
		if !json.Valid([]byte(line)) {
			t.Errorf("stderr line is not JSON: %q", line)
		}
	}
	if _, _, quiet := run(t, body, "-q"); quiet != "" {
		t.Errorf("quiet stderr: %q", quiet)
	}
}

func TestResults(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "results")
	code, _, stderr := run(t, func(_ *cobra.Command, s *Step) error {
		return s.Results(map[string]string{"digest": "sha256:00", "verdict": "pass"})
	}, "--results", dir)
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	for name, want := range map[string]string{"digest": "sha256:00", "verdict": "pass"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if n := len(list(t, dir)); n != 2 {
		t.Errorf("%d files left, want 2", n)
	}
}

func TestCase13ResultsTooLargeOrMisnamed(t *testing.T) {
	for name, results := range map[string]map[string]string{
		"one too large":      {"a": strings.Repeat("x", MaxResults+1)},
		"together too large": {"a": strings.Repeat("x", MaxResults/2), "b": strings.Repeat("y", MaxResults/2+1)},
		"climbs":             {"../a": "x", "b": "y"},
		"absolute":           {"/tmp/a": "x"},
		"hidden":             {".a": "x"},
		"empty":              {"": "x"},
		"newline":            {"a\n": "x"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var bad *ResultError
			run(t, func(_ *cobra.Command, s *Step) error {
				if err := s.Results(results); !errors.As(err, &bad) {
					t.Errorf("error %v, want a ResultError", err)
				}
				return nil
			}, "--results", dir)
			if files := list(t, dir); len(files) != 0 {
				t.Errorf("left %v", files)
			}
		})
	}
	exact := map[string]string{"a": strings.Repeat("x", MaxResults)}
	if err := checkResults(exact); err != nil {
		t.Errorf("exactly the limit: %v", err)
	}
}

func TestCase16OutputThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("before"), 0o644); err != nil {
		t.Fatal(err)
	}
	results := map[string]string{"a": "1", "b": "2"}
	code, _, stderr := run(t, func(_ *cobra.Command, s *Step) error { return s.Results(results) }, "--results", file)
	if code != ExitFailure || !strings.Contains(stderr, file) {
		t.Errorf("a file as the results folder: exit code %d, stderr %q", code, stderr)
	}
	// A result that cannot be put in place takes the others with it.
	blocked := filepath.Join(dir, "results")
	if err := os.MkdirAll(filepath.Join(blocked, "b"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeResults(blocked, results); err == nil {
		t.Error("renamed onto a folder")
	}
	if files := list(t, blocked); len(files) != 1 {
		t.Errorf("left %v", files)
	}
	if full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0); err == nil {
		defer full.Close()
		cmd := &cobra.Command{Use: "probe", RunE: func(c *cobra.Command, _ []string) error { return From(c).Print("x", nil) }}
		var errs bytes.Buffer
		if code := Run(t.Context(), cmd, nil, full, &errs); code != ExitFailure || !strings.Contains(errs.String(), "no space") {
			t.Errorf("full stdout: exit code %d, stderr %q", code, errs.String())
		}
	}
	for _, path := range []string{filepath.Join(file, "x"), dir, "/dev/null"} {
		if err := WriteFile(path, []byte("after"), 0o644); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("WriteFile(%s): %v", path, err)
		}
	}
	if got, _ := os.ReadFile(file); string(got) != "before" {
		t.Errorf("the file became %q", got)
	}
	if err := WriteFile(file, []byte("after"), 0o600); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(file); string(got) != "after" {
		t.Errorf("the file is %q", got)
	}
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// FuzzCase18Progress moves the progress at random and reads the file after
// each move.
func FuzzCase18Progress(f *testing.F) {
	f.Add([]byte{0, 10, 5, 10, 3, 10, 10, 10, 11, 10})
	f.Add([]byte{5, 10, 5, 20, 15, 20, 1, 1, 200, 0, 0, 0})
	f.Fuzz(func(t *testing.T, moves []byte) {
		file := filepath.Join(t.TempDir(), "progress")
		p := &progress{file: file, log: slog.New(slog.DiscardHandler)}
		lastDone, lastTotal := 0, 1
		check := func() {
			text, err := os.ReadFile(file)
			if err != nil {
				return // nothing written yet
			}
			var done, total int
			if n, err := fmt.Sscanf(string(text), "%d/%d", &done, &total); n != 2 || err != nil {
				t.Fatalf("progress file holds %q", text)
			}
			if done < 0 || done > total || total < 1 || done*lastTotal < lastDone*total {
				t.Fatalf("from %d/%d to %d/%d", lastDone, lastTotal, done, total)
			}
			lastDone, lastTotal = done, total
		}
		for i := 0; i+1 < len(moves); i += 2 {
			p.written = p.written.AddDate(-1, 0, 0) // as if time passed, so that each move is written
			p.set(int(int8(moves[i])), int(int8(moves[i+1])))
			check()
		}
		p.close(len(moves)%2 == 0)
		check()
	})
}

func TestProgressThatCannotBeWrittenDoesNotFailTheStep(t *testing.T) {
	t.Setenv("ARGO_PROGRESS_FILE", filepath.Join(t.TempDir(), "absent", "progress"))
	code, _, stderr := run(t, func(_ *cobra.Command, s *Step) error { s.Progress(1, 2); s.Progress(2, 2); return nil })
	if code != 0 || strings.Count(stderr, "progress") != 2 { // said once: in the message and in the path
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
}

func TestCase19SecretsStayOut(t *testing.T) {
	const password = `hunter2"<&` + "\nsecond line"
	t.Setenv("COSIGN_PASSWORD", password)
	t.Setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
	t.Setenv("SOME_AUTH", "false")
	leaks := []string{"hunter2", "second line", "wJalrXUtnFEMI", "p@ss", "user:", "eyJhbGciOi", "aHVudGVyMiI8Jg"}
	code, _, stderr := run(t, func(_ *cobra.Command, s *Step) error {
		s.Log.Info("key "+password, "value", password, "error", errors.New(password))
		s.Log.With("token", "wJalrXUtnFEMI/K7MDENG").WithGroup("g").Warn("w", "b64", "aHVudGVyMiI8JgpzZWNvbmQgbGluZQ==")
		s.Log.Info("fetch", "url", "https://user:p@ss@registry.example/v2/?X-Amz-Signature=wJalrXUtnFEMI&n=1")
		s.Log.Info("Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.e30.x")
		return fmt.Errorf("GET https://user:p@ss@registry.example/v2/: %s", password)
	})
	if code != ExitFailure {
		t.Errorf("exit code %d", code)
	}
	for _, leak := range leaks {
		if strings.Contains(stderr, leak) {
			t.Errorf("stderr holds %q:\n%s", leak, stderr)
		}
	}
	if !strings.Contains(stderr, "registry.example") || !strings.Contains(stderr, "n=1") || strings.Count(stderr, redacted) < 6 {
		t.Errorf("stderr lost what is no secret:\n%s", stderr)
	}
}

func TestCase19WhichVariablesAreSecret(t *testing.T) {
	const value = "value-of-it"
	for name, secret := range map[string]bool{
		"COSIGN_PASSWORD": true, "PGPASSWORD": true, "GITHUB_TOKEN": true, "TOKEN": true, "aws_secret_access_key": true,
		"KEY_PASSPHRASE": true, "SIGNING_PRIVATE_KEY": true, "OPENAI_APIKEY": true, "REGISTRY_AUTH": true, "CLIENT_SECRET_2": true,
		"MAX_TOKENS": false, "GIT_AUTHOR_NAME": false, "TOKENIZERS_PARALLELISM": false, "AUTHORS": false, "SECRETARY": false, "PRIVATE_REGISTRY": false,
	} {
		text := secretsIn([]string{name + "=" + value}).Redact("say " + value)
		if hidden := !strings.Contains(text, value); hidden != secret {
			t.Errorf("%s: %q", name, text)
		}
	}
	for _, harmless := range []string{"false", "mnist", "1287", "60000000"} {
		if text := secretsIn([]string{"SOME_TOKEN=" + harmless}).Redact(`{"x":` + harmless + "}"); !strings.Contains(text, harmless) {
			t.Errorf("%s was taken for a secret: %s", harmless, text)
		}
	}
}

func TestCase17ArtifactsIgnoreTheEnvironment(t *testing.T) {
	t.Setenv("DATA_TOKEN", "hunter2-dataset")
	const text = "hunter2-dataset of https://user:hunter3@host/?token=hunter4&n=1"
	if got, want := RedactURLs(text), "hunter2-dataset of https://"+redacted+"@host/?token="+redacted+"&n=1"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestHumanHandler(t *testing.T) {
	var b strings.Builder
	log := slog.New(&humanHandler{w: &b}).With("seed", 1).WithGroup("g")
	log.Warn("epoch done", "loss", 0.123456789, slog.Group("in", "name", "two words"))
	log.Debug("not said")
	if want := "warning: epoch done  seed=1  g.loss=0.1235  g.in.name=\"two words\"\n"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

func TestFromWithoutMain(t *testing.T) {
	cmd := &cobra.Command{Use: "probe", RunE: func(c *cobra.Command, _ []string) error {
		s := From(c)
		s.Log.Info("nothing listens")
		s.Progress(1, 2)
		return s.Print("x", nil)
	}}
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(io.Discard)
	cmd.SetArgs(nil)
	if err := cmd.Execute(); err != nil || out.String() != "x\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestCallWithoutArguments(t *testing.T) {
	defer func(saved []string) { os.Args = saved }(os.Args)
	os.Args = []string{"temper", "--listen=:8080"} // the caller's, not the part's
	whole := &cobra.Command{Use: "whole", RunE: func(c *cobra.Command, _ []string) error {
		part := &cobra.Command{Use: "part", RunE: func(c *cobra.Command, _ []string) error {
			return From(c).Print("", map[string]int{"n": 1})
		}}
		var answer struct{ N int }
		if err := From(c).Call(c.Context(), part, &answer, nil); err != nil {
			return err
		}
		if answer.N != 1 {
			t.Errorf("the part answered %+v", answer)
		}
		return nil
	}}
	if code := Run(t.Context(), whole, nil, io.Discard, io.Discard); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
