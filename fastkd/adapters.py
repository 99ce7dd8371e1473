"""Students with an adapter of PEFT: put on, checked against the fused loss, and merged into the weights at the end."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .hf import is_sharded
from .models import UNCOMPARED, is_quantized

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["adapted", "adapter_facts", "is_adapted", "lora_config", "merged"]

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def lora_config(options: Mapping[str, Any]) -> LoraConfig:
    """A `peft.LoraConfig` of these fields, and of `LORA` where they are silent (all linear layers but the head).

    Raises:
        ValueError, TypeError: from PEFT.
    """
    from peft import LoraConfig

    return LoraConfig(**{**LORA, **options, "task_type": "CAUSAL_LM"})


def is_adapted(model: Any) -> bool:
    """Whether PEFT is wrapped around the model."""
    return isinstance(getattr(model, "peft_config", None), dict) and hasattr(model, "get_base_model")


def adapted(model: nn.Module, config: Any) -> Any:
    """``model`` with a new adapter on it, which alone is trained, in float32; a quantised model's too (QLoRA).

    Args:
        config: a `peft.PeftConfig`.

    Raises:
        ValueError: the adapter is on the LM head, whose product the fused loss takes over.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped: Any = get_peft_model(model, config)
    head = wrapped.get_base_model().get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in wrapped.get_base_model().named_modules() if module is head)
        raise ValueError(
            f"target_modules: includes the LM head, {name!r}, whose product with the hidden states the fused loss takes over;"
            f" leave it out, or train it whole: modules_to_save: [{name}]"
        )
    return wrapped


def adapter_facts(model: Any) -> dict[str, Any]:
    """The entries of the adapters' configs on which training depends, as plain values; what is off or empty is left out."""
    found = {}
    for name, config in model.peft_config.items():
        entries = ((k, sorted(v) if isinstance(v, set) else v) for k, v in config.to_dict().items() if k not in UNCOMPARED)
        found[name] = {k: v for k, v in entries if v not in (None, False, {}, [])}
    return found


@torch.no_grad()
def merged(model: Any) -> PreTrainedModel:
    """The model inside, with its active adapters added to its weights: a new one on the CPU; ``model`` is unchanged.

    Quantised weights are dequantised, to what the adapter was trained on, and the result is not quantised. Each merged weight is rounded
    once more to its dtype (bitsandbytes' 4 bits: its compute dtype; 8 bits: the head's); otherwise the result computes what ``model``
    does, except that bitsandbytes' 8 bits also round the activations, which the result does not. Weights are copied to the CPU one at a
    time.

    Args:
        model: a `peft.PeftModel`.

    Raises:
        TypeError: no PEFT model. ValueError: a sharded one.
    """
    if not is_adapted(model):
        raise TypeError(f"model: expected a peft.PeftModel, got {type(model).__name__}")
    if is_sharded(model):
        raise ValueError("model: is sharded; merge its saved adapter into the base model in a process of its own")
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    base = _without_adapters(model)
    names = list(model.active_adapters)
    wrapped: Any = None
    for name in names:
        config = copy.deepcopy(model.peft_config[name])
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # what comes from the base's weights has been taken from them already
        if wrapped is None:
            wrapped = get_peft_model(base, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        state = {key: value.detach().cpu() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}
        set_peft_model_state_dict(wrapped, state, adapter_name=name)
    with _head_apart(wrapped):
        out = wrapped.merge_and_unload(adapter_names=names)
    with contextlib.suppress(AttributeError):
        del out.peft_config
    out._hf_peft_config_loaded = False
    return out.eval()


def _without_adapters(model: Any) -> Any:
    """A copy on the CPU of the model that the adapters are on, dequantised."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = model.get_base_model()
    # `deepcopy` takes what it finds here for its copy, so that nothing is copied where it is, which may be a GPU.
    memo: dict[int, Any] = {}
    dtype = inside.get_input_embeddings().weight.dtype
    quantised = [module for module in inside.modules() if is_quantized(module)]
    for module in quantised:
        memo[id(module)] = _dense(module, dtype)
    skipped = {id(p) for module in quantised for p in module.parameters()}
    for parameter in inside.parameters():
        if id(parameter) not in skipped:
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", copy=True), parameter.requires_grad)
    for buffer in inside.buffers():
        memo.setdefault(id(buffer), buffer.detach().to("cpu", copy=True))
    for module in inside.modules():
        if isinstance(module, BaseTunerLayer) and id(module) not in memo:
            memo[id(module)] = copy.deepcopy(module.get_base_layer(), memo)
    for module in inside.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            memo[id(module)] = copy.deepcopy(module.original_module, memo)
    base = copy.deepcopy(inside, memo)
    if getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.remove_quantization_config(base)
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            vars(base).pop(name, None)
    for name in ("peft_config", "hf_device_map"):
        vars(base).pop(name, None)
    base.disable_input_require_grads()
    return base


def _dense(module: Any, dtype: torch.dtype) -> nn.Module:
    """A quantised linear layer in ``dtype``, on the CPU."""
    weight = _dequantized(module).detach().to("cpu", dtype)
    if getattr(module, "source_cls", None) is Conv1D:  # bitsandbytes holds it the other way round
        made: Any = Conv1D(weight.shape[0], weight.shape[1])
        weight = weight.T.contiguous()
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to("cpu", dtype, copy=True), requires_grad=False)
    return made


def _dequantized(module: Any) -> Tensor:
    weight = module.weight
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    from bitsandbytes import functional

    if getattr(weight, "quant_state", None) is not None:
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            module.state_dict()  # brings the weight back to the usual order
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    # PEFT's own function leaves a layer of 8 bits on the CPU without its scales.
    scales = weight.SCB if module.state.SCB is None else module.state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales)


@contextlib.contextmanager
def _head_apart(wrapped: Any) -> Iterator[None]:
    """A head that shares its weight with the embeddings keeps it when these alone are changed inside, or the other way round."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    lm = wrapped.get_base_model()
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if isinstance(embedding, BaseTunerLayer) and isinstance(head, nn.Linear) and head.weight is embedding.get_base_layer().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    yield
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head.weight is not embedding.weight:
        for config in {id(c): c for c in (lm.config, lm.config.get_text_config())}.values():
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
