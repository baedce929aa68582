"""The documentation in the Debian package: links to files of the package, and the manual page criserver.toml(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_SCHEME = re.compile(r"[a-z]+:|#")
_KEY = re.compile(r"(\w+) = (.*)")


def linked(text: str, page: str, places: Mapping[str, str]) -> str:
    """The Markdown text of the file ``page`` with its links as they are in the package.

    ``places`` has the installed path of each file of the source tree that a link can lead to. A link to another file is
    replaced by its text.
    """

    def replaced(found: re.Match[str]) -> str:
        words, target = found.groups()
        if _SCHEME.match(target):
            return found[0]
        path, hash_sign, anchor = target.partition("#")
        place = places.get(os.path.normpath(os.path.join(os.path.dirname(page), path)))
        if place is None:
            return words
        return f"[{words}]({os.path.relpath(place, os.path.dirname(places[page]))}{hash_sign}{anchor})"

    return _LINK.sub(replaced, text)


def manual_page(defaults: str) -> str:
    """The manual page criserver.toml(5), made of the text of criserver/config/default.toml.

    The comment before a key or a table is its description. A table without a comment goes on with that of its keys.
    """
    lines = [
        '.TH CRISERVER.TOML 5 "" "criserver" "File Formats"',
        ".SH NAME",
        r"criserver.toml \- configuration of criserver",
        ".SH DESCRIPTION",
        "The daemon and all commands read",
        ".IR /etc/criserver/config.toml ,",
        "and merge the files",
        ".I /etc/criserver/conf.d/*.toml",
        "over it. Below are all keys with their defaults.",
        ".SH KEYS",
    ]
    comment: list[str] = []
    table = ""
    for line in defaults.splitlines():
        if line.startswith("#"):
            comment.append(_escaped(line[1:].strip()))
        elif not line:
            # A comment that no key follows is the head of the file.
            comment = []
        elif line.startswith("["):
            table = line.strip("[]")
            lines += [f".SS {_escaped(line)}", *comment]
            comment = []
        elif (found := _KEY.fullmatch(line)) is not None:
            name = f"{table}.{found[1]}" if table else found[1]
            lines += [".TP", f'.BR {_escaped(name)} " = {_quoted(found[2])}"', *comment]
            comment = []
    lines += [
        ".SH EXAMPLES",
        "A drop\\-in with a second handler and another level of the log, which is tested and then used:",
        ".PP",
        ".nf",
        "mkdir \\-p /etc/criserver/conf.d",
        "cat > /etc/criserver/conf.d/10\\-site.toml <<END",
        "[log]",
        'level = "debug"',
        "[runtimes.crun]",
        'path = "/usr/bin/crun"',
        "END",
        "criserver config check && systemctl reload criserver",
        ".fi",
        ".SH SEE ALSO",
        ".BR criserver (8)",
        ".PP",
        r"/usr/share/doc/criserver/configuration.md says more of each key, of drop\-ins and of reloading.",
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text of a line of roff. A line must not begin with a control character."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return r"\&" + text if text.startswith((".", "'")) else text


def _quoted(text: str) -> str:
    """Text within the quotes of a macro's argument."""
    return _escaped(text).replace('"', r"\(dq")
