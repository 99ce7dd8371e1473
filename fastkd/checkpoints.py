"""Checkpoints that appear whole or not at all, and are verified before they are used.

A checkpoint is written under a temporary name, its files are checksummed and flushed to disk, and one rename makes it visible. A folder
without a manifest that verifies is never resumed from: a missing `optimizer.pt` would otherwise silently give other weights.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from .files import flush

__all__ = ["MANIFEST", "CheckpointError", "commit", "find_problems", "newest_complete", "rotate", "what_is_full"]

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)$")

logger = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint that cannot be written; those before it are as they were."""


def what_is_full(error: BaseException) -> str | None:
    """In words, what left no room for a file, if that is what the error is about, whichever library met it; else None."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found[1])
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full, or a limit on files or quota reached ({os.strerror(code)})"
    if isinstance(error, RuntimeError) and re.search("inline_container|iostream", str(error)):  # torch.save does not say why
        return "the file cannot be written; is the disk full, or a limit on files or quota reached?"
    return None


def commit(staging: Path, final: Path) -> None:
    """Checksum and flush the files of ``staging``, write their manifest, and rename the folder to ``final``, replacing what is there."""
    files = {}
    for file in sorted(p for p in staging.rglob("*") if p.is_file() and p.name != MANIFEST):
        flush(file)
        files[file.relative_to(staging).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n")
    flush(manifest)
    for folder in {staging, *(f for f in staging.rglob("*") if f.is_dir())}:
        flush(folder)
    old = staging.with_name(f"{final.name}-old")
    if final.exists():
        final.rename(old)
    staging.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def find_problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty when it verifies."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return [f"{checkpoint}: no {MANIFEST}: the checkpoint was not finished, or not written by this library"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{checkpoint / MANIFEST}: not readable: {error}"]
    problems = []
    for name, facts in files.items():
        file = checkpoint / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{file}: {file.stat().st_size} bytes where the manifest says {facts['bytes']}")
        elif _sha256(file) != facts["sha256"]:
            problems.append(f"{file}: its checksum differs from the manifest's")
    return problems


def newest_complete(output_dir: str | os.PathLike) -> Path | None:
    """The newest ``checkpoint-N`` under ``output_dir`` that verifies; those passed over are logged with the reason."""
    for _, path in reversed(_numbered(Path(output_dir))):
        problems = find_problems(path)
        if not problems:
            return path
        logger.warning("not resuming from %s: %s", path.name, problems[0])
    return None


def rotate(new: Path, keep: int | None, best: str | None) -> None:
    """Delete checkpoints beside ``new`` until ``keep`` are left, never ``new`` nor ``best``. None or 0 keeps all.

    Those of later steps go first, as they are of an earlier run, then the oldest.
    """
    if not keep:
        return
    steps = {path: step for step, path in _numbered(new.parent)}
    kept = {new, Path(best).resolve() if best else new}
    others = sorted((p for p in steps if p not in kept and p.resolve() not in kept), key=lambda p: (steps[p] < steps[new], steps[p]))
    for path in others[: max(0, len(steps) - max(keep, len(kept)))]:
        shutil.rmtree(path)


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    if not output_dir.is_dir():
        return []
    found = ((_NAME.match(path.name), path) for path in output_dir.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
