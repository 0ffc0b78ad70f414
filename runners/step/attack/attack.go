// Package attack is the step that attacks a model and keeps the adversarial
// examples.
package attack

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	models "github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
)

const (
	// batch is how many images go through the network at a time.
	batch = 250
	// chunk is how many images are attacked at a time: it bounds memory.
	chunk = 1000
	// MaxSamples bounds the adversarial examples of one artifact.
	MaxSamples = 1_000_000
)

// Result is what the step prints.
type Result struct {
	Reference      string        `json:"reference"`
	Digest         string        `json:"digest"`
	ModelDigest    string        `json:"model_digest"`
	Dataset        string        `json:"dataset"`
	Attack         string        `json:"attack"`
	Threat         models.Threat `json:"threat"`
	Samples        int           `json:"samples"`
	Seed           uint64        `json:"seed"`
	CleanAccuracy  float64       `json:"clean_accuracy"`
	RobustAccuracy float64       `json:"robust_accuracy"` // under this attack
	Seconds        float64       `json:"seconds"`
}

// Command is the step.
func Command() *cobra.Command {
	var (
		model, data, spec, output string
		threat                    = models.Threat{Norm: "linf"}
		samples                   int
		seed                      uint64
	)
	cmd := &cobra.Command{
		Use:   "attack --model REF --output REF",
		Short: "Attack a model and push the adversarial examples",
		Long: `Attack a model on the first test images, as somebody who has its weights, and
push the adversarial images with their true labels as a data set, which every
--dataset takes. Prints the reference with its digest.

Attacks: fgsm, pgd-STEPS, pgd-STEPSxRESTARTS, noise, apgd-ce, apgd-dlr, apgd-t,
fab-t, square. evaluate makes the same examples of the same images.`,
		Example: `  temper attack --model oci:out:standard --output oci:out:fgsm
  temper attack --model model.onnx --attack pgd-20 --epsilon 0.15 --samples 500 --output localhost:5000/mnist:pgd`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			started, ctx, s := time.Now(), cmd.Context(), step.From(cmd)
			a, err := models.Parse(spec, threat)
			if err != nil {
				return step.BadInput(err)
			}
			if err := artifact.Reachable(ctx, output); err != nil {
				return err
			}
			m, err := artifact.ReadModel(ctx, model)
			if err != nil {
				return err
			}
			splits, err := artifact.OpenDataset(ctx, data)
			if err != nil {
				return err
			}
			target, err := graph.NewAttack(m.Network, batch)
			if err != nil {
				return err
			}
			if err := evaluate.Fits(target, splits.Test); err != nil {
				return step.BadInput(err)
			}
			if samples > splits.Test.Len() {
				return step.BadInput(fmt.Errorf("--samples %d: dataset %s has %d test images", samples, splits.Name, splits.Test.Len()))
			}
			clean := splits.Test.Slice(0, samples)
			s.Log.Info("attacking", "model", m.Reference, "attack", a.Name(), "epsilon", threat.Epsilon, "samples", samples)
			adversarial := &dataset.Set{Name: clean.Name + "/" + a.Name(), Shape: clean.Shape, Classes: clean.Classes, Labels: clean.Labels}
			adversarial.Floats = make([]float32, 0, samples*clean.Shape.Size())
			for lo := 0; lo < samples; lo += chunk {
				hi := min(lo+chunk, samples)
				x := make([]float32, (hi-lo)*clean.Shape.Size())
				clean.Read(x, lo, hi)
				adv, err := a.Perturb(ctx, target, x, clean.Labels[lo:hi], seed)
				if err != nil {
					return step.BadInput(fmt.Errorf("%s: %w", a.Name(), err))
				}
				if err := threat.Verify(adv, x, clean.Shape.Size()); err != nil {
					return fmt.Errorf("%s: %w", a.Name(), err)
				}
				adversarial.Floats = append(adversarial.Floats, adv...)
				s.Progress(hi, samples)
			}
			result := Result{ModelDigest: m.Digest, Dataset: splits.Name, Attack: a.Name(), Threat: threat, Samples: samples, Seed: seed}
			for set, accuracy := range map[*dataset.Set]*float64{clean: &result.CleanAccuracy, adversarial: &result.RobustAccuracy} {
				predictions, err := evaluate.Predict(ctx, target, set)
				if err != nil {
					return step.BadInput(err)
				}
				right := 0
				for i, p := range predictions {
					if p == set.Labels[i] {
						right++
					}
				}
				*accuracy = float64(right) / float64(samples)
			}
			result.Reference, result.Digest, err = artifact.PushDataset(ctx, output, &dataset.Splits{Name: adversarial.Name, Test: adversarial}, map[string]string{
				"temper.model": m.Digest, "temper.attack": a.Name(), "temper.epsilon": number(threat.Epsilon), "temper.seed": strconv.FormatUint(seed, 10),
			})
			if err != nil {
				return err
			}
			result.Seconds = time.Since(started).Seconds()
			s.Log.Info("attacked", "clean_accuracy", result.CleanAccuracy, "robust_accuracy", result.RobustAccuracy, "examples", result.Reference)
			err = s.Results(map[string]string{
				"reference": result.Reference, "digest": result.Digest,
				"clean_accuracy": number(result.CleanAccuracy), "robust_accuracy": number(result.RobustAccuracy),
			})
			if err != nil {
				return err
			}
			return s.Print(result.Reference, result)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&model, "model", "", "the model to attack: a reference, or an ONNX file")
	flags.StringVar(&data, "dataset", "mnist", "mnist, a folder of IDX files, of images or of CIFAR-10, URL#sha256:..., or a reference")
	flags.StringVar(&spec, "attack", "fgsm", "fgsm, pgd-STEPS, pgd-STEPSxRESTARTS, noise, apgd-ce, apgd-dlr, apgd-t, fab-t or square")
	flags.StringVar(&threat.Norm, "norm", "linf", "norm of the perturbation: "+strings.Join(models.Norms(), " or "))
	step.Float(flags, &threat.Epsilon, "epsilon", 0.3, 0, 1000, "size of the perturbation, in pixels of [0,1]")
	step.Int(flags, &samples, "samples", 1000, 1, MaxSamples, "how many test images to attack")
	flags.Uint64Var(&seed, "seed", 1, "seed of the attack's random starts")
	flags.StringVar(&output, "output", "", "reference to push the examples to: HOST/REPOSITORY:TAG or oci:FOLDER:TAG")
	cmd.MarkFlagRequired("model")
	cmd.MarkFlagRequired("output")
	return cmd
}

func number(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
