"""Trees that containers make: very deep, with names of any bytes, and changed while they are read."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapshotter import copies, file_tree, mounts, removal

DEEP = 20_000
NAMES = [b"-rf", b"a\nb", b"\xff\xfe", b"n" * 255, b"...", b" ", b"\\", "ü".encode()]


def nested(top: Path, depth: int, name: str = "d") -> None:
    """Directories in each other, with a file in the last one."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)


@pytest.fixture
def top() -> Iterator[Path]:
    """A directory for trees, which may be deeper than pytest can delete; in memory, as disks are slow at depth."""
    made = Path(tempfile.mkdtemp(dir="/dev/shm")) / "top"
    made.mkdir()
    yield made
    removal.remove_path(str(made.parent))


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do ``work`` again and again beside the block."""
    end = threading.Event()

    def go_on() -> None:
        while not end.is_set():
            work()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def ignoring_errors(work: Callable[[], object]) -> Callable[[], None]:
    def done() -> None:
        try:
            work()
        except OSError:
            pass

    return done


def found(top: Path) -> list[str]:
    fd = os.open(top, os.O_RDONLY)
    try:
        return [place.path_of(entry.name) for place, entry in file_tree.walk(fd)]
    finally:
        os.close(fd)


def test_no_depth_is_too_much(top: Path) -> None:
    (top / "t").mkdir()
    nested(top / "t", DEEP)
    assert file_tree.measure(str(top)).inodes == DEEP + 3
    fd = os.open(top, os.O_RDONLY)
    paths = 0
    for place, entry in file_tree.walk(fd):
        paths += 1
        last = place.depth, entry.name
    os.close(fd)
    assert (paths, last) == (DEEP + 2, (DEEP + 1, "bottom"))
    removal.remove_path(str(top / "t"))
    assert os.listdir(top) == []


def test_any_name_is_one(top: Path) -> None:
    (top / "t").mkdir()
    for name in NAMES:
        path = os.path.join(os.fsencode(top / "t"), name)
        os.makedirs(os.path.join(path, name, name))
        Path(os.fsdecode(os.path.join(path, b"f"))).touch()
    assert file_tree.measure(str(top / "t")).inodes == 1 + 4 * len(NAMES)
    assert sorted(os.fsencode(path) for path in found(top / "t") if "/" not in path) == sorted(NAMES)
    os.rename(top / "t", os.path.join(os.fsencode(top), b"n" * 255))
    removal.remove_path(str(top / ("n" * 255)))
    assert os.listdir(top) == []


@pytest.mark.parametrize("kind", ["file", "link", "broken link", "pipe", "none", "no parent", "a file's child"])
def test_whatever_is_there_is_deleted(top: Path, kind: str) -> None:
    outside = top / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    path = top / "t"
    if kind == "file":
        path.touch()
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "no parent":
        path = top / "none" / "t"
    elif kind == "a file's child":
        path = outside / "kept" / "t"
    removal.remove_path(str(path))
    assert os.listdir(top) == ["outside"]
    assert os.listdir(outside) == ["kept"]


def test_no_link_in_a_tree_is_followed(top: Path) -> None:
    outside = top / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (top / "t/sub").mkdir(parents=True)
    for place in ("t/link", "t/sub/link"):
        (top / place).symlink_to(outside)
    assert sorted(found(top / "t")) == ["link", "sub", "sub/link"]
    removal.remove_path(str(top / "t"))
    assert os.listdir(top) == ["outside"]
    assert os.listdir(outside) == ["kept"]


def test_what_an_earlier_attempt_left_beside_it_is_no_hindrance(top: Path) -> None:
    (top / "t/a/b").mkdir(parents=True)
    (top / "t.1/full").mkdir(parents=True)
    removal.remove_path(str(top / "t"))
    assert os.listdir(top) == ["t.1"]


def test_only_directories_are_deleted_of_cgroups(top: Path) -> None:
    (top / "t/a/b").mkdir(parents=True)
    (top / "t/a/tasks").touch()
    fd = os.open(top, os.O_RDONLY)
    try:
        # On a real one the file would go with its directory.
        with pytest.raises(OSError, match="faster"):
            removal.remove(fd, "t", files=False)
    finally:
        os.close(fd)
    assert sorted(found(top)) == ["t", "t/a", "t/a/tasks"]


def test_files_that_are_made_all_the_time_are_an_end_in_words(top: Path) -> None:
    (top / "t/sub").mkdir(parents=True)
    numbers = iter(range(10**9))
    # Always one more as soon as one has gone.
    real = os.rmdir

    def refilled(path: str, *, dir_fd: int | None = None) -> None:
        (top / f"t/sub/{next(numbers)}").touch()
        real(path, dir_fd=dir_fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rmdir", refilled)
        with pytest.raises(file_tree.UnsettledError, match=r"faster.*t/sub'"):
            removal.remove_path(str(top / "t"))
    removal.remove_path(str(top / "t"))
    assert os.listdir(top) == []


def test_directories_that_are_nested_all_the_time_are_an_end_in_words(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that goes on downwards is never caught up with."""
    monkeypatch.setattr(file_tree, "_MAX_CHANGED", 500)
    (top / "t").mkdir()
    real = os.scandir

    def nesting(path: int) -> object:
        with suppress(FileExistsError):
            os.mkdir("n", dir_fd=path)
            inner = os.open("n", os.O_RDONLY, dir_fd=path)
            os.close(os.open("f", os.O_CREAT, dir_fd=inner))
            os.close(inner)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", nesting)
        for work in (file_tree.measure, removal.remove_path):
            with pytest.raises(file_tree.UnsettledError, match="somebody makes directories all the time"):
                work(str(top / "t"))
    removal.remove_path(str(top / "t"))
    assert os.listdir(top) == []


def test_a_tree_that_somebody_moves_about_is_deleted(top: Path) -> None:
    (top / "t").mkdir()
    for number in range(200):
        (top / f"t/{number}/a/b/c").mkdir(parents=True)
        (top / f"t/{number}/a/b/c/f").touch()
    one, other = top / "t/100/a/b", top / "t/101/moved"
    with meanwhile(ignoring_errors(lambda: (os.rename(one, other), os.rename(other, one)))):
        removal.remove_path(str(top / "t"))
    assert os.listdir(top) == []


def test_the_way_up_leads_nowhere_else(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is moved out of the tree while it is emptied: what is beside its new place is not deleted."""
    (top / "t/a/b/c").mkdir(parents=True)
    (top / "t/z").mkdir()
    (top / "elsewhere/full").mkdir(parents=True)
    (top / "elsewhere/kept").touch()
    real = os.scandir

    def moving(path: int) -> object:
        inside = top / "t/a/b/c"
        if inside.exists() and inside.samefile(f"/proc/self/fd/{path}"):
            os.rename(top / "t/a/b", top / "elsewhere/b")
        return real(path)

    (top / "t/a/b/c/f").touch()
    monkeypatch.setattr(os, "scandir", moving)
    removal.remove_path(str(top / "t"))
    monkeypatch.undo()
    assert sorted(os.listdir(top)) == ["elsewhere"]
    assert {"full", "kept"} <= set(os.listdir(top / "elsewhere"))


@pytest.mark.parametrize("lacking", ["the way up", "the way down again"])
def test_a_lack_of_descriptors_hides_no_directory(top: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """What is left of the tree would be passed over: a measure would be too small, and files would keep their label."""
    (top / "t/a/b").mkdir(parents=True)
    (top / "t/a/c").mkdir()
    real_open, real_enter = os.open, mounts.openat2
    up: list[str] = []

    def opened(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == ".." and not up:
            up.append(path)
            if lacking == "the way up":
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real_open(path, flags, mode, dir_fd=dir_fd)

    def entered(fd: int, path: str, flags: int, resolve: int) -> int:
        if up:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real_enter(fd, path, flags, resolve)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(file_tree, "openat2", entered)
    with pytest.raises(OSError, match="Too many open files"):
        file_tree.measure(str(top / "t"))


def test_a_long_path_is_told_by_its_ends(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "t").mkdir()
    nested(top / "t", 3000)
    real = os.unlink

    def refused(path: str, *, dir_fd: int | None = None) -> None:
        if path == "bottom":
            raise PermissionError(13, "Permission denied")
        real(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        with pytest.raises(PermissionError, match=r"top/t/d/d.*….*d/d/bottom'") as error:
            removal.remove_path(str(top / "t"))
    assert len(str(error.value)) < 3000


def unlink_without(name: str) -> Callable[..., None]:
    """unlink(2) on a disk that fails where a file has this name."""
    real = os.unlink

    def refused(path: str, *, dir_fd: int | None = None) -> None:
        if path == name:
            raise OSError(5, "Input/output error")
        real(path, dir_fd=dir_fd)

    return refused


def test_the_rest_goes_where_something_has_to_stay(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (top / f"t/{name}/sub").mkdir(parents=True)
        (top / f"t/{name}/sub/f").touch()
    (top / "t/b/sub/stays").touch()
    monkeypatch.setattr(os, "unlink", unlink_without("stays"))
    with pytest.raises(OSError, match=r"Input/output error: '.*t/b/sub/stays'"):
        removal.remove_path(str(top / "t"))
    assert sorted(found(top)) == ["t", "t/b", "t/b/sub", "t/b/sub/stays"]


def nobody_checks() -> None:
    """Nothing ends it early."""


def copied(
    source: Path, target: Path, check: Callable[[], None] = nobody_checks, hidden: Set[str] = frozenset()
) -> None:
    fds = [os.open(path, os.O_RDONLY) for path in (source, target)]
    try:
        copies.copy(fds[0], fds[1], check, hidden)
    finally:
        for fd in fds:
            os.close(fd)


def facts(path: Path) -> tuple[int, int, int, int, int]:
    status = os.lstat(path)
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_size


def test_hidden_directories_are_not_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "s", tmp_path / "c"
    (source / "a/b/c").mkdir(parents=True)
    (source / "a/b/file").touch()
    (source / "a/file").touch()
    (source / "b").mkdir()
    (source / "b/file").touch()
    target.mkdir()
    copied(source, target, hidden={"a/b", "b/file", "nowhere"})
    assert sorted(found(target)) == ["a", "a/b", "a/file", "b", "b/file"]


def test_the_places_of_files_with_several_names_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_MAX_LINKED", 2)
    source, target = tmp_path / "s", tmp_path / "c"
    (source / "d/e").mkdir(parents=True)
    target.mkdir()
    for name in ("one", "two", "three"):
        (source / "d" / name).write_text(name)
        os.link(source / "d" / name, source / "d/e" / name)
    copied(source, target)
    same = [(target / "d" / n).samefile(target / "d/e" / n) for n in ("one", "two", "three")]
    assert sorted(same) == [False, True, True]
    assert [(target / "d/e" / n).read_text() for n in ("one", "two", "three")] == ["one", "two", "three"]


def test_a_copy_is_what_the_tree_was(tmp_path: Path) -> None:
    source, target = tmp_path / "s", tmp_path / "c"
    (source / "d/e").mkdir(parents=True)
    target.mkdir()
    (source / "d/file").write_bytes(b"content")
    (source / "d/file").chmod(0o4711)
    os.link(source / "d/file", source / "d/e/again")
    (source / "d/link").symlink_to("/etc/shadow")
    os.mkfifo(source / "pipe", 0o622)
    with open(source / "sparse", "wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"x" * 5000)
    for name in NAMES:
        Path(os.fsdecode(os.path.join(os.fsencode(source), name))).write_bytes(name)
    os.setxattr(source / "d/file", "user.colour", b"red")
    for path in (source / "d/file", source / "d/e", source / "d", source):
        os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    (source / "d").chmod(0o1755)
    copied(source, target)
    assert sorted(found(target)) == sorted(found(source))
    for path in (Path(name) for name in ["", *found(source)]):
        if (source / path).is_dir() and not (source / path).is_symlink():
            assert facts(target / path)[:4] == facts(source / path)[:4], path
        else:
            assert facts(target / path) == facts(source / path), path
    assert os.readlink(target / "d/link") == "/etc/shadow"
    assert (target / "d/e/again").samefile(target / "d/file")
    assert os.getxattr(target / "d/file", "user.colour") == b"red"
    assert (target / "sparse").read_bytes() == (source / "sparse").read_bytes()
    assert (target / "sparse").stat().st_blocks * 512 < 1 << 20


def test_a_deep_tree_is_copied(top: Path) -> None:
    for name in ("s", "c"):
        (top / name).mkdir()
    nested(top / "s", DEEP)
    copied(top / "s", top / "c")
    assert file_tree.measure(str(top / "c")).inodes == DEEP + 2


def test_copying_ends_early_where_it_is_told_to(top: Path) -> None:
    for name in ("s", "c"):
        (top / name).mkdir()
    for number in range(10):
        (top / f"s/{number}").touch()
    left = iter(range(5))

    def check() -> None:
        if next(left, None) is None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        copied(top / "s", top / "c", check)
    assert len(os.listdir(top / "c")) == 5


def test_what_cannot_be_copied_is_named(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "s/d").mkdir(parents=True)
    (top / "c").mkdir()
    (top / "s/d/f").touch()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(OSError, match=r"No space left on device: 'd/f'"):
        copied(top / "s", top / "c")
    shutil.rmtree(top / "c")


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the names of some ten directories, as if the trees of these tests had a million."""
    monkeypatch.setattr(file_tree, "_MAX_NAMES", 10 * sys.getsizeof("000"))
    monkeypatch.setattr(file_tree, "_MIN_NAMES", 3 * sys.getsizeof("000"))


def wide(top: Path) -> None:
    """A hundred directories beside each other at two depths, each with a file."""
    for number in range(100):
        for directory in (top / f"{number:03}", top / f"050/{number:03}"):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "f").touch()


@pytest.mark.usefixtures("little_memory")
def test_a_tree_that_is_too_wide_to_remember_is_deleted(top: Path) -> None:
    (top / "t").mkdir()
    wide(top / "t")
    removal.remove_path(str(top / "t"))
    assert os.listdir(top) == []


@pytest.mark.usefixtures("little_memory")
def test_what_cannot_be_deleted_of_a_wide_tree_is_told(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "t").mkdir()
    wide(top / "t")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink_without("f"))
        with pytest.raises(OSError, match="Input/output error"):
            removal.remove_path(str(top / "t"))


@pytest.mark.usefixtures("little_memory")
def test_all_of_a_wide_tree_is_measured(top: Path) -> None:
    """A container could hide its files behind a million of directories."""
    (top / "t").mkdir()
    wide(top / "t")
    assert file_tree.measure(str(top / "t")).inodes == 1 + 4 * 100


@pytest.mark.usefixtures("little_memory")
def test_all_of_a_wide_tree_is_copied(top: Path) -> None:
    (top / "t").mkdir()
    wide(top / "t")
    (top / "copy").mkdir()
    copied(top / "t", top / "copy", hidden={"050/099"})
    assert sorted(found(top / "copy")) == sorted(set(found(top / "t")) - {"050/099/f"})


def test_names_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sys.getsizeof("a")
    monkeypatch.setattr(file_tree, "_MAX_NAMES", 2 * size)
    monkeypatch.setattr(file_tree, "_MIN_NAMES", size)
    memory = file_tree.NameMemory()
    one, other = file_tree.Names(memory), file_tree.Names(memory)
    for name in "abc":
        one.add(name)
    assert (len(one), one.cut) == (2, True)
    other.add("d")
    assert (len(other), other.cut) == (1, False), "there is always room for some"
    other.put("e")
    assert (one.pop(), other.pop(), other.pop(), len(one)) == ("b", "e", "d", 1)
    one.clear()
    other.clear()
    assert memory.left == 2 * size


def test_links_behind_the_first_ones_count_each(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "t").mkdir()
    for number in range(4):
        (top / f"t/{number}").touch()
        os.link(top / f"t/{number}", top / f"t/{number}.link")
    assert file_tree.measure(str(top / "t")).inodes == 5
    monkeypatch.setattr(file_tree, "_MAX_LINKED", 3)
    assert file_tree.measure(str(top / "t")).inodes == 6
