"""CreateContainer: the container's files are written and mounted. Nothing runs yet."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import io
import os
import secrets
import signal
import stat
import time
from contextlib import suppress
from functools import partial
from typing import BinaryIO

import structlog

from criserver import logs
from criserver.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from criserver.images import Image, host_platform, references
from criserver.images.digests import begins_with
from criserver.model import ContainerConfig, NamespaceMode, User
from criserver.numbers import decimal
from criserver.oci import cdi, container_user, cri_annotations, seccomp, spec
from criserver.oci.capabilities import capability_sets
from criserver.oci.spec_inputs import ImageDefaults, Spec, SpecDefaults
from criserver.oci.spec_mounts import check_mounts, own_paths
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import (
    apparmor,
    bundle_adjustment,
    cgroups,
    filesystems,
    host,
    mount_paths,
    node_defaults,
    pidfd,
    selinux,
)
from criserver.runtime.container_log import prepare_log
from criserver.runtime.ignored import log_ignored
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import pod_facts
from criserver.runtime.records import Container, Sandbox
from criserver.runtime.spec_file import write_spec
from criserver.telemetry import operations
from criserver.text import status
from snapshotter import files, mounts
from snapshotter.threads import in_loose_thread

log = structlog.get_logger(__name__)

# Bytes. Larger account files than this are refused: they are read for every container, and the OCI runtime reads them
# whole. Those of real images have a few thousand; 4 MiB are some 60,000 accounts.
_MAX_ACCOUNTS = 4 << 20
# Bytes of the requests for all containers of a pod, exited ones too. Each is in memory several times as long as its
# container is there: in its record, as it was sent and parsed, and in the bundle on a tmpfs. A usual one has a few KiB.
_MAX_REQUESTS = 16 << 20

# Where a mount brings the null device, and where that is in it (null(4)).
_NULLS = {"/dev": "/null", "/dev/null": ""}
_NULL = os.makedev(1, 3)


async def create_container(node: Node, sandbox_id: str, config: ContainerConfig, sent: bytes) -> str:
    """Make a container of a ready sandbox and return its ID; ``sent`` is its ContainerConfig as it came.

    Raises NotFoundError for an unknown sandbox or an image that is not here, AlreadyExistsError for a taken
    name, FailedPreconditionError for a sandbox that is not ready or a user that the image does not have,
    ResourceExhaustedError if the requests for all containers of the sandbox are too large, InvalidArgumentError for
    what can never run. Nothing is left behind by a failure.
    """
    sandbox = node.records.sandbox(sandbox_id)
    name = f"container {config.name}_{sandbox.config.full_name}_{config.attempt}"
    return await node.attempts.run(name, sent, lambda: _create(node, sandbox.id, config, sent))


async def _create(node: Node, sandbox_id: str, config: ContainerConfig, sent: bytes) -> str:
    sandbox = node.records.sandbox(sandbox_id)
    if sandbox.state is not SandboxState.READY:
        raise FailedPreconditionError(f"pod sandbox {sandbox.id} is {sandbox.state.value}; run a new one")
    image = node.images.get(config.image)
    if image is None:
        raise NotFoundError(f"container {config.name}: image {config.image} is not on this node; pull it first")
    await node.images.checked(image)
    defaults = _defaults(image)
    # These raise errors that would come up later anyway. Here nothing has been made yet.
    command, *_ = spec.process_args(config, defaults)
    check_mounts(config)
    _check_features(node, sandbox, config)
    profile = await apparmor.choose(config)
    filter_ = await _seccomp(config)
    edits = await _device_edits(node, sandbox, config) + await node_defaults.hooks(node, sandbox, config, command)
    of_node = await node_defaults.spec_defaults(node, node.handler(sandbox.runtime))
    sent = _with_names_of_images(node, image, sent)
    container = Container(
        id=secrets.token_hex(32),
        sandbox_id=sandbox.id,
        config=config,
        sent=sent,
        image_id=image.id,
        image_ref=_image_ref(image, sent),
        state=ContainerState.CREATING,
        created_at=time.time_ns(),
        log_path=config.log_path,
        stop_signal=signal_number(config.stop_signal or image.config.stop_signal or "SIGTERM"),
    )
    logs.about(container=container.id)
    # No sandbox is stopped or removed between this check and the container's record.
    async with node.lock(sandbox_id):
        if node.records.sandbox(sandbox_id).state is not SandboxState.READY:
            raise FailedPreconditionError(f"pod sandbox {sandbox_id} is being stopped; run a new one")
        _check_requests(node, sandbox, container)
        await node.records.add(container)
    async with node.lock(container.id):
        try:
            user, document = await _prepare(node, sandbox, container, image, defaults, of_node, filter_, profile, edits)
            adjusted = await node.plugins.create_container(container, document)
            if adjusted is not None:
                container = await bundle_adjustment.adjust(node, sandbox, container, document, adjusted)
            created = dataclasses.replace(container, state=ContainerState.CREATED, user=user)
            created = await node.records.save(created)
            await node.plugins.container_created(created)
        except BaseException as e:
            await undo(node, container, f"it cannot be made: {e}")
            raise
    if adjusted is not None:
        await node.plugins.apply(adjusted.after)
    log.info("container created", **sandbox.named, **container.named, seconds=logs.elapsed())
    return container.id


def _check_requests(node: Node, sandbox: Sandbox, container: Container) -> None:
    """Refuse a container with which the requests for all containers of the pod are too large.

    Only the last one of each name counts, so that each can be made again.
    """
    named = {c.config.name: c for c in (*node.records.containers_of(sandbox.id), container)}
    total = sum(len(c.sent) for c in named.values())
    if total > _MAX_REQUESTS:
        raise ResourceExhaustedError(
            f"container {container.config.name}: with it the requests for all containers of pod "
            f"{sandbox.config.namespace}/{sandbox.config.name} have {total} bytes; {_MAX_REQUESTS} "
            "are the most allowed. Give large values by a volume, not by environment variables"
        )


def _check_features(node: Node, sandbox: Sandbox, config: ContainerConfig) -> None:
    """Refuse what the pod's runtime handler or this kernel cannot do."""
    features = node.features[sandbox.runtime]
    if not features.recursive_readonly_mounts and any(m.recursive_readonly for m in config.mounts):
        raise features.lacking(
            f"container {config.name}: recursive read-only mounts need runc 1.1 or newer and Linux 5.12 or newer"
        )
    if not features.idmapped_mounts and any(m.uids for m in config.mounts):
        raise features.lacking(f"container {config.name}: id-mapped mounts need runc 1.2 or newer")
    selinux.check(config.security, sandbox.selinux_level, f"container {config.name}")
    log_ignored(config, (c.config for c in node.records.containers_of(sandbox.id)), sandbox.id)


async def _seccomp(config: ContainerConfig) -> Spec | None:
    """The filter that the container asks for. Raises NotFoundError, InvalidArgumentError for a profile's file."""
    profile = config.security.seccomp
    if not profile:
        return None
    capabilities = capability_sets(config, host.facts())["bounding"]
    architecture = host_platform().architecture
    if profile == "default":
        return seccomp.default_profile(capabilities, architecture)
    return await asyncio.to_thread(seccomp.localhost_profile, profile, capabilities, architecture, os.uname().release)


async def _device_edits(node: Node, sandbox: Sandbox, config: ContainerConfig) -> cdi.ContainerEdits:
    """What the container's CDI devices change in its spec. Raises as :func:`cdi.resolve` does."""
    if not config.cdi_devices:
        return cdi.ContainerEdits()
    node.cdi = await asyncio.to_thread(cdi.load, node.config.cdi_dirs, node.cdi)
    return cdi.resolve(config.cdi_devices, node.cdi, node.features[sandbox.runtime].facts)


async def _prepare(
    node: Node,
    sandbox: Sandbox,
    container: Container,
    image: Image,
    defaults: ImageDefaults,
    of_node: SpecDefaults,
    filter_: Spec | None,
    profile: str,
    edits: cdi.ContainerEdits,
) -> tuple[User, Spec]:
    """Make the container's files, and its bundle. Returns the user and the spec that the bundle has."""
    config, handler = container.config, node.handler(sandbox.runtime)
    target = _target(node, container)
    await prepare_log(node, container)
    granted = await mount_paths.device_nodes(config.devices)
    config = dataclasses.replace(config, devices=tuple(granted))
    devices = [node_defaults.owned(node, config, device) for device in granted.values()]
    if config.security.privileged and not handler.privileged_without_host_devices:
        devices = list({d.path: d for d in (*host.all_devices(), *devices)}.values())
    rootfs = await filesystems.make_root(node, container, image)
    pid_namespace = "" if target is None else _pin_namespace(node, sandbox, container, target)
    all_mounts, real_paths = await filesystems.resolve_mounts(node, container, image, rootfs, own_paths(of_node))
    config = dataclasses.replace(config, mounts=all_mounts)
    check_mounts(config)
    labels = selinux.labels(config.security, sandbox.selinux_level)
    if labels.files:
        for mount in config.mounts:
            if mount.selinux_relabel:
                # In a thread of its own: a large volume takes minutes, and a dead one for ever.
                await in_loose_thread(partial(selinux.relabel, mount.host_path, labels.files), "relabel")
    pod = pod_facts(node, sandbox)
    build = partial(
        spec.build,
        config=config,
        image=defaults,
        defaults=of_node,
        real_paths=real_paths,
        pod=dataclasses.replace(pod, pid_namespace=pid_namespace or pod.pid_namespace),
        host=host.facts(),
        cgroups_path=cgroups.spec_path(sandbox.cgroup_parent, container.id),
        rootfs=rootfs,
        devices=devices,
        host_devices=not handler.privileged_without_host_devices,
        seccomp=filter_,
        apparmor_profile=profile,
        selinux_label=labels.process,
        mount_label=labels.files,
        annotations={
            **cri_annotations.of_container(
                config, sandbox.config, sandbox.id, handler.pod_annotations, handler.container_annotations
            ),
            **node.runtime(sandbox.runtime).annotations(container.id),
        },
    )

    def write() -> tuple[User, Spec]:
        _check_dev(config, rootfs)
        user = _user(config, image, rootfs)
        document = cdi.apply(build(user=user), edits)
        write_spec(node, container.id, document)
        return user, document

    with operations.BUNDLE.timed():
        # In a thread, as an image may have megabytes of accounts and of environment variables.
        return await asyncio.to_thread(write)


def _image_ref(image: Image, sent: bytes) -> str:
    """The image's name with a digest: the one that the pod names, or one in the repository that it names, or any.

    An image without such a name has its ID in place of it.
    """
    asked = cri.ContainerConfig.FromString(sent).image
    names = image.repo_digests
    with suppress(InvalidArgumentError):  # the kubelet names an image by its ID beside the name that the pod has
        reference = references.parse(asked.user_specified_image or asked.image)
        of_repository = [name for name in names if name.startswith(f"{reference.name}@")]
        names = (*(name for name in of_repository if name == str(reference)), *of_repository, *names)
    return names[0] if names else image.id


def _with_names_of_images(node: Node, image: Image, sent: bytes) -> bytes:
    """What the kubelet sent, with names of images that ContainerStatus shows.

    1. Kubelets before 1.30 name the image by its ID and do not say its name in the pod. It gets the image's own name.
    2. Each image volume gets the ID that its image has now.

    Raises NotFoundError for an image that is not here.
    """
    config = cri.ContainerConfig.FromString(sent)
    is_id = begins_with(image.id, config.image.image)
    if is_id and image.repo_tags and not config.image.user_specified_image:
        config.image.user_specified_image = image.repo_tags[0]
    for mount in config.mounts:
        if mount.HasField("image"):
            volume = node.images.get(mount.image.image)
            if volume is None:
                what = f"mount {mount.container_path}: image {mount.image.image}"
                raise NotFoundError(f"{what} is not on this node; pull it first")
            mount.image.image_ref = volume.id
    return config.SerializeToString(deterministic=True)


def _target(node: Node, container: Container) -> Container | None:
    """The container whose PID namespace this one joins; None where the request names none."""
    namespaces = container.config.namespaces
    if namespaces.pid is not NamespaceMode.TARGET:
        return None
    target = node.records.container(namespaces.target)
    if target.sandbox_id != container.sandbox_id:
        raise InvalidArgumentError(f"target container {target.id} is of another pod, {target.sandbox_id}")
    if target.state is not ContainerState.RUNNING:
        raise FailedPreconditionError(f"target container {target.id} is {target.state.value}, not running")
    return target


def _pin_namespace(node: Node, sandbox: Sandbox, container: Container, target: Container) -> str:
    """Pin the PID namespace of a target container in this container's directory; returns the path.

    When this container is started, the target's PID may be another process's, whose namespace may be the node's. The
    pin is unmounted together with the container's file systems.
    """
    process = pidfd.open_process(target.pid, target.start_ticks)
    if process is None:
        raise FailedPreconditionError(f"target container {target.id} has ended")
    try:
        namespace = os.open(f"/proc/{target.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise FailedPreconditionError(f"target container {target.id} has ended") from e
    finally:
        os.close(process)
    try:
        # The namespace was opened by PID. It is the target's if the PID still is.
        if pidfd.start_ticks(target.pid) != target.start_ticks:
            raise FailedPreconditionError(f"target container {target.id} has ended")
        if sandbox.config.namespaces.pid is not NamespaceMode.NODE and host.is_own_namespace(namespace, "pid"):
            raise InvalidArgumentError(
                f"target container {target.id} is in the node's PID namespace, which its pod is not to share"
            )
        pin = os.path.join(node.container_dir(container.id), "pid")
        os.close(os.open(pin, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        mounts.mount(f"/proc/self/fd/{namespace}", pin, None, mounts.MS_BIND)
    finally:
        os.close(namespace)
    return pin


async def undo(node: Node, container: Container, reason: str) -> bool:
    """Undo the making of a container. Returns whether nothing of it is left.

    If that fails, the container is shown as exited, and the kubelet removes it.
    """
    try:
        await filesystems.discard(node, container.id)
        await node.plugins.container_removed(container)
        await node.records.forget(container)
    except Exception:
        log.exception("a container that cannot be made cannot be undone either", container=container.id)
        await node.records.observe(container.ended(128, "CreateError", status(reason)))
        return False
    # Its image may have been removed while it was being made.
    node.background(node.images.collect(), "garbage collection after a container that was not made failed")
    return True


def signal_number(name: str) -> int:
    """The number of "SIGTERM", "TERM", "15", "SIGRTMIN+3" or CRI's "SIGRTMINPLUS3".

    Any other text is SIGTERM, and no error: an image may have anything as its StopSignal.
    """
    text = name.upper().removeprefix("SIG").replace("PLUS", "+").replace("MINUS", "-")
    number = decimal(text, signal.SIGRTMAX)
    if text.startswith(("RTMIN", "RTMAX")):
        base = signal.SIGRTMIN if text.startswith("RTMIN") else signal.SIGRTMAX
        offset = decimal(text[6:] or "0", signal.SIGRTMAX)
        sign = {"": 1, "+": 1, "-": -1}.get(text[5:6])
        number = None if offset is None or sign is None else base + sign * offset
    elif number is None:
        number = signal.Signals.__members__.get(f"SIG{text}")
    return number if number is not None and 1 <= number <= signal.SIGRTMAX else signal.SIGTERM


def _defaults(image: Image) -> ImageDefaults:
    found = image.config
    return ImageDefaults(tuple(found.entrypoint), tuple(found.cmd), tuple(found.env), found.working_dir)


def _user(config: ContainerConfig, image: Image, rootfs: str) -> User:
    """The user that the container runs as. Blocks. Raises FailedPreconditionError, and InvalidArgumentError."""
    security, named = config.security, image.user
    user: int | str = security.run_as_username if security.run_as_user is None else security.run_as_user
    group: int | str = "" if security.run_as_group is None else security.run_as_group
    if user == "":
        user, group = named.user, named.group if group == "" else group
    with _account_file(rootfs, "etc/passwd") as passwd, _account_file(rootfs, "etc/group") as groups:
        found = container_user.resolve(
            user=user,
            group=group,
            supplemental=security.supplemental_groups,
            strict=security.supplemental_groups_strict,
            passwd=passwd,
            groups=groups,
        )
    container_user.check_mapped(found, config.namespaces.user, config.name)
    return found


def _check_dev(config: ContainerConfig, rootfs: str) -> None:
    """Refuse a /dev with which an OCI runtime mounts the wrong file or over the wrong path. Blocks.

    1. runc before 1.3.6 follows an image's symbolic link at /dev (CVE-2026-41579).
    2. runc before 1.2.8 masks a path with any file that is at the container's /dev/null (CVE-2025-31133).

    Raises FailedPreconditionError.
    """
    what = f"container {config.name}"
    if os.path.islink(os.path.join(rootfs, "dev")):
        raise FailedPreconditionError(f"{what}: the image's /dev is a symbolic link; build it with a directory there")
    if config.security.privileged or not config.security.masked_paths:
        return
    for mount in config.mounts:
        if mount.container_path in _NULLS and not _is_null(mount.host_path + _NULLS[mount.container_path]):
            raise FailedPreconditionError(
                f"{what}: its mount {mount.container_path} has no null device, by which paths are masked; mount a "
                "directory elsewhere, or without masked_paths"
            )


def _is_null(path: str) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == _NULL


def _account_file(rootfs: str, path: str) -> BinaryIO:
    """A file of the image, empty where the image has none. The image's links never lead out of its root.

    Raises FailedPreconditionError for a file that is too large or not regular: the OCI runtime would open it too.
    """
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open(files.open_regular(path, _MAX_ACCOUNTS, dir_fd=root, resolve=mounts.RESOLVE_IN_ROOT), "rb")
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return io.BytesIO()
        raise FailedPreconditionError(f"the image's /{path} cannot be used: {e.strerror}") from e
    finally:
        os.close(root)
