"""Files that are there whole or not at all, and settings that are compared by a hash or by name."""

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["first_difference", "flat", "flush", "json_hash", "remove_stale", "write_whole"]

_RUN = secrets.token_hex(4)  # tells this process's temporary files from those of an earlier one with the same id


def write_whole(path: Path, content: bytes | str, *, tidy: bool = True) -> None:
    """Write a file of which a crash leaves the old content or the new, never a part: a temporary name, flushed to disk, renamed.

    Args:
        content: text is written as UTF-8.
        tidy: `remove_stale` the folder before; False where it has many files and is tidied by other means.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    if tidy:
        remove_stale(path.parent)
    temporary = path.with_name(f".{path.name}~{_host()}~{os.getpid()}~{_RUN}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
        try:
            view = memoryview(content.encode() if isinstance(content, str) else content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)  # the new name


def flush(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Remove temporary files of `write_whole` that no process is writing any more."""
    for path in folder.glob(".*~*~*~*.tmp"):
        try:
            _, host, process, run = path.name.removesuffix(".tmp").rsplit("~", 3)
            gone = host == _host() and (run != _RUN if int(process) == os.getpid() else not _is_alive(int(process)))
            # A file takes seconds to write; on another host its age is all that can be told.
            if gone or time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)
        except (ValueError, OSError):
            continue


def _host() -> str:
    return quote(socket.gethostname(), safe="")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def json_hash(value: Any) -> str:
    """The sha256 of a value as JSON; sets are sorted, and what JSON does not have is taken by its `str`."""

    def plain(value: Any) -> Any:
        return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()


def flat(tree: Any, key: str = "", *, lists: bool = False) -> dict[str, Any]:
    """The values of nested mappings (with ``lists``, of lists too) by their keys, joined with dots."""
    if lists and isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return {key: tree}
    return {name: value for k, v in tree.items() for name, value in flat(v, f"{key}.{k}" if key else str(k), lists=lists).items()}


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any], *, ignored: Collection[str] = ()) -> str | None:
    """The first field, in the order of ``here``, in which two nested mappings of JSON's values differ, in words; None where they agree."""
    old, new = flat(there), flat(here)
    for key in [*new, *(k for k in old if k not in new)]:
        if key not in ignored and (old.get(key) != new.get(key) or (key in old) != (key in new)):
            was, now = (json.dumps(side[key]) if key in side else "nothing" for side in (old, new))
            return f"{key} is {was} there and {now} here"
    return None
