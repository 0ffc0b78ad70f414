package sentinel

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
)

// judge is the step that measures a detector.
func judge() *cobra.Command {
	var (
		model, detector, data string
		attacks               []string
		epsilons              []string
		samples, adaptive     int
		requests              int
		seed                  uint64
	)
	cmd := &cobra.Command{
		Use:   "evaluate --model REF",
		Short: "Measure a model's detector: on clean images, benign changes, attacks, and attacks that know it",
		Long: `Measure the detector of a model on the first samples of the data set's test
split: clean, changed benignly (noise, rotation, brightness), attacked without
knowledge of the detector, and attacked by PGD that minimises the detector's
score too ("adaptive"). Of each: the share that fools the model, the area under
the ROC curve of the score against clean images, the share detected where 5% of
clean images would be, the share flagged at the detector's own threshold, the
share that is unlike the usual without being flagged (drift), and how many
requests the alarm takes when such traffic comes in among clean requests.`,
		Example: `  temper sentinel evaluate --model oci:out:mnist
  temper sentinel evaluate --model oci:out:mnist --attack fgsm --attack pgd-50 --epsilon 0.3 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, st := cmd.Context(), step.From(cmd)
			served, err := artifact.ReadModel(ctx, model)
			if err != nil {
				return err
			}
			if detector == "" {
				if detector, err = DetectorAt(ctx, served.Reference); err != nil {
					return err
				}
			}
			d, err := readDetector(ctx, detector)
			if err != nil {
				return err
			}
			splits, err := artifact.OpenDataset(ctx, data)
			if err != nil {
				return err
			}
			test := splits.Test.Slice(0, min(samples, splits.Test.Len()))
			if test.Shape != served.Network.Input {
				return step.BadInput(fmt.Errorf("dataset %s has images of %v, the model takes %v", data, test.Shape, served.Network.Input))
			}
			e := detect.Evaluation{Attacks: attacks, Adaptive: adaptive, Seed: seed, Requests: requests, Progress: st.Progress}
			for _, text := range epsilons {
				var epsilon float64
				if _, err := fmt.Sscan(text, &epsilon); err != nil || !(epsilon > 0 && epsilon <= 1) {
					return step.BadInput(fmt.Errorf("--epsilon %q: must be above 0 and at most 1", text))
				}
				e.Epsilons = append(e.Epsilons, epsilon)
			}
			attacked, err := graph.NewAttack(served.Network, attackBatch)
			if err != nil {
				return err
			}
			guard, err := graph.NewAttack(d.Guard, attackBatch)
			if err != nil {
				return err
			}
			x := make([]float32, test.Len()*test.Shape.Size())
			test.Read(x, 0, test.Len())
			figures, err := d.Evaluate(ctx, attacked, guard, x, test.Labels, e)
			if err != nil {
				return step.BadInput(err)
			}
			var b strings.Builder
			fmt.Fprintf(&b, "%-16s %8s %8s %8s %10s %9s %9s  %s\n", "traffic", "epsilon", "fooled", "AUROC", "at 5% FPR", "flagged", "shifted", "alarms (requests, by the median; attacks of 100, 30, 10%)")
			for _, f := range figures {
				epsilon := ""
				if f.Epsilon > 0 {
					epsilon = fmt.Sprint(f.Epsilon)
				}
				alarms := ""
				switch s := f.Simulated; {
				case s == nil:
				case s.Delays != nil:
					alarms = fmt.Sprintf("attack after %d, %d, %d", s.Delays[100].Median, s.Delays[30].Median, s.Delays[10].Median)
				case s.Drift != nil:
					alarms = fmt.Sprintf("drift after %d; %d attacks in %d", s.Drift.Median, s.FalseAlarms, s.Requests)
				default:
					alarms = fmt.Sprintf("%d drifts, %d attacks in %d", s.DriftAlarms, s.FalseAlarms, s.Requests)
				}
				fmt.Fprintf(&b, "%-16s %8s %7.1f%% %8.4f %9.1f%% %8.1f%% %8.1f%%  %s\n", f.Traffic, epsilon, 100*f.Fooled, f.AUROC, 100*f.AtFive, 100*f.Flagged, 100*f.Shifted, alarms)
			}
			return st.Print(b.String(), struct {
				Model    string          `json:"model"`
				Detector string          `json:"detector"`
				Figures  []detect.Figure `json:"figures"`
			}{served.Reference, detector, figures})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&model, "model", "", "the model: a reference")
	flags.StringVar(&detector, "detector", "", "reference of its detector; by default the tag sha256-HEX.detector beside the model")
	flags.StringVar(&data, "dataset", "mnist", "mnist, a folder of IDX files, of images or of CIFAR-10, URL#sha256:..., or a reference")
	flags.StringArrayVar(&attacks, "attack", []string{"fgsm", "pgd-20", "apgd-ce"}, "attack, once for each")
	flags.StringArrayVar(&epsilons, "epsilon", []string{"0.1", "0.15", "0.3"}, "epsilon, once for each")
	step.Int(flags, &samples, "samples", 1000, 100, 10_000, "test images")
	step.Int(flags, &adaptive, "adaptive", 40, 0, 1000, "steps of the attack that knows the detector; 0 leaves it out")
	step.Int(flags, &requests, "requests", 1_000_000, 0, 100_000_000, "requests without an attack that the alarms are simulated on, for each kind; 0 leaves simulations out")
	flags.Uint64Var(&seed, "seed", 1, "seed of everything random")
	cmd.MarkFlagRequired("model")
	return cmd
}
