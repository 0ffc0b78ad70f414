// Package retrain is the step that hardens a model: adversarial training from
// the attacked model's weights.
package retrain

import (
	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/train"
)

// Command is the step.
func Command() *cobra.Command {
	var (
		j                  train.Job
		model, network     string
		epochs, cleanShare float64
		normalise          artifact.Normalisation
	)
	cmd := &cobra.Command{
		Use:   "retrain --model REF --output REF",
		Short: "Train an attacked model on the attack and push the result",
		Long: `Go on training a model, on adversarial examples made from its own weights at
each step, and push the result as an artifact. Prints the reference with its
digest. With --checkpoint, SIGTERM keeps the state and exits with code 5; the
same command goes on and gives the same digest.`,
		Example: `  temper retrain --model oci:out:standard --output oci:out:robust
  temper retrain --model localhost:5000/mnist@sha256:... --recipe paper --epochs 3 --epsilon 0.15 --output localhost:5000/mnist:robust
  temper retrain --model model.onnx --recipe fast --clean-share 0.3 --output oci:out:robust
  temper retrain --model mine.onnx --mean 0.1307 --std 0.3081 --dataset ./digits --epsilon 0.1 --output oci:out:robust`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			given := cmd.Flags().Changed
			definition, err := &zoo.Model{}, error(nil)
			j.Threat.Norm = "linf"
			if network != "" {
				if definition, err = artifact.Definition(cmd.Context(), network); err != nil {
					return err
				}
				j.Threat.Norm = definition.Threat.Norm // another is refused
				if !given("dataset") {
					j.Dataset = definition.Dataset
				}
				if !given("epsilon") {
					j.Threat.Epsilon = definition.Threat.Epsilon
				}
			}
			if network != "" && (!given("recipe") || j.RecipeName == "") {
				j.RecipeName, j.Recipe = definition.Name, definition.Retrain
			} else if j.Recipe, err = zoo.LoadRecipe(j.RecipeName); err != nil {
				return step.BadInput(err)
			}
			j.Adapt(epochs, cleanShare, given("clean-share"))
			base, err := artifact.ReadModel(cmd.Context(), normalise.Of(model))
			if err != nil {
				return err
			}
			j.Name, j.Network, j.BaseDigest = base.Network.Name, base.Network, base.Digest
			if base.Training != nil {
				j.Name = base.Training.Network
			}
			return j.Run(cmd.Context(), step.From(cmd))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&model, "model", "", "the attacked model: a reference, or an ONNX file")
	flags.StringVar(&network, "network", "", "model of the zoo, or a YAML file or the reference of one, that gives recipe, data set and epsilon where their flags do not")
	flags.StringVar(&j.Dataset, "dataset", "mnist", "mnist, a folder of IDX files, of images or of CIFAR-10, URL#sha256:..., or a reference")
	flags.StringVar(&j.RecipeName, "recipe", "fast", "recipe of the zoo, or the path of a YAML file")
	normalise.Flags(flags)
	train.Flags(flags, &j, &epochs, &cleanShare)
	cmd.MarkFlagRequired("model")
	cmd.MarkFlagRequired("output")
	return cmd
}
