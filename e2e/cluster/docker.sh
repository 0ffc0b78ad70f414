#!/usr/bin/env bash
# docker.sh up: a Docker daemon: the one that answers, or else one of our own,
# with its data in the cache. docker.sh down: end our own, and take away what it
# put into the machine's network.
source "$(dirname "$0")/lib.sh"

state=$cache/docker # of our own daemon: there while it runs
outward() { ip route show default | awk '{print $5; exit}'; }

up() {
  if docker info >/dev/null 2>&1; then return; fi
  if ! command -v dockerd >/dev/null; then
    echo "no Docker daemon answers and there is none to start; on Debian: apt-get install docker.io debootstrap iptables iproute2" >&2
    exit 1
  fi
  mkdir -p "$state"
  iptables -S FORWARD | head -1 >"$state/forward"
  cat /proc/sys/net/ipv4/ip_forward >"$state/ip_forward"
  local runtime=()
  # Some hosts withhold CAP_SYS_RESOURCE, and a privileged container asks for it
  # all the same: see runc-without-resource.
  if ! capsh_has 24; then
    runtime=(--add-runtime "limited=$here/runc-without-resource" --default-runtime limited)
  fi
  setsid dockerd --data-root "$cache/docker-data" --exec-root "$state/run" --pidfile "$state/pid" --log-level warn "${runtime[@]}" >"$state/log" 2>&1 </dev/null &
  disown
  wait_for 60 docker info
  # A cluster's addresses mean nothing outside this machine: nothing that is
  # sent to them may leave it, and nothing that a container sends.
  local out
  out=$(outward)
  if [ -n "$out" ]; then
    for net in 10.96.0.0/16 10.244.0.0/16; do iptables -I OUTPUT -o "$out" -d $net -m comment --comment temper -j REJECT; done
    if [ "$(source_of_cluster)" = modules ]; then
      iptables -I DOCKER-USER -o "$out" -m comment --comment temper -j REJECT
    fi
  fi
}

# capsh_has BIT: whether a capability is in this process's bounding set.
capsh_has() { (((16#$(awk '/^CapBnd/{print $2}' /proc/self/status) >> $1) & 1)); }

down() {
  [ -f "$state/pid" ] || return 0
  docker network prune -f >/dev/null
  local pid
  pid=$(cat "$state/pid")
  kill "$pid"
  wait_for 60 bash -c "! kill -0 $pid 2>/dev/null"
  ip link delete docker0 2>/dev/null || true
  iptables-save | grep -vE 'DOCKER|docker0|br-[0-9a-f]{12}|--comment temper' | iptables-restore
  local policy
  policy=$(awk '{print $3}' "$state/forward")
  iptables -P FORWARD "${policy:-ACCEPT}"
  cat "$state/ip_forward" >/proc/sys/net/ipv4/ip_forward
  rm -rf "$state"
  # Its cgroups, which are empty by now.
  find /sys/fs/cgroup -depth -type d \( -name docker -o -path '*/docker/*' \) -exec rmdir {} \; 2>/dev/null || true
  local left
  left=$(
    pgrep -af "$state/" || true
    iptables-save | grep -E 'DOCKER|docker0|--comment temper' || true
    ip -o link show type bridge | grep -E ' (docker0|br-[0-9a-f]{12}):' || true
    find /sys/fs/cgroup -type d \( -name docker -o -path '*/docker/*' \)
  )
  [ -z "$left" ] || { printf 'left behind:\n%s\n' "$left" >&2 && exit 1; }
}

"$1"
