"""The steps of a stage, with updates that compute nothing, and runs that go on to more steps."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from lens_jax import config as configs
from lens_jax.config import AlignmentConfig, CheckpointConfig, ConfigError, DataConfig, RunConfig
from lens_jax.data.buckets import Buckets
from lens_jax.data.processor import Processor
from lens_jax.data.sample import Sample, SampleError
from lens_jax.distribution import sharding
from lens_jax.models.geometry import ImageGeometry
from lens_jax.training import metrics, run_directory, stages
from lens_jax.training.state import TrainState
from lens_jax.training.stopping import Stopping
from tests.training.stages import TOKENIZER

BATCH = 8


class Photos:
    """Pictures of which every `good`-th can be read."""

    def __init__(self, count, good):
        self.num_expressions, self.good = [1] * count, good

    def __len__(self):
        return len(self.num_expressions)

    def __getitem__(self, index):
        if index % self.good:
            raise SampleError(f"{index}.jpg: no such picture")
        image = np.zeros((56, 56, 3), np.uint8)
        return Sample(image, ("it",), image[..., 0] > 0, np.arange(4.0), index, index, "a.jpg")


def train(processor, directory, source, steps, **data):
    """Steps of stage 1; returns its rows."""
    settings = AlignmentConfig(steps=steps, batch_size=BATCH)
    config = RunConfig(
        alignment=settings, checkpoint=CheckpointConfig(every=100), data=DataConfig(**data)
    )
    job = SimpleNamespace(
        config=config,
        directory=directory,
        mesh=sharding.make_mesh(config.mesh, jax.devices()[:1]),
        train_source=source,
        processor=processor,
        buckets=Buckets((64,), (4,), ((56, 56),), (40,)),
        compilations=SimpleNamespace(count=0),
        stopping=Stopping(),
    )
    state = TrainState(jnp.int32(0), {"w": jnp.zeros(1)}, {"w": jnp.zeros(1)}, jnp.int32(0))

    def step(state, batch):
        return state, {"loss": 1.0, "skipped_updates": 0}

    stages.train(job, "alignment", settings, state, step, lambda _: 0.0, first_sample=0)
    return metrics.read(directory)


@pytest.fixture(scope="module")
def processor():
    geometry = ImageGeometry(window_size=56)
    return Processor(AutoTokenizer.from_pretrained(TOKENIZER), sam_size=64, geometry=geometry)


@pytest.fixture
def run(processor, tmp_path):
    return lambda *args, **data: train(processor, tmp_path, *args, **data)


def test_bad_samples_end_a_run_in_one_line(run, tmp_path):
    with pytest.raises(ConfigError) as error:
        run(Photos(40, good=2), 50, max_bad=0.05)
    said, taken = str(error.value), metrics.read(tmp_path)
    assert 1 <= len(taken) < 10
    bad, seen = taken[-1]["bad_samples"], BATCH * len(taken)
    assert said.startswith(f"{bad} of {seen} samples of alignment could not be used")
    assert "data.max_bad 0.05" in said and "raise --data.max_bad" in said and "\n" not in said


def test_none_is_allowed(run, tmp_path):
    with pytest.raises(ConfigError, match=r"of 8 samples .* data\.max_bad 0\.0 "):
        run(Photos(40, good=2), 50, max_bad=0.0)
    assert len(metrics.read(tmp_path)) == 1


@pytest.mark.parametrize("max_bad", [0.5, 1.0])
def test_what_is_allowed_goes_on(run, max_bad):
    rows = run(Photos(40, good=2), 20, max_bad=max_bad)
    assert len(rows) == 20 and 60 <= rows[-1]["bad_samples"] <= 100


def test_four_of_five_may_be_bad(run):
    """If so many are allowed: 16 in a row happen, and are no end of the data."""
    assert len(run(Photos(200, good=5), 60, max_bad=1.0)) == 60


def test_a_stage_begun_again_says_so(run, tmp_path, capsys):
    """What it had logged lay in no checkpoint."""
    run(Photos(40, good=1), 1)
    for file in (tmp_path / "checkpoints" / "alignment").glob("*/manifest.json"):
        file.unlink()
    run(Photos(40, good=1), 1)
    out = capsys.readouterr().out
    assert "begins alignment again at step 1 of 1; no checkpoint holds the 1 steps" in out
    with pytest.raises(ConfigError, match=r"give as many steps or more"):
        run(Photos(40, good=1), 0)


LONGER = {"alignment.steps": 5, "grpo.steps": 6}


@pytest.mark.parametrize(
    "taken, asked, says",
    [
        ({"alignment": 5, "grpo": 6}, {"grpo.steps": 9}, None),
        ({"alignment": 5, "grpo": 4}, {"grpo.steps": 4}, None),
        ({"alignment": 5, "grpo": 6}, {"grpo.steps": 3}, r"has taken 6 steps of grpo"),
        ({"alignment": 5, "grpo": 1}, {"alignment.steps": 9}, r"stage 2 has begun .* start from"),
        ({"alignment": 3}, {"alignment.steps": 9}, r"alignment\.schedule is cosine"),
        ({"alignment": 3}, {"grpo.steps": 9}, None),
        (
            {"alignment": 5, "grpo": 6},
            {"grpo.steps": 9, "grpo.schedule": "linear"},
            r"grpo\.schedule is linear, which ends at step 6\. To train longer, end it with "
            r"--grpo\.steps 6, then start from .*/final: --model\.checkpoint .*/final --run_dir "
            r"ANOTHER --alignment\.steps 0 --grpo\.steps 3$",
        ),
        (
            {"alignment": 5, "grpo": 6},
            {"grpo.steps": 9, "rollout.final_temperature": 0.5},
            r"rollout\.final_temperature is reached at step 6",
        ),
        ({"alignment": 1}, {"grpo.steps": 9, "seed": 1}, r"another configuration \(seed, grpo"),
        ({}, {"grpo.steps": 9, "seed": 1, "grpo.beta": 0.5}, None),
    ],
)
def test_other_steps(taken, asked, says, tmp_path):
    """A run goes on to them where nothing that it did depends on how many there are."""
    fixed = {k: v for k, v in asked.items() if k in ("grpo.schedule", "rollout.final_temperature")}
    flags = {"grpo.schedule": "constant", "model.checkpoint": "start"} | LONGER | fixed

    def config(**more):
        made = RunConfig(run_dir=str(tmp_path))
        for key, value in (flags | more).items():
            section, _, name = key.rpartition(".")
            part = dataclasses.replace(getattr(made, section), **{name: value}) if section else None
            made = dataclasses.replace(made, **({section: part} if section else {key: value}))
        return made

    (tmp_path / "config.yaml").write_text(configs.dump_yaml(config()))
    rows = [metrics.row(stage, n, {}) for stage, n in taken.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if says:
        with pytest.raises(ConfigError, match=says) as error:
            run_directory.inspect(tmp_path, config(**asked))
        assert "\n" not in str(error.value)
    else:
        found = run_directory.inspect(tmp_path, config(**asked))
        assert not found["finished"] and found["begun"] == bool(taken)
        assert set(found["changed"]) == asked.keys() - fixed.keys()
    if "seed" in asked and says:
        (tmp_path / "report.html").touch()
        with pytest.raises(ConfigError, match=r"start from .* --seed 1 --grpo\.steps 3 --al"):
            run_directory.inspect(tmp_path, config(**asked))
