#!/bin/sh
# Unpacks Debian's containerd for the benchmark into a directory, if there is none on PATH. It is not installed, because the
# package would start a service.
set -eu
directory=$1

command -v containerd >/dev/null && exit 0
[ -x "$directory/usr/bin/containerd" ] && exit 0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo "unpacking Debian's containerd for the benchmark"
apt-get update -qq
(cd "$scratch" && apt-get download -qq -o APT::Sandbox::User=root containerd)
mkdir -p "$directory"
dpkg-deb --extract "$scratch"/containerd_*.deb "$directory"
