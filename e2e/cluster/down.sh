#!/usr/bin/env bash
# Removes what up.sh made, except the cache.
source "$(dirname "$0")/lib.sh"

rm -f "$ready"
if docker info >/dev/null 2>&1; then
  if running; then docker rm -f -v "$node" >/dev/null; fi
  docker network rm kind >/dev/null 2>&1 || true
fi
"$here/docker.sh" down
rm -rf "$KUBECONFIG" "$cache/work"
