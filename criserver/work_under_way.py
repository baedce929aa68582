"""SIGUSR1: what each task and each thread of the daemon is doing goes to the log, for a daemon that seems to hang."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import structlog

log = structlog.get_logger(__name__)

# A daemon under load has some hundred tasks.
_MAX_TASKS = 500
_MAX_FRAMES = 12


@dataclass(frozen=True, slots=True)
class Stack:
    """What a thread or a task is doing: the innermost calls, the caller before the called."""

    kind: Literal["thread", "task"]
    name: str
    at: list[str]


def log_it() -> None:
    """Log the stack of each thread and each task."""
    found = stacks()
    for stack in found:
        log.info(f"a {stack.kind}", **{stack.kind: stack.name}, at=stack.at)
    log.info("work under way", threads=sum(s.kind == "thread" for s in found), tasks=len(asyncio.all_tasks()))


def stacks() -> list[Stack]:
    """The stacks of all threads, then those of the tasks; of at most 500 tasks."""
    frames = sys._current_frames()
    found = [
        Stack("thread", thread.name, _stack(frames[thread.ident]))
        for thread in threading.enumerate()
        if thread.ident in frames
    ]
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name())[:_MAX_TASKS]:
        at = [_place(frame, frame.f_lineno) for frame in task.get_stack(limit=_MAX_FRAMES)]
        found.append(Stack("task", task.get_name(), at + _awaited(task)))
    return found


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
