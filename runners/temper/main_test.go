package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/temper-ml/temper/models/dataset"
)

// binary is the program under test: these tests run real processes, as a pod
// or a shell does.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "temper-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "temper")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	code := 1
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// outcome is how a process ended.
type outcome struct {
	code           int
	stdout, stderr string
}

func (o outcome) String() string {
	return fmt.Sprintf("exit code %d\nstdout: %s\nstderr: %s", o.code, o.stdout, o.stderr)
}

// temper runs the program in dir; arguments of the form NAME=value before the
// first other one are environment variables.
func temper(t *testing.T, dir string, args ...string) outcome {
	t.Helper()
	cmd := prepare(dir, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return outcome{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

func prepare(dir string, args ...string) *exec.Cmd {
	environment := os.Environ()
	for len(args) > 0 && strings.Contains(args[0], "=") && !strings.HasPrefix(args[0], "-") {
		environment, args = append(environment, args[0]), args[1:]
	}
	cmd := exec.Command(binary, args...)
	cmd.Dir, cmd.Env = dir, environment
	return cmd
}

// must runs the program and returns what it printed, without the newline.
func must(t *testing.T, dir string, args ...string) string {
	t.Helper()
	o := temper(t, dir, args...)
	if o.code != 0 {
		t.Fatalf("temper %s: %v", strings.Join(args, " "), o)
	}
	return strings.TrimSuffix(o.stdout, "\n")
}

func TestUnknownNamesSayWhatExists(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args string
		want []string
	}{
		{"train wing --output oci:o:a", []string{"unknown model", "wong", "paper", "trades", "madry", `did you mean \"wong\"`}},
		{"train wong --recipe fats --output oci:o:a", []string{"unknown recipe", "fast", "standard", `did you mean \"fast\"`}},
		{"train wong --dataset mnits --epochs 0.1 --output oci:o:a", []string{"unknown dataset", `did you mean \"mnist\"`}},
		{"retrain --model m.onnx --recipe fats --output oci:o:a", []string{"unknown recipe", `did you mean \"fast\"`}},
		{"attack --model m.onnx --attack fgms --output oci:o:a", []string{"unknown attack", "pgd-20", `did you mean \"fgsm\"`}},
		{"trian wong", []string{"unknown command", "train"}},
		{"train wong --outptu oci:o:a", []string{"unknown flag", "temper train --help"}},
		{"train wong", []string{"required flag", "output"}},
		{"attack --model m.onnx --output oci:o:a", []string{"m.onnx", "no such file", "oci:FOLDER"}},
		{"attack --model oci:o:absent --output oci:o:a", []string{"oci:o:absent", "does not exist"}},
		{"attack --model oci:o:absent --output nonsense", []string{"nonsense", "names no registry"}},
	} {
		o := temper(t, dir, strings.Fields(c.args)...)
		if o.code != 2 || o.stdout != "" {
			t.Errorf("%s: %v", c.args, o)
		}
		for _, want := range c.want {
			if !strings.Contains(o.stderr, want) {
				t.Errorf("%s: stderr lacks %q: %s", c.args, want, o.stderr)
			}
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left %v", entries)
	}
}

func TestRegistryThatIsDown(t *testing.T) {
	const address = "127.0.0.1:1" // nothing listens on tcpmux
	for _, args := range []string{
		"train wong --output " + address + "/mnist:a",
		"attack --model " + address + "/mnist:a --output oci:o:a",
	} {
		started := time.Now()
		o := temper(t, t.TempDir(), strings.Fields(args)...)
		if o.code != 4 || o.stdout != "" || !strings.Contains(o.stderr, address) {
			t.Errorf("%s: %v", args, o)
		}
		if strings.Contains(o.stderr, `"msg":"training"`) || time.Since(started) > 20*time.Second {
			t.Errorf("%s: trained before it looked for the registry: %v", args, o)
		}
	}
}

// TestRegistry uses the registry command as a shell user does, and takes it
// away in the end.
func TestRegistry(t *testing.T) {
	dir := t.TempDir()
	cmd := prepare(dir, "registry", "--dir", "served", "--listen", "127.0.0.1:0")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	place := strings.TrimSpace(address) + "/team/mnist"
	model := must(t, dir, "train", "wong", "--epochs", "0.01", "--output", place+":a")
	if !strings.HasPrefix(model, place+"@sha256:") {
		t.Errorf("train printed %q", model)
	}
	attack := []string{"attack", "--model", place + ":a", "--samples", "10", "--output", place + ":fgsm"}
	must(t, dir, attack...)
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("SIGTERM ended the registry with %v", err)
	}
	if o := temper(t, dir, attack...); o.code != 4 || !strings.Contains(o.stderr, strings.TrimSpace(address)) {
		t.Errorf("after its end: %v", o)
	}
}

// TestCase14InterruptedTraining stops a training that uses all that a
// checkpoint must hold (moving average, guard) and lets it go on.
func TestCase14InterruptedTraining(t *testing.T) {
	dir := t.TempDir()
	training := strings.Fields("train wong --recipe fast --epochs 0.3 --output oci:o:a")
	want := must(t, dir, training...)

	training = append(training, "--checkpoint", "state")
	progress := filepath.Join(dir, "progress")
	cmd := prepare(dir, append([]string{"ARGO_PROGRESS_FILE=" + progress}, training...)...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		var done, total int
		text, _ := os.ReadFile(progress)
		if fmt.Sscanf(string(text), "%d/%d", &done, &total); done > 0 {
			break
		}
		if time.Now().After(deadline) {
			cmd.Process.Kill()
			t.Fatalf("no progress: %s", errs.String())
		}
	}
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 5 {
		t.Fatalf("exit code %d, want 5: %s", code, errs.String())
	}
	if info, err := os.Stat(filepath.Join(dir, "state")); err != nil || info.Size() == 0 {
		t.Fatalf("no checkpoint: %v", err)
	}

	other := append(slices.Clone(training), "--seed", "2")
	if o := temper(t, dir, other...); o.code != 2 || !strings.Contains(o.stderr, "seed") {
		t.Errorf("another training took the checkpoint: %v", o)
	}
	o := temper(t, dir, training...)
	if o.code != 0 || !strings.Contains(o.stderr, "resumed") {
		t.Fatalf("going on: %v", o)
	}
	if got := strings.TrimSpace(o.stdout); got != want {
		t.Errorf("resumed training made %s, the uninterrupted one %s", got, want)
	}
}

func TestCase16OutputThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	quick := strings.Fields("train wong --epochs 0.01 --output")
	if o := temper(t, dir, append(quick, "oci:file:a")...); o.code == 0 || o.stdout != "" || !strings.Contains(o.stderr, "file") {
		t.Errorf("a file as the folder: %v", o)
	}
	if o := temper(t, dir, append(quick, "oci:o:a", "--checkpoint", "file/state")...); o.code == 0 || !strings.Contains(o.stderr, "file/state") {
		t.Errorf("a file as the checkpoint's folder: %v", o)
	}
	t.Run("full disk", func(t *testing.T) {
		full := filepath.Join(dir, "full")
		if err := os.Mkdir(full, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("tmpfs", full, "tmpfs", 0, "size=256k"); err != nil { // the model has 650 KB
			t.Skipf("no permission to mount a small disk: %v", err)
		}
		defer syscall.Unmount(full, 0)
		o := temper(t, dir, append(quick, "oci:full/o:a")...)
		if o.code == 0 || o.stdout != "" || !strings.Contains(o.stderr, "no space left") || o.code == 2 { // room may come back: worth another try
			t.Errorf("%v", o)
		}
		if index, err := os.ReadFile(filepath.Join(full, "o", "index.json")); err == nil && bytes.Contains(index, []byte("sha256:")) {
			t.Errorf("a model is listed: %s", index)
		}
		blobs, _ := filepath.Glob(filepath.Join(full, "o", "blobs", "sha256", "*"))
		for _, blob := range blobs {
			if info, err := os.Stat(blob); err != nil || info.Size() > 64<<10 {
				t.Errorf("a part of the model is left: %s, %v", blob, err)
			}
		}
	})
}

func TestCase17SameSeedSameDigest(t *testing.T) {
	dir := t.TempDir()
	training := strings.Fields("train wong --recipe fast --epochs 0.05 --seed 3 --output oci:o:a")
	first := must(t, dir, append([]string{"GOMAXPROCS=1"}, training...)...)
	second := must(t, dir, append([]string{"GOMAXPROCS=2", "SOME_PASSWORD=mnist", "SOME_TOKEN=wong"}, training...)...)
	if first != second {
		t.Errorf("GOMAXPROCS=1 made %s, GOMAXPROCS=2 %s", first, second)
	}
	training[len(training)-3] = "4"
	if other := must(t, dir, training...); other == first {
		t.Error("another seed made the same model")
	}
}

func TestCase11GateParameters(t *testing.T) {
	dir := t.TempDir()
	for _, value := range []string{"NaN", "-1", "1e309", "0,9", ""} {
		for _, flag := range []string{"min-robust-accuracy", "min-clean-accuracy", "epsilon"} {
			byFlag := temper(t, dir, "evaluate", "--model", "m.onnx", "--policy", "wong", "--results", "results", "--"+flag+"="+value)
			variable := "TEMPER_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_")) + "=" + value
			byVariable := temper(t, dir, variable, "evaluate", "--model", "m.onnx", "--policy", "wong", "--results", "results")
			for _, o := range []outcome{byFlag, byVariable} {
				if o.code != 2 || o.stdout != "" || !strings.Contains(o.stderr, "must be a number from 0 to 1") {
					t.Errorf("%s %q: %v", flag, value, o)
				}
			}
		}
	}
	// The same in a policy file.
	for _, value := range []string{".nan", "-1", "1e309", "0,9", "''", ""} {
		policy := strings.Replace(tiny, "min_robust_accuracy: 0.7", "min_robust_accuracy: "+value, 1)
		if err := os.WriteFile(filepath.Join(dir, "policy.yaml"), []byte(policy), 0o644); err != nil {
			t.Fatal(err)
		}
		o := temper(t, dir, "evaluate", "--model", "m.onnx", "--policy", "policy.yaml", "--results", "results")
		if o.code != 2 || o.stdout != "" || !strings.Contains(o.stderr, "min_robust_accuracy") {
			t.Errorf("policy with %q: %v", value, o)
		}
	}
	if verdicts, _ := filepath.Glob(filepath.Join(dir, "results", "*")); len(verdicts) != 0 {
		t.Errorf("results %v", verdicts)
	}
}

// TestCase19SecretsStayOut plants secrets in the environment and in URLs and
// looks for them in all that a training writes.
func TestCase19SecretsStayOut(t *testing.T) {
	dir := t.TempDir()
	data := http.FileServer(http.Dir("../../models/dataset/mnist"))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, password, _ := r.BasicAuth(); password != "hunter2-url" {
			http.Error(w, "who are you, user:hunter2-url?", http.StatusUnauthorized)
			return
		}
		data.ServeHTTP(w, r)
	}))
	defer server.Close()
	mnist, err := dataset.MNIST()
	if err != nil {
		t.Fatal(err)
	}
	environment := []string{"COSIGN_PASSWORD=hunter2-env", "GITHUB_TOKEN=hunter2-token", "XDG_CACHE_HOME=" + t.TempDir(), "HOME=" + t.TempDir()}
	host := strings.TrimPrefix(server.URL, "http://")
	train := func(password string) outcome {
		url := "http://user:" + password + "@" + host + "/#" + mnist.Digest()
		return temper(t, dir, append(slices.Clone(environment), "train", "wong", "--epochs", "0.01", "--dataset", url,
			"--checkpoint", "state", "--output", "oci:out:a", "--results", "results", "-o", "json")...)
	}
	look := func(name string, text []byte) {
		t.Helper()
		if bytes.Contains(text, []byte("hunter2")) {
			t.Errorf("%s holds a secret: %.2000s", name, text)
		}
	}
	refused := train("hunter2-wrong")
	look("an error", []byte(refused.stdout+refused.stderr))
	if refused.code == 0 {
		t.Errorf("a wrong password: %v", refused)
	}
	done := train("hunter2-url")
	look("the narration", []byte(done.stdout+done.stderr))
	if done.code != 0 {
		t.Fatalf("training from a URL: %v", done)
	}
	typo := temper(t, dir, append(slices.Clone(environment), "attack", "--model", "http://user:hunter2-url@"+host+"/m?token=hunter2", "--output", "oci:out:b")...)
	look("an error about a reference", []byte(typo.stdout+typo.stderr))
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			text, err := os.ReadFile(path)
			look(path, text)
			return err
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestHelp holds every command to the conventions: an example, and no flag
// without words.
func TestHelp(t *testing.T) {
	for _, c := range command().Commands() {
		if c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		if !strings.Contains(c.Example, "temper "+c.Name()) || c.Long == "" {
			t.Errorf("temper %s --help has no runnable example or no description", c.Name())
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("temper %s --%s: no words", c.Name(), f.Name)
			}
			// Kubernetes sets TEMPER_PORT and TEMPER_SERVICE_HOST in every pod
			// beside a Service named temper.
			if f.Name == "port" || strings.HasPrefix(f.Name, "port-") || strings.HasPrefix(f.Name, "service-") {
				t.Errorf("temper %s --%s: Kubernetes may set its variable", c.Name(), f.Name)
			}
		})
	}
	dir := t.TempDir()
	if o := temper(t, dir, "train", "--help"); o.code != 0 || !strings.Contains(o.stdout, "TEMPER_RESULTS") || !strings.Contains(o.stdout, "Exit codes") {
		t.Errorf("--help: %v", o)
	}
	if o := temper(t, dir, "completion", "bash"); o.code != 0 || !strings.Contains(o.stdout, "complete") {
		t.Errorf("completion: exit code %d, stderr %s", o.code, o.stderr)
	}
}
