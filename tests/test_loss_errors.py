"""Bad input: one clear error that names the argument, what came and what was expected."""

import math

import pytest
import torch

from fastkd import DIVERGENCES, FusedLinearKDLoss, TeacherHidden, TeacherLogits, TeacherTopK, divergence, fused_linear_kd, kd_loss

N, V, D, DT, VT = 6, 11, 4, 3, 9


def call(**changes):
    arguments = {
        "student_hidden": torch.randn(N, D), "student_weight": torch.randn(V, D),
        "teacher": TeacherHidden(torch.randn(N, DT), torch.randn(VT, DT)), "labels": torch.arange(N), "kd_ratio": 0.5,
    }  # fmt: skip
    return fused_linear_kd(**{**arguments, **changes})


def hidden_teacher(**changes):
    return TeacherHidden(**{"hidden": torch.randn(N, DT), "weight": torch.randn(VT, DT), **changes})


def top(**changes):
    return TeacherTopK(**{"ids": torch.tensor([[3, 5]] * N), "log_probs": torch.full((N, 2), -1.0), **changes})


def labels(position: int, value: int):
    y = torch.arange(N)
    y[position] = value
    return y


# (what, changes, exception, pieces of the message: the argument first)
CASES = [
    # shapes
    ("hidden 0-d", {"student_hidden": torch.tensor(1.0)}, ValueError, ["student_hidden", "dimension"]),
    ("weight 1-d", {"student_weight": torch.randn(D)}, ValueError, ["student_weight", "2 dimensions", "[4]"]),
    ("weight of other width", {"student_weight": torch.randn(V, D + 1)}, ValueError, ["student_weight", "[V_s, 4]", "[11, 5]"]),
    ("bias shape", {"student_bias": torch.randn(V - 1)}, ValueError, ["student_bias", "[11]", "[10]"]),
    ("labels shape", {"labels": torch.arange(N - 1)}, ValueError, ["labels", "[6]", "[5]"]),
    ("token_weight shape", {"token_weight": torch.ones(N, 1)}, ValueError, ["token_weight", "[6]", "[6, 1]"]),
    ("teacher tokens", {"teacher": hidden_teacher(hidden=torch.randn(N + 1, DT))}, ValueError, ["teacher.hidden", "[6]", "[7]"]),
    ("teacher logits", {"teacher": TeacherLogits(torch.randn(2, 3, VT))}, ValueError, ["teacher.logits", "[6]", "[2, 3]"]),
    ("teacher weight", {"teacher": hidden_teacher(weight=torch.randn(VT, DT + 1))}, ValueError, ["teacher.weight", "[V_t, 3]", "[9, 4]"]),
    ("teacher weight 1-d", {"teacher": hidden_teacher(weight=torch.randn(DT))}, ValueError, ["teacher.weight", "2 dimensions"]),
    ("teacher bias", {"teacher": hidden_teacher(bias=torch.randn(VT + 1))}, ValueError, ["teacher.bias", "[9]", "[10]"]),
    ("knob of several elements", {"temperature": torch.ones(2)}, ValueError, ["temperature", "0-d", "[2]"]),
    # devices
    ("weight device", {"student_weight": torch.empty(V, D, device="meta")}, ValueError, ["student_weight", "cpu", "meta"]),
    ("bias device", {"student_bias": torch.empty(V, device="meta")}, ValueError, ["student_bias", "cpu", "meta"]),
    ("labels device", {"labels": torch.empty(N, dtype=torch.int64, device="meta")}, ValueError, ["labels", "cpu", "meta"]),
    ("token_weight device", {"token_weight": torch.empty(N, device="meta")}, ValueError, ["token_weight", "cpu", "meta"]),
    ("teacher device", {"teacher": TeacherLogits(torch.empty(N, VT, device="meta"))}, ValueError, ["teacher.logits", "cpu", "meta"]),
    ("teacher head", {"teacher": hidden_teacher(weight=torch.empty(VT, DT, device="meta"))}, ValueError, ["teacher.weight", "meta"]),
    # dtypes and types
    ("hidden ints", {"student_hidden": torch.ones(N, D, dtype=torch.int64)}, TypeError, ["student_hidden", "floating", "int64"]),
    ("hidden a list", {"student_hidden": [[1.0]]}, TypeError, ["student_hidden", "tensor", "list"]),
    ("weight dtype", {"student_weight": torch.randn(V, D).half()}, TypeError, ["student_weight", "float32", "float16"]),
    ("weight None", {"student_weight": None}, TypeError, ["student_weight", "tensor", "NoneType"]),
    ("bias ints", {"student_bias": torch.ones(V, dtype=torch.int32)}, TypeError, ["student_bias", "floating", "int32"]),
    ("labels dtype", {"labels": torch.arange(N, dtype=torch.int32)}, TypeError, ["labels", "int64", "int32"]),
    ("labels a list", {"labels": [0] * N}, TypeError, ["labels", "tensor", "list"]),
    ("token_weight bools", {"token_weight": torch.ones(N, dtype=torch.bool)}, TypeError, ["token_weight", "floating", "bool"]),
    ("token_weight a list", {"token_weight": [1.0] * N}, TypeError, ["token_weight", "tensor", "list"]),
    ("teacher a tensor", {"teacher": torch.randn(N, VT)}, TypeError, ["teacher", "TeacherLogits", "Tensor"]),
    ("teacher ints", {"teacher": TeacherLogits(torch.ones(N, VT, dtype=torch.int64))}, TypeError, ["teacher.logits", "floating", "int64"]),
    (
        "teacher dtypes",
        {"teacher": hidden_teacher(weight=torch.randn(VT, DT).double())},
        TypeError,
        ["teacher.weight", "float32", "float64"],
    ),
    ("teacher bias ints", {"teacher": hidden_teacher(bias=torch.ones(VT, dtype=torch.int64))}, TypeError, ["teacher.bias", "int64"]),
    ("temperature text", {"temperature": "2"}, TypeError, ["temperature", "number", "str"]),
    ("temperature bool", {"temperature": True}, TypeError, ["temperature", "number", "bool"]),
    ("kd_ratio word", {"kd_ratio": "half"}, TypeError, ["kd_ratio", "number", "str"]),
    ("normalizer text", {"normalizer": "mean"}, TypeError, ["normalizer", "number", "str"]),
    ("scale text", {"student_scale": "x"}, TypeError, ["student_scale", "number", "str"]),
    ("teacher scale text", {"teacher": hidden_teacher(scale="x")}, TypeError, ["teacher.scale", "number", "str"]),
    ("logits dtype", {"logits_dtype": torch.float16}, ValueError, ["logits_dtype", "float32", "float16"]),
    # labels and weights
    ("label too large", {"labels": labels(2, V)}, ValueError, ["labels", "[0, 11)", "got 11"]),
    ("label negative", {"labels": labels(2, -1)}, ValueError, ["labels", "-100", "got -1"]),
    ("label unused", {"labels": labels(2, V), "kd_ratio": 1.0}, ValueError, ["labels", "got 11"]),
    ("no labels", {"labels": None}, ValueError, ["labels", "0.5", "None"]),
    ("weight negative", {"token_weight": torch.tensor([1.0, -0.5, 1, 1, 1, 1])}, ValueError, ["token_weight", ">= 0", "-0.5"]),
    ("weight nan", {"token_weight": torch.tensor([1.0, math.nan, 1, 1, 1, 1])}, ValueError, ["token_weight", ">= 0", "nan"]),
    ("weight inf", {"token_weight": torch.tensor([1.0, math.inf, 1, 1, 1, 1])}, ValueError, ["token_weight", "finite", "inf"]),
    # numbers
    *[(f"temperature {t}", {"temperature": t}, ValueError, ["temperature", "> 0", f"{t:g}"]) for t in (0.0, -1.0, math.inf, math.nan)],
    *[(f"kd_ratio {r}", {"kd_ratio": r}, ValueError, ["kd_ratio", "[0, 1]", f"{r:g}"]) for r in (-0.1, 1.1, math.nan)],
    *[(f"normalizer {n}", {"normalizer": n}, ValueError, ["normalizer", "> 0", f"{n:g}"]) for n in (0.0, -3.0, math.inf, math.nan)],
    *[(f"softcap {c}", {"student_softcap": c}, ValueError, ["student_softcap", "> 0", f"{c:g}"]) for c in (0.0, -30.0, math.inf)],
    ("teacher softcap", {"teacher": hidden_teacher(softcap=-1.0)}, ValueError, ["teacher.softcap", "> 0", "-1"]),
    ("teacher scale", {"teacher": hidden_teacher(scale=math.nan)}, ValueError, ["teacher.scale", "finite", "nan"]),
    ("student scale", {"student_scale": math.inf}, ValueError, ["student_scale", "finite", "inf"]),
    *[(f"chunk_tokens {c}", {"chunk_tokens": c}, ValueError, ["chunk_tokens", ">= 1", repr(c)]) for c in (0, -4, 2.5, True)],
    # names
    ("divergence", {"divergence": "kl"}, ValueError, ["divergence", "'kl'", *DIVERGENCES]),
    ("divergence type", {"divergence": 3}, TypeError, ["divergence", "name", "int"]),
    ("impl", {"impl": "cuda"}, ValueError, ["impl", "'triton'", "'cuda'"]),
    ("ignore_index", {"ignore_index": None}, TypeError, ["ignore_index", "whole number", "NoneType"]),
    # sparse teachers
    ("top-k ids a list", {"teacher": top(ids=[0])}, TypeError, ["teacher.ids", "tensor", "list"]),
    ("top-k ids float", {"teacher": top(ids=torch.zeros(N, 2))}, TypeError, ["teacher.ids", "int64", "float32"]),
    ("top-k log_probs ints", {"teacher": top(log_probs=torch.zeros(N, 2).long())}, TypeError, ["teacher.log_probs", "floating", "int64"]),
    ("top-k tokens", {"teacher": top(log_probs=torch.zeros(N + 1, 2))}, ValueError, ["teacher.log_probs", "[6]", "[7]"]),
    ("top-k shapes", {"teacher": top(ids=torch.zeros(N, 3).long())}, ValueError, ["teacher.ids", "[6, 2]", "[6, 3]"]),
    ("top-k of none", {"teacher": top(ids=torch.zeros(N, 0).long(), log_probs=torch.zeros(N, 0))}, ValueError, ["teacher.log_probs", "0]"]),
    ("top-k tail", {"teacher": top(log_tail=torch.zeros(N, 1))}, ValueError, ["teacher.log_tail", "[6]", "[6, 1]"]),
    ("top-k tail ints", {"teacher": top(log_tail=torch.zeros(N).long())}, TypeError, ["teacher.log_tail", "floating", "int64"]),
    ("top-k device", {"teacher": top(ids=torch.zeros(N, 2, device="meta").long())}, ValueError, ["teacher.ids", "cpu", "meta"]),
    ("top-k id large", {"teacher": top(ids=torch.tensor([[3, V]] * N))}, ValueError, ["teacher.ids", "[0, 11)", "got 11"]),
    ("top-k id negative", {"teacher": top(ids=torch.tensor([[3, -4]] * N))}, ValueError, ["teacher.ids", "[0, 11)", "got -4"]),
    ("top-k id twice", {"teacher": top(ids=torch.tensor([[7, 7]] * N))}, ValueError, ["teacher.ids", "distinct", "got 7 twice"]),
    ("top-k positive", {"teacher": top(log_probs=torch.tensor([[-1.0, 0.5]] * N))}, ValueError, ["teacher.log_probs", "<= 0", "got 0.5"]),
    ("top-k nan", {"teacher": top(log_probs=torch.tensor([[-1.0, math.nan]] * N))}, ValueError, ["teacher.log_probs", "<= 0", "nan"]),
    ("top-k sum", {"teacher": top(log_probs=torch.full((N, 2), -0.5))}, ValueError, ["teacher.log_probs", "at most 1", "1.21306"]),
    ("top-k sum with tail", {"teacher": top(log_tail=torch.full((N,), -1.5))}, ValueError, ["teacher.log_tail", "0.958889"]),
    ("top-k temperature", {"teacher": top(temperature=2.0)}, ValueError, ["temperature", "expected 2", "TeacherTopK", "got 1"]),
    ("top-k temperature text", {"teacher": top(temperature="2")}, TypeError, ["teacher.temperature", "number", "str"]),
    (
        "top-k alpha_beta",
        {"teacher": top(), "divergence": divergence("alpha_beta", alpha=0.5, beta=0.7)},
        ValueError,
        ["divergence 'alpha_beta'", "TeacherTopK", "alpha + beta = 1", "alpha = 0.5, beta = 0.7"],
    ),
    # no teacher
    ("no teacher", {"teacher": None}, ValueError, ["teacher", "kd_ratio = 0.5", "None"]),
    ("no teacher, tensor", {"teacher": None, "kd_ratio": torch.tensor(0.25)}, ValueError, ["teacher", "kd_ratio = 0.25", "None"]),
]


@pytest.mark.parametrize(("changes", "exception", "pieces"), [pytest.param(*c[1:], id=c[0]) for c in CASES])
def test_error_names_the_argument(changes, exception, pieces):
    with pytest.raises(exception) as caught:
        call(**changes)
    message = str(caught.value)
    assert message.startswith(pieces[0]), message
    assert "\n" not in message
    for piece in pieces[1:]:
        assert piece in message, f"{piece!r} is not in {message!r}"


def test_the_unchanged_call_is_fine():
    assert call().isfinite()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("symmetric_kl", {"ratio": 1.01}),
        ("symmetric_kl", {"ratio": -0.01}),
        ("skew_forward_kl", {"alpha": 1.0}),
        ("skew_reverse_kl", {"alpha": -0.1}),
        ("jsd", {"beta": 2.0}),
        ("jsd", {"beta": math.nan}),
        ("alpha_beta", {"alpha": 0.0}),
        ("alpha_beta", {"beta": -1.0}),
        ("alpha_beta", {"alpha": math.inf}),
        ("adaptive_kl", {"mu": 1.5}),
    ],
)
def test_parameter_outside_its_domain(name, parameters):
    ((key, value),) = parameters.items()
    with pytest.raises(ValueError, match=rf"divergence '{name}': expected {key} in .*, got {value:g}"):
        divergence(name, **parameters)
    # As a tensor it is seen when the loss reads it.
    chosen = divergence(name, **{key: torch.tensor(value)})
    with pytest.raises(ValueError, match=rf"divergence '{name}': expected {key} in .*, got {value:g}"):
        call(divergence=chosen)


def test_unknown_parameter():
    with pytest.raises(ValueError, match="divergence 'jsd': unknown parameter 'alpha'; it takes beta"):
        divergence("jsd", alpha=0.5)
    with pytest.raises(ValueError, match="divergence 'tvd': unknown parameter 'beta'; it takes none"):
        divergence("tvd", beta=0.5)
    with pytest.raises(TypeError, match="divergence 'jsd': beta: expected a number or a 0-d tensor, got str"):
        divergence("jsd", beta="half")


@pytest.mark.parametrize("name", ["temperature", "kd_ratio", "normalizer"])
def test_tensor_knobs_are_checked_like_numbers(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got -1"):
        call(**{name: torch.tensor(-1.0)})


def test_triton_where_it_cannot_run(monkeypatch):
    rows = pytest.importorskip("fastkd_kernels.rows", reason="Triton is not installed")
    with pytest.raises(ValueError, match="impl: 'triton' computes in fp32, got float64"):
        call(impl="triton", student_hidden=torch.randn(N, D).double(), student_weight=torch.randn(V, D).double())
    monkeypatch.setattr(rows, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"impl: 'triton' needs CUDA tensors .*, got tensors on cpu"):
        call(impl="triton")


def test_triton_where_it_is_not_installed(monkeypatch):
    from fastkd import functional

    monkeypatch.setattr(functional, "_triton", None)
    with pytest.raises(ValueError, match="impl: 'triton' needs the package triton"):
        call(impl="triton")
    assert call(impl="auto").isfinite()


def test_kd_loss_names_its_own_argument():
    teacher = TeacherLogits(torch.randn(N, VT))
    with pytest.raises(TypeError, match="student_logits: expected a floating point dtype"):
        kd_loss(torch.ones(N, V, dtype=torch.int64), teacher)
    with pytest.raises(ValueError, match=r"teacher\.logits: expected the leading dimensions of student_logits"):
        kd_loss(torch.randn(N + 1, V), teacher)
    with pytest.raises(ValueError, match=r"labels: expected .*\[0, 11\).*got 11"):
        kd_loss(torch.randn(N, V), teacher, torch.full((N,), V))


def test_module_raises_like_the_function():
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got -1"):
        FusedLinearKDLoss(temperature=-1.0)(torch.randn(N, D), torch.randn(V, D), hidden_teacher())


def test_bad_input_leaves_nothing_changed():
    """An error after the device was read must not have touched the gradients."""
    hidden = torch.randn(N, D, requires_grad=True)
    with pytest.raises(ValueError):
        call(student_hidden=hidden, labels=labels(0, V))
    assert hidden.grad is None
