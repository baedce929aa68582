"""Attacks by length, number and odd characters: on requests, errors, logs, memory and connections."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import output_room
from criserver.streaming import server as streaming
from criserver.streaming import session
from tests.support.node import Node, refused
from tests.support.streaming_client import Spdy
from tests.support.waiting import SLOWNESS, eventually, within

MIB = 1 << 20
INVALID = grpc.StatusCode.INVALID_ARGUMENT
# What a caller can do nothing about, or what is an accident of its transport.
ACCIDENTS = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)

POISONS = {
    "zero": "a\0b",
    "newline": "a\nb",
    "long": "n" * 300,
    "longer": "n" * 100_000,
    "foreign": "\u202e\x1b[2J" + "ж" * 9000,
}

Set = Callable[[Message, str], None]


def sound(kind: str, node: Node) -> Message | None:
    """What a message has in it, so that the one field that is poisoned is all that is wrong with it."""
    found: dict[str, Message] = {
        "Mount": cri.Mount(container_path="/m", host_path=f"{node.base}/volume"),
        "Device": cri.Device(container_path="/dev/x", host_path="/dev/null", permissions="rw"),
        "KeyValue": cri.KeyValue(key="K", value=b"v"),
        "PortMapping": cri.PortMapping(container_port=80),
        "HugepageLimit": cri.HugepageLimit(page_size="2MB"),
        "SecurityProfile": cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="/no/such"),
        "CDIDevice": cri.CDIDevice(name="vendor.com/class=none"),
    }
    return found.get(kind)


def text_fields(kind: Any, node: Node, name: str = "") -> Iterator[tuple[str, Set]]:
    """Every text that a message may have in it, however deep, and what puts one there."""
    for field in kind.fields:
        here = f"{name}.{field.name}" if name else field.name
        inner = field.message_type
        if field.name == "windows":
            continue  # refused as a whole
        if inner is not None and inner.GetOptions().map_entry:
            if inner.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING:
                yield f"{here}.key", partial(_set_key, field)
                yield f"{here}.value", partial(_set_value, field)
        elif inner is not None:
            for deeper, put in text_fields(inner, node, here):
                yield deeper, partial(_set_within, field, node, put)
        elif field.type == FieldDescriptor.TYPE_STRING and field.is_repeated:
            yield here, partial(_append, field)
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield here, partial(_extend, field)
        elif field.type == FieldDescriptor.TYPE_BYTES:
            yield here, partial(_set_bytes, field)


def _set_key(field: FieldDescriptor, message: Message, text: str) -> None:
    getattr(message, field.name)["net." + text if field.name == "sysctls" else text] = "1"


def _set_value(field: FieldDescriptor, message: Message, text: str) -> None:
    getattr(message, field.name)["net.ipv4.ip_forward" if field.name == "sysctls" else "k"] = text


def _set_within(field: FieldDescriptor, node: Node, put: Set, message: Message, text: str) -> None:
    put(_entered(message, field, node), text)


def _append(field: FieldDescriptor, message: Message, text: str) -> None:
    getattr(message, field.name).append(text)


def _extend(field: FieldDescriptor, message: Message, text: str) -> None:
    setattr(message, field.name, getattr(message, field.name) + text)


def _set_bytes(field: FieldDescriptor, message: Message, text: str) -> None:
    setattr(message, field.name, text.encode())


def _entered(message: Message, field: FieldDescriptor, node: Node) -> Message:
    made = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
    if (found := sound(field.message_type.name, node)) is not None:
        made.CopyFrom(found)
    return made


def check_words(error: grpc.RpcError) -> None:
    """The words are ours, printable, and of a length that a header may have."""
    words = error.details() or ""
    assert words.isprintable()
    assert len(words.encode()) <= 4096
    assert "metadata size" not in words


def refusal(call: Callable[[], Any]) -> grpc.StatusCode | None:
    """How a call is refused, None where it is not."""
    try:
        call()
    except grpc.RpcError as e:
        check_words(e)
        assert e.code() not in ACCIDENTS, (e.code(), e.details())
        return e.code()
    return None


def may_hold_zero(field: str) -> bool:
    """Annotations are anybody's text, and no kernel sees them."""
    return field.endswith("annotations.value")


@pytest.mark.parametrize("poison", POISONS)
def test_no_text_of_a_pod_is_an_accident(node: Node, poison: str) -> None:
    for field, put in text_fields(cri.PodSandboxConfig.DESCRIPTOR, node):
        config = node.pod("poisoned")
        put(config, POISONS[poison])
        code = refusal(partial(node.client.RunPodSandbox, config=config))
        if poison == "zero" and not may_hold_zero(field):
            assert code is INVALID, field
        node.remove_pods()
    code = refusal(lambda: node.client.RunPodSandbox(config=node.pod("handler"), runtime_handler=POISONS[poison]))
    assert code is INVALID


def create(node: Node, pod: str, config: cri.ContainerConfig, made: list[str]) -> None:
    made.append(node.client.CreateContainer(pod_sandbox_id=pod, config=config).container_id)


@pytest.mark.parametrize("poison", POISONS)
def test_no_text_of_a_container_is_an_accident(node: Node, poison: str) -> None:
    pod = node.run_pod()
    for field, put in text_fields(cri.ContainerConfig.DESCRIPTOR, node):
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="c"),
            image=cri.ImageSpec(image="localhost/busybox:latest"),
            command=["sleep", "1000"],
            log_path="c.log",
        )
        put(config, POISONS[poison])
        made: list[str] = []
        code = refusal(partial(create, node, pod, config, made))
        if poison == "zero" and not may_hold_zero(field):
            assert code is INVALID, field
        for container in made:
            refusal(partial(node.client.StartContainer, container_id=container))
            node.client.RemoveContainer(container_id=container)
    assert node.client.ListContainers().containers == []
    assert sorted(os.listdir(f"{node.state}/containers")) == []


@pytest.mark.parametrize("poison", POISONS)
def test_no_text_of_any_other_request_is_an_accident(node: Node, poison: str) -> None:
    pod = node.run_pod()
    container = node.run(pod, "c", ["sleep", "1000"])
    own = {"container_id": container, "pod_sandbox_id": pod}
    for service in cri.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            if method.server_streaming or method.name in ("RunPodSandbox", "CreateContainer", "PullImage"):
                continue
            for field, put in text_fields(method.input_type, node):
                request = message_of(method.input_type)
                for name, value in own.items():
                    if name in method.input_type.fields_by_name and name != field:
                        setattr(request, name, value)
                put(request, POISONS[poison])
                code = refusal(partial(call, node, method.name, request))
                if poison == "zero" and not may_hold_zero(field):
                    assert code is INVALID, (method.name, field)
    assert node.sh(container, "echo alive") == "alive\n"


def message_of(kind: Descriptor) -> Message:
    found: Message = getattr(cri, kind.name)()
    return found


def call(node: Node, name: str, request: Message) -> Any:
    return getattr(node.client, name)(**{field.name: value for field, value in request.ListFields()})


@pytest.mark.parametrize("poison", ["zero", "longer"])
def test_a_reference_of_an_image_that_nobody_could_have(node: Node, poison: str) -> None:
    name = POISONS[poison]
    assert refusal(lambda: node.client.PullImage(image=cri.ImageSpec(image=name))) is INVALID
    assert refusal(lambda: node.client.ImageStatus(image=cri.ImageSpec(image=name))) is INVALID


def test_a_credential_is_never_quoted(node: Node) -> None:
    auth = cri.AuthConfig(username="u", password="hunter2\0")
    with pytest.raises(grpc.RpcError) as caught:
        node.client.PullImage(image=cri.ImageSpec(image="localhost:1/i"), auth=auth)
    assert caught.value.code() is INVALID
    words = caught.value.details() or ""
    assert "auth.password" in words
    assert "hunter2" not in words


@pytest.mark.parametrize("value", ["1" * 100_000, "1\n2", "1\0", "\n"])
def test_a_sysctls_value_that_the_kernel_would_cut_off(node: Node, value: str) -> None:
    config = node.pod("bad")
    config.linux.sysctls["net.ipv4.ip_forward"] = value
    with refused(INVALID, "net.ipv4.ip_forward"):
        node.client.RunPodSandbox(config=config)
    assert node.client.ListPodSandbox().items == []


@pytest.mark.parametrize("rpc", ["ExecSync", "Exec"])
def test_a_million_arguments(node: Node, rpc: str) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    fields: dict[str, Any] = {} if rpc == "ExecSync" else {"stdout": True}
    with refused(INVALID, "cmd"):
        getattr(node.client, rpc)(container_id=container, cmd=["x"] * 1_000_000, **fields)
    with refused(INVALID, "cmd"):
        getattr(node.client, rpc)(container_id=container, cmd=["true", "x" * 4_000_000], **fields)
    many = ["true", *["x" * 1000] * 500]  # and what can be is
    assert node.client.ExecSync(container_id=container, cmd=many, timeout=int(20 * SLOWNESS)).exit_code == 0


def test_a_million_ports(node: Node) -> None:
    pod = node.run_pod()
    with refused(INVALID, "ports"):
        node.client.PortForward(pod_sandbox_id=pod, port=[80] * 1_000_000)


def test_annotations_that_no_list_could_carry(node: Node) -> None:
    """One pod's annotations would make ListPodSandbox fail for all of them: its answer may have 16 MiB."""
    with refused(INVALID, "annotations"):
        node.client.RunPodSandbox(config=node.pod("fat", annotations={"k": "v" * (2 * MIB)}))
    pod = node.run_pod("large", annotations={"k": "v" * (256 << 10)})  # Kubernetes' own limit
    assert [p.id for p in node.client.ListPodSandbox().items] == [pod]


# The log


def test_the_log_path_of_a_container_stays_below_its_pods_directory(node: Node) -> None:
    """As CVE-2021-25741: a link in a directory that a container can write leads the runtime out of it."""
    pod = node.run_pod()
    outside = f"{node.base}/outside"
    os.mkdir(outside)
    os.symlink(outside, f"{node.logs}/pod/dir")
    os.symlink(f"{outside}/file", f"{node.logs}/pod/file.log")
    os.mkfifo(f"{node.logs}/pod/fifo.log")
    os.mknod(f"{node.logs}/pod/device.log", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mkdir(f"{node.logs}/pod/directory.log")
    with open(f"{outside}/secret", "w") as f:
        f.write("kept\n")
    os.mkdir(f"{node.logs}/other")
    with open(f"{node.logs}/other/0.log", "w") as f:
        f.write("kept\n")
    os.link(f"{node.logs}/other/0.log", f"{node.logs}/pod/hard.log")
    for path in ("dir/0.log", "dir/deeper/0.log", "file.log", "fifo.log", "device.log", "directory.log", "hard.log"):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, f"{node.logs}/pod/{path}"):
            create_with_log(node, pod, path)
    assert os.listdir(outside) == ["secret"]
    assert node.client.ListContainers().containers == []
    for path in ("../other/0.log", "/../other/0.log", "a/../../other/0.log"):
        with refused(INVALID, "log_path"):
            create_with_log(node, pod, path)


def create_with_log(node: Node, pod: str, path: str) -> str:
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="c"),
        image=cri.ImageSpec(image="localhost/busybox:latest"),
        command=["sh", "-c", "echo hello; sleep 1000"],
        log_path=path,
    )
    container: str = node.client.CreateContainer(pod_sandbox_id=pod, config=config).container_id
    return container


@pytest.mark.parametrize("kind", ["link", "fifo", "directory link"])
def test_a_log_that_is_changed_between_create_and_start(node: Node, kind: str) -> None:
    pod = node.run_pod()
    container = create_with_log(node, pod, "c/0.log")
    change_log(node, kind)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, f"{node.logs}/pod/c/0.log"):
        node.client.StartContainer(container_id=container)
    assert os.listdir(f"{node.base}/aside") == []
    os.rmdir(f"{node.base}/aside")


@pytest.mark.parametrize("kind", ["link", "fifo", "directory link"])
def test_a_log_that_is_changed_before_it_is_rotated(node: Node, kind: str) -> None:
    pod = node.run_pod()
    container = create_with_log(node, pod, "c/0.log")
    node.client.StartContainer(container_id=container)
    os.rename(f"{node.logs}/pod/c/0.log", f"{node.logs}/pod/c/0.log.1")
    change_log(node, kind)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, f"{node.logs}/pod/c/0.log"):
        node.client.ReopenContainerLog(container_id=container)
    assert os.listdir(f"{node.base}/aside") == []
    os.rmdir(f"{node.base}/aside")
    assert node.sh(container, "echo alive") == "alive\n"


def change_log(node: Node, kind: str) -> None:
    """Put what a pod could in the log's place; a FIFO has a reader, so that opening it does not fail by itself."""
    aside, path = f"{node.base}/aside", f"{node.logs}/pod/c/0.log"
    os.mkdir(aside)
    if kind == "link":
        os.symlink(f"{aside}/file", path)
    elif kind == "fifo":
        os.mkfifo(path)
        readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    else:
        os.rename(f"{node.logs}/pod/c", f"{node.logs}/pod/moved")
        os.symlink(aside, f"{node.logs}/pod/c")


readers: list[int] = []


@pytest.fixture(autouse=True)
def close_readers() -> Iterator[None]:
    yield
    while readers:
        os.close(readers.pop())


def test_the_pods_log_directory_itself_may_be_behind_a_link(node: Node) -> None:
    """The kubelet names it, and an operator may have moved /var/log."""
    os.mkdir(f"{node.base}/disk")
    os.symlink(f"{node.base}/disk", f"{node.logs}/moved")
    config = node.pod()
    config.log_directory = f"{node.logs}/moved/pod"
    pod = node.client.RunPodSandbox(config=config).pod_sandbox_id
    Node.pods.add(pod)
    container = create_with_log(node, pod, "c/0.log")
    node.client.StartContainer(container_id=container)
    assert node.status(container).log_path == f"{node.logs}/moved/pod/c/0.log"
    real = f"{node.base}/disk/pod/c/0.log"
    eventually(lambda: os.path.getsize(real) > 0)
    os.rename(real, real + ".1")
    node.client.ReopenContainerLog(container_id=container)
    assert os.path.getsize(real) == 0
    node.remove_pods()
    for path in (real, real + ".1"):
        os.unlink(path)
    for directory in ("disk/pod/c", "disk/pod", "disk"):
        os.rmdir(f"{node.base}/{directory}")


# Memory


def resident(node: Node, field: str = "VmRSS") -> int:
    """Bytes of the daemon's memory."""
    assert node.process is not None
    with open(f"/proc/{node.process.pid}/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(field + ":"))


def test_the_output_of_many_commands_has_one_room(node: Node) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    script = "head -c 16777216 /dev/zero; head -c 16777216 /dev/zero >&2; exit 3"
    node.sh(container, "true")
    before = resident(node)
    with open(f"/proc/{node.process.pid}/clear_refs", "w") as f:
        f.write("5")  # the peak begins anew (proc(5))
    answers = []

    def run() -> None:
        answers.append(node.client.ExecSync(60 * SLOWNESS, container_id=container, cmd=["sh", "-c", script]))

    threads = [threading.Thread(target=run) for _ in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.exit_code for answer in answers] == [3] * 15
    outputs = [len(output) for answer in answers for output in (answer.stdout, answer.stderr)]
    assert min(outputs) >= output_room.OWN, "each has what is its own"
    assert max(outputs) <= output_room.MAX_OUTPUT
    # What is collected, an answer made of it, and gRPC's copy of that: no more than three times the room.
    assert resident(node, "VmHWM") - before < 3 * output_room.ROOM + 16 * MIB
    del answers[:]
    eventually(lambda: resident(node) - before < 32 * MIB)
    # And all of it is there again.
    answer = node.client.ExecSync(60 * SLOWNESS, container_id=container, cmd=["sh", "-c", script])
    assert (len(answer.stdout), len(answer.stderr)) == (output_room.MAX_OUTPUT, output_room.MAX_OUTPUT)


def test_a_probe_beside_commands_that_print_without_end(node: Node) -> None:
    """What is full is full for those who fill it: 40 KiB of a probe come whole."""
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    greedy, limit = [], int(8 * SLOWNESS)

    def run() -> None:
        try:
            node.client.ExecSync(60 * SLOWNESS, container_id=container, cmd=["cat", "/dev/zero"], timeout=limit)
        except grpc.RpcError as e:
            greedy.append(e.code())

    threads = [threading.Thread(target=run) for _ in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(2 * SLOWNESS)  # until they have filled it
    try:
        for _ in range(5):
            answer = node.client.ExecSync(
                60 * SLOWNESS,
                container_id=container,
                cmd=["head", "-c", "40000", "/dev/zero"],
                timeout=int(30 * SLOWNESS),
            )
            assert (answer.exit_code, len(answer.stdout)) == (0, 40000)
    finally:
        for thread in threads:
            thread.join()
    assert greedy == [grpc.StatusCode.DEADLINE_EXCEEDED] * 10


# Connections


@contextlib.contextmanager
def pending_connections(url: str, count: int, data: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections of one peer that never say what they want."""
    parts = urlsplit(url)
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(
                stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=20 * SLOWNESS))
            )
            with contextlib.suppress(ConnectionError):
                found[-1].sendall(data)
        yield found


def exec_url(node: Node, container: str) -> str:
    url: str = node.client.Exec(container_id=container, cmd=["echo", "hi"], stdout=True).url
    return url


def promptly(node: Node, container: str) -> None:
    """An exec by a valid address succeeds, in a time that is below that for which idle connections are kept."""
    with within(0.9 * session.HEAD_TIMEOUT):
        client = Spdy(exec_url(node, container)).open_command("error", "stdout")
        assert client.finish() == {"status": "Success"}
    assert client.got["stdout"] == b"hi\n"


@pytest.mark.parametrize("data", [b"", b"POST /command/x HTTP/1.1\r\nHost: x\r\nX-A: " + b"x" * 15000])
def test_idle_connections_keep_nobody_out(node: Node, data: bytes) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    url = exec_url(node, container)
    with pending_connections(url, 1500, data):
        promptly(node, container)
        promptly(node, container)
        assert node.sh(container, "echo hi") == "hi\n", "and CRI's own socket serves"
        assert node.streams() < streaming.MAX_PENDING + 200


def test_slow_writers_keep_nobody_out(node: Node) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    done = threading.Event()
    with pending_connections(exec_url(node, container), 1000, b"GET /command HTTP/1.1\r\nX: ") as others:

        def drip() -> None:
            while not done.wait(0.5):
                for sock in others:
                    with contextlib.suppress(OSError):
                        sock.send(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            for _ in range(5):
                promptly(node, container)
        finally:
            done.set()
            thread.join()


def test_connections_that_come_without_end_keep_nobody_out(node: Node) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    parts = urlsplit(exec_url(node, container))
    done = threading.Event()
    made = [0]

    def knock() -> None:
        kept: list[socket.socket] = []
        while not done.is_set():
            with contextlib.suppress(OSError):
                kept.append(socket.create_connection((parts.hostname, parts.port), timeout=5 * SLOWNESS))
                made[0] += 1
            if len(kept) > 2000:
                kept.pop(0).close()
        for sock in kept:
            sock.close()

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        eventually(lambda: made[0] > streaming.MAX_PENDING)
        for _ in range(5):
            promptly(node, container)
        assert node.streams() < streaming.MAX_PENDING + 200
    finally:
        done.set()
        thread.join()


def test_the_daemons_sockets_are_for_root_alone(node: Node) -> None:
    """CRI's, on which the operator's service is too: who may speak there is root on the node."""
    found = os.stat(node.socket)
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, 0)
