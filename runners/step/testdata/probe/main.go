// Probe is a step for the conformance test: each subcommand ends in one way.
package main

import (
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
)

func main() {
	root := &cobra.Command{Use: "probe"}
	add := func(name string, run func(*step.Step, *cobra.Command) error) {
		root.AddCommand(&cobra.Command{Use: name, Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
			return run(step.From(c), c)
		}})
	}
	broken := errors.New("broken on purpose")
	add("fail", func(*step.Step, *cobra.Command) error { return broken })
	add("bad", func(*step.Step, *cobra.Command) error { return step.BadInput(broken) })
	add("refused", func(*step.Step, *cobra.Command) error { return step.Refused(broken) })
	add("unavailable", func(*step.Step, *cobra.Command) error { return step.Unavailable(broken) })
	add("panic", func(*step.Step, *cobra.Command) error { panic(broken) })
	add("crash", func(*step.Step, *cobra.Command) error { // a panic that nobody can catch
		go panic(broken)
		select {}
	})
	add("done", func(s *step.Step, _ *cobra.Command) error {
		s.Log.Info("working")
		s.Progress(1, 4)
		s.Progress(4, 4)
		if err := s.Results(map[string]string{"verdict": "rejected"}); err != nil {
			return err
		}
		return s.Print("reference", map[string]string{"reference": "reference"})
	})
	add("wait", func(s *step.Step, c *cobra.Command) error {
		s.Log.Info("waiting")
		select {
		case <-c.Context().Done():
			return step.Interrupted(c.Context().Err())
		case <-time.After(time.Minute):
			return broken
		}
	})
	step.Main(root)
}
