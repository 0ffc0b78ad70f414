// Package bundle is the command that carries a model over a gap in the network:
// one file with the model and everything signed about it.
package bundle

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
	trust "github.com/temper-ml/temper/runners/step/verify"
	"github.com/temper-ml/temper/signing/bundle"
	"github.com/temper-ml/temper/signing/channel"
)

// Result is what both commands print.
type Result struct {
	Reference string `json:"reference,omitempty"` // of the model, where it was loaded to
	Digest    string `json:"digest"`              // of the model
	File      string `json:"file"`
}

// Command is the command.
func Command() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bundle",
		Args:  cobra.NoArgs, // but "save" or "load"
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Short: "Carry a model to where there is no network",
		Long: `A bundle is one file: a tar of an OCI image layout, with a model, its signatures
and attestations, and what else is signed about it. Stock tools read it. It is
verified when it is written and again where it is loaded; the same content gives
the same bytes.`,
		Example: `  temper bundle save --model localhost:5000/mnist:1 --key cosign.pub --output mnist.tar
  temper bundle load mnist.tar --to registry.internal/mnist:1 --key cosign.pub --repository localhost/mnist`,
	}
	cmd.AddCommand(save(), load())
	return cmd
}

func save() *cobra.Command {
	var rules trust.Trust
	var model, output string
	cmd := &cobra.Command{
		Use:     "save --model REF --key cosign.pub --output FILE",
		Short:   "Write a model and its signatures to one file",
		Example: "  temper bundle save --model localhost:5000/mnist:1 --key cosign.pub --output mnist.tar",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			ctx, s := cmd.Context(), step.From(cmd)
			policy, err := rules.Rules(ctx)
			if err != nil {
				return err
			}
			if policy, err = channel.WithRevoked(ctx, model, policy); err != nil {
				return step.BadInput(err)
			}
			// A file is whole, or it is not there.
			f, err := os.CreateTemp(filepath.Dir(output), ".bundle-*")
			if err != nil {
				return step.BadInput(fmt.Errorf("--output: %w", err))
			}
			defer func() {
				f.Close()
				if e := os.Remove(f.Name()); e != nil && !errors.Is(e, fs.ErrNotExist) && err == nil {
					err = e
				}
			}()
			digest, err := bundle.Write(ctx, f, model, policy)
			if err != nil {
				return step.BadInput(err)
			}
			if err := errors.Join(f.Chmod(0o644), f.Sync(), f.Close(), os.Rename(f.Name(), output)); err != nil {
				return fmt.Errorf("--output: %w", err)
			}
			s.Log.Info("saved", "model", model, "digest", digest, "file", output)
			if err := s.Results(map[string]string{"digest": digest}); err != nil {
				return err
			}
			return s.Print(digest, Result{Digest: digest, File: output})
		},
	}
	cmd.Flags().StringVar(&model, "model", "", "the model: reference of its ModelPack")
	cmd.Flags().StringVar(&output, "output", "", "the file to write")
	rules.Flags(cmd.Flags(), "key")
	for _, name := range []string{"model", "output", "key"} {
		cmd.MarkFlagRequired(name)
	}
	return cmd
}

func load() *cobra.Command {
	var rules trust.Trust
	var to string
	cmd := &cobra.Command{
		Use:   "load FILE --to REF --key cosign.pub",
		Short: "Verify the model in a file and push it to a registry",
		Long: `Verify the model in a bundle, and push it and everything signed about it to a
repository. The signatures are for the repository that it came from: name that
with --repository, here and wherever the model is verified later. Prints the
model's reference.`,
		Example: `  temper bundle load mnist.tar --to registry.internal/mnist:2 --key cosign.pub --repository localhost/mnist
  temper bundle load - --to oci:models:mnist --key cosign.pub --repository localhost/mnist < mnist.tar`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, s := cmd.Context(), step.From(cmd)
			policy, err := rules.Rules(ctx)
			if err != nil {
				return err
			}
			if policy, err = channel.WithRevoked(ctx, to, policy); err != nil {
				return step.BadInput(err)
			}
			var archive io.Reader = cmd.InOrStdin()
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return step.BadInput(err)
				}
				defer f.Close()
				archive = f
			}
			v, err := bundle.Load(ctx, archive, to, policy)
			if err != nil {
				return step.BadInput(err)
			}
			s.Log.Info("loaded", "model", v.Reference)
			if err := s.Results(map[string]string{"reference": v.Reference, "digest": v.Digest}); err != nil {
				return err
			}
			return s.Print(v.Reference, Result{Reference: v.Reference, Digest: v.Digest, File: args[0]})
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "where to push it: HOST/REPOSITORY[:TAG] or oci:FOLDER[:TAG]")
	rules.Flags(cmd.Flags(), "key")
	for _, name := range []string{"to", "key"} {
		cmd.MarkFlagRequired(name)
	}
	return cmd
}
