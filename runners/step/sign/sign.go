// Package sign is the command that signs artifacts and attests to how robust
// a model was found to be.
package sign

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/keygen"
	"github.com/temper-ml/temper/signing"
	signer "github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
)

// Result is what the command prints.
type Result struct {
	References []string      `json:"references"`
	Verdict    string        `json:"verdict,omitempty"` // signed or rejected
	Reasons    []gate.Reason `json:"reasons,omitempty"`
}

// Job is one signing.
type Job struct {
	References []string
	Key        string
	Report     string       // "" for the report that the artifact holds
	Policy     *gate.Policy // nil for no test result
	PolicyName string
}

// Run signs, attests and says what it signed. A model that the policy rejects
// is not signed.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	key, err := keygen.Load(ctx, j.Key)
	if err != nil {
		return err
	}
	result := Result{Verdict: "signed"}
	var all []*subject
	for _, ref := range j.References { // look at all before signing any
		a, err := j.read(ctx, ref)
		if err != nil {
			return err
		}
		all = append(all, a)
		if a.report == nil || j.Policy == nil {
			continue
		}
		verdict, err := gate.Decide(*j.Policy, a.report, nil)
		if err != nil {
			return step.BadInput(fmt.Errorf("%s: %w", ref, err))
		}
		a.verdict = &verdict
		if result.Verdict == "rejected" {
			continue // its reasons are those to tell
		}
		result.Reasons = verdict.Reasons
		if !verdict.Pass {
			result.Verdict = "rejected"
		}
	}
	if result.Verdict == "rejected" {
		for _, reason := range result.Reasons {
			s.Log.Warn("gate: " + reason.String())
		}
		s.Log.Warn("rejected by the policy: not signed", "policy", j.PolicyName)
		if err := s.Results(map[string]string{"verdict": result.Verdict}); err != nil {
			return err
		}
		return s.Print("", result)
	}
	for _, a := range all {
		if err := j.sign(ctx, key, a); err != nil {
			return err
		}
		s.Log.Info("signed", "reference", a.reference, "attested", a.report != nil)
		result.References = append(result.References, a.reference)
	}
	if err := s.Results(map[string]string{"verdict": result.Verdict, "reference": result.References[0]}); err != nil {
		return err
	}
	return s.Print(strings.Join(result.References, "\n"), result)
}

// subject is an artifact to sign.
type subject struct {
	reference string // with the digest
	build     *signing.Build
	training  artifact.Training
	report    *evaluate.Report // nil where there is nothing to attest
	verdict   *gate.Verdict
}

// read finds the model and report that an artifact holds.
func (j *Job) read(ctx context.Context, ref string) (*subject, error) {
	r, err := store.Open(ctx, ref)
	if err != nil {
		return nil, step.BadInput(err)
	}
	defer r.Close()
	a, err := r.Pull(ctx, store.Want{Bytes: 2 * onnx.MaxSize})
	if err != nil {
		return nil, err
	}
	at, err := r.At(a.Digest)
	if err != nil {
		return nil, err
	}
	found := &subject{reference: at.String()}
	file := func(name string) []byte {
		data, err := a.File(name)
		if err != nil {
			return nil
		}
		return data
	}
	if car := file("models.tar"); car != nil { // a modelcar holds the same files, in a tar
		if file, err = untar(car); err != nil {
			return nil, &store.Refused{Reference: at.String(), Err: err}
		}
	}
	b := &signing.Build{Name: "model", Card: []byte("model"), Model: file(signing.ModelFile), Report: file(signing.ReportFile), Training: file(signing.TrainingFile)}
	if j.Report != "" {
		given, err := artifact.ReadReport(ctx, j.Report)
		if err != nil {
			return nil, err
		}
		b.Report = given.JSON
	}
	if b.Model == nil || b.Report == nil {
		if j.Report != "" || j.Policy != nil {
			return nil, step.BadInput(fmt.Errorf("%s holds no model with a report to attest to: pack it, or sign it without --policy and --report", at))
		}
		return found, nil
	}
	if b.Training != nil {
		if err := json.Unmarshal(b.Training, &found.training); err != nil {
			return nil, step.BadInput(fmt.Errorf("%s: %s: %w", at, signing.TrainingFile, err))
		}
	}
	if found.report, err = evaluate.Decode(b.Report); err != nil {
		return nil, step.BadInput(fmt.Errorf("%s: %w", at, err))
	}
	found.build = b
	return found, nil
}

// untar returns the files below models/ of a modelcar's layer.
func untar(data []byte) (func(string) []byte, error) {
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return func(name string) []byte { return files["models/"+name] }, nil
		}
		if err != nil {
			return nil, fmt.Errorf("modelcar: %w", err)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		if _, twice := files[h.Name]; twice || h.Typeflag != tar.TypeReg {
			return nil, fmt.Errorf("modelcar: %.100q is there twice, or is no regular file", h.Name)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil { // bounded by data
			return nil, fmt.Errorf("modelcar: %w", err)
		}
	}
}

// sign signs an artifact last: one that is signed has its statements.
func (j *Job) sign(ctx context.Context, key *signer.Key, a *subject) error {
	if a.report != nil {
		figures, err := a.build.Robustness(a.training.BaseDigest, a.training.RecipeName, a.training.Seed)
		if err != nil {
			return step.BadInput(fmt.Errorf("%s: %w", a.reference, err))
		}
		if _, err := key.Attest(ctx, a.reference, statement.RobustnessType, figures); err != nil {
			return err
		}
	}
	if a.verdict != nil {
		test, err := TestResult(*a.verdict, j.PolicyName, *j.Policy, a.report)
		if err != nil {
			return err
		}
		if _, err := key.Attest(ctx, a.reference, statement.TestResultType, test); err != nil {
			return err
		}
	}
	_, err := key.Sign(ctx, a.reference)
	return err
}

// TestResult states a verdict of the gate: each rule is a test, configured by
// the policy and the data set.
func TestResult(v gate.Verdict, policyName string, policy gate.Policy, r *evaluate.Report) (*statement.TestResult, error) {
	rules, err := json.Marshal(policy)
	if err != nil {
		return nil, err
	}
	hex := func(digest string) map[string]string {
		return map[string]string{"sha256": strings.TrimPrefix(digest, "sha256:")}
	}
	t := &statement.TestResult{
		Result: statement.Failed,
		Configuration: []statement.Resource{
			{Name: "policy " + policyName, Digest: hex(artifact.Digest(rules))},
			{Name: "dataset " + r.Dataset, Digest: hex(r.DatasetDigest)},
		},
	}
	if v.Pass {
		t.Result = statement.Passed
	}
	for _, reason := range v.Reasons {
		if reason.Pass {
			t.PassedTests = append(t.PassedTests, reason.Rule)
		} else {
			t.FailedTests = append(t.FailedTests, reason.Rule)
		}
	}
	return t, t.Validate()
}

// Command is the command.
func Command() *cobra.Command {
	var (
		j      Job
		policy string
	)
	cmd := &cobra.Command{
		Use:   "sign --key cosign.key REF...",
		Short: "Sign artifacts, and attest to a model's figures",
		Long: `Sign artifacts as cosign does, for the repository they are in. For a packed model
the figures of its report are attested too, as an in-toto statement; with
--policy also the gate's verdict, and a model that the policy rejects is not
signed. The key's password is $COSIGN_PASSWORD, or is typed at the terminal.
Prints each reference with its digest. Signing again changes nothing.`,
		Example: `  temper sign --key cosign.key --policy wong oci:out:model oci:out:model-modelcar
  temper sign --key k8s://temper/signing-key localhost:5000/mnist@sha256:...
  cosign verify --key cosign.pub --insecure-ignore-tlog localhost:5000/mnist@sha256:...`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			j.References = args
			if policy != "" {
				model, err := artifact.Definition(cmd.Context(), policy)
				if err != nil {
					return fmt.Errorf("policy: %w", err)
				}
				j.Policy, j.PolicyName = &model.Policy, model.Name
			}
			return j.Run(cmd.Context(), step.From(cmd))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&j.Key, "key", "", "private key: a file, env://VARIABLE, k8s://NAMESPACE/SECRET, or a KMS reference")
	flags.StringVar(&j.Report, "report", "", "report to attest to, a reference or JSON file (default: the one in the packed model)")
	flags.StringVar(&policy, "policy", "", "model of the zoo, YAML file or reference of one, whose gate policy decides")
	cmd.MarkFlagRequired("key")
	return cmd
}
