package step

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"
)

// Call runs another step's command as a part of this one, in this process, and
// decodes the JSON that it prints into answer. What it narrates below a
// warning is left out; tell, which may be nil, is told of its progress.
// The error keeps its category.
func (s *Step) Call(ctx context.Context, cmd *cobra.Command, answer any, tell func(done, total int), args ...string) error {
	var out bytes.Buffer
	part := &Step{
		Log:    slog.New(levelHandler{s.Log.Handler(), slog.LevelWarn}),
		stdout: &out,
		format: "json",
	}
	part.progress = &progress{log: part.Log, tell: tell}
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(append([]string{}, args...)) // nil would mean os.Args
	if err := cmd.ExecuteContext(context.WithValue(ctx, contextKey{}, part)); err != nil {
		return fmt.Errorf("%s: %w", cmd.Name(), err)
	}
	if err := json.Unmarshal(out.Bytes(), answer); err != nil {
		return fmt.Errorf("%s printed no answer: %w", cmd.Name(), err)
	}
	return nil
}
