"""The acceptance itself: it must refuse what is wrong by little and pass what is right by little."""

import math
import re

import pytest
import torch

from megamoe.testing.compare import assert_accepted, assert_gemm_accepted, error_report, relative_error


def oracle_rows(num_tokens: int = 8, hidden: int = 16) -> torch.Tensor:
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scaled(oracle: torch.Tensor, relative: list[float]) -> torch.Tensor:
    """`oracle` with the given relative L2 error in each token."""
    return oracle * (1 + torch.tensor(relative, dtype=torch.float64)[:, None])


def test_report_holds_the_errors():
    report = error_report(scaled(oracle_rows(4), [0.001, 0.002, 0.03, 0.004]), oracle_rows(4))
    assert report.median == pytest.approx(0.003)
    assert report.max == pytest.approx(0.03)
    assert report.worst_token == 2


@pytest.mark.parametrize(("relative", "accepted"), [([0.0059] * 8, True), ([0.0061] * 8, False),
                                                    ([0.079] + [0.0] * 7, True), ([0.081] + [0.0] * 7, False)])
def test_limits_on_median_and_maximum(relative, accepted):
    y, oracle = scaled(oracle_rows(), relative), oracle_rows()
    if accepted:
        assert_accepted(y, oracle)
    else:
        with pytest.raises(AssertionError, match="relative error per token"):
            assert_accepted(y, oracle)


def test_bf16_rounding_is_accepted():
    report = assert_accepted(oracle_rows(64, 128).bfloat16(), oracle_rows(64, 128))
    assert 1e-3 < report.median < 2.5e-3


def test_message_names_the_worst_value_and_the_context():
    y = oracle_rows()
    y[5, 3] += 7.0
    message = f"worst token 5, channel 3: got {y[5, 3]:.6g}, expected {oracle_rows()[5, 3]:.6g} seed 17"
    with pytest.raises(AssertionError, match=re.escape(message)):
        assert_accepted(y, oracle_rows(), context="seed 17")


def test_tiny_tokens_are_held_to_an_absolute_bound():
    oracle = torch.ones(9, 4, dtype=torch.float64)
    oracle[0] = 1e-5
    y = oracle.clone()
    y[0] = 8e-5  # off by a factor of 8, but by less than 0.08 of a thousandth of the median norm
    assert assert_accepted(y, oracle).max == pytest.approx(0.07)
    y[0] = 1e-4
    with pytest.raises(AssertionError, match="worst token 0"):
        assert_accepted(y, oracle)


def test_tokens_that_are_zero_must_be_zero():
    oracle = torch.zeros(3, 4, dtype=torch.float64)
    assert assert_accepted(torch.zeros(3, 4), oracle).max == 0.0
    y = torch.zeros(3, 4)
    y[1, 2] = 1e-30
    with pytest.raises(AssertionError, match="worst token 1, channel 2"):
        assert_accepted(y, oracle)


@pytest.mark.parametrize("num_zero", [1, 7])
def test_zero_tokens_do_not_move_the_median(num_zero):
    oracle = oracle_rows()
    oracle[:num_zero] = 0.0
    assert assert_accepted(scaled(oracle, [0.005] * 8), oracle).median == pytest.approx(0.005)


def test_no_tokens_are_accepted():
    assert assert_accepted(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.float64)).worst_token == -1


def test_nan_must_be_where_the_oracle_has_it():
    oracle = oracle_rows()
    oracle[2] = math.nan
    y = oracle.clone()
    assert assert_accepted(y, oracle).max == 0.0
    for wrong, tokens, found in (((3, 0, math.nan), [3], [2, 3]), ((3, 0, math.inf), [3], [2, 3]), ((2, 0, 1.0), [2], [2])):
        y = oracle.clone()
        y[wrong[0], wrong[1]] = wrong[2]
        message = f"tokens {tokens}: NaN or Inf in tokens {found}, expected in [2] seed 3"
        with pytest.raises(AssertionError, match=re.escape(message)):
            assert_accepted(y, oracle, context="seed 3")


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match=re.escape("shape (8, 16), expected (7, 16)")):
        assert_accepted(oracle_rows(), oracle_rows(7))


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf


def test_gemm_may_be_five_percent_worse_than_its_twin():
    exact = torch.ones(4, 4, dtype=torch.float64)
    assert assert_gemm_accepted(1.0104 * exact, exact, 1.01 * exact) == pytest.approx(0.0104)
    with pytest.raises(AssertionError, match=re.escape("relative error 1.060e-02, at most 1.050e-02 (1.05 x the twin's) seed 5")):
        assert_gemm_accepted(1.0106 * exact, exact, 1.01 * exact, context="seed 5")
    with pytest.raises(AssertionError):
        assert_gemm_accepted(torch.nan * exact, exact, 1.01 * exact)
