"""What is refused before the weights of any model are read: what configs, tokenizers, data and files alone show."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from transformers.integrations import get_reporting_integration_callbacks

from . import difficulty
from .begin import Run, blamed, options_of, place_of
from .config import ConfigError, ModelSpec, teacher_key
from .models import check_layers, check_tokenizers, load_tokenizer, model_files, outline
from .pacing import teacher_of
from .plan import Stage, knob_ends
from .preparation import check_best_metric, check_device, check_fits, check_signal, check_temperatures
from .teachers import loaded_whole

__all__ = ["check_before_loading"]


def check_before_loading(run: Run, *, scores: bool, trains: bool = True, here: bool = True) -> None:
    """Refuse models, stores and scores that cannot be used as the configuration says.

    Args:
        scores: the samples' difficulty is asked for.
        trains: teachers, stores and what watches a training are asked for as well.
        here: so are this machine's devices and packages, and the files of weights.

    Raises:
        ConfigError: naming the key.
    """
    config, args = run.config, run.args
    if trains:
        if here:
            _check_watchers(run)
        with blamed(config, "training"):
            check_best_metric(args, run.held_out, None, teacher=bool(config.teachers))
        if config.store is not None:
            _check_store(run)
    if scores:
        _check_difficulty(run)
    for key, spec in _models(run, scores=scores, trains=trains):
        with blamed(config, key):
            _check_model(run, key, spec, here)


def _models(run: Run, *, scores: bool, trains: bool) -> Iterator[tuple[str, ModelSpec]]:
    config, scorer = run.config, run.config.difficulty.scorer
    if trains or (scorer is None and config.difficulty.column is None):
        yield "student", config.student
    if scores and scorer is not None:
        yield "difficulty.scorer", scorer
    for name, spec in config.teachers.items() if trains else ():
        yield teacher_key(config.teachers, name), spec


def _check_model(run: Run, key: str, spec: ModelSpec, here: bool) -> None:
    config = run.config
    if here:
        with blamed(config, f"{key}.device"):
            check_device(spec.device)
    who = "the student" if key == "student" else "the scorer" if key == "difficulty.scorer" else f"the teacher {key.rpartition('.')[2]!r}"
    if key != "student":
        check_tokenizers(run.tokenizer, load_tokenizer(spec.model, **place_of(spec)), who.split()[1])
    if here and Path(spec.model).exists():
        model_files(spec.model, **place_of(spec))
    with loaded_whole():
        drawn = outline(spec.model, dtype=spec.dtype, **options_of(spec))
    if spec.layers is not None:
        with blamed(config, f"{key}.layers"):
            check_layers(spec.layers, drawn.config.get_text_config().num_hidden_layers)
    for rows in (run.train, run.held_out):
        if rows is not None and not (key == "difficulty.scorer" and rows is run.held_out):
            check_fits(rows, who, drawn)


def _check_watchers(run: Run) -> None:
    for name in run.args.report_to or ():
        with blamed(run.config, "training.report_to"):
            try:
                made = get_reporting_integration_callbacks([name])
            except ValueError as error:
                raise ValueError(f"{error}; expected one of these, or none") from None
            try:
                for callback in made:
                    callback()
            except (ImportError, RuntimeError) as error:
                raise ValueError(f"{name}: {str(error).partition('. ')[0]}; pip install {name}, or leave it out") from None


def _check_store(run: Run) -> None:
    config, args = run.config, run.args
    assert args.store is not None
    place, kind = Path(args.store["path"]), args.store["kind"]
    with blamed(config, "store.path"):
        for folder in (place, *place.parents):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file; expected a folder, which may be new")
    taught: list[Stage] = [stage for stage in run.plan.stages if teacher_of(stage) is not None]
    with blamed(config, "store"):
        for stage in taught:
            check_signal(kind, args.divergence, {name: knob_ends(knob) for name, knob in stage.parameters.items()})
        check_temperatures(kind, set(itertools.chain.from_iterable(knob_ends(stage.temperature) for stage in taught)))


def _check_difficulty(run: Run) -> None:
    config, spec = run.config, run.config.difficulty
    signal = f"column:{spec.column}" if spec.column is not None else spec.signal
    if config.data.packing and signal not in ("loss", "length"):
        raise ConfigError(f"{config.path}: difficulty.signal: {signal} is a property of rows, and data.packing joins them; use loss")
    if spec.column is not None and spec.column not in run.rows.column_names:
        known = ", ".join(run.rows.column_names)
        raise ConfigError(f"{config.path}: difficulty.column: no column {spec.column!r}; expected one of the data set's, {known}")
    if spec.column is not None:
        with blamed(config, "difficulty.column"):
            difficulty.column_values(run.rows, run.train, signal)
    if run.scores_path.exists():
        with blamed(config, "difficulty.path"):
            difficulty.read_scores(run.scores_path)
