"""The configuration file of a run: YAML to frozen records, every key checked."""

import dataclasses
import json
import os
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .plan import Plan, PlanError
from .presets import make_plan
from .yaml_file import (
    BOOLEAN,
    LAYERS,
    STRING,
    ConfigError,
    Kind,
    Section,
    choice,
    describe,
    is_whole,
    kind_of,
    override,
    read,
    unshared,
    whole,
)

__all__ = [
    "EXAMPLE",
    "ConfigError",
    "DataSpec",
    "DifficultySpec",
    "LossSpec",
    "ModelSpec",
    "RunConfig",
    "StoreSpec",
    "load_config",
    "teacher_key",
]

EXAMPLE = Path(__file__).with_name("example.yaml").read_text(encoding="utf-8")
"""A commented configuration with every key."""

# Fields of KDConfig that belong to training as well.
_OWN_TRAINING: dict[str, Any] = {"activation_offloading": bool}
DTYPES = ("bfloat16", "float16", "float32", "float64")
QUANTIZATIONS = ("8bit", "4bit")
SIGNALS = ("rouge_loss", "rouge", "loss", "length", "steps")


@dataclass(frozen=True)
class ModelSpec:
    """A model to load.

    Attributes:
        model: a name on the hub, a folder, or a GGUF file.
        dtype: one of `DTYPES`; None: the checkpoint's own.
        gguf_file: the GGUF file's name within ``model``.
        revision: a branch, tag or commit on the hub.
        layers: decoder layers to keep, in this order; None: all.
        from_teacher: the key in `RunConfig.teachers` of the teacher this model is cut from; ``model``, ``gguf_file`` and ``revision`` are
            then that teacher's.
        attn_implementation: of transformers: sdpa, eager, flash_attention_2, flex_attention, ...; None: transformers' choice.
        quantization: one of `QUANTIZATIONS`: the bits in which the linear layers' weights, not the head's, are held, frozen.
        lora: of a student: keyword arguments of `peft.LoraConfig`, those that the file names; None: all weights are trained.
        device: of a teacher; None: the student's.
        park: a teacher that is not needed for a while waits in CPU memory instead of being loaded again.
    """

    model: str
    dtype: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    from_teacher: str | None = None
    attn_implementation: str | None = None
    quantization: str | None = None
    lora: dict[str, Any] | None = None
    device: str | None = None
    park: bool = False


@dataclass(frozen=True)
class DataSpec:
    """What to train and evaluate on; the fields are arguments of `fastkd.data.load_rows` and `fastkd.data.tokenize`.

    ``train`` and ``eval`` are a path or name, or a mapping with ``path`` and optional ``name`` and ``split``.
    """

    train: str | dict[str, str]
    eval: str | dict[str, str] | None = None
    max_length: int = 512
    columns: dict[str, str] = field(default_factory=dict)
    completion_only_loss: bool | None = None
    chat_template: bool | None = None
    packing: bool = False
    padding_free: bool = False


@dataclass(frozen=True)
class LossSpec:
    """Arguments of `fastkd.fused_linear_kd`; ``parameters`` are the divergence's own, those that the file names.

    ``max_loss_buffer_mb`` bounds the chunk by its memory in MiB instead of by ``chunk_tokens``.
    """

    divergence: str = "forward_kl"
    parameters: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    kd_ratio: float = 1.0
    temperature_squared: bool = True
    chunk_tokens: int | None = None
    logits_dtype: str | None = None
    max_loss_buffer_mb: float | None = None


@dataclass(frozen=True)
class DifficultySpec:
    """How samples are ranked from easy to hard (`fastkd.difficulty.score`).

    Attributes:
        signal: one of `SIGNALS`; or ``column``: a column of the data instead, lower is easier unless ``higher_is_easier``.
        scorer: the model that is asked; None: the untrained student.
        path: the Parquet file; None: ``difficulty.parquet`` in the run's folder.
        max_new_tokens, temperature: of the answers that ROUGE-L looks at; 0 is greedy.
    """

    signal: str = "rouge_loss"
    column: str | None = None
    higher_is_easier: bool = False
    scorer: ModelSpec | None = None
    path: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 8


@dataclass(frozen=True)
class StoreSpec:
    """Teacher signals on disk; the fields are those of `fastkd.store.StoreSpec`. ``path`` None: ``store`` in the run's folder."""

    kind: str = "hidden"
    path: str | None = None
    max_gb: float | None = None
    batch_size: int = 16
    top_k: int = 64
    samples: int = 50


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration.

    Attributes:
        teachers: by key, in order of capacity; a lone ``teacher`` has the key "teacher". Empty where the plan has none.
        plan: None: one stage, as the other sections say. store: None: none is kept.
        training: keyword arguments of `transformers.TrainingArguments`, those that the file names.
        output_dir: where the run is written; by default ``runs/`` and the configuration file's name.
        path: the configuration file, as given.
    """

    student: ModelSpec
    teachers: dict[str, ModelSpec]
    data: DataSpec
    loss: LossSpec
    training: dict[str, Any]
    output_dir: str
    seed: int
    path: str
    plan: Plan | None = None
    difficulty: DifficultySpec = field(default_factory=DifficultySpec)
    store: StoreSpec | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that JSON can hold."""
        plan = {"plan": None if self.plan is None else self.plan.to_dict()}
        return json.loads(json.dumps({**dataclasses.asdict(dataclasses.replace(self, plan=None)), **plan}, default=str))


def teacher_key(teachers: Iterable[str], name: str) -> str:
    """The key in the file of the teacher ``name``, one of ``teachers``."""
    return "teacher" if list(teachers) == ["teacher"] else f"teachers.{name}"


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read and check a configuration file.

    Relative paths of data, models and ``output_dir`` are relative to the current directory, not to the file. Data and models are not
    looked up here. Numbers may be written ``1e-4``. A key whose value is empty (null) is taken as absent.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings, the value in YAML; they replace or add keys before anything is checked.

    Raises:
        ConfigError: a missing or broken file, an unknown, missing or repeated key, a value of the wrong type or outside its domain.
    """
    file = os.fspath(path)
    raw = read(file)
    raw = unshared(raw)
    for text in overrides:
        override(file, raw, text)
    return _run(file, raw)


def _run(file: str, raw: dict) -> RunConfig:
    known = ("student", "teacher", "teachers", "data", "loss", "plan", "difficulty", "store", "training", "output_dir", "seed")
    top = Section(file, "", raw, known)
    teachers = _teachers(top)
    plan = _plan(top, len(teachers))
    if not teachers and not (plan is not None and all(stage.kd_ratio == 0 for stage in plan.stages)):
        top.fail("teacher", "missing; give a model's name or path")
    if len(teachers) > 1 and plan is None:
        top.fail("teachers", f"{', '.join(teachers)} need a plan that says when each of them teaches; write plan: progressive, or keep one")
    return RunConfig(
        student=_student(top, teachers),
        teachers=teachers,
        data=_data(top),
        loss=_loss(top),
        training=_training(top, plan),
        output_dir=top.take("output_dir", STRING, str(Path("runs") / Path(file).stem)),
        seed=top.take("seed", whole(0, 2**32 - 1), 0),
        path=file,
        plan=plan,
        difficulty=_difficulty(top),
        store=_store(top),
    )


def _plan(top: Section, teachers: int) -> Plan | None:
    value = top.values.get("plan")
    if value is None:
        return None
    try:
        plan = make_plan(value, teachers=teachers)
    except PlanError as error:
        keyed = re.match(r"[\w.\[\]]+:", str(error))
        raise ConfigError(f"{top.file}: plan{'.' if keyed else ': '}{error}") from None
    loss = top.values.get("loss")
    for key in ("temperature", "kd_ratio"):
        if isinstance(loss, dict) and loss.get(key) is not None and all(getattr(s, key) is not None for s in plan.stages):
            top.fail(f"loss.{key}", f"the plan says it for every stage; leave it out here, or write plan: {{..., {key}: ...}}")
    return plan


def _difficulty(top: Section) -> DifficultySpec:
    values = top.values.get("difficulty")
    section = Section(top.file, "difficulty", {} if values is None else values, [f.name for f in dataclasses.fields(DifficultySpec)])
    signal, column = section.values.get("signal"), section.take("column", STRING)
    if isinstance(signal, dict):
        column = Section(top.file, "difficulty.signal", signal, ("column",)).take("column", STRING)
    elif column is not None and signal is not None:
        section.fail("column", "given together with signal; keep one of the two")
    default = DifficultySpec()
    return DifficultySpec(
        signal="column" if column is not None else section.take("signal", choice(SIGNALS), default.signal),
        column=column,
        higher_is_easier=section.take("higher_is_easier", BOOLEAN, default.higher_is_easier),
        scorer=None if section.values.get("scorer") is None else _model(top, "difficulty.scorer", section.values["scorer"]),
        path=section.take("path", STRING),
        max_new_tokens=section.take("max_new_tokens", whole(1), default.max_new_tokens),
        temperature=section.number("temperature", "[0, inf)", lambda v: v >= 0, default.temperature),
        batch_size=section.take("batch_size", whole(1), default.batch_size),
    )


def _store(top: Section) -> StoreSpec | None:
    values = top.values.get("store")
    if values is None:
        return None
    section, default = Section(top.file, "store", values, [f.name for f in dataclasses.fields(StoreSpec)]), StoreSpec()
    most = section.values.get("max_gb")
    return StoreSpec(
        kind=section.take("kind", choice(("hidden", "topk", "sampled")), default.kind),
        path=section.take("path", STRING),
        max_gb=None if most is None else section.number("max_gb", "(0, inf)", lambda v: v > 0),
        batch_size=section.take("batch_size", whole(1), default.batch_size),
        top_k=section.take("top_k", whole(1), default.top_k),
        samples=section.take("samples", whole(1), default.samples),
    )


def _teachers(top: Section) -> dict[str, ModelSpec]:
    one, several = top.values.get("teacher"), top.values.get("teachers")
    if one is not None and several is not None:
        top.fail("teachers", "given together with teacher; keep one of the two")
    if one is not None:
        return {"teacher": _model(top, "teacher", one, ("device", "park"))}
    if several is None:
        return {}
    if not isinstance(several, dict) or not several or not all(isinstance(key, str) for key in several):
        top.fail("teachers", f"expected a mapping of names to models, in order of capacity, got {describe(several)}")
    return {key: _model(top, f"teachers.{key}", value, ("device", "park")) for key, value in several.items()}


def _model(top: Section, place: str, value: Any, more: tuple[str, ...] = ()) -> ModelSpec:
    if isinstance(value, str) and value.strip():
        return ModelSpec(os.path.expanduser(value))
    if not isinstance(value, dict):
        top.fail(place, f"expected a model's name or path, or a mapping with the key model, got {describe(value)}")
    section = Section(
        top.file, place, value, ("model", "dtype", "gguf_file", "revision", "layers", "attn_implementation", "quantization", *more)
    )
    section.require("model", "give a model's name or path")
    layers = section.take("layers", LAYERS)
    return ModelSpec(
        model=section.take("model", STRING),
        dtype=section.take("dtype", choice(DTYPES)),
        gguf_file=section.take("gguf_file", STRING),
        revision=section.take("revision", STRING),
        layers=None if layers is None else tuple(layers),
        attn_implementation=section.take("attn_implementation", STRING),
        quantization=section.take("quantization", choice(QUANTIZATIONS)),
        lora=_lora(section),
        device=section.take("device", STRING),
        park=section.take("park", BOOLEAN, False),
    )


def _student(top: Section, teachers: dict[str, ModelSpec]) -> ModelSpec:
    value = top.require("student", "give a model's name or path, or {from: teacher, layers: [...]}")
    if not isinstance(value, dict) or "from" not in value:
        return _checked_student(top, _model(top, "student", value, ("lora",)))
    if "model" in value:
        top.fail("student", "has both from and model; keep one of the two")
    section = Section(top.file, "student", value, ("from", "layers", "dtype", "attn_implementation", "quantization", "lora"))
    section.require("from", "name the teacher whose layers to keep")
    section.require("layers", "list the layers to keep; for all of them write {model: ...}")
    source, layers = section.take("from", STRING), section.take("layers", LAYERS)
    key = next(iter(teachers)) if source == "teacher" and len(teachers) == 1 else source
    if source == "teacher" and key not in teachers:
        section.fail(
            "from", f"which of the teachers? name one of {', '.join(teachers)}" if teachers else "there is no teacher; name a model"
        )
    if key in teachers:
        origin = teachers[key]
        if origin.layers is not None:
            section.fail("from", f"the teacher {key!r} is itself cut to some layers; name its model instead")
    else:
        near = get_close_matches(source, ["teacher", *teachers], 1, cutoff=0.75)
        if near and not Path(source).exists():
            section.fail("from", f"unknown teacher {source!r}; did you mean {near[0]!r}?")
        origin = ModelSpec(source)
    spec = ModelSpec(
        model=origin.model,
        dtype=section.take("dtype", choice(DTYPES)),
        gguf_file=origin.gguf_file,
        revision=origin.revision,
        layers=tuple(layers),
        from_teacher=key if key in teachers else None,
        attn_implementation=section.take("attn_implementation", STRING),
        quantization=section.take("quantization", choice(QUANTIZATIONS)),
        lora=_lora(section),
    )
    return _checked_student(top, spec)


def _checked_student(top: Section, student: ModelSpec) -> ModelSpec:
    if student.quantization is not None and student.lora is None:
        top.fail("student.quantization", "quantised weights are frozen, and nothing else would be trained; add lora: true beside it")
    return student


def _lora(section: Section) -> dict[str, Any] | None:
    """``true``, or a mapping with fields of `peft.LoraConfig`."""
    value = section.values.get("lora")
    if value is None or value is False:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        section.fail("lora", "needs the package peft: pip install peft")
    known = [f.name for f in dataclasses.fields(LoraConfig) if f.init and f.name not in ("task_type", "peft_type", "inference_mode")]
    place = f"{section.place}.lora"
    if isinstance(value, dict) and "rank" in value:
        section.fail("lora.rank", "unknown key; did you mean 'r'?")
    return dict(Section(section.file, place, {} if value is True else value, known, "expected a field of peft.LoraConfig").values)


def _data(top: Section) -> DataSpec:
    from .data import COLUMNS

    values = top.require("data", "give {train: FILE}")
    section = Section(top.file, "data", values, [f.name for f in dataclasses.fields(DataSpec)])
    section.require("train", "give a file or a data set's name")
    columns = section.values.get("columns") or {}
    if isinstance(columns, dict) and not set(columns) & set(COLUMNS) and set(map(str, columns.values())) & set(COLUMNS):
        section.fail("columns", "expected {our name: the file's name}, as in {prompt: question}; these are the other way round")
    renaming = Section(top.file, "data.columns", columns, COLUMNS)
    return DataSpec(
        train=_source(section, "train"),
        eval=None if section.values.get("eval") is None else _source(section, "eval"),
        max_length=section.take("max_length", whole(2), DataSpec.max_length),
        columns={key: renaming.take(key, STRING) for key in columns if columns[key] is not None},
        completion_only_loss=section.take("completion_only_loss", BOOLEAN),
        chat_template=section.take("chat_template", BOOLEAN),
        packing=section.take("packing", BOOLEAN, False),
        padding_free=section.take("padding_free", BOOLEAN, False),
    )


def _source(data: Section, key: str) -> str | dict[str, str]:
    value = data.values[key]
    if not isinstance(value, dict):
        return data.take(key, Kind("a file, a data set's name, or {path, name, split}", STRING.accepts))
    section = Section(data.file, f"data.{key}", value, ("path", "name", "split"))
    section.require("path", "give a file or a data set's name")
    return {part: section.take(part, STRING) for part in value if value[part] is not None}


def _loss(top: Section) -> LossSpec:
    from fastkd_kernels.divergences import DEFINITIONS

    values = top.values.get("loss")
    options = [f.name for f in dataclasses.fields(LossSpec) if f.name != "parameters"]
    parameters = {p.name for definition in DEFINITIONS.values() for p in definition.parameters}
    section = Section(top.file, "loss", {} if values is None else values, [*options, *sorted(parameters)])
    name = section.take("divergence", choice(list(DEFINITIONS)), LossSpec.divergence)
    own = {p.name: p for p in DEFINITIONS[name].parameters}
    given = [key for key in section.values if key in parameters and section.values[key] is not None]
    for key in given:
        if key not in own:
            others = [d.name for d in DEFINITIONS.values() if key in [p.name for p in d.parameters]]
            section.fail(key, f"not a parameter of the divergence {name}; it is one of {', '.join(others)}")
    most = None
    if section.values.get("max_loss_buffer_mb") is not None:
        most = section.number("max_loss_buffer_mb", "(0, inf)", lambda v: v > 0)
        if section.values.get("chunk_tokens") is not None:
            section.fail("max_loss_buffer_mb", "given together with chunk_tokens; keep one of the two")
    return LossSpec(
        divergence=name,
        parameters={key: section.number(key, own[key].domain, own[key].contains) for key in given},
        temperature=section.number("temperature", "(0, inf)", lambda v: v > 0, LossSpec.temperature),
        kd_ratio=section.number("kd_ratio", "[0, 1]", lambda v: 0 <= v <= 1, LossSpec.kd_ratio),
        temperature_squared=section.take("temperature_squared", BOOLEAN, LossSpec.temperature_squared),
        chunk_tokens=section.take("chunk_tokens", whole(1)),
        max_loss_buffer_mb=most,
        logits_dtype=section.take("logits_dtype", choice(("float32", "bfloat16", "float16"))),
    )


def _training(top: Section, plan: Plan | None) -> dict[str, Any]:
    values = top.values.get("training")
    fixed = plan is not None and all(s.epochs or s.steps for s in plan.stages)
    if fixed and isinstance(values, dict) and values.get("num_train_epochs") is not None:
        problem = "the plan says how long each stage is; leave it out here, or write plan: {..., epochs: ...}"
        top.fail("training.num_train_epochs", problem)
    if values is None or values == {}:
        return {}
    from transformers import TrainingArguments  # takes seconds: only where there is something to check

    if isinstance(values, dict):
        if "packing" in values:
            top.fail("training.packing", "belongs in data; write data: {packing: ...}")
        if "resume_from_checkpoint" in values:
            top.fail("training.resume_from_checkpoint", "has no effect here; say `fastkd distill --resume`")
        # YAML 1.1 reads `no` as false.
        strategies = ("save_strategy", "eval_strategy", "logging_strategy")
        values = {key: "no" if key in strategies and value is False else value for key, value in values.items()}
        for key in ("output_dir", "seed"):
            if key in values:
                top.fail(f"training.{key}", f"belongs at the top level; write {key}: ... there")
    names = [*(f.name for f in dataclasses.fields(TrainingArguments) if f.init), *_OWN_TRAINING]
    section = Section(top.file, "training", values, names, "expected a field of transformers.TrainingArguments")
    try:
        annotations = typing.get_type_hints(TrainingArguments) | _OWN_TRAINING
    except NameError:  # an optional dependency's type: the values are then checked by TrainingArguments itself
        annotations = dict(_OWN_TRAINING)
    out = {}
    for key, value in values.items():
        kind = kind_of(annotations.get(key))
        if kind is not None and not (value is None and kind.accepts(None)):
            if value is None:
                section.fail(key, f"expected {kind.expected}, got null")
            section.take(key, kind)
        out[key] = float(value) if annotations.get(key) is float and is_whole(value) else value
    return out
