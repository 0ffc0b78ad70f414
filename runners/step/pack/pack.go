// Package pack is the step that makes a model and its report ready for
// registries and servers.
package pack

import (
	"bytes"
	"context"
	"fmt"
	"text/template"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/report"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/signing"
)

// Result is what the step prints.
type Result struct {
	Reference         string `json:"reference"` // of the ModelPack
	Digest            string `json:"digest"`
	ModelcarReference string `json:"modelcar_reference"`
	ModelcarDigest    string `json:"modelcar_digest"`
	ModelDigest       string `json:"model_digest"` // of model.onnx
}

// Job is one packing.
type Job struct {
	Model, Report, Output string // references or files; Output is a reference
	Name, Version         string
	Source, Revision      string
}

// Run packs and says what it made.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	m, err := artifact.ReadModel(ctx, j.Model)
	if err != nil {
		return err
	}
	r, err := artifact.ReadReport(ctx, j.Report)
	if err != nil {
		return err
	}
	build := &signing.Build{
		Name: j.Name, Version: j.Version, Source: j.Source, Revision: j.Revision,
		Description: fmt.Sprintf("Classifier of %s, hardened against perturbations of %v", r.Dataset, r.Threat.Epsilon),
		Model:       m.ONNX, Report: r.JSON,
	}
	if build.Name == "" {
		build.Name = m.Network.Name
	}
	if m.Training != nil {
		if build.Training, err = m.Training.Encode(); err != nil {
			return err
		}
	}
	if build.Card, err = Card(build.Name, r.Report, m.Training); err != nil {
		return err
	}
	if _, err := build.ModelPack(); err != nil { // the model and report do not go together
		return step.BadInput(err)
	}
	packed, err := signing.Pack(ctx, j.Output, build)
	if err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	result := Result{
		Reference: packed.ModelPack, Digest: artifact.DigestOf(packed.ModelPack),
		ModelcarReference: packed.Modelcar, ModelcarDigest: artifact.DigestOf(packed.Modelcar),
		ModelDigest: m.Digest,
	}
	s.Log.Info("packed", "modelpack", result.Reference, "modelcar", result.ModelcarReference)
	err = s.Results(map[string]string{
		"reference": result.Reference, "digest": result.Digest,
		"modelcar_reference": result.ModelcarReference, "modelcar_digest": result.ModelcarDigest,
		// By these names Tekton Chains finds what it is to attest to.
		"MODELPACK_IMAGE_URL": result.Reference, "MODELPACK_IMAGE_DIGEST": result.Digest,
		"MODELCAR_IMAGE_URL": result.ModelcarReference, "MODELCAR_IMAGE_DIGEST": result.ModelcarDigest,
	})
	if err != nil {
		return err
	}
	return s.Print(result.Reference+"\n"+result.ModelcarReference, result)
}

var card = template.Must(template.New("card").Funcs(template.FuncMap{"percent": report.Percent}).Parse(`# {{.Name}}

Image classifier: {{.Report.Shape}} pixels, {{len .Report.Classes}} classes, network {{.Report.Network}}.

| Measured on the first {{.Report.Samples}} test images of {{.Report.Dataset}} | Accuracy | At least ({{percent .Report.Confidence}} confidence) |
|---|---|---|
| clean | {{percent .Report.CleanAccuracy}} | {{percent .Report.CleanAccuracyLowerBound}} |
{{- range .Report.Attacks}}
| {{.Name}} | {{percent .Accuracy}} | {{percent .AccuracyLowerBound}} |
{{- end}}
| worst case | {{percent .Report.RobustAccuracy}} | {{percent .Report.RobustAccuracyLowerBound}} |

The attacker knows the weights and may change every pixel of [0,1] by up to
{{.Report.Threat.Epsilon}} ({{.Report.Threat.Norm}}). Against a stronger attacker these figures say nothing.

- data set: {{.Report.DatasetDigest}}
- model.onnx: {{.Report.ModelDigest}}
{{- with .Training}}
- recipe: {{.RecipeName}}, seed {{.Seed}}
- trained on: {{.Dataset}}, {{.DatasetDigest}}
{{- with .BaseDigest}}
- started from the weights of: {{.}}
{{- end}}
{{- end}}
`))

// Card is the model card in Markdown; training may be nil.
func Card(name string, r *evaluate.Report, training *artifact.Training) ([]byte, error) {
	var b bytes.Buffer
	err := card.Execute(&b, struct {
		Name     string
		Report   *evaluate.Report
		Training *artifact.Training
	}{name, r, training})
	if err != nil {
		return nil, fmt.Errorf("model card: %w", err)
	}
	return b.Bytes(), nil
}

// Command is the step.
func Command() *cobra.Command {
	var j Job
	cmd := &cobra.Command{
		Use:   "pack --model REF --report REF --output REF",
		Short: "Pack a model and its report for registries and servers",
		Long: `Pack a model, its evaluation report and a model card twice from one build: as a
CNCF ModelPack artifact under the output's tag, and as a modelcar image, for
servers such as KServe, under TAG-modelcar. The same inputs give the same
digests. Prints the references of both, with digests, one a line.`,
		Example: `  temper pack --model oci:out:robust --report oci:out:report --output oci:out:model
  temper pack --model model.onnx --report report.json --name mnist-wong --version 1.2.0 --output localhost:5000/mnist:1.2.0`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return j.Run(cmd.Context(), step.From(cmd)) },
	}
	flags := cmd.Flags()
	flags.StringVar(&j.Model, "model", "", "the model: a reference, or an ONNX file")
	flags.StringVar(&j.Report, "report", "", "its evaluation report: a reference, or a JSON file")
	flags.StringVar(&j.Name, "name", "", "name of the model (default: the network's)")
	flags.StringVar(&j.Version, "version", "", "version of the model")
	flags.StringVar(&j.Source, "source", "", "URL of the source that the model was made from")
	flags.StringVar(&j.Revision, "revision", "", "revision of the source")
	flags.StringVar(&j.Output, "output", "", "reference to push to: HOST/REPOSITORY:TAG or oci:FOLDER:TAG")
	for _, name := range []string{"model", "report", "output"} {
		cmd.MarkFlagRequired(name)
	}
	return cmd
}
