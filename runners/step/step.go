// Package step is the contract that every runner keeps, whatever language it
// is written in. A step is one process with one job: it reads artifacts named
// by digest, makes one new artifact, and says what it made.
//
// Input. Flags; each flag is also an environment variable: --clean-share is
// TEMPER_CLEAN_SHARE. A flag wins over the variable, the variable over the
// default. A variable that is set to nothing counts as set. Artifacts arrive
// as references (registry/repository@sha256:..., or oci:FOLDER@sha256:...).
//
// Standard output is data and nothing else: the reference of what was made,
// or one JSON object with -o json.
//
// Standard error is narration: JSON lines, or plain text and a progress bar
// where it is a terminal. Values of secret environment variables and the user
// part of URLs never appear in it.
//
// Results. With --results DIR the step writes one small file for each result,
// 4 KiB in all: digests, verdicts and headline numbers, without a newline at
// the end. Either all of them are written or none.
//
// Progress. Where $ARGO_PROGRESS_FILE is set the step keeps "N/M" in that
// file, 0 <= N <= M, never falling.
//
// Exit code.
//
//	0  done; a model that the gate rejects is done too, with the verdict "rejected"
//	1  anything else, a crash included
//	2  bad usage or input: trying again cannot help
//	3  verification refused: the artifact is not what somebody trusted signed
//	4  a dependency, such as the registry, is unavailable: try again later
//	5  interrupted (SIGTERM, SIGINT) with a checkpoint kept: run again to go on
package step

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"
)

// Step is what a running command has from the contract; From returns it.
type Step struct {
	Log      *slog.Logger
	Quiet    bool // say only warnings and errors
	stdout   io.Writer
	results  string // the folder, "" for none
	format   string // "text" or "json"
	progress *progress
}

type contextKey struct{}

// From returns the Step that Main put into the command's context. A command
// that runs without Main gets one that prints to the command's output and
// says nothing else.
func From(cmd *cobra.Command) *Step {
	if ctx := cmd.Context(); ctx != nil {
		if s, ok := ctx.Value(contextKey{}).(*Step); ok {
			return s
		}
	}
	return &Step{Log: slog.New(slog.DiscardHandler), stdout: cmd.OutOrStdout(), progress: &progress{}}
}

// Main runs the command under the contract and exits. The first SIGTERM or
// SIGINT cancels the command's context; a second one ends the process.
func Main(cmd *cobra.Command) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop)
	os.Exit(Run(ctx, cmd, os.Args[1:], os.Stdout, os.Stderr))
}

// Run runs the command under the contract and returns its exit code.
func Run(ctx context.Context, cmd *cobra.Command, args []string, stdout, stderr io.Writer) (code int) {
	tell := &narration{w: stderr, hide: secretsIn(os.Environ())}
	step := &Step{
		Log:      slog.New(slog.NewJSONHandler(tell, nil)),
		stdout:   stdout,
		progress: &progress{file: os.Getenv("ARGO_PROGRESS_FILE")},
	}
	terminal := false
	if f, ok := stderr.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		terminal = true
		step.Log = slog.New(&humanHandler{w: tell})
	}
	step.progress.log = step.Log

	defer func() {
		if p := recover(); p != nil {
			step.Log.Error("panic: this is a bug in Temper", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			code = ExitFailure
		}
	}()

	global := cmd.PersistentFlags()
	global.StringVar(&step.results, "results", "", "folder that gets one small file for each result")
	global.StringVarP(&step.format, "format", "o", "text", "what to print on standard output: text or json")
	global.BoolVarP(&step.Quiet, "quiet", "q", false, "say only warnings and errors")
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetUsageTemplate(cmd.UsageTemplate() + contractHelp)
	cmd.SetOut(step.stdout)
	cmd.SetErr(tell)
	cmd.SetArgs(append([]string{}, args...)) // nil would mean os.Args

	started := false
	cmd.PersistentPreRunE = func(c *cobra.Command, _ []string) error {
		if err := bindEnvironment(c.Flags(), os.LookupEnv); err != nil {
			return err
		}
		if step.format != "text" && step.format != "json" {
			return fmt.Errorf("--format %q: must be text or json", step.format)
		}
		if step.Quiet {
			step.Log = slog.New(levelHandler{step.Log.Handler(), slog.LevelWarn})
		} else if terminal {
			step.progress.bar = tell.newBar
		}
		return nil
	}
	forEach(cmd, func(c *cobra.Command) {
		if run := c.RunE; run != nil {
			c.RunE = func(c *cobra.Command, args []string) error {
				started = true
				return run(c, args)
			}
		}
	})

	ran, err := cmd.ExecuteContextC(context.WithValue(ctx, contextKey{}, step))
	step.progress.close(err == nil)
	if err == nil {
		return ExitDone
	}
	if !started { // cobra refused the arguments before the step began
		err = BadInput(fmt.Errorf("%w: see '%s --help'", err, ran.CommandPath()))
	}
	code = exitCode(err)
	if step.format == "json" || !terminal {
		step.Log.Error(err.Error(), "command", ran.CommandPath(), "exit_code", code)
	} else {
		step.Log.Error(err.Error())
	}
	return code
}

const contractHelp = `
Each flag is also an environment variable, which the flag overrides: --results is TEMPER_RESULTS.
Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 verification refused, 4 dependency unavailable, 5 interrupted with a checkpoint.
`

func forEach(cmd *cobra.Command, do func(*cobra.Command)) {
	do(cmd)
	for _, c := range cmd.Commands() {
		forEach(c, do)
	}
}

// Variable is the name of the environment variable that stands for a flag.
func Variable(flag string) string {
	return "TEMPER_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// bindEnvironment sets each flag that was not given from its variable.
func bindEnvironment(flags *pflag.FlagSet, lookup func(string) (string, bool)) (err error) {
	flags.VisitAll(func(f *pflag.Flag) {
		if err != nil || f.Changed || f.Name == "help" {
			return
		}
		if value, ok := lookup(Variable(f.Name)); ok {
			if bad := flags.Set(f.Name, value); bad != nil {
				err = fmt.Errorf("environment variable %s: %w", Variable(f.Name), bad)
			}
		}
	})
	return err
}

// Print writes the step's answer to standard output: the text and a newline,
// or v as one JSON object with -o json. Call it once, when all is done.
func (s *Step) Print(text string, v any) error {
	out := []byte(text)
	if s.format == "json" {
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		if err := enc.Encode(v); err != nil {
			return fmt.Errorf("print the result as JSON: %w", err)
		}
		out = b.Bytes()
	} else if text != "" && !strings.HasSuffix(text, "\n") {
		out = append(out, '\n')
	}
	if _, err := s.stdout.Write(out); err != nil {
		return fmt.Errorf("print the result: %w", err)
	}
	return nil
}

// PrintLine writes one line of an answer that comes bit by bit: the text, or v as
// a JSON object on a line of its own with -o json.
func (s *Step) PrintLine(text string, v any) error {
	if s.format == "json" {
		line, err := json.Marshal(v)
		if err != nil {
			return fmt.Errorf("print the result as JSON: %w", err)
		}
		text = string(line)
	}
	if _, err := fmt.Fprintln(s.stdout, text); err != nil {
		return fmt.Errorf("print the result: %w", err)
	}
	return nil
}

// Progress says that done of total units of work are done. Calls that would
// make the progress fall are ignored.
func (s *Step) Progress(done, total int) { s.progress.set(done, total) }
