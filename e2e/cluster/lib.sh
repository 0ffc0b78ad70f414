# Settings, and the few functions that the scripts beside this one share.
# Sourced by each of them; bash.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
cache=${TEMPER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/temper}
export TEMPER_CACHE=$cache
cluster=temper
node=$cluster-control-plane
ready=$cache/ready # there while the cluster is up, with all that belongs in it
export KUBECONFIG=$cache/kubeconfig
export DOCKER_BUILDKIT=0 # Debian's Docker has no buildx
export CGO_ENABLED=0
export PATH=$cache/bin/kubernetes:$cache/bin/kind:$cache/bin/argo:$PATH:/usr/sbin:/sbin
mkdir -p "$cache/bin"

# version MODULE PACKAGE: the version of PACKAGE in modules/MODULE/go.mod, the
# one place where versions stand.
version() { go -C "$here/modules/$1" list -m -f '{{.Version}}' "$2"; }

# source of what the cluster is made of: "internet" (kind's published node
# image, released manifests and images) or "modules" (everything built from Go
# modules and Debian packages). TEMPER_CLUSTER_FROM decides; without it, whether
# the registries answer.
source_of_cluster() {
  if [ -n "${TEMPER_CLUSTER_FROM:-}" ]; then
    echo "$TEMPER_CLUSTER_FROM"
  elif curl -fsS -o /dev/null --max-time 10 "https://auth.docker.io/token?service=registry.docker.io&scope=repository:kindest/node:pull" 2>/dev/null &&
    curl -fsSL -o /dev/null --max-time 10 https://github.com/argoproj/argo-workflows/releases 2>/dev/null; then
    echo internet
  else
    echo modules
  fi
}

# hash of the content and names of files and folders, and of extra words.
hash_of() {
  local path
  for path in "$@"; do
    [ -e "$path" ] || { echo "$path" && continue; }
    (cd "$(dirname "$path")" && find "$(basename "$path")" -type f | LC_ALL=C sort | xargs sha256sum)
  done | sha256sum | cut -c1-12
}

# timed WHAT COMMAND...: run it and say how long it took.
timed() {
  local what=$1 start=$SECONDS
  shift
  "$@"
  echo "$what: $((SECONDS - start)) s" >&2
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { echo "gave up waiting for: $*" >&2; "$@"; return 1; }
    sleep 1
  done
}

running() { docker inspect "$node" >/dev/null 2>&1; }
