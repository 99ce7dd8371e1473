"""The definitions: formulas against the papers', tile functions against the formulas."""

import numpy as np
import pytest
import torch

from fastkd import DIVERGENCES, TeacherLogits, divergence, kd_loss
from fastkd.reference import divergence_per_token

from .divergence_cases import ALL, DEFAULTS, TABLE


def _logits(rows=5, width=11, std=3.0):
    return std * torch.randn(rows, width, dtype=torch.float64), std * torch.randn(rows, width, dtype=torch.float64)


def _values(name, parameters):
    given = tuple(float(parameters.get(p.name, p.default)) for p in DIVERGENCES[name].parameters)
    return DIVERGENCES[name].at(given), (*given, 0.0, 0.0)[:2]


def test_every_definition_has_a_row():
    assert set(TABLE) == set(DIVERGENCES), "tests/divergence_cases.py must have exactly one row per divergence"


def test_rows_name_every_parameter_and_try_its_default():
    for name, row in TABLE.items():
        parameters = {p.name: p.default for p in DIVERGENCES[name].parameters}
        assert row.parameters[0] == parameters, f"{name}: the first parameters of its row are the defaults"
        assert all(set(p) == set(parameters) for p in row.parameters)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_reference_is_the_papers_formula(name, parameters, temperature):
    zs, zt = _logits()
    got = divergence_per_token(zs, zt, name, parameters, temperature)
    q = torch.softmax(zs / temperature, -1).numpy()
    p = torch.softmax(zt / temperature, -1).numpy()
    expected = [TABLE[name].formula(a, b, **parameters) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_values_computed_by_hand(name):
    p = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64)
    assert float(divergence_per_token(q.log(), p.log(), name)) == pytest.approx(TABLE[name].by_hand, rel=1e-12)
    assert float(kd_loss(q.log(), TeacherLogits(p.log()), divergence=name)) == pytest.approx(TABLE[name].by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("mu", "forward"),
    [
        (0.0, 0.1 / 0.6),  # the top token is always in
        (0.49, 0.1 / 0.6),
        (0.5, 0.1 / 0.6),
        (0.8, 0.3 / 0.6),  # a token whose mass fills mu exactly is in
        (0.85, 0.3 / 0.6),
        (1.0, 1.0),
    ],
)
def test_adaptive_kl_weighs_by_the_gaps_of_head_and_tail(mu, forward):
    p = torch.tensor([[0.3, 0.5, 0.15, 0.05]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.4, 0.25, 0.25]], dtype=torch.float64)  # gaps 0.2, 0.1, 0.1, 0.2
    kl = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    expected = forward * kl[0] + (1 - forward) * kl[1]
    got = divergence_per_token(q.log(), p.log(), "adaptive_kl", {"mu": mu})
    torch.testing.assert_close(got[0], expected, rtol=1e-12, atol=0)
    fused = kd_loss(q.log(), TeacherLogits(p.log()), divergence=divergence("adaptive_kl", mu=mu))
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mu", [0.1, 0.5, 0.77])
def test_adaptive_kl_takes_ties_in_index_order(mu):
    zs, _ = _logits(4, 30)
    zt = torch.randint(3, (4, 30)).double()  # many equal teacher probabilities
    expected = divergence_per_token(zs, zt, "adaptive_kl", {"mu": mu}).mean()
    got = kd_loss(zs, TeacherLogits(zt), divergence=divergence("adaptive_kl", mu=mu))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_tile_function_is_the_formula_and_its_derivative(name, parameters):
    definition, (a, b) = _values(name, parameters)
    zs, zt = _logits()
    zs.requires_grad_()
    lq, lp = torch.log_softmax(zs, -1), torch.log_softmax(zt, -1)
    w = None if definition.statistic is None else definition.statistic(lp, lq, a)
    expected = definition.reference(lp, lq, a, b, w).sum(-1)
    expected.sum().backward()
    g, h = definition.torch_tile(lp, lq.detach(), a, b, w)
    total = h.sum(-1, keepdim=True)
    torch.testing.assert_close(g.sum(-1), expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(h - lq.detach().exp() * total, zs.grad, rtol=1e-9, atol=1e-12)
    if definition.centered:
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_gradcheck_of_the_reference(name, parameters):
    definition, (a, _) = _values(name, parameters)
    zs, zt = _logits(2, 6, 1.0)
    frozen = None
    if definition.statistic is not None:  # detached by definition: finite differences would move it
        frozen = definition.statistic(torch.log_softmax(zt, -1), torch.log_softmax(zs, -1), a)
    assert torch.autograd.gradcheck(lambda z: divergence_per_token(z, zt, name, parameters, 1.7, frozen), zs.requires_grad_())


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_zero_when_equal_and_never_negative(name, parameters):
    zs = 5 * torch.randn(16, 300)
    chosen = divergence(name, **parameters)
    assert abs(float(kd_loss(zs, TeacherLogits(zs.clone()), divergence=chosen))) < 1e-6
    for distance in (1e-3, 1e-1, 3.0):
        zt = zs + distance * torch.randn_like(zs)
        _, parts = kd_loss(zs, TeacherLogits(zt), divergence=chosen, return_parts=True)
        assert float(parts.kd_per_token.min()) >= 0
        # And the row function has not much to cut off.
        definition, (a, b) = _values(name, parameters)
        g, _ = definition.torch_tile(zt.log_softmax(-1), zs.log_softmax(-1), a, b, torch.tensor(0.5))
        assert float(g.sum(-1).min()) > -1e-6


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "symmetric_kl", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl"])
def test_small_kls_keep_their_digits_in_fp32(name):
    """Late in distillation a KL is small. Sums of p (log p - log q) in fp32 are then 1 % off, by the rounding of the normalisers."""
    zs = 5 * torch.randn(64, 2000)
    zt = zs + 1e-2 * torch.randn_like(zs)
    _, parts = kd_loss(zs, TeacherLogits(zt), divergence=name, return_parts=True)
    truth = divergence_per_token(zs.double(), zt.double(), name)
    assert float(truth.max()) < 1e-3
    assert float((parts.kd_per_token - truth).abs().max() / truth.mean()) < 4e-3
    assert float(parts.kd_per_token.min()) >= 0


def test_alpha_beta_tends_to_the_two_kls():
    zs, zt = _logits(3, 8, 1.0)
    for (alpha, beta), limit in (((1.0, 1e-5), "forward_kl"), ((1e-5, 1.0), "reverse_kl")):
        got = divergence_per_token(zs, zt, "alpha_beta", {"alpha": alpha, "beta": beta})
        torch.testing.assert_close(got, divergence_per_token(zs, zt, limit), rtol=1e-3, atol=1e-4)


def test_jsd_vanishes_inside_and_is_a_kl_at_its_ends():
    zs, zt = _logits()
    for end, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        inside = divergence_per_token(zs, zt, "jsd", {"beta": abs(end - 1e-6)})
        assert float(inside.max()) < 1e-4
        at_end = kd_loss(zs, TeacherLogits(zt), divergence=divergence("jsd", beta=end))
        torch.testing.assert_close(at_end, divergence_per_token(zs, zt, name).mean(), rtol=1e-12, atol=0)
        # A 0-d tensor at the end is the same limit.
        as_tensor = kd_loss(zs, TeacherLogits(zt), divergence=divergence("jsd", beta=torch.tensor(end)))
        assert torch.equal(as_tensor, at_end)


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_defaults_are_used_when_parameters_are_left_out(name, parameters):
    zs, zt = _logits()
    teacher = TeacherLogits(zt)
    assert torch.equal(kd_loss(zs, teacher, divergence=name), kd_loss(zs, teacher, divergence=divergence(name, **parameters)))
