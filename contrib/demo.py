#!/usr/bin/env python3
"""The life of a pod on this machine, without a registry: image, pod, network, log, exec, removal.

Run it as root. All files are in a scratch directory on a tmpfs, which is removed at the end.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any

import grpc

from criserver.pb.runtime.v1 import api_pb2 as cri

BRIDGE = "cridemo0"
IMAGE = "localhost/demo:latest"
SCRIPT = "echo hello from $(hostname); ip -4 -o addr show eth0 | awk '{print $4}'; exec sleep 1000"


def main() -> None:
    """Run the demonstration. The clean-up happens also after an error."""
    base = tempfile.mkdtemp(prefix="criserver-demo-", dir="/run")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "criserver-demo", base], check=True)
    daemon = None
    try:
        write_configuration(base)
        say("starting the daemon", f"criserver serve --config {base}/config.toml")
        daemon = subprocess.Popen([sys.executable, "-m", "criserver", "serve", "--config", f"{base}/config.toml"])
        with grpc.insecure_channel(f"unix:{base}/criserver.sock") as channel:
            run_pod(base, channel)
    finally:
        if daemon is not None:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, stderr=subprocess.DEVNULL)
        left = leftovers(base)
        if left:  # of a pod that was not removed because of an earlier failure
            command = [sys.executable, "-m", "criserver", "reset", "--yes", "--grace", "0"]
            subprocess.run([*command, "--config", f"{base}/config.toml"], check=False)
        subprocess.run(["umount", base], check=True)
        os.rmdir(base)
    say("what is left", "\n".join(left) or "nothing: no mount, namespace, link, cgroup or process")
    sys.exit(1 if left else 0)


def run_pod(base: str, channel: grpc.Channel) -> None:
    """One pod with one container, from its image to its removal."""
    version = call(channel, "Version", cri.VersionRequest(), cri.VersionResponse, ready=True)
    say("serving", f"{version.runtime_name} {version.runtime_version}, CRI {version.runtime_api_version}")

    build_image(f"{base}/demo.tar")
    command = [sys.executable, "-m", "criserver", "image", "import", "--config", f"{base}/config.toml"]
    printed = subprocess.run([*command, f"{base}/demo.tar"], check=True, capture_output=True, text=True).stdout
    say("an image of this host's busybox, imported", printed.strip())

    pod = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="demo", namespace="default", uid="demo-1"),
        hostname="demo",
        log_directory=f"{base}/logs",
        linux=cri.LinuxPodSandboxConfig(
            security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.CONTAINER))
        ),
    )
    began = time.monotonic()
    request = cri.RunPodSandboxRequest(config=pod)
    sandbox = call(channel, "RunPodSandbox", request, cri.RunPodSandboxResponse).pod_sandbox_id
    took = time.monotonic() - began
    status = call(
        channel, "PodSandboxStatus", cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox), cri.PodSandboxStatusResponse
    ).status
    say(f"a pod on a bridge network, in {took * 1000:.0f} ms", f"{sandbox[:13]}  {status.network.ip}")

    container = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="hello"),
        image=cri.ImageSpec(image=IMAGE),
        command=["sh", "-c", SCRIPT],
        log_path="hello.log",
    )
    began = time.monotonic()
    create = cri.CreateContainerRequest(pod_sandbox_id=sandbox, config=container, sandbox_config=pod)
    container_id = call(channel, "CreateContainer", create, cri.CreateContainerResponse).container_id
    start = cri.StartContainerRequest(container_id=container_id)
    call(channel, "StartContainer", start, cri.StartContainerResponse)
    say(f"a container, created and started in {(time.monotonic() - began) * 1000:.0f} ms", container_id[:13])

    say("its log", lines_of(f"{base}/logs/hello.log", 2))

    ask = cri.ExecSyncRequest(container_id=container_id, cmd=["ps", "-o", "pid,user,args"], timeout=10)
    answer = call(channel, "ExecSync", ask, cri.ExecSyncResponse)
    say("an exec in it: ps", answer.stdout.decode().rstrip())

    call(channel, "StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=sandbox), cri.StopPodSandboxResponse)
    call(channel, "RemovePodSandbox", cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox), cri.RemovePodSandboxResponse)
    say("the pod", "stopped and removed")


def lines_of(path: str, count: int) -> str:
    """The text of a log once it has so many lines, or what it has after ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        with open(path) as log:
            text = log.read().rstrip()
        if text.count("\n") + 1 >= count or time.monotonic() > deadline:
            return text
        time.sleep(0.01)


def call(channel: grpc.Channel, rpc: str, request: Any, response: Any, ready: bool = False) -> Any:
    """One call of CRI's RuntimeService. With ``ready`` it waits until the daemon serves."""
    method = channel.unary_unary(
        f"/runtime.v1.RuntimeService/{rpc}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=response.FromString,
    )
    return method(request, timeout=60, wait_for_ready=ready)


def write_configuration(base: str) -> None:
    """A configuration below ``base``, with a bridge network of its own."""
    os.makedirs(f"{base}/net.d")
    with open(f"{base}/config.toml", "w") as f:
        f.write(f'root = "{base}/root"\nstate = "{base}/state"\n[grpc]\naddress = "{base}/criserver.sock"\n')
        f.write(f'[cni]\nconf_dir = "{base}/net.d"\n[log]\nlevel = "warning"\n')
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.214.0.0/24"}]], "dataDir": f"{base}/ipam"}
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipam": ipam}
    with open(f"{base}/net.d/10-demo.conflist", "w") as f:
        json.dump({"cniVersion": "1.0.0", "name": "demo", "plugins": [bridge]}, f)


def build_image(path: str) -> None:
    """A docker-archive of one layer: the host's static busybox and a link for each of its applets."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name in ("bin", "proc", "sys", "dev", "etc", "tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        tar.add(shutil.which("busybox") or "/bin/busybox", "bin/busybox")
        for applet in subprocess.run(["busybox", "--list"], check=True, capture_output=True, text=True).stdout.split():
            if applet != "busybox":
                entry = tarfile.TarInfo(f"bin/{applet}")
                entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(entry)
    import hashlib

    diff_id = "sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    members = {
        "config.json": json.dumps(config).encode(),
        "layer.tar": layer.getvalue(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def leftovers(base: str) -> list[str]:
    """Mounts below ``base``, cgroups, links and processes that are still there."""
    with open("/proc/self/mountinfo") as f:
        found = ["mount " + line.split()[4] for line in f if f" {base}/" in line]
    found += [
        f"cgroup {d}" for h in os.listdir("/sys/fs/cgroup") if os.path.isdir(d := f"/sys/fs/cgroup/{h}/criserver")
    ]
    found += [f"link {name}" for name in os.listdir("/sys/class/net") if name == BRIDGE]
    found += [f"namespace {base}/state/ns/{name}" for name in os.listdir(f"{base}/state/ns")]
    listing = subprocess.run(["ps", "-eo", "pid,args"], check=True, capture_output=True, text=True).stdout
    return found + [line for line in listing.splitlines() if base in line]


def say(what: str, details: str) -> None:
    """Print one step."""
    print(f"\n== {what}")
    for line in details.splitlines():
        print(f"   {line}", flush=True)


if __name__ == "__main__":
    main()
