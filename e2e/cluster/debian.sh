#!/usr/bin/env bash
# A Debian root file system as one archive in the cache: the base of the node
# image (kind's packages) and of the images that need more than one static
# program. Prints the archive's path.
source "$(dirname "$0")/lib.sh"

packages=(systemd systemd-sysv dbus conntrack iptables nftables iproute2 ethtool socat util-linux mount kmod
  libseccomp2 pigz e2fsprogs bash ca-certificates curl jq procps containerd runc containernetworking-plugins
  netbase hostname tini git)

archive=$cache/built/debian-$(hash_of "$here/debian.sh").tar
if [ ! -f "$archive" ]; then
  root=$cache/work/debian
  rm -rf "$root"
  mkdir -p "$(dirname "$archive")" "$cache/work"
  debootstrap --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" bookworm "$root" >"$cache/debootstrap.log" 2>&1 ||
    { tail -5 "$cache/debootstrap.log" >&2; exit 1; }
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale} "$root"/debootstrap "$root"/var/log/*
  find "$root/dev" -mindepth 1 -delete # the container runtime makes its own
  tar -C "$root" --numeric-owner --sort=name --mtime=@0 -cf "$archive.part" .
  mv "$archive.part" "$archive"
  rm -rf "$root"
fi
echo "$archive"
