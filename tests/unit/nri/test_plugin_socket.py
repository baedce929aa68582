"""The socket of plugins: its directory, an old socket, one of another runtime, and a path that cannot be used."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

from structlog.testing import capture_logs

from criserver.nri.plugin_socket import PluginSocket


async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    writer.close()


async def test_it_listens_and_is_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "nri" / "nri.sock")
    listener = PluginSocket(path, connected)
    await listener.listen()
    assert stat.S_IMODE(os.stat(tmp_path / "nri").st_mode) == 0o700
    reader, writer = await asyncio.open_unix_connection(path)
    assert await reader.read() == b"hello"
    writer.close()
    listener.close()
    assert not os.path.exists(path)


async def test_a_socket_that_nobody_serves_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "nri.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    listener = PluginSocket(path, connected)
    await listener.listen()
    reader, writer = await asyncio.open_unix_connection(path)
    assert await reader.read() == b"hello"
    writer.close()
    listener.close()


async def test_the_socket_of_another_runtime_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "nri.sock")
    other, listener = PluginSocket(path, connected), PluginSocket(path, connected)
    await other.listen()
    with capture_logs() as logs:
        await listener.listen()
    assert "another runtime serves" in logs[0]["event"]
    listener.close()
    assert os.path.exists(path)
    other.close()


async def test_the_socket_of_a_busy_runtime_is_left_alone_too(tmp_path: Path) -> None:
    path = str(tmp_path / "nri.sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(path)
        busy.listen(0)
        first.connect(path)
        before = os.stat(path).st_ino
        with capture_logs() as logs:
            await PluginSocket(path, connected).listen()
        assert "another runtime serves" in logs[0]["event"]
        assert os.stat(path).st_ino == before


async def test_a_path_that_cannot_be_used_is_logged(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    listener = PluginSocket(str(tmp_path / "file" / "nri.sock"), connected)
    with capture_logs() as logs:
        await listener.listen()
    assert logs[0]["event"].startswith("the NRI socket cannot be made")
    listener.close()


async def test_a_socket_that_another_process_has_made_meanwhile_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "nri.sock"
    listener = PluginSocket(str(path), connected)
    await listener.listen()
    path.unlink()
    path.write_text("")
    listener.close()
    assert path.exists()
