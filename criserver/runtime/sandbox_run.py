"""RunPodSandbox: the pod's namespaces, network and files.

A pod has a process of its own only where its containers share a PID namespace, or where its handler runs sandbox
containers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import time
from collections.abc import Awaitable, Mapping

import structlog

from criserver import logs
from criserver.boot import boot_id
from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.model import NamespaceMode, PodConfig
from criserver.network import Attachment, PodNetwork, namespaces
from criserver.network.sysctls import belongs, sysctl_path
from criserver.oci import cri_annotations
from criserver.oci.infra_spec import build_infra
from criserver.runtime import (
    apparmor,
    cgroups,
    filesystems,
    host,
    process_records,
    sandbox_files,
    selinux,
    userns_access,
)
from criserver.runtime.container_log import log_directories
from criserver.runtime.lifecycle import SandboxState
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import network_pin, pin_pids, pod_facts
from criserver.runtime.records import Sandbox
from criserver.runtime.sandbox_stop import release
from criserver.telemetry import operations
from criserver.text import quoted
from snapshotter.tasks import both
from snapshotter.threads import in_thread

log = structlog.get_logger(__name__)

# The largest group ID that every kernel takes in net.ipv4.ping_group_range (ip-sysctl.rst, "ping_group_range").
_MAX_PING_GROUP = 2**31 - 1


async def run_sandbox(node: Node, config: PodConfig, sent: bytes, handler: str) -> str:
    """Make a pod sandbox and return its ID.

    ``sent`` is the request's PodSandboxConfig as it came. Raises AlreadyExistsError for a taken name,
    InvalidArgumentError for an unknown handler, FailedPreconditionError without a usable network configuration,
    UnavailableError while it is not known whether the runtime can have a user namespace; nothing is left behind by a
    failure.
    """
    runtime = node.handler(handler)
    features = node.features[runtime.name]
    if config.namespaces.user is not None and not features.user_namespaces:
        raise features.lacking(
            f"pod {config.namespace}/{config.name} asks for a user namespace, which runtime handler {runtime.name} or "
            "this kernel cannot give: it needs runc 1.2 or newer, and id-mapped mounts under overlay (Linux 5.19)"
        )
    cri_annotations.shm_size(config, runtime.pod_annotations)  # raises its error before anything is made
    name = config.full_name
    return await node.attempts.run(
        f"pod sandbox {name}", sent + handler.encode(), lambda: _run(node, config, sent, handler)
    )


async def _run(node: Node, config: PodConfig, sent: bytes, handler: str) -> str:
    sandbox_id, runtime = secrets.token_hex(32), node.handler(handler)
    logs.about(sandbox=sandbox_id)
    own_network = config.namespaces.network is not NamespaceMode.NODE
    sandbox = Sandbox(
        id=sandbox_id,
        config=config,
        sent=sent,
        handler=handler,
        state=SandboxState.CREATING,
        created_at=time.time_ns(),
        cgroup_parent=_cgroup_parent(node, config, sandbox_id),
        cgroup_owned=not config.cgroup_parent,
        runtime=runtime.name,
        selinux_level=selinux.pod_level(config.selinux, (s.selinux_level for s in node.records.sandboxes.values())),
        sandbox_container=runtime.sandbox_container,
        boot_id=boot_id(),
    )
    if own_network:
        attachment = node.network.attach_plan(_pod_network(node, sandbox), runtime.cni_conf_dir)
        sandbox = dataclasses.replace(sandbox, attachment=attachment.to_json())
    if sandbox.has_infra and not os.access(node.config.infra, os.X_OK):
        raise FailedPreconditionError(
            f"the pod needs a process of its own, and its program {node.config.infra} is not an executable; "
            "install catatonit or change [runtime] infra"
        )
    await node.records.add(sandbox)
    async with node.lock(sandbox_id):
        try:
            sandbox = await _set_up(node, sandbox)
        except BaseException:
            await undo(node, node.records.sandboxes[sandbox_id])
            raise
    log.info("pod sandbox runs", **sandbox.named, ips=sandbox.ips, seconds=logs.elapsed())
    return sandbox_id


async def undo(node: Node, sandbox: Sandbox, before: Awaitable[None] | None = None) -> bool:
    """Await ``before``, then undo the making of a sandbox. Returns whether nothing of it is left.

    If that fails, the sandbox is shown as not ready, and the kubelet stops and removes it.
    """
    try:
        if before is not None:
            await before
        await release(node, sandbox)
        await node.plugins.sandbox_removed(sandbox)
        await node.records.forget(sandbox)
    except Exception as e:
        log.exception("a pod sandbox that cannot be made cannot be undone either", sandbox=sandbox.id)
        await node.records.observe(sandbox.not_ready(f"it could not be made, and undoing that failed: {e}"))
        return False
    return True


async def _set_up(node: Node, sandbox: Sandbox) -> Sandbox:
    config, files = sandbox.config, node.sandbox_files_dir(sandbox.id)
    own_network = config.namespaces.network is not NamespaceMode.NODE
    label = selinux.pod_files(sandbox.selinux_level)
    if config.namespaces.user is not None:
        userns_access.update(node)
    sysctls = _sysctls(node, config)
    # Both at once: neither needs the other.
    _, pinned = await both(_write_files(node, sandbox, label), _make_namespaces(node, sandbox, sysctls))
    # Both at once: the infra process takes about as long as one CNI plugin. If one fails, the other is still awaited: a
    # start that was cancelled could leave a process that nothing knows of.
    infra = asyncio.create_task(_start_infra(node, sandbox)) if sandbox.has_infra else None
    network = asyncio.create_task(_connect(node, sandbox)) if own_network else None
    await asyncio.gather(*filter(None, (network, infra)), return_exceptions=True)
    if network is not None:
        sandbox = network.result()
        await namespaces.set_sysctls(pinned, sysctls)
        await asyncio.to_thread(sandbox_files.write_hosts, files, config, sandbox.ips, label)
    if infra is not None and infra.result().is_set():
        raise _infra_ended(node)
    await node.plugins.run_sandbox(sandbox)
    sandbox = await node.records.save(dataclasses.replace(sandbox, state=SandboxState.READY))
    if infra is not None and infra.result().is_set():
        # It ended while the record was written, when the sandbox was not yet ready.
        await node.records.observe(sandbox.not_ready("its own process has ended"))
    return sandbox


async def _write_files(node: Node, sandbox: Sandbox, label: str) -> None:
    config, size = sandbox.config, _shm_size(node, sandbox)

    def write() -> None:
        if config.log_directory:
            try:
                os.makedirs(config.log_directory, mode=0o755, exist_ok=True)
            except OSError as e:
                raise FailedPreconditionError(f"log_directory = {quoted(config.log_directory)}: {e.strerror}") from e
        sandbox_files.write(node.sandbox_files_dir(sandbox.id), node.sandbox_dir(sandbox.id), config, label, size)

    with operations.POD_FILES.timed():
        await in_thread(write, executor=log_directories)


async def _make_namespaces(node: Node, sandbox: Sandbox, sysctls: Mapping[str, str]) -> namespaces.PinnedNamespaces:
    config = sandbox.config
    own_network = config.namespaces.network is not NamespaceMode.NODE
    with operations.NAMESPACES.timed():
        return await namespaces.make(
            node.namespaces_dir(sandbox.id),
            net=own_network,
            net_pin=network_pin(node, sandbox.id),
            uts=own_network,
            ipc=config.namespaces.ipc is not NamespaceMode.NODE,
            hostname=sandbox_files.hostname(config) if own_network else "",
            sysctls=sysctls,
            defaults=_default_sysctls(node, config) if own_network else {},
            user=_user_mapping(config),
        )


async def _connect(node: Node, sandbox: Sandbox) -> Sandbox:
    def left(attachment: Attachment) -> None:
        node.records.observe(dataclasses.replace(sandbox, attachment=attachment.to_json()))

    attachment = await node.network.add(Attachment.from_json(sandbox.attachment), left)
    # Stored at once, so that CNI DEL is given the result of ADD whatever happens next. Nothing needs to wait for it.
    attached = dataclasses.replace(sandbox, attachment=attachment.to_json(), ips=attachment.ips)
    node.records.observe(attached)
    return attached


async def _start_infra(node: Node, sandbox: Sandbox) -> asyncio.Event:
    """Start the pod's own process, and pin the PID namespace that it holds; returns the event of its end."""
    directory = node.container_dir(sandbox.id)
    root = filesystems.make_directory(node, sandbox.id, sandbox.config)
    for name in ("proc", "dev"):
        os.mkdir(os.path.join(root, name), 0o755)
    with open(os.path.join(root, "infra"), "w"):
        pass
    document = build_infra(
        program=node.config.infra,
        rootfs=root,
        pod=pod_facts(node, sandbox),
        host=host.facts(),
        cgroups_path=cgroups.spec_path(sandbox.cgroup_parent, sandbox.id),
        apparmor_profile=await apparmor.default(),
        mount_label=selinux.pod_files(sandbox.selinux_level),
        sandbox=_annotations(node, sandbox) if sandbox.sandbox_container else None,
        sysctls=_sysctls(node, sandbox.config),
    )
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(document, f)
    process = process_records.of_infra(node, sandbox)
    with process.start_under_way():
        started = await process.start()
    if sandbox.config.namespaces.pid is NamespaceMode.POD:
        try:
            await asyncio.to_thread(pin_pids, node, sandbox.id, started.pid)
        except FileNotFoundError as e:
            raise _infra_ended(node) from e
    return process.exited


def _annotations(node: Node, sandbox: Sandbox) -> dict[str, str]:
    return cri_annotations.of_sandbox(sandbox.config, sandbox.id, node.handler(sandbox.runtime).pod_annotations)


def _infra_ended(node: Node) -> FailedPreconditionError:
    return FailedPreconditionError(f"the pod's infra process ended at once: is {node.config.infra} a catatonit?")


def _shm_size(node: Node, sandbox: Sandbox) -> int:
    """The size of the pod's /dev/shm in bytes."""
    asked = cri_annotations.shm_size(sandbox.config, node.handler(sandbox.runtime).pod_annotations)
    return node.config.pod_defaults.shm_size if asked is None else asked


def _sysctls(node: Node, config: PodConfig) -> dict[str, str]:
    """The pod's sysctls, and those of default_sysctls that it does not name and whose namespace it has for itself.

    Raises InvalidArgumentError for one in default_sysctls that belongs to no namespace.
    """
    defaults = node.config.pod_defaults.sysctls
    if not defaults:
        return dict(config.sysctls)
    own_network = config.namespaces.network is not NamespaceMode.NODE
    own = {
        "net": own_network,
        "uts": own_network,
        "ipc": config.namespaces.ipc is not NamespaceMode.NODE,
        "user": config.namespaces.user is not None,
    }
    try:
        paths = {sysctl_path(name, list(own)): value for name, value in defaults.items()}
    except InvalidArgumentError as e:
        raise InvalidArgumentError(f"runtime.default_sysctls of the configuration: {e}") from e
    kinds = [kind for kind, wanted in own.items() if wanted]
    named = {sysctl_path(name, list(own)) for name in config.sysctls}
    return {p: v for p, v in paths.items() if p not in named and belongs(p, kinds)} | dict(config.sysctls)


def _default_sysctls(node: Node, config: PodConfig) -> dict[str, str]:
    """The sysctls of a pod's network namespace that the configuration asks for, by their paths."""
    defaults = {}
    if node.config.enable_unprivileged_ports:
        defaults["net/ipv4/ip_unprivileged_port_start"] = "0"
    if node.config.enable_unprivileged_icmp:
        # The kernel takes only group IDs that the pod's user namespace has.
        user = config.namespaces.user
        last = _MAX_PING_GROUP if user is None else min(user.gids.length - 1, _MAX_PING_GROUP)
        defaults["net/ipv4/ping_group_range"] = f"0 {last}"
    return defaults


def _user_mapping(config: PodConfig) -> namespaces.UserMapping | None:
    user = config.namespaces.user
    return None if user is None else namespaces.UserMapping((user.uids,), (user.gids,))


def _cgroup_parent(node: Node, config: PodConfig, sandbox_id: str) -> str:
    driver = node.config.cgroup_driver
    if config.cgroup_parent:
        return cgroups.checked_parent(driver, config.cgroup_parent)
    return cgroups.own_parent(driver, sandbox_id)


def _pod_network(node: Node, sandbox: Sandbox) -> PodNetwork:
    config = sandbox.config
    return PodNetwork(
        sandbox_id=sandbox.id,
        netns=network_pin(node, sandbox.id),
        name=config.name,
        namespace=config.namespace,
        uid=config.uid,
        port_mappings=config.port_mappings,
        annotations=config.annotations,
        dns_servers=config.dns.servers,
        dns_searches=config.dns.searches,
        dns_options=config.dns.options,
        cgroup_parent=cgroups.pod_path(sandbox.cgroup_parent),
    )
