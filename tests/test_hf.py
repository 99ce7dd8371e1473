"""The split of Hugging Face models into body and head, against the models' own logits and losses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from fastkd.hf import Head, head_of, hidden_states_and_head, run_body, verify_head

VOCAB = 101
# The names that most configs share, and the older ones of the GPT-2 line.
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
GQA = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
MOE = {**GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    **BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
DBRX = {
    "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.7},
}

# Per family: its config, and what must come out for the scale and the soft cap.
FAMILIES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "llama": ({**GQA, "tie_word_embeddings": False}, 1.0, None),
    "mistral": (GQA, 1.0, None),
    "qwen2": ({**GQA, "tie_word_embeddings": True}, 1.0, None),
    "qwen3": (GQA, 1.0, None),
    "gemma": (GQA, 1.0, None),
    "gemma2": ({**GQA, "final_logit_softcapping": 0.5}, 1.0, 0.5),
    "gemma3_text": ({**GQA, "final_logit_softcapping": 0.5}, 1.0, 0.5),
    "vaultgemma": ({**GQA, "final_logit_softcapping": 0.5}, 1.0, 0.5),
    "recurrent_gemma": ({**GQA, "lru_width": 32, "logits_soft_cap": 0.5, "num_hidden_layers": 3}, 1.0, 0.5),
    "nanochat": ({**GQA, "final_logit_softcapping": 0.5}, 1.0, 0.5),
    "phi": (BASE, 1.0, None),  # a head with a bias
    "phi3": (GQA, 1.0, None),
    "cohere": ({**GQA, "logit_scale": 0.3}, 0.3, None),
    "cohere2": ({**GQA, "logit_scale": 0.3}, 0.3, None),
    "granite": ({**GQA, "logits_scaling": 3.0}, 1 / 3.0, None),  # divides
    "hyperclovax": ({**GQA, "logits_scaling": 3.0}, 3.0, None),  # multiplies
    "minicpm3": ({**MLA, "dim_model_base": 96}, 1.0, None),  # divides the hidden states
    "falcon_h1": (
        {**GQA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.4},
        0.4,
        None,
    ),
    "gpt2": (GPT, 1.0, None),
    "gptj": ({**GPT, "rotary_dim": 4}, 1.0, None),  # a head with a bias
    "codegen": ({**GPT, "rotary_dim": 4}, 1.0, None),
    "gpt_neo": (
        {"vocab_size": VOCAB, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
        1.0,
        None,
    ),
    "gpt_neox": (BASE, 1.0, None),
    "gpt_bigcode": (GPT, 1.0, None),
    "opt": ({**BASE, "ffn_dim": 48, "word_embed_proj_dim": 16}, 1.0, None),  # projects the hidden states
    "xglm": ({"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, 1.0, None),
    "biogpt": (BASE, 1.0, None),
    "bloom": ({"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 1.0, None),
    "mpt": ({"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4}, 1.0, None),
    "falcon": (BASE, 1.0, None),
    "stablelm": ({**BASE, "num_key_value_heads": 2}, 1.0, None),
    "starcoder2": ({**BASE, "num_key_value_heads": 2}, 1.0, None),
    "olmo": ({**BASE, "num_key_value_heads": 2}, 1.0, None),
    "olmo2": ({**BASE, "num_key_value_heads": 2}, 1.0, None),
    "smollm3": (GQA, 1.0, None),
    "glm4": (GQA, 1.0, None),
    "nemotron": (GQA, 1.0, None),
    "mamba": ({**BASE, "state_size": 4}, 1.0, None),
    "mamba2": ({**BASE, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}, 1.0, None),
    "rwkv": ({**BASE, "attention_hidden_size": 32}, 1.0, None),
    "mixtral": ({**MOE, **ROUTER, "num_local_experts": 4}, 1.0, None),
    "qwen2_moe": ({**MOE, **ROUTER, "num_experts": 4, "shared_expert_intermediate_size": 16}, 1.0, None),
    "qwen3_moe": ({**MOE, **ROUTER, "num_experts": 4}, 1.0, None),
    "olmoe": ({**MOE, **ROUTER, "num_experts": 4}, 1.0, None),
    "granitemoe": ({**MOE, **ROUTER, "num_local_experts": 4, "logits_scaling": 3.0}, 1 / 3.0, None),
    "jetmoe": (
        {**BASE, "num_local_experts": 4, "num_key_value_heads": 2, "kv_channels": 8, "output_router_logits": True, "aux_loss_coef": 0.7},
        1.0,
        None,
    ),
    "dbrx": ({"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "output_router_logits": True, **DBRX}, 1.0, None),
    "gpt_oss": ({**MOE, **ROUTER, "num_local_experts": 4}, 1.0, None),
    "deepseek_v2": ({**MLA, **DEEPSEEK}, 1.0, None),
    "deepseek_v3": ({**MLA, **DEEPSEEK}, 1.0, None),
}
ROUTED = [name for name, (config, _, _) in FAMILIES.items() if config.get("output_router_logits")]


def tiny(model_type: str, **overrides: Any) -> Any:
    """A random model of which no norm, bias or scale is trivial."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have {model_type}")
    config = AutoConfig.for_model(model_type, **{**FAMILIES[model_type][0], **overrides})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, 9))


def written_out(hidden: Tensor, head: Head) -> Tensor:
    z = hidden @ head.weight.T
    z = head.scale * (z if head.bias is None else z + head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def test_enough_families_are_here() -> None:
    assert sum(name in CONFIG_MAPPING for name in FAMILIES) >= 45


@pytest.mark.parametrize("model_type", FAMILIES)
def test_split_gives_the_models_own_logits(model_type: str) -> None:
    model = tiny(model_type)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padded on the left
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits
        hidden, head = hidden_states_and_head(model, input_ids=ids, attention_mask=mask)
    _, scale, softcap = FAMILIES[model_type]
    assert (head.scale, head.softcap) == (pytest.approx(scale, rel=1e-12), softcap)
    assert own.std() > 0.02
    kept = mask.bool()
    torch.testing.assert_close(written_out(hidden, head)[kept], own[kept], rtol=1e-5, atol=1e-5 * float(own[kept].abs().max()))
    torch.testing.assert_close(head.logits(hidden)[kept], own[kept], rtol=1e-5, atol=1e-5 * float(own[kept].abs().max()))
    assert any(head.weight is p for p in model.parameters())
    verify_head(model, ids, mask)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "gptj", "opt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(model_type: str, dtype: torch.dtype) -> None:
    model = tiny(model_type).to(dtype)
    ids = tokens()
    hidden, head = hidden_states_and_head(model, input_ids=ids)
    assert hidden.dtype == head.weight.dtype == dtype
    error = verify_head(model, ids)
    assert error < (1e-7 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("model_type", ROUTED)
@pytest.mark.parametrize("training", [False, True])
def test_router_loss_is_what_the_model_adds_to_its_loss(model_type: str, training: bool) -> None:
    model = tiny(model_type).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    try:
        own = model(input_ids=ids, attention_mask=mask, labels=ids)
    except AttributeError as error:  # granitemoe in 5.10
        pytest.skip(f"transformers {transformers.__version__}: the model's own forward fails with a router loss: {error}")
    ce = F.cross_entropy(own.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    _, aux = run_body(model, input_ids=ids, attention_mask=mask, labels=ids)
    if torch.equal(own.loss, ce) and aux is None:  # jetmoe in 5.10
        pytest.skip(f"transformers {transformers.__version__}: the model does not add its router loss")
    assert aux is not None
    assert aux.item() > 0.01
    assert aux.item() == pytest.approx((own.loss - ce).item(), rel=1e-4)

    # Its gradient reaches the routers.
    aux.backward()
    assert any("router" in n or "gate" in n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0)

    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
        assert run_body(model, input_ids=ids, attention_mask=mask)[1] is None


def test_gradients_are_the_models_own() -> None:
    model = tiny("gemma2").double().train()
    ids = tokens()
    own = {}
    model(input_ids=ids).logits.sin().sum().backward()
    for name, p in model.named_parameters():
        own[name] = p.grad.clone()
        p.grad = None
    hidden, head = hidden_states_and_head(model, input_ids=ids)
    written_out(hidden, head).sin().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, own[name], msg=name)


def test_the_head_is_never_multiplied() -> None:
    model = tiny("llama")
    head_of(model)

    def forbidden(*_: Any) -> None:
        raise AssertionError("the LM head ran")

    model.lm_head.register_forward_hook(lambda module, args, out: forbidden() if out.shape[-1] == VOCAB else None)
    hidden, _ = run_body(model, input_ids=tokens())
    assert hidden.shape == (2, 9, 32)
    with pytest.raises(AssertionError, match="the LM head ran"):
        model(input_ids=tokens())


def test_nothing_is_left_changed() -> None:
    model = tiny("gemma2")
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    head_of(model)
    verify_head(model, torch.arange(3, 12)[None])
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(RuntimeError):  # a bad batch must not leave the stub in place either
        run_body(model, input_ids=torch.zeros(1, 3))
    assert "forward" not in vars(model.lm_head)


def test_replaced_forward_may_call_run_body() -> None:
    model = tiny("llama")
    ids = tokens()
    expected, _ = run_body(model, input_ids=ids)
    model.forward = lambda **inputs: run_body(model, **inputs)[0]
    assert torch.equal(model(input_ids=ids), expected)


def test_changed_config_is_noticed() -> None:
    model = tiny("granite")
    assert head_of(model).scale == pytest.approx(1 / 3)
    model.config.logits_scaling = 5.0
    assert head_of(model).scale == pytest.approx(1 / 5)
    verify_head(model, tokens())


def test_padded_vocabulary_that_the_model_drops() -> None:
    class Cropped(type(tiny("llama"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits[..., :90]
            return out

    model = tiny("llama")
    model.__class__ = Cropped
    head = head_of(model)
    assert head.weight.shape == (90, 32)
    assert head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    verify_head(model, torch.arange(3, 12)[None])


def changed(after: Any, model_type: str = "llama") -> Any:
    """A model whose forward does `after` to its logits."""
    model = tiny(model_type)
    base = type(model)

    class Odd(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = after(out.logits)
            return out

    model.__class__ = Odd
    return model


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z + 0.1,  # affine
        lambda z: z * torch.linspace(1, 2, z.shape[-1]),  # a scale per vocabulary entry
        lambda z: z + torch.linspace(0, 1e-3, VOCAB),  # a bias after the head
        lambda z: z.relu(),
        lambda z: z.clamp(-30, 30),  # capped, but not by tanh
        lambda z: z.masked_fill(torch.arange(z.shape[-1]) == 57, torch.finfo(z.dtype).min),  # a forbidden token
        lambda z: z.log_softmax(-1),
        lambda z: z.flip(-1),
        lambda z: (z * 0.77).bfloat16(),  # rounds, so that the scale cannot be known exactly
    ],
    ids=["affine", "scale-per-token", "late-bias", "relu", "clamp", "forbidden-token", "log-softmax", "flip", "rounded"],
)
def test_unknown_treatment_of_the_logits_is_refused(after: Any) -> None:
    with pytest.raises(ValueError, match="Odd cannot be split"):
        head_of(changed(after))


def test_verify_head_sees_what_depends_on_the_hidden_states() -> None:
    # Equal to the plain head where logits are chosen freely, different on real ones: only the comparison can tell.
    model = changed(lambda z: z if z.dtype == torch.float64 else z * 1.01)
    head_of(model)
    with pytest.raises(ValueError, match=r"Odd cannot be split .* differ from the model's own by"):
        verify_head(model, tokens())


class TestRefused:
    def test_a_head_that_is_not_linear(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 2

        model = tiny("llama")
        model.lm_head = Scaled(32, VOCAB)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be split .*Scaled, expected a plain nn.Linear"):
            head_of(model)

    def test_no_head(self) -> None:
        with pytest.raises(ValueError, match=r"LlamaModel cannot be split .* no LM head"):
            run_body(tiny("llama").model, input_ids=tokens())

    def test_encoder_decoder(self) -> None:
        t5 = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        model = transformers.T5ForConditionalGeneration(t5)
        with pytest.raises(ValueError, match=r"T5ForConditionalGeneration cannot be split .* encoder-decoder"):
            head_of(model)

    def test_not_a_transformers_model(self) -> None:
        with pytest.raises(ValueError, match=r"expected a causal language model of transformers .* got Linear"):
            head_of(nn.Linear(2, 3))

    def test_a_wrapper_that_must_see_the_forward(self) -> None:
        wrapper = nn.DataParallel(tiny("llama"))
        with pytest.raises(ValueError, match="got DataParallel; pass the module that it wraps"):
            run_body(wrapper, input_ids=tokens())

    def test_meta_device(self) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **FAMILIES["llama"][0]))
        with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be split .* meta device"):
            head_of(model)


class TestPeft:
    def wrap(self, model: Any, **kwargs: Any) -> Any:
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **kwargs)).eval()
        for name, p in wrapped.named_parameters():
            if "modules_to_save" in name:
                p.data.add_(0.3 * torch.randn_like(p))
        return wrapped

    def test_lora(self) -> None:
        plain = tiny("granite")
        ids = tokens()
        before, _ = run_body(plain, input_ids=ids)
        model = self.wrap(plain, target_modules=["q_proj", "v_proj", "down_proj"])
        hidden, head = hidden_states_and_head(model, input_ids=ids)
        assert not torch.allclose(hidden, before, atol=1e-3)  # the adapters are at work
        torch.testing.assert_close(written_out(hidden, head), model(input_ids=ids).logits)
        verify_head(model, ids)
        with model.disable_adapter():
            torch.testing.assert_close(run_body(model, input_ids=ids)[0], before)

    def test_trained_copy_of_the_head(self) -> None:
        model = self.wrap(tiny("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
        ids = tokens()
        hidden, head = hidden_states_and_head(model, input_ids=ids)
        assert head.weight.requires_grad
        torch.testing.assert_close(written_out(hidden, head), model(input_ids=ids).logits)
        with model.disable_adapter():
            original = head_of(model)
            assert original.weight is not head.weight
            torch.testing.assert_close(written_out(run_body(model, input_ids=ids)[0], original), model(input_ids=ids).logits)

    def test_adapted_head_is_refused(self) -> None:
        model = self.wrap(tiny("llama"), target_modules=["q_proj", "lm_head"])
        with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be split .* peft\..*put the head in modules_to_save"):
            head_of(model)

    def test_prompt_learning_is_refused(self) -> None:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(ValueError, match="prompt-learning adapters"):
            run_body(model, input_ids=tokens())


def test_split_of_a_multimodal_model_on_text() -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {**FAMILIES["llama"][0], "model_type": "llama"}
    config = transformers.LlavaConfig(vision_config={"model_type": "siglip_vision_model", **vision}, text_config=text, image_token_id=100)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    verify_head(model, torch.arange(3, 12)[None])


def test_a_compiled_model_is_split_like_the_model():
    from .tiny import tiny_llama

    model = tiny_llama(1)
    ids = torch.tensor([[3, 4, 5]])
    hidden, head = hidden_states_and_head(torch.compile(model, backend="eager"), input_ids=ids)
    torch.testing.assert_close(head.logits(hidden), model(ids).logits)
