"""SIGUSR1: what each task and each thread of the daemon is doing goes to the log, for a daemon that seems to hang."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from types import FrameType

import structlog

log = structlog.get_logger(__name__)

# A daemon under load has some hundred tasks.
_MAX_TASKS = 500
_MAX_FRAMES = 12


def log_it() -> None:
    """Log the stack of each thread and each task: the innermost calls, the caller before the called."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.ident in frames:
            log.info("a thread", thread=thread.name, at=_stack(frames[thread.ident]))
    tasks = asyncio.all_tasks()
    for task in sorted(tasks, key=lambda task: task.get_name())[:_MAX_TASKS]:
        stack: list[str] = []
        for frame in task.get_stack(limit=_MAX_FRAMES):
            stack += [_place(frame, frame.f_lineno)]
        stack += _awaited(task)
        log.info("a task", task=task.get_name(), at=stack)
    log.info("work under way", threads=len(frames), tasks=len(tasks))


def _awaited(task: asyncio.Task[object]) -> list[str]:
    """The calls that the coroutine of a task awaits, up to the innermost. ``Task.get_stack`` has only the outermost."""
    found: list[str] = []
    awaited = getattr(task.get_coro(), "cr_await", None)
    while awaited is not None and len(found) < _MAX_FRAMES:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            found.append(_place(frame, frame.f_lineno))
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return found


def _stack(frame: FrameType) -> list[str]:
    return [_place(inner, line) for inner, line in traceback.walk_stack(frame)][:_MAX_FRAMES][::-1]


def _place(frame: FrameType, line: int) -> str:
    code = frame.f_code
    directory, file = os.path.split(code.co_filename)
    return f"{os.path.basename(directory)}/{file}:{line} {code.co_qualname}"
