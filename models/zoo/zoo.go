// Package zoo holds models as files: what a "model commit" changes. Each is
// one YAML file with a network, a data set, recipes, a threat model and a gate
// policy; a user's own file has the same form.
package zoo

import (
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/recipe"
	"github.com/temper-ml/temper/models/strictyaml"
	"github.com/temper-ml/temper/models/unknown"
)

//go:embed *.yaml recipes/*.yaml
var files embed.FS

// Model is everything there is to know about a model but its weights.
type Model struct {
	Name    string
	Network nn.Description
	Dataset string // as dataset.Open takes it
	Train   recipe.Recipe
	Retrain recipe.Recipe // the defence: how an attacked model is hardened
	Threat  attack.Threat
	Policy  gate.Policy
}

// file is a Model as YAML. A network or recipe is either a name of the zoo or
// is written out.
type file struct {
	Name    string    `yaml:"name"`
	Network yaml.Node `yaml:"network"`
	Dataset string    `yaml:"dataset"`
	Recipe  struct {
		Train   yaml.Node `yaml:"train"`
		Retrain yaml.Node `yaml:"retrain"`
	} `yaml:"recipe"`
	Threat attack.Threat `yaml:"threat"`
	Policy gate.Policy   `yaml:"policy"` // its threat is the one above
}

// Names lists the models of the zoo, and of its networks: each has its own.
func Names() []string { return list(".") }

// RecipeNames lists the recipes of the zoo.
func RecipeNames() []string { return list("recipes") }

func list(folder string) []string {
	found, err := fs.Glob(files, path.Join(folder, "*.yaml"))
	if err != nil {
		panic("zoo: " + err.Error()) // the pattern is constant
	}
	for i, f := range found {
		found[i] = strings.TrimSuffix(path.Base(f), ".yaml")
	}
	slices.Sort(found)
	return found
}

// Load reads a model: one of Names, or a path to a YAML file (it has a slash
// or ends in .yaml or .yml). An unknown name is an *unknown.Error.
func Load(ref string) (*Model, error) {
	data, err := read("model", ref, ".", Names())
	if err != nil {
		return nil, err
	}
	m, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("model %s: %w", ref, err)
	}
	return m, nil
}

// LoadRecipe reads a recipe: one of RecipeNames, or a path to a YAML file.
func LoadRecipe(ref string) (recipe.Recipe, error) {
	data, err := read("recipe", ref, "recipes", RecipeNames())
	if err != nil {
		return recipe.Recipe{}, err
	}
	r, err := ParseRecipe(data)
	if err != nil {
		return recipe.Recipe{}, fmt.Errorf("recipe %s: %w", ref, err)
	}
	return r, nil
}

// LoadNetwork returns the network of the zoo's model of that name.
func LoadNetwork(name string) (nn.Description, error) {
	if !slices.Contains(Names(), name) {
		return nn.Description{}, unknown.Name("network", name, Names())
	}
	data, err := files.ReadFile(name + ".yaml")
	if err != nil {
		return nn.Description{}, err
	}
	var f file
	if err := strictyaml.Decode(data, &f); err != nil {
		return nn.Description{}, fmt.Errorf("model %s: %w", name, err)
	}
	return network(&f.Network)
}

// ParseRecipe reads a recipe from YAML and validates it.
func ParseRecipe(data []byte) (recipe.Recipe, error) {
	var r recipe.Recipe
	if err := strictyaml.Decode(data, &r); err != nil {
		return recipe.Recipe{}, err
	}
	if err := r.Validate(); err != nil {
		return recipe.Recipe{}, err
	}
	return r, nil
}

// namePattern keeps names fit for repositories, labels and file names.
var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

// Parse reads a model from YAML and validates all of it, except that the data
// set exists.
func Parse(data []byte) (*Model, error) {
	var f file
	if err := strictyaml.Decode(data, &f); err != nil {
		return nil, err
	}
	if !namePattern.MatchString(f.Name) {
		return nil, fmt.Errorf("name %.80q: must be lower-case letters, digits, dots, dashes and underscores, at most 63", f.Name)
	}
	if f.Dataset == "" {
		return nil, errors.New("dataset is empty")
	}
	m := &Model{Name: f.Name, Dataset: f.Dataset, Threat: f.Threat, Policy: f.Policy}
	var err error
	if m.Network, err = network(&f.Network); err != nil {
		return nil, err
	}
	if m.Train, err = training(&f.Recipe.Train); err != nil {
		return nil, fmt.Errorf("recipe.train: %w", err)
	}
	if m.Retrain, err = training(&f.Recipe.Retrain); err != nil {
		return nil, fmt.Errorf("recipe.retrain: %w", err)
	}
	if err := m.Threat.Validate(); err != nil {
		return nil, err
	}
	if m.Policy.Threat == (attack.Threat{}) {
		m.Policy.Threat = m.Threat
	}
	if m.Policy.Threat != m.Threat {
		return nil, errors.New("policy.threat differs from threat: remove it, the policy is about the model's threat")
	}
	return m, m.Policy.Validate()
}

// network decodes a network that is written out or named. A model's file is
// complete by itself: neither this nor training follows a path to another file.
func network(n *yaml.Node) (nn.Description, error) {
	if n.Kind == yaml.ScalarNode {
		d, err := LoadNetwork(n.Value)
		if err != nil {
			return nn.Description{}, fmt.Errorf("line %d: %w", n.Line, err)
		}
		return d, nil
	}
	var d nn.Description
	if err := strictyaml.DecodeNode(n, &d); err != nil {
		return nn.Description{}, fmt.Errorf("network: %w", err)
	}
	_, err := d.Shapes()
	return d, err
}

// training decodes a recipe that is written out or named.
func training(n *yaml.Node) (recipe.Recipe, error) {
	if n.Kind == yaml.ScalarNode {
		if !slices.Contains(RecipeNames(), n.Value) {
			return recipe.Recipe{}, fmt.Errorf("line %d: %w", n.Line, unknown.Name("recipe", n.Value, RecipeNames()))
		}
		return LoadRecipe(n.Value)
	}
	var r recipe.Recipe
	if err := strictyaml.DecodeNode(n, &r); err != nil {
		return recipe.Recipe{}, err
	}
	return r, r.Validate()
}

// read returns a file of the zoo by name, or a user's by path.
func read(kind, ref, folder string, names []string) ([]byte, error) {
	if slices.Contains(names, ref) {
		return files.ReadFile(path.Join(folder, ref+".yaml"))
	}
	if !strings.ContainsAny(ref, `/\`) && !strings.HasSuffix(ref, ".yaml") && !strings.HasSuffix(ref, ".yml") {
		return nil, fmt.Errorf("%w; or give a path to a YAML file", unknown.Name(kind, ref, names))
	}
	info, err := os.Stat(ref)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kind, err)
	}
	if !info.Mode().IsRegular() { // a pipe could block for ever
		return nil, fmt.Errorf("%s %s: not a regular file", kind, ref)
	}
	f, err := os.Open(ref)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kind, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, strictyaml.MaxBytes+1)) // one more, so that Decode sees the excess
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", kind, ref, err)
	}
	return data, nil
}
