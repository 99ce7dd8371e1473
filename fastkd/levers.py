"""What saves memory beside the loss: activations that wait on the CPU, Liger's kernels in the body, optimizers with small states."""

import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import unwrap_peft_model

from fastkd_kernels.divergences import triton as _triton

from .hf import is_sharded, run_body

__all__ = ["Offloaded", "apply_liger", "check_liger", "check_optimizer", "check_reset", "liger_config", "staying"]

logger = logging.getLogger(__name__)

# Activations that wait in CPU memory.

LEAST_BYTES = 1 << 20  # a smaller tensor is sooner kept than fetched
# Between a weight and what a product saves of it: views, and autocast's copy.
_OF_WEIGHTS = ("TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "SelectBackward0", "ToCopyBackward0")


class _Moved(NamedTuple):
    device: torch.device
    values: Tensor  # on the CPU


class Offloaded(saved_tensors_hooks):
    """What a forward pass inside saves for its backward pass waits in CPU memory, in pinned memory where it comes from a CUDA device.

    torch's own `save_on_cpu` moves weights too, and a tensor once for each operation that saves it. Here the model's weights (and the
    copies that autocast makes of them), tensors of less than `LEAST_BYTES`, and what is on the CPU already stay where they are, and
    what several operations save is copied once. Under gradient checkpointing only the inputs of the layers are left to travel.
    Copies run on the stream of the computation, in its order.

    Args:
        model: whose weights stay.

    Attributes:
        moved, kept: bytes so far: copied to the CPU, and saved where they are.
    """

    def __init__(self, model: nn.Module):
        super().__init__(self._pack, self._unpack)
        self.moved = self.kept = 0
        # Of a DTensor what a module sees is another tensor; `_is_weight` knows it by its graph.
        whole = [p for p in model.parameters() if not hasattr(p, "to_local")]
        self._weights = {p.untyped_storage().data_ptr() for p in whole} - {0}
        self._copies = WeakIdKeyDictionary()  # by storage, while that is there

    def _pack(self, tensor: Tensor) -> Tensor | _Moved:
        if tensor.nbytes < LEAST_BYTES or not _is_away(tensor) or self._is_weight(tensor):
            self.kept += tensor.nbytes
            return tensor.detach()  # an operation that saved its own output as it is would keep itself alive
        copies = self._copies.setdefault(tensor.untyped_storage(), {})
        flat = tensor.is_contiguous()
        layout = tensor.numel() if flat else (tensor.size(), tensor.stride())
        place = (tensor.storage_offset(), tensor.dtype, tensor._version, layout)
        values = copies.get(place)
        if values is None:
            pinned = tensor.device.type == "cuda"
            values = copies[place] = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
            values.copy_(tensor.detach(), non_blocking=pinned)
            self.moved += tensor.nbytes
        return _Moved(tensor.device, values.view(tensor.size()) if flat else values)

    @staticmethod
    def _unpack(packed: Tensor | _Moved) -> Tensor:
        return packed.values.to(packed.device, non_blocking=True) if isinstance(packed, _Moved) else packed

    def _is_weight(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter) or tensor.untyped_storage().data_ptr() in self._weights:
            return True
        if not tensor.requires_grad:  # autocast's copy of a frozen weight has no graph; activations have one, and masks are not 2-D floats
            return tensor.ndim == 2 and tensor.is_floating_point()
        node = tensor.grad_fn
        while node is not None and node.name() in _OF_WEIGHTS:
            node = node.next_functions[0][0]
        return isinstance(getattr(node, "variable", None), nn.Parameter)


def _is_away(tensor: Tensor) -> bool:
    return tensor.device.type not in ("cpu", "meta") and not hasattr(tensor, "to_local")  # a DTensor's storage is that of its part


def staying() -> saved_tensors_hooks:
    """Inside an `Offloaded`: what is saved here stays. The fused loss saves gradients, which the backward pass wants at once."""
    return saved_tensors_hooks(Tensor.detach, lambda tensor: tensor)


# Liger's kernels.

_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def check_liger(device: torch.device) -> None:
    """Refuse Liger's kernels where they cannot run.

    Raises:
        ValueError: a package is missing, or the device is a CPU (but for ``TRITON_INTERPRET=1``).
    """
    if _triton is None or find_spec("liger_kernel") is None:
        raise ValueError("use_liger_kernel: needs the packages triton and liger-kernel: pip install liger-kernel")
    from fastkd_kernels.rows import interpreted

    if device.type == "cpu" and not interpreted():
        raise ValueError("use_liger_kernel: its kernels need a GPU, got the CPU; leave it out (TRITON_INTERPRET=1 runs them, for tests)")


def liger_config(config: Mapping[str, bool] | None) -> dict[str, bool]:
    """``liger_kernel_config`` for the body alone, without Liger's losses.

    Raises:
        ValueError: a kernel that no family has, or a loss that is turned on.
    """
    known = {name for apply in _families().values() for name in inspect.signature(apply).parameters}
    known -= {"model", "kwargs"}
    config = dict(config or {})
    for name, value in config.items():
        if name not in known:
            raise ValueError(f"liger_kernel_config: unknown kernel {name!r}; known are {', '.join(sorted(known.difference(_LOSSES)))}")
        if name in _LOSSES and value:
            raise ValueError(f"liger_kernel_config.{name}: must be left off: the loss is fastkd's own")
    return {**config, **dict.fromkeys(_LOSSES, False)}


def apply_liger(model: nn.Module, config: Mapping[str, bool], who: str) -> bool:
    """Put Liger's kernels into a model's norms, rotary positions and MLPs, and see that it still computes the same.

    Norms and MLPs are replaced in this model. The rotary function belongs to the family's module in transformers: all models of that
    family in the process have Liger's from now on, and none of them can run on a CPU any more (``rope: False`` leaves it alone).

    Args:
        model: on its device.
        config: of `liger_config`.
        who: names the model in messages.

    Returns:
        False for a family that Liger does not know, with a warning.

    Raises:
        ValueError: this version of Liger does not fit this version of transformers, or changes what the model computes.
    """
    base: Any = unwrap_peft_model(model)
    family = base.config.model_type
    if family not in _families():
        logger.warning("use_liger_kernel: Liger has no kernels for %s's family, %s: it stays as it is", who, family)
        return False
    before = _hidden(model)
    # Liger changes the module's classes as well, for models to come: those are not to have its kernels unasked.
    module = vars(sys.modules[type(base).__module__])
    classes = {name: value for name, value in module.items() if isinstance(value, type)}
    try:
        apply_liger_kernel(model, dict(config))
        after = _hidden(model)
    except Exception as error:  # whatever a library raises for parts that it does not find, or kernels that do not compile
        raise ValueError(f"use_liger_kernel: {who}: {_versions()} do not agree on {family}: {type(error).__name__}: {error}") from error
    finally:
        module.update(classes)
    if before is not None and after is not None:
        off = float((after.double() - before.double()).norm() / before.double().norm())
        if not off <= (1e-3 if before.dtype in (torch.float32, torch.float64) else 5e-2):
            raise ValueError(f"use_liger_kernel: {who}: with {_versions()} the hidden states of {family} are {off:.1%} off")
    return True


def _families() -> dict[str, Callable]:
    """By `model_type`, what patches a model of it."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ValueError(f"use_liger_kernel: {_versions()} do not go together ({error}): pip install --upgrade liger-kernel") from error
    return MODEL_TYPE_TO_APPLY_LIGER_FN


def _versions() -> str:
    return f"liger-kernel {importlib.metadata.version('liger-kernel')} and transformers {transformers.__version__}"


@torch.no_grad()
def _hidden(model: nn.Module) -> Tensor | None:
    """Hidden states of a few tokens; None where the weights are whole only inside the model's own call."""
    if is_sharded(model):
        return None
    parameter, training = next(model.parameters()), model.training
    ids = torch.arange(3, 11, device=parameter.device)[None] % model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    try:
        return run_body(model.eval(), input_ids=ids)[0]
    finally:
        model.train(training)


# Optimizers.

# What transformers' names begin with, and what they need: (module, package).
_NEEDS = {
    ("adamw_8bit", "adamw_bnb", "paged_", "lion_", "ademamix", "rmsprop_bnb"): ("bitsandbytes", "bitsandbytes"),
    ("adamw_torch_4bit", "adamw_torch_8bit"): ("torchao", "torchao"),
    ("galore_",): ("galore_torch", "galore-torch"),
    ("apollo_",): ("apollo_torch", "apollo-torch"),
    ("lomo", "adalomo"): ("lomo_optim", "lomo-optim"),
    ("schedule_free_",): ("schedulefree", "schedulefree"),
    ("grokadamw",): ("grokadamw", "grokadamw"),
    ("stable_adamw",): ("optimi", "torch-optimi"),
}
# Those that keep all they remember in `optimizer.state`, and begin anew where it is empty. (Adagrad fills it when it is made.)
_RESETTABLE = ("adamw_torch", "adamw_8bit", "adamw_bnb", "paged_", "lion_", "ademamix", "adafactor", "sgd", "rmsprop")


def check_optimizer(name: str) -> None:
    """Refuse an ``optim`` whose package is missing, before a model is loaded.

    Raises:
        ValueError: naming the package.
    """
    for prefixes, (module, package) in _NEEDS.items():
        if name.startswith(prefixes) and find_spec(module) is None:
            raise ValueError(f"optim: {name} needs the package {package}: pip install {package}")


def check_reset(name: str) -> None:
    """Refuse an ``optim`` that does not begin anew when its state is cleared, as a plan's ``reset_optimizer`` does.

    Raises:
        ValueError: naming those that do.
    """
    if not name.startswith(_RESETTABLE):
        raise ValueError(
            f"optim: {name} keeps more than the state that a plan's reset_optimizer clears; expected an optimizer whose name begins with"
            f" {', '.join(_RESETTABLE)}, or reset_optimizer: false"
        )
