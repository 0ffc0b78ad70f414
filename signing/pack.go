// Package signing packs a model for registries: as a CNCF ModelPack artifact,
// and as a modelcar image for servers such as KServe that cannot load one yet.
// Its subpackages keep (store), sign (sign), state (statement), verify
// (verify) and promote (channel) what it packs.
package signing

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/modelpack/model-spec/schema"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"

	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
)

// Files of a packed model.
const (
	ModelFile    = statement.ModelFile // weights and network
	TrainingFile = "training.json"     // how the network was trained
	ZooFile      = "model.yaml"        // what asked for it: an entry of models/zoo
	CardFile     = "README.md"
	ReportFile   = "report.json"
)

// Annotations of both artifacts; accuracies are fractions from 0 to 1. They
// are for people: programs read the signed statements.
const (
	prefix                  = "io.github.temper-ml."
	AnnotationCleanAccuracy = prefix + "clean-accuracy"
	AnnotationRobust        = prefix + "robust-accuracy"
	AnnotationRobustBound   = prefix + "robust-accuracy-lower-bound"
	AnnotationThreat        = prefix + "threat"
	AnnotationDataset       = prefix + "dataset-digest"
	// AnnotationModelPack, on the modelcar, is the digest of the ModelPack of
	// the same build. The modelcar is also its referrer.
	AnnotationModelPack = prefix + "modelpack-digest"
)

// Build is all that goes into a model's artifacts. Equal builds give equal
// digests.
type Build struct {
	Name        string // of the model, such as mnist-wong
	Version     string // optional, as are the next three
	Description string
	Source      string // URL of the source code
	Revision    string // of the source code
	Licenses    []string

	Model    []byte // ONNX; refused unless it loads and its weights pass nn's check
	Report   []byte // JSON of an evaluate.Report about this model
	Card     []byte // Markdown
	Training []byte // JSON, optional
	Zoo      []byte // YAML, optional
}

// Packed are the references, by digest, of what Pack wrote.
type Packed struct {
	ModelPack string
	Modelcar  string
}

// ModelcarSuffix is added to the tag of a ModelPack for its modelcar.
const ModelcarSuffix = "-modelcar"

// Pack writes both artifacts of a build to ref's repository: the ModelPack
// under ref's tag, and the modelcar under TAG-modelcar.
func Pack(ctx context.Context, ref string, b *Build) (*Packed, error) {
	model, err := b.ModelPack()
	if err != nil {
		return nil, err
	}
	_, digest, err := model.Manifest(nil)
	if err != nil {
		return nil, err
	}
	car, err := b.Modelcar(digest)
	if err != nil {
		return nil, err
	}
	r, err := store.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	carTag := ""
	if r.Tag() != "" {
		carTag = r.Tag() + ModelcarSuffix
	}
	carAt, err := r.At(carTag)
	if err != nil {
		return nil, err
	}
	// The modelcar refers to the ModelPack, so that comes first; its tag comes
	// last: whoever sees it finds both.
	untagged, err := r.At("")
	if err != nil {
		return nil, err
	}
	if _, err := untagged.Push(ctx, model); err != nil {
		return nil, err
	}
	carDigest, err := carAt.Push(ctx, car)
	if err != nil {
		return nil, err
	}
	if _, err := r.Push(ctx, model); err != nil {
		return nil, err
	}
	modelRef, err := r.At(digest)
	if err != nil {
		return nil, err
	}
	carRef, err := r.At(carDigest)
	if err != nil {
		return nil, err
	}
	return &Packed{ModelPack: modelRef.String(), Modelcar: carRef.String()}, nil
}

// read checks the model and the report of a build.
func (b *Build) read() (*nn.Network, *evaluate.Report, error) {
	if b.Name == "" || len(b.Card) == 0 {
		return nil, nil, errors.New("pack: a model needs a name and a card")
	}
	net, _, err := onnx.Unmarshal(b.Model)
	if err != nil {
		return nil, nil, fmt.Errorf("pack: %w", err)
	}
	report, err := evaluate.Decode(b.Report)
	if err != nil {
		return nil, nil, fmt.Errorf("pack: %w", err)
	}
	if digest := digestOf(b.Model); report.ModelDigest != digest {
		return nil, nil, fmt.Errorf("pack: the report is about model %s, and this one is %s: evaluate it", report.ModelDigest, digest)
	}
	if b.Training != nil && !json.Valid(b.Training) {
		return nil, nil, errors.New("pack: the training record is not JSON")
	}
	return net, report, nil
}

// Robustness is the predicate of a build's figures. The base is the digest of
// the model whose weights training started from, or "".
func (b *Build) Robustness(base, recipe string, seed uint64) (*statement.Robustness, error) {
	_, report, err := b.read()
	if err != nil {
		return nil, err
	}
	r := &statement.Robustness{
		ModelDigest:     digestOf(b.Model),
		BaseModelDigest: base,
		Network:         report.Network,
		Dataset:         report.Dataset,
		DatasetDigest:   report.DatasetDigest,
		ReportDigest:    digestOf(b.Report),
		Recipe:          recipe,
		Seed:            seed,
		Threat:          statement.Threat{Norm: report.Threat.Norm, Epsilon: report.Threat.Epsilon},
		Preprocessing:   report.Preprocessing,
		Suite:           report.Suite,
		Samples:         report.Samples,
		Confidence:      report.Confidence,
		Clean:           statement.Accuracy{Correct: report.CleanCorrect, Accuracy: report.CleanAccuracy, LowerBound: report.CleanAccuracyLowerBound},
		Robust:          statement.Accuracy{Correct: report.RobustCorrect, Accuracy: report.RobustAccuracy, LowerBound: report.RobustAccuracyLowerBound},
	}
	for _, a := range report.Attacks {
		name := a.Name
		if a.MadeOn != "" {
			name += " made on " + a.MadeOn
		}
		r.Attacks = append(r.Attacks, statement.Attack{Name: name, Accuracy: statement.Accuracy{Correct: a.Correct, Accuracy: a.Accuracy, LowerBound: a.AccuracyLowerBound}})
	}
	if c := report.Certified; c != nil {
		r.Certified = &statement.Accuracy{Correct: c.CertifiedCorrect, Accuracy: c.CertifiedAccuracy, LowerBound: c.CertifiedAccuracyLowerBound}
	}
	for _, c := range report.Checks {
		r.Checks = append(r.Checks, statement.Check{Name: c.Name, Pass: c.Pass, Rule: c.Rule, Figures: c.Figures})
	}
	return r, r.Validate()
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// ModelPack is the build as a CNCF ModelPack artifact (model-spec v0.0.7):
// every file a raw layer, so that there is nothing to unpack.
func (b *Build) ModelPack() (*store.Artifact, error) {
	net, report, err := b.read()
	if err != nil {
		return nil, err
	}
	a := &store.Artifact{Type: modelspec.ArtifactTypeModelManifest, Annotations: b.annotations(report)}
	config := modelspec.Model{
		Descriptor: modelspec.ModelDescriptor{
			Name:        b.Name,
			Version:     b.Version,
			Description: b.Description,
			SourceURL:   b.Source,
			Revision:    b.Revision,
			Licenses:    b.Licenses,
		},
		ModelFS: modelspec.ModelFS{Type: "layers"},
		Config: modelspec.ModelConfig{
			Architecture: "cnn",
			Format:       "onnx",
			ParamSize:    strconv.Itoa(len(net.Flat())),
			Precision:    "fp32",
			Capabilities: &modelspec.ModelCapabilities{
				InputTypes:  []modelspec.Modality{modelspec.ImageModality},
				OutputTypes: []modelspec.Modality{modelspec.OtherModality},
			},
		},
	}
	for _, f := range b.files() {
		metadata, err := json.Marshal(modelspec.FileMetadata{
			Name: f.name, Mode: fileMode, Size: int64(len(f.data)), ModTime: epoch, Typeflag: '0',
		})
		if err != nil {
			return nil, err
		}
		a.Files = append(a.Files, store.File{
			Name:      f.name,
			MediaType: f.mediaType,
			Data:      f.data,
			Annotations: map[string]string{
				modelspec.AnnotationFilepath:          f.name,
				modelspec.AnnotationFileMetadata:      string(metadata),
				modelspec.AnnotationMediaTypeUntested: "false",
			},
		})
		config.ModelFS.DiffIDs = append(config.ModelFS.DiffIDs, digest.FromBytes(f.data))
	}
	data, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	if err := schema.ValidatorMediaTypeModelConfig.Validate(bytes.NewReader(data)); err != nil {
		return nil, fmt.Errorf("pack: ModelPack config: %w", err)
	}
	a.Config = &store.Config{MediaType: modelspec.MediaTypeModelConfig, Data: data}
	return a, nil
}

type file struct {
	name      string
	mediaType string
	data      []byte
}

// files of a build, those that it has, in the order of their layers.
func (b *Build) files() []file {
	var list []file
	for _, f := range []file{
		{ModelFile, modelspec.MediaTypeModelWeightRaw, b.Model},
		{TrainingFile, modelspec.MediaTypeModelWeightConfigRaw, b.Training},
		{ZooFile, modelspec.MediaTypeModelWeightConfigRaw, b.Zoo},
		{CardFile, modelspec.MediaTypeModelDocRaw, b.Card},
		{ReportFile, modelspec.MediaTypeModelDocRaw, b.Report},
	} {
		if f.data != nil {
			list = append(list, f)
		}
	}
	return list
}

// epoch is the time of every file, so that the same build gives the same
// bytes.
var epoch = time.Unix(0, 0).UTC()

const fileMode = 0o644

func (b *Build) annotations(r *evaluate.Report) map[string]string {
	number := func(v float64) string { return strconv.FormatFloat(v, 'f', 4, 64) }
	list := map[string]string{
		AnnotationCleanAccuracy: number(r.CleanAccuracy),
		AnnotationRobust:        number(r.RobustAccuracy),
		AnnotationRobustBound:   number(r.RobustAccuracyLowerBound),
		AnnotationThreat:        r.Threat.Norm + " " + strconv.FormatFloat(r.Threat.Epsilon, 'g', -1, 64),
		AnnotationDataset:       r.DatasetDigest,
	}
	for key, value := range map[string]string{
		"org.opencontainers.image.title":       b.Name,
		"org.opencontainers.image.version":     b.Version,
		"org.opencontainers.image.description": b.Description,
		"org.opencontainers.image.source":      b.Source,
		"org.opencontainers.image.revision":    b.Revision,
	} {
		if value != "" {
			list[key] = value
		}
	}
	return list
}
