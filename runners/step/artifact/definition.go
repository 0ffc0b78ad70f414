package artifact

import (
	"context"
	"fmt"

	"github.com/temper-ml/temper/models/strictyaml"
	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/signing/store"
)

// DefinitionType is the type of a model's definition as an artifact: its YAML,
// for steps that run where the file is not.
const DefinitionType = "application/vnd.temper.definition.v1"

// DefinitionFile is the file in it.
const DefinitionFile = "model.yaml"

// Definition reads what a model is to be: one of the zoo by name, a YAML file,
// or the reference of an artifact that holds one.
func Definition(ctx context.Context, ref string) (*zoo.Model, error) {
	if !isReference(ref) {
		m, err := zoo.Load(ref)
		return m, step.BadInput(err)
	}
	a, at, err := pull(ctx, "definition", ref, "a YAML file", store.Want{Type: DefinitionType, Bytes: strictyaml.MaxBytes})
	if err != nil {
		return nil, err
	}
	data, err := a.File(DefinitionFile)
	if err != nil {
		return nil, step.BadInput(fmt.Errorf("definition %s: %w", at, err))
	}
	m, err := zoo.Parse(data)
	if err != nil {
		return nil, step.BadInput(fmt.Errorf("definition %s: %w", at, err))
	}
	return m, nil
}

// PushDefinition writes a definition's YAML file to ref, and returns the
// reference with the artifact's digest, and the digest.
func PushDefinition(ctx context.Context, ref, path string) (reference, digest string, err error) {
	data, err := readFile(path, strictyaml.MaxBytes)
	if err != nil {
		return "", "", step.BadInput(fmt.Errorf("definition: %w", err))
	}
	if _, err := zoo.Parse(data); err != nil {
		return "", "", step.BadInput(fmt.Errorf("definition %s: %w", path, err))
	}
	return push(ctx, ref, &store.Artifact{
		Type:  DefinitionType,
		Files: []store.File{{Name: DefinitionFile, MediaType: "application/yaml", Data: data}},
	})
}
