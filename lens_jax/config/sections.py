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
