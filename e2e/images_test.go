//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/temper-ml/temper/runners/step/images"
)

// A push that changes a runner makes the images of all runners from that commit:
// the same, bit by bit, as the same Go makes of it here.
func TestRunnerImages(test *testing.T) {
	test.Parallel()
	gitNamespace := "git-" + unique()
	source := test.TempDir()
	var commit, uid string
	var made []string
	testenv.Test(test, features.New("a push event of a runner").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			serveGit(t, gitNamespace)
			listen(t)
			pipe(t, exec.Command("git", "-C", "..", "archive", "HEAD"), exec.Command("tar", "-x", "-C", source))
			earlier(test, t, source)
			patchTemplate(t, "runner-images", fmt.Sprintf(`[
				{"op": "test", "path": "/spec/params/3/name", "value": "go-image"},
				{"op": "replace", "path": "/spec/params/3/default", "value": %q},
				{"op": "test", "path": "/spec/resourcetemplates/0/spec/workspaces/1/name", "value": "cache"},
				{"op": "replace", "path": "/spec/resourcetemplates/0/spec/workspaces/1", "value": {"name": "cache", "persistentVolumeClaim": {"claimName": "go-cache"}}}]`, toolchain(t)))
			return ctx
		}).
		Assess("Given this repository's files as a commit, on a git server in the cluster", do(func(t *testing.T) {
			commit = push(t, gitNamespace, source)
			if here, there := must(t, "", "git", "rev-parse", "HEAD^{tree}"), must(t, "", "git", "-C", source, "rev-parse", "HEAD^{tree}"); here != there {
				t.Errorf("the files are %s, not those of HEAD, %s", there, here)
			}
		})).
		Assess("When the delivery comes that it changed a runner", do(func(t *testing.T) {
			uid = starts(t, event(t, gitNamespace, commit, "runners/verify/main.go"), "runner-images-"+commit)
		})).
		Assess("Then runner-images runs to its end, once, from that commit", do(func(t *testing.T) {
			results := resultsOf(t, "runner-images-"+commit)
			if results["CHAINS-GIT_COMMIT"] != commit || results["CHAINS-GIT_URL"] != gitURL(gitNamespace) {
				t.Errorf("results are %v", results)
			}
			if all := pipelineRuns(t, gitNamespace); !slices.Equal(all, []string{uid}) {
				t.Errorf("the pipeline runs are %v; the commit's was %s", all, uid)
			}
			made = strings.Fields(results["IMAGES"])
		})).
		Assess("And every runner has an image, signed, and its bill of materials", do(func(t *testing.T) {
			runners, err := filepath.Glob(filepath.Join(source, "runners/*/main.go"))
			if err != nil || len(made) != len(runners) {
				t.Errorf("images %v of the runners %v, %v", made, runners, err)
			}
			for _, ref := range made {
				if d, err := name.NewDigest(ref); err != nil || d.RegistryStr() != registryInside {
					t.Errorf("%s: %v", ref, err)
				}
			}
			signedAndDescribed(t, outside(image(t, made, "verify")))
			signedAndDescribed(t, outside(image(t, made, "serve")))
		})).
		Assess("And it is the image that is made of the commit here", do(func(t *testing.T) {
			program := filepath.Join(t.TempDir(), "verify")
			build(t, source, os.Environ(), "-o", program, "./runners/verify")
			p, err := images.Read(program)
			if err != nil {
				t.Fatal(err)
			}
			same, err := p.Image()
			if err != nil {
				t.Fatal(err)
			}
			if digest, err := same.Digest(); err != nil || !strings.HasSuffix(image(t, made, "verify"), "@"+digest.String()) {
				t.Errorf("%s, %v; the pipeline's is %s", digest, err, image(t, made, "verify"))
			}
		})).
		Teardown(remove(gitNamespace)).
		Feature())
}

// image is that of a runner.
func image(t *testing.T, made []string, runner string) string {
	t.Helper()
	i := slices.IndexFunc(made, func(ref string) bool { return strings.Contains(ref, "/"+runner+"@sha256:") })
	if i < 0 {
		t.Fatalf("no image of %s among %v", runner, made)
	}
	return made[i]
}

// build compiles as the task build-runners does.
func build(t *testing.T, source string, env []string, args ...string) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"build", "-trimpath"}, args...)...)
	cmd.Dir = source
	cmd.Env = append(env, "CGO_ENABLED=0", "GOFLAGS=-mod=readonly -buildvcs=false -modcacherw")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// toolchain pushes an image of this machine's Go, at the place where it is here,
// and returns its reference in the cluster.
func toolchain(t *testing.T) string {
	t.Helper()
	root := must(t, "", "go", "env", "GOROOT")
	var files bytes.Buffer
	args := []string{"-c", "-C", "/"}
	for _, part := range []string{"bin", "pkg", "src", "go.env", "VERSION"} {
		args = append(args, filepath.Join(root, part)[1:])
	}
	pack := exec.Command("tar", args...)
	pack.Stdout = &files
	if err := pack.Run(); err != nil {
		t.Fatal(err)
	}
	image, err := mutate.Append(empty.Image, mutate.Addendum{Layer: static.NewLayer(files.Bytes(), types.OCIUncompressedLayer)})
	if err == nil {
		image, err = mutate.Config(mutate.MediaType(image, types.OCIManifestSchema1), v1.Config{Env: []string{"PATH=" + filepath.Join(root, "bin")}})
	}
	if err != nil {
		t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	at, err := name.NewDigest(registryOutside + "/e2e/go@" + digest.String())
	if err == nil {
		err = remote.Write(at, image, remote.WithContext(t.Context()))
	}
	if err != nil {
		t.Fatal(err)
	}
	return inside(at.String())
}

// earlier makes the volume with Go's caches as an earlier run would have left it:
// in it is everything that the runners are made of but this repository's own
// packages. Compiling that takes minutes, so it is kept from one cluster to the
// next.
func earlier(test, t *testing.T, source string) {
	t.Helper()
	const volume = "/tmp/go-cache" // the node's memory: so many files are slow to remove from its disk
	cache := filepath.Join(os.Getenv("TEMPER_CACHE"), "go")
	modules := must(t, "", "go", "env", "GOMODCACHE")
	proxy := "GOPROXY=file://" + modules + "/cache/download," + must(t, "", "go", "env", "GOPROXY")
	env := append(os.Environ(), "GOCACHE="+cache+"/build", "GOMODCACHE="+cache+"/modules", proxy)
	packages := must(t, "", "go", "-C", source, "list", "-deps", "-f", "{{if not (and .Module .Module.Main)}}{{.ImportPath}}{{end}}", "./runners/...")
	build(t, source, env, strings.Fields(packages)...)

	node := []string{"exec", "-i", "temper-control-plane"}
	test.Cleanup(func() { must(test, "", "docker", append(node, "rm", "-rf", volume)...) })
	must(t, "", "docker", append(node, "mkdir", "-p", "-m", "777", volume)...)
	pipe(t, exec.Command("tar", "-c", "--owner=65532", "--group=65532", "-C", cache, "."), exec.Command("docker", append(node, "tar", "-x", "-C", volume)...))
	if err := apply(fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: go-cache}
spec:
  storageClassName: ""
  capacity: {storage: 10Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  hostPath: {path: %s}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: go-cache, namespace: %s}
spec:
  storageClassName: ""
  volumeName: go-cache
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 10Gi}}
`, volume, namespace)); err != nil {
		t.Fatal(err)
	}
}

// pipe runs one program into another.
func pipe(t *testing.T, from, to *exec.Cmd) {
	t.Helper()
	var err error
	if to.Stdin, err = from.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	var out, narration bytes.Buffer
	from.Stderr, to.Stdout, to.Stderr = &narration, &out, &out
	if err := from.Start(); err != nil {
		t.Fatal(err)
	}
	if err := to.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", to, err, &out)
	}
	if err := from.Wait(); err != nil {
		t.Fatalf("%s: %v\n%s", from, err, &narration)
	}
}
