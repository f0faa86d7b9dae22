"""The sections of a configuration. Defaults are the published recipe for RefCOCO."""

import dataclasses
from typing import Any, Literal

from lens_jax.flags import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    Place,
    PositiveFloat,
    PositiveInt,
    UsageError,
)

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

# Steps of a stage: what each step needs, such as its temperature, is held in memory.
MOST_STEPS = 10**7


class ConfigError(UsageError):
    """A configuration that cannot be run; the text names the key and says what to do."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The weights that a run starts from: `checkpoint`, or `mllm` and `sam`, which it converts."""

    checkpoint: Place | None = None
    """A pretrained checkpoint (lens_config.json, params/). null: mllm and sam are converted."""
    mllm: Place | None = None
    """Hugging Face directory of Qwen2(.5)-VL, which the run converts if there is no checkpoint.
    null: there is a checkpoint."""
    sam: Place | None = None
    """A SAM 2 or SAM 1 file or directory, converted together with mllm. null: there is a
    checkpoint."""
    num_queries: PositiveInt = 64
    """Context queries of the fresh context module when mllm and sam are converted."""
    context_positions: Literal["mrope", "text"] | None = None
    """Rotary positions of passes with queries. null keeps the checkpoint's: mrope if it was made
    from mllm and sam, text if it is a released LENS."""


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """The generated data set: scenes of coloured shapes, written in RefCOCO's layout."""

    train_scenes: NonNegativeInt = 0
    """Scenes to draw for training, if data.dataset is refcoco. 0: data_dir holds a data set
    already."""
    eval_scenes: PositiveInt = 500
    """Scenes to draw for evaluation."""
    seed: NonNegativeInt = 0
    """Seed of the scenes. It is not the run's, so that runs with several seeds share their data."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data that a run trains and evaluates on, and the static shapes that batches are padded
    to."""

    dataset: Dataset = "refcoco"
    """The data set, in its original layout; folder is one of your own (docs/own_data.md)."""
    data_dir: Place | None = None
    """The folder that holds refer_seg/, reason_seg/ReasonSeg/, GroundingSuite-Eval.jsonl, ref_coco/
    or manifest.jsonl; null: the generated set's place inside the run."""
    split: str = "train"
    """The split that the run trains on."""
    mixture: tuple[Dataset, ...] = ()
    """Data sets to train on together. `dataset` is one of them, and the one to evaluate on."""
    mixture_weights: tuple[PositiveFloat, ...] = ()
    """How often samples come from each data set of `mixture`, up to a factor. Empty: by its
    size."""
    curriculum: Place | None = None
    """A file in the folder of each trained data set (refer_seg/refcoco/) with ref_id and
    total_reward of its refs, such as the rows of launch/evaluate.py. The run trains on refs with a
    reward between 0.2 and 1.8 alone, the easy ones first. null: all refs, shuffled."""
    reasoning: bool = False
    """Ask for reasoning before the answer, in training and evaluation."""
    eval_split: str = "val"
    """The held-out split of evaluation.json."""
    eval_limit: PositiveInt | None = None
    """Evaluate on this many samples; null: all."""
    eval_batch_size: PositiveInt = 32
    """Samples decoded together, filled up to as many on every device."""
    max_bad: ClosedUnitInterval = 0.01
    """The fraction of samples that may be unreadable. The run stops when clearly more are, more
    than chance explains. 0: it stops at the first one."""
    windows: tuple[PositiveInt, ...] = (91,)
    """Buckets: rows of 64 patches. A row holds a vision window, or several small ones from the
    image's border. 25 rows hold 640 x 480 pixels, 36 hold 640 x 640, 91 hold every image of
    1,000,000."""
    prompt_tokens: tuple[PositiveInt, ...] = (512, 1408)
    """Buckets: tokens of a prompt, image tokens included."""
    answer_tokens: tuple[PositiveInt, ...] = (64,)
    """Buckets: tokens of the teacher-forced answer of alignment (stage 1)."""
    canvas: tuple[tuple[PositiveInt, PositiveInt], ...] = ((640, 640),)
    """Buckets: [height, width] of the canvas that true masks lie on."""
    shapes: ShapesConfig = ShapesConfig()

    @property
    def generated(self) -> bool:
        """Whether the run draws its own data set, in RefCOCO's layout."""
        return self.shapes.train_scenes > 0 and "refcoco" in (self.dataset, *self.mixture)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh. Without any key, it is the best one for the devices; with one key, the
    others are 1."""

    data: PositiveInt | None = None
    """Copies of the model. Each has its own part of the batch. null: the best number for the
    devices, or 1 if fsdp or tensor is given."""
    fsdp: PositiveInt | None = None
    """Parts that parameters and optimizer state are cut into. The batch is cut into as many, too.
    null: as for data."""
    tensor: PositiveInt | None = None
    """Parts that heads, MLPs and vocabulary are cut into. null: as for data."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run, one a host, which all run the same command. On a TPU slice they find
    each other. Elsewhere each needs coordinator, processes and process_id."""

    coordinator: str | None = None
    """HOST:PORT of process 0, with any free port. null: found on TPU slices, one process
    elsewhere."""
    processes: PositiveInt | None = None
    """Number of processes. null: as for coordinator."""
    process_id: NonNegativeInt | None = None
    """Number of this process, from 0. No other key differs between processes. null: as for
    coordinator."""
    join_timeout: PositiveInt = 300
    """Seconds to wait at the start until all processes have come."""
    heartbeat_timeout: PositiveInt = 25
    """Seconds without a sign of life after which a process counts as dead. The others then end."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Keys that both stages have: trained parts, AdamW (eps 1e-8), its schedule, and the batch."""

    steps: NonNegativeInt = 0
    """Number of updates. 0 skips the stage."""
    trained: tuple[Part, ...] = ()
    """Parts of the model that train. The others are frozen."""
    batch_size: PositiveInt = 64
    """Prompts of an update."""
    per_device_batch_size: PositiveInt | None = None
    """Most prompts that a device (a group of `tensor` devices) works on at once. The batch is cut
    into as many micro-batches, whose gradients are summed. null: all at once."""
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

    def micro_batches(self, parts: int) -> int:
        """Number of equal micro-batches of a batch that `parts` (mesh data x fsdp) share."""
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
    """SAM decodes as in evaluation: it takes another mask where the single one is unstable."""


@dataclasses.dataclass(frozen=True)
class GRPOConfig(StageConfig):
    """GRPO (stage 2) on the unified rewards, with the segmentation loss."""

    trained: tuple[Part, ...] = ("visual", "language", "context", "sam_decoder")
    num_generations: PositiveInt = 8
    """G: completions of a prompt. They are the group that advantages are normalised in."""
    advantages: Literal["group_normalized", "no_mean_for_same_reward", "centered"] = (
        "group_normalized"
    )
    """Advantages of rewards r in a group. group_normalized: (r - mean) / (std + 1e-4);
    no_mean_for_same_reward: the same, but without the mean where all rewards are equal, and clamped
    to [-1, 1]; centered: r - mean."""
    surrogate: Literal["ratio", "probability"] = "ratio"
    """The factor that the advantage multiplies: the ratio to the sampling policy, or the
    probability itself (Kimi k1.5, with kl kimi and advantages centered)."""
    beta: NonNegativeFloat = 0.04
    """Weight of the KL to the frozen reference. 0: the reference is not computed."""
    kl: Literal["k1", "k3", "kimi"] = "k3"
    """Estimate of the KL, with d = log reference - log policy: -d, exp(d) - d - 1, or d^2 / 2."""
    entropy_weight: float = 0.0
    """Weight of the entropy, which is subtracted from the policy loss. A negative weight lowers the
    entropy."""
    policy_weight: NonNegativeFloat = 1.0
    """Weight of policy loss, KL and entropy. 0 leaves the segmentation loss alone (a control
    run)."""
    segmentation_weight: NonNegativeFloat = 1.0
    """Weight of the segmentation loss, BCE + dice of the masks."""
    detach_segmentation: bool = False
    """Stop the gradient of the segmentation loss before the connector: the language model then
    learns from rewards alone, and the queries do not learn."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    policy: Literal["current", "base"] = "current"
    """The policy that samples: the current weights, or those that the stage started with."""
    temperature: PositiveFloat = 0.9
    """Temperature of the softmax that tokens are drawn from."""
    final_temperature: PositiveFloat | None = None
    """Temperature at the last update; it changes linearly. null: constant."""
    top_k: NonNegativeInt = 50
    """Draw from this many of the likeliest tokens. 0: from all."""
    top_p: ClosedUnitInterval = 0.9
    """Draw from the likeliest tokens that have this probability together. 1: from all."""
    max_new_tokens: PositiveInt = 768
    """Most tokens of a completion, which is cut there."""
    completion_tokens: tuple[PositiveInt, ...] = ()
    """Buckets: the update reads completions padded to the smallest bucket that holds the longest
    one, or to max_new_tokens."""


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """Weights of the reward channels. 0 switches a channel off."""

    format: NonNegativeFloat = 0.0
    """Weight of the format reward: the completion has the form that `pattern` names."""
    pattern: Literal["think_format", "grounding_format", "grounding_format_reasoning"] = (
        "grounding_format"
    )
    """The form: reasoning and an answer in tags, a sentence with its box, or that after
    reasoning."""
    box: NonNegativeFloat = 1.0
    """Weight of the IoU of the box that the completion writes."""
    segment: NonNegativeFloat = 1.0
    """Weight of the IoU of the mask."""
    boundary: NonNegativeFloat = 0.0
    """Weight of the IoU of the mask's boundary."""
    squared: tuple[Literal["box", "segment", "boundary"], ...] = ("box", "segment", "boundary")
    """Channels that square their IoU."""
    scale: PositiveFloat = 1.0
    """Factor on the total reward."""
    custom: tuple[str, ...] = ()
    """Channels of your own, each as MODULE:FUNCTION (docs/rewards.md)."""
    custom_weights: tuple[NonNegativeFloat, ...] = ()
    """Weights of the channels in `custom`."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the run, from which it resumes."""

    every: PositiveInt = 100
    """Steps from one checkpoint to the next."""
    keep: PositiveInt = 2
    """Newest checkpoints that stay, of each stage."""
    keep_best: NonNegativeInt = 0
    """Best checkpoints by best_by that stay as well, of each stage."""
    milestones: tuple[PositiveInt, ...] = ()
    """Steps whose checkpoints are written and stay, whatever the other keys say."""
    best_by: Literal["reward", "box_iou", "mask_iou", "loss"] = "reward"
    """The metric that says which checkpoint is best: its mean since the checkpoint before. The
    lowest loss is best. A stage without the metric (alignment has mask_iou and loss) keeps none by
    it."""
    directory: Place | None = None
    """Folder or bucket (gs://BUCKET/NAME) for DIRECTORY/<stage>/<step>/. null:
    RUN_DIR/checkpoints."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The configuration of a run."""

    run_dir: Place | None = None
    """The folder that the run writes. null: runs/<name of the config file>."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue what run_dir holds; never: refuse a run_dir that holds a run."""
    seed: NonNegativeInt = 0
    """Seed of fresh weights, of the order of samples, and of sampled completions."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of matrix products. Parameters, norms, losses and rewards are always float32."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Kernel of attention over packed groups and whole images. auto: splash on TPU; cudnn on NVIDIA
    GPUs if precision and head dimensions allow; xla elsewhere. Decoding always uses xla."""
    remat: Literal["none", "dots", "full"] = "dots"
    """Rematerialisation: layers compute nothing again in the backward pass, all but matrix
    products, or everything. It saves memory; gradients stay the same."""
    max_skipped: PositiveInt = 10
    """Most updates in a row that may be left out because a loss or gradient is not finite. The run
    then stops with a checkpoint of the state before them."""
    samples: NonNegativeInt = 12
    """Held-out samples to show in samples/ and report.html."""
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
