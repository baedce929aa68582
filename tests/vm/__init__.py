"""A node in a virtual machine: systemd, cgroup v2, AppArmor, current runtimes, the project installed on it."""
