package workflows

import (
	"io/fs"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	yamlv3 "go.yaml.in/yaml/v3"

	"github.com/temper-ml/temper/runners/step/attack"
	"github.com/temper-ml/temper/runners/step/check"
	"github.com/temper-ml/temper/runners/step/choose"
	"github.com/temper-ml/temper/runners/step/evaluate"
	"github.com/temper-ml/temper/runners/step/fetch"
	"github.com/temper-ml/temper/runners/step/images"
	"github.com/temper-ml/temper/runners/step/pack"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/runners/step/retrain"
	"github.com/temper-ml/temper/runners/step/sentinel"
	"github.com/temper-ml/temper/runners/step/serve"
	"github.com/temper-ml/temper/runners/step/sign"
	"github.com/temper-ml/temper/runners/step/submit"
	"github.com/temper-ml/temper/runners/step/summary"
	"github.com/temper-ml/temper/runners/step/train"
	"github.com/temper-ml/temper/runners/step/verify"
	"github.com/temper-ml/temper/workflows/lint"
)

// runners are the programs in the images.
var runners = map[string]func() *cobra.Command{
	"attack": attack.Command, "check": check.Command, "choose": choose.Command, "evaluate": evaluate.Command, "fetch": fetch.Command,
	"images": images.Command, "pack": pack.Command, "promote": promote.Command, "retrain": retrain.Command, "sentinel": sentinel.Command,
	"serve": serve.Command, "sign": sign.Command, "submit": submit.Command, "summary": summary.Command, "train": train.Command, "verify": verify.Command,
}

// Every manifest calls a runner by its name, with flags that it has, and with
// all that it asks for.
func TestManifestsFitTheRunners(t *testing.T) {
	seen := 0
	for _, root := range []string{".", "../tasks"} {
		err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() && d.Name() == "testdata" {
				return fs.SkipDir
			}
			if filepath.Ext(file) != ".yaml" {
				return nil
			}
			docs, _ := lint.Read(file)
			for _, doc := range docs {
				containers(doc.Node, func(image string, command, args []string) {
					name, ours := strings.CutPrefix(image, "ghcr.io/temper-ml/")
					if !ours {
						return
					}
					seen++
					make, known := runners[name]
					if !known || len(command) == 0 || command[0] != "/"+name {
						t.Errorf("%s: image %s runs %q", file, image, command)
						return
					}
					cmd, rest, err := make().Find(append(command[1:], args...))
					if err != nil {
						t.Errorf("%s: %s: %v", file, path.Join(command...), err)
						return
					}
					given := map[string]bool{"channel": doc.Kind == "Deployment"} // in the ConfigMap
					for _, arg := range rest {
						if arg == "--" || !strings.HasPrefix(arg, "--") {
							continue
						}
						flag, _, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
						given[flag] = true
						if cmd.Flags().Lookup(flag) == nil {
							t.Errorf("%s: %s has no flag --%s", file, name, flag)
						}
					}
					cmd.Flags().VisitAll(func(f *pflag.Flag) {
						if f.Annotations[cobra.BashCompOneRequiredFlag] != nil && !given[f.Name] {
							t.Errorf("%s: %s needs --%s", file, name, f.Name)
						}
					})
				})
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if seen < 20 {
		t.Errorf("%d containers: the test looks at the wrong place", seen)
	}
}

// containers visits every mapping with an image and a command.
func containers(n *yamlv3.Node, visit func(image string, command, args []string)) {
	var c struct {
		Image         string
		Command, Args []string
	}
	if n.Kind == yamlv3.MappingNode && n.Decode(&c) == nil && c.Image != "" && c.Command != nil {
		visit(c.Image, c.Command, c.Args)
	}
	for _, child := range n.Content {
		containers(child, visit)
	}
}
