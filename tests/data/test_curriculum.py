"""Which refs a curriculum takes, in which order, and from which files."""

import json
from types import SimpleNamespace

import pytest

from lens_jax.config import ConfigError, DataConfig, ModelConfig, RunConfig, load, validate
from lens_jax.data import curriculum
from lens_jax.data.sources.refcoco import RefCoco
from lens_jax.training.setup import _train_source


class Refs(RefCoco):
    def __init__(self, *ref_ids):
        self.refs = [SimpleNamespace(ref_id=ref_id) for ref_id in ref_ids]

    def __getitem__(self, index):
        return self.refs[index].ref_id


def test_easy_ones_come_first():
    sources = Refs(1, 2, 3, 4, 5), Refs(1, 2, 9)
    rewards = {1: 0.2, 2: 0.5, 3: 1.8, 4: 1.7, 5: 0.5}, {1: 0.9, 2: 0.21, 7: 1.0}
    chosen = curriculum.easy_first(sources, rewards)
    assert [chosen[i] for i in range(len(chosen))] == [4, 1, 2, 5, 2]
    with pytest.raises(ValueError, match="names no ref"):
        curriculum.easy_first(sources[:1], [{1: 2.0}])


def test_files(tmp_path):
    file = tmp_path / "rewards.json"
    file.write_text(json.dumps([{"ref_id": 3, "total_reward": 1.5}, {"ref_id": 4}]))
    with pytest.raises(ValueError, match=r"rewards\.json: .*total_reward"):
        curriculum.read_rewards(file, "refcoco")
    rows = [{"ref_id": 3, "total_reward": r, "iou": 1} for r in (1.0, 0.5)]
    for text in (json.dumps(rows), "\n".join(map(json.dumps, rows)) + "\n"):
        file.write_text(text)
        assert curriculum.read_rewards(file, "refcoco") == {3: 0.75}
    with pytest.raises(FileNotFoundError, match=r"none\.json is missing"):
        curriculum.read_rewards(tmp_path / "none.json", "refcoco")


def test_rows_of_a_suite(tmp_path):
    """A line ends where JSON's lines do; refs of another data set may have the same numbers."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {"dataset": "refcoco", "ref_id": 3, "total_reward": 1.5, "expression": "a\u2028b\u0085c"},
        {"dataset": "refcoco+", "ref_id": 3, "total_reward": 0.1},
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    assert curriculum.read_rewards(file, "refcoco") == {3: 1.5}
    assert curriculum.read_rewards(file, "refcoco+") == {3: 0.1}
    file.write_text("[3]")
    with pytest.raises(ValueError, match="are expected"):
        curriculum.read_rewards(file, "refcoco")


def test_a_run_trains_on_what_its_config_names(shapes_dir, tmp_path):
    plain = RefCoco(shapes_dir, "refcoco", "train")
    source = _train_source(DataConfig(), shapes_dir)
    assert source.num_expressions == plain.num_expressions
    rewards = [
        {"ref_id": ref.ref_id, "total_reward": 0.3 + 0.01 * i} for i, ref in enumerate(plain.refs)
    ]
    file = tmp_path / "rewards.json"
    file.write_text(json.dumps(rewards[:40]))
    ordered = _train_source(DataConfig(curriculum=str(file)), shapes_dir)
    assert ordered.num_expressions == plain.num_expressions[:40][::-1]
    assert ordered[0].ref_id == plain.refs[39].ref_id


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (DataConfig(mixture=("refcoco", "refcoco+"), mixture_weights=(1.0,)), "one for each"),
        (DataConfig(mixture_weights=(1.0,)), "0 data sets"),
        (DataConfig(mixture=("refcoco", "refcoco")), "twice"),
        (
            DataConfig(dataset="folder", mixture=("refcoco",)),
            r"--data.mixture '\[\]' trains on folder",
        ),
        (DataConfig(dataset="reason_seg", curriculum="a.json"), "reason_seg has no refs"),
        (DataConfig(mixture=("refcoco", "grounding_suite"), curriculum="a"), "grounding_suite"),
    ],
)
def test_what_does_not_go_together(data, says):
    with pytest.raises(ConfigError, match=says):
        validate(RunConfig(model=ModelConfig(checkpoint="x"), data=data))


def test_flags():
    flags = ["--data.mixture", "[refcoco, reason_seg]", "--data.mixture_weights", "[2, 1]"]
    data = load([*flags, "--data.reasoning", "true"]).data
    assert data.mixture == ("refcoco", "reason_seg") and data.mixture_weights == (2.0, 1.0)
    assert data.reasoning
    assert load(["--data.curriculum", "rewards.jsonl"]).data.curriculum == "rewards.jsonl"
