"""Defaults < file < flags; mistakes are one line and exit code 2."""

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml

from lens_jax import config as configs
from lens_jax.config import ConfigError, sections
from lens_jax.config.keys import flatten
from lens_jax.data import images
from lens_jax.models.parameters import PARTS
from lens_jax.training.advantages import RULES
from lens_jax.training.losses import KL_ESTIMATES, SURROGATES

START = "model: {checkpoint: start}\ndata: {data_dir: data}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(START + "grpo: {steps: 5, learning_rate: 1e-4}\n")
    return path


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        configs.load([str(a) for a in argv])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_keys_and_defaults_are_frozen():
    """Files of users hold these keys, and count on these defaults."""
    file = Path(__file__).parent / "config_defaults.yaml"
    frozen = flatten(yaml.safe_load(file.read_text()))
    known = configs.leaves(configs.RunConfig())
    changed = {key for key in frozen.keys() | known.keys() if frozen.get(key) != known.get(key)}
    changed |= frozen.keys() ^ known.keys()
    assert not changed, (
        f"if these are to change, change them in {file.name}, too: {sorted(changed)}"
    )


def test_default_file_is_tiny():
    config = configs.load([])
    assert config.run_dir == "runs/tiny"
    assert config.grpo.steps > 0 and config.alignment.steps > 0
    assert config.precision == "float32"


@pytest.mark.parametrize("name", sorted(p.name for p in configs.DEFAULT_CONFIG.parent.iterdir()))
def test_shipped_files_load_and_keep_the_checkpoints_positions(name):
    config = configs.load(["--config", str(configs.DEFAULT_CONFIG.with_name(name))])
    fresh = name == "tiny.yaml"  # it converts what it starts from
    assert config.model.context_positions == ("mrope" if fresh else None)


def test_own_data_holds_the_largest_picture():
    config = configs.load(["--config", str(configs.DEFAULT_CONFIG.with_name("own_data.yaml"))])
    assert config.data.dataset == "folder" and not config.data.mixture
    for height, width in ((3000, 4000), (4000, 3000), (2000, 6000)):
        size = images.smart_resize(height, width)
        source, _, units = images.window_layout((size[0] // 14, size[1] // 14), 4)
        assert len(source) <= config.data.windows[-1]
        assert len(units) + 100 < config.data.prompt_tokens[-1]


def test_flags_win_over_the_file_and_the_file_over_defaults(file):
    config = configs.load(["--config", str(file), "--grpo.steps", "7", "--seed=3"])
    assert (config.grpo.steps, config.grpo.learning_rate, config.seed) == (7, 1e-4, 3)
    assert config.grpo.b2 == 0.999  # neither names it; tiny.yaml, which does, was not asked for
    assert config.run_dir == "runs/short"
    before = configs.load(["--grpo.steps", "7", "--config", str(file)])
    assert before.grpo.steps == 5  # in the order given


def test_values_have_their_types(file):
    config = configs.load(
        ["--config", str(file), "--data.canvas", "[[112, 96], [640, 640]]", "--mesh.data", "4"]
    )
    assert config.data.canvas == ((112, 96), (640, 640))
    assert config.mesh == configs.MeshConfig(data=4)
    assert isinstance(config.grpo, configs.GRPOConfig)
    assert type(config.mesh.data) is int and type(config.grpo.beta) is float
    assert type(config.data.windows[0]) is int
    hash(config)  # frozen all the way down


def processes(coordinator, count, number):
    values = {"coordinator": coordinator, "processes": count, "process_id": number}
    return [str(x) for key, value in values.items() for x in (f"--distributed.{key}", value)]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--grpo.stepz", "3"], "unknown key grpo.stepz; did you mean grpo.steps?"),
        (["--stages=2"], "unknown key stages"),
        (["--grpo.steps", "many"], "grpo.steps: expected a whole number of at least 0, got many"),
        (["--grpo.steps", "3.5"], "grpo.steps: expected a whole number of at least 0, got 3.5"),
        (["--mesh.data", "0"], "mesh.data: expected a whole number of at least 1, got 0"),
        (["--seed", str(2**70)], "seed: expected a number of at most 4294967295, got 118"),
        (["--data.shapes.seed", str(2**32)], "data.shapes.seed: expected a number of at most 42"),
        (["--grpo.steps", str(10**12)], "grpo.steps: expected a number of at most 10000000"),
        (["--data.canvas", f"[[112, {2**40}]]"], "data.canvas: expected a number of at most"),
        (["--grpo.learning_rate", "inf"], "grpo.learning_rate: expected a finite number, got inf"),
        (["--grpo.entropy_weight", ".nan"], "grpo.entropy_weight: expected a finite number"),
        (["--max_skipped", "0"], "max_skipped: expected a whole number of at least 1, got 0"),
        (["--checkpoint.best_by", "speed"], "checkpoint.best_by: expected one of reward, box_iou"),
        (
            ["--distributed.coordinator", "host:1", "--distributed.processes", "2"],
            "distributed.process_id missing",
        ),
        (processes("host", 2, 0), "distributed.coordinator host: expected HOST:PORT"),
        (processes("host:1", 2, 2), "distributed.process_id 2 is none of 2 processes"),
        (["--precision", "int8"], "precision: expected one of float32, bfloat16, got int8"),
        (["--data.max_bad", "1.5"], "data.max_bad: expected a number from 0 to 1, got 1.5"),
        (["--data.canvas", "[[112]]"], "data.canvas"),
        (["--data.windows", "[]"], "data.windows is empty"),
        (["--grpo.num_generations", "1"], "grpo.num_generations is 1"),
        (["--grpo.trained", "[]"], "grpo.trained is empty"),
        (["--grpo.trained", "[llm]"], "grpo.trained"),
        (["--grpo.trained", "[context, sam_decoder]"], "neither visual nor language"),
        (["--grpo.kl", "k2"], "grpo.kl: expected one of k1, k3, kimi, got k2"),
        (["--grpo.advantages", "mean"], "grpo.advantages: expected one of group_normalized"),
        (["--grpo.surrogate", "clip"], "grpo.surrogate: expected one of ratio, probability"),
        (["--grpo.policy_weight", "0", "--grpo.segmentation_weight", "0"], "no loss is left"),
        (["--grpo.policy_weight", "0", "--grpo.entropy_weight", "-0.1"], "grpo.entropy_weight"),
        (
            ["--grpo.segmentation_weight", "0", "--grpo.detach_segmentation", "true"],
            "grpo.detach_segmentation",
        ),
        (["--rewards.box", "0", "--rewards.segment", "0"], "all weights of rewards are 0"),
        (["--rewards.squared", "[format]"], "rewards.squared"),
        (["--rewards.custom", "[os.path:join]"], "names 1 channels and rewards.custom_weights"),
        (
            ["--rewards.custom", "[nowhere:channel]", "--rewards.custom_weights", "[1]"],
            "rewards.custom: nowhere:channel cannot be imported",
        ),
        (
            ["--rewards.custom", "[os:curdir]", "--rewards.custom_weights", "[1]"],
            "rewards.custom: os:curdir is no function",
        ),
        (
            ["--grpo.policy_weight", "0", "--rewards.custom", "[nowhere:channel]"],
            "names 1 channels and rewards.custom_weights",
        ),
        (
            [
                *("--grpo.policy_weight", "0", "--rewards.custom", "[nowhere:channel]"),
                *("--rewards.custom_weights", "[1]"),
            ],
            "rewards.custom: nowhere:channel cannot be imported (ModuleNotFoundError: No module",
        ),
        (["--rollout.top_k", "1"], "rollout.top_k 1 is greedy"),
        (["--rollout.top_p", "0"], "rollout.top_p 0.0 is greedy"),
        (["--rollout.final_temperature", "0"], "expected a number above 0, got 0"),
        (["--run_dir", "gs://bucket/run"], "may lie in a bucket: checkpoint.directory"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, says, file, capsys):
    assert says in refused(capsys, "--config", file, *flags)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grpo: {stepz: 3}\n", "unknown key grpo.stepz; did you mean grpo.steps?"),
        ("data: {shapes: {scenes: 3}}\n", "unknown key data.shapes.scenes"),
        ("gpro: {steps: 3}\n", "unknown key gpro"),
        ("grpo: {steps: true}\n", "grpo.steps: expected a whole number"),
        ("grpo: 3\n", "grpo: expected a section"),
        ("grpo: [3\n", "expected ',' or ']'"),
        ("seed: 1\n", "no start weights"),
        ("model: {checkpoint: start}\n", "no data"),
        (
            "model: {checkpoint: start}\ndata: {dataset: folder, shapes: {train_scenes: 5}}\n",
            "no data",
        ),
    ],
)
def test_a_wrong_file_is_one_line(text, says, file, capsys):
    file.write_text(text)
    assert says in refused(capsys, "--config", file)


def test_choices_are_those_of_the_code():
    hints = typing.get_type_hints(configs.GRPOConfig)
    for key, names in (("kl", KL_ESTIMATES), ("advantages", RULES), ("surrogate", SURROGATES)):
        assert set(typing.get_args(hints[key])) == set(names)
    assert typing.get_args(sections.Part) == tuple(PARTS)


def test_what_a_stage_skips_is_not_asked_of_it(file):
    """Lists and negative numbers as flags; a control run without policy needs no reward."""
    flags = "--rewards.box 0 --rewards.segment 0 --grpo.trained [context] --rollout.top_k 1"
    config = configs.load(["--config", str(file), *flags.split(), "--grpo.policy_weight", "0"])
    assert config.grpo.trained == ("context",)
    configs.load(["--config", str(file), *flags.split(), "--grpo.steps", "0"])
    flags = ["--rewards.squared", "[box, boundary]", "--grpo.entropy_weight", "-0.01"]
    config = configs.load(["--config", str(file), *flags])
    assert config.rewards.squared == ("box", "boundary") and config.grpo.entropy_weight == -0.01


def test_a_missing_file_is_named(tmp_path, capsys):
    assert "absent.yaml" in refused(capsys, "--config", tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "found nothing"),
        (b"- 1\n- 2\n", "expected sections and keys with their values, found - 1 - 2"),
        (b"grpo: {steps: [1,\n  b: {", "did not find expected node content, line 3"),
        ("seed: 1  # für später\n".encode("cp1252"), "it is not UTF-8 at byte 12"),
        (b"seed: 1\0\n", "control characters are not allowed"),
        (b"seed: !!python/object/apply:os.getpid []\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, capsys, content, says):
    """One line that names it, on the command line and of a run."""
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    printed = refused(capsys, "--config", file)
    assert f"{file}: no configuration can be read from it" in printed and says in printed
    with pytest.raises(ConfigError) as error:
        configs.read_yaml(file)
    assert str(error.value).startswith(f"{file}: ") and says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("def channel(answers:", "cannot be imported (SyntaxError: "),
        ("raise RuntimeError('not\\nnow')", "cannot be imported (RuntimeError: not now)"),
        ("def other(answers): return 1\nchannel = other", "is a function called other"),
        ("channel = lambda answers: 1", "is a function called <lambda>"),
    ],
)
def test_a_module_of_rewards_that_is_broken(tmp_path, capsys, monkeypatch, file, module, says):
    name = f"rewards_{abs(hash(module))}"
    (tmp_path / f"{name}.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--rewards.custom", f"[{name}:channel]", "--rewards.custom_weights", "[1]")
    assert f"rewards.custom: {name}:channel {says}" in refused(capsys, "--config", file, *flags)


def test_a_written_config_repeats_the_run(file, tmp_path):
    config = configs.load(["--config", str(file), "--grpo.learning_rate", "2.5e-7"])
    written = tmp_path / "config.yaml"
    written.write_text(configs.dump_yaml(config))
    assert configs.load(["--config", str(written)]) == config
    assert configs.read_yaml(written) == config


def test_a_written_config_that_was_spoilt_is_an_error(tmp_path):
    (tmp_path / "config.yaml").write_text("grpo: {stepz: 3}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: unknown key grpo\.stepz"):
        configs.read_yaml(tmp_path / "config.yaml")


def test_differences_name_the_keys():
    a = configs.load([])
    b = dataclasses.replace(
        a,
        run_dir="elsewhere",
        resume="never",
        remat="full",
        data=dataclasses.replace(a.data, max_bad=0.5, eval_batch_size=3),
        mesh=configs.MeshConfig(fsdp=4),
        checkpoint=configs.CheckpointConfig(every=7, directory="gs://bucket/run"),
        distributed=configs.DistributedConfig("host:1", 2, 1),
        seed=a.seed + 1,
        grpo=dataclasses.replace(a.grpo, beta=0.5, per_device_batch_size=1),
    )
    assert configs.differences(a, b) == ["seed", "grpo.beta"]
    assert configs.differences(a, a) == []
    assert set(configs.FREE) <= {*configs.key_names(), "mesh", "checkpoint", "distributed"}


def test_batches_that_do_not_divide_name_axis_and_number():
    config = configs.load(["--grpo.batch_size", "6"])
    with pytest.raises(ConfigError, match=r"grpo\.batch_size 6 .* mesh\.data 2 .* = 4 parts"):
        configs.check_batches(config, data=2, fsdp=2)
    configs.check_batches(config, data=2, fsdp=1)


@pytest.mark.parametrize(
    ("batch", "at_once", "parts", "micro_batches"),
    [
        (64, None, 16, 1),
        (64, 1, 16, 4),
        (64, 3, 16, 2),
        (64, 8, 16, 1),
        (12, 2, 2, 3),
        (10, 4, 1, 5),
    ],
)
def test_micro_batches_hold_at_most_what_a_device_may(batch, at_once, parts, micro_batches):
    stage = configs.GRPOConfig(batch_size=batch, per_device_batch_size=at_once)
    assert stage.micro_batches(parts) == micro_batches


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit) as stop:
        configs.load(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "python launch/train.py --config configs/tiny.yaml" in text
    assert "--grpo.policy_weight" in text and "a control run" in text


def test_print_config_is_a_config(file, capsys, tmp_path):
    with pytest.raises(SystemExit):
        configs.load(["--config", str(file), "--grpo.beta", "0.25", "--print_config"])
    printed = tmp_path / "short.yaml"
    printed.write_text(capsys.readouterr().out)
    assert configs.load(["--config", str(printed)]).grpo.beta == 0.25
