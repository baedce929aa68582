#!/bin/sh
# Unpacks a newer criu for the tests into a directory, if the installed one does not work with this kernel. It comes from
# Debian's next suite. Without a mirror nothing is done, and tests of dumps are skipped.
set -eu
directory=$1
next=trixie

criu check >/dev/null 2>&1 && exit 0
"$directory/criu" check >/dev/null 2>&1 && exit 0
mirror=$(apt-get indextargets --format '$(CREATED_BY) $(COMPONENT) $(CODENAME) $(REPO_URI)' |
	sed -n "s/^Packages main $(. /etc/os-release && echo "$VERSION_CODENAME") //p" | head -n 1)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/lists/partial" "$scratch/archives/partial"
: >"$scratch/status"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $next main" >"$scratch/sources.list"
cat >"$scratch/apt.conf" <<END
Dir::Etc::SourceList "$scratch/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "$scratch/lists";
Dir::State::Status "$scratch/status";
Dir::Cache "$scratch";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "0";
Acquire::http::Timeout "10";
END
export APT_CONFIG="$scratch/apt.conf"
echo "unpacking the criu of $next for the tests"
if ! { apt-get update -qq && apt-get install -qq -y --no-install-recommends --download-only criu >/dev/null; }; then
	echo "no newer criu can be downloaded; tests of dumps are skipped" >&2
	exit 0
fi
rm -rf "$directory"
mkdir -p "$directory/root"
for package in "$scratch"/archives/*.deb; do
	dpkg-deb --extract "$package" "$directory/root"
done
root=$(realpath "$directory/root")
loader=$(find "$root/usr/lib" -name 'ld-linux-*.so.*' -type f | head -n 1)
cat >"$directory/criu" <<END
#!/bin/sh
exec $loader --library-path ${loader%/*} $root/usr/sbin/criu "\$@"
END
chmod 755 "$directory/criu"
