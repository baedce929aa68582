# Runs in the new root file system, at the host's speed: customize.sh MIRROR SUITE
mirror=$1 suite=$2
export DEBIAN_FRONTEND=noninteractive

# The newer suite's runtimes beside the stable suite's runc: crun as a package, since the stable suite's is not here;
# runc unpacked aside. Nothing else comes from there unless the stable suite has none of it.
echo "deb $mirror $suite main" >/etc/apt/sources.list.d/newer.list
printf 'Package: *\nPin: release n=%s\nPin-Priority: 1\n' "$suite" >/etc/apt/preferences.d/newer
apt-get update -q
apt-get install -q -y --no-install-recommends "crun/$suite"
cd /stage
apt-get download -q "runc/$suite"
mkdir -p /opt/newer
dpkg-deb -x runc_*.deb /opt/newer
rm -rf runc_*.deb /etc/apt/sources.list.d/newer.list /etc/apt/preferences.d/newer /var/lib/apt/lists/*
runc --version
crun --version
/opt/newer/usr/sbin/runc --version

# What runs the tests: the lock's wheels.
python3 -m venv /opt/tests
/opt/tests/bin/pip install -q --no-index --no-deps /stage/wheels/*.whl
rm -rf /stage/wheels

install -m 755 /stage/agent.py /usr/local/lib/vm-agent
install -m 644 /stage/vm-agent.service /etc/systemd/system/
systemctl enable vm-agent.service
systemctl mask getty@tty1.service serial-getty@ttyS0.service apt-daily.timer apt-daily-upgrade.timer \
	dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer man-db.timer docker-registry.service

# Most of the stable suite's AppArmor profiles are for programs that are not here; to compile them takes 8 s a boot.
find /etc/apparmor.d -maxdepth 1 -type f ! -name runc ! -name crun ! -name busybox -delete

echo node >/etc/hostname
echo '127.0.0.1 localhost node' >/etc/hosts
echo 'nameserver 10.0.2.3' >/etc/resolv.conf
echo 'tmpfs /tmp tmpfs mode=1777 0 0' >/etc/fstab
: >/etc/machine-id
printf '[Match]\nName=en* eth*\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\nIPv6AcceptRA=no\n' \
	>/etc/systemd/network/10-user.network
systemctl enable systemd-networkd.service
systemctl disable systemd-networkd-wait-online.service
mkdir -p /var/log/journal
rm -f /etc/dpkg/dpkg.cfg.d/99mmdebstrap # later packages come whole
rm -rf /stage
