"""The OCI runtime spec of a pod's own process, as a pure function.

It holds the pod's shared PID namespace. With a handler that runs sandbox containers it is the pod's sandbox container.
"""

from __future__ import annotations

from collections.abc import Mapping

from criserver.oci.spec_inputs import HostFacts, PodFacts, Spec
from criserver.oci.spec_namespaces import pod_namespaces


def build_infra(
    *,
    program: str,
    rootfs: str,
    pod: PodFacts,
    host: HostFacts,
    cgroups_path: str,
    apparmor_profile: str = "",
    mount_label: str = "",
    sandbox: Mapping[str, str] | None = None,
    sysctls: Mapping[str, str] | None = None,
) -> Spec:
    """The spec of the infra process. ``sandbox`` are the annotations of a sandbox container.

    It has no capabilities, and no files except its own program.

    It has no SELinux label of its own: a policy may forbid that a program of the node runs in a container's domain.
    """
    spec: Spec = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 65535, "gid": 65535},
            "args": ["/infra", "-P"],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
            "oomScoreAdj": max(-998, host.oom_score_adj_floor),
        },
        "root": {"path": rootfs, "readonly": True},
        "mounts": [
            {
                "destination": "/proc",
                "type": "proc",
                "source": "proc",
                "options": ["nosuid", "noexec", "nodev"],
            },
            {
                # The OCI runtime makes device nodes there. In a user namespace it may not write to the root directory.
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "noexec", "mode=755", "size=64k"],
            },
            {
                "destination": "/infra",
                "type": "bind",
                "source": program,
                "options": ["bind", "ro", "nosuid", "nodev"],
            },
        ],
        "linux": {
            "cgroupsPath": cgroups_path,
            "namespaces": [
                {"type": "pid"},
                {"type": "mount"},
                *pod_namespaces(pod),
            ],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
    }
    if sandbox is not None:
        # A guest kernel does not see what the pinned namespaces have. It takes the pod's name and sysctls from here.
        spec["annotations"] = dict(sandbox)
        spec["linux"]["sysctl"] = dict(sysctls or {})
        if pod.uts_namespace:
            spec["hostname"] = pod.hostname
    if apparmor_profile:
        spec["process"]["apparmorProfile"] = apparmor_profile
    if mount_label:
        spec["linux"]["mountLabel"] = mount_label
    return spec
