"""Loading what is distilled: models and tokenizers by name or path, GGUF files, and students cut from a teacher's layers."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, is_bitsandbytes_available, is_peft_available, is_torchao_available

from .files import json_hash

__all__ = [
    "UNCOMPARED", "check_tokenizers", "config_hash", "fingerprint", "is_quantized", "keep_layers", "load_model", "load_tokenizer",
    "model_files", "outline", "quantized_by",
]  # fmt: skip

_SHORT_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    gguf_file: str | None = None,
    layers: Sequence[int] | None = None,
    quantization: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model, in eval mode.

    Args:
        name_or_path: a name on the hub, a folder, or a `.gguf` file.
        dtype: a torch dtype or its name; None is the checkpoint's own (float32 for a GGUF file, whose weights are dequantised).
        gguf_file: the GGUF file's name in the repository or folder. It is converted once; later loads read the converted copy.
        layers: keep these decoder layers only, see `keep_layers`.
        quantization: "8bit" or "4bit": the bits in which the weights of the linear layers, except the LM head, are held (`quantized_by`
            says by which package); what they compute is in ``dtype``. Such weights cannot be trained, an adapter on them can.
            bitsandbytes' 8 bits look for outliers in the activations of a whole batch: what they give for a row depends on the rows beside
            it (``BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)`` does not, and is less exact). None: as in the
            checkpoint, which may be quantised itself, or as ``quantization_config``, an argument of `from_pretrained`, says.
        cache_dir: where converted GGUF files go; default `$XDG_CACHE_HOME/fastkd` or `~/.cache/fastkd`.
        kwargs: further arguments of `AutoModelForCausalLM.from_pretrained`: ``attn_implementation``, ``revision``, ``device_map``, ...

    Raises:
        ValueError: unknown dtype, layers that cannot be kept, a quantisation whose package is missing or that leaves no plain LM head.
        FileNotFoundError: a path or GGUF file that does not exist.
    """
    source, kwargs = _resolve(name_or_path, gguf_file, cache_dir, kwargs)
    wanted = _dtype(dtype)
    base = _base(source, kwargs)[0]
    if quantization is not None:
        kwargs["quantization_config"] = _quantization_config(quantization, source, wanted, kwargs)
    with _named(base):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, **kwargs)
    if getattr(model.config, "quantization_config", None) is not None:
        _check_quantized(model, quantization)
        _settle(model)
    return model if layers is None else keep_layers(model, layers)


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `load_model`'s model; one without a padding token pads with its end-of-sequence token.

    Raises:
        FileNotFoundError: a path or GGUF file that does not exist.
    """
    source, kwargs = _resolve(name_or_path, gguf_file, cache_dir, kwargs)
    with _named(source):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        except (OSError, ValueError) as error:
            if not Path(source).is_dir() or any(Path(source).glob("tokenizer.*")):
                raise
            raise FileNotFoundError(f"no tokenizer in {source!r}; expected tokenizer.json, as save_pretrained writes it") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def outline(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    gguf_file: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """`load_model`'s model without its weights: on the meta device, with its config, shapes and dtypes, and all its layers.

    Of a PEFT adapter it is the base model, of a quantised one the model that it was made from: ``quantization`` changes nothing.

    Raises:
        ValueError: unknown dtype.
        FileNotFoundError: a path or GGUF file that does not exist.
    """
    source, kwargs = _resolve(name_or_path, gguf_file, cache_dir, kwargs)
    wanted = _dtype(dtype)
    known = {k: kwargs[k] for k in ("revision", "token", "subfolder", "local_files_only", "trust_remote_code") if k in kwargs}
    base, _ = _base(source, kwargs)
    with _named(base):
        config = AutoConfig.from_pretrained(base, **known)
    if wanted == "auto":
        wanted = _own_dtype(config, source, kwargs)
    options = {k: kwargs[k] for k in ("attn_implementation", "trust_remote_code") if k in kwargs}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, **options)
    return model.eval()


def model_files(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> list[Path]:
    """The files that `load_model` reads: `config.json`, then those of the weights. Files on the hub are fetched.

    Of a PEFT adapter they are those of the base model, then `adapter_config.json` and the adapter's weights.

    Raises:
        FileNotFoundError: a path or GGUF file that does not exist, or a place without a config or weights.
        ValueError: an adapter without its base model's name, or without the package `peft`.
    """
    source, kwargs = _resolve(name_or_path, gguf_file, cache_dir, kwargs)
    place = {k: kwargs[k] for k in ("revision", "token", "subfolder", "local_files_only") if k in kwargs}
    source, adapter = _base(source, kwargs)

    def find(name: str) -> Path | None:
        return _find(source, name, **place)

    config = find("config.json")
    variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if config is None:
            break
        if (one := find(f"{stem}{variant}.{suffix}")) is not None:
            return [config, one, *adapter]
        if (index := find(f"{stem}.{suffix}.index{variant}.json")) is not None:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            shards = [find(name) for name in names]
            if None in shards:
                raise FileNotFoundError(f"no file {names[shards.index(None)]!r} in {source!r}, which its {index.name} names")
            return [config, *(shard for shard in shards if shard is not None), *adapter]
    missing = "config.json" if config is None else "model.safetensors or pytorch_model.bin"
    of = f", the base model of the adapter in {str(adapter[0].parent)!r}" if adapter else ""
    raise FileNotFoundError(f"no {missing} in {source!r}{of}")


def _find(source: str, name: str, *, subfolder: str | None = None, **place: Any) -> Path | None:
    """A file of a model in a folder or on the hub, from where it is fetched; None where there is none."""
    if Path(source).is_dir():
        file = Path(source, subfolder or "", name)
        return file if file.is_file() else None
    try:
        return Path(cached_file(source, name, subfolder=subfolder or "", **place) or "")
    except OSError:  # the hub does not have it, or cannot be reached
        return None


def _base(source: str, kwargs: Mapping[str, Any]) -> tuple[str, list[Path]]:
    """Where the model itself is, and the config and weights of the PEFT adapter at `source` that `from_pretrained` puts on it, if any."""
    place = {k: kwargs[k] for k in ("revision", "token", "local_files_only") if k in kwargs} | (kwargs.get("adapter_kwargs") or {})
    if Path(source).is_dir():
        place["subfolder"] = None  # as `from_pretrained` has it
    config = _find(source, "adapter_config.json", **place)
    if config is None:
        return source, []
    if not is_peft_available():  # then `from_pretrained` does not see it
        if _find(source, "config.json", **place) is None:
            raise ValueError(f"{source!r} holds an adapter, which needs the package peft: pip install peft")
        return source, []
    weights = _find(source, "adapter_model.safetensors", **place) or _find(source, "adapter_model.bin", **place)
    if weights is None:
        raise FileNotFoundError(f"no adapter_model.safetensors or adapter_model.bin in {source!r}, beside its {config.name}")
    if Path(source, "config.json").is_file():
        return source, [config, weights]
    try:
        base = json.loads(config.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config}: expected JSON with the key base_model_name_or_path ({type(error).__name__}: {error})") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{config}: base_model_name_or_path: expected a model's name or path, got {base!r}")
    return base, [config, weights]


# Quantised weights.

_QUANTIZATIONS = ("8bit", "4bit")


def quantized_by(quantization: str) -> str:
    """The package that ``load_model(..., quantization=...)`` uses here: "bitsandbytes", or for 8 bits without it "torchao".

    Raises:
        ValueError: another word than "8bit" or "4bit", or neither package is installed.
    """
    if quantization not in _QUANTIZATIONS:
        raise ValueError(f"quantization: expected one of {', '.join(_QUANTIZATIONS)}, got {quantization!r}")
    if is_bitsandbytes_available():
        return "bitsandbytes"
    if quantization == "8bit" and is_torchao_available():
        return "torchao"
    # torchao's four bits need a GPU and one more package, and cannot be trained on.
    needed = "bitsandbytes or torchao" if quantization == "8bit" else "bitsandbytes"
    raise ValueError(f"quantization: {quantization} needs the package {needed}: pip install bitsandbytes")


def is_quantized(module: nn.Module) -> bool:
    """Whether bitsandbytes or torchao holds this layer's own weight."""
    weight = vars(module).get("_parameters", {}).get("weight")
    return type(module).__module__.startswith("bitsandbytes.") or type(weight).__module__.startswith("torchao.")


def _quantization_config(quantization: str, source: str, dtype: str | torch.dtype, kwargs: Mapping[str, Any]) -> Any:
    package = quantized_by(quantization)
    if kwargs.get("quantization_config") is not None:
        raise ValueError("quantization: given together with quantization_config; expected one of the two")
    base = _base(source, kwargs)[0]
    known = {k: kwargs[k] for k in ("revision", "token", "subfolder", "local_files_only", "trust_remote_code") if k in kwargs}
    with _named(base):
        config = AutoConfig.from_pretrained(base, **known)
    if (held := getattr(config, "quantization_config", None)) is not None:
        method = held.get("quant_method") if isinstance(held, dict) else getattr(held, "quant_method", None)
        raise ValueError(f"quantization: {source!r} is quantised already ({method}), and is loaded as it is; leave quantization out")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_own_dtype(config, source, dict(kwargs)) if dtype == "auto" else dtype,
    )


def _check_quantized(model: PreTrainedModel, quantization: str | None) -> None:
    head = model.get_output_embeddings()
    if head is not None and is_quantized(head):
        raise ValueError(
            f"quantization: the LM head of {type(model).__name__} is quantised, and the fused loss reads its weight as it is;"
            " expected it among the modules that are left out (llm_int8_skip_modules of bitsandbytes, modules_to_not_convert of torchao)"
        )
    if quantization is not None and not any(map(is_quantized, model.modules())):
        raise ValueError(f"quantization: {type(model).__name__} has no linear layer that {quantized_by(quantization)} can hold")


def _settle(model: PreTrainedModel) -> None:
    """Quantised layers that compute the same whenever they are asked, and do not talk."""
    # bitsandbytes warns at each call of each layer that it rounds the input to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for layer in filter(is_quantized, model.modules()):
        # On some CPUs bitsandbytes rearranges weights of 4 bits when they are first used without gradients, and computes in
        # bfloat16 from then on.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


# Who a model is.

# Entries of a model's or adapter's config that do not change what it computes, or that its weights tell as well.
UNCOMPARED = (
    "transformers_version", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype", "use_cache",
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
)  # fmt: skip


def config_hash(config: Mapping[str, Any]) -> str:
    """A hash of those entries of a model's or adapter's config on which its outputs depend."""
    return json_hash({k: v for k, v in config.items() if k not in UNCOMPARED})


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Hashes of what a model's outputs follow from: ``weights``, ``config``, and ``adapter`` where PEFT has put one or more on it."""
    digest = hashlib.sha256()
    for name, value in _tensors(model.state_dict()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    found = {"weights": digest.hexdigest()}
    config: Any = getattr(model, "config", None)
    if config is not None:
        found["config"] = config_hash(config.to_dict())
    if adapters := getattr(model, "peft_config", None):
        # Which of them are on, and how strong each is, the layers know; the state has neither.
        knobs = ("active_adapters", "disable_adapters", "scaling", "merged_adapters")
        layers = {
            name: {knob: getattr(layer, knob, None) for knob in knobs}
            for name, layer in model.named_modules()
            if isinstance(getattr(layer, "disable_adapters", None), bool)
        }
        found["adapter"] = json_hash([{name: config_hash(adapter.to_dict()) for name, adapter in adapters.items()}, layers])
    return found


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A state's entries by name; of those of torchao the tensors inside."""
    for name, value in sorted(state.items()):
        if type(value).__module__.startswith("torchao."):
            yield from ((f"{name}.{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0])
        else:
            yield name, value


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new model with copies of some of `model`'s decoder layers, in the given order, and of everything outside them.

    The layers are renumbered, and config entries with one value per layer (`layer_types`, ...) are cut alike, so that the result
    can be saved and loaded like any other. `model` is unchanged.

    Args:
        layers: indices from 0, each at most once.

    Raises:
        ValueError: an empty list, a duplicate, an index out of range, or a model of which the config cannot describe the cut (for
            instance one whose layers differ by a rule in their index).
    """
    layers = list(layers)
    n_layers = model.config.get_text_config().num_hidden_layers
    check_layers(layers, n_layers)
    path = _decoder_layers(model, n_layers)
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    full = owner.get_submodule(name)
    assert isinstance(full, nn.ModuleList)
    try:  # so that only what is kept is copied
        setattr(owner, name, nn.ModuleList([full[i] for i in layers]))
        student = copy.deepcopy(model)
    finally:
        setattr(owner, name, full)
    student.zero_grad(set_to_none=True)
    _cut_config(student.config.get_text_config(), n_layers, layers)

    # What `from_pretrained` would build from this config must be what we have, but for the layers' own numbers.
    try:
        config = type(student.config).from_dict(student.config.to_dict())
        with torch.device("meta"):
            rebuilt = type(student)(config)
    except Exception as error:
        raise ValueError(f"{type(model).__name__}: no config describes layers {layers} ({type(error).__name__}: {error})") from error
    _check_shapes(student, rebuilt, layers)
    for old, new in zip(student.get_submodule(path).named_modules(), rebuilt.get_submodule(path).named_modules(), strict=True):
        if not is_quantized(old[1]):  # which is of another class than the config's
            _renumber(type(model).__name__, path, old, new)
    return student


def check_layers(layers: Sequence[int], n_layers: int) -> None:
    """Refuse what `keep_layers` cannot keep of a model with so many layers."""
    if not layers:
        raise ValueError("layers is empty; expected the indices of the decoder layers to keep")
    for i in layers:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n_layers:
            raise ValueError(f"layers has {i!r}; expected indices from 0 to {n_layers - 1}, since the model has {n_layers} layers")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers has duplicates: {sorted(i for i in set(layers) if layers.count(i) > 1)}")


def check_tokenizers(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase, who: str = "teacher") -> None:
    """Check that a token id means the same to student and teacher (or ``who``); ids that only one of them knows do not matter.

    Raises:
        ValueError: naming the lowest id on which they differ and both tokens.
    """
    student = {i: token for token, i in student_tokenizer.get_vocab().items()}
    teacher = {i: token for token, i in teacher_tokenizer.get_vocab().items()}
    different = [i for i in student.keys() & teacher.keys() if student[i] != teacher[i]]
    if different:
        i = min(different)
        raise ValueError(
            f"the tokenizers differ: id {i} is {student[i]!r} to the student and {teacher[i]!r} to the {who} "
            f"({len(different)} of {len(student.keys() & teacher.keys())} shared ids differ); expected one vocabulary"
        )


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """The library's errors for names that are neither here nor on the hub speak of connections and not of the name."""
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise
        raise FileNotFoundError(f"no model {source!r}: no such folder here, and the hub did not give it ({error})") from error


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto":
        return "auto"
    found = getattr(torch, _SHORT_DTYPES.get(dtype, dtype).removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is unknown; expected a floating-point torch dtype or its name, such as 'bfloat16'")
    return found


def _own_dtype(config: Any, source: str, kwargs: dict[str, Any]) -> torch.dtype:
    """A checkpoint's dtype, which its config may say or not."""
    return getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or _stored_dtype(source, kwargs)


def _stored_dtype(source: str, kwargs: dict[str, Any]) -> torch.dtype:
    """The dtype of a checkpoint whose config does not tell: that of its first floating-point tensor, as in `from_pretrained`."""
    weights = model_files(source, **kwargs)[1]
    if weights.suffix == ".safetensors":
        with safe_open(weights, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name)[:0].dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def _resolve(
    name_or_path: str | os.PathLike[str], gguf_file: str | None, cache_dir: str | os.PathLike[str] | None, kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is to load, and the arguments left for it: GGUF files become the folder of their converted copy."""
    source = os.fspath(name_or_path)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf" and gguf_file is None:
        return str(_converted_gguf(path, cache_dir)), kwargs
    if not path.exists() and (source.startswith((".", "~", os.sep)) or path.suffix == ".gguf"):
        raise FileNotFoundError(f"no model at {source!r}: no such file or folder")
    if gguf_file is None:
        return (str(path) if path.exists() else source), kwargs
    if path.exists():
        file = path / gguf_file
    else:
        of_hub = {k: kwargs.pop(k) for k in ("revision", "token", "local_files_only", "subfolder") if k in kwargs}
        file = Path(cached_file(source, gguf_file, **of_hub) or "")
    if not file.is_file():
        raise FileNotFoundError(f"no file {gguf_file!r} in {source!r}")
    return str(_converted_gguf(file, cache_dir)), kwargs


def _converted_gguf(file: Path, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder with the safetensors copy of a GGUF file and its tokenizer; made if it is not there yet."""
    root = Path(cache_dir) if cache_dir is not None else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastkd"
    root = root.expanduser() / "gguf"
    stat = file.stat()
    with file.open("rb") as f:  # size, time and the header with all metadata tell files apart; hashing gigabytes would take longer
        start = f.read(1 << 20)
    head = hashlib.sha256(start).hexdigest()
    if start[:4] != b"GGUF":
        raise ValueError(f"{file} is not a GGUF file; expected one, or the folder of a model")
    key = {"file": file.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "head": head, "transformers": transformers.__version__}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    target = root / f"{file.stem}-{digest}"
    if target.is_dir():
        return target

    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except (struct.error, IndexError, KeyError, ValueError, EOFError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{file} is a GGUF file that cannot be read ({reason}); is it whole? Expected a causal language model"
            ) from error
        # The weights are dequantised, but the model still says that it is quantised, and would refuse to be saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        (partial / "source.json").write_text(json.dumps(key, indent=2) + "\n")
        partial.chmod(0o755)
        try:
            partial.rename(target)  # atomic: a reader sees nothing or all of it
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _decoder_layers(model: nn.Module, n_layers: int) -> str:
    """The path of the list of decoder layers: the one outermost ModuleList of that length."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not inside:
            found.append(path)
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__}: expected one list of {n_layers} decoder layers, found {found or 'none'}")
    return found[0]


def _cut_config(config: Any, n_layers: int, layers: list[int]) -> None:
    """Edit a config in place so that it describes the kept layers."""
    for name, value in list(config.to_dict().items()):
        if "layer" not in name and "block" not in name:
            continue
        if name in ("mlp_only_layers", "moe_layers", "attn_layer_indices"):  # indices of layers
            setattr(config, name, [layers.index(i) for i in value or [] if i in layers])
        elif isinstance(value, list) and len(value) == n_layers:  # one entry per layer
            setattr(config, name, [value[i] for i in layers])
    if isinstance(getattr(config, "first_k_dense_replace", None), int):  # a number of leading layers
        config.first_k_dense_replace = sum(i < config.first_k_dense_replace for i in layers)
    config.num_hidden_layers = len(layers)


def _check_shapes(student: nn.Module, rebuilt: nn.Module, layers: list[int]) -> None:
    # Quantised weights have shapes of their own.
    packed = tuple(f"{name}." for name, module in student.named_modules() if is_quantized(module))
    have = {k: v.shape for k, v in student.state_dict().items() if not k.startswith(packed)}
    want = {k: v.shape for k, v in rebuilt.state_dict().items() if not k.startswith(packed)}
    wrong = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    if wrong:
        raise ValueError(f"{type(student).__name__}: its config cannot describe layers {layers}; {wrong[0]} would not load")


def _renumber(model: str, path: str, old: tuple[str, nn.Module], new: tuple[str, nn.Module]) -> None:
    """Give a kept layer's module its new number, and check that nothing else in it depends on its place."""
    for key, expected in _plain_attributes(new[1]):
        value = getattr(old[1], key, None)
        if key in ("layer_idx", "layer_id", "layer_number", "block_idx"):
            setattr(old[1], key, expected)
        elif value != expected:
            raise ValueError(f"{model}: {path}.{old[0]}.{key} is {value!r}, but a model loaded from its config would have {expected!r}")


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if not key.startswith("_") and key not in ("training", "gradient_checkpointing") and isinstance(value, int | float | str | None):
            yield key, value
