"""Intervals against reference implementations, published worked examples, and simulated coverage."""

from __future__ import annotations

import math

import numpy
import pytest
from scipy import stats

from tasks.statistics import (
    Estimate,
    clopper_pearson,
    cluster_bootstrap,
    difference,
    mcnemar,
    newcombe_paired,
    over_seeds,
    paired_difference,
    rate,
    ratio,
    seed_interval,
    wilson,
)

COUNTS = [(0, 1), (0, 200), (1, 7), (13, 50), (199, 200), (200, 200)]


@pytest.mark.parametrize(("successes", "n"), COUNTS)
def test_wilson_and_clopper_pearson_equal_scipy(successes, n):
    """Both one-proportion intervals agree with scipy's, at 0 and at n too."""
    for method, found in (("wilson", wilson(successes, n)), ("exact", clopper_pearson(successes, n))):
        expected = stats.binomtest(successes, n).proportion_ci(method=method)
        assert found[1:] == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert found.low <= found.value <= found.high


def test_impossible_counts_are_refused():
    """A proportion of nothing, or of more than everything, is an error and not a number."""
    for bad in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="successes"):
            wilson(*bad)
        with pytest.raises(ValueError, match="successes"):
            clopper_pearson(*bad)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 9), (12, 12), (0, 8)])
def test_mcnemar_equals_the_exact_binomial_test(first, second):
    """The exact McNemar test is the sign test on the discordant prompts."""
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)


def test_difference_of_wilson_intervals_is_newcombe():
    """Newcombe 1998 (Stat. Med. 17:873), worked example 56/70 - 48/80, method 10: 0.0524 to 0.3339."""
    found = difference(wilson(56, 70), wilson(48, 80))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_paired_newcombe_without_discordance_or_association():
    """With no usable association the paired interval is the independent one; swapping sides mirrors it."""
    assert newcombe_paired(0, 40, 0, 0) == pytest.approx((1.0, difference(wilson(40, 40), wilson(0, 40)).low, 1.0))
    one, other = newcombe_paired(20, 12, 2, 16), newcombe_paired(20, 2, 12, 16)
    assert one == pytest.approx((-other.value, -other.high, -other.low))


def test_paired_newcombe_covers():
    """Over 4,000 simulated evaluations of paired prompts the 95 % interval holds the truth in 93 to 99 % of them.

    At a rate of exactly 1 it may only be too wide.
    """
    random = numpy.random.default_rng(3)
    for before, after, tie, most in ((0.98, 0.9, 0.6, 0.99), (0.5, 0.3, 0.5, 0.99), (1.0, 0.95, 0.0, 1.0)):
        covered = 0
        for _ in range(4000):
            shared = random.random(60) < tie
            draw = random.random((2, 60))
            draw[1] = numpy.where(shared, draw[0], draw[1])
            x, y = draw[0] < before, draw[1] < after
            cells = [int(c.sum()) for c in (x & y, x & ~y, ~x & y, ~x & ~y)]
            low, high = newcombe_paired(*cells)[1:]
            covered += low <= before - after <= high
        assert 0.93 <= covered / 4000 <= most


def test_ratio_covers_the_share_of_the_gap_that_is_left():
    """The MOVER-R interval of after / before holds the true ratio in 93 to 99 % of 4,000 simulations."""
    random = numpy.random.default_rng(5)
    for before, after in ((0.99, 0.5), (0.9, 0.05), (0.95, 0.95)):
        top, bottom = random.binomial(150, after, 4000), random.binomial(150, before, 4000)
        intervals = [ratio(wilson(int(a), 150), wilson(int(b), 150)) for a, b in zip(top, bottom, strict=True)]
        assert 0.93 <= numpy.mean([low <= after / before <= high for _, low, high in intervals]) <= 0.99


def test_ratio_refuses_a_denominator_near_zero():
    """A share of next to nothing has no bounded interval, and is refused."""
    for bad in (Estimate(0.01, 0.0, 0.05), Estimate(0.1, 0.02, 0.3), Estimate(-0.5, -0.6, -0.4)):
        with pytest.raises(ValueError, match="clearly positive"):
            ratio(Estimate(0.5, 0.4, 0.6), bad)


def test_cluster_bootstrap_equals_scipy_and_ignores_order():
    """With one value a cluster it is the ordinary bootstrap of the mean; shuffling the rows changes nothing."""
    values = numpy.random.default_rng(1).normal(size=80).tolist()
    clusters = [f"p{n}" for n in range(80)]
    found = cluster_bootstrap(values, clusters, seed=4, resamples=20_000)
    expected = stats.bootstrap((values,), numpy.mean, method="percentile", n_resamples=20_000, rng=2)
    assert found[1:] == pytest.approx(tuple(expected.confidence_interval), abs=0.01)
    assert cluster_bootstrap(values[::-1], clusters[::-1], seed=4, resamples=20_000) == found


def test_clusters_widen_the_interval():
    """Ten identical samples of each prompt say no more than one: the interval stays that of the prompts."""
    means = [True, False] * 20
    many = cluster_bootstrap([float(m) for m in means for _ in range(10)], [str(n // 10) for n in range(400)], seed=0)
    alone = wilson(20, 40)
    assert many.high - many.low == pytest.approx(alone.high - alone.low, rel=0.15)


def test_rates_at_zero_and_one_keep_a_width():
    """Where every prompt agrees the bootstrap would be a point; the interval is Wilson's over prompts instead."""
    assert rate({f"p{n}": [False] * 5 for n in range(30)}) == wilson(0, 30)
    assert rate({f"p{n}": [True] for n in range(30)}) == wilson(30, 30)
    nearly = rate({f"p{n}": [n == 0, False] for n in range(30)})
    assert nearly.high > wilson(0, 30).high
    steady = paired_difference({"a": [True] * 3, "b": [True] * 3}, {"a": [False] * 3, "b": [False] * 3})
    assert steady.value == 1
    assert steady.low < 1
    with pytest.raises(ValueError, match="no outcomes"):
        rate({})


def test_several_samples_use_the_bootstrap_over_prompts():
    """Where prompts do differ, a rate and a difference of rates are the cluster bootstrap's."""
    before = {f"p{n:02d}": [True, n % 3 > 0] for n in range(30)}
    after = {f"p{n:02d}": [n % 2 > 0, False] for n in range(30)}
    values = [float(v) for own in before.values() for v in own]
    assert rate(before, seed=3) == cluster_bootstrap(values, [p for p in before for _ in range(2)], seed=3)
    changes = [(sum(before[p]) - sum(after[p])) / 2 for p in before]
    assert paired_difference(before, after, seed=3) == cluster_bootstrap(changes, list(before), seed=3)


def test_paired_difference_uses_shared_prompts_only():
    """Prompts that one side lacks are left out, and no shared prompt at all is an error."""
    found = paired_difference({"a": [True], "b": [True], "x": [False]}, {"a": [False], "b": [True], "y": [True]})
    assert found == newcombe_paired(1, 1, 0, 0)
    with pytest.raises(ValueError, match="share no prompt"):
        paired_difference({"a": [True]}, {"b": [True]})


def test_seed_interval_equals_student_t():
    """The interval over seeds is scipy's t interval, and needs two seeds."""
    values = [0.91, 0.97, 0.85]
    expected = stats.t.interval(0.95, 2, loc=numpy.mean(values), scale=stats.sem(values))
    assert seed_interval(values)[1:] == pytest.approx(tuple(expected))
    with pytest.raises(ValueError, match="at least 2 seeds"):
        seed_interval([0.9])


def test_over_seeds_takes_the_wider_interval():
    """Seeds that disagree widen the interval; seeds that agree keep the width of each seed's own measurement."""
    apart = over_seeds([Estimate(0.9, 0.89, 0.91), Estimate(0.5, 0.49, 0.51)])
    assert apart[1:] == pytest.approx(seed_interval([0.9, 0.5])[1:])
    agreed = over_seeds([Estimate(0.9, 0.8, 0.95)] * 4)
    assert agreed == pytest.approx((0.9, 0.85, 0.925))
    assert over_seeds([Estimate(0.9, 0.8, 0.95)]) == pytest.approx((0.9, 0.8, 0.95))
    assert not math.isnan(agreed.low)
