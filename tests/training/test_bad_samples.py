"""When bad samples end a run: never at half the allowed rate, soon at four times of it."""

import numpy as np
import pytest
from scipy import stats

from lens_jax.config import DataConfig
from lens_jax.training.bad_samples import ERROR, too_many

DEFAULT = DataConfig().max_bad
LONG = 1_000_000
BATCHES = (8, 64, 512, 1024)


def fewest(seen: int, allowed: float) -> int:
    """Bad samples that end a run which has seen so many; one more than there are if none do."""
    low, high = 0, seen + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if too_many(middle, seen, allowed) else (middle + 1, high)
    return low


def last_samples(allowed: float, most: int) -> np.ndarray:
    """Up to which sample the first, second, ... bad one ends a run; 0 where it never does."""
    ends, last, step = [], 0, 1
    for bad in range(1, most + 1):
        low, jump = max(last, bad - 1), step  # the more bad samples, the later they still suffice
        while too_many(bad, low + jump, allowed):
            low, jump = low + jump, 2 * jump
        high = low + jump
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if too_many(bad, middle, allowed) else (low, middle)
        step, last = max(1, low - last), low
        ends.append(low if low >= bad else 0)
    return np.array(ends)


def ended(rng, rate: float, allowed: float, runs: int, most: int) -> np.ndarray:
    """Which runs at a true rate end within LONG samples, were each sample judged when it comes.

    Only a bad sample can end one, so a run is drawn as the distances between those. Judged once a
    batch, a run ends no more often.
    """
    ends = last_samples(allowed, most)
    stopped = np.zeros(runs, bool)
    for part in np.array_split(np.arange(runs), max(1, runs * most // 2**22)):
        arrivals = np.cumsum(rng.geometric(rate, (len(part), most)), axis=1)
        stopped[part] = (arrivals <= ends).any(1)
    return stopped


def test_half_the_default_rate_goes_on():
    """For a million samples, in more than 999 of 1,000 runs."""
    rate, runs = DEFAULT / 2, 10_000
    most = int(stats.binom.isf(1e-9, LONG, rate))  # more bad ones do not come
    stopped = ended(np.random.default_rng(0), rate, DEFAULT, runs, most).sum()
    # So few are stopped in less than 1 of 1,000 such tests, if 1 in 1,000 runs is.
    assert stopped < stats.binom.isf(0.999, runs, 0.001)


@pytest.mark.parametrize("allowed", [0.001, 0.005, DEFAULT, 0.05, 0.1, 0.25, 0.5, 0.9])
def test_half_the_allowed_rate_goes_on(allowed):
    """Calculated: the sum over bad samples of the probability that it comes early enough to end a
    run. From some number on each is so improbable that no later one matters."""
    rate, most = allowed / 2, 120
    ends = last_samples(allowed, most)
    bad = np.arange(1, most + 1)[ends > 0]
    early = stats.binom.sf(bad - 1, ends[ends > 0], rate)
    assert early[-1] == early.min()
    assert early.sum() + LONG * allowed * early[-1] < 0.0001


@pytest.mark.parametrize("allowed", [DEFAULT, 0.02, 0.05, 0.1, 0.25, 0.4, 0.9])
@pytest.mark.parametrize("batch", BATCHES)
def test_four_times_the_allowed_rate_ends_within_2000(allowed, batch):
    """Even if it is judged but once, as a batch of 1,024 is."""
    rate, last = min(1, 4 * allowed), batch * (2000 // batch)
    seen = np.arange(batch, last + 1, batch)
    bad = np.random.default_rng(0).binomial(batch, rate, (2000, len(seen))).cumsum(1)
    assert (bad >= [fewest(n, allowed) for n in seen]).any(1).mean() > 0.998
    assert stats.binom.cdf(fewest(last, allowed) - 1, last, rate) < 0.001


@pytest.mark.parametrize("allowed", [0.001, 0.0001])
def test_smaller_rates_take_longer(allowed):
    """What 20 / DEFAULT samples show of the default, 20 / allowed show of any other."""
    last = round(20 / allowed)
    assert stats.binom.cdf(fewest(last, allowed) - 1, last, 4 * allowed) < 0.001


def test_the_allowed_rate_itself_mostly_goes_on():
    stopped = ended(np.random.default_rng(0), DEFAULT, DEFAULT, 2000, 2000)
    assert stopped.mean() < ERROR


def test_one_and_a_half_times_the_allowed_rate_ends_at_last():
    bad = np.random.default_rng(0).binomial(64, 1.5 * DEFAULT, (500, 500)).cumsum(1)
    seen = np.arange(64, 64 * 500 + 1, 64)
    assert (bad >= [fewest(n, DEFAULT) for n in seen]).any(1).all()


def test_few_samples_prove_little():
    assert not too_many(1, 8, DEFAULT) and not too_many(2, 8, DEFAULT)
    assert too_many(6, 8, DEFAULT) and too_many(64, 64, 0.5)
    assert not too_many(0, 10**6, DEFAULT) and not too_many(0, 0, DEFAULT)
    # A true rate of 0.5 % ended a third of the runs.
    assert not too_many(2, 16, DEFAULT) and not too_many(3, 200, DEFAULT)


def test_none_and_all():
    assert too_many(1, 10**6, 0.0) and not too_many(0, 8, 0.0)
    assert not too_many(10**6, 10**6, 1.0)
    assert all(not too_many(bad, 8, 0.99) for bad in range(9))
