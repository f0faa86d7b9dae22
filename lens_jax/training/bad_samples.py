"""Decides when too many samples could not be read.

A share of few samples says little: one bad sample in a first batch of 8 is 12 %. So a run goes on
until chance can no longer explain what it has met.
"""

import numpy as np

# Rates that are held against the allowed one, as factors of its odds.
FACTORS = (1.1, 1.5, 2.5, 5.0)
# How often a run whose rate is the allowed one, or lower, may be stopped, however long it is.
ERROR = 0.01


def too_many(bad: int, seen: int, allowed: float) -> bool:
    """Whether `bad` of `seen` samples show a rate above `allowed` (0..1; 0: none is allowed).

    A sequential test, which may be asked after any samples and depends on the two counts alone.
    The likelihood ratio of a higher rate to `allowed` is a supermartingale while the true rate is
    at most `allowed`, and so is the mean over `FACTORS`: by Ville's inequality it ever reaches
    1 / ERROR with a probability of at most ERROR. At half the allowed rate that is below 0.0001.
    """
    if allowed in (0, 1):
        return allowed == 0 and bad > 0
    odds = allowed / (1 - allowed) * np.array(FACTORS)
    rates = odds / (1 + odds)
    ratios = bad * np.log(rates / allowed) + (seen - bad) * np.log((1 - rates) / (1 - allowed))
    return bool(np.logaddexp.reduce(ratios) - np.log(len(FACTORS)) >= -np.log(ERROR))
