#!/usr/bin/env bash
# Brings up the cluster of kind-config.yaml with a registry, Argo Workflows and
# Tekton in it; does nothing to one that is up. See README.md.
source "$(dirname "$0")/lib.sh"

"$here/docker.sh" up
if [ -f "$ready" ] && running; then
  echo "the cluster is up already; go tool task down removes it"
  exit
fi
source=$(source_of_cluster)
echo "the cluster is made from: $source"
case $source in
modules)
  "$here/build.sh" kind
  image=$(timed "the node image" "$here/node.sh")
  ;;
internet)
  "$here/build.sh" kind argo
  image=kindest/node:$(version kubernetes k8s.io/kubernetes)
  ;;
*)
  echo "TEMPER_CLUSTER_FROM=$source: write modules or internet" >&2
  exit 2
  ;;
esac
if ! running; then
  cd "$repository" # where kind-config.yaml's paths begin
  timed "kind create cluster" kind create cluster -q --config "$repository/kind-config.yaml" --image "$image" --wait 180s
fi
if [ "$source" = internet ]; then # the other way kubectl was built with the rest
  mkdir -p "$cache/bin/kubernetes"
  docker cp "$node:/usr/bin/kubectl" "$cache/bin/kubernetes/kubectl"
fi
timed "all that is installed" "$here/install.sh" "$source"
touch "$ready"
echo "KUBECONFIG=$KUBECONFIG"
