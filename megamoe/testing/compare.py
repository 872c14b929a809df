"""Acceptance: what "equal" means for a layer and for a GEMM, stated once for every test and every benchmark.

Legend: T tokens, H hidden.
"""

from dataclasses import dataclass

import torch

# An engine and the oracle differ by accumulation order and by BF16 rounding of partials and result (2^-9 each, about 2e-3 per token).
MEDIAN_RELATIVE = 6e-3
# A value at a rounding boundary of the re-quantised intermediate may fall either way and moves its token by some percent. A lost slot shows
# as about 0.4, so this bound still sees it.
MAX_RELATIVE = 0.08
# Tokens with a norm of at most this part of the median norm (over the tokens that are not zero) are tiny: relative error means nothing
# there, so their error is measured against this part of the median norm instead of their own.
TINY_NORM = 1e-3
# A GEMM may round in another order than its plain-torch twin, which moves its error by a few percent and no more.
GEMM_FACTOR = 1.05


@dataclass(frozen=True)
class ErrorReport:
    """Relative L2 error per token: median over the tokens that are not tiny, maximum over all, token of the maximum (-1: no tokens)."""

    median: float
    max: float
    worst_token: int


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of a - b relative to that of b, in FP64; 0 if both are zero, infinite if only b is."""
    b = b.to(a.device).double()
    return _ratio((a.double() - b).norm(), b.norm()).item()


def error_report(y: torch.Tensor, oracle: torch.Tensor) -> ErrorReport:
    """Measure y [T, H] against oracle [T, H] over the tokens in which the oracle is finite."""
    token = torch.where(oracle.isfinite().all(1))[0]
    if not token.numel():
        return ErrorReport(0.0, 0.0, -1)
    y, oracle = y[token].double(), oracle[token].double()
    norms = oracle.norm(dim=1)
    tiny = TINY_NORM * norms[norms > 0].median().item() if norms.any() else 0.0
    errors = _ratio((y - oracle).norm(dim=1), norms.clamp(min=tiny))
    counted = errors[norms > tiny]
    worst = errors.argmax().item()
    return ErrorReport(counted.quantile(0.5).item() if counted.numel() else 0.0, errors[worst].item(), token[worst].item())


def assert_accepted(y: torch.Tensor, oracle: torch.Tensor, *, context: str = "") -> ErrorReport:
    """Assert that an engine's output is the layer's.

    Args:
        y: [T, H] any float dtype.
        oracle: [T, H] float64, from `moe_oracle`.
        context: says what was compared; printed on failure.

    Returns:
        The errors found.

    Raises:
        AssertionError: shapes differ; NaN is not exactly where the oracle has it; y has an Inf; or the relative L2 error per token exceeds
            6e-3 in the median or 0.08 anywhere.
    """
    assert y.shape == oracle.shape, f"shape {tuple(y.shape)}, expected {tuple(oracle.shape)} {context}"
    oracle = oracle.to(y.device)
    _assert_same_nans(y, oracle, context)
    report = error_report(y, oracle)
    if not (report.median <= MEDIAN_RELATIVE and report.max <= MAX_RELATIVE):
        raise AssertionError(f"{_describe(y, oracle, report)} {context}".rstrip())
    return report


def assert_gemm_accepted(out: torch.Tensor, exact: torch.Tensor, twin: torch.Tensor, *, context: str = "") -> float:
    """Assert that `out` is as close to `exact` (float64) as its plain-torch twin, within 5 percent.

    Serves any pair of which one defines how good the other must be, e.g. an engine and the reference engine against the unquantised layer.

    Returns:
        The relative error of `out`.
    """
    assert out.shape == exact.shape, f"shape {tuple(out.shape)}, expected {tuple(exact.shape)} {context}"
    error, allowed = relative_error(out, exact), GEMM_FACTOR * relative_error(twin, exact)
    assert error <= allowed, f"relative error {error:.3e}, at most {allowed:.3e} ({GEMM_FACTOR} x the twin's) {context}".rstrip()
    return error


def _ratio(error: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """error / norm with 0 / 0 = 0."""
    return torch.where(error == 0, 0.0, error / norm)


def _assert_same_nans(y: torch.Tensor, oracle: torch.Tensor, context: str) -> None:
    expected = oracle.isnan()
    wrong = torch.where(((y.isnan() != expected) | y.isinf()).any(1))[0].tolist()
    if wrong:
        found, due = [sorted(set(torch.where(mask.any(1))[0].tolist())) for mask in (~y.isfinite(), expected)]
        raise AssertionError(f"tokens {wrong[:8]}: NaN or Inf in tokens {found[:8]}, expected in {due[:8]} {context}".rstrip())


def _describe(y: torch.Tensor, oracle: torch.Tensor, report: ErrorReport) -> str:
    token = report.worst_token
    channel = (y[token].double() - oracle[token]).abs().argmax().item()
    return (
        f"relative error per token: median {report.median:.3e} (at most {MEDIAN_RELATIVE}), max {report.max:.3e} (at most {MAX_RELATIVE}); "
        f"worst token {token}, channel {channel}: got {y[token, channel].item():.6g}, expected {oracle[token, channel].item():.6g}"
    )
