"""What kubelets and their users ask of pods: debuggers, DNS options, profiles, the node's /dev."""

from __future__ import annotations

import json

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.field.pods import sysctls
from tests.support.field import Field, FieldCase


def debugger(field: Field) -> str:
    """`kubectl debug --profile=sysadmin`: the pod is described as privileged from then on."""
    pod = field.node.run_pod(field.name)
    described = field.node.pod(field.name)
    described.linux.security_context.privileged = True
    field.node.described[pod] = described
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(privileged=True))
    return field.run(pod=pod, command=["sh", "-c", "mount -t tmpfs x /tmp && echo mounts"], linux=linux)


def dns_options(field: Field) -> str:
    dns = cri.DNSConfig(servers=["10.0.0.10"], options=["single-request-reopen timeout:1", "ndots:5"])
    return field.run(
        pod=field.node.run_pod(field.name, dns_config=dns), command=["grep", "options", "/etc/resolv.conf"]
    )


def empty_rule(field: Field) -> str:
    """A seccomp profile with a rule for no system call, as a program that records profiles writes it."""
    path = field.file
    with open(path, "w") as f:
        json.dump({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [], "action": "SCMP_ACT_ERRNO"}]}, f)
    profile = cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref=path)
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(seccomp=profile))
    return "runs" if field.run(command=["echo", "ran"], linux=linux) == "ran" else "does not run"


def node_dev(field: Field) -> str:
    """Two containers of a pod, one of which has the node's /dev."""
    pod = field.node.run_pod(field.name)
    field.run(pod=pod, command=["touch", "/dev/shm/of-the-pod"])
    mount = cri.Mount(container_path="/dev", host_path="/dev")
    seen = field.run(pod=pod, command=["ls", "/dev/shm"], mounts=[mount])
    return "the pod's" if seen == "of-the-pod" else "the node's"


CASES = (
    FieldCase(15, "A privileged debugger in a pod that was not privileged", debugger, "mounts", "mounts"),
    FieldCase(
        15,
        "An option of a pod's DNS with several words",
        dns_options,
        "options single-request-reopen timeout:1 ndots:5",
        "options single-request-reopen timeout:1 ndots:5",
    ),
    FieldCase(15, "A rule of a seccomp profile that names no system call", empty_rule, "runs", "runs"),
    FieldCase(15, "`/dev/shm` of a container that has the node's `/dev`", node_dev, "the pod's", "the pod's"),
    FieldCase(
        15,
        "`kernel.domainname` of a pod",
        sysctls("kernel.domainname", given={"kernel.domainname": "example.org"}),
        "example.org",
        "example.org",
    ),
)
