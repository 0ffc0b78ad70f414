// Package revoke is the command that makes models unusable: it adds digests to
// the signed list that every verifier of a repository reads.
package revoke

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/keygen"
	trust "github.com/temper-ml/temper/runners/step/verify"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/verify"
)

// Result is what the command prints.
type Result struct {
	List    string   `json:"list"` // digest
	Revoked []string `json:"revoked"`
}

// Command is the command.
func Command() *cobra.Command {
	var (
		repository, private, reason string
		trusted                     []string
	)
	cmd := &cobra.Command{
		Use:   "revoke --repository REF --key cosign.key DIGEST...",
		Short: "Make models unusable",
		Long: `Add digests to the signed list of a repository. Servers that follow a channel of
it take a revoked model out of service at their next look; nobody verifies,
serves or promotes it again. Promote another model to go on. Entries cannot be
taken back.

Any one trusted key may revoke. Without digests the list is signed once more,
which hands it on to a new key: give both public keys with --trust.`,
		Example: `  temper revoke --repository localhost:5000/mnist --key cosign.key --reason "learnt a backdoor" sha256:...
  temper revoke --repository localhost:5000/mnist --key new.key --trust old.pub,new.pub`,
		RunE: func(cmd *cobra.Command, digests []string) error {
			ctx, s := cmd.Context(), step.From(cmd)
			key, err := keygen.Load(ctx, private)
			if err != nil {
				return err
			}
			rules, err := (&trust.Trust{Keys: trusted}).Rules(ctx)
			if err != nil {
				return err
			}
			if len(rules.Keys) == 0 {
				rules.Keys = []verify.Key{{Name: "the revoking key", PEM: key.PublicKey()}}
			}
			for i, d := range digests { // a reference with a digest is one, too
				if _, digest, ok := strings.Cut(d, "@"); ok {
					digests[i] = digest
				}
			}
			list, err := channel.Revoke(ctx, repository, digests, reason, rules, key, nil)
			if err != nil {
				return step.BadInput(fmt.Errorf("revoke: %w", err)) // what is not a refusal or an outage is a bad reference or digest
			}
			entries, err := channel.Revoked(ctx, repository, rules)
			if err != nil {
				return err
			}
			result := Result{List: list, Revoked: []string{}}
			for _, e := range entries {
				result.Revoked = append(result.Revoked, e.Digest)
			}
			s.Log.Info("revoked", "repository", repository, "digests", strings.Join(digests, ","), "in_all", len(entries))
			if err := s.Results(map[string]string{"list": list}); err != nil {
				return err
			}
			return s.Print(strings.Join(result.Revoked, "\n"), result)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&repository, "repository", "", "repository of the models, or a channel in it")
	flags.StringVar(&private, "key", "", "private key that signs the list: a file, env://VARIABLE, k8s://NAMESPACE/SECRET, or a KMS reference")
	flags.StringSliceVar(&trusted, "trust", nil, "public keys that may have signed the list (default: that of --key)")
	flags.StringVar(&reason, "reason", "", "why, for the list")
	cmd.MarkFlagRequired("repository")
	cmd.MarkFlagRequired("key")
	return cmd
}
