// Package artifact reads and writes what steps pass on to one another: models,
// data sets and reports, each an OCI artifact named by digest.
package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/models/recipe"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/serve/selftest"
	"github.com/temper-ml/temper/signing"
	"github.com/temper-ml/temper/signing/store"
)

// Types of the artifacts that steps exchange.
const (
	NetworkType = "application/vnd.temper.network.v1"
	DatasetType = "application/vnd.temper.dataset.v1"
	ReportType  = "application/vnd.temper.report.v1"
	PartType    = "application/vnd.temper.report.part.v1"
)

// Names of the files in them.
const (
	ModelFile    = signing.ModelFile
	TrainingFile = signing.TrainingFile
	ReportFile   = signing.ReportFile
	PageFile     = "report.html"
	PartFile     = "part.json"
)

// maxTraining is far above any recipe.
const maxTraining = 1 << 20

// Training says how a network came to be. The same Training by the same
// program gives the same network.
type Training struct {
	Network       string        `json:"network"`
	Dataset       string        `json:"dataset"`
	DatasetDigest string        `json:"dataset_digest"` // of all its splits
	RecipeName    string        `json:"recipe_name"`
	Recipe        recipe.Recipe `json:"recipe"`
	Threat        attack.Threat `json:"threat"`
	Seed          uint64        `json:"seed"`
	BaseDigest    string        `json:"base_digest,omitempty"` // Model.Digest of the model whose weights it started from
}

// Encode writes the record as JSON; equal records give equal bytes.
func (t *Training) Encode() ([]byte, error) {
	data, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", TrainingFile, err)
	}
	return append(data, '\n'), nil
}

// Model is a network that was read from an artifact or a file.
type Model struct {
	Network   *nn.Network
	ONNX      []byte
	Digest    string    // of ONNX: the same in a network artifact, a ModelPack and a file
	Reference string    // of the artifact, with its digest; the path of a file
	Manifest  string    // digest of the artifact; "" for a file
	Training  *Training // nil where the artifact does not say
}

// Digest names bytes as artifacts do: "sha256:...".
func Digest(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// ReadModel reads a model: an ONNX file, a folder that holds model.onnx, or the
// reference of any artifact that does (a network or a ModelPack). The reference
// may end in a Normalisation.
func ReadModel(ctx context.Context, ref string) (*Model, error) {
	ref, normalise, err := normalisation(ref)
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(filepath.Join(ref, ModelFile)); err == nil && info.Mode().IsRegular() {
		ref = filepath.Join(ref, ModelFile)
	}
	m := &Model{Reference: ref}
	if info, err := os.Stat(ref); err == nil && !info.IsDir() {
		if m.ONNX, err = readFile(ref, onnx.MaxSize); err != nil {
			return nil, step.BadInput(fmt.Errorf("model: %w", err))
		}
	} else {
		a, at, err := pull(ctx, "model", ref, "an ONNX file", store.Want{Bytes: onnx.MaxSize + maxTraining})
		if err != nil {
			return nil, err
		}
		m.Reference, m.Manifest = at, a.Digest
		if m.ONNX, err = a.File(ModelFile); err != nil {
			return nil, step.BadInput(fmt.Errorf("model %s: %w", ref, err))
		}
		if data, err := a.File(TrainingFile); err == nil {
			m.Training = new(Training)
			if err := json.Unmarshal(data, m.Training); err != nil {
				return nil, step.BadInput(fmt.Errorf("model %s: %s: %w", ref, TrainingFile, err))
			}
		}
	}
	var metadata map[string]string
	if m.Network, metadata, err = onnx.Unmarshal(m.ONNX); err != nil {
		return nil, step.BadInput(fmt.Errorf("model %s: %w", ref, err))
	}
	if normalise != nil {
		if err := normalise.apply(m, metadata); err != nil {
			return nil, step.BadInput(fmt.Errorf("model %s: %w", ref, err))
		}
	}
	m.Digest = Digest(m.ONNX)
	return m, nil
}

// selfTestExamples go into a network's file with their outputs, for whoever
// loads it to compare.
const selfTestExamples = 10

// PushNetwork writes a trained network to ref. It records the outputs for the
// first images of examples, where those are bytes.
func PushNetwork(ctx context.Context, ref string, net *nn.Network, examples *dataset.Set, training *Training) (*Model, error) {
	metadata := map[string]string{"temper.network": training.Network}
	if n := min(selfTestExamples, examples.Len()); n > 0 && examples.Bytes != nil {
		few := examples.Slice(0, n)
		vector, err := selftest.Vector(net, few.Bytes, few.Labels)
		if err != nil {
			return nil, err
		}
		metadata[selftest.MetadataKey] = vector
	}
	data, err := onnx.Marshal(net, metadata)
	if err != nil {
		return nil, err
	}
	how, err := training.Encode()
	if err != nil {
		return nil, err
	}
	m := &Model{Network: net, ONNX: data, Digest: Digest(data), Training: training}
	m.Reference, m.Manifest, err = push(ctx, ref, &store.Artifact{
		Type: NetworkType,
		Files: []store.File{
			{Name: ModelFile, Data: data},
			{Name: TrainingFile, MediaType: "application/json", Data: how},
		},
	})
	return m, err
}

// OpenDataset opens a data set: what dataset.Open takes, or the reference of
// an artifact that holds one.
func OpenDataset(ctx context.Context, ref string) (*dataset.Splits, error) {
	if !isReference(ref) {
		splits, err := dataset.Open(ctx, ref)
		var down *dataset.Unavailable
		if errors.As(err, &down) {
			return nil, step.Unavailable(err)
		}
		return splits, step.BadInput(err)
	}
	a, _, err := pull(ctx, "dataset", ref, "a folder of IDX files", store.Want{Type: DatasetType})
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "temper-dataset-")
	if err != nil {
		return nil, fmt.Errorf("dataset: %w", err)
	}
	defer os.RemoveAll(dir)
	for _, f := range a.Files {
		if strings.Contains(f.Name, "/") { // a data set is one flat folder
			return nil, step.BadInput(fmt.Errorf("dataset %s: file %q: a data set has no folders", ref, f.Name))
		}
		if err := os.WriteFile(filepath.Join(dir, f.Name), f.Data, 0o600); err != nil {
			return nil, fmt.Errorf("dataset: %w", err)
		}
	}
	splits, err := dataset.Open(ctx, dir)
	if err != nil {
		return nil, step.BadInput(errors.New(strings.ReplaceAll(err.Error(), dir, ref)))
	}
	splits.Name = ref
	for _, s := range []*dataset.Set{splits.Train, splits.Validation, splits.Test} {
		s.Name = strings.Replace(s.Name, dir, ref, 1)
	}
	return splits, nil
}

// PushDataset writes a data set to ref and returns the reference with the
// artifact's digest, and the digest.
func PushDataset(ctx context.Context, ref string, splits *dataset.Splits, annotations map[string]string) (reference, digest string, err error) {
	dir, err := os.MkdirTemp("", "temper-dataset-")
	if err != nil {
		return "", "", fmt.Errorf("dataset: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := dataset.Write(dir, splits); err != nil {
		return "", "", err
	}
	entries, err := os.ReadDir(dir) // sorted by name: the same data set gives the same digest
	if err != nil {
		return "", "", fmt.Errorf("dataset: %w", err)
	}
	a := &store.Artifact{Type: DatasetType, Annotations: annotations}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return "", "", fmt.Errorf("dataset: %w", err)
		}
		a.Files = append(a.Files, store.File{Name: e.Name(), Data: data})
	}
	return push(ctx, ref, a)
}

// Report is an evaluation report that was read from an artifact or a file.
type Report struct {
	*evaluate.Report
	JSON      []byte
	Reference string // with the digest; the path of a file
}

// ReadReport reads a report: a JSON file, or the reference of an artifact.
func ReadReport(ctx context.Context, ref string) (*Report, error) {
	r := &Report{Reference: ref}
	if info, err := os.Stat(ref); err == nil && !info.IsDir() {
		if r.JSON, err = readFile(ref, evaluate.MaxReportBytes); err != nil {
			return nil, step.BadInput(fmt.Errorf("report: %w", err))
		}
	} else {
		a, at, err := pull(ctx, "report", ref, "a JSON file", store.Want{Type: ReportType, Bytes: 4 * evaluate.MaxReportBytes})
		if err != nil {
			return nil, err
		}
		r.Reference = at
		if r.JSON, err = a.File(ReportFile); err != nil {
			return nil, step.BadInput(fmt.Errorf("report %s: %w", ref, err))
		}
	}
	var err error
	if r.Report, err = evaluate.Decode(r.JSON); err != nil {
		return nil, step.BadInput(fmt.Errorf("report %s: %w", ref, err))
	}
	return r, nil
}

// PushReport writes a report and its page to ref, as a referrer of the model
// where both are in one repository. It returns the reference with the
// artifact's digest, and the digest.
func PushReport(ctx context.Context, ref string, report *evaluate.Report, page []byte, model *Model) (reference, digest string, err error) {
	data, err := report.Encode()
	if err != nil {
		return "", "", err
	}
	a := &store.Artifact{
		Type: ReportType,
		Files: []store.File{
			{Name: ReportFile, MediaType: "application/json", Data: data},
			{Name: PageFile, MediaType: "text/html", Data: page},
		},
	}
	if model.Manifest != "" {
		same, err := sameRepository(ctx, ref, model.Reference)
		if err != nil {
			return "", "", err
		}
		if same {
			a.Subject = model.Manifest
		}
	}
	return push(ctx, ref, a)
}

// ReadPart reads a part of an evaluation: a JSON file, or the reference of an
// artifact.
func ReadPart(ctx context.Context, ref string) (*evaluate.Part, error) {
	var data []byte
	if info, err := os.Stat(ref); err == nil && !info.IsDir() {
		if data, err = readFile(ref, evaluate.MaxPartBytes); err != nil {
			return nil, step.BadInput(fmt.Errorf("part: %w", err))
		}
	} else {
		a, _, err := pull(ctx, "part of a report", ref, "a JSON file", store.Want{Type: PartType, Bytes: evaluate.MaxPartBytes})
		if err != nil {
			return nil, err
		}
		if data, err = a.File(PartFile); err != nil {
			return nil, step.BadInput(fmt.Errorf("part %s: %w", ref, err))
		}
	}
	p, err := evaluate.DecodePart(data)
	if err != nil {
		return nil, step.BadInput(fmt.Errorf("part %s: %w", ref, err))
	}
	return p, nil
}

// PushPart writes a part of an evaluation to ref and returns the reference with
// the artifact's digest, and the digest.
func PushPart(ctx context.Context, ref string, p *evaluate.Part) (reference, digest string, err error) {
	data, err := p.Encode()
	if err != nil {
		return "", "", err
	}
	return push(ctx, ref, &store.Artifact{Type: PartType, Files: []store.File{{Name: PartFile, MediaType: "application/json", Data: data}}})
}

// Reachable fails where the registry of an output does not answer, or its folder
// cannot be written to, before hours of work are spent on what it is to hold.
func Reachable(ctx context.Context, ref string) error {
	r, err := store.Open(ctx, ref)
	if err != nil {
		return step.BadInput(err)
	}
	defer r.Close()
	if r.Digest() != "" {
		return step.BadInput(fmt.Errorf("output %s: its digest is not known yet: name a tag instead", ref))
	}
	if folder, ok := strings.CutPrefix(r.Repository(), "oci:"); ok {
		if err := writable(folder); err != nil {
			return step.BadInput(fmt.Errorf("output %s: %w", ref, err))
		}
	}
	_, err = r.Tags(ctx)
	var down *store.Unavailable
	if errors.As(err, &down) {
		return err
	}
	return nil // whether it may be written to, the push will tell
}

// writable says whether files can be made in a folder, or where it is to be made.
func writable(folder string) error {
	for _, err := os.Stat(folder); errors.Is(err, fs.ErrNotExist) && folder != filepath.Dir(folder); _, err = os.Stat(folder) {
		folder = filepath.Dir(folder)
	}
	f, err := os.CreateTemp(folder, ".writable-*")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// isReference tells the reference of an artifact from a name, URL or path.
func isReference(ref string) bool {
	if strings.HasPrefix(ref, "oci:") {
		return true
	}
	if _, err := os.Stat(ref); err == nil || strings.Contains(ref, "://") {
		return false
	}
	host, _, ok := strings.Cut(ref, "/")
	return ok && (host == "localhost" || strings.ContainsAny(strings.TrimLeft(host, "."), ".:"))
}

func pull(ctx context.Context, kind, ref, alternative string, want store.Want) (*store.Artifact, string, error) {
	if !isReference(ref) {
		return nil, "", step.BadInput(fmt.Errorf("%s %q: no such file, and not a reference: give %s, HOST/REPOSITORY@sha256:..., or oci:FOLDER@sha256:...", kind, ref, alternative))
	}
	r, err := store.Open(ctx, ref)
	if err != nil {
		return nil, "", step.BadInput(fmt.Errorf("%s: %w", kind, err))
	}
	defer r.Close()
	if r.Tag() == "" && r.Digest() == "" {
		return nil, "", step.BadInput(fmt.Errorf("%s %s names neither tag nor digest: add :TAG or @sha256:...", kind, r))
	}
	a, err := r.Pull(ctx, want)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", kind, err)
	}
	at, err := r.At(a.Digest)
	if err != nil {
		return nil, "", err
	}
	return a, at.String(), nil
}

func push(ctx context.Context, ref string, a *store.Artifact) (reference, digest string, err error) {
	reference, err = store.Push(ctx, ref, a)
	if err != nil {
		return "", "", fmt.Errorf("push: %w", err)
	}
	return reference, DigestOf(reference), nil
}

// DigestOf is the digest in a reference, "" where there is none.
func DigestOf(reference string) string {
	_, digest, _ := strings.Cut(reference, "@sha256:")
	if digest == "" {
		return ""
	}
	return "sha256:" + digest
}

// sameRepository tells whether two references are to one repository.
func sameRepository(ctx context.Context, a, b string) (bool, error) {
	var places [2]string
	for i, ref := range []string{a, b} {
		r, err := store.Open(ctx, ref)
		if err != nil {
			return false, step.BadInput(err)
		}
		place, err := r.At("")
		r.Close()
		if err != nil {
			return false, err
		}
		places[i] = place.String()
	}
	return places[0] == places[1], nil
}

// readFile reads a regular file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() { // a pipe could block for ever
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var data bytes.Buffer
	if n, err := io.Copy(&data, io.LimitReader(f, limit+1)); err != nil {
		return nil, err
	} else if n > limit {
		return nil, fmt.Errorf("%s: larger than %d bytes", path, limit)
	}
	return data.Bytes(), nil
}
