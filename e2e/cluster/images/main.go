// Images packs the programs that ../build.sh built into the container images
// that the cluster runs, as one archive that `ctr images import` reads.
//
//	go run ./e2e/cluster/images -bin DIR -debian TAR -o ARCHIVE MODULE=VERSION...
//
// DIR holds one folder for each module. The same input gives the same archive.
package main

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// image is one container image: a program at a place, and beneath it nothing
// or Debian.
type image struct {
	names   []string
	program string // DIR/program
	at      string // where it is in the image
	user    string // numeric, so that Kubernetes sees that it is not root; "" for root
	debian  bool
}

// Users that the manifests of Argo and Tekton expect.
const (
	argoUser = "8737"
	koUser   = "65532"
)

func images(version map[string]string) []image {
	k8s := version["kubernetes"]
	list := []image{
		{names: []string{"registry.k8s.io/kube-apiserver:" + k8s}, program: "kubernetes/kube-apiserver", at: "/usr/local/bin/kube-apiserver"},
		{names: []string{"registry.k8s.io/kube-controller-manager:" + k8s}, program: "kubernetes/kube-controller-manager", at: "/usr/local/bin/kube-controller-manager"},
		{names: []string{"registry.k8s.io/kube-scheduler:" + k8s}, program: "kubernetes/kube-scheduler", at: "/usr/local/bin/kube-scheduler"},
		// iptables and conntrack, with the libraries of their plugins, are Debian's.
		{names: []string{"registry.k8s.io/kube-proxy:" + k8s}, program: "kubernetes/kube-proxy", at: "/usr/local/bin/kube-proxy", debian: true},
		// kubeadm and containerd each ask for a tag of their own.
		{names: []string{"registry.k8s.io/pause:3.10.1", "registry.k8s.io/pause:3.10"}, program: "kubernetes/pause", at: "/pause"},
		// kubeadm adds the number of the image's build to etcd's version.
		{names: []string{"registry.k8s.io/etcd:" + strings.TrimPrefix(version["etcd"], "v") + "-0"}, program: "etcd/etcd", at: "/usr/local/bin/etcd"},
		{names: []string{"registry.k8s.io/coredns/coredns:" + version["coredns"]}, program: "coredns/coredns", at: "/coredns"},
		{names: []string{"docker.io/library/registry:" + strings.TrimPrefix(version["registry"], "v")}, program: "registry/registry", at: "/bin/registry", user: koUser},
		{names: []string{"quay.io/argoproj/workflow-controller:" + version["argo"]}, program: "argo/workflow-controller", at: "/bin/workflow-controller", user: argoUser},
		{names: []string{"quay.io/argoproj/argoexec:" + version["argo"]}, program: "argo/argoexec", at: "/bin/argoexec"},
	}
	ko := func(module string, programs ...string) {
		for _, p := range programs {
			list = append(list, image{
				names:   []string{"localhost/" + module + "/" + p + ":" + version[module]},
				program: module + "/" + p, at: "/ko-app/" + p, user: koUser,
				debian: p == "resolvers", // runs git under tini
			})
		}
	}
	ko("tekton", "controller", "webhook", "entrypoint", "nop", "workingdirinit", "events", "sidecarlogresults", "resolvers")
	ko("triggers", "controller", "webhook", "interceptors", "eventlistenersink")
	return list
}

func main() {
	log.SetFlags(0)
	bin := flag.String("bin", "", "folder of the programs")
	debian := flag.String("debian", "", "archive of a Debian root file system")
	out := flag.String("o", "", "archive to write")
	flag.Parse()
	version := map[string]string{}
	for _, arg := range flag.Args() {
		module, v, _ := strings.Cut(arg, "=")
		version[module] = v
	}
	if err := write(*out, *bin, *debian, images(version)); err != nil {
		log.Fatal(err)
	}
}

// write writes the images in Docker's archive format: a tar of layers, which
// are tars themselves, of configurations, and of a manifest.json that names
// them.
func write(out, bin, debian string, list []image) (err error) {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	archive := tar.NewWriter(f)
	type entry struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var manifest []entry
	base, err := addLayer(archive, func(w io.Writer) error { return copyFile(w, debian) })
	if err != nil {
		return err
	}
	for _, i := range list {
		var layers []v1.Hash
		if i.debian {
			layers = append(layers, base)
		}
		top, err := addLayer(archive, func(w io.Writer) error { return programLayer(w, filepath.Join(bin, i.program), i.at, i.debian) })
		if err != nil {
			return fmt.Errorf("%s: %w", i.names[0], err)
		}
		layers = append(layers, top)
		config := v1.ConfigFile{
			OS: "linux", Architecture: runtime.GOARCH,
			Config: v1.Config{
				User: i.user, Entrypoint: []string{i.at},
				Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/ko-app"},
			},
			RootFS: v1.RootFS{Type: "layers", DiffIDs: layers},
		}
		data, err := json.Marshal(config)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(data)
		e := entry{Config: hex.EncodeToString(sum[:]) + ".json", RepoTags: i.names}
		for _, l := range layers {
			e.Layers = append(e.Layers, layerName(l))
		}
		if err := addFile(archive, e.Config, data); err != nil {
			return err
		}
		manifest = append(manifest, e)
	}
	data, err := json.Marshal(manifest)
	if err != nil {
		return err
	}
	if err := addFile(archive, "manifest.json", data); err != nil {
		return err
	}
	return archive.Close()
}

func layerName(h v1.Hash) string { return h.Hex + ".tar" }

func addFile(archive *tar.Writer, name string, data []byte) error {
	if err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := archive.Write(data)
	return err
}

// addLayer adds what layer writes, under the digest of that; it writes twice.
func addLayer(archive *tar.Writer, layer func(io.Writer) error) (v1.Hash, error) {
	sum, size := sha256.New(), &counter{}
	if err := layer(io.MultiWriter(sum, size)); err != nil {
		return v1.Hash{}, err
	}
	h := v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}
	if err := archive.WriteHeader(&tar.Header{Name: layerName(h), Mode: 0o644, Size: size.n}); err != nil {
		return v1.Hash{}, err
	}
	return h, layer(archive)
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

// programLayer is the layer of one program. Without Debian beneath it, it has
// the folder for temporary files too.
func programLayer(w io.Writer, program, at string, debian bool) error {
	layer := tar.NewWriter(w)
	if !debian {
		folders := []string{}
		for dir := path.Dir(at[1:]); dir != "."; dir = path.Dir(dir) {
			folders = append([]string{dir + "/"}, folders...)
		}
		for _, dir := range append(folders, "tmp/") {
			mode := int64(0o755)
			if dir == "tmp/" {
				mode = 0o1777
			}
			if err := layer.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: mode}); err != nil {
				return err
			}
		}
	}
	info, err := os.Stat(program)
	if err != nil {
		return err
	}
	if err := layer.WriteHeader(&tar.Header{Name: at[1:], Mode: 0o755, Size: info.Size()}); err != nil {
		return err
	}
	if err := copyFile(layer, program); err != nil {
		return err
	}
	return layer.Close()
}

func copyFile(w io.Writer, name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}
