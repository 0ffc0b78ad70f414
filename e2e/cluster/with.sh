#!/usr/bin/env bash
# with.sh COMMAND...: run a command with the cluster's KUBECONFIG and tools
# (kubectl, argo, kind), such as: e2e/cluster/with.sh argo list -n temper
source "$(dirname "$0")/lib.sh"
exec "$@"
