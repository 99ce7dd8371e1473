"""The vocabulary-parallel head: two gloo processes, each with its slices, against one process and the float64 oracle."""

import pytest
import torch

from fastkd import fused_linear_kd
from fastkd.parallel import vocab_parallel_linear_kd

from . import two_processes
from .parallel_worker import BY_BUDGET, CASES, MIX, N
from .problems import Result, assert_close, assert_within_rule, fused, make, oracle, relative_error


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found, in one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    two_processes.run("tests.parallel_worker", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def whole(found: list[Result]) -> Result:
    """One result of both ranks', which must agree on the loss and on the hidden states' gradient to the last bit."""
    a, b = found
    assert a.loss.equal(b.loss)
    gradients = {"hidden": a.gradients["hidden"]}
    assert gradients["hidden"].equal(b.gradients["hidden"])
    for name in a.gradients.keys() - {"hidden"}:
        gradients[name] = torch.cat([a.gradients[name], b.gradients[name]])
    return Result(a.loss, gradients)


@pytest.mark.parametrize("key", CASES)
def test_equals_one_process_and_the_oracle(ranks, key):
    case = CASES[key]
    result, problem = whole([found[key] for found in ranks]), case.problem(key)
    truth, alone = oracle(problem, upstream=-1.7), fused(problem, upstream=-1.7, impl="torch")
    if case.dtype == torch.float64:
        assert_close(result, truth)
        assert_close(result, alone)
        return
    assert result.loss.dtype == torch.float32
    assert {g.dtype for g in result.gradients.values()} == {case.dtype}
    # Rounded logits have an error of their own, which plain torch's in the same dtype has as well.
    assert_within_rule(result, oracle(problem, upstream=-1.7, dtype=None), truth)
    if "logits_dtype" not in problem.options:
        # As exact as one process: what is summed over ranks is not rounded before.
        for name, gradient in truth.gradients.items():
            error, reference = (relative_error(r.gradients[name], gradient) for r in (result, alone))
            assert error <= 1.2 * reference + 1e-5, f"gradient of {name}: off by {error:.3g} of its norm, one process by {reference:.3g}"


def test_all_tokens_masked(ranks):
    result = whole([found["every token masked"] for found in ranks])
    assert result.loss == 0
    assert all((g == 0).all() for g in result.gradients.values())


def test_gradients_parts_and_double_backward(ranks):
    torch.manual_seed(0)
    problem = make(bias=True, **MIX)
    for found in (rank["gradients"] for rank in ranks):
        for needed in ("hidden", "weight", "bias", "hidden bias"):
            assert " ".join(sorted(found[needed])) == " ".join(sorted(needed.split()))
        assert found["no_grad"] is False
        assert found["retain_graph"]
        assert found["parts need no gradient"]
        assert found["least divergence"] == 0.0, "rounding alone would make it negative"
        assert found["double backward"].startswith("RuntimeError: double backward")
        assert found["autocast"] == ("torch.float32", "torch.float32", True)
        _, parts = fused_linear_kd(
            problem.hidden, problem.weight, problem.teacher, problem.labels, student_bias=problem.bias, return_parts=True, **problem.options
        )
        assert found["parts"].keys() == vars(parts).keys()
        for name, value in vars(parts).items():
            torch.testing.assert_close(found["parts"][name], value, rtol=1e-9, atol=1e-12)


ERRORS = {
    "teacher cut elsewhere": ["ValueError: teacher.weight: expected rank 0's slice to cover", "[0, 15)", "37 shared", "got [0, 16)"],
    "teacher cut the other way": ["ValueError: teacher.weight: expected rank 0's slice", "got [0, 36)"],
    "no rows": ["ValueError: teacher.weight: expected", "[0, 6] (on rank 1)"],
    "shape on one rank": ["ValueError: teacher.weight: expected shape [V_t, 6]", "(on rank 1)"],
    "shape on both": ["ValueError: teacher.weight: expected shape [V_t, 6]"],
    "type on one rank": ["TypeError: labels: expected dtype torch.int64, got torch.int32 (on rank 1)"],
    "another teacher": ["TypeError: teacher: expected TeacherHidden", "got TeacherLogits"],
    "label on one rank": ["ValueError: labels: expected ignore_index (-100) or an id in [0, 37)", "got 37 (on rank 1)"],
    "negative weight": ["ValueError: token_weight: expected finite values >= 0, got -1"],
    "temperature": ["ValueError: temperature: expected a finite number > 0, got 0"],
    "temperatures differ": ["ValueError: temperature: expected the same on all ranks, got 1.0 on rank 0 and 2.0 on rank 1"],
    "parameters differ": ["ValueError: the parameters of jsd: expected the same", "(0.25,) on rank 0"],
    "divergences differ": ["ValueError: divergence: expected the same on all ranks, got tvd on rank 0 and jsd on rank 1"],
    "labels absent on one rank": ["ValueError: labels: expected the same on all ranks, got given on rank 0 and absent on rank 1"],
    "masks differ": ["ValueError: labels and token_weight: expected the same", "10 counted tokens", "9 counted tokens"],
    "gradients differ": [
        "ValueError: student_weight.requires_grad: expected the same on all ranks, got False on rank 0 and True on rank 1"
    ],
    "tokens differ": ["ValueError: student_hidden: expected the same", "[13, 8]", "[7, 8]"],
    "another exception on one rank": ["ValueError: NotImplementedError: ", "meta tensor", "(on rank 1)"],
    "teacher of another type": ["TypeError: teacher: expected TeacherHidden", "got int"],
}


def test_one_error_on_every_rank_and_no_deadlock(ranks):
    first, second = (found["errors"] for found in ranks)
    assert first == second
    assert first.keys() == ERRORS.keys()
    for key, pieces in ERRORS.items():
        assert all(piece in first[key] for piece in pieces), (key, first[key])
        assert first[key].startswith(pieces[0])
        assert "\n" not in first[key]
        assert ("(on rank" in first[key]) == any("(on rank" in piece for piece in pieces), first[key]


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "adaptive_kl"])
@pytest.mark.parametrize("kind", ["training", "frozen", "KD at T = 1"])
def test_what_travels_does_not_grow_with_the_vocabulary(ranks, name, kind):
    for found in (rank["traffic"] for rank in ranks):
        sent = found[f"{name}, {kind}, 37"]
        assert sent == found[f"{name}, {kind}, 3701"]
        agreement, chunks, value = sent[:2], sent[2:-1], sent[-1]
        assert all(what == "gather" and size <= 32 for what, size in agreement)
        assert value == ("sum", 15 * 4), "the divergence, once per call"
        numbers = 4 if kind == "KD at T = 1" else 7
        expected = [("gather", 5 * numbers * 4)]
        if name == "adaptive_kl":  # largest, 31 halvings and the rest, ties, gap
            expected += [("gather", 5 * 4), *[("sum", 5 * 4)] * 32, ("gather", 5 * 4), ("sum", 2 * 5 * 4)]
        if kind != "frozen":
            expected += [("sum", 5 * 4)] * (name != "forward_kl") + [("sum", 5 * 8 * 4)]
        assert chunks == expected * 3


def test_chunks_are_those_of_the_largest_slice(ranks):
    results, sent = zip(*(found["by budget"] for found in ranks), strict=True)
    assert_close(whole(list(results)), oracle(BY_BUDGET.problem("by budget")))
    assert sent[0] == sent[1]
    assert [what for what, _ in sent[0]].count("gather") == 2 + 4, "to agree, and one in each chunk"


def test_a_head_that_is_a_dtensor(ranks):
    for found in (rank["sharded"] for rank in ranks):
        message = "TypeError: {}: expected this rank's slice as a plain tensor, got a DTensor; pass its to_local()"
        assert found["refused"] == message.format("student_weight")
        assert found["refused teacher"] == message.format("teacher.weight")
        assert found["same gradient"]


def test_groups(ranks):
    problem = CASES["jsd-beta=0.1"].problem("jsd-beta=0.1")
    for found in (rank["groups"] for rank in ranks):
        assert_close(found["alone"], oracle(problem))
        assert found["foreign group"] == "ValueError: group: expected a group that this process is in, it is not"


def test_without_processes():
    with pytest.raises(ValueError, match=r"group: expected torch.distributed to be initialised"):
        vocab_parallel_linear_kd(torch.randn(N, 3), torch.randn(5, 3), None, torch.zeros(N, dtype=torch.int64), kd_ratio=0.0)
