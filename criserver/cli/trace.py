"""``criserver trace``: what took the time of the last calls, as a timeline on the terminal."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

from criserver.cli.client import ADMIN, as_json, connected, method
from criserver.cli.options import address
from criserver.cli.progress_display import short
from criserver.cli.table import Cell, coloured, paint, print_table
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.text import printable

# Columns: of the output where there is no terminal, of two durations with their spaces, of the narrowest bar.
_WIDTH = 100
_DURATIONS = 26
_MIN_BAR = 10
_MIN_NAME = 16
# What digests begin with, how many digits they and IDs have, and how many of these tell an ID from others.
_DIGESTS = ("sha256:", "sha512:")
_ID_LENGTHS = (64, 128)
_SHOWN_ID = 12
# Seconds from which a duration is not written in milliseconds.
_LONG = 100


def trace(options: argparse.Namespace) -> int:
    """Print the timelines of the calls for a pod or container, or a table of all calls. Raises CriError."""
    with connected(address(options)) as channel:
        calls = method(channel, ADMIN, "Trace")(admin.TraceRequest(subject=options.subject or "")).calls
    if options.json:
        print(json.dumps([as_json(call) for call in calls], indent=2))
    elif options.subject is None:
        _print_calls(calls)
    else:
        width = shutil.get_terminal_size((_WIDTH, 24)).columns
        for line in timelines(calls, width, in_colour=coloured(sys.stdout)):
            print(line)
    return 0


def timelines(calls: Sequence[admin.TracedCall], width: int, *, in_colour: bool = False) -> Iterator[str]:
    """The lines for some calls, none longer than ``width``: a heading for each call, and a line for each part of it.

    The bars of a call share one scale: its own beginning and end.
    """
    for number, call in enumerate(calls):
        if number:
            yield ""
        yield from _timeline(call, width, in_colour=in_colour)


def _timeline(call: admin.TracedCall, width: int, *, in_colour: bool) -> Iterator[str]:
    whole = max((call.seconds, *(part.began + part.seconds for part in call.parts)))
    parts = list(_in_order(call.parts))
    names = [f"{'  ' * (depth + 1)}{_shortened(part.name)}" for depth, part in parts]
    room = max(_MIN_NAME, min(max(map(len, names), default=0), width - _DURATIONS - _MIN_BAR))
    bar = width - _DURATIONS - room

    def line(words: str, colour: str) -> str:
        fitting = words if len(words) <= width else words[: width - 1] + "…"
        return paint(fitting, colour) if in_colour else fitting

    yield line(_heading(call), "red" if call.error else "bold")
    if call.error:
        yield line(f"  failed: {printable(call.error)}", "red")
    for name, (depth, part) in zip(names, parts, strict=True):
        drawn = _bar(part, whole, bar) if bar >= _MIN_BAR else ""
        words = f"{name[:room]:<{room}} {_milliseconds(part.began):>11} {_milliseconds(part.seconds):>11}  {drawn}"
        yield line(words.rstrip(), "red" if part.error else "")
        if part.error:
            yield line(f"{'  ' * (depth + 2)}failed: {printable(part.error)}", "red")
    if call.dropped:
        yield line(f"  and {call.dropped} more parts, which were not kept", "")


def _heading(call: admin.TracedCall) -> str:
    if call.under_way:
        end = f"{call.code}, and its work goes on" if call.code else "under way"
    else:
        end = call.code
    about = call.about
    who = "/".join(about[key] for key in ("pod", "name") if key in about) or about.get("reference", "")
    if call.rpc == "PullImage":
        who = about.get("reference", "")
    started = time.strftime("%H:%M:%S", time.localtime(call.at / 1e9))
    moment = f"{started}.{call.at // 1_000_000 % 1000:03}"
    return printable(f"{moment} {call.rpc} {who}  {_milliseconds(call.seconds)}  {end}")


def _in_order(parts: Sequence[admin.TracedPart]) -> Iterator[tuple[int, admin.TracedPart]]:
    """Each part after the one that it belongs to, with its depth."""
    below: defaultdict[int, list[int]] = defaultdict(list)
    for number, part in enumerate(parts):
        below[part.parent].append(number)
    todo = [(0, number) for number in reversed(below[-1])]
    while todo:
        depth, number = todo.pop()
        yield depth, parts[number]
        todo += [(depth + 1, child) for child in reversed(below[number])]


def _bar(part: admin.TracedPart, whole: float, width: int) -> str:
    scale = width / whole if whole > 0 else 0.0
    start = min(int(part.began * scale), width - 1)
    length = min(max(1, round(part.seconds * scale)), width - start)
    drawn = "=" * length
    return " " * start + (drawn[:-1] + ">" if part.under_way else drawn)


def _shortened(name: str) -> str:
    """A name whose digests and IDs have only their first characters."""
    words = (word.partition(":")[2] if word.startswith(_DIGESTS) else word for word in name.split(" "))
    return " ".join(word[:_SHOWN_ID] if len(word) in _ID_LENGTHS else word for word in words)


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= _LONG else f"{seconds * 1000:.1f} ms"


def _print_calls(calls: Sequence[admin.TracedCall]) -> None:
    heads = ("BEGAN", "RPC", "TOOK", "CODE", "POD", "CONTAINER", "ID", "LONGEST PART")
    rows: list[Sequence[str | Cell]] = [[Cell(head, "bold") for head in heads]]
    for call in calls:
        about = call.about
        code = Cell("under way", "yellow") if call.under_way else Cell(call.code, "red" if call.error else "")
        began = time.strftime("%H:%M:%S", time.localtime(call.at / 1e9))
        subject = short(about.get("container") or about.get("sandbox", "")) or "-"
        whole = {part.parent for part in call.parts}  # a part with parts of its own says less than those do
        parts = (part for number, part in enumerate(call.parts) if number not in whole)
        longest = max(parts, key=lambda part: part.seconds, default=None)
        words = "-" if longest is None else f"{_shortened(longest.name)} {_milliseconds(longest.seconds)}"
        pod, name = about.get("pod", "-"), about.get("name", "-")
        rows.append((began, call.rpc, _milliseconds(call.seconds), code, pod, name, subject, words))
    print_table(rows, keep=(0, 1, 2, 3, 6))
