// Package registry is the command that serves an OCI image layout folder as a
// registry.
package registry

import (
	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/signing/store"
)

// Command is the command; it runs until it is interrupted.
func Command() *cobra.Command {
	var dir, listen string
	cmd := &cobra.Command{
		Use:   "registry --dir FOLDER",
		Short: "Serve a folder as an OCI registry",
		Long: `Serve an OCI image layout folder over the OCI distribution protocol until
interrupted: for a laptop and for tests. There is no authentication: whoever
reaches the address may write. Prints the address.`,
		Example: `  temper registry --dir out
  temper registry --dir out --listen 127.0.0.1:0`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, s := cmd.Context(), step.From(cmd)
			registry, err := store.Start(ctx, dir, listen)
			if err != nil {
				return step.BadInput(err)
			}
			defer registry.Close()
			s.Log.Info("serving", "folder", dir, "address", registry.Addr())
			answer := struct {
				Address string `json:"address"`
			}{registry.Addr()}
			if err := s.Print(answer.Address, answer); err != nil {
				return err
			}
			<-ctx.Done()
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "folder to serve; made by the first push")
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:5000", "address to listen on; port 0 takes a free one")
	cmd.MarkFlagRequired("dir")
	return cmd
}
