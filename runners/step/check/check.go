// Package check is the step that decides whether a model's definition can be
// used, before hours are spent on it.
package check

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/models/recipe"
	"github.com/temper-ml/temper/models/train"
	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
)

const (
	// trialSteps of training are enough to see the loss fall, and cost seconds.
	trialSteps = 30
	// compared images show whether a network that was written and read again
	// is the same.
	compared = 16
	// tolerance of their outputs: the file holds the very same weights.
	tolerance = 1e-5
)

// Result is what the step prints.
type Result struct {
	Path      string  `json:"path"`
	Name      string  `json:"name"`
	Dataset   string  `json:"dataset"`
	Epsilon   float64 `json:"epsilon"`
	Reference string  `json:"reference,omitempty"` // of the definition, with --output
	Digest    string  `json:"digest,omitempty"`
}

// Definition reads a model's YAML file strictly and tries it out: the data set
// fits the network, a few steps of both recipes lower the loss, and the
// network is the same after it was written as ONNX and read again.
func Definition(ctx context.Context, file string, log *slog.Logger) (*zoo.Model, error) {
	m, err := artifact.Definition(ctx, file)
	if err != nil {
		return nil, err
	}
	splits, err := artifact.OpenDataset(ctx, m.Dataset)
	if err != nil {
		return nil, err
	}
	if splits.Train.Len() == 0 {
		return nil, step.BadInput(fmt.Errorf("dataset %s has no training images", splits.Name))
	}
	if splits.Train.Shape != m.Network.Input {
		return nil, step.BadInput(fmt.Errorf("the network takes images of %v, dataset %s has %v", m.Network.Input, splits.Name, splits.Train.Shape))
	}
	net, err := nn.New(m.Network, 1)
	if err != nil {
		return nil, step.BadInput(err)
	}
	for _, r := range []struct {
		name   string
		recipe recipe.Recipe
	}{{"train", m.Train}, {"retrain", m.Retrain}} {
		trial := r.recipe.WithEpochs(trialSteps * float64(r.recipe.Batch) / float64(splits.Train.Len()))
		result, err := train.Run(ctx, net, splits.Train, splits.Validation, trial, m.Threat, 1, train.Options{})
		if err != nil {
			if errors.Is(err, context.Canceled) || errors.Is(err, train.ErrInterrupted) {
				return nil, err
			}
			return nil, step.BadInput(fmt.Errorf("recipe %s: %w", r.name, err))
		}
		log.Info("tried", "recipe", r.name, "steps", result.Steps, "loss", result.Loss)
	}
	return m, roundTrip(net, splits.Train)
}

// roundTrip compares the outputs of a network with those of its ONNX file.
func roundTrip(net *nn.Network, images *dataset.Set) error {
	data, err := onnx.Marshal(net, nil)
	if err != nil {
		return err
	}
	again, _, err := onnx.Unmarshal(data)
	if err != nil {
		return step.BadInput(fmt.Errorf("the network as ONNX: %w", err))
	}
	n := min(compared, images.Len())
	x := make([]float32, n*images.Shape.Size())
	images.Read(x, 0, n)
	logits := func(net *nn.Network) ([]float32, error) {
		f, err := nn.NewForward(net, n)
		if err != nil {
			return nil, err
		}
		return f.Logits(x, n), nil
	}
	a, err := logits(net)
	if err != nil {
		return err
	}
	b, err := logits(again)
	if err != nil {
		return err
	}
	for i := range a {
		if d := math.Abs(float64(a[i] - b[i])); !(d <= tolerance) {
			return step.BadInput(fmt.Errorf("the network as ONNX gives another answer: output %d is %v, and was %v", i, b[i], a[i]))
		}
	}
	return nil
}

// Select says which file of a source tree to check: file where it is given,
// else the one definition among the changed files below models/, else
// fallback. A commit that changes two models has to be told apart by file.
func Select(root, file, fallback string, changed []string) (string, error) {
	if file == "" {
		var found []string
		for _, c := range changed {
			// Recipes and test data are no definitions; a file that was removed
			// is not there to be checked.
			if ext := path.Ext(c); path.Dir(c) != "models" && path.Dir(c) != "models/zoo" || ext != ".yaml" && ext != ".yml" {
				continue
			}
			if r, err := os.OpenRoot(root); err == nil {
				if _, err := r.Lstat(c); err == nil && !slices.Contains(found, c) {
					found = append(found, c)
				}
				r.Close()
			}
		}
		switch len(found) {
		case 0:
			file = fallback
		case 1:
			file = found[0]
		default:
			return "", fmt.Errorf("%d models changed, %s: name one with --file", len(found), strings.Join(found, ", "))
		}
	}
	if !filepath.IsLocal(file) {
		return "", fmt.Errorf("file %q: must be a path inside the source", file)
	}
	r, err := os.OpenRoot(root)
	if err != nil {
		return "", fmt.Errorf("source: %w", err)
	}
	defer r.Close()
	f, err := r.Open(file) // refuses a link that leads out of the source
	if err != nil {
		return "", fmt.Errorf("source: %w", err)
	}
	f.Close()
	return filepath.Join(root, file), nil
}

// Command is the step.
func Command() *cobra.Command {
	var (
		source, file, fallback, output string
		changed                        []string
	)
	cmd := &cobra.Command{
		Use:   "check [--source FOLDER] --file MODEL.yaml",
		Short: "Check a model's definition, and push it",
		Long: `Read a model's YAML file strictly and try it out: the data set fits the network,
a few steps of both recipes work, and the network survives being written as ONNX.
With --changed the file is found among those that a commit changed. With --output
the definition is pushed as an artifact, which train, retrain, evaluate, sign,
verify and promote take by reference. Prints its reference, or the file's path.`,
		Example: `  temper check --file models/zoo/wong.yaml
  temper check --source src --changed README.md,models/mine.yaml --output localhost:5000/mine:definition`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, s := cmd.Context(), step.From(cmd)
			name, err := Select(source, file, fallback, changed)
			if err != nil {
				return step.BadInput(err)
			}
			m, err := Definition(ctx, name, s.Log)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			r := Result{Path: name, Name: m.Name, Dataset: m.Dataset, Epsilon: m.Threat.Epsilon}
			results := map[string]string{"path": r.Path, "name": r.Name, "dataset": r.Dataset, "epsilon": strconv.FormatFloat(r.Epsilon, 'g', -1, 64)}
			text := r.Path
			if output != "" {
				if r.Reference, r.Digest, err = artifact.PushDefinition(ctx, output, name); err != nil {
					return err
				}
				text, results["reference"], results["digest"] = r.Reference, r.Reference, r.Digest
			}
			s.Log.Info("checked", "model", r.Name, "file", r.Path, "reference", r.Reference)
			if err := s.Results(results); err != nil {
				return err
			}
			return s.Print(text, r)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&source, "source", ".", "folder of the source tree")
	flags.StringVar(&file, "file", "", "the definition, inside the source (default: the one among --changed)")
	flags.StringSliceVar(&changed, "changed", nil, "files that a commit changed")
	flags.StringVar(&fallback, "fallback", "models/zoo/wong.yaml", "the definition where no changed file is one")
	flags.StringVar(&output, "output", "", "reference to push the definition to: HOST/REPOSITORY:TAG or oci:FOLDER:TAG")
	return cmd
}
