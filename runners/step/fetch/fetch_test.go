package fetch

import (
	"bytes"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/temper-ml/temper/runners/step"
)

// server serves a repository with two commits, the second of which has a link
// that leads out of it, by git's own HTTP server.
func server(t *testing.T) (url string, commits [2]string) {
	t.Helper()
	root := t.TempDir()
	git := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", root}, args...)...)
		cmd.Env = append(os.Environ(), "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com", "GIT_CONFIG_GLOBAL=/dev/null")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("no git to serve a repository with")
	}
	git("init", "-q", "-b", "main", ".")
	for i, text := range []string{"first", "second"} {
		if err := os.WriteFile(filepath.Join(root, "file"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			if err := os.Symlink("/etc", filepath.Join(root, "link")); err != nil {
				t.Fatal(err)
			}
		}
		git("add", ".")
		git("commit", "-q", "-m", text)
		commits[i] = git("rev-parse", "HEAD")
	}
	s := httptest.NewServer(&cgi.Handler{
		Path: filepath.Join(git("--exec-path"), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1"},
	})
	t.Cleanup(s.Close)
	return s.URL + "/.git", commits
}

func run(t *testing.T, args ...string) (code int, folder, stderr string) {
	t.Helper()
	folder = filepath.Join(t.TempDir(), "src")
	var out, errs bytes.Buffer
	code = step.Run(t.Context(), Command(), append([]string{"--folder=" + folder, "--results=" + filepath.Join(folder, "..", "results")}, args...), &out, &errs)
	return code, folder, errs.String()
}

func TestAnyCommitIsFetched(t *testing.T) {
	url, commits := server(t)
	for i, want := range []string{"first", "second"} { // the first is no branch's head
		code, folder, stderr := run(t, "--url="+url, "--commit="+commits[i])
		if code != 0 {
			t.Fatalf("exit code %d: %s", code, stderr)
		}
		if got, err := os.ReadFile(filepath.Join(folder, "file")); err != nil || string(got) != want {
			t.Errorf("file: %q, %v", got, err)
		}
		if got, _ := os.ReadFile(filepath.Join(folder, "..", "results", "CHAINS-GIT_COMMIT")); string(got) != commits[i] {
			t.Errorf("result CHAINS-GIT_COMMIT: %q", got)
		}
		if _, err := os.Stat(filepath.Join(folder, ".git")); err == nil {
			t.Error("there is a .git folder")
		}
	}
}

func TestWhatIsNoCommitIsRefused(t *testing.T) {
	url, commits := server(t)
	for name, c := range map[string]struct {
		args []string
		code int
	}{
		"a branch":          {[]string{"--url=" + url, "--commit=main"}, step.ExitBadInput},
		"an option":         {[]string{"--url=" + url, "--commit=--upload-pack=touch"}, step.ExitBadInput},
		"not there":         {[]string{"--url=" + url, "--commit=" + strings.Repeat("0", 40)}, step.ExitBadInput},
		"no repository":     {[]string{"--url=" + url + "x", "--commit=" + commits[0]}, step.ExitBadInput},
		"a file":            {[]string{"--url=file:///etc", "--commit=" + commits[0]}, step.ExitBadInput},
		"a command":         {[]string{"--url=ext::sh -c touch", "--commit=" + commits[0]}, step.ExitBadInput},
		"credentials":       {[]string{"--url=https://user:secret@example.com/x", "--commit=" + commits[0]}, step.ExitBadInput},
		"nobody listens":    {[]string{"--url=http://127.0.0.1:1/x", "--commit=" + commits[0]}, step.ExitUnavailable},
		"a server that 500": {[]string{"--url=" + failing(t), "--commit=" + commits[0]}, step.ExitUnavailable},
	} {
		if code, _, stderr := run(t, c.args...); code != c.code || strings.Contains(stderr, "secret") {
			t.Errorf("%s: exit code %d, want %d: %s", name, code, c.code, stderr)
		}
	}
}

func failing(t *testing.T) string {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }))
	t.Cleanup(s.Close)
	return s.URL
}
