"""Intervals for rates, their differences and their ratios.

Every number of the report carries an interval from here. The rates that matter lie at 0 and 1, where the normal
approximation and the percentile bootstrap both collapse to a point, so that nothing here may ever return a zero-width
interval for sampled data: one sample per prompt uses score intervals (Wilson, Newcombe), several samples per prompt use
the cluster bootstrap over prompts, and where hardly any prompt differs from the others, so that a bootstrap would be
nearly a point, the score interval with one observation per prompt is used. Differences and ratios of independent
estimates are built from the limits of their parts (MOVER), which keeps them asymmetric where they have to be.

Everything is a pure function of its arguments; random draws come from the given seed. Levels are two-sided, 95 %.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

LEVEL = 0.95
RESAMPLES = 2000
"""Bootstrap resamples: the Monte Carlo error of a 95 % limit is then a few per cent of the interval's width."""


SPARSE = 10
"""With fewer prompts than this that differ from the rest, a bootstrap over prompts is too narrow: not used."""


class Estimate(NamedTuple):
    """A value and its two-sided interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: int, level: float = LEVEL) -> Estimate:
    """Score interval of one proportion (Wilson 1927, JASA 22:209). Raises ValueError when n is not positive.

    `successes` may be fractional: a mean over prompts, each of which counts once.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson: expected 0 <= successes <= n and n > 0, found {successes} of {n}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Estimate(rate, low, high)


def clopper_pearson(successes: int, n: int, level: float = LEVEL) -> Estimate:
    """Exact interval of one proportion (Clopper and Pearson 1934, Biometrika 26:404): for "0 of n" statements."""
    from scipy.special import betaincinv

    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"clopper_pearson: expected 0 <= successes <= n and n > 0, found {successes} of {n}")
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return Estimate(successes / n, low, high)


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[str], seed: int, level: float = LEVEL, resamples: int = RESAMPLES
) -> Estimate:
    """Mean of `values` with a percentile interval from resampling whole clusters (Miller 2024, arXiv:2411.00640).

    Samples of one prompt are not independent; treating them so can make an interval three times too narrow. The result
    does not depend on the order of the values. The interval has no width when all cluster means are equal: the caller
    decides what that means (see `rate`).
    """
    import numpy

    if not values or len(values) != len(clusters):
        raise ValueError(f"cluster_bootstrap: {len(values)} values and {len(clusters)} clusters; need one cluster each")
    names = {name: index for index, name in enumerate(sorted(set(clusters)))}
    totals, counts = numpy.zeros(len(names)), numpy.zeros(len(names))
    for value, name in sorted(zip(values, clusters, strict=True), key=lambda pair: (pair[1], pair[0])):
        totals[names[name]] += value
        counts[names[name]] += 1
    drawn = numpy.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    means = totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(totals.sum() / counts.sum()), float(low), float(high))


Outcomes = Mapping[str, Sequence[bool]]
"""Outcomes of the samples of each prompt, by prompt id."""


def rate(outcomes: Outcomes, seed: int = 0) -> Estimate:
    """Share of true outcomes: Wilson with one sample per prompt, cluster bootstrap with several.

    When fewer than `SPARSE` prompts differ from the rest the bootstrap knows too little (0 of 500 would be a point, and
    1 of 500 look surer than 0 of 100), and Wilson with one observation per prompt is used.
    """
    if not outcomes:
        raise ValueError("rate: no outcomes; a condition that was not measured has no rate")
    means = {prompt: _mean(samples) for prompt, samples in outcomes.items()}
    if all(len(samples) == 1 for samples in outcomes.values()) or _sparse(means.values()):
        return wilson(math.fsum(means.values()), len(means))
    values = [float(outcome) for prompt in sorted(outcomes) for outcome in outcomes[prompt]]
    clusters = [prompt for prompt in sorted(outcomes) for _ in outcomes[prompt]]
    return cluster_bootstrap(values, clusters, seed)


def newcombe_paired(both: int, first: int, second: int, neither: int, level: float = LEVEL) -> Estimate:
    """Difference of two paired proportions, first minus second (Newcombe 1998, Stat. Med. 17:2635, method 10).

    The four counts are the prompts that showed the outcome on both sides, on one only, and on neither. Close to
    nominal coverage down to proportions of 0 and 1, where Wald, McNemar and bootstrap intervals fail.
    """
    n = both + first + second + neither
    one, two = wilson(both + first, n, level), wilson(both + second, n, level)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    association = both * neither - first * second
    if association > 0:
        association = max(association - n / 2, 0)
    phi = association / math.sqrt(margins) if margins else 0.0
    difference = one.value - two.value
    below = _combined(one.value - one.low, two.high - two.value, phi)
    above = _combined(one.high - one.value, two.value - two.low, phi)
    return Estimate(difference, max(-1.0, difference - below), min(1.0, difference + above))


def mcnemar(first: int, second: int) -> float:
    """Exact two-sided McNemar p value from the two discordant counts (McNemar 1947; exact binomial form)."""
    n, least = first + second, min(first, second)
    if n == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def paired_difference(first: Outcomes, second: Outcomes, seed: int = 0) -> Estimate:
    """Difference of two rates over the prompts that both sides share, first minus second.

    One sample per prompt on both sides: Newcombe's paired interval. Several: cluster bootstrap of the per-prompt
    differences, or, when fewer than `SPARSE` of these differ from the rest, the MOVER difference of Wilson intervals with
    one observation a prompt.
    Raises ValueError when the two sides share no prompt.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError("paired_difference: the two sides share no prompt id; evaluate both on the same prompts")
    if all(len(first[p]) == 1 and len(second[p]) == 1 for p in shared):
        return newcombe_paired(*discordance(first, second))
    differences = [_mean(first[p]) - _mean(second[p]) for p in shared]
    if _sparse(differences):
        sides = [wilson(math.fsum(_mean(side[p]) for p in shared), len(shared)) for side in (first, second)]
        return difference(sides[0], sides[1])
    return cluster_bootstrap(differences, shared, seed)


def discordance(first: Outcomes, second: Outcomes) -> tuple[int, int, int, int]:
    """Counts of shared prompts whose first sample is true on (both sides, first only, second only, neither)."""
    pairs = [(bool(first[p][0]), bool(second[p][0])) for p in sorted(first.keys() & second.keys())]
    return tuple(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False)))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Difference of two independent estimates from their limits (MOVER: Zou and Donner 2008, Stat. Med. 27:1693).

    With positively correlated parts, as on shared prompts, the interval is conservative (too wide, never too narrow).
    """
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, value - below, value + above)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate times a positive constant."""
    return Estimate(factor * estimate.value, factor * estimate.low, factor * estimate.high)


def ratio(numerator: Estimate, denominator: Estimate) -> Estimate:
    """Ratio of two independent estimates from their limits (MOVER-R: Donner and Zou 2012, Stat. Methods Med. Res. 21).

    The denominator must be clearly positive: its lower limit above 0 and its upper limit below twice its value, or
    ValueError is raised, because the ratio then has no bounded interval.
    """
    a, low_a, high_a = numerator
    b, low_b, high_b = denominator
    if not (low_b > 0 and high_b < 2 * b):
        raise ValueError(f"ratio: the denominator must be clearly positive, found {b:.3f} [{low_b:.3f}, {high_b:.3f}]")
    product = a * b
    below = max(0.0, product**2 - low_a * high_b * (2 * a - low_a) * (2 * b - high_b))
    above = max(0.0, product**2 - high_a * low_b * (2 * a - high_a) * (2 * b - low_b))
    low = (product - math.sqrt(below)) / (high_b * (2 * b - high_b))
    high = (product + math.sqrt(above)) / (low_b * (2 * b - low_b))
    return Estimate(a / b, low, high)


def over_seeds(estimates: Sequence[Estimate], level: float = LEVEL) -> Estimate:
    """Mean over training seeds, with the wider of two intervals on each side.

    Seeds are never pooled as samples. One interval is Student's t over the seed means (how much training varies), the
    other combines the intervals within the seeds (how well each was measured). The t interval alone has no width when
    all seeds agree exactly, the other knows nothing of training variance. With one seed only the second exists.
    """
    if not estimates:
        raise ValueError("over_seeds: no estimates")
    count = len(estimates)
    value = math.fsum(e.value for e in estimates) / count
    below = math.sqrt(math.fsum((e.value - e.low) ** 2 for e in estimates)) / count
    above = math.sqrt(math.fsum((e.high - e.value) ** 2 for e in estimates)) / count
    if count > 1:
        half = seed_interval([e.value for e in estimates], level).high - value
        below, above = max(below, half), max(above, half)
    return Estimate(value, value - below, value + above)


def seed_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Student's t interval over the means of at least two training seeds (Student 1908)."""
    from scipy.special import stdtrit

    count = len(values)
    if count < 2:
        raise ValueError(f"seed_interval: an interval over seeds needs at least 2 seeds, found {count}")
    value = math.fsum(values) / count
    variance = math.fsum((v - value) ** 2 for v in values) / (count - 1)
    half = float(stdtrit(count - 1, (1 + level) / 2)) * math.sqrt(variance / count)
    return Estimate(value, value - half, value + half)


def _sparse(means: Iterable[float]) -> bool:
    """True when fewer than `SPARSE` of the prompts' means differ from the commonest one."""
    counts = Counter(means)
    return counts.total() - max(counts.values()) < SPARSE


def _mean(samples: Sequence[bool]) -> float:
    return sum(bool(s) for s in samples) / len(samples)


def _combined(one: float, two: float, correlation: float) -> float:
    """Length of the sum of two deviations with the given correlation."""
    return math.sqrt(max(0.0, one * one - 2 * correlation * one * two + two * two))
