"""The divergences, each defined once.

A divergence between a teacher's distribution p and a student's q is a sum over the vocabulary, ``D = sum_v g(log p_v, log q_v)``.
With ``h = dg / dlog q`` and ``log q = log_softmax(z)``, its gradient is ``dD/dz = h - q * sum(h)``. So one *tile function* that
returns ``(g, h)`` is all that any path needs. It is written in Triton's language and also runs as plain torch: the row kernel
receives it as a constant, the torch implementation calls the same source on torch tensors.

``g`` may differ from the textbook integrand by a multiple of ``q - p``, whose sum over the vocabulary is 0. The KLs use
``p * log(p / q) - p + q``, which is >= 0 element by element but for its own rounding: errors of the normalisers then enter the value in
second order only, and a KL of nearly equal distributions keeps its digits longer. (In fp32 it is 1 % off at about 1e-6 nats.)

To add a divergence: write its tile function and its reference ``g`` here, add a `Definition`, and a row to the table in
``tests/divergence_cases.py`` (a test fails when the row is missing).
"""

import builtins
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch path needs no Triton
    triton = None
    tl = None

__all__ = ["DEFINITIONS", "Definition", "Parameter"]

# Masses are compared with adaptive_kl's mu up to this: without it, rounding would decide whether a token that fills mu exactly
# is in the head.
MASS_TOLERANCE = 1e-6


class _TorchLanguage:
    """The few functions of `triton.language` that tile functions use, on torch tensors."""

    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    abs = staticmethod(torch.abs)

    @staticmethod
    def maximum(x, y):
        return torch.clamp(x, min=y) if isinstance(y, float) else torch.maximum(x, y)

    @staticmethod
    def minimum(x, y):
        return torch.clamp(x, max=y) if isinstance(y, float) else torch.minimum(x, y)


# The globals of the tile functions' torch versions.
_TORCH_NAMES: dict[str, Any] = {"tl": _TorchLanguage, "__builtins__": builtins}


def _tile(fn=None, *, torch_version=None):
    """Compile a tile function for Triton, and keep the same code, or ``torch_version``, bound to torch under its name."""
    if fn is None:
        return lambda fn: _tile(fn, torch_version=torch_version)
    _TORCH_NAMES[fn.__name__] = torch_version or types.FunctionType(fn.__code__, _TORCH_NAMES, fn.__name__)
    return triton.jit(fn) if triton is not None else _TORCH_NAMES[fn.__name__]


# Operations for which torch has a better equivalent: on a CPU, a boolean mask and a `where` cost as much as two exponentials. The first
# two overwrite their argument there, which is always a temporary.


@_tile(torch_version=lambda x: x.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf))
def _zero_if_nan(x):
    return tl.where(x == x, x, 0.0)


@_tile(torch_version=lambda x: x.nan_to_num_(nan=0.0, posinf=1000.0, neginf=-1000.0))
def _finite(x):
    return tl.where(x == x, tl.minimum(tl.maximum(x, -1000.0), 1000.0), 0.0)


@_tile(torch_version=lambda x: torch.lt(x, 0.0, out=torch.empty_like(x)))
def _is_negative(x):
    return tl.where(x < 0.0, 1.0, 0.0)


@_tile(torch_version=torch.expm1)
def _expm1(x):
    series = x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0))
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + series))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)


# Tile functions. lp, lq: log-probabilities, -inf outside the vocabulary or where a probability is 0; a, b: the divergence's
# parameters; w: its row statistic. 0 * inf is 0 (`_zero_if_nan`), while a NaN in the logits, which makes all of its row NaN, still comes
# through: in every g there is a term that lets it pass. An augmented assignment is in place on a torch tensor, which keeps the
# temporaries few and in cache.


@_tile
def _forward_kl_terms(lp, lq, p, q):
    h = q - p
    g = lp - lq
    g *= p
    g = _zero_if_nan(g)
    g += h
    return g, h


@_tile
def _reverse_kl_terms(lp, lq, p, q):
    # q underflows to 0 long before it is 0: where the teacher has no mass, the divergence is infinite all the same. So q is kept above
    # 0, and d above -1000, where q * d is 0 anyway.
    d = tl.maximum(_zero_if_nan(lq - lp), -1000.0)
    h = tl.maximum(q, 1e-37) * d
    return h + (p - q), h


@_tile
def _forward_kl(lp, lq, a, b, w):
    return _forward_kl_terms(lp, lq, tl.exp(lp), tl.exp(lq))


@_tile
def _reverse_kl(lp, lq, a, b, w):
    return _reverse_kl_terms(lp, lq, tl.exp(lp), tl.exp(lq))


@_tile
def _symmetric_kl(lp, lq, a, b, w):
    p = tl.exp(lp)
    q = tl.exp(lq)
    gf, hf = _forward_kl_terms(lp, lq, p, q)
    gr, hr = _reverse_kl_terms(lp, lq, p, q)
    return a * gf + (1.0 - a) * gr, a * hf + (1.0 - a) * hr


@_tile
def _adaptive_kl(lp, lq, a, b, w):
    p = tl.exp(lp)
    q = tl.exp(lq)
    gf, hf = _forward_kl_terms(lp, lq, p, q)
    gr, hr = _reverse_kl_terms(lp, lq, p, q)
    return w * gf + _zero_if_nan((1.0 - w) * gr), w * hf + _zero_if_nan((1.0 - w) * hr)


@_tile
def _log_blend(x, c):
    """log s for s = c + (1 - c) * exp(x), x <= 0, as exact near s = 1 as near s = 0.

    Near 1, rounding s loses the digits of log s; s - 1 = (1 - c) * expm1(x) has them, and what s lost is added back to first order.
    """
    k = 1.0 - c
    s = tl.exp(x)
    s *= k
    s += c
    t = _expm1(x)
    t *= k
    t -= s - 1.0
    t *= s
    t += tl.log(s)
    return t


def _log_blend_in_torch(x, c, share):
    if min(share, 1.0 - share) < 0.05:  # s may be near 0, where s - 1 has lost its digits
        return _TORCH_NAMES["_log_blend"](x, c)
    t = torch.expm1(x)
    t *= c.neg_().add_(1.0)
    return t.log1p_()


@_tile(torch_version=_log_blend_in_torch)
def _log_blend_of_shares(x, c, share):
    return _log_blend(x, c)


@_tile
def _mixture(lp, lq, share):
    """log(p / m) and log(q / m) for m = share * p + (1 - share) * q, without ever forming m; finite, so that 0 times them is 0.

    The larger of p and q divides out: m / max(p, q) = c + (1 - c) * exp(x), with x = -|log p - log q| and c the share of the larger.
    """
    d = _finite(lp - lq)  # infinity is 1000 here: exp(-1000) is 0
    low_p = tl.minimum(d, 0.0)
    low_q = low_p - d
    c = _is_negative(d)
    c -= share
    t = _log_blend_of_shares(low_p + low_q, tl.abs(c), share)
    low_p -= t
    low_q -= t
    return low_p, low_q


@_tile
def _skew_forward_kl(lp, lq, a, b, w):
    p = tl.exp(lp)
    q = tl.exp(lq)
    log_pm, log_qm = _mixture(lp, lq, a)
    return p * log_pm + (1.0 - a) * (q - p), (1.0 - a) * (q - p * tl.exp(log_qm))


@_tile
def _skew_reverse_kl(lp, lq, a, b, w):
    p = tl.exp(lp)
    q = tl.exp(lq)
    _, log_qm = _mixture(lp, lq, 1.0 - a)
    r = q * log_qm
    return r + (1.0 - a) * (p - q), r - a * (q * _expm1(log_qm))


@_tile
def _jsd(lp, lq, a, b, w):
    g, h = _mixture(lp, lq, a)
    h *= tl.exp(lq)
    h *= 1.0 - a
    g *= tl.exp(lp)
    g *= a
    g += h
    return g, h


@_tile
def _tvd(lp, lq, a, b, w):
    q = tl.exp(lq)
    d = q - tl.exp(lp)
    return 0.5 * tl.abs(d), 0.5 * q * (_is_negative(-d) - _is_negative(d))


@_tile
def _alpha_beta(lp, lq, a, b, w):
    pa = tl.exp(a * lp)
    qa = tl.exp(a * lq)
    pb = tl.exp(b * lp)
    qb = tl.exp(b * lq)
    g = (a * pa * pb + b * qa * qb) / (a * b * (a + b)) - pa * qb / (a * b)
    # Where p and q are close, that is the small rest of large terms, the larger the smaller a and b are: there it is written by exp(x) - 1.
    limit = 1.0 / (a + b)
    d = _finite(lp - lq)
    near = _is_negative(tl.abs(d) - limit)
    d = tl.minimum(tl.maximum(d, -limit), limit)
    g += near * (pa * qb * (a * _expm1(b * d) + b * _expm1(-a * d)) / (a * b * (a + b)) - g)
    return g, qb * (qa - pa) / a


@_tile
def _squared_hellinger(lp, lq, a, b, w):
    root_q = tl.exp(0.5 * lq)
    d = root_q - tl.exp(0.5 * lp)
    return 0.5 * d * d, 0.5 * d * root_q


# References: the textbook integrands on torch tensors, differentiated by autograd. They share nothing with the tile functions.


def _x_log_ratio(x, lx, ly):
    """x * (log x - log y), 0 where x is 0, +inf where only y is 0, with finite derivatives wherever the value is finite."""
    zero = lx == -math.inf
    return torch.where(zero, 0.0, x * (lx.masked_fill(zero, 0.0) - ly.masked_fill(zero, 0.0)))


def _forward_kl_g(lp, lq, a, b, w):
    return _x_log_ratio(lp.exp(), lp, lq)


def _reverse_kl_g(lp, lq, a, b, w):
    return _x_log_ratio(lq.exp(), lq, lp)


def _symmetric_kl_g(lp, lq, a, b, w):
    return a * _forward_kl_g(lp, lq, a, b, w) + (1 - a) * _reverse_kl_g(lp, lq, a, b, w)


def _adaptive_kl_g(lp, lq, a, b, w):
    reverse = torch.where(w < 1, _reverse_kl_g(lp, lq, a, b, w), 0.0)
    return w * _forward_kl_g(lp, lq, a, b, w) + (1 - w) * reverse


def _skew_forward_kl_g(lp, lq, a, b, w):
    return _x_log_ratio(lp.exp(), lp, torch.logaddexp(lp + math.log(a), lq + math.log(1 - a)))


def _skew_reverse_kl_g(lp, lq, a, b, w):
    return _skew_forward_kl_g(lq, lp, a, b, w)


def _jsd_g(lp, lq, a, b, w):
    lm = torch.logaddexp(lp + math.log(a), lq + math.log(1 - a))
    return a * _x_log_ratio(lp.exp(), lp, lm) + (1 - a) * _x_log_ratio(lq.exp(), lq, lm)


def _tvd_g(lp, lq, a, b, w):
    return 0.5 * (lp.exp() - lq.exp()).abs()


def _alpha_beta_g(lp, lq, a, b, w):
    c = a + b
    return -((a * lp + b * lq).exp() - a / c * (c * lp).exp() - b / c * (c * lq).exp()) / (a * b)


def _squared_hellinger_g(lp, lq, a, b, w):
    return 0.5 * ((0.5 * lp).exp() - (0.5 * lq).exp()).square()


def _forward_share_by_sorting(lp, lq, mu, tail=False):
    """The forward share of adaptive_kl, by sorting: AKL (2404.02657), section 4. Shape [..., 1], detached.

    tail: the last element stands for many tokens. It is never in the head, which is made of single tokens.
    """
    p, q = lp.detach().exp(), lq.detach().exp()
    total = (p - q).abs().sum(-1, keepdim=True)
    if tail:
        p, q = p[..., :-1], q[..., :-1]
    p, order = p.sort(dim=-1, descending=True, stable=True)
    head = p.cumsum(-1) <= mu + MASS_TOLERANCE
    head[..., 0] = True
    gap = (p - q.gather(-1, order)).abs()
    share = (gap * head).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
    return share.masked_fill(total == 0, 0.5)


# Records.


@dataclass(frozen=True)
class Parameter:
    """A parameter of a divergence: its default and its domain, ``low <= value <= high``, an end left out where it is open."""

    name: str
    default: float
    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    @property
    def domain(self) -> str:
        left, right = "(" if self.low_open else "[", ")" if self.high_open or self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    def contains(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)


@dataclass(frozen=True)
class Definition:
    """A divergence.

    tile: ``(lp, lq, a, b, w) -> (g, h)``, see the module's docstring. `torch_tile` is the same code on torch tensors.
    reference: the textbook ``g`` on torch tensors, for the oracle.
    centered: ``sum_v h`` is 0, so that h is the gradient. The row kernel then needs one sweep less.
    statistic: ``(lp, lq, a, tail=False) -> [..., 1]``, a reduction over the row that the tile receives as ``w``, by sorting, for the
        oracle. The kernels compute it without a sort. Only the forward share of adaptive_kl exists. tail: the last element is a bucket.
    tail: ``(condition, holds)``: tokens may be merged into a tail bucket only where ``holds(*parameters)``. None: always.
    limits: ``(parameter, value, name)``: at this value the divergence is another one by definition (`papers`: jsd at 0 and 1).
    """

    name: str
    tile: Callable
    reference: Callable
    source: str
    parameters: tuple[Parameter, ...] = ()
    centered: bool = False
    statistic: Callable | None = None
    limits: tuple[tuple[str, float, str], ...] = ()
    tail: tuple[str, Callable[..., bool]] | None = None

    @property
    def torch_tile(self) -> Callable:
        return _TORCH_NAMES[f"_{self.name}"]

    def at(self, values: tuple[float, ...]) -> "Definition":
        """The definition that holds at these parameter values: this one, or its limit."""
        given = {(p.name, value) for p, value in zip(self.parameters, values, strict=True)}
        for parameter, value, name in self.limits:
            if (parameter, value) in given:
                return DEFINITIONS[name]
        return self


DEFINITIONS: dict[str, Definition] = {
    d.name: d
    for d in (
        Definition("forward_kl", _forward_kl, _forward_kl_g, "Hinton et al. 2015", centered=True),
        Definition("reverse_kl", _reverse_kl, _reverse_kl_g, "MiniLLM, 2306.08543"),
        Definition(
            "symmetric_kl",
            _symmetric_kl,
            _symmetric_kl_g,
            "ratio weighs the forward term",
            parameters=(Parameter("ratio", 0.5, 0.0, 1.0),),
            limits=(("ratio", 1.0, "forward_kl"), ("ratio", 0.0, "reverse_kl")),
        ),
        Definition(
            "skew_forward_kl",
            _skew_forward_kl,
            _skew_forward_kl_g,
            "DistiLLM, 2402.03898: KL(p || alpha p + (1 - alpha) q)",
            parameters=(Parameter("alpha", 0.1, 0.0, 1.0, high_open=True),),
            limits=(("alpha", 0.0, "forward_kl"),),
        ),
        Definition(
            "skew_reverse_kl",
            _skew_reverse_kl,
            _skew_reverse_kl_g,
            "DistiLLM, 2402.03898: KL(q || (1 - alpha) p + alpha q)",
            parameters=(Parameter("alpha", 0.1, 0.0, 1.0, high_open=True),),
            limits=(("alpha", 0.0, "reverse_kl"),),
        ),
        Definition(
            "jsd",
            _jsd,
            _jsd_g,
            "GKD, 2306.13649: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q",
            parameters=(Parameter("beta", 0.5, 0.0, 1.0),),
            limits=(("beta", 0.0, "forward_kl"), ("beta", 1.0, "reverse_kl")),
        ),
        Definition("tvd", _tvd, _tvd_g, "f-DISTILL, 2307.15190: half the L1 distance"),
        Definition(
            "alpha_beta",
            _alpha_beta,
            _alpha_beta_g,
            "ABKD, 2505.04560",
            parameters=(
                Parameter("alpha", 0.5, 0.0, math.inf, low_open=True),
                Parameter("beta", 0.5, 0.0, math.inf, low_open=True),
            ),
            # Only then is it an f-divergence, homogeneous of degree 1 in (p, q). Otherwise a merged bucket weighs more or less than its
            # tokens do together, and merging tokens in which p and q agree in proportion changes the value.
            tail=("alpha + beta = 1", lambda alpha, beta: math.isclose(alpha + beta, 1.0, rel_tol=1e-6)),
        ),
        Definition(
            "adaptive_kl",
            _adaptive_kl,
            _adaptive_kl_g,
            "AKL, 2404.02657: the head of the teacher's mass decides how forward and reverse KL mix",
            parameters=(Parameter("mu", 0.5, 0.0, 1.0),),
            statistic=_forward_share_by_sorting,
            limits=(("mu", 1.0, "forward_kl"),),
        ),
        Definition(
            "squared_hellinger",
            _squared_hellinger,
            _squared_hellinger_g,
            "Beran 1977: 1 - sum sqrt(p q), in [0, 1]; a quarter of alpha_beta at 0.5, 0.5",
        ),
    )
}
