"""One row per divergence: its formula on two probability vectors, and the parameters to try.

The formulas are written in probabilities, in numpy and from the papers, apart from everything in the library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
import pytest


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    some = p > 0
    with np.errstate(divide="ignore"):
        return float(np.sum(p[some] * np.log(p[some] / q[some])))


def _jsd(p, q, beta):
    if beta in (0.0, 1.0):  # by convention
        return _kl(p, q) if beta == 0.0 else _kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _alpha_beta(p, q, alpha, beta):
    c = alpha + beta
    return -np.sum(p**alpha * q**beta - alpha / c * p**c - beta / c * q**c) / (alpha * beta)


def _adaptive_kl(p, q, mu):
    mass, gap_head, gap_all = 0.0, 0.0, np.abs(p - q).sum()
    for i, v in enumerate(sorted(range(len(p)), key=lambda v: (-p[v], v))):
        mass += p[v]
        if i == 0 or mass <= mu + 1e-9:
            gap_head += abs(p[v] - q[v])
        else:
            break
    if gap_all == 0:
        return 0.0
    forward = gap_head / gap_all
    return (forward and forward * _kl(p, q)) + (1 - forward and (1 - forward) * _kl(q, p))


@dataclass(frozen=True)
class Row:
    """formula: ``(p, q, **parameters) -> float`` in nats. by_hand: its value for p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2) and the default
    parameters, from pencil and paper. parameters: what to try, the defaults first, the ends of the domain included.
    """

    formula: Callable[..., float]
    by_hand: float
    parameters: tuple[dict[str, float], ...] = ({},)


TABLE: dict[str, Row] = {
    "forward_kl": Row(_kl, 0.25 * log(2)),
    "reverse_kl": Row(lambda p, q: _kl(q, p), 0.25 * log(2)),
    "symmetric_kl": Row(
        lambda p, q, ratio: (ratio and ratio * _kl(p, q)) + (1 - ratio and (1 - ratio) * _kl(q, p)),
        0.25 * log(2),
        tuple({"ratio": r} for r in (0.5, 0.2, 0.0, 1.0)),
    ),
    "skew_forward_kl": Row(
        lambda p, q, alpha: _kl(p, alpha * p + (1 - alpha) * q),
        0.5 * log(20 / 11) + 0.25 * log(10 / 19),  # m = p/10 + 9q/10 = (11/40, 1/4, 19/40)
        tuple({"alpha": a} for a in (0.1, 0.0, 0.9)),
    ),
    "skew_reverse_kl": Row(
        lambda p, q, alpha: _kl(q, (1 - alpha) * p + alpha * q),
        0.5 * log(20 / 11) + 0.25 * log(10 / 19),
        tuple({"alpha": a} for a in (0.1, 0.0, 0.9)),
    ),
    # m = (3/8, 1/4, 3/8): half of 1/2 ln(4/3) + 1/4 ln(2/3), twice.
    "jsd": Row(_jsd, 0.5 * log(4 / 3) + 0.25 * log(2 / 3), tuple({"beta": b} for b in (0.5, 0.1, 0.0, 1.0))),
    "tvd": Row(lambda p, q: 0.5 * float(np.abs(p - q).sum()), 0.25),
    "alpha_beta": Row(
        _alpha_beta,
        4 * (sqrt(0.5) - 0.5) ** 2,  # 2 sum (sqrt p - sqrt q)^2
        ({"alpha": 0.5, "beta": 0.5}, {"alpha": 0.2, "beta": 0.7}, {"alpha": 1.0, "beta": 0.1}, {"alpha": 2.0, "beta": 1.5}),
    ),
    "adaptive_kl": Row(_adaptive_kl, 0.25 * log(2), tuple({"mu": m} for m in (0.5, 0.9, 0.0, 1.0))),
    "squared_hellinger": Row(lambda p, q: 1 - float(np.sqrt(p * q).sum()), (sqrt(0.5) - 0.5) ** 2),
}

DEFAULTS = [pytest.param(name, row.parameters[0], id=name) for name, row in TABLE.items()]
ALL = [
    pytest.param(name, parameters, id="-".join([name, *(f"{k}={v:g}" for k, v in parameters.items())]))
    for name, row in TABLE.items()
    for parameters in row.parameters
]
