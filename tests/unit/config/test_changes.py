"""What a reload takes over."""

from __future__ import annotations

from criserver.config import Settings
from criserver.config.changes import changes, reloaded

OLD = Settings(
    {"root": "/r", "log": {"level": "info"}, "runtimes": {"runc": {"path": "runc"}, "crun": {"path": "crun"}}},
    {("runtimes", "crun", "path"): "/old"},
)
NEW = Settings(
    {"root": "/other", "log": {"level": "debug"}, "runtimes": {"runc": {"path": "/runc"}, "kata": {"path": "k"}}},
    {("root",): "/new", ("log", "level"): "/new", ("runtimes", "kata", "path"): "/drop-in"},
)


def test_each_key_that_differs_is_told_with_its_file() -> None:
    told = {change.key: (change.old, change.new, change.file, change.reloaded) for change in changes(OLD, NEW)}
    assert told == {
        ("root",): ("/r", "/other", "/new", False),
        ("log", "level"): ("info", "debug", "/new", True),
        ("runtimes", "runc", "path"): ("runc", "/runc", "the defaults", True),
        ("runtimes", "crun", "path"): ("crun", None, "the defaults", True),
        ("runtimes", "kata", "path"): (None, "k", "/drop-in", True),
    }
    assert list(changes(OLD, OLD)) == []


def test_only_what_can_change_is_taken_over() -> None:
    settings = reloaded(OLD, NEW)
    assert settings.tables == {**NEW.tables, "root": "/r"}
    assert settings.origins == {("log", "level"): "/new", ("runtimes", "kata", "path"): "/drop-in"}
    # What is not taken over is told again at the next reload.
    assert [change.key for change in changes(settings, NEW)] == [("root",)]
