"""Hugging Face causal language models, split into a body and a linear head.

The fused losses never see logits: they need the hidden states that enter the head, the head's weight, and what the model does to
the logits afterwards. Attribute and config names do not say this reliably (one family divides by `logits_scaling`, another
multiplies; some scale the hidden states before the head, some project them), so nothing here reads them:

- `run_body` runs the model's own `forward` with the head's matrix product replaced by a stub that records its input. Whatever stands
  between the last layer and the head is thus included, and so is the router's auxiliary loss, which the forward computes itself.
- `run_at_head` does the same with a function, a fused loss say, in place of the product: it runs inside the head's own call, which is
  where FSDP2 and DeepSpeed ZeRO-3 have the head's weight whole.
- `head_of` learns what happens after the head once per model, by sending chosen values through that same code.

A model that this does not describe exactly raises ValueError.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Head", "fsdp_units", "head_of", "hidden_states_and_head", "is_partitioned", "is_sharded", "redirected", "run_at_head", "run_body",
    "verify_head",
]  # fmt: skip


@dataclass(frozen=True)
class Head:
    """A linear LM head: final logits are `softcap(scale * (hidden @ weight.T + bias))`, with `softcap(x) = c * tanh(x / c)`.

    Args:
        weight: `[V, D]`, the live parameter (a view of its first rows in a model that drops padded vocabulary entries).
        bias: `[V]` or None.
        softcap: c, or None for no soft cap.
        scale: multiplies the logits (and the bias) before the soft cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Final logits `[..., V]` of hidden states `[..., D]`, in their dtype. For checks and small batches: it holds all of them."""
        return self.finish(F.linear(hidden, self.weight, self.bias))

    def finish(self, z: Tensor) -> Tensor:
        """Scale and soft cap, of any tensor of raw logits `hidden @ weight.T + bias`."""
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


def hidden_states_and_head(model: nn.Module, **inputs: Any) -> tuple[Tensor, Head]:
    """`(hidden [B, S, D], head)` of a causal LM, wrapped by PEFT or not; the logits are never computed.

    Gradients reach the body through `hidden`, and the head through `head.weight`. See `run_body` for the inputs.
    """
    hidden, _ = run_body(model, **inputs)
    return hidden, head_of(model)


def run_body(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    """The hidden states that enter the LM head, and what the model's own forward would add to its loss.

    The model's class forward runs, not `model.forward`: a trainer may replace the latter by a function that calls this one, so that
    DDP and FSDP see a single forward.

    Args:
        model: a causal LM of transformers, or a PEFT model around one. Not a DDP wrapper: call this inside its forward.
        inputs: what the model's forward takes (`input_ids`, `attention_mask`, ...). `labels` are ignored.

    Returns:
        hidden: `[B, S, D]`, in the dtype in which the model hands it to its head, with its autograd graph.
        aux_loss: the weighted load-balancing loss of a mixture of experts, 0-d, or None. As in the model's own forward it is there
            when `config.output_router_logits` is set or `output_router_logits=True` is passed.

    Raises:
        ValueError: when the model is not a causal LM with one linear head, or is sharded and this is not inside its call (`redirected`).
    """
    lm = _causal_lm(model)
    linear = _linear(lm)
    seen: list[Tensor] = []

    def record(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return _stub(hidden)

    output = _forward(lm, linear, record, inputs)
    _check_calls(lm, [x.shape for x in seen])
    return seen[0], _aux_loss(lm, output)


def run_at_head(model: nn.Module, function: Callable[[Tensor, Head], Any], /, **inputs: Any) -> tuple[Any, Tensor | None]:
    """`function(hidden, head)` in place of the head's matrix product, inside the head's own call.

    FSDP2 and DeepSpeed ZeRO-3 gather a module's weights when it is called, free them afterwards, and know of the backward pass by the
    gradients of what it returns. In `function` they are whole plain tensors, and as what it returns is what the head's call returns, a
    loss behaves like the head's product would: however many chunks it makes of the tokens, the weight is gathered once in the forward
    pass and its gradient reduced once. FSDP2 gathers the weight once more in the backward pass, which does not need it, unless the head's
    unit has `reshard_after_forward=False` (the default of a root) or `set_unshard_in_backward(False)`.

    Args:
        model, inputs: as `run_body` takes them; of a model that is sharded, inside its own call (`redirected`).
        function: gets `hidden [B, S, D]` and the `Head` with its weight whole, which must not be used after it returns. It returns a
            tensor, or a tuple, list or dict with tensors in it; of what is nested deeper wrappers may not see the autograd graph. They
            may also cast it: under a mixed precision policy with an ``output_dtype`` FSDP2 rounds every tensor in it, those in
            dataclasses too, and once more in what the model's own call returns. Keep figures in a variable outside instead.

    Returns:
        What `function` returned, as hooks of the head handed it on, and the auxiliary loss of `run_body`.

    Raises:
        ValueError: when the model is not a causal LM with one linear head, or is sharded and this is not inside its call.
    """
    lm = _causal_lm(model)
    linear, tail = _linear(lm), _tail(lm)
    shapes: list[torch.Size] = []
    found: list[Any] = []

    def instead(hidden: Tensor) -> Any:
        shapes.append(hidden.shape)
        _check_calls(lm, shapes)
        if hasattr(linear.weight, "full_tensor") and is_sharded(lm):
            raise _outside_its_call(lm)
        return function(hidden, _head(linear, tail))

    def hand_on(_: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> Tensor:
        found.append(output)
        return _stub(arguments[0])

    # Registered last and so called last: a wrapper's hooks see the loss, the rest of the model's forward sees logits.
    handle = linear.register_forward_hook(hand_on)
    try:
        output = _forward(lm, linear, instead, inputs)
    finally:
        handle.remove()
    _check_calls(lm, shapes)
    return found[0], _aux_loss(lm, output)


def _stub(hidden: Tensor) -> Tensor:
    """Logits of a vocabulary of one, for the rest of a model's forward."""
    return hidden.new_zeros(*hidden.shape[:-1], 1)


def _check_calls(lm: Any, shapes: list[torch.Size]) -> None:
    if len(shapes) != 1 or len(shapes[0]) != 3:
        raise _cannot(lm, f"its forward calls the LM head on inputs of shapes {[tuple(s) for s in shapes]}; expected one [B, S, D]")


def _aux_loss(lm: Any, output: Any) -> Tensor | None:
    """The auxiliary loss in a model's output, weighted as the model's own forward would."""
    # The names differ, the values do not: the coefficient by which the model's forward multiplies what it returns as `aux_loss`.
    aux = getattr(output, "aux_loss", None)
    if not isinstance(aux, Tensor):  # a plain 0 where no router ran
        return None
    owners = (lm, lm.config, lm.config.get_text_config())
    for owner, name in ((o, n) for o in owners for n in ("router_aux_loss_coef", "aux_loss_coef")):
        if getattr(owner, name, None) is not None:
            return getattr(owner, name) * aux
    raise _cannot(lm, "it returns an auxiliary loss, but neither it nor its config has a router_aux_loss_coef")


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are whole only while the modules that hold them are called: under FSDP2 or DeepSpeed ZeRO-3."""
    return is_partitioned(model) or bool(fsdp_units(model))


def fsdp_units(model: nn.Module) -> list[Any]:
    """The modules in a model that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported by whoever sharded the model
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the weights, which are empty unless an engine around the model gathers them."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def redirected(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`module(...)`, hooks and wrappers included, runs `forward` meanwhile. Of a wrapper give the module inside: ``ddp.module``."""
    own = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own  # type: ignore[method-assign]


def head_of(model: nn.Module) -> Head:
    """The linear head of a causal LM: live weight and bias, and the scale and soft cap that the model applies to its logits.

    The first call on a model runs it on two tokens (in eval mode, without gradients, without touching a random state) to see what
    its forward does to the logits; this is remembered until a number in the model's config changes. Make that call before FSDP
    shards the model, or inside its call (`redirected`).

    Raises:
        ValueError: when the model has no plain `nn.Linear` as head, or treats its logits in a way that `Head` cannot express.
    """
    lm = _causal_lm(model)
    return _head(_linear(lm), _tail(lm))


def _tail(lm: Any) -> _Tail:
    known = _TAILS.get(lm)
    numbers = _numbers(lm)
    if known is None or known.numbers != numbers:
        known = _TAILS[lm] = _probe(lm, _linear(lm), numbers)
    return known


def _head(linear: nn.Linear, tail: _Tail) -> Head:
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if tail.vocab != weight.shape[0]:
        weight, bias = weight[: tail.vocab], None if bias is None else bias[: tail.vocab]
    return Head(weight, bias, tail.softcap, tail.scale)


@torch.no_grad()
def verify_head(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> float:
    """Compare the split with the model's own logits on one small batch, in the model's dtype and in eval mode.

    Call it before `model.forward` is replaced.

    Args:
        input_ids, attention_mask: `[B, S]` int64.

    Returns:
        The largest absolute difference between the logits, over positions that the mask keeps.

    Raises:
        ValueError: when that exceeds what rounding in the model's dtype explains, with both numbers.
    """
    lm = _causal_lm(model)
    inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
    eps = 0.0

    def split(hidden: Tensor, head: Head) -> Tensor:
        nonlocal eps
        eps = torch.finfo(hidden.dtype).eps
        return head.finish(F.linear(hidden, head.weight, head.bias).double())

    model = getattr(model, "_orig_mod", model)
    with _eval_mode(model):
        with redirected(model, lambda **inputs: run_at_head(model, split, **inputs)[0]):
            ours = model(**inputs)
        own = model(**inputs, return_dict=True).logits
    if ours.shape != own.shape:
        raise _cannot(lm, f"the split gives logits of shape {tuple(ours.shape)}, the model {tuple(own.shape)}")
    keep = slice(None) if attention_mask is None else attention_mask.to(own.device) != 0
    own, ours = own[keep], ours[keep].to(own.device)
    error = float((own.double() - ours).abs().max())
    eps = max(eps, torch.finfo(own.dtype).eps)  # a wrapper may round what a model returns
    # The matrix product is the same; in the narrow types the model rounds a few elementwise operations that ours does in float64.
    # 1e-5 is for the wide ones: some models pass through float32, and in some bodies a GPU adds in another order each time.
    tolerance = max(3 * eps, 1e-5) * float(own.abs().max())
    if not error <= tolerance:
        raise _cannot(lm, f"the split's logits differ from the model's own by {error:.3g}; expected at most {tolerance:.3g}")
    return error


class _Tail(NamedTuple):
    """What a model does to its logits, and the config numbers for which this was found."""

    vocab: int
    softcap: float | None
    scale: float
    numbers: dict[str, float]


_TAILS: WeakKeyDictionary[nn.Module, _Tail] = WeakKeyDictionary()

# A tiny value gives the slope, a huge one shows the cap, and the rest check the shape in between.
_TINY, _HUGE = 2.0**-30, 2.0**40
_GRID = (_TINY, _HUGE, -_HUGE, 0.0, 0.5, -1.0, 3.0, -7.0, 17.0, -40.0, 100.0, -300.0, 1000.0)


def _probe(lm: Any, linear: nn.Linear, numbers: dict[str, float]) -> _Tail:
    device = _kept_weight(linear).device
    if device.type == "meta":
        raise _cannot(lm, "its head has no values: the weights are on the meta device (offloaded, or not loaded)")
    n_vocab = _shape(_kept_weight(linear))[0]
    seen: list[Tensor] = []

    def chosen_logits(hidden: Tensor) -> Tensor:
        n_rows = hidden.shape[:-1].numel()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        grid = torch.tensor(_GRID, dtype=dtype, device=hidden.device)
        # Row r starts at grid entry 3 r: every vocabulary entry meets several values, and rows differ.
        index = torch.arange(n_vocab, device=hidden.device) + 3 * torch.arange(n_rows, device=hidden.device)[:, None]
        z = grid[index % len(grid)].view(*hidden.shape[:-1], n_vocab)
        seen.append(z)
        return z.clone()

    embedding = lm.get_input_embeddings()
    ids = torch.arange(2, device=device if embedding is None else _kept_weight(embedding).device)[None]
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _eval_mode(lm):
        output = _forward(lm, linear, chosen_logits, {"input_ids": ids})
    logits = getattr(output, "logits", None)
    if len(seen) != 1 or not isinstance(logits, Tensor) or logits.shape[:-1] != seen[0].shape[:-1] or logits.shape[-1] > n_vocab:
        raise _cannot(lm, "its logits are not the output of one call of its head")
    n_vocab = logits.shape[-1]
    z, y = seen[0][..., :n_vocab].flatten().double().cpu(), logits.flatten().double().cpu()

    scale = float((y[z == _TINY] / _TINY).mean())
    top = float(y[z == _HUGE].mean())
    linear_tail = abs(top - scale * _HUGE) <= 1e-5 * abs(scale) * _HUGE
    softcap = None if linear_tail else top
    if scale != 0 and (softcap is None or softcap > 0):
        expected = scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)
        tolerance = 16 * torch.finfo(logits.dtype).eps if logits.is_floating_point() else 0.0
        exact = logits.dtype in (torch.float32, torch.float64) or (scale == 1.0 and softcap is None)
        if exact and bool(((y - expected).abs() <= tolerance * expected.abs()).all()):
            return _Tail(n_vocab, softcap, scale, numbers)
    raise _cannot(lm, "what it does to its logits is not softcap(scale * logits)")


def _forward(lm: Any, linear: nn.Linear, head_forward: Callable[[Tensor], Any], inputs: dict[str, Any]) -> Any:
    """The model's own forward, with `head_forward(hidden)` in place of that of its head, `linear`."""
    inputs = {"return_dict": True, **inputs}
    inputs.pop("labels", None)
    # Some pass it on to their body without naming it; a cache would make them forget that rows may be packed.
    if any("use_cache" in inspect.signature(type(part).forward).parameters for part in (lm, lm.base_model)):
        inputs.setdefault("use_cache", False)
    reached = False

    def at_head(hidden: Tensor) -> Any:
        nonlocal reached
        reached = True
        return head_forward(hidden)

    try:
        with redirected(linear, at_head):
            return type(lm).forward(lm, **inputs)
    except RuntimeError as error:
        if not reached and "DTensor" in str(error) and is_sharded(lm):  # torch: "got mixed torch.Tensor and DTensor"
            raise _outside_its_call(lm) from error
        raise


def _outside_its_call(lm: Any) -> ValueError:
    return ValueError(
        f"{type(lm).__name__} is sharded, its weights are whole only inside its own call: run this in a forward given to"
        " fastkd.hf.redirected, and call the model"
    )


def _causal_lm(model: Any) -> Any:
    """The transformers model inside: `model` itself, or what a PEFT model wraps."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    config = getattr(model, "peft_config", None)
    if isinstance(config, dict) and hasattr(model, "get_base_model"):
        if any(getattr(c, "is_prompt_learning", False) for c in config.values()):
            raise ValueError(
                f"{type(model).__name__}: prompt-learning adapters change the input sequence; use a weight adapter such as LoRA"
            )
        model = model.get_base_model()
    if not hasattr(model, "get_output_embeddings"):
        hint = "; pass the module that it wraps, inside its forward" if isinstance(getattr(model, "module", None), nn.Module) else ""
        raise ValueError(f"expected a causal language model of transformers (or a PEFT model around one), got {type(model).__name__}{hint}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise _cannot(model, "it is an encoder-decoder")
    return model


def _linear(lm: Any) -> nn.Linear:
    head = lm.get_output_embeddings()
    if head is None:
        raise _cannot(lm, "it has no LM head (get_output_embeddings() is None)")
    # PEFT's `modules_to_save` keeps a trained copy of the head beside the original one.
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        off = head.disable_adapters or not head.active_adapters
        head = head.original_module if off else copies[head.active_adapters[0]]
    # A subclass with its own forward is a quantised, adapted or otherwise changed head.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        name = f"{type(head).__module__}.{type(head).__name__}"
        hint = "; put the head in modules_to_save instead of adapting it" if name.startswith("peft.") else ""
        raise _cannot(lm, f"its head is a {name}, expected a plain nn.Linear{hint}")
    weight = _kept_weight(head)
    if len(_shape(weight)) != 2 or not weight.is_floating_point():
        raise _cannot(lm, f"its head's weight is {tuple(_shape(weight))} of {weight.dtype}, expected [V, D] of a floating dtype")
    return head


def _kept_weight(module: Any) -> Tensor:
    """A module's weight as it is kept: asked for as an attribute during a forward pass, DeepSpeed ZeRO-3 gathers it."""
    parameters = dict(module.named_parameters(recurse=False))
    found = parameters.get("weight")
    return module.weight if found is None else found  # computed, where it has a parametrization


def _shape(weight: Tensor) -> torch.Size:
    return getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 keeps an empty tensor


def _numbers(lm: Any) -> dict[str, float]:
    """The numbers in the model and its config on which its treatment of the logits can depend."""
    found = {}
    for i, owner in enumerate((lm, lm.config, lm.config.get_text_config())):
        for name, value in vars(owner).items():
            if isinstance(value, int | float) and any(part in name for part in ("logit", "scal", "cap", "mult", "vocab")):
                found[f"{i}.{name}"] = value
    return found


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while: no dropout, so no random numbers are drawn. Modules may differ in mode, hence the list."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _cannot(lm: Any, why: str) -> ValueError:
    return ValueError(f"{type(lm).__name__} cannot be split into hidden states and a linear head: {why}")
