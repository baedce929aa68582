"""Every message between the daemon, the nursery and the shims: who sends it, when, and the unit of each key.

Type checkers alone read this module. Nothing imports it at run time: it would cost memory in every shim. mypy checks
the keys where a message is made. The receiver checks the values, since the sender may have another version.

`shims.wire` says how a message travels. Two keys belong to it, and any message may have them:

- "re": the number of a request. The daemon chooses it, and the reply repeats it. An event has none.
- "fds": how many file descriptors come with the message.

Keys that several messages have:

- "init": the container's first process, by its PID on the node.
- "start_ticks": when that process started, in clock ticks since the node's boot (proc(5), /proc/PID/stat field 22).
- "started_at", "finished_at": Unix time in nanoseconds.
- "code": an exit code; 128 and the signal's number where a signal ended the process.
- "error": why something failed, for people.
- "late": the OCI runtime did not return in its time, and the shim has killed it.

A shim outlives the daemon that started it. So a daemon meets shims of earlier versions after an upgrade, and of later
versions after a downgrade:

1. A receiver ignores keys and events that it does not know.
2. The daemon brings a message of an earlier shim to the present shape (`criserver.runtime.shim_link`).
3. A shim sends the keys that daemons of 0.1.0 read, beside their present names ("pid", "exec"). 0.3.0 need not.
"""

from typing import Literal, NotRequired, TypedDict, final

# The nursery. Its connection is one half of a socket pair, which it inherits from the daemon.


@final
class NurseryGreeting(TypedDict):
    """Nursery to daemon, once: it can fork."""

    hello: Literal["nursery"]
    version: int  # shims.wire.VERSION


class TaskConfig(TypedDict):
    """How a runtime's own shim is started (containerd's shim API)."""

    command: list[str]  # the program, and options before those of the API
    namespace: str  # of containerd's: part of the names of sockets and directories
    options_type: str  # the type URL of the runtime's options; empty: it has none
    options: str  # the options in protobuf's encoding, as hexadecimal digits


class LaunchConfig(TypedDict):
    """How a container's runtime is called."""

    runtime_command: list[str]  # the OCI runtime's program, and its options before any verb; empty with "task"
    owner: list[int]  # user and group to own the standard streams; empty: the OCI runtime sees to it
    task: NotRequired[TaskConfig]  # the container is started by a shim of the runtime's
    task_of: NotRequired[str]  # path of the file that says how the shim of the pod's sandbox container is reached


class ForkConfig(LaunchConfig):
    """All that a shim has to know of its container. All paths are absolute.

    No version meets another here: a daemon starts its own nursery, and that forks its shims.
    """

    id: str  # of the container, for the OCI runtime too
    bundle: str  # the directory of the OCI bundle
    directory: str  # the shim's state directory, which is its working directory
    log_path: str  # empty: no log is kept
    max_line: int  # bytes of a line in one record of the log
    tty: bool  # the container has a terminal
    stdin: bool  # the container has a standard input (without a terminal; a terminal has one always)
    oom_files: list[str]  # files with the OOM kill count of the container's cgroup
    pod_events: str  # memory.events of the pod's cgroup; empty: not there (cgroup v1)


class ForkRequest(TypedDict):
    """Daemon to nursery, with one file descriptor: the shim's end of its first connection."""

    op: Literal["fork"]
    config: ForkConfig


# Requests, by the daemon to a shim. Each is answered with a reply.


class StatusRequest(TypedDict):
    """The daemon asks whether a shim is at work. Any reply is a yes."""

    op: Literal["status"]


class ReopenRequest(TypedDict):
    """Go on with the container's log in a new file of the same path: the kubelet has renamed the old one."""

    op: Literal["reopen"]


class AttachRequest(TypedDict):
    """Copy the container's output, from now on, to one file descriptor for each stream.

    The reply brings the writing end of the container's standard input, or its terminal, where it has one.
    """

    op: Literal["attach"]
    streams: list[Literal["stdout", "stderr"]]


class CloseStdinRequest(TypedDict):
    """Close the shim's end of the container's standard input: an attached client has sent all, and StdinOnce is set."""

    op: Literal["close-stdin"]


class SignalRequest(TypedDict):
    """Have the runtime's shim send a signal to the container's first process, which may be in a virtual machine."""

    op: Literal["signal"]
    signal: int


class ResizeRequest(TypedDict):
    """Set the size of a terminal that only the runtime's shim has: of the container, or of an exec."""

    op: Literal["resize"]
    console: str  # the console socket that the exec was given; empty: the container's own
    width: int
    height: int


class UpdateRequest(TypedDict):
    """Have the runtime's shim set limits of the container. `UpdatedEvent` tells the outcome."""

    op: Literal["update"]
    resources: dict[str, object]  # LinuxResources (runtime specification, config-linux.md)


class ExecRequest(TypedDict):
    """Start a process in the container, with three file descriptors as its standard streams, or with a terminal.

    The reply comes before the process runs. The end of the exec is an event to this connection alone. When the
    connection closes, the shim kills the process and its process group.
    """

    op: Literal["exec"]
    exec_id: str  # a file name that the daemon chooses; no other exec of the container has it now
    spec: str  # path of a file with the OCI process
    console: NotRequired[str]  # path of the socket to which the OCI runtime sends the terminal; no descriptors then
    owned: Literal[True]  # shims of 0.1.0 kill the process with its connection only if this is set


# Replies, by the nursery and by shims.


class OkReply(TypedDict):
    """The request is carried out, or under way."""

    ok: Literal[True]


class ErrorReply(TypedDict):
    """The request is refused, or failed; "errno" is there where the kernel has refused something."""

    error: str
    errno: NotRequired[int]


# What a shim tells. It greets each new connection, and sends events after that.


@final
class StartingGreeting(TypedDict):
    """The OCI runtime has not yet started the container."""

    hello: Literal["shim"]
    version: int  # shims.wire.VERSION
    state: Literal["starting"]


@final
class RunningGreeting(TypedDict):
    """The container runs, or its exit record is not yet complete."""

    hello: Literal["shim"]
    version: int
    state: Literal["running"]
    init: int
    start_ticks: int
    started_at: int


class ExitRecord(TypedDict):
    """How the container ended. The shim writes it to exit.json in its state directory before it tells anybody."""

    code: int
    start_ticks: int
    started_at: int
    finished_at: int
    oom_killed: bool  # the kernel killed a process of the container because its memory limit was reached


@final
class ExitedGreeting(ExitRecord):
    """The container has ended. Where the shim has cleaned up as well, `GoneEvent` follows."""

    hello: Literal["shim"]
    version: int
    state: Literal["exited"]
    init: int


@final
class StartedEvent(TypedDict):
    """The container runs."""

    event: Literal["started"]
    init: int
    start_ticks: int
    started_at: int
    pid: NotRequired[int]  # the same as "init", for daemons of 0.1.0


@final
class FailedEvent(TypedDict):
    """The container could not be started. Nothing of it is left, and the shim ends.

    "errno" is there where the kernel has refused something to the shim.
    """

    event: Literal["failed"]
    error: str
    late: bool
    errno: NotRequired[int]


@final
class ExitedEvent(ExitRecord):
    """The container has ended, its log is complete, and its exit record is saved if the disk has room."""

    event: Literal["exited"]


@final
class GoneEvent(TypedDict):
    """The OCI runtime has deleted the container, which has exited; with "error" it could not. The shim ends."""

    event: Literal["gone"]
    error: NotRequired[str]


@final
class ExecStartedEvent(TypedDict):
    """The exec's process runs. Shims of version 1 do not tell."""

    event: Literal["exec-started"]
    exec: str  # not "exec_id": daemons of 0.2.0 take each event with that for the end of the exec


@final
class ExecFailedEvent(TypedDict):
    """The OCI runtime could not start the exec's process."""

    event: Literal["exec-failed"]
    exec_id: str
    error: str
    late: bool
    exec: NotRequired[str]  # the same as "exec_id", for daemons of 0.1.0


@final
class ExecExitedEvent(TypedDict):
    """The exec's process has ended."""

    event: Literal["exec-exited"]
    exec_id: str
    code: int
    exec: NotRequired[str]  # the same as "exec_id", for daemons of 0.1.0


@final
class UpdatedEvent(TypedDict):
    """The container has its new limits; with "error" it has not. To the connection that asked, and to no other."""

    event: Literal["updated"]
    late: bool
    error: NotRequired[str]


Request = (
    ForkRequest
    | StatusRequest
    | ReopenRequest
    | AttachRequest
    | CloseStdinRequest
    | ExecRequest
    | SignalRequest
    | ResizeRequest
    | UpdateRequest
)
Reply = OkReply | ErrorReply
ShimGreeting = StartingGreeting | RunningGreeting | ExitedGreeting
ShimEvent = (
    StartedEvent
    | FailedEvent
    | ExitedEvent
    | GoneEvent
    | ExecStartedEvent
    | ExecFailedEvent
    | ExecExitedEvent
    | UpdatedEvent
)
# All that a shim sends unasked. In full, since mypy does not tell the members of a union of unions apart by their keys.
ShimMessage = (
    StartingGreeting
    | RunningGreeting
    | ExitedGreeting
    | StartedEvent
    | FailedEvent
    | ExitedEvent
    | GoneEvent
    | ExecStartedEvent
    | ExecFailedEvent
    | ExecExitedEvent
    | UpdatedEvent
)
