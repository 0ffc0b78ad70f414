// Package signingtest makes models, reports and keys for tests of the packages
// below signing and of what uses them.
package signingtest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"

	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/interval"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/signing"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/verify"
)

// Dataset is the digest of the data set of every report here.
const Dataset = "sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd"

// Build is a small model with its report: 100 samples, of which 98 are right
// clean and 95 under attack. Other seeds are other models.
func Build(t testing.TB, seed uint64) *signing.Build {
	t.Helper()
	return build(t, seed, 100, 98, 95)
}

// Definition is one whose gate policy the models of Judged meet.
const Definition = `
name: tiny
network: wong
dataset: mnist
recipe: {train: standard, retrain: fast}
threat: {norm: linf, epsilon: 0.3}
policy:
  attacks: [fgsm]
  min_clean_accuracy: 0.5
  min_robust_accuracy: 0.5
  max_clean_regression: 0
  max_robust_regression: 0
  min_samples: 1000
  confidence: 0.95
`

// Judged is Build with as many samples as a gate policy asks for: 1,000, of
// which 980 are right clean and as many as given under attack.
func Judged(t testing.TB, seed uint64, robust int) *signing.Build {
	t.Helper()
	return build(t, seed, 1000, 980, robust)
}

func build(t testing.TB, seed uint64, samples, clean, robust int) *signing.Build {
	t.Helper()
	net, err := nn.New(nn.Description{
		Name:  "tiny",
		Input: nn.Shape{Height: 4, Width: 4, Channels: 1},
		Layers: []nn.Layer{
			{Conv: &nn.Conv{Filters: 2, Kernel: 3, ReLU: true}},
			{Dense: &nn.Dense{Units: 2}},
		},
	}, seed)
	if err != nil {
		t.Fatal(err)
	}
	model, err := onnx.Marshal(net, map[string]string{"temper.network": "tiny"})
	if err != nil {
		t.Fatal(err)
	}
	report, err := report(digest(model), samples, clean, robust).Encode()
	if err != nil {
		t.Fatal(err)
	}
	return &signing.Build{
		Name:     "tiny",
		Version:  "1",
		Licenses: []string{"Apache-2.0"},
		Model:    model,
		Report:   report,
		Card:     []byte("# tiny\n"),
		Training: []byte(`{"recipe_name":"fast","seed":1}` + "\n"),
		Zoo:      []byte("name: tiny\n"),
	}
}

// Report is that of Build.
func Report(model string) *evaluate.Report { return report(model, 100, 98, 95) }

func report(model string, samples, clean, robust int) *evaluate.Report {
	share := func(correct int) float64 { return float64(correct) / float64(samples) }
	confusion := func(correct int) [][]int {
		wrong, each := samples-correct, samples/2
		return [][]int{{each - wrong/2, wrong / 2}, {wrong - wrong/2, each - (wrong - wrong/2)}}
	}
	bound := func(correct int) float64 { return interval.Lower(correct, samples, evaluate.Confidence) }
	return &evaluate.Report{
		ModelDigest: model, Network: "tiny", Dataset: "test", DatasetDigest: Dataset,
		Threat: attack.Threat{Norm: "linf", Epsilon: 0.3}, Seed: 1,
		Samples: samples, Confidence: evaluate.Confidence,
		CleanCorrect: clean, CleanAccuracy: share(clean), CleanAccuracyLowerBound: bound(clean),
		RobustCorrect: robust, RobustAccuracy: share(robust), RobustAccuracyLowerBound: bound(robust),
		Attacks: []evaluate.Attack{{Name: "fgsm", Correct: robust, Broken: clean - robust,
			Accuracy: share(robust), AccuracyLowerBound: bound(robust), SuccessRate: float64(clean-robust) / float64(clean)}},
		Classes:   []evaluate.Class{{Name: "0"}, {Name: "1"}},
		Confusion: evaluate.Confusion{Clean: confusion(clean), Adversarial: confusion(robust)},
		Shape:     nn.Shape{Height: 4, Width: 4, Channels: 1},
	}
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Key makes a key, without the slow encryption of one that is a file.
func Key(t testing.TB) *sign.Key {
	t.Helper()
	k, _ := Signer(t)
	return k
}

// Signer is Key with what signs for it.
func Signer(t testing.TB) (*sign.Key, signature.Signer) {
	t.Helper()
	signer, _, err := signature.NewDefaultECDSASignerVerifier()
	if err != nil {
		t.Fatal(err)
	}
	k, err := sign.NewKey(signer)
	if err != nil {
		t.Fatal(err)
	}
	return k, signer
}

// Password is that of the key of KeyFolder.
const Password = "correct horse"

// KeyFolder makes a key pair in a folder of the test's, cosign.key and
// cosign.pub, and loads it.
func KeyFolder(t testing.TB) (*sign.Key, string) {
	t.Helper()
	dir := t.TempDir()
	password := func(bool) ([]byte, error) { return []byte(Password), nil }
	if err := sign.GenerateKeyPair(dir, password); err != nil {
		t.Fatal(err)
	}
	k, err := sign.LoadKey(t.Context(), filepath.Join(dir, sign.PrivateKeyFile), password)
	if err != nil {
		t.Fatal(err)
	}
	public, err := os.ReadFile(filepath.Join(dir, sign.PublicKeyFile))
	if err != nil || string(public) != string(k.PublicKey()) {
		t.Fatalf("%s is not the key's public half: %v", sign.PublicKeyFile, err)
	}
	return k, dir
}

// Policy trusts keys and asks for the statements that Attest makes.
func Policy(keys ...*sign.Key) verify.Policy {
	p := verify.Policy{Robustness: &verify.Requirement{Dataset: Dataset, Norm: "linf", Epsilon: 0.3, Clean: 0.9, Robust: 0.85, Samples: 100}}
	for i, k := range keys {
		p.Keys = append(p.Keys, verify.Key{Name: string(rune('a' + i)), PEM: k.PublicKey()})
	}
	return p
}

// Pack packs, signs and attests a build, and returns the ModelPack's
// reference.
func Pack(t testing.TB, ref string, b *signing.Build, keys ...*sign.Key) string {
	t.Helper()
	packed, err := signing.Pack(t.Context(), ref, b)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		Sign(t, packed.ModelPack, b, k)
		if _, err := k.Sign(t.Context(), packed.Modelcar); err != nil {
			t.Fatal(err)
		}
	}
	return packed.ModelPack
}

// Sign signs a build's artifact and attests to its figures.
func Sign(t testing.TB, ref string, b *signing.Build, k *sign.Key) {
	t.Helper()
	figures, err := b.Robustness("", "fast", 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, do := range []func(context.Context) (string, error){
		func(ctx context.Context) (string, error) { return k.Sign(ctx, ref) },
		func(ctx context.Context) (string, error) {
			return k.Attest(ctx, ref, statement.TestResultType, Passed())
		},
		func(ctx context.Context) (string, error) {
			return k.Attest(ctx, ref, statement.RobustnessType, figures)
		},
	} {
		if _, err := do(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// Passed is a test result that is passed.
func Passed() *statement.TestResult {
	return &statement.TestResult{
		Result:        statement.Passed,
		Configuration: []statement.Resource{{Name: "policy"}},
		PassedTests:   []string{"clean", "robust"},
	}
}
