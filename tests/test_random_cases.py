"""200 random calls of the losses against the oracle; ``python -m tests.random_cases`` runs thousands."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fastkd import DIVERGENCES

from . import random_cases
from .problems import Result
from .random_cases import draw, run

CASES, BLOCK = 200, 25
# The interpreter computes in numpy, which warns of infinities that the kernel then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_against_the_oracle(first):
    report = run(BLOCK, seed=0, first=first)
    assert not report["failures"], "\n".join(f"index {f['index']}: {f['error']}\n  {f['case']}" for f in report["failures"])
    assert report["kinds"]["compared"] > BLOCK / 2


def test_these_cases_are_of_every_kind():
    cases = [draw(0, index) for index in range(CASES)]
    kinds = Counter(kind for c in cases for kind in (c.problem.name, c.problem.hidden.dtype, type(c.problem.teacher).__name__))
    assert kinds.keys() >= {*DIVERGENCES, torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert kinds.keys() >= {"TeacherHidden", "TeacherLogits", "TeacherTopK", "TeacherInterpolated", "NoneType"}
    assert min(kinds.values()) >= 3, kinds
    facts = {
        "kd_loss": lambda c: c.from_logits,
        "triton": lambda c: c.problem.options["impl"] == "triton",
        "16-bit logits": lambda c: c.problem.options["logits_dtype"] is not None,
        "a frozen tensor": lambda c: c.frozen,
        "0-d tensors": lambda c: c.as_tensors,
        "a masked token": lambda c: not c.counted.all(),
        "no token": lambda c: not c.counted.any(),
        "CE alone": lambda c: c.problem.options["kd_ratio"] == 0,
        "a softcap": lambda c: c.problem.options["student_softcap"],
    }
    assert all(any(fact(c) for c in cases) for fact in facts.values()), [k for k, fact in facts.items() if not any(map(fact, cases))]


def test_a_case_is_drawn_from_its_seed_and_index_alone():
    first = draw(3, 17)
    draw(3, 18)
    again = draw(3, 17)
    assert again.text == first.text
    assert torch.equal(again.problem.hidden, first.problem.hidden)
    assert draw(4, 17).text != first.text


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_an_error_of_a_few_percent_is_found(monkeypatch, what):
    right = random_cases.call

    def wrong(case):
        result, parts = right(case)
        if what == "loss":
            return replace(result, loss=result.loss * 1.03), parts
        return Result(result.loss, {k: 1.03 * g for k, g in result.gradients.items()}), parts

    monkeypatch.setattr(random_cases, "call", wrong)
    report = run(40, seed=0)
    found = len(report["failures"])
    assert found >= 0.7 * (found + report["kinds"]["compared"])
