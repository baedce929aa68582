"""What a daemon sends to a shim, checked: the configuration, and values of requests."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .messages import TaskConfig
    from .wire import Message


class RequestError(Exception):
    """A request, or the start itself, cannot be carried out. The daemon gets the text."""


def reason(error: Exception) -> str:
    """The words of an error for the daemon. For a failed system call they have the path and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


class ShimConfig:
    """A checked `shims.messages.ForkConfig`. Raises RequestError for a key that is missing or wrong."""

    __slots__ = (
        "bundle",
        "directory",
        "id",
        "log_path",
        "max_line",
        "oom_files",
        "owner",
        "pod_events",
        "runtime_command",
        "stdin",
        "task",
        "task_of",
        "tty",
    )

    def __init__(self, message: Message) -> None:
        self.id = text(message, "id")
        self.bundle = text(message, "bundle")
        self.directory = text(message, "directory")
        self.runtime_command = texts(message, "runtime_command")
        self.task = _task(message["task"]) if message.get("task") else None
        self.task_of = text(message, "task_of") if message.get("task_of") else ""
        self.oom_files = texts(message, "oom_files")
        self.owner = _numbers(message, "owner")
        self.pod_events = text(message, "pod_events") if message.get("pod_events") else ""
        self.log_path = text(message, "log_path") if message.get("log_path") else ""
        self.max_line = whole(message, "max_line")
        self.tty = bool(message.get("tty"))
        self.stdin = bool(message.get("stdin"))


def _task(message: Message) -> TaskConfig:
    return {
        "command": texts(message, "command"),
        "namespace": text(message, "namespace"),
        "options_type": str(message.get("options_type", "")),
        "options": str(message.get("options", "")),
    }


def text(message: Message, key: str) -> str:
    """A string of a message. Raises RequestError."""
    value = message.get(key)
    if not isinstance(value, str) or not value or "\0" in value:
        raise RequestError(f"{key!r} must be a non-empty string without NUL, not {value!r}")
    return value


def whole(message: Message, key: str) -> int:
    """A number of a message that is not negative. Raises RequestError."""
    value = message.get(key)
    if type(value) is not int or value < 0:
        raise RequestError(f"{key!r} must be a whole number, not {value!r}")
    return value


def _numbers(message: Message, key: str) -> list[int]:
    """A list of two numbers of a message, or an empty one; without the key it is empty. Raises RequestError."""
    value = message.get(key, [])
    if not isinstance(value, list) or len(value) not in (0, 2) or not all(type(item) is int for item in value):
        raise RequestError(f"{key!r} must be a list of two whole numbers, not {value!r}")
    return value


def texts(message: Message, key: str) -> list[str]:
    """A list of strings of a message; without the key it is empty. Raises RequestError."""
    value = message.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RequestError(f"{key!r} must be a list of strings, not {value!r}")
    return value
