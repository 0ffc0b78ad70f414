#!/usr/bin/env bash
# build.sh MODULE...: build the programs that modules/MODULE/go.mod names as its
# tools, static, into the cache; $cache/bin/MODULE leads to them. A module whose
# inputs are unchanged is not built again.
source "$(dirname "$0")/lib.sh"

# What the linker writes into a program: its version.
ldflags() {
  local version
  case $1 in
  kubernetes)
    version=$(version kubernetes k8s.io/kubernetes)
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
      echo "-X $package.gitVersion=$version -X $package.gitMajor=1 -X $package.gitMinor=$(cut -d. -f2 <<<"$version")"
      echo "-X $package.gitTreeState=clean -X $package.gitCommit=$(printf '0%.0s' {1..40}) -X $package.buildDate=1970-01-01T00:00:00Z"
    done
    ;;
  argo)
    version=$(version argo $argo)
    echo "-X $argo.version=$version -X $argo.gitTag=$version -X $argo.gitTreeState=clean"
    ;;
  esac
}

# Argo Workflows' module does not build as it is: signal_linux.go is a symbolic
# link in git, and module archives drop links; the page of the server that the
# command line holds is not in git at all. So build a copy with both, named by a
# go.mod beside it.
argo=github.com/argoproj/argo-workflows/v3
patch_argo() {
  local into=$1
  cp -r --no-preserve=mode "$(go -C "$here/modules/argo" mod download -json $argo | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')" "$into/source"
  cp "$into"/source/workflow/executor/osspecific/signal_{darwin,linux}.go
  mkdir -p "$into/source/ui/dist/app"
  echo "This build has no user interface." >"$into/source/ui/dist/app/index.html"
  cp "$here/modules/argo/go.mod" "$here/modules/argo/go.sum" "$into/"
  go mod edit -replace "$argo=$into/source" "$into/go.mod"
}

build() {
  local module=$1 from=$here/modules/$1 out modfile=() parts
  out=$cache/built/$module-$(hash_of "$from" "$here/build.sh" "$(go version)")
  if [ ! -d "$out" ]; then
    rm -rf "$out.part"
    mkdir -p "$out.part"
    if [ "$module" = argo ]; then
      parts=$cache/work/argo # always the same folder: Go's cache knows its content
      rm -rf "$parts"
      mkdir -p "$parts"
      patch_argo "$parts"
      modfile=(-modfile "$parts/go.mod")
    fi
    go -C "$from" build "${modfile[@]}" -buildvcs=false -trimpath -ldflags "-s -w $(ldflags "$module" | tr '\n' ' ')" -o "$out.part/" tool
    if [ "$module" = etcd ]; then mv "$out.part/server" "$out.part/etcd"; fi
    if [ "$module" = kubernetes ]; then # the one C program: it holds a pod's namespaces open
      ${CC:-cc} -Os -static -s -DVERSION=3.10 -o "$out.part/pause" "$(go -C "$from" list -m -f '{{.Dir}}' k8s.io/kubernetes)/build/pause/linux/pause.c"
    fi
    mv "$out.part" "$out"
    rm -rf "$cache/work/argo"
  fi
  ln -sfn "$out" "$cache/bin/$module"
}

for module in "$@"; do timed "built $module" build "$module"; done
