#!/usr/bin/env bash
# install.sh SOURCE: put the registry, Argo Workflows, and Tekton Pipelines and
# Triggers into the running cluster, and wait until they work.
source "$(dirname "$0")/lib.sh"
source=$1

# apply [FLAG...] tries again: a webhook that is ready is not at once to be reached.
apply() {
  local manifests
  manifests=$(mktemp)
  cat >"$manifests"
  wait_for 60 kubectl apply --server-side --force-conflicts "$@" -f "$manifests"
  rm "$manifests"
}
ready() { kubectl -n "$1" rollout status deployment --timeout=300s >/dev/null; }
# join FILE...: as one stream of YAML documents.
join() { for file in "$@"; do printf -- '---\n' && cat "$file" && echo; done; }
dir() { go -C "$here/modules/$1" mod download -json "$2" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'; }

registry() {
  local version
  version=$(version registry github.com/distribution/distribution/v3)
  sed "s/image: registry .*/image: registry:${version#v}/" "$here/registry.yaml" | apply
  # The node reaches the registry by its cluster name through the node port.
  docker exec -i "$node" sh -c 'd=/etc/containerd/certs.d/registry.registry.svc.cluster.local:5000; mkdir -p $d; cat >$d/hosts.toml' <<'EOF'
[host."http://127.0.0.1:30500"]
  capabilities = ["pull", "resolve"]
EOF
  ready registry
}

# volumes for claims: kind's own node image has something that makes them.
volumes() {
  local n
  for n in {1..12}; do
    docker exec "$node" mkdir -p -m 777 "/var/local/volume-$n"
    cat <<EOF
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: volume-$n}
spec:
  storageClassName: standard
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: /var/local/volume-$n}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/os, operator: In, values: [linux]}]}]}}
EOF
  done | apply
}

argo() {
  local version manifests=$cache/work/argo-manifests
  version=$(version argo github.com/argoproj/argo-workflows/v3)
  kubectl create namespace argo --dry-run=client -o yaml | apply
  if [ "$source" = internet ]; then
    curl -fsSL "https://github.com/argoproj/argo-workflows/releases/download/$version/install.yaml" | apply -n argo
  else
    rm -rf "$manifests"
    mkdir -p "$manifests"
    cp -r --no-preserve=mode "$(dir argo github.com/argoproj/argo-workflows/v3)/manifests/." "$manifests/"
    # Without the server: its image would hold no page.
    cat >"$manifests/kustomization.yaml" <<EOF
namespace: argo
resources: [base/crds/full, cluster-install-no-crds]
images: [{name: quay.io/argoproj/workflow-controller, newTag: $version}]
patches:
  - target: {kind: Deployment, name: argo-server}
    patch: '{\$patch: delete, apiVersion: apps/v1, kind: Deployment, metadata: {name: argo-server}}'
  - target: {kind: Deployment, name: workflow-controller}
    patch: |-
      - {op: replace, path: /spec/template/spec/containers/0/args, value: [--executor-image, "quay.io/argoproj/argoexec:$version", --executor-image-pull-policy, IfNotPresent]}
EOF
    kubectl kustomize "$manifests" | apply
    rm -rf "$manifests"
  fi
  # It looks at a workflow again after 10 s by default: the time of a short step. The
  # rest is what docs/kubernetes.md tells to set.
  kubectl -n argo set env deployment/workflow-controller DEFAULT_REQUEUE_TIME=1s \
    CACHE_GC_PERIOD=1h CACHE_GC_AFTER_NOT_HIT_DURATION=720h >/dev/null
  ready argo
}

tekton() {
  local pipeline triggers P T
  pipeline=$(version tekton github.com/tektoncd/pipeline)
  triggers=$(version triggers github.com/tektoncd/triggers)
  if [ "$source" = internet ]; then
    local releases=https://infra.tekton.dev/tekton-releases
    curl -fsSL "$releases/pipeline/previous/$pipeline/release.yaml" | apply
    ready tekton-pipelines
    curl -fsSL "$releases/triggers/previous/$triggers/release.yaml" "$releases/triggers/previous/$triggers/interceptors.yaml" | apply
  else
    P=$(dir tekton github.com/tektoncd/pipeline)/config
    T=$(dir triggers github.com/tektoncd/triggers)/config
    join "$P"/100-namespace/*.yaml "$P"/300-crds/*.yaml "$T"/300*.yaml | apply
    wait_for 60 kubectl wait --for=condition=Established crd --all --timeout=60s # fails where one is just being made
    # Images by the names that images/ gives them; every version "devel" is a
    # release's to fill in; tini is where Debian has it.
    join "$P"/2*.yaml "$P"/500-webhooks.yaml "$P"/clusterrole-*.yaml "$P"/config-*.yaml "$P"/{controller,events,webhook}.yaml "$P"/resolvers/*.yaml |
      sed -E "s#ko://github.com/tektoncd/pipeline/cmd/([a-z]+)#localhost/tekton/\1:$pipeline#g; s#/sbin/tini#/usr/bin/tini#; s#(release|version): \"?devel\"?#\1: \"$pipeline\"#" | apply
    ready tekton-pipelines
    join "$T"/2*.yaml "$T"/500*.yaml "$T"/clusterrole-*.yaml "$T"/config-*.yaml "$T"/controller*.yaml "$T"/webhook*.yaml "$T"/interceptors/*.yaml |
      sed -E "s#ko://github.com/tektoncd/triggers/cmd/([a-z]+)#localhost/triggers/\1:$triggers#g; s#(release|version): \"?devel\"?#\1: \"$triggers\"#" | apply
  fi
  ready tekton-pipelines
  ready tekton-pipelines-resolvers
  # The interceptors write their certificate here some time after they start; an
  # EventListener that is made before fails.
  wait_for 120 sh -c 'kubectl get clusterinterceptor cel github -o jsonpath="{range .items[*]}{.spec.clientConfig.caBundle}{\"\n\"}{end}" | awk "NF{n++} END{exit n!=2}"'
}

if [ "$source" = modules ]; then volumes; fi
timed "Argo Workflows" argo & # most of it is waiting
argo=$!
timed "the registry" registry
timed "Tekton" tekton
wait $argo
