// Package train is the step that trains a network from nothing; package
// retrain shares its Job to train one further.
package train

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/nn"
	models "github.com/temper-ml/temper/models/train"
	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
)

// MaxEpochs is above any training of the zoo and keeps a mistyped number from
// asking for a year.
const MaxEpochs = 10_000

// Job is one training: what to train, how, and where its result goes.
type Job struct {
	Name       string // of the network
	Network    *nn.Network
	BaseDigest string // of the model that Network is, "" for random weights
	Dataset    string // as artifact.OpenDataset takes it
	RecipeName string
	Recipe     models.Recipe
	Threat     attack.Threat
	Seed       uint64
	Checkpoint string // a file, "" for none
	Output     string // a reference
}

// Result is what a training step prints.
type Result struct {
	Reference     string  `json:"reference"`
	Digest        string  `json:"digest"`       // of the artifact
	ModelDigest   string  `json:"model_digest"` // of model.onnx
	Network       string  `json:"network"`
	BaseDigest    string  `json:"base_digest,omitempty"`
	DatasetDigest string  `json:"dataset_digest"`
	Recipe        string  `json:"recipe"`
	Seed          uint64  `json:"seed"`
	Steps         int     `json:"steps"`
	Loss          float64 `json:"loss"`
	Rollbacks     int     `json:"rollbacks"`
	Seconds       float64 `json:"seconds"`
}

// Run trains, pushes the network and says what it made.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	started := time.Now()
	if err := j.Recipe.Validate(); err != nil {
		return step.BadInput(fmt.Errorf("recipe %s: %w", j.RecipeName, err))
	}
	if err := artifact.Reachable(ctx, j.Output); err != nil {
		return err
	}
	splits, err := artifact.OpenDataset(ctx, j.Dataset)
	if err != nil {
		return err
	}
	if splits.Train.Len() == 0 {
		return step.BadInput(fmt.Errorf("dataset %s has no training images: it is for --dataset of attack and evaluate", splits.Name))
	}
	s.Log.Info("training", "network", j.Name, "dataset", splits.Name, "recipe", j.RecipeName, "epochs", j.Recipe.Epochs(), "epsilon", j.Threat.Epsilon, "seed", j.Seed)
	result, err := models.Run(ctx, j.Network, splits.Train, splits.Validation, j.Recipe, j.Threat, j.Seed, models.Options{
		Progress: s.Progress, Checkpoint: j.Checkpoint, Log: s.Log,
	})
	if err != nil {
		return j.interrupted(refused(err))
	}
	m, err := artifact.PushNetwork(ctx, j.Output, j.Network, splits.Validation, &artifact.Training{
		Network: j.Name, Dataset: step.RedactURLs(splits.Name), DatasetDigest: splits.Digest(), RecipeName: filepath.Base(j.RecipeName), Recipe: j.Recipe, // where a file lies must not change the digest

		Threat: j.Threat, Seed: j.Seed, BaseDigest: j.BaseDigest,
	})
	if err != nil {
		return j.interrupted(err)
	}
	answer := Result{
		Reference: m.Reference, Digest: m.Manifest, ModelDigest: m.Digest, Network: j.Name, BaseDigest: j.BaseDigest,
		DatasetDigest: m.Training.DatasetDigest, Recipe: j.RecipeName, Seed: j.Seed,
		Steps: result.Steps, Loss: result.Loss, Rollbacks: len(result.Rollbacks), Seconds: time.Since(started).Seconds(),
	}
	s.Log.Info("trained", "model", answer.Reference, "seconds", answer.Seconds)
	err = s.Results(map[string]string{"reference": answer.Reference, "digest": answer.Digest, "model_digest": answer.ModelDigest})
	if err != nil {
		return err
	}
	return s.Print(answer.Reference, answer)
}

// refused gives an error of training its category: what training refuses is
// what it was given, unless a file failed, which may work another time.
func refused(err error) error {
	var file *fs.PathError
	if stopped(err) || errors.As(err, &file) {
		return err
	}
	return step.BadInput(err)
}

func stopped(err error) bool {
	return errors.Is(err, models.ErrInterrupted) || errors.Is(err, context.Canceled)
}

// interrupted tells whether work that was stopped can go on from a checkpoint.
func (j *Job) interrupted(err error) error {
	if !stopped(err) {
		return err
	}
	if j.Checkpoint == "" {
		return fmt.Errorf("%w: nothing is kept: name a --checkpoint file to go on from", err)
	}
	if _, absent := os.Stat(j.Checkpoint); absent != nil {
		return err
	}
	return step.Interrupted(err)
}

// Flags defines the flags that every training step has. seed is that of the
// random weights, batches and perturbations.
func Flags(flags *pflag.FlagSet, j *Job, epochs, cleanShare *float64) {
	flags.Uint64Var(&j.Seed, "seed", 1, "seed of everything random; the same seed gives the same digest")
	step.Float(flags, epochs, "epochs", 0, 0, MaxEpochs, "stretch or shrink the recipe to this many epochs; 0 keeps its own")
	step.Float(flags, cleanShare, "clean-share", 0, 0, 0.999, "share of each batch that stays clean in adversarial training (default: the recipe's)")
	step.Float(flags, &j.Threat.Epsilon, "epsilon", 0.3, 0, 1, "size of the attacker's perturbation, in pixels of [0,1]")
	flags.StringVar(&j.Checkpoint, "checkpoint", "", "file that keeps the training's state, and that it goes on from")
	flags.StringVar(&j.Output, "output", "", "reference to push the network to: HOST/REPOSITORY:TAG or oci:FOLDER:TAG")
}

// Adapt applies the flags --epochs and --clean-share to the job's recipe.
func (j *Job) Adapt(epochs, cleanShare float64, shareGiven bool) {
	if epochs > 0 {
		j.Recipe = j.Recipe.WithEpochs(epochs)
	}
	if shareGiven {
		j.Recipe.CleanShare = cleanShare
	}
}

// Command is the step that trains a network of the zoo, or of a YAML file.
func Command() *cobra.Command {
	var (
		j                  Job
		network            string
		epochs, cleanShare float64
	)
	cmd := &cobra.Command{
		Use:   "train [NETWORK]",
		Short: "Train a network and push it",
		Long: `Train a network from random weights and push it as an artifact: model.onnx and
training.json, which says how it was made. Prints the reference with its digest.

NETWORK, or --network, is a model of the zoo, or a YAML file like those in
models/zoo or the reference of one; it also names the data set, recipe and threat model that
the flags below can replace. With --checkpoint, SIGTERM keeps the state and
exits with code 5; the same command goes on and gives the same digest.`,
		Example: `  temper train wong --output oci:out:standard
  temper train --network paper --epochs 3 --seed 7 --output localhost:5000/mnist:standard
  temper train my-model.yaml --dataset ./digits --checkpoint wong.checkpoint --output oci:out:mine`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			given := cmd.Flags().Changed
			if len(args) == 1 {
				if given("network") && network != args[0] {
					return step.BadInput(fmt.Errorf("two networks: %s and --network %s: give one", args[0], network))
				}
				network = args[0]
			}
			model, err := artifact.Definition(cmd.Context(), network)
			if err != nil {
				return err
			}
			j.Name = model.Name
			if j.Network, err = nn.New(model.Network, j.Seed); err != nil {
				return step.BadInput(err)
			}
			if j.Dataset == "" {
				j.Dataset = model.Dataset
			}
			threat := model.Threat
			if given("epsilon") {
				threat.Epsilon = j.Threat.Epsilon
			}
			j.Threat = threat
			if j.RecipeName == "" {
				j.RecipeName, j.Recipe = model.Name, model.Train
			} else if j.Recipe, err = zoo.LoadRecipe(j.RecipeName); err != nil {
				return step.BadInput(err)
			}
			j.Adapt(epochs, cleanShare, given("clean-share"))
			return j.Run(cmd.Context(), step.From(cmd))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&network, "network", "wong", "model of the zoo, or a YAML file or the reference of one")
	flags.StringVar(&j.Dataset, "dataset", "", "mnist, a folder of IDX files, of images or of CIFAR-10, URL#sha256:..., or a reference (default: the model's)")
	flags.StringVar(&j.RecipeName, "recipe", "", "recipe of the zoo, or the path of a YAML file (default: the model's)")
	Flags(flags, &j, &epochs, &cleanShare)
	epsilon := flags.Lookup("epsilon")
	epsilon.DefValue, epsilon.Usage = "", epsilon.Usage+" (default: the model's)"
	cmd.MarkFlagRequired("output")
	return cmd
}
