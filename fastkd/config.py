"""The configuration file of a run: YAML to frozen records, every key checked."""

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml

__all__ = ["EXAMPLE", "ConfigError", "DataSpec", "LossSpec", "ModelSpec", "RunConfig", "load_config"]

DTYPES = ("bfloat16", "float16", "float32", "float64")
NOT_AVAILABLE = ("plan", "difficulty", "store", "lmbda", "packing")
"""Keys that are planned and not built: refused, so that no one believes they have an effect."""


class ConfigError(ValueError):
    """A configuration that cannot be used: one line with the file, the key and what is wrong."""


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
    """

    model: str
    dtype: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    from_teacher: str | None = None


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


@dataclass(frozen=True)
class LossSpec:
    """Arguments of `fastkd.fused_linear_kd`; ``parameters`` are the divergence's own, those that the file names."""

    divergence: str = "forward_kl"
    parameters: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    kd_ratio: float = 1.0
    temperature_squared: bool = True
    chunk_tokens: int | None = None
    logits_dtype: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration.

    Attributes:
        teachers: by key, in order of capacity; a lone ``teacher`` has the key "teacher".
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

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that JSON can hold."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


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
    raw = _read(file)
    raw = _unshared(raw)
    for override in overrides:
        _override(file, raw, override)
    return _run(file, raw)


# Reading.


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that ``1e-4`` is a number and that a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)  # fmt: skip


def _read(file: str) -> dict:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `fastkd init` writes a configuration to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {_one_line(error)}") from None
    try:
        raw = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{file}: {line}not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError comes from dates such as 2024-13-45
        raise ConfigError(f"{file}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected keys and values such as `student: NAME`, got {_describe(raw)}")
    return raw


def _unshared(value: Any) -> Any:
    """A copy in which YAML's aliases are trees of their own, so that an override of one leaves the other."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _override(file: str, raw: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{file}: override {override!r}: expected key.path=value, as in training.learning_rate=1e-4")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"{file}: override {override!r}: the value is not valid YAML; quote it") from None
    section = raw
    for i, part in enumerate(parts[:-1]):
        if section.get(part) is None:
            section[part] = {}
        if not isinstance(section[part], dict):
            place = ".".join(parts[: i + 1])
            problem = f"{place} is {_describe(section[part])}; write '{place}={{...}}' with all its keys"
            raise ConfigError(f"{file}: override {override!r}: {problem}")
        section = section[part]
    section[parts[-1]] = value


# Checking.


@dataclass(frozen=True)
class _Kind:
    """What a key takes: in words, as a test, and the names to choose from where it is a choice."""

    expected: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _whole(low: int, high: float = math.inf) -> _Kind:
    text = f"a whole number >= {low}" if high == math.inf else f"a whole number in [{low}, {high}]"
    return _Kind(text, lambda value: _is_whole(value) and low <= value <= high)


def _choice(values: Sequence[str]) -> _Kind:
    return _Kind("one of " + ", ".join(values), lambda value: isinstance(value, str) and value in values, tuple(values))


_STRING = _Kind("a string", lambda value: isinstance(value, str) and bool(value.strip()))
_BOOLEAN = _Kind("true or false", lambda value: isinstance(value, bool))
_LAYERS = _Kind(
    "a list of different layer numbers >= 0",
    lambda value: isinstance(value, list) and bool(value) and all(_is_whole(v) and v >= 0 for v in value) and len(set(value)) == len(value),
)


class _Section:
    """A mapping of the file together with its place in it."""

    def __init__(self, file: str, place: str, values: Any, known: Iterable[str], complete: str = ""):
        self.file, self.place = file, place
        if not isinstance(values, dict):
            keys = "" if complete else f" with the keys {', '.join(known)}"
            self.fail("", f"expected a mapping{keys}, got {_describe(values)}")
        self.values: dict[str, Any] = values
        known = list(known)
        for key in values:
            if key in known:
                continue
            if key in NOT_AVAILABLE:
                self.fail(key, "not available in this version; remove the key")
            near = get_close_matches(str(key), known, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else complete or f"known: {', '.join(known)}"
            self.fail(key, f"unknown key; {hint}")

    def fail(self, key: object, problem: str) -> NoReturn:
        place = ".".join(str(part) for part in (self.place, key) if part != "")
        raise ConfigError(f"{self.file}: {place}: {problem}")

    def take(self, key: str, kind: _Kind, default: Any = None) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not kind.accepts(value):
            near = get_close_matches(value, kind.choices, 1) if isinstance(value, str) else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.fail(key, f"expected {kind.expected}, got {_describe(value)}{hint}")
        return os.path.expanduser(value) if isinstance(value, str) else value

    def number(self, key: str, domain: str, contains: Callable[[float], bool], default: float | None = None) -> float:
        value = self.take(key, _Kind(f"a number in {domain}", lambda v: _is_number(v) and contains(v)), default)
        return float(value)

    def require(self, key: str, what: str) -> Any:
        if self.values.get(key) is None:
            self.fail(key, f"missing; {what}")
        return self.values[key]


def _run(file: str, raw: dict) -> RunConfig:
    known = ("student", "teacher", "teachers", "data", "loss", "training", "output_dir", "seed")
    top = _Section(file, "", raw, known)
    teachers = _teachers(top)
    return RunConfig(
        student=_student(top, teachers),
        teachers=teachers,
        data=_data(top),
        loss=_loss(top),
        training=_training(top),
        output_dir=top.take("output_dir", _STRING, str(Path("runs") / Path(file).stem)),
        seed=top.take("seed", _whole(0, 2**32 - 1), 0),
        path=file,
    )


def _teachers(top: _Section) -> dict[str, ModelSpec]:
    one, several = top.values.get("teacher"), top.values.get("teachers")
    if one is not None and several is not None:
        top.fail("teachers", "given together with teacher; keep one of the two")
    if one is not None:
        return {"teacher": _model(top, "teacher", one)}
    if several is None:
        top.fail("teacher", "missing; give a model's name or path")
    if not isinstance(several, dict) or not several or not all(isinstance(key, str) for key in several):
        top.fail("teachers", f"expected a mapping of names to models, got {_describe(several)}")
    if len(several) > 1:
        top.fail("teachers", f"more than one teacher ({', '.join(several)}) is not available in this version; keep one")
    return {key: _model(top, f"teachers.{key}", value) for key, value in several.items()}


def _model(top: _Section, place: str, value: Any) -> ModelSpec:
    if isinstance(value, str) and value.strip():
        return ModelSpec(os.path.expanduser(value))
    if not isinstance(value, dict):
        top.fail(place, f"expected a model's name or path, or a mapping with the key model, got {_describe(value)}")
    section = _Section(top.file, place, value, ("model", "dtype", "gguf_file", "revision", "layers"))
    section.require("model", "give a model's name or path")
    layers = section.take("layers", _LAYERS)
    return ModelSpec(
        model=section.take("model", _STRING),
        dtype=section.take("dtype", _choice(DTYPES)),
        gguf_file=section.take("gguf_file", _STRING),
        revision=section.take("revision", _STRING),
        layers=None if layers is None else tuple(layers),
    )


def _student(top: _Section, teachers: dict[str, ModelSpec]) -> ModelSpec:
    value = top.require("student", "give a model's name or path, or {from: teacher, layers: [...]}")
    if not isinstance(value, dict) or "from" not in value:
        return _model(top, "student", value)
    if "model" in value:
        top.fail("student", "has both from and model; keep one of the two")
    section = _Section(top.file, "student", value, ("from", "layers", "dtype"))
    section.require("from", "name the teacher whose layers to keep")
    section.require("layers", "list the layers to keep; for all of them write {model: ...}")
    source, layers = section.take("from", _STRING), section.take("layers", _LAYERS)
    key = next(iter(teachers)) if source == "teacher" else source
    if key in teachers:
        origin = teachers[key]
        if origin.layers is not None:
            section.fail("from", f"the teacher {key!r} is itself cut to some layers; name its model instead")
    else:
        near = get_close_matches(source, ["teacher", *teachers], 1, cutoff=0.75)
        if near and not Path(source).exists():
            section.fail("from", f"unknown teacher {source!r}; did you mean {near[0]!r}?")
        origin = ModelSpec(source)
    return ModelSpec(
        model=origin.model,
        dtype=section.take("dtype", _choice(DTYPES)),
        gguf_file=origin.gguf_file,
        revision=origin.revision,
        layers=tuple(layers),
        from_teacher=key if key in teachers else None,
    )


def _data(top: _Section) -> DataSpec:
    from .data import COLUMNS

    values = top.require("data", "give {train: FILE}")
    section = _Section(top.file, "data", values, [f.name for f in dataclasses.fields(DataSpec)])
    section.require("train", "give a file or a data set's name")
    columns = section.values.get("columns") or {}
    if isinstance(columns, dict) and not set(columns) & set(COLUMNS) and set(map(str, columns.values())) & set(COLUMNS):
        section.fail("columns", "expected {our name: the file's name}, as in {prompt: question}; these are the other way round")
    renaming = _Section(top.file, "data.columns", columns, COLUMNS)
    return DataSpec(
        train=_source(section, "train"),
        eval=None if section.values.get("eval") is None else _source(section, "eval"),
        max_length=section.take("max_length", _whole(2), DataSpec.max_length),
        columns={key: renaming.take(key, _STRING) for key in columns if columns[key] is not None},
        completion_only_loss=section.take("completion_only_loss", _BOOLEAN),
        chat_template=section.take("chat_template", _BOOLEAN),
    )


def _source(data: _Section, key: str) -> str | dict[str, str]:
    value = data.values[key]
    if not isinstance(value, dict):
        return data.take(key, _Kind("a file, a data set's name, or {path, name, split}", _STRING.accepts))
    section = _Section(data.file, f"data.{key}", value, ("path", "name", "split"))
    section.require("path", "give a file or a data set's name")
    return {part: section.take(part, _STRING) for part in value if value[part] is not None}


def _loss(top: _Section) -> LossSpec:
    from fastkd_kernels.divergences import DEFINITIONS

    values = top.values.get("loss")
    options = [f.name for f in dataclasses.fields(LossSpec) if f.name != "parameters"]
    parameters = {p.name for definition in DEFINITIONS.values() for p in definition.parameters}
    section = _Section(top.file, "loss", {} if values is None else values, [*options, *sorted(parameters)])
    name = section.take("divergence", _choice(list(DEFINITIONS)), LossSpec.divergence)
    own = {p.name: p for p in DEFINITIONS[name].parameters}
    given = [key for key in section.values if key in parameters and section.values[key] is not None]
    for key in given:
        if key not in own:
            others = [d.name for d in DEFINITIONS.values() if key in [p.name for p in d.parameters]]
            section.fail(key, f"not a parameter of the divergence {name}; it is one of {', '.join(others)}")
    return LossSpec(
        divergence=name,
        parameters={key: section.number(key, own[key].domain, own[key].contains) for key in given},
        temperature=section.number("temperature", "(0, inf)", lambda v: v > 0, LossSpec.temperature),
        kd_ratio=section.number("kd_ratio", "[0, 1]", lambda v: 0 <= v <= 1, LossSpec.kd_ratio),
        temperature_squared=section.take("temperature_squared", _BOOLEAN, LossSpec.temperature_squared),
        chunk_tokens=section.take("chunk_tokens", _whole(1)),
        logits_dtype=section.take("logits_dtype", _choice(("float32", "bfloat16", "float16"))),
    )


def _training(top: _Section) -> dict[str, Any]:
    values = top.values.get("training")
    if values is None or values == {}:
        return {}
    from transformers import TrainingArguments  # takes seconds: only where there is something to check

    if isinstance(values, dict):
        if "resume_from_checkpoint" in values:
            top.fail("training.resume_from_checkpoint", "has no effect here; say `fastkd distill --resume`")
        # YAML 1.1 reads `no` as false.
        strategies = ("save_strategy", "eval_strategy", "logging_strategy")
        values = {key: "no" if key in strategies and value is False else value for key, value in values.items()}
        for key in ("output_dir", "seed"):
            if key in values:
                top.fail(f"training.{key}", f"belongs at the top level; write {key}: ... there")
    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    section = _Section(top.file, "training", values, names, "expected a field of transformers.TrainingArguments")
    try:
        annotations = typing.get_type_hints(TrainingArguments)
    except NameError:  # an optional dependency's type: the values are then checked by TrainingArguments itself
        annotations = {}
    out = {}
    for key, value in values.items():
        kind = _kind_of(annotations.get(key))
        if kind is not None and not (value is None and kind.accepts(None)):
            if value is None:
                section.fail(key, f"expected {kind.expected}, got null")
            section.take(key, kind)
        out[key] = float(value) if annotations.get(key) is float and _is_whole(value) else value
    return out


def _kind_of(annotation: Any) -> _Kind | None:
    """What a field of a dataclass takes; None where its annotation is more than scalars, lists, mappings and enumerations."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    enums = [m for m in members if isinstance(m, type) and issubclass(m, Enum)]
    if enums:  # of `SomeEnum | str`, only the names that the enumeration knows
        return _choice([str(item.value) for item in enums[0]])
    simple: dict[Any, tuple[str, Callable[[Any], bool]]] = {
        int: ("a whole number", _is_whole),
        float: ("a number", _is_number),
        bool: ("true or false", lambda v: isinstance(v, bool)),
        str: ("a string", lambda v: isinstance(v, str)),
        list: ("a list", lambda v: isinstance(v, list)),
        dict: ("a mapping", lambda v: isinstance(v, dict)),
        types.NoneType: ("null", lambda v: v is None),
    }
    origins = [typing.get_origin(m) or m for m in members]
    if not all(m in simple for m in origins):
        return None
    kinds = [simple[m] for m in origins]
    return _Kind(" or ".join(text for text, _ in kinds), lambda value: any(accepts(value) for _, accepts in kinds))


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} {text}"
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


EXAMPLE = """\
# A run of fastkd. To train: fastkd distill THIS_FILE [key.path=value ...]
# Paths are relative to the directory in which the command is run.
# A line that starts with "#" and a key at once is an alternative: take the "#" away and drop the line it replaces.

# The model that is trained: a name on the hub or a folder,
# or a teacher of which some layers are kept, or a GGUF file.
student: HuggingFaceTB/SmolLM2-135M-Instruct
#student: {from: teacher, layers: [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 28, 29, 30, 31]}
#student: {model: models/small, dtype: float32, gguf_file: small.Q4_1.gguf}

# The model it learns from. Its tokenizer must be the student's.
teacher: HuggingFaceTB/SmolLM2-360M-Instruct
#teacher: {model: HuggingFaceTB/SmolLM2-360M-Instruct, dtype: bfloat16, revision: main}

data:
  # A .json, .jsonl or .parquet file, or a data set's name. Its columns are prompt and completion, messages, text,
  # or input_ids (with labels or completion_mask).
  train: train.jsonl
  #train: {path: openai/gsm8k, name: main, split: train}
  # Held-out rows: divergence from the teacher, perplexity and agreement are measured on them. Optional: without them, set
  # eval_strategy below to "no".
  eval: eval.jsonl
  # In tokens; longer rows lose their end.
  max_length: 512
  # Our name for a column: the file's name for it.
  #columns: {prompt: question, completion: answer}
  # Train on the completion, or the assistant's turns, alone. The default is true, except for text.
  #completion_only_loss: false
  # Render prompt and completion, where they are strings, with the tokenizer's chat template.
  #chat_template: true

# loss = (1 - kd_ratio) * cross-entropy + kd_ratio * divergence
loss:
  # forward_kl, reverse_kl, symmetric_kl (ratio), skew_forward_kl (alpha), skew_reverse_kl (alpha), jsd (beta), tvd,
  # alpha_beta (alpha, beta), adaptive_kl (mu); parameters in brackets.
  divergence: forward_kl
  # Divides the logits of both models in the divergence.
  temperature: 1.0
  # 1: the teacher alone; 0: the data alone.
  kd_ratio: 1.0
  # Multiply the divergence by temperature ** 2, so that its gradients keep their size.
  temperature_squared: true
  # Most tokens whose logits are held at a time. The default follows from a memory budget.
  #chunk_tokens: 1024
#loss: {divergence: jsd, beta: 0.1, temperature: 2.0, kd_ratio: 0.8}

# Any field of transformers.TrainingArguments.
training:
  learning_rate: 1e-4
  lr_scheduler_type: cosine
  warmup_steps: 20
  num_train_epochs: 1
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4
  weight_decay: 0.01
  logging_steps: 10
  eval_strategy: steps
  eval_steps: 100
  save_strategy: steps
  save_steps: 100
  #max_steps: 500
  #bf16: true
  #gradient_checkpointing: true
  #report_to: tensorboard

# The run's folder: the plan, the metrics, the curves, the checkpoints and the trained student.
output_dir: runs/example
seed: 0
"""
