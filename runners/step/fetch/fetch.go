// Package fetch is the step that gets one commit of a Git repository: without
// a git command, so that its image holds nothing else.
package fetch

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"regexp"
	"strings"

	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5"
	"github.com/go-git/go-git/v5/config"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/transport"
	githttp "github.com/go-git/go-git/v5/plumbing/transport/http"
	"github.com/go-git/go-git/v5/storage/memory"
	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
)

// TokenVariable is the environment variable with the password for the server.
const TokenVariable = "GIT_TOKEN"

// commitPattern: a whole commit hash. A branch or tag may be another commit
// tomorrow, and an option is no revision.
var commitPattern = regexp.MustCompile(`^[0-9a-f]{40}$`)

// Result is what the step prints.
type Result struct {
	URL    string `json:"url"`
	Commit string `json:"commit"`
	Folder string `json:"folder"`
}

// Job is one fetch.
type Job struct {
	URL, Commit, Folder string
}

// Run fetches the commit into the folder, which must be empty or absent. There
// is no .git folder in it: what is built from it is the commit and nothing else.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	u, err := url.Parse(j.URL)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return step.BadInput(fmt.Errorf("--url %.200q: write https://HOST/PATH", step.RedactURLs(j.URL)))
	}
	if u.User != nil {
		return step.BadInput(fmt.Errorf("--url: credentials do not belong in a URL: set $%s", TokenVariable))
	}
	if !commitPattern.MatchString(j.Commit) {
		return step.BadInput(fmt.Errorf("--commit %.80q: write all 40 hex digits of a commit", j.Commit))
	}
	if entries, err := os.ReadDir(j.Folder); err == nil && len(entries) > 0 {
		return step.BadInput(fmt.Errorf("--folder %s: it is not empty", j.Folder))
	}
	if err := os.MkdirAll(j.Folder, 0o755); err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	repository, err := git.Init(memory.NewStorage(), osfs.New(j.Folder, osfs.WithBoundOS())) // bound: no link leads out of the folder
	if err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	remote, err := repository.CreateRemote(&config.RemoteConfig{Name: "origin", URLs: []string{j.URL}})
	if err != nil {
		return step.BadInput(fmt.Errorf("fetch: %w", err))
	}
	if err := fetch(ctx, remote, j.Commit); err != nil {
		return category(fmt.Errorf("fetch %s: %w", j.URL, err))
	}
	tree, err := repository.Worktree()
	if err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	if err := tree.Checkout(&git.CheckoutOptions{Hash: plumbing.NewHash(j.Commit), Force: true}); err != nil {
		if errors.Is(err, plumbing.ErrObjectNotFound) || errors.Is(err, plumbing.ErrReferenceNotFound) {
			return step.BadInput(fmt.Errorf("%s has no commit %s", j.URL, j.Commit))
		}
		return fmt.Errorf("check out %s: %w", j.Commit, err)
	}
	s.Log.Info("fetched", "url", j.URL, "commit", j.Commit, "folder", j.Folder)
	err = s.Results(map[string]string{
		"url": j.URL, "commit": j.Commit,
		// By these names Tekton Chains finds what a build was made from.
		"CHAINS-GIT_URL": j.URL, "CHAINS-GIT_COMMIT": j.Commit,
	})
	if err != nil {
		return err
	}
	return s.Print(j.Folder, Result{j.URL, j.Commit, j.Folder})
}

// fetch gets the one commit, or, from a server that does not give commits by
// their hash, all branches.
func fetch(ctx context.Context, remote *git.Remote, commit string) error {
	options := &git.FetchOptions{Tags: git.NoTags, Depth: 1, RefSpecs: []config.RefSpec{config.RefSpec(commit + ":refs/heads/fetched")}}
	if token := os.Getenv(TokenVariable); token != "" {
		options.Auth = &githttp.BasicAuth{Username: "x-access-token", Password: token} // the user that GitHub and others take any token for
	}
	err := remote.FetchContext(ctx, options)
	if err == nil || errors.Is(err, git.NoErrAlreadyUpToDate) {
		return nil
	}
	if !errors.Is(err, git.ErrExactSHA1NotSupported) && !strings.Contains(err.Error(), "not our ref") {
		return err
	}
	options.Depth, options.RefSpecs = 0, []config.RefSpec{"+refs/heads/*:refs/remotes/origin/*"}
	if err = remote.FetchContext(ctx, options); errors.Is(err, git.NoErrAlreadyUpToDate) {
		return nil
	}
	return err
}

// category gives an error of the server its exit code.
func category(err error) error {
	var network net.Error
	var status *plumbing.UnexpectedError // a status of the server that is none of those below
	switch {
	case errors.Is(err, transport.ErrRepositoryNotFound), errors.Is(err, transport.ErrAuthenticationRequired),
		errors.Is(err, transport.ErrAuthorizationFailed), errors.Is(err, transport.ErrEmptyRemoteRepository):
		return step.BadInput(err)
	case errors.As(err, &status):
		return step.Unavailable(err)
	case errors.As(err, &network):
		return step.Unavailable(err)
	}
	return err
}

// Command is the step.
func Command() *cobra.Command {
	var j Job
	cmd := &cobra.Command{
		Use:   "fetch --url URL --commit HASH --folder FOLDER",
		Short: "Get one commit of a Git repository",
		Long: `Get the files of one commit of a Git repository over HTTP, without its history.
A private one is asked with $` + TokenVariable + `. Prints the folder.`,
		Example: `  temper fetch --url https://github.com/temper-ml/temper --commit 0123456789abcdef0123456789abcdef01234567 --folder src`,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return j.Run(cmd.Context(), step.From(cmd)) },
	}
	flags := cmd.Flags()
	flags.StringVar(&j.URL, "url", "", "URL of the repository")
	flags.StringVar(&j.Commit, "commit", "", "the commit, 40 hex digits")
	flags.StringVar(&j.Folder, "folder", "", "folder for the files; empty or absent")
	for _, name := range []string{"url", "commit", "folder"} {
		cmd.MarkFlagRequired(name)
	}
	return cmd
}
