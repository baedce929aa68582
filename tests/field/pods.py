"""Users, pods, devices and updates."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from typing import Any

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.field import REFUSED, Field, FieldCase, security
from tests.support.imagebuilder import busybox_image

PASSWD = b"root:x:0:0::/root:/bin/sh\nme:x:1000:100::/:/bin/sh\n"
GROUP = b"root:x:0:\nusers:x:100:\nstaff:x:50:me\n"
MIB = 1 << 20


def user(text: str, group: bytes = GROUP) -> Callable[[Field], str]:
    """The IDs in a container of an image with this ``USER``."""

    def ids(field: Field) -> str:
        layers = [{"etc/passwd": PASSWD, "etc/group": group}]
        image = field.pull(busybox_image(layers=layers, config={"User": text}))
        return field.run(image, ["sh", "-c", "echo $(id -u):$(id -g), groups $(id -G)"])

    return ids


def selinux(field: Field) -> str:
    context = cri.LinuxContainerSecurityContext(selinux_options=cri.SELinuxOption(level="s0:c0,c1"))
    linux = cri.LinuxContainerConfig(security_context=context)
    return "runs" if field.run(command=["echo", "ran"], linux=linux) == "ran" else "does not run"


def huge_pages(field: Field) -> str:
    limits = [cri.HugepageLimit(page_size="16GB", limit=1 << 34)]
    linux = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(hugepage_limits=limits))
    return "runs" if field.run(command=["echo", "ran"], linux=linux) == "ran" else "does not run"


def capability(field: Field) -> str:
    context = cri.LinuxContainerSecurityContext(capabilities=cri.Capability(add_capabilities=["NONE_OF_THIS_KERNEL"]))
    linux = cri.LinuxContainerConfig(security_context=context)
    return "runs" if field.run(command=["echo", "ran"], linux=linux) == "ran" else "does not run"


def sysctls(*names: str, given: Mapping[str, str] | None = None) -> Callable[[Field], str]:
    """The values in a pod with these sysctls."""
    files = " ".join(f"/proc/sys/{name.replace('.', '/')}" for name in names)

    def read(field: Field) -> str:
        pod = field.node.run_pod(field.name, linux=security(sysctls=given))
        return field.run(pod=pod, command=["sh", "-c", f"cat {files} | tr '\\t\\n' ' '"])

    return read


def low_port(field: Field) -> str:
    context = cri.LinuxContainerSecurityContext(
        run_as_user=cri.Int64Value(value=1000), capabilities=cri.Capability(drop_capabilities=["ALL"])
    )
    linux = cri.LinuxContainerConfig(security_context=context)
    pod = field.node.run_pod(field.name)
    # httpd binds the port and then goes to the background; it fails with "Permission denied" without the right to it.
    return field.run(pod=pod, command=["sh", "-c", "httpd -p 80 && echo listens"], linux=linux)


def device_directory(field: Field) -> str:
    path = field.file
    os.makedirs(f"{path}/below")
    for name in ("one", "below/two"):
        os.mknod(f"{path}/{name}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    device = cri.Device(container_path="/dev/many", host_path=path, permissions="rwm")
    return field.run(command=["sh", "-c", "cd /dev/many && echo $(find . -type c | sort)"], devices=[device])


def limited(memory: int, **more: Any) -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(memory_limit_in_bytes=memory, **more))


def update_exited(field: Field) -> str:
    node = field.node
    container = node.run(node.run_pod(field.name), "c", ["true"], image="localhost/busybox:latest")
    node.wait(container)
    node.client.UpdateContainerResources(container_id=container, linux=cri.LinuxContainerResources(cpu_shares=512))
    return "updated"


def swap_limit(field: Field) -> str:
    node = field.node
    container = node.create(node.run_pod(field.name), "c", ["sleep", "60"], linux=limited(64 * MIB))
    node.client.StartContainer(container_id=container)
    return f"{node.status(container).resources.linux.memory_swap_limit_in_bytes // MIB} MiB"


def shown_image(field: Field) -> str:
    """A kubelet pulls a pod's image, and names it by its ID. Another pod has the same image by another name."""
    node, ids = field.node, set()
    built = busybox_image(config={"Labels": {"of": "two names"}})
    names = [field.pull(built) for _ in range(2)]
    pod = node.run_pod(field.name)
    for number, name in enumerate(names):
        image = node.client.ImageStatus(image=cri.ImageSpec(image=name)).image.id
        ids.add(image)
        container = node.create(pod, f"c{number}", ["true"], image=image, user_specified_image=name)
        shown = node.status(container).image.image
        if shown != name:
            return "another name" if shown in names else shown
    return "the pod's name" if len(ids) == 1 else "two images"


def shown_by_id(field: Field) -> str:
    """A kubelet before 1.30 does not say what the pod calls the image."""
    name = field.pull(busybox_image(config={"Labels": {"of": "one name"}}))
    image = field.node.client.ImageStatus(image=cri.ImageSpec(image=name)).image.id
    container = field.node.create(field.node.run_pod(field.name), "c", ["true"], image=image)
    shown = field.node.status(container).image.image
    return "the image's name" if shown == name else shown


def below_use(field: Field) -> str:
    """A limit of 4 MiB for a container that has 32 MiB in its /dev/shm."""
    node = field.node
    script = "head -c 33554432 /dev/zero >/dev/shm/file && echo ready && sleep 60"
    container = node.run(node.run_pod(field.name), "c", ["sh", "-c", script], linux=limited(64 * MIB))
    node.sh(container, "until [ $(stat -c %s /dev/shm/file 2>/dev/null || echo 0) = 33554432 ]; do sleep 0.01; done")
    resources = cri.LinuxContainerResources(memory_limit_in_bytes=4 * MIB)
    node.client.UpdateContainerResources(container_id=container, linux=resources)
    return "updated" if node.status(container).state == cri.CONTAINER_RUNNING else "killed"


def host_ipc(field: Field) -> str:
    options = cri.NamespaceOption(pid=cri.CONTAINER, ipc=cri.NODE)
    pod = field.node.run_pod(field.name, linux=security(options))
    options_of = "awk '$2 == \"/dev/shm\" {print $4}' /proc/self/mounts"
    inside = set(field.run(pod=pod, command=["sh", "-c", options_of]).split(","))
    with open("/proc/self/mounts") as f:
        outside = next(set(line.split()[3].split(",")) for line in f if line.split()[1] == "/dev/shm")
    flags = {"ro", "nosuid", "nodev", "noexec"}
    return "the node's options" if inside & flags == outside & flags else "other options"


def node_sysctl(field: Field) -> str:
    field.node.run_pod(field.name, linux=security(sysctls={"kernel.panic": "10"}))
    return "set"


def not_utf8(field: Field) -> str:
    """The value of a variable is bytes in CRI since Kubernetes 1.36."""
    value = cri.KeyValue(key="A", value=b"\xff")
    return field.run(command=["sh", "-c", 'printf %s "$A" | od -An -tx1'], envs=[value])


def linked_log(field: Field) -> str:
    node, name = field.node, field.name
    pod = node.run_pod(name)
    os.makedirs(f"{node.logs}/{name}", exist_ok=True)
    target = field.file
    os.symlink(target, f"{node.logs}/{name}/c.log")
    container = node.run(pod, "c", ["echo", "ran"])
    node.wait(container)
    return "writes to the link's target" if os.path.exists(target) else "runs"


PORTS = ("net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range")

CASES = (
    FieldCase(0, "`seLinuxOptions` on a node without SELinux", selinux, "runs", "runs"),
    FieldCase(
        9, "`USER me`", user("me"), "1000:100, groups 100 50", "1000:100, groups 100 50", "containerd/containerd#11607"
    ),
    FieldCase(0, "A limit for huge pages of a size that the node does not have", huge_pages, "runs", "runs"),
    FieldCase(
        0,
        "A capability that no kernel has",
        capability,
        REFUSED,
        "runs",
        differs="A capability whose name is not in capabilities(7)",
    ),
    FieldCase(9, "`USER 1000`", user("1000"), "1000:100, groups 100 50", "1000:100, groups 100 50"),
    FieldCase(9, "`USER me:staff`", user("me:staff"), "1000:50, groups 50", "1000:50, groups 50"),
    FieldCase(
        9, "`USER 1000:50`", user("1000:50"), "1000:50, groups 50", "1000:50, groups 50", "containerd/containerd#11607"
    ),
    FieldCase(9, "`USER 2000:staff`", user("2000:staff"), "2000:50, groups 50", "2000:50, groups 50"),
    FieldCase(9, "`USER me:`", user("me:"), "1000:0, groups 0 50", "1000:0, groups 0 50"),
    FieldCase(9, "`USER +1000`", user("+1000"), "1000:100, groups 100 50", "1000:100, groups 100 50"),
    FieldCase(9, "`USER 4294967294`", user("4294967294"), REFUSED, REFUSED),
    FieldCase(
        14,
        "A group of the image that is named like the user",
        user("me", b"me:x:70:me\nstaff:x:50:me\n"),
        "1000:100, groups 100 50 70",
        "1000:100, groups 100 50",
        differs="Supplementary groups of an image",
    ),
    FieldCase(
        10,
        "A user without capabilities listens on port 80",
        low_port,
        "listens",
        "listens",
        "kubernetes/kubernetes#102612, containerd/containerd#6924, cri-o/cri-o#10050",
    ),
    FieldCase(10, "The defaults of ports and ping", sysctls(*PORTS), "0 0 2147483647", "0 0 2147483647"),
    FieldCase(
        10,
        "A pod's own sysctl for ports",
        sysctls(PORTS[0], given={"net.ipv4.ip_unprivileged_port_start": "512"}),
        "512",
        "512",
    ),
    FieldCase(
        11,
        "`net.ipv4.conf.eth0.arp_ignore` of a pod",
        sysctls("net.ipv4.conf.eth0.arp_ignore", given={"net.ipv4.conf.eth0.arp_ignore": "1"}),
        "1",
        "1",
    ),
    FieldCase(
        11,
        "`net.core.somaxconn` of a pod that the plugin `tuning` sets too",
        sysctls("net.core.somaxconn", given={"net.core.somaxconn": "600"}),
        "600",
        "600",
    ),
    FieldCase(
        12,
        "A device that is a directory",
        device_directory,
        "./below/two ./one",
        "./below/two ./one",
        "containerd/nerdctl#2985, sylabs/singularity-cri#352",
    ),
    FieldCase(13, "An update of a container that has exited", update_exited, "updated", "updated", "k3s-io/k3s#3104"),
    FieldCase(13, "The swap limit in the status of a container with 64 MiB of memory", swap_limit, "64 MiB", "64 MiB"),
    FieldCase(
        13,
        "The image in the status of a container, if the image has two names",
        shown_image,
        "the pod's name",
        "another name",
        "kubernetes/kubernetes#51017, kubernetes/kubernetes#74081",
    ),
    FieldCase(
        13,
        "The image in the status of a container, from a kubelet before 1.30",
        shown_by_id,
        "the image's name",
        "the image's name",
    ),
    FieldCase(
        13,
        "`hostIPC` and the options of `/dev/shm`",
        host_ipc,
        "the node's options",
        "other options",
        "containerd/containerd#6911",
    ),
    FieldCase(
        13,
        "A memory limit below the present use",
        below_use,
        REFUSED,
        REFUSED,
        "opencontainers/runc#3509, kubernetes/kubernetes#129152",
        differs="A memory limit that is lowered below the present use",
    ),
    FieldCase(
        14,
        "A sysctl of the node",
        node_sysctl,
        REFUSED,
        REFUSED,
        differs="A sysctl of the node, or of a namespace that the pod shares with the node",
    ),
    FieldCase(
        14,
        "An environment variable that is not UTF-8",
        not_utf8,
        REFUSED,
        "ef bf bd",
        "kubernetes/kubernetes#139132",
        differs="An environment variable whose value is not UTF-8, or whose name is empty or has `=`",
    ),
    FieldCase(
        14,
        "A link at the place of a log",
        linked_log,
        REFUSED,
        "writes to the link's target",
        differs="A link below a pod's `log_directory` at the place of a log, or a file there that is not regular",
    ),
)
