"""The command line.

A user's mistake is one line on standard error and exit status 2; Ctrl-C one line and 130.
"""

import argparse
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ._version import __version__

__all__ = ["main"]

_PATIENCE = 10.0  # seconds
_INTERRUPTED = 130  # as of a process that SIGINT ended
_NEEDS = "this command needs the extra packages: pip install 'fastkd[hf]'"


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0; 2 after one line on standard error; 130 after Ctrl-C; `doctor`: 1 for warnings."""
    parser = _Parser(prog="fastkd", description="Distil Hugging Face causal language models with fused losses.")
    parser.add_argument("--version", action="version", version=f"fastkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        """A command that takes a configuration."""
        found = commands.add_parser(name, help=text, description=text)
        found.add_argument("config", metavar="CONFIG.yaml")
        found.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="replace values of the configuration")
        found.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return found

    init = commands.add_parser("init", help="write a commented configuration")
    init.add_argument("config", nargs="?", default="fastkd.yaml", metavar="CONFIG.yaml")
    distill = command("distill", "train a student")
    distill.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in output_dir")
    plan = command("plan", "print the stages: samples, steps, tokens, teacher, knobs, learning rate; and the memory that they take")
    plan.add_argument("--card", type=_gigabytes, metavar="GB", help="memory of the GPU to plan for; default: that of the GPU at hand")
    score = command("score", "score and rank the samples' difficulty, to a Parquet file")
    score.add_argument("--compare", nargs="*", metavar="FILE.parquet", help="how far the signals, or the scores of these files, agree")
    command("cache", "fill the teacher store")
    doctor = command("doctor", "check tokenizers, templates, rows, teachers, loss, memory and disk before training")
    doctor.add_argument("--card", type=_gigabytes, metavar="GB", help="memory of the GPU to plan for; default: that of the GPU at hand")
    doctor.add_argument("--no-models", action="store_true", help="skip the checks that load the models")
    doctor.add_argument("--json", metavar="FILE.json", help="write the findings as JSON too")
    _add_eval(commands)
    commands.add_parser("bench", help="speed and memory of the loss against the peers that are installed", add_help=False)

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU's kernels whenever it is imported
    _be_quiet_but_first()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return _bench(rest)
    if arguments.command == "init":
        return _init(arguments.config) if not rest else parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "eval":
        return _run(arguments, _eval) if not rest else parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # Overrides after an option are left over by argparse, or taken for the option's own.
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.overrides = [*arguments.overrides, *rest]
    if getattr(arguments, "compare", None):
        arguments.overrides += [word for word in arguments.compare if "=" in word]
        arguments.compare = [word for word in arguments.compare if "=" not in word]
    return _run(arguments, {"distill": _distill, "plan": _plan, "score": _score, "cache": _cache, "doctor": _doctor}[arguments.command])


def _run(arguments: argparse.Namespace, command: Callable[[argparse.Namespace], int | None]) -> int:
    """Runs a command and returns its exit status; a user's mistake becomes one line."""
    try:
        return command(arguments) or 0
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        if not _rank():
            print(f"fastkd: interrupted{_how_to_go_on(arguments)}", file=sys.stderr)
        return _INTERRUPTED
    except ImportError as error:
        if arguments.debug:
            raise
        _fail(error if "pip install" in str(error) else f"{error}; {_NEEDS}")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        known = type(error).__name__ in ("ConfigError", "NonFiniteLossError")
        if arguments.debug or (isinstance(error, RuntimeError) and not known):
            raise
        _fail(error if type(error).__name__ == "ConfigError" else f"{getattr(arguments, 'config', 'eval')}: {error}")


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    if arguments.command != "distill":
        return ""
    return f"; to go on: {shlex.join(['fastkd', 'distill', arguments.config, *arguments.overrides, '--resume'])}"


def _config(arguments: argparse.Namespace):
    from .config import load_config

    return load_config(arguments.config, arguments.overrides)


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
    print(f"wrote {path}: edit it, look at the run with: fastkd doctor {path}, then train with: fastkd distill {path}")
    return 0


def _distill(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from .run import distill

    print(f"student, metrics.jsonl and report.html: {distill(config, resume=arguments.resume)}")


def _plan(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from .run import show_plan

    print(show_plan(config, arguments.card), end="")


def _score(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from .difficulty import ScoreError, compare, format_comparison, read_scores
    from .run import score

    for other in arguments.compare or ():
        try:
            read_scores(other)
        except ScoreError as error:
            raise ValueError(f"--compare: {error}") from None
    path = score(config)
    print(f"scores: {path}")
    if arguments.compare is not None:
        print(format_comparison(compare([path, *arguments.compare])))


def _cache(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from .run import fill_stores

    for store, batches in fill_stores(config).items():
        print(f"store {store}: complete, {batches} batches computed now")


def _doctor(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from .doctor import examine
    from .findings import as_json, format_finding, format_summary, status

    width, found = min(shutil.get_terminal_size((100, 24)).columns, 120), []
    for finding in examine(config, card_gb=arguments.card, models=not arguments.no_models, debug=arguments.debug):
        if finding.level != "skipped":
            print(format_finding(finding, width), flush=True)
        found.append(finding)
    print(format_summary(found, width))
    if arguments.json is not None:
        Path(arguments.json).write_text(as_json(config.path, found), encoding="utf-8")
    return status(found)


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected gigabytes, a number > 0, got {text!r}")
    return value


def _add_eval(commands: Any) -> None:
    text = "answers of a model against references: ROUGE-L, exact match, perplexity"
    found = commands.add_parser("eval", help=text, description=text)
    found.add_argument("model", metavar="MODEL", help="a name, a folder or a GGUF file")
    found.add_argument("data", metavar="DATA", nargs="?", help="a file, or a data set's name; none with --lm-eval alone")
    found.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="rename a column: prompt=question")
    found.add_argument("--split", help="of a data set by name")
    found.add_argument("--rows", type=int, help="the first so many rows")
    found.add_argument("--max-length", type=int, default=1024, help="tokens of a row (1024)")
    found.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer (256)")
    found.add_argument("--chat-template", action="store_true", help="render plain prompts with the tokenizer's chat template")
    found.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0, the default, is greedy")
    found.add_argument("--top-p", type=float, default=1.0)
    found.add_argument("--seeds", type=int, default=1, help="so many runs of sampled generation, with mean and standard deviation")
    found.add_argument("--batch-size", type=int, default=8)
    found.add_argument("--dtype", help="of the model; default: the checkpoint's")
    found.add_argument("--device", help="default: the GPU, if there is one")
    found.add_argument("--metrics", nargs="+", metavar="METRIC", help="rouge_l, exact_match, perplexity, ce; default: what the data allow")
    found.add_argument("--out", metavar="FILE.json", help="write the result as JSON")
    found.add_argument("--answers", metavar="FILE.jsonl", help="write each answer")
    found.add_argument("--lm-eval", nargs="+", metavar="TASK", default=[], help="tasks of lm-eval as well (pip install 'fastkd[eval]')")
    found.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _eval(arguments: argparse.Namespace) -> None:
    from .quality import evaluate_file

    text = evaluate_file(
        arguments.model,
        arguments.data,
        columns=_columns(arguments.column),
        tasks=arguments.lm_eval,
        out=arguments.out,
        **{key: value for key, value in vars(arguments).items() if key in _EVAL_OPTIONS},
    )
    print(text, end="")


_EVAL_OPTIONS = (
    "split", "rows", "max_length", "max_new_tokens", "chat_template", "temperature", "top_p", "seeds", "batch_size", "dtype", "device",
    "metrics", "answers",
)  # fmt: skip


def _columns(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not all(pair.partition("=")):
            raise ValueError(f"--column {pair!r}: expected OURS=THEIRS, as in prompt=question")
    return dict(pair.split("=", 1) for pair in pairs)


def _bench(rest: list[str]) -> int:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "run.py"
    if not script.is_file():
        _fail("bench: needs a checkout of the repository, where benchmarks/ is; this installation has none")
    os.execv(sys.executable, [sys.executable, str(script), *rest])


def _rank() -> int:
    """This process's number among those that a launcher started; 0 without one."""
    return int(os.environ.get("RANK") or 0)


def _be_quiet_but_first() -> None:
    """Of several processes only the first says what all do."""
    if not _rank():
        return
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.getLogger("fastkd").setLevel(logging.ERROR)


def _fail(message: object) -> NoReturn:
    if _rank():
        time.sleep(_PATIENCE)  # where the first process fails as well, it says so, and the launcher ends this one
        message = f"process {_rank()}: {message}"
    print("fastkd: " + " ".join(str(message).split()).replace(".; ", "; "), file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
