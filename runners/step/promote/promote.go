// Package promote is the step that puts a signed model into service: it moves
// a channel.
package promote

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/keygen"
	"github.com/temper-ml/temper/runners/step/serve"
	trust "github.com/temper-ml/temper/runners/step/verify"
	"github.com/temper-ml/temper/signing"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// Verdicts of a promotion.
const (
	Promoted   = "promoted"
	Rejected   = "rejected"
	RolledBack = "rolled-back" // the endpoints did not answer as they should
)

// Result is what the step prints.
type Result struct {
	Verdict   string        `json:"verdict"`             // promoted, rejected or rolled-back
	Channel   string        `json:"channel"`             // reference
	Sequence  int           `json:"sequence,omitempty"`  // of the record
	Record    string        `json:"record,omitempty"`    // digest of the record
	Reference string        `json:"reference,omitempty"` // of the model now in service
	Digest    string        `json:"digest,omitempty"`    // of the model now in service
	Previous  string        `json:"previous,omitempty"`  // digest of the model that was in service before
	Reasons   []gate.Reason `json:"reasons,omitempty"`
	Modelcar  string        `json:"modelcar,omitempty"` // reference of what the InferenceService serves
	Live      *Live         `json:"live,omitempty"`     // what the endpoints answered
	Because   string        `json:"because,omitempty"`  // why it was rolled back
}

// Job is one promotion.
type Job struct {
	Channel, Model string // references in one repository
	Key            string // private key for the record
	Trust          trust.Trust
	Rollback       bool
	Reason         string
	Cluster        Cluster // what to roll and watch there
	Watch          Watch   // afterwards; without endpoints nothing is watched
}

// Run verifies, compares with the model in service, promotes and says what is
// in service now.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	cluster, err := j.Cluster.connect()
	if err != nil {
		return err
	}
	key, err := keygen.Load(ctx, j.Key)
	if err != nil {
		return err
	}
	rules, err := j.Trust.Rules(ctx)
	if err != nil {
		return err
	}
	if len(rules.Keys) == 0 { // who promotes trusts what the same key signed
		rules.Keys = []verify.Key{{Name: "the promoting key", PEM: key.PublicKey()}}
	}
	model, err := artifact.Definition(ctx, j.Trust.Policy)
	if err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	if rules, err = channel.WithRevoked(ctx, j.Channel, rules); err != nil {
		return step.BadInput(err)
	}
	candidate, err := verify.Load(ctx, j.Model, rules)
	if err != nil {
		return step.BadInput(err)
	}
	report, reportDigest, err := reportOf(candidate)
	if err != nil {
		return err
	}
	result := Result{Channel: j.Channel}
	promotion := channel.Promotion{
		Channel: j.Channel, Model: candidate.Reference, Policy: rules, Signer: key,
		Report: reportDigest, Rollback: j.Rollback, Reason: j.Reason,
	}
	var inService *evaluate.Report
	head, err := channel.Read(ctx, j.Channel, rules)
	var absent *store.NotFound
	switch {
	case errors.As(err, &absent):
		promotion.InService = new("")
	case err != nil:
		return step.BadInput(err)
	default:
		promotion.InService, result.Previous = &head.Model, head.Model
		// What is in service is only compared with, and trusted by its
		// signature: today's policy need not have been that of its day, and a
		// model that was revoked since is what has to be replaced.
		signed := rules
		signed.Robustness, signed.Revoked = nil, nil
		old, err := verify.Load(ctx, head.Reference, signed)
		if err != nil {
			return fmt.Errorf("model in service: %w", err)
		}
		if inService, _, err = reportOf(old); err != nil {
			return fmt.Errorf("model in service: %w", err)
		}
	}
	if j.Rollback {
		inService = nil // going back to a weaker model is what was asked for
	}
	verdict, err := gate.Decide(model.Policy, report, inService)
	if err != nil {
		if inService != nil {
			err = fmt.Errorf("%w (where the policy changed since that model was promoted, --rollback replaces it without a comparison, on record)", err)
		}
		return step.BadInput(err)
	}
	result.Reasons = verdict.Reasons
	if !verdict.Pass {
		for _, reason := range verdict.Reasons {
			s.Log.Warn("gate: " + reason.String())
		}
		s.Log.Warn("rejected: the channel stays as it is", "channel", j.Channel, "model", candidate.Reference)
		result.Verdict = Rejected
		if err := s.Results(map[string]string{"verdict": Rejected}); err != nil {
			return err
		}
		return s.Print("", result)
	}
	// What could go wrong must do so before the channel moves.
	target := &promoted{channel: j.Channel, model: candidate.Reference}
	if target.modelcar, err = cluster.modelcar(ctx, &candidate.Verified, rules); err != nil {
		return err
	}
	if err := cluster.try(ctx, target); err != nil {
		return err
	}
	var live *examples
	if len(j.Watch.Endpoints) > 0 {
		j.Watch.unnamed = j.Cluster.InferenceService != ""
		if live, err = j.Watch.prepare(ctx, s, candidate, report, model); err != nil {
			return err
		}
	}
	before := head
	promotion.Lock = cluster.lock
	if head, err = channel.Promote(ctx, promotion); err != nil {
		return refused(fmt.Errorf("promote: %w", err))
	}
	if before != nil && before.Digest == head.Digest { // an earlier run got this far
		if before, err = channel.Previous(ctx, j.Channel, head, rules); err != nil {
			return err
		}
		if head.Rollback { // from a model that was worse
			before = nil
		}
	}
	result.Verdict = Promoted
	s.Log.Info("promoted", "channel", j.Channel, "sequence", head.Sequence, "model", head.Reference)
	target.sequence = head.Sequence
	bad := cluster.roll(ctx, s, target)
	var failed *stuck
	if bad != nil && !errors.As(bad, &failed) {
		return refused(bad)
	}
	if bad == nil && live != nil {
		result.Live, bad = j.Watch.look(ctx, s, head, live)
	}
	if bad != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.Log.Error("the promotion is not what the signed report says", "error", bad.Error())
		if head, target, err = j.back(ctx, s, cluster, promotion, before, head, bad); err != nil {
			return err
		}
		result.Verdict, result.Because = RolledBack, bad.Error()
	}
	result.Modelcar = target.modelcar
	result.Sequence, result.Record = head.Sequence, head.Digest
	result.Reference, result.Digest = head.Reference, head.Model
	err = s.Results(map[string]string{
		"verdict": result.Verdict, "reference": head.Reference, "digest": head.Model,
		"record": head.Digest, "sequence": strconv.Itoa(head.Sequence), "previous": result.Previous,
	})
	if err != nil {
		return err
	}
	return s.Print(head.Reference, result)
}

// refused gives a promotion that another one came before its exit code.
func refused(err error) error {
	var conflict *channel.Conflict
	if errors.As(err, &conflict) {
		return step.Refused(err)
	}
	return err
}

// reportOf is the report in a packed model, and its digest.
func reportOf(m *verify.Model) (*evaluate.Report, string, error) {
	for _, f := range m.Files {
		if f.Name != signing.ReportFile {
			continue
		}
		r, err := evaluate.Decode(f.Data)
		if err != nil {
			return nil, "", step.BadInput(fmt.Errorf("%s: %w", m.Reference, err))
		}
		digest := artifact.Digest(f.Data)
		if m.Robustness != nil && m.Robustness.ReportDigest != digest {
			return nil, "", step.Refused(fmt.Errorf("%s: its report is %s, and the signed figures are from %s", m.Reference, digest, m.Robustness.ReportDigest))
		}
		return r, digest, nil
	}
	return nil, "", step.BadInput(fmt.Errorf("%s holds no %s: pack it with its report", m.Reference, signing.ReportFile))
}

// Command is the step.
func Command() *cobra.Command {
	var j Job
	cmd := &cobra.Command{
		Use:   "promote --channel REF --model REF --key cosign.key --policy NAME",
		Short: "Put a signed model into service",
		Long: `Verify a packed model and what is attested about it, hold it to the policy and
against the model in service, and make it the head of a channel: a line of
signed records in the repository of its models, which servers follow.

A model that the gate rejects leaves the channel as it is; the verdict is then
"rejected" and the exit code 0. A model that was in service before needs
--rollback. Prints the reference of the model now in service; promoting it again
changes nothing.

With --endpoint the step goes on until every endpoint serves the new model, then
attacks it there, and goes back to the model before where the answers are worse
than the signed report says; the verdict is then "rolled-back". Name each
replica, or a service in front of them.

"temper serve" follows the channel by itself. Servers that do not are told:
--deployment sets the annotation temper-ml.github.io/model of a Deployment's pods,
--inference-service the storageUri of a KServe InferenceService. The step then
watches the rollout, and where that fails goes back in the same way. With --lock
the channel's last record is in a ConfigMap too, whose resourceVersion decides
between promotions at once, whatever the registry does.`,
		Example: `  temper promote --channel oci:out:production --model oci:out:model --key cosign.key --policy wong
  temper promote --channel localhost:5000/mnist:production --model localhost:5000/mnist@sha256:... --key k8s://temper/signing-key --trust cosign.pub --policy wong
  temper promote --channel localhost:5000/mnist:production --model localhost:5000/mnist:2 --key cosign.key --policy wong --endpoint http://serve:8080
  temper promote --channel registry:5000/mnist:production --model registry:5000/mnist@sha256:... --key cosign.key --policy wong --lock temper/channels --inference-service temper/mnist
  temper promote --channel oci:out:production --model oci:out@sha256:... --key cosign.key --policy wong --rollback --reason "incident 12"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !strings.Contains(j.Channel, ":") {
				return step.BadInput(fmt.Errorf("channel %q: write REPOSITORY:CHANNEL, such as oci:out:production", j.Channel))
			}
			if j.Watch.Name == "" {
				j.Watch.Name = serve.DefaultName(j.Channel)
			}
			return j.Run(cmd.Context(), step.From(cmd))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&j.Channel, "channel", "", "the channel: the model's repository with the channel as its tag")
	flags.StringVar(&j.Model, "model", "", "the model to put into service: reference of its ModelPack")
	flags.StringVar(&j.Key, "key", "", "private key that signs the record: a file, env://VARIABLE, k8s://NAMESPACE/SECRET, or a KMS reference")
	j.Trust.Flags(flags, "trust")
	flags.Lookup("trust").Usage += " (default: that of --key)"
	flags.BoolVar(&j.Rollback, "rollback", false, "go back to a model that was in service before, or to a weaker one")
	flags.StringVar(&j.Reason, "reason", "", "why, for the record")
	j.Watch.flags(flags)
	j.Cluster.flags(flags)
	for _, name := range []string{"channel", "model", "key", "policy"} {
		cmd.MarkFlagRequired(name)
	}
	return cmd
}
