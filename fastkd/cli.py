"""The command line: ``fastkd init``, ``fastkd distill``, ``fastkd bench``.

A user's mistake is one line on standard error and exit status 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ._version import __version__

__all__ = ["main"]

_NEEDS = "this command needs the extra packages: pip install 'fastkd[hf]'"


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 after one line on standard error."""
    parser = _Parser(prog="fastkd", description="Distil Hugging Face causal language models with fused losses.")
    parser.add_argument("--version", action="version", version=f"fastkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    init = commands.add_parser("init", help="write a commented configuration")
    init.add_argument("config", nargs="?", default="fastkd.yaml", metavar="CONFIG.yaml")
    distill = commands.add_parser("distill", help="train a student")
    distill.add_argument("config", metavar="CONFIG.yaml")
    distill.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in output_dir")
    distill.add_argument("--debug", action="store_true", help="show the traceback of an error")
    distill.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace values of the configuration")
    commands.add_parser("bench", help="speed and memory of the loss against the peers that are installed", add_help=False)

    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return _bench(rest)
    if rest:
        # Overrides after --resume are left over by argparse.
        unknown = [word for word in rest if word.startswith("-")]
        if unknown or arguments.command != "distill":
            parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
        arguments.overrides += rest
    return _init(arguments.config) if arguments.command == "init" else _distill(arguments)


def _init(name: str) -> int:
    from .config import EXAMPLE

    path = Path(name)
    try:
        with path.open("x") as stream:  # never over an existing file
            stream.write(EXAMPLE)
    except FileExistsError:
        _fail(f"{path}: exists already; choose another name")
    except OSError as error:
        _fail(f"{path}: {error.strerror}")
    print(f"wrote {path}: edit it, then run: fastkd distill {path}")
    return 0


def _distill(arguments: argparse.Namespace) -> int:
    try:
        from .config import ConfigError, load_config
    except ImportError as error:
        _fail(f"{error}; {_NEEDS}")
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        _fail(error)
    try:
        from .run import distill
        from .trainer import NonFiniteLossError
    except ImportError as error:
        _fail(f"{error}; {_NEEDS}")
    try:
        folder = distill(config, resume=arguments.resume)
    except (NonFiniteLossError, ValueError, TypeError, OSError) as error:
        if arguments.debug:
            raise
        _fail(error if isinstance(error, ConfigError) else f"{arguments.config}: {error}")
    print(f"student, metrics.jsonl and report.html: {folder}")
    return 0


def _bench(rest: list[str]) -> int:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "run.py"
    if not script.is_file():
        _fail("bench: needs a checkout of the repository, where benchmarks/ is; this installation has none")
    os.execv(sys.executable, [sys.executable, str(script), *rest])


def _fail(message: object) -> NoReturn:
    print("fastkd: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
