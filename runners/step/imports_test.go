package step

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/temper-ml/temper/"

// imports maps each package that ./... needs to what it imports.
func imports(t *testing.T) map[string][]string {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Imports", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	list := map[string][]string{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); err == io.EOF {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		list[p.ImportPath] = p.Imports
	}
}

// chain returns how a package comes to import one for which forbidden holds,
// nil where it does not.
func chain(list map[string][]string, from string, forbidden func(string) bool) []string {
	seen := map[string]bool{}
	var walk func(string) []string
	walk = func(p string) []string {
		if seen[p] {
			return nil
		}
		seen[p] = true
		for _, next := range list[p] {
			if forbidden(next) {
				return []string{p, next}
			}
			if rest := walk(next); rest != nil {
				return append([]string{p}, rest...)
			}
		}
		return nil
	}
	return walk(from)
}

func under(prefixes ...string) func(string) bool {
	return func(path string) bool {
		for _, p := range prefixes {
			if path == p || strings.HasPrefix(path, p+"/") {
				return true
			}
		}
		return false
	}
}

// TestImportsPointOneWay keeps DESIGN.md's rule: runners -> signing -> models.
func TestImportsPointOneWay(t *testing.T) {
	list := imports(t)
	ours := 0
	for path, direct := range list {
		local, ok := strings.CutPrefix(path, module)
		if !ok {
			continue
		}
		ours++
		var forbidden func(string) bool
		switch {
		case under("models")(local):
			forbidden = under(module+"runners", module+"signing", "k8s.io",
				"github.com/google/go-containerregistry", "github.com/sigstore", "oras.land")
			for _, p := range direct { // Gorgonia's own dependencies may know HTTP, our code may not
				if under("net", "os/exec")(p) && p != "net/url" && local != "models/dataset" {
					t.Errorf("%s imports %s: only models/dataset may use the network", local, p)
				}
			}
		case under("signing")(local):
			forbidden = under(module + "runners")
		default:
			continue
		}
		if c := chain(list, path, forbidden); c != nil {
			t.Errorf("%s must not import %s: %s", local, c[len(c)-1], strings.Join(c, " -> "))
		}
	}
	if ours < 10 {
		t.Fatalf("go list found %d packages of this module: the test looks at the wrong place", ours)
	}

	// The exposed server stays small: no training, no Kubernetes client.
	serve := module + "runners/serve"
	if _, ok := list[serve]; !ok {
		t.Fatalf("no package %s", serve)
	}
	for _, p := range []string{"gorgonia.org", "k8s.io/client-go", "k8s.io/api", "sigs.k8s.io/controller-runtime"} {
		if c := chain(list, serve, under(p)); c != nil {
			t.Errorf("runners/serve must not link %s: %s", p, strings.Join(c, " -> "))
		}
	}
}
