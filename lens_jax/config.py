"""The configuration of a run: typed, complete, read from defaults < a YAML file < flags.

The defaults are the published recipe for RefCOCO (paper arXiv 2508.14153); `configs/tiny.yaml` is
the run that fits a laptop.
"""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import numpy as np
import yaml

from lens_jax import flags
from lens_jax.flags import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    Place,
    PositiveFloat,
    PositiveInt,
)

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"

Schedule = Literal["constant", "linear", "cosine"]
Dataset = Literal[
    "refcoco",
    "refcoco+",
    "refcocog",
    "refclef",
    "reason_seg",
    "grounding_suite",
    "tfds_ref_coco",
    "folder",
]
Part = Literal["visual", "language", "context", "sam_encoder", "sam_decoder"]


MOST_STEPS = 10**7  # of a stage: what it needs of each step, such as its temperature, is in memory


class ConfigError(Exception):
    """A configuration that cannot be run; the text names the key and says what to do."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which weights a run starts from: `checkpoint`, or `mllm` and `sam`, which are converted."""

    checkpoint: Place | None = None
    """A pretrained checkpoint (lens_config.json, params/)."""
    mllm: Place | None = None
    """Hugging Face directory of Qwen2(.5)-VL, converted first when there is no checkpoint."""
    sam: Place | None = None
    """A SAM 2 or SAM 1 file or directory, converted together with mllm."""
    num_queries: PositiveInt = 64
    """Context queries of the fresh context module when mllm and sam are converted."""
    context_positions: Literal["mrope", "text"] | None = None
    """Positions of passes with queries; null keeps what the checkpoint says: mrope in one made from
    mllm and sam, text in a released LENS."""


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """The generated data set: scenes of coloured shapes, written in RefCOCO's layout."""

    train_scenes: NonNegativeInt = 0
    """Scenes for training, where data.dataset is refcoco; 0: data_dir holds a data set already."""
    eval_scenes: PositiveInt = 500
    """Held-out scenes."""
    seed: NonNegativeInt = 0
    """Of the scenes; apart from the run's, so that runs with other seeds share their data."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run trains and evaluates on, and the static shapes its batches are padded to."""

    dataset: Dataset = "refcoco"
    """Data set, in its original layout: refcoco, refcoco+, refcocog, refclef, reason_seg,
    grounding_suite or tfds_ref_coco; or folder, one of your own (docs/own_data.md)."""
    data_dir: Place | None = None
    """The folder that holds refer_seg/, reason_seg/ReasonSeg/, GroundingSuite-Eval.jsonl, ref_coco/
    or manifest.jsonl; null: the generated set's place inside the run."""
    split: str = "train"
    """The split trained on."""
    mixture: tuple[Dataset, ...] = ()
    """Data sets to train on together, `dataset` among them, which is evaluated on."""
    mixture_weights: tuple[PositiveFloat, ...] = ()
    """How often each data set of `mixture` is drawn from, up to a factor; empty: by its size."""
    curriculum: Place | None = None
    """File in each trained data set's folder (refer_seg/refcoco/) with ref_id and total_reward of
    its refs, such as the rows of launch/evaluate.py: trains on refs between 0.2 and 1.8 alone, the
    easy ones first."""
    reasoning: bool = False
    """Ask for a line of thought before the answer, in training and evaluation."""
    eval_split: str = "val"
    """The held-out split of evaluation.json."""
    eval_limit: PositiveInt | None = None
    """Evaluate on this many samples; null: all."""
    eval_batch_size: PositiveInt = 32
    """Samples decoded together; filled up to as many on every device."""
    max_bad: ClosedUnitInterval = 0.01
    """Stop when clearly more than this fraction of samples cannot be read, more than chance
    explains at this rate; 0: at the first one."""
    windows: tuple[PositiveInt, ...] = (91,)
    """Buckets: rows of 64 patches, each a vision window or several small ones from the picture's
    border. 25 hold 640 x 480 pixels, 36 hold 640 x 640, 91 every picture of Qwen's 1,000,000."""
    prompt_tokens: tuple[PositiveInt, ...] = (512, 1408)
    """Buckets: tokens of a prompt, image tokens included."""
    answer_tokens: tuple[PositiveInt, ...] = (64,)
    """Buckets: tokens of the teacher-forced answer of alignment (stage 1)."""
    canvas: tuple[tuple[PositiveInt, PositiveInt], ...] = ((640, 640),)
    """Buckets: [height, width] of the canvas that true masks lie on."""
    shapes: ShapesConfig = ShapesConfig()

    @property
    def generated(self) -> bool:
        """Whether the run draws its data set, which is written as refcoco, itself."""
        return self.shapes.train_scenes > 0 and "refcoco" in (self.dataset, *self.mixture)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh. None named: the best one for the devices present; one named: others 1."""

    data: PositiveInt | None = None
    """Copies of the model, each with its own part of the batch."""
    fsdp: PositiveInt | None = None
    """Parts that parameters and optimizer state are cut into; shares the batch too."""
    tensor: PositiveInt | None = None
    """Parts that heads, MLPs and vocabulary are cut into."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run, one a host, which all run the same command. On a TPU slice they find
    each other; elsewhere each is told where process 0 is, how many there are, and which it is."""

    coordinator: str | None = None
    """HOST:PORT of process 0, any free port; null: found on TPU slices, one process elsewhere."""
    processes: PositiveInt | None = None
    """How many there are, with coordinator."""
    process_id: NonNegativeInt | None = None
    """Which one this is, from 0, with coordinator; the only key that differs between them."""
    join_timeout: PositiveInt = 300
    """Seconds to wait at the start until all have come."""
    heartbeat_timeout: PositiveInt = 25
    """Seconds without a sign of life after which a process counts as dead; the others then end."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What both stages have: what trains, AdamW (eps 1e-8), its schedule, and the batch."""

    steps: NonNegativeInt = 0
    """Updates; 0 skips the stage."""
    trained: tuple[Part, ...] = ()
    """Parts that train (visual, language, context, sam_encoder, sam_decoder); others are frozen."""
    batch_size: PositiveInt = 64
    """Prompts an update."""
    per_device_batch_size: PositiveInt | None = None
    """Prompts that a device (a group of `tensor` devices) works on at once, at most: the batch is
    cut into as many portions, one after another, and their gradients are summed. null: all."""
    learning_rate: PositiveFloat = 3e-6
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """After warm-up: constant, or linear or cosine to 0 at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0, at most all of them."""
    b1: OpenUnitInterval = 0.9
    """AdamW: decay of the first moment."""
    b2: OpenUnitInterval = 0.999
    """AdamW: decay of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW: decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""

    def portions(self, parts: int) -> int:
        """How many equal portions a batch comes in that `parts` (mesh data x fsdp) share."""
        share = self.batch_size // parts
        at_once = min(share, self.per_device_batch_size or share)
        return next(n for n in range(-(-share // at_once), share + 1) if share % n == 0)


@dataclasses.dataclass(frozen=True)
class AlignmentConfig(StageConfig):
    """Alignment (stage 1): the context module learns to prompt SAM; all else is frozen by
    default."""

    trained: tuple[Part, ...] = ("context",)
    batch_size: PositiveInt = 1024
    learning_rate: PositiveFloat = 3e-5
    schedule: Schedule = "cosine"
    warmup_steps: NonNegativeInt = 150
    stability: bool = True
    """SAM decodes as in evaluation: another mask where the single one is unstable."""


@dataclasses.dataclass(frozen=True)
class GRPOConfig(StageConfig):
    """GRPO (stage 2) on the unified rewards, with the segmentation loss."""

    trained: tuple[Part, ...] = ("visual", "language", "context", "sam_decoder")
    num_generations: PositiveInt = 8
    """G: completions a prompt, the group that advantages are normalised in."""
    advantages: Literal["group_normalized", "no_mean_for_same_reward", "centered"] = (
        "group_normalized"
    )
    """group_normalized: (r - mean) / (std + 1e-4) over the group; no_mean_for_same_reward: that,
    without the mean where all rewards are equal, clamped to [-1, 1]; centered: r - mean."""
    surrogate: Literal["ratio", "probability"] = "ratio"
    """What the advantage multiplies: the ratio to the sampling policy, or the probability itself
    (Kimi k1.5, with kl kimi and advantages centered)."""
    beta: NonNegativeFloat = 0.04
    """Weight of the KL to the frozen reference; 0: the reference is not computed."""
    kl: Literal["k1", "k3", "kimi"] = "k3"
    """Estimate of the KL, with d = log reference - log policy: -d, exp(d) - d - 1, or d^2 / 2."""
    entropy_weight: float = 0.0
    """Weight of the entropy, which is subtracted from the policy loss; negative: less of it."""
    policy_weight: NonNegativeFloat = 1.0
    """Weight of policy loss, KL and entropy; 0 leaves the segmentation loss alone (a control
    run)."""
    segmentation_weight: NonNegativeFloat = 1.0
    """Weight of the masks' BCE + dice."""
    detach_segmentation: bool = False
    """The segmentation loss stops before the connector: the language model learns from rewards
    alone, the queries not at all."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    policy: Literal["current", "base"] = "current"
    """Sample from the current weights, or from those the stage started with."""
    temperature: PositiveFloat = 0.9
    """Of the softmax that tokens are drawn from."""
    final_temperature: PositiveFloat | None = None
    """Reached at the last update, linearly from temperature; null: constant."""
    top_k: NonNegativeInt = 50
    """0: off."""
    top_p: ClosedUnitInterval = 0.9
    """1: off."""
    max_new_tokens: PositiveInt = 768
    """A completion is cut here."""
    completion_tokens: tuple[PositiveInt, ...] = ()
    """Buckets: the update reads completions padded to the smallest of these that holds the longest
    one, or to max_new_tokens."""


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """Weights of the reward channels; 0 switches a channel off."""

    format: NonNegativeFloat = 0.0
    """The completion has the form that `pattern` names."""
    pattern: Literal["think_format", "grounding_format", "grounding_format_reasoning"] = (
        "grounding_format"
    )
    """The form: a thought and an answer in tags, a sentence with its box, or that after a
    thought."""
    box: NonNegativeFloat = 1.0
    """IoU of the box that the completion writes."""
    segment: NonNegativeFloat = 1.0
    """IoU of the mask."""
    boundary: NonNegativeFloat = 0.0
    """IoU of the mask's boundary."""
    squared: tuple[Literal["box", "segment", "boundary"], ...] = ("box", "segment", "boundary")
    """Channels whose IoU is squared."""
    scale: PositiveFloat = 1.0
    """Factor on the total reward."""
    custom: tuple[str, ...] = ()
    """Channels of one's own, as MODULE:FUNCTION each; docs/rewards.md says what they get."""
    custom_weights: tuple[NonNegativeFloat, ...] = ()
    """Weights of `custom`, one each."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the run, from which it resumes."""

    every: PositiveInt = 100
    """Steps between two."""
    keep: PositiveInt = 2
    """The newest ones that are kept, a stage."""
    keep_best: NonNegativeInt = 0
    """The best ones by best_by that are kept besides, a stage."""
    milestones: tuple[PositiveInt, ...] = ()
    """Steps after which a checkpoint is written, and kept whatever the others are."""
    best_by: Literal["reward", "box_iou", "mask_iou", "loss"] = "reward"
    """Number of metrics.jsonl, averaged since the checkpoint before; of loss the lowest is best.
    A stage without it (alignment has mask_iou and loss) keeps none by it."""
    directory: Place | None = None
    """Where they go, DIRECTORY/<stage>/<step>/, gs://BUCKET/NAME for example; null:
    RUN_DIR/checkpoints."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    run_dir: Place | None = None
    """Where it writes; null: runs/<name of the config file>."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue what run_dir holds; never: refuse a run_dir that holds a run."""
    seed: NonNegativeInt = 0
    """Of fresh weights, of the order of samples, and of what is sampled."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrix products; parameters, norms, losses and rewards are float32 in both."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Kernel of attention over packed groups and whole pictures. auto: splash on TPU; cudnn on
    NVIDIA GPUs if precision and head dimensions allow; xla elsewhere. Decoding is always XLA's."""
    remat: Literal["none", "dots", "full"] = "dots"
    """What layers compute again in the backward pass to save memory: nothing, all but matrix
    products, or everything. Gradients stay the same."""
    max_skipped: PositiveInt = 10
    """Stop after this many updates in a row that a loss or gradient which is not finite left out,
    with a checkpoint of the state before them."""
    samples: NonNegativeInt = 12
    """Held-out samples shown in samples/ and report.html."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    grpo: GRPOConfig = GRPOConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()

    def lens_config(self, start: dict[str, Any]) -> dict[str, Any]:
        """lens_config.json of the model that a run makes, from that of the one it starts with."""
        positions = self.model.context_positions
        changed = {"context_positions": positions} if positions else {}
        return start | changed | {"max_new_tokens": self.rollout.max_new_tokens}


# Keys and sections that say where and how a run computes, not what: free to change on resuming.
FREE = (
    "run_dir",
    "resume",
    "attention",
    "remat",
    "max_skipped",
    "data.eval_batch_size",
    "data.max_bad",
    "mesh",
    "alignment.per_device_batch_size",
    "grpo.per_device_batch_size",
    "checkpoint",
    "distributed",
)

_EPILOG = """\
example:
  python launch/train.py --config configs/tiny.yaml --run_dir runs/short \\
      --alignment.steps 20 --grpo.steps 20 --grpo.learning_rate 3e-5 --mesh.data 1

The flags above are the keys of a YAML file with one section for each dotted prefix. Flags win over
the file, the file over the defaults; --print_config shows the result. A run writes what it used to
RUN_DIR/config.yaml; --config RUN_DIR/config.yaml --run_dir ANOTHER repeats it."""


_NOT_READ = "no configuration can be read from it"  # begins what is wrong with a whole file


class _Parser(flags.Parser):
    """Raises ConfigError, one line, where argparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_explain(message, self))


def _explain(message: str, parser: argparse.ArgumentParser) -> str:
    """jsonargparse's message as one line that names the key and what it should be."""
    message = " ".join(message.split())
    if message.startswith("Unexpected config:"):
        found = message.partition(":")[2].strip() or "nothing"
        return f"{_NOT_READ}: expected sections and keys with their values, found {found}"
    if message.startswith("Problems parsing config:"):
        where = ' in "<unicode string>"'
        return f"{_NOT_READ}: {message.partition(':')[2].strip().replace(where, '')}"
    unknown = re.search(
        r"unrecognized arguments: --(?P<flag>[\w.]+)"
        r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<member>[\w.]+)'"
        r"|Option '(?P<top>[\w.]+)' is not accepted",
        message,
    )
    if unknown:
        name = unknown["flag"] or unknown["top"] or f"{unknown['group']}.{unknown['member']}"
        known = [*key_names(), *(["config", "print_config"] if unknown["flag"] else [])]
        if name in dict(_sections(RunConfig)):
            return f"{name} is a section: give its keys, --{name}.KEY VALUE"
        near = difflib.get_close_matches(name, known, n=1)
        return f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else "")
    if message.startswith("unrecognized arguments: "):
        given = message.removeprefix("unrecognized arguments: ")
        return f"unknown: {given}; a key is given as --KEY VALUE, a file as --config FILE.yaml"
    return flags.explain(message, parser, name="{}".format)


def load(argv: Sequence[str] | None = None, default_config: Path = DEFAULT_CONFIG) -> RunConfig:
    """Parses a command line (default: the process's). Prints and exits on --help, --print_config,
    and with code 2 on a mistake.

    `default_config` is read when no --config is given.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    files = config_files(argv, default_config)
    if not _config_files(argv):
        argv = ["--config", *files, *argv]
    try:
        if {"-h", "--help"} & set(argv):
            print(_help(files), end="")
            sys.exit(0)
        parsed = _parser().parse_args(argv)
        config = _build(RunConfig, parsed.as_dict())
        if parsed.print_config:
            print(dump_yaml(config), end="")
            sys.exit(0)
        validate(config)
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        reason = _reason(error)
        if reason.startswith(_NOT_READ):
            reason = f"{', '.join(files)}: {reason}"
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    if config.run_dir is None:
        name = Path(str(parsed.config[-1])).stem
        config = dataclasses.replace(config, run_dir=str(Path("runs") / name))
    return config


def config_files(argv: Sequence[str], default_config: Path = DEFAULT_CONFIG) -> list[str]:
    """The files that a command line reads, in its order."""
    if default_config.is_relative_to(Path.cwd()):
        default_config = default_config.relative_to(Path.cwd())
    return _config_files(argv) or [str(default_config)]


def read_yaml(file: str | os.PathLike[str]) -> RunConfig:
    """The configuration in a file, such as a run's config.yaml. Raises ConfigError."""
    try:
        return _build(RunConfig, _parser().parse_path(str(file)).as_dict())
    except (ConfigError, UnicodeDecodeError, OSError, TypeError) as error:
        raise ConfigError(f"{file}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file of a configuration cannot be read, in a line."""
    if isinstance(error, UnicodeDecodeError):
        return f"{_NOT_READ}: it is not UTF-8 at byte {error.start}, save it as UTF-8"
    return " ".join(str(error).split())


def _config_files(argv: Sequence[str]) -> list[str]:
    """The values of --config on a command line."""
    files = []
    for arg, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if arg == "--config" or arg.startswith("--config="):
            files.append(arg.partition("=")[2] or after)
    return files


def dump_yaml(config: RunConfig) -> str:
    """All of a configuration, as a file that `--config` reads back to the same."""
    return yaml.safe_dump(_plain(config), sort_keys=False, default_flow_style=False)


def key_names() -> list[str]:
    """The dotted names of all keys."""
    return list(leaves(RunConfig()))


def leaves(config: RunConfig) -> dict[str, Any]:
    """The value of every key, by its dotted name."""
    return _leaves(_plain(config))


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Dotted keys in which two runs differ, those of `FREE` apart."""
    left, right = leaves(a), leaves(b)
    return [key for key in left if left[key] != right[key] and not _is_free(key)]


def _is_free(key: str) -> bool:
    return key in FREE or key.split(".")[0] in FREE


def validate(config: RunConfig) -> None:
    """Raises ConfigError for values that are well-typed but do not go together."""
    if config.model.checkpoint is None and not (config.model.mllm and config.model.sam):
        raise ConfigError(
            "no start weights: give model.checkpoint, or model.mllm and model.sam to convert"
        )
    if config.run_dir == "":
        raise ConfigError("run_dir: give a folder, or leave it out: runs/<name of the config file>")
    if "://" in (config.run_dir or ""):
        raise ConfigError(
            f"run_dir {config.run_dir}: a run needs a directory of a file system that all hosts "
            "see; its checkpoints alone may lie in a bucket: checkpoint.directory"
        )
    _validate_numbers(config)
    _validate_data(config.data)
    if config.data.data_dir is None and not config.data.generated:
        raise ConfigError(
            "no data: give data.data_dir, or, to generate refcoco, data.shapes.train_scenes"
        )
    for name in ("alignment", "grpo"):
        stage: StageConfig = getattr(config, name)
        if stage.steps and not stage.trained:
            raise ConfigError(f"{name}.trained is empty: name a part, or set {name}.steps to 0")
    if config.grpo.steps:
        _validate_grpo(config)
    for key in ("windows", "prompt_tokens", "answer_tokens", "canvas"):
        if not getattr(config.data, key):
            raise ConfigError(f"data.{key} is empty: give at least one bucket")
    _validate_distributed(config.distributed)


def _validate_numbers(config: RunConfig) -> None:
    """Numbers that no run can have: NaN and infinity, and whole numbers too large to count with."""
    for key, value in leaves(config).items():
        last = key.split(".")[-1]
        most = {"seed": 2**32 - 1, "steps": MOST_STEPS}.get(last, 2**31 - 1)
        for number in np.ravel(np.array(value, object)):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{key}: expected a finite number, got {number}")
            if isinstance(number, int) and number > most:
                raise ConfigError(f"{key}: expected a number of at most {most}, got {number}")


def _validate_data(data: DataConfig) -> None:
    if data.mixture_weights and len(data.mixture_weights) != len(data.mixture):
        raise ConfigError(
            f"data.mixture_weights names {len(data.mixture_weights)} weights for "
            f"{len(data.mixture)} data sets of data.mixture: give one for each"
        )
    if len(set(data.mixture)) != len(data.mixture):
        raise ConfigError("data.mixture names a data set twice: raise its weight instead")
    if data.mixture and data.dataset not in data.mixture:
        raise ConfigError(
            f"data.dataset {data.dataset} is not in data.mixture {', '.join(data.mixture)}: a run "
            "trains on the mixture and evaluates on dataset; --data.mixture '[]' trains on "
            f"{data.dataset} alone"
        )
    for dataset in data.mixture or (data.dataset,):
        if data.curriculum and not dataset.startswith("ref"):
            raise ConfigError(f"data.curriculum: {dataset} has no refs, only RefCOCO's sets do")


def _validate_distributed(distributed: DistributedConfig) -> None:
    keys = ("coordinator", "processes", "process_id")
    values = {f"distributed.{key}": getattr(distributed, key) for key in keys}
    missing = [key for key, value in values.items() if value is None]
    if len(missing) in (1, 2):
        raise ConfigError(f"{' and '.join(missing)} missing: the three go together {list(values)}")
    if missing:
        return
    host, _, port = distributed.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"distributed.coordinator {distributed.coordinator}: expected HOST:PORT")
    if distributed.process_id >= distributed.processes:
        raise ConfigError(
            f"distributed.process_id {distributed.process_id} is none of "
            f"{distributed.processes} processes: they count from 0"
        )


def _validate_grpo(config: RunConfig) -> None:
    grpo, rollout, rewards = config.grpo, config.rollout, config.rewards
    if grpo.num_generations < 2:
        raise ConfigError(
            "grpo.num_generations is 1: a group of one has no advantage, give 2 or more"
        )
    if not (grpo.policy_weight or grpo.segmentation_weight):
        raise ConfigError(
            "grpo.policy_weight and grpo.segmentation_weight are 0: no loss is left, "
            "set grpo.steps to 0 to skip the stage"
        )
    if grpo.detach_segmentation and not grpo.segmentation_weight:
        raise ConfigError("grpo.detach_segmentation needs grpo.segmentation_weight above 0")
    _validate_custom(rewards)
    if not grpo.policy_weight:
        if grpo.entropy_weight:
            raise ConfigError("grpo.entropy_weight needs grpo.policy_weight above 0")
        return
    if not {"visual", "language"} & set(grpo.trained):
        raise ConfigError(
            "grpo.trained names neither visual nor language, so that the policy loss trains "
            "nothing: add one, or set grpo.policy_weight to 0"
        )
    weights = (rewards.format, rewards.box, rewards.segment, rewards.boundary)
    if not any((*weights, *rewards.custom_weights)):
        raise ConfigError("all weights of rewards are 0: nothing to learn, raise one above 0")
    for key, greedy in (("top_k", rollout.top_k == 1), ("top_p", rollout.top_p == 0)):
        if greedy:
            raise ConfigError(
                f"rollout.{key} {getattr(rollout, key)} is greedy: a group of equal completions "
                f"has no advantage, raise rollout.{key}"
            )


def _validate_custom(rewards: RewardsConfig) -> None:
    if len(rewards.custom) != len(rewards.custom_weights):
        raise ConfigError(
            f"rewards.custom names {len(rewards.custom)} channels and rewards.custom_weights has "
            f"{len(rewards.custom_weights)} weights: give one for each"
        )
    names = [path.partition(":")[2] for path in rewards.custom]
    known = {"format", "box", "segment", "boundary"}
    if taken := [name for name in names if name in known or names.count(name) > 1]:
        raise ConfigError(f"rewards.custom: there are two channels {taken[0]}, rename the function")
    for path in rewards.custom:
        import_function(path)


def batch_rows(config: RunConfig) -> int:
    """The largest number that divides the batches of every stage that runs; 0 if none does."""
    stages = (config.alignment, config.grpo)
    return math.gcd(*(stage.batch_size for stage in stages if stage.steps))


def import_function(path: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names. Raises ConfigError."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's, and is run here
        raise ConfigError(
            f"rewards.custom: {path} cannot be imported ({type(error).__name__}: {_reason(error)});"
            " expected MODULE:FUNCTION, with the module's folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"rewards.custom: {path} is no function")
    if (called := getattr(function, "__name__", "without a name")) != name:
        raise ConfigError(
            f"rewards.custom: {path} is a function called {called}, and its channel is named by "
            f"that: write it as def {name}(answers)"
        )
    return function


def check_batches(config: RunConfig, data: int, fsdp: int) -> None:
    """Raises ConfigError when a batch does not divide over the mesh axes `data` x `fsdp`."""
    sizes = {
        f"{name}.batch_size": getattr(config, name).batch_size
        for name in ("alignment", "grpo")
        if getattr(config, name).steps
    }
    for name, size in sizes.items():
        if size % (data * fsdp):
            raise ConfigError(
                f"{name} {size} does not divide over mesh.data {data} x mesh.fsdp {fsdp} = "
                f"{data * fsdp} parts"
            )


def _parser() -> _Parser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog="launch/train.py",
        usage="launch/train.py [--config FILE.yaml] [--SECTION.KEY VALUE ...] [--print_config]",
        description="Trains LENS: alignment (stage 1), then GRPO (stage 2).",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="A YAML file; without it configs/tiny.yaml.",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="Prints what file and flags make together."
    )
    parser.add_class_arguments(RunConfig)
    for name, section in _sections(RunConfig):
        action = next(action for action in parser._actions if action.dest == name)
        action.help = argparse.SUPPRESS  # a file for the section alone
        del parser._option_string_actions[action.option_strings[0]]
        group = parser.groups[name]
        group.title, group.description = f"{name}.*", inspect.getdoc(section)
    return parser


def _sections(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """The dotted names of the sections, each with its class."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            name = f"{path}{field.name}"
            yield name, field.type
            yield from _sections(field.type, f"{name}.")


def _help(files: Sequence[str]) -> str:
    """What --help prints: the defaults are those that hold with these files."""
    parser = _parser()
    parsed = parser.parse_args([f"--config={file}" for file in files])
    values = leaves(_build(RunConfig, parsed.as_dict()))
    named = {
        key: f", from {file}"
        for file in files
        for key in _leaves(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    }
    for action in parser._actions:
        if action.dest in values:
            action.default, action.source = values[action.dest], named.get(action.dest, "")
    return parser.format_help()


def _build(cls: type, values: Any, section: str = "") -> Any:
    """The frozen dataclass of a parsed namespace, sections by recursion."""
    if not isinstance(values, dict):
        raise ConfigError(f"{section}: expected a section with keys of its own, got {values}")
    members = {}
    for field in dataclasses.fields(cls):
        value = values[field.name]
        if dataclasses.is_dataclass(field.type):
            value = _build(field.type, value, f"{section}.{field.name}".lstrip("."))
        members[field.name] = flags.plain(value)
    return cls(**members)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _leaves(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
