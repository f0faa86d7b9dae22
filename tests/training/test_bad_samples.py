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
    ends, seen = [], 0
    for bad in range(1, most + 1):
        low, high = seen, LONG + 1  # the more bad samples, the later they still are too many
        while high - low > 1:
            middle = (low + high) // 2
            early = middle >= bad and too_many(bad, middle, allowed)
            low, high = (middle, high) if early or middle < bad else (low, middle)
        seen = low if low >= bad else 0
        ends.append(seen)
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


@pytest.mark.parametrize("allowed", [0.001, DEFAULT, 0.02])
def test_half_the_allowed_rate_goes_on(allowed):
    """For a million samples, in more than 999 of 1,000 runs."""
    rate = allowed / 2
    most = int(stats.binom.isf(1e-9, LONG, rate))  # more bad ones do not come
    runs = 10_000
    stopped = ended(np.random.default_rng(0), rate, allowed, runs, most).sum()
    # What would be seen at one end in 1,000 runs, with a probability of 1 in 1,000 or more.
    assert stopped < stats.binom.isf(0.999, runs, 0.001)


@pytest.mark.parametrize("allowed", [0.001, 0.005, DEFAULT, 0.05, 0.1, 0.25, 0.5, 0.9])
def test_half_the_allowed_rate_goes_on_by_calculation(allowed):
    """The sum over all bad samples of the probability that this one comes early enough to end a
    run; after 20,000 samples there is none left to speak of."""
    most = int(stats.binom.isf(1e-12, 20_000, allowed / 2))
    ends = last_samples(allowed, most)
    bad = np.arange(1, most + 1)[ends > 0]
    assert stats.binom.sf(bad - 1, ends[ends > 0], allowed / 2).sum() < 0.001
    # Chernoff: what is left falls geometrically with the bad samples.
    assert stats.binom.sf(most, ends[-1], allowed / 2) < 1e-12


@pytest.mark.parametrize("allowed", [DEFAULT, 0.02, 0.05, 0.1, 0.25, 0.4, 0.9])
@pytest.mark.parametrize("batch", BATCHES)
def test_four_times_the_allowed_rate_ends_within_2000(allowed, batch):
    rng, rate = np.random.default_rng(0), min(1, 4 * allowed)
    seen = np.arange(batch, 2000 + 1, batch)
    bad = rng.binomial(batch, rate, (4000, len(seen))).cumsum(1)
    stopped = (bad >= [fewest(n, allowed) for n in seen]).any(1)
    # A batch of 1,024 is judged once in 2,000 samples.
    assert stopped.mean() > (0.999 if batch < 1024 else 0.995)


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
