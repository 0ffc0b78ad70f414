#!/usr/bin/env bash
# Makes the node image of what build.sh and debian.sh made, with every image
# that the cluster runs inside it, and prints its name. Needs Docker.
source "$(dirname "$0")/lib.sh"

modules=(kubernetes etcd coredns registry argo tekton triggers)
versions=(
  kubernetes="$(version kubernetes k8s.io/kubernetes)"
  etcd="$(version etcd go.etcd.io/etcd/server/v3)"
  coredns="$(version coredns github.com/coredns/coredns)"
  registry="$(version registry github.com/distribution/distribution/v3)"
  argo="$(version argo github.com/argoproj/argo-workflows/v3)"
  tekton="$(version tekton github.com/tektoncd/pipeline)"
  triggers="$(version triggers github.com/tektoncd/triggers)"
)
"$here/build.sh" "${modules[@]}"
debian=$("$here/debian.sh")

built=()
for module in "${modules[@]}"; do built+=("$(readlink "$cache/bin/$module")"); done
kind=$(go -C "$here/modules/kind" list -m -f '{{.Dir}}' sigs.k8s.io/kind)
name=temper-node:$(hash_of "$here/node" "$here/node.sh" "$here/images" "$(basename "$debian")" "${versions[*]}" "${built[*]##*/}" "$kind")
if docker image inspect "$name" >/dev/null 2>&1; then
  echo "$name"
  exit
fi

work=$cache/work/node
rm -rf "$work"
mkdir -p "$work/kubernetes" "$work/kind"
go -C "$repository" run ./e2e/cluster/images -bin "$cache/bin" -debian "$debian" -o "$work/images.tar" "${versions[@]}"

cp "$here"/node/{Dockerfile,bridge.conflist} "$work/"
cp -r "$here/node/manifests" "$work/"
cp -r --no-preserve=mode,ownership "$kind/images/base/files/." "$work/kind/"
mkdir -p "$work/kind/kind"
printf %s "${versions[0]#*=}" >"$work/kind/kind/version"
cp "$cache"/bin/kubernetes/{kubeadm,kubelet,kubectl} "$work/kubernetes/"
ln "$debian" "$work/debian.tar"
echo images.tar >"$work/.dockerignore"
docker build -q -t "$name-base" "$work" >/dev/null

# As kind itself does: containerd runs for a moment, takes the images into its
# store, and the container becomes the image.
builder=temper-node-build
docker rm -f "$builder" >/dev/null 2>&1 || true
docker run -d --name "$builder" --security-opt seccomp=unconfined --entrypoint sleep "$name-base" infinity >/dev/null
docker exec -d "$builder" containerd --log-level error
wait_for 30 docker exec "$builder" ctr version
docker exec -i "$builder" ctr -n k8s.io images import --label=io.cri-containerd.pinned=pinned --all-platforms --no-unpack --digests - <"$work/images.tar" >/dev/null
docker exec "$builder" bash -c 'pkill -x containerd; while pgrep -x containerd; do sleep 0.1; done' >/dev/null
docker commit --change 'ENTRYPOINT ["/usr/local/bin/entrypoint","/sbin/init"]' "$builder" "$name" >/dev/null
docker rm -f "$builder" >/dev/null
rm -rf "$work"
echo "$name"
