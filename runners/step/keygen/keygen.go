// Package keygen is the command that makes a signing key.
package keygen

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/signing/sign"
)

// Command is the command.
func Command() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "keygen",
		Short: "Make a key pair to sign models with",
		Long: `Make cosign.key and cosign.pub, as cosign does. The private key is encrypted with
a password: $COSIGN_PASSWORD, or what is typed at the terminal. An existing key
is never replaced. Prints the path of the public key.`,
		Example: `  temper keygen
  COSIGN_PASSWORD= temper keygen --dir keys`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return step.BadInput(fmt.Errorf("key pair: %w", err))
			}
			if err := sign.GenerateKeyPair(dir, Password); err != nil {
				return step.BadInput(err)
			}
			answer := struct {
				PrivateKey string `json:"private_key"`
				PublicKey  string `json:"public_key"`
			}{filepath.Join(dir, sign.PrivateKeyFile), filepath.Join(dir, sign.PublicKeyFile)}
			return step.From(cmd).Print(answer.PublicKey, answer)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", ".", "folder for the two files")
	return cmd
}

// Load loads a private key to sign with, as sign.LoadKey does, and gives its
// error the exit code.
func Load(ctx context.Context, ref string) (*sign.Key, error) {
	key, err := sign.LoadKey(ctx, ref, Password)
	var down *sign.Unavailable
	if errors.As(err, &down) {
		return nil, step.Unavailable(err)
	}
	return key, step.BadInput(err)
}

// Password takes the private key's password from $COSIGN_PASSWORD, or asks at
// the terminal where there is one.
func Password(confirm bool) ([]byte, error) {
	in := int(os.Stdin.Fd())
	if _, ok := os.LookupEnv(sign.PasswordVariable); ok || !term.IsTerminal(in) {
		return sign.EnvironmentPassword(confirm)
	}
	ask := func(prompt string) ([]byte, error) {
		fmt.Fprint(os.Stderr, prompt)
		defer fmt.Fprintln(os.Stderr)
		return term.ReadPassword(in)
	}
	password, err := ask("Password of the private key: ")
	if err != nil || !confirm {
		return password, err
	}
	again, err := ask("The same password again: ")
	if err == nil && !bytes.Equal(password, again) {
		err = errors.New("the two passwords differ")
	}
	return password, err
}
