// Temper is the command line: the same steps that the runner images hold, in
// one program.
package main

import (
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/attack"
	"github.com/temper-ml/temper/runners/step/bench"
	"github.com/temper-ml/temper/runners/step/bundle"
	"github.com/temper-ml/temper/runners/step/check"
	"github.com/temper-ml/temper/runners/step/choose"
	"github.com/temper-ml/temper/runners/step/demo"
	"github.com/temper-ml/temper/runners/step/evaluate"
	"github.com/temper-ml/temper/runners/step/fetch"
	"github.com/temper-ml/temper/runners/step/images"
	"github.com/temper-ml/temper/runners/step/keygen"
	"github.com/temper-ml/temper/runners/step/pack"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/runners/step/registry"
	"github.com/temper-ml/temper/runners/step/retrain"
	"github.com/temper-ml/temper/runners/step/revoke"
	"github.com/temper-ml/temper/runners/step/sentinel"
	"github.com/temper-ml/temper/runners/step/serve"
	"github.com/temper-ml/temper/runners/step/sign"
	"github.com/temper-ml/temper/runners/step/submit"
	"github.com/temper-ml/temper/runners/step/summary"
	"github.com/temper-ml/temper/runners/step/sweep"
	"github.com/temper-ml/temper/runners/step/top"
	"github.com/temper-ml/temper/runners/step/train"
	"github.com/temper-ml/temper/runners/step/verify"
)

func main() { step.Main(command()) }

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "temper",
		Short: "Harden image classifiers against adversarial attacks",
		Long: `Temper hardens image classifiers: it notices an adversarial attack on a served
model, retrains the model on the attack, proves that the new model is robust,
signs it, and puts it into service.

Each command reads artifacts from an OCI registry or an OCI layout folder
(oci:FOLDER) and prints the reference, with its digest, of what it made.`,
		Example: `  temper demo

  S=$(temper train wong --output oci:out:standard)
  R=$(temper retrain --model $S --output oci:out:robust)
  temper evaluate --model $R --policy wong`,
		Version: version(),
	}
	root.AddCommand(
		demo.Command(),
		fetch.Command(), check.Command(), train.Command(), attack.Command(), evaluate.Command(), retrain.Command(), sweep.Command(), choose.Command(),
		pack.Command(), keygen.Command(), sign.Command(), verify.Command(), promote.Command(), revoke.Command(), bundle.Command(),
		submit.Command(), summary.Command(), serve.Command(), sentinel.Command(), top.Command(), registry.Command(), bench.Command(), images.Command(),
	)
	return root
}

// version is the module's version or the commit that the program was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}
