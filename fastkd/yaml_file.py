"""A YAML file of keys and values, each of them checked where it is taken."""

import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml

__all__ = [
    "BOOLEAN",
    "STRING",
    "ConfigError",
    "Kind",
    "Section",
    "choice",
    "describe",
    "is_number",
    "is_whole",
    "kind_of",
    "override",
    "read",
    "unshared",
    "whole",
]

NOT_AVAILABLE = ("lmbda",)
"""Keys that are planned and not built: refused, so that no one believes they have an effect."""


class ConfigError(ValueError):
    """A configuration that cannot be used: one line with the file, the key and what is wrong."""


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


# What to do about it, by words of PyYAML's messages.
_REMEDIES = {
    "'\\t'": "indent with spaces",
    "there twice": "remove one of the two",
    "mapping values are not allowed": "quote a value that holds a colon",
    "undefined alias": "quote a value that begins with *",
    "for the tag": "write a plain value; quote one that begins with !",
    "another document": "expected one document; remove the line ---",
    "end of stream": "close the quote or bracket",
}


def read(file: str) -> dict:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `fastkd init` writes a configuration to start from") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: cannot be read: it is a folder; expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: cannot be read: {_one_line(error)}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {_one_line(error)}; expected a YAML file") from None
    try:
        raw = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = f"{error.problem or error.context}"
        remedy = next((f"; {remedy}" for words, remedy in _REMEDIES.items() if words in problem), "")
        raise ConfigError(f"{file}: {line}not valid YAML: {problem}{remedy}") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError comes from dates such as 2024-13-45
        raise ConfigError(f"{file}: not valid YAML: {_one_line(error)}; quote what looks like a date and is none") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected keys and values such as `student: NAME`, got {describe(raw)}")
    return raw


def unshared(value: Any) -> Any:
    """A copy in which YAML's aliases are trees of their own, so that an override of one leaves the other."""
    if isinstance(value, dict):
        return {key: unshared(item) for key, item in value.items()}
    return [unshared(item) for item in value] if isinstance(value, list) else value


def override(file: str, raw: dict, override: str) -> None:
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
            problem = f"{place} is {describe(section[part])}; write '{place}={{...}}' with all its keys"
            raise ConfigError(f"{file}: override {override!r}: {problem}")
        section = section[part]
    section[parts[-1]] = value


# Checking.


@dataclass(frozen=True)
class Kind:
    """What a key takes: in words, as a test, and the names to choose from where it is a choice."""

    expected: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def whole(low: int, high: float = math.inf) -> Kind:
    text = f"a whole number >= {low}" if high == math.inf else f"a whole number in [{low}, {high}]"
    return Kind(text, lambda value: is_whole(value) and low <= value <= high)


def choice(values: Sequence[str]) -> Kind:
    return Kind("one of " + ", ".join(values), lambda value: isinstance(value, str) and value in values, tuple(values))


STRING = Kind("a string", lambda value: isinstance(value, str) and bool(value.strip()))
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
LAYERS = Kind(
    "a list of different layer numbers >= 0",
    lambda value: isinstance(value, list) and bool(value) and all(is_whole(v) and v >= 0 for v in value) and len(set(value)) == len(value),
)


class Section:
    """A mapping of the file together with its place in it."""

    def __init__(self, file: str, place: str, values: Any, known: Iterable[str], complete: str = ""):
        self.file, self.place = file, place
        if not isinstance(values, dict):
            keys = "" if complete else f" with the keys {', '.join(known)}"
            self.fail("", f"expected a mapping{keys}, got {describe(values)}")
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

    def take(self, key: str, kind: Kind, default: Any = None) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not kind.accepts(value):
            near = get_close_matches(value, kind.choices, 1) if isinstance(value, str) else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.fail(key, f"expected {kind.expected}, got {describe(value)}{hint}")
        return os.path.expanduser(value) if isinstance(value, str) else value

    def number(self, key: str, domain: str, contains: Callable[[float], bool], default: float | None = None) -> float:
        value = self.take(key, Kind(f"a number in {domain}", lambda v: is_number(v) and contains(v)), default)
        return float(value)

    def require(self, key: str, what: str) -> Any:
        if self.values.get(key) is None:
            self.fail(key, f"missing; {what}")
        return self.values[key]


def kind_of(annotation: Any) -> Kind | None:
    """What a field of a dataclass takes; None where its annotation is more than scalars, lists, mappings and enumerations."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    enums = [m for m in members if isinstance(m, type) and issubclass(m, Enum)]
    if enums:  # of `SomeEnum | str`, only the names that the enumeration knows
        return choice([str(item.value) for item in enums[0]])
    simple: dict[Any, tuple[str, Callable[[Any], bool]]] = {
        int: ("a whole number", is_whole),
        float: ("a number", is_number),
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
    return Kind(" or ".join(text for text, _ in kinds), lambda value: any(accepts(value) for _, accepts in kinds))


def describe(value: Any) -> str:
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
