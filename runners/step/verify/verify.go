// Package verify is the command that decides whether an artifact may be used:
// who signed it, and what they attest.
package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/statement"
	signing "github.com/temper-ml/temper/signing/verify"
)

// maxKey is many times the size of a public key in PEM.
const maxKey = 64 << 10

// Trust is who may sign and what they must attest, as flags say it.
type Trust struct {
	Keys         []string // files with a public key in PEM
	Threshold    int
	Repositories []string
	Revoked      []string
	Policy       string // model of the zoo or YAML file, "" for a signature only
	Dataset      string // or the digest of its test split; "" for the model's of Policy
}

// Flags defines the flags of a Trust. keys names the flag for the public keys.
func (t *Trust) Flags(flags *pflag.FlagSet, keys string) {
	flags.StringSliceVar(&t.Keys, keys, nil, "public keys that may sign: files such as cosign.pub")
	step.Int(flags, &t.Threshold, "signers", 1, 1, 16, "how many different keys must have signed")
	flags.StringSliceVar(&t.Repositories, "repository", nil, "other repositories that a signature may be for, such as registry.example/models/*")
	flags.StringSliceVar(&t.Revoked, "revoked", nil, "digests that are never accepted")
	flags.StringVar(&t.Policy, "policy", "", "model of the zoo, YAML file or reference of one, whose gate policy the signed figures must meet")
	flags.StringVar(&t.Dataset, "dataset", "", "data set that the figures must be from, or the digest of its test split (default: that of the policy's model)")
}

// Rules reads what the flags name.
func (t *Trust) Rules(ctx context.Context) (signing.Policy, error) {
	rules := signing.Policy{Threshold: t.Threshold, Repositories: t.Repositories}
	for _, d := range t.Revoked {
		d = d[strings.LastIndex(d, "@")+1:] // of a reference its digest, as "temper revoke" takes it
		if _, err := v1.NewHash(d); err != nil {
			return rules, step.BadInput(fmt.Errorf("--revoked %q: write sha256: and 64 lower-case hex digits, or a reference that ends in them", d))
		}
		rules.Revoked = append(rules.Revoked, d)
	}
	for _, path := range t.Keys {
		pem, err := readKey(path)
		if err != nil {
			return rules, step.BadInput(err)
		}
		rules.Keys = append(rules.Keys, signing.Key{Name: filepath.Base(path), PEM: pem})
	}
	if t.Policy == "" {
		if t.Dataset != "" {
			return rules, step.BadInput(errors.New("--dataset is for figures: give a --policy too"))
		}
		return rules, nil
	}
	model, err := artifact.Definition(ctx, t.Policy)
	if err != nil {
		return rules, fmt.Errorf("policy: %w", err)
	}
	if strings.HasPrefix(t.Dataset, "sha256:") {
		rules.Robustness = Requirement(model.Policy, t.Dataset)
		return rules, nil
	}
	if t.Dataset == "" {
		t.Dataset = model.Dataset
	}
	splits, err := artifact.OpenDataset(ctx, t.Dataset)
	if err != nil {
		return rules, err
	}
	rules.Robustness = Requirement(model.Policy, splits.Test.Digest())
	return rules, nil
}

// Requirement is what a gate policy asks of signed figures about a test split.
func Requirement(p gate.Policy, dataset string) *signing.Requirement {
	return &signing.Requirement{
		Dataset: dataset, Norm: p.Threat.Norm, Epsilon: p.Threat.Epsilon, Attacks: p.Attacks, Samples: p.MinSamples,
		Clean: p.MinCleanAccuracy, Robust: p.MinRobustAccuracy, Certified: p.MinCertified, Confidence: p.Confidence,
		Suite: p.Suite,
		Checks: func(signed []statement.Check) error {
			var made []evaluate.Check
			for _, c := range signed {
				made = append(made, evaluate.Check{Name: c.Name, Figures: c.Figures})
			}
			for _, reason := range p.JudgeChecks(made) {
				if !reason.Pass {
					return fmt.Errorf("its figures are not to be believed: %s: %s", reason.Rule, reason.Text)
				}
			}
			return nil
		},
	}
}

func readKey(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	defer f.Close()
	pem, err := io.ReadAll(io.LimitReader(f, maxKey+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("public key: %w", err)
	case len(pem) > maxKey:
		return nil, fmt.Errorf("public key %s: larger than %d bytes", path, maxKey)
	case strings.Contains(string(pem), "PRIVATE KEY"):
		return nil, fmt.Errorf("public key %s: it is a private key: give the .pub file beside it", path)
	}
	return pem, nil
}

// Result is what the command prints.
type Result struct {
	References []string `json:"references"`
	Keys       []string `json:"keys"` // that signed the first of them
}

// Command is the command.
func Command() *cobra.Command {
	var (
		trust Trust
		head  string
	)
	cmd := &cobra.Command{
		Use:   "verify --key cosign.pub REF...",
		Short: "Check signatures and signed figures",
		Long: `Check that artifacts are signed by the given keys for the repository they are
in; with --policy also that the keys attest a passed test and figures that meet
the gate policy. What "temper revoke" names is refused. With --channel
it is the model in service that is checked. Exit code 3 is a refusal. Prints each
reference with the digest that was verified: use that, not the tag.`,
		Example: `  temper verify --key cosign.pub oci:out:model
  temper verify --key cosign.pub --policy wong localhost:5000/mnist@sha256:...
  temper verify --key cosign.pub --channel localhost:5000/mnist:production
  temper verify --key ada.pub,grace.pub --signers 2 localhost:5000/mnist:production`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, s := cmd.Context(), step.From(cmd)
			rules, err := trust.Rules(ctx)
			if err != nil {
				return err
			}
			if head != "" {
				inService, err := channel.Read(ctx, head, rules)
				if err != nil {
					return step.BadInput(err)
				}
				args = append(args, inService.Reference)
			}
			if len(args) == 0 {
				return step.BadInput(errors.New("nothing to verify: name artifacts, or a --channel"))
			}
			var result Result
			for _, ref := range args {
				rules, err := channel.WithRevoked(ctx, ref, rules)
				if err != nil {
					return step.BadInput(err)
				}
				v, err := signing.Verify(ctx, ref, rules)
				if err != nil {
					return step.BadInput(err) // what is not a refusal is a bad reference or policy
				}
				s.Log.Info("verified", "reference", v.Reference, "keys", strings.Join(v.Keys, ","))
				if r := v.Robustness; r != nil {
					s.Log.Info("signed figures", "clean_at_least", r.Clean.LowerBound, "robust_at_least", r.Robust.LowerBound, "epsilon", r.Threat.Epsilon, "samples", r.Samples)
				}
				if result.Keys == nil {
					result.Keys = v.Keys
				}
				result.References = append(result.References, v.Reference)
			}
			if err := s.Results(map[string]string{"reference": result.References[0]}); err != nil {
				return err
			}
			return s.Print(strings.Join(result.References, "\n"), result)
		},
	}
	cmd.Flags().StringVar(&head, "channel", "", "channel whose model in service to verify, such as localhost:5000/mnist:production")
	trust.Flags(cmd.Flags(), "key")
	cmd.MarkFlagRequired("key")
	return cmd
}
