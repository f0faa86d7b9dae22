"""Curriculum: objects that are neither mastered nor hopeless, easy ones first (LENS, section 5)."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path

from lens_jax.data.sources import Joined, Selected
from lens_jax.data.sources.refcoco import RefCoco

# The reward of box and mask, between 0 and 2, that a ref to be learnt from earns: between these.
LOWEST, HIGHEST = 0.2, 1.8


def read_rewards(file: Path, dataset: str) -> dict[int, float]:
    """`total_reward` by `ref_id`; the mean where a ref comes several times.

    The file is a JSON list of objects, or holds one object a line, such as the rows that
    launch/evaluate.py writes. Those whose `dataset` is another one are passed over.

    Raises:
        FileNotFoundError, ValueError: it is not there, or is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it must hold ref_id and total_reward of refs")
    text = file.read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
        rewards = collections.defaultdict(list)
        for row in rows:
            if row.get("dataset", dataset) == dataset:
                rewards[int(row["ref_id"])].append(float(row["total_reward"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: objects with ref_id and total_reward are expected ({error!r})"
        ) from error
    return {ref_id: sum(values) / len(values) for ref_id, values in rewards.items()}


def easy_first(sources: Sequence[RefCoco], rewards: Sequence[dict[int, float]]) -> Selected:
    """All sources' refs with a reward between LOWEST and HIGHEST, the highest first.

    `rewards` belong to one source each, since data sets number their refs on their own. Refs
    without a reward are left out; equal ones keep their order.

    Raises:
        ValueError: none is left.
    """
    earned = [
        reward.get(ref.ref_id, 0.0)
        for source, reward in zip(sources, rewards, strict=True)
        for ref in source.refs
    ]
    kept = [i for i, reward in enumerate(earned) if LOWEST < reward < HIGHEST]
    if not kept:
        raise ValueError(f"the curriculum names no ref of the split between {LOWEST} and {HIGHEST}")
    return Selected(Joined(sources), sorted(kept, key=lambda i: -earned[i]))


def _lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]
