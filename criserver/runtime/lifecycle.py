"""The life of a pod sandbox and of a container: their states, and every step from one to another.

The registry refuses a step that is not in this table, and the events that callers are told are read off it. No state
is passed over: a container that has run and ended before anybody looked is RUNNING first, and EXITED then.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class SandboxState(enum.Enum):
    """Where a sandbox is in its life. CREATING and REMOVING are intentions: start-up rolls them back or on."""

    CREATING = "creating"
    READY = "ready"
    NOT_READY = "not-ready"
    REMOVING = "removing"


class ContainerState(enum.Enum):
    """Where a container is in its life. CREATING, STARTING and REMOVING are intentions."""

    CREATING = "creating"
    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    EXITED = "exited"
    REMOVING = "removing"


class EventType(enum.Enum):
    """CRI ContainerEventType."""

    CREATED = "created"
    STARTED = "started"
    STOPPED = "stopped"
    DELETED = "deleted"


State = SandboxState | ContainerState


@dataclass(frozen=True, slots=True)
class Step:
    """What takes a record from one state to the next, and what listeners are told of it, in this order.

    ``old`` is None where there is no record yet, ``new`` where there is none any more.
    """

    old: State | None
    what: str
    new: State | None
    told: tuple[EventType, ...] = ()


def _sandbox_steps() -> tuple[Step, ...]:
    state, told = SandboxState, EventType
    return (
        Step(None, "it is asked for", state.CREATING),
        Step(state.CREATING, "all of it is there", state.READY, (told.CREATED, told.STARTED)),
        Step(state.CREATING, "it cannot be made, and is undone", None),
        # From here on callers see it, as they are to remove it.
        Step(state.CREATING, "it cannot be made, nor undone", state.NOT_READY, (told.CREATED, told.STOPPED)),
        Step(state.CREATING, "it is removed with what could not be undone", state.REMOVING, (told.CREATED,)),
        Step(state.READY, "it is stopped, or has lost its namespaces", state.NOT_READY, (told.STOPPED,)),
        Step(state.READY, "it is removed", state.REMOVING, (told.STOPPED,)),
        Step(state.NOT_READY, "it is removed", state.REMOVING),
        Step(state.REMOVING, "nothing of it is left", None, (told.DELETED,)),
    )


def _container_steps() -> tuple[Step, ...]:
    state, told = ContainerState, EventType
    return (
        Step(None, "it is asked for", state.CREATING),
        Step(state.CREATING, "all of it is there", state.CREATED, (told.CREATED,)),
        Step(state.CREATING, "it cannot be made, and is undone", None),
        # From here on callers see it, as they are to remove it.
        Step(state.CREATING, "it cannot be made, nor undone", state.EXITED, (told.CREATED, told.STOPPED)),
        Step(state.CREATING, "it is removed with what could not be undone", state.REMOVING, (told.CREATED,)),
        Step(state.CREATED, "its start begins", state.STARTING),
        Step(state.CREATED, "a reboot has taken its files", state.EXITED, (told.STOPPED,)),
        Step(state.CREATED, "it is removed", state.REMOVING),
        Step(state.STARTING, "its process runs", state.RUNNING, (told.STARTED,)),
        # Told without a start, which there was not: an evented kubelet looks at the container then.
        Step(state.STARTING, "its start has failed, or nobody knows how it went", state.EXITED, (told.STOPPED,)),
        Step(state.STARTING, "it is removed", state.REMOVING),
        Step(state.RUNNING, "its process has ended", state.EXITED, (told.STOPPED,)),
        Step(state.RUNNING, "it is removed", state.REMOVING, (told.STOPPED,)),
        Step(state.EXITED, "it is removed", state.REMOVING),
        Step(state.REMOVING, "nothing of it is left", None, (told.DELETED,)),
    )


SANDBOX_STEPS = _sandbox_steps()
CONTAINER_STEPS = _container_steps()
_STEPS: Mapping[tuple[State | None, State | None], Step] = {
    (step.old, step.new): step for step in (*SANDBOX_STEPS, *CONTAINER_STEPS)
}
_HIDDEN = (SandboxState.CREATING, ContainerState.CREATING)


def is_allowed(old: State | None, new: State | None) -> bool:
    """Whether a record may go from ``old`` to ``new``, or stay what it is; None is no record."""
    return (old, new) in _STEPS or (old is new and old is not None)


def told(old: State | None, new: State | None) -> tuple[EventType, ...]:
    """What listeners are told of the step, in this order; nothing where a record stays in its state."""
    step = _STEPS.get((old, new))
    return () if step is None else step.told


def is_visible(state: State) -> bool:
    """Whether callers see a record in this state. What is still being made may yet come to nothing."""
    return state not in _HIDDEN
