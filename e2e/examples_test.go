//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
	"sigs.k8s.io/yaml"

	"github.com/temper-ml/temper/runners/step/artifact"
)

// Every example comes to the verdict that it announces, in a namespace and a
// repository of its own.
func TestExamples(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../examples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := "example-" + name + "-" + unique()
			var example map[string]any
			var want string
			testenv.Test(t, features.New("an example").
				Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
					data, err := os.ReadFile(file)
					if err != nil {
						t.Fatal(err)
					}
					if err := yaml.UnmarshalStrict(data, &example); err != nil {
						t.Fatal(err)
					}
					want, _ = example["metadata"].(map[string]any)["annotations"].(map[string]any)["temper/verdict"].(string)
					installIn(t, ns)
					return ctx
				}).
				Assess("comes to its verdict", do(func(t *testing.T) {
					arguments := example["spec"].(map[string]any)["arguments"].(map[string]any)
					arguments["parameters"] = append(arguments["parameters"].([]any),
						map[string]any{"name": "repository", "value": registryInside + "/" + ns})
					manifest, err := json.Marshal(example)
					if err != nil {
						t.Fatal(err)
					}
					created := must(t, string(manifest), "kubectl", "create", "-n", ns, "-f", "-", "-o", "jsonpath={.metadata.name}")
					if got := finished(t, ns, created).result("verdict"); want == "" || got != want {
						t.Errorf("verdict %q, not %q", got, want)
					}
				})).
				Teardown(remove(ns)).
				Feature())
		})
	}
}

// However many pods share an evaluation, its report is the same.
func TestShards(t *testing.T) {
	t.Parallel()
	var model string
	elsewhere := registryInside + "/shards-" + unique() // where nothing is remembered
	reports := map[string]string{}
	feature := features.New("a sharded evaluation").
		Assess("Given a promoted model", do(func(t *testing.T) { model = promoted(t).result("reference") }))
	for _, shards := range []string{"1", "2", "4", "8"} {
		feature = feature.Assess("When it is evaluated in "+shards+" pods", do(func(t *testing.T) {
			w := finished(t, namespace, submit(t, namespace, "evaluate", "model="+model, "repository="+elsewhere, "shards="+shards))
			reports[shards] = artifact.DigestOf(w.result("reference"))
			if n := len(w.pods("shard")); strconv.Itoa(n) != shards {
				t.Errorf("%d pods", n)
			}
			var work time.Duration
			for _, n := range w.pods("shard") {
				work += n.FinishedAt.Sub(n.StartedAt)
			}
			t.Logf("%s shards: %v in all, %v in pods", shards, w.Status.FinishedAt.Sub(w.Status.StartedAt), work)
		}))
	}
	testenv.Test(t, feature.
		Assess("Then the reports are one", do(func(t *testing.T) {
			for shards, digest := range reports {
				if digest != reports["1"] || digest == "" {
					t.Errorf("%s shards: report %s, one pod: %s", shards, digest, reports["1"])
				}
			}
		})).
		Feature())
}
