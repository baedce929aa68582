"""The states of a pod sandbox and of a container, every step from one state to another, and the events of each step.

The record store refuses a step that is not in this table. No state is skipped: a container that has ended before the
daemon learned of its start becomes RUNNING first, and then EXITED.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class SandboxState(enum.Enum):
    """The state of a sandbox. When the daemon starts, it rolls CREATING back and finishes REMOVING."""

    CREATING = "creating"
    READY = "ready"
    NOT_READY = "not-ready"
    REMOVING = "removing"


class ContainerState(enum.Enum):
    """The state of a container. A daemon that starts rolls CREATING back and brings STARTING and REMOVING to an end."""

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
    """One step of a record from one state to another: its reason, and the events for listeners, in this order.

    ``old`` is None if there is no record before the step, ``new`` is None if there is none after it.
    """

    old: State | None
    reason: str
    new: State | None
    events: tuple[EventType, ...] = ()


def _sandbox_steps() -> tuple[Step, ...]:
    state, event = SandboxState, EventType
    return (
        Step(None, "RunPodSandbox begins", state.CREATING),
        Step(state.CREATING, "it is complete", state.READY, (event.CREATED, event.STARTED)),
        Step(state.CREATING, "making it failed, and it was cleaned up", None),
        # Callers see the sandbox from here on, so that they can remove it.
        Step(state.CREATING, "making it and cleaning up failed", state.NOT_READY, (event.CREATED, event.STOPPED)),
        Step(state.CREATING, "it is removed after a failed clean-up", state.REMOVING, (event.CREATED,)),
        Step(state.READY, "it is stopped, or its namespaces are gone", state.NOT_READY, (event.STOPPED,)),
        Step(state.READY, "it is removed", state.REMOVING, (event.STOPPED,)),
        Step(state.NOT_READY, "it is removed", state.REMOVING),
        Step(state.REMOVING, "nothing of it is left", None, (event.DELETED,)),
    )


def _container_steps() -> tuple[Step, ...]:
    state, event = ContainerState, EventType
    return (
        Step(None, "CreateContainer begins", state.CREATING),
        Step(state.CREATING, "it is complete", state.CREATED, (event.CREATED,)),
        Step(state.CREATING, "making it failed, and it was cleaned up", None),
        # Callers see the container from here on, so that they can remove it.
        Step(state.CREATING, "making it and cleaning up failed", state.EXITED, (event.CREATED, event.STOPPED)),
        Step(state.CREATING, "it is removed after a failed clean-up", state.REMOVING, (event.CREATED,)),
        Step(state.CREATED, "StartContainer begins", state.STARTING),
        Step(state.CREATED, "its mounts are gone after a reboot", state.EXITED, (event.STOPPED,)),
        Step(state.CREATED, "it is removed", state.REMOVING),
        Step(state.STARTING, "its process runs", state.RUNNING, (event.STARTED,)),
        # There was no start, so there is no STARTED. STOPPED makes an evented kubelet look at the container.
        Step(state.STARTING, "its start has failed, or its outcome is unknown", state.EXITED, (event.STOPPED,)),
        Step(state.STARTING, "it is removed", state.REMOVING),
        Step(state.RUNNING, "its process has ended", state.EXITED, (event.STOPPED,)),
        Step(state.RUNNING, "it is removed", state.REMOVING, (event.STOPPED,)),
        Step(state.EXITED, "it is removed", state.REMOVING),
        Step(state.REMOVING, "nothing of it is left", None, (event.DELETED,)),
    )


SANDBOX_STEPS = _sandbox_steps()
CONTAINER_STEPS = _container_steps()
_STEPS: Mapping[tuple[State | None, State | None], Step] = {
    (step.old, step.new): step for step in (*SANDBOX_STEPS, *CONTAINER_STEPS)
}
_HIDDEN = (SandboxState.CREATING, ContainerState.CREATING)


def is_allowed(old: State | None, new: State | None) -> bool:
    """Whether a record may go from ``old`` to ``new``, or stay in its state; None stands for no record."""
    return (old, new) in _STEPS or (old is new and old is not None)


def events_of(old: State | None, new: State | None) -> tuple[EventType, ...]:
    """The events of a step, in this order; none if the record stays in its state."""
    step = _STEPS.get((old, new))
    return () if step is None else step.events


def is_visible(state: State) -> bool:
    """Whether callers see a record in this state. They do not see one that is being made, as this may fail."""
    return state not in _HIDDEN
