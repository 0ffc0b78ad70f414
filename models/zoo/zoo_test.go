package zoo

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/recipe"
	"github.com/temper-ml/temper/models/strictyaml"
)

// The counts are those of the published networks, and of wide and deep.
func TestNetworksHaveThePublishedSize(t *testing.T) {
	for name, want := range map[string]int{"wong": 166_406, "threshold": 166_406, "wide": 662_786, "deep": 699_714, "paper": 421_642, "trades": 312_202, "madry": 3_274_634} {
		m, err := Load(name)
		if err != nil {
			t.Fatal(err)
		}
		n, err := nn.Zero(m.Network)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(n.Flat()); got != want {
			t.Errorf("%s has %d parameters, want %d", name, got, want)
		}
		if m.Name != name || m.Network.Name != name || m.Policy.Threat != m.Threat {
			t.Errorf("%s: name %q, network %q, threat %+v, policy about %+v", name, m.Name, m.Network.Name, m.Threat, m.Policy.Threat)
		}
	}
}

func TestEveryShippedFileLoads(t *testing.T) {
	splits, err := dataset.MNIST()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range Names() {
		m, err := Load(name)
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		if m.Policy.MinSamples < 1000 {
			t.Errorf("%s: min_samples is %d: at least 1,000 examples for a decision", name, m.Policy.MinSamples)
		}
		if m.Dataset != "mnist" || m.Network.Input != splits.Test.Shape || m.Network.Classes() != len(splits.Test.Classes) {
			t.Errorf("%s: network %v does not fit dataset %s", name, m.Network.Input, m.Dataset)
		}
	}
	for _, name := range RecipeNames() {
		if _, err := LoadRecipe(name); err != nil {
			t.Error(err)
		}
	}
	if want := []string{"best", "certified", "default", "fast", "n-fgsm", "paper", "paper-standard", "standard"}; !slices.Equal(RecipeNames(), want) {
		t.Errorf("recipes %v, want %v", RecipeNames(), want)
	}
	if want := []string{"deep", "madry", "paper", "threshold", "trades", "wide", "wong"}; !slices.Equal(Names(), want) {
		t.Errorf("models %v, want %v", Names(), want)
	}
}

// The preset named after the paper is its scenario: arXiv 2605.15249.
func TestPaperIsThePaper(t *testing.T) {
	m, err := Load("paper")
	if err != nil {
		t.Fatal(err)
	}
	if m.Threat.Epsilon != 0.15 || m.Threat.Norm != "linf" {
		t.Errorf("threat %+v", m.Threat)
	}
	r := m.Train
	if r.Batch != 64 || r.Optimiser.LearningRate != 1e-3 || r.Schedule != (recipe.Schedule{Kind: "step", Every: 5, Factor: 0.5}) || r.Epochs() != 10 || r.Phases[0].Method != "standard" {
		t.Errorf("training %+v", r)
	}
	r = m.Retrain
	want := recipe.Phase{Method: "pgd", Epochs: 20, Epsilon: 0.15, Alpha: 0.1, Steps: 20}
	if r.Batch != 64 || r.Optimiser.LearningRate != 1e-4 || r.CleanShare != 0 || r.Schedule.Kind != "constant" || len(r.Phases) != 1 || r.Phases[0] != want {
		t.Errorf("defence %+v", r)
	}
}

func TestUnknownNamesListWhatExists(t *testing.T) {
	wong, err := files.ReadFile("wong.yaml")
	if err != nil {
		t.Fatal(err)
	}
	edit := func(old, new string) error {
		text := strings.Replace(string(wong), old, new, 1)
		if text == string(wong) {
			t.Fatalf("%q is not in wong.yaml", old)
		}
		_, err := Parse([]byte(text))
		return err
	}
	_, loadErr := Load("wnog")
	_, recipeErr := LoadRecipe("fasst")
	_, networkErr := LoadNetwork("tradse")
	for _, c := range []struct {
		err  error
		want string
	}{
		{loadErr, `unknown model "wnog": have deep, madry, paper, threshold, trades, wide, wong (did you mean "wong"?)`},
		{recipeErr, `unknown recipe "fasst": have best, certified, default, fast, n-fgsm, paper, paper-standard, standard (did you mean "fast"?)`},
		{networkErr, `unknown network "tradse": have deep, madry, paper, threshold, trades, wide, wong (did you mean "trades"?)`},
		{edit("retrain: fast", "retrain: fsat"), `recipe.retrain: line 15: unknown recipe "fsat"`},
		{edit("retrain: fast", "retrain: ../fast.yaml"), `unknown recipe`},
		{edit("min_clean_accuracy", "min_claen_accuracy"), `policy: unknown key "min_claen_accuracy"`},
		{edit("min_clean_accuracy", "min_claen_accuracy"), `(did you mean "min_clean_accuracy"?)`},
		{edit("filters: 16", "filter: 16"), `network: line 8: layers[0].conv: unknown key "filter"`},
		{edit("epsilon: 0.3", "epsilon: .nan"), `not a finite number`},
		{edit("norm: linf", "norm: l3"), `have l2, linf`},
		{edit("fgsm", "fgms"), `did you mean "fgsm"?`},
		{edit("policy:", "policy:\n  threat: {norm: linf, epsilon: 0.1}"), `policy.threat differs`},
		{edit("name: wong", "name: Wong/../x"), `lower-case`},
		{edit("relu: true}\n  - dense: {units: 10}", "relu: true}\n  - dense: {units: 10, relu: true}"), `the last layer must be without relu`},
		{edit("retrain: fast", "retrain: {batch: 0, optimiser: {learning_rate: 1}, schedule: {kind: cosine}, phases: []}"), `recipe.retrain: batch is 0`},
	} {
		if c.err == nil || !strings.Contains(c.err.Error(), c.want) {
			t.Errorf("error %v, want %q", c.err, c.want)
		}
	}
}

func TestNetworkByNameAndRecipeInline(t *testing.T) {
	m, err := Parse([]byte(`
name: mine
network: trades
dataset: ./digits
recipe:
  train: standard
  retrain:
    batch: 32
    optimiser: {learning_rate: 0.001}
    schedule: {kind: cosine}
    phases:
    - {method: pgd, epochs: 1, steps: 7, alpha: 0.1}
threat: {norm: linf, epsilon: 0.2}
policy: {attacks: [pgd-20], min_clean_accuracy: 0.9, min_robust_accuracy: 0, max_clean_regression: 0, max_robust_regression: 0, min_samples: 1000, confidence: 0.95}
`))
	if err != nil {
		t.Fatal(err)
	}
	if m.Network.Name != "trades" || m.Retrain.Batch != 32 || m.Policy.Threat.Epsilon != 0.2 {
		t.Errorf("parsed %+v", m)
	}
}

func TestCase11ThresholdsAreNumbersOrBadInput(t *testing.T) {
	wong, err := files.ReadFile("wong.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, policy, _ := strings.Cut(string(wong), "policy:\n")
	for line := range strings.Lines(policy) {
		key, _, _ := strings.Cut(strings.TrimSpace(line), ":")
		if _, err := Parse([]byte(strings.Replace(string(wong), line, "", 1))); err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("without %s: error %v", key, err)
		}
		for _, text := range []string{"NaN", ".nan", "-1", "-0.5", "1e309", ".inf", "0,9", "", `""`, "1.5.", "2000.5", "90%", "0x1p-1"} {
			if _, err := Parse([]byte(strings.Replace(string(wong), line, "  "+key+": "+text+"\n", 1))); err == nil || !strings.Contains(err.Error(), key) {
				t.Errorf("%s: %s: error %v", key, text, err)
			}
		}
	}
}

func TestUserFiles(t *testing.T) {
	dir := t.TempDir()
	wong, err := files.ReadFile("wong.yaml")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "mine.yaml")
	if err := os.WriteFile(file, wong, 0o600); err != nil {
		t.Fatal(err)
	}
	if m, err := Load(file); err != nil || m.Name != "wong" {
		t.Errorf("user's file: %v, %v", m, err)
	}
	large := filepath.Join(dir, "large.yaml")
	if err := os.WriteFile(large, make([]byte, strictyaml.MaxBytes+100), 0o600); err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]string{large: "at most", dir + "/": "not a regular file", filepath.Join(dir, "none.yaml"): "no such file", "/dev/zero": "not a regular file"} {
		if _, err := Load(ref); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", ref, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range Names() {
		data, err := files.ReadFile(name + ".yaml")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Parse(data)
		if err != nil {
			return
		}
		if _, err := m.Network.Shapes(); err != nil {
			t.Errorf("parsed a network that is not valid: %v", err)
		}
		if err := m.Policy.Validate(); err != nil {
			t.Errorf("parsed a policy that is not valid: %v", err)
		}
	})
}

func FuzzParseRecipe(f *testing.F) {
	for _, name := range RecipeNames() {
		data, err := files.ReadFile("recipes/" + name + ".yaml")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := ParseRecipe(data); err == nil && !(r.Epochs() > 0) {
			t.Errorf("parsed a recipe of %v epochs", r.Epochs())
		}
	})
}
