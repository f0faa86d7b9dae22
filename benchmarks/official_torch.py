"""The update in the official layout, in PyTorch: transformers' Qwen2.5-VL and SAM 2.

What LENS adds (queries, connector, convolution, projection) and its losses are written out here.
Every completion is a full sequence with its own copy of the picture, and logits are computed at
every position. Weights come from ours through the tables of `tools.convert_weights`. Rewards and
advantages are given: the official code computes them on the host, outside of what is timed.

It is part of benchmarks/update.py, whose --help says what is needed.
"""

import contextlib
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from flax import nnx
from torch import Tensor

from benchmarks.common import Inputs, Size
from lens_jax import checkpoints
from lens_jax.config import GRPOConfig
from lens_jax.convert_weights import qwen_vl
from lens_jax.convert_weights.lens import PREFIXES
from lens_jax.convert_weights.tables import lens_table
from lens_jax.convert_weights.torch_models import connect, load_model, load_sam
from lens_jax.model_configs.qwen_vl import write_qwen_vl
from lens_jax.models.lens import LensConfig
from lens_jax.models.sam.segmenter import PIXEL_MEAN, PIXEL_STD
from lens_jax.rollout.sampler import Rollout


class OfficialUpdate:
    """Policy, reference and AdamW; `step` is one update on fixed completions.

    Args:
        params: all of our parameters; `reference` are those that read and write text.
        advantages: one a completion [B, G].
        attention: `sdpa` or `eager`.
    """

    def __init__(
        self,
        size: Size,
        config: LensConfig,
        params: nnx.State,
        reference: nnx.State,
        inputs: Inputs,
        rollout: Rollout,
        advantages: np.ndarray,
        objective: GRPOConfig,
        *,
        learning_rate: float,
        max_grad_norm: float,
        attention: str = "sdpa",
        device: str = "cpu",
    ):
        self.config, self.objective, self.max_grad_norm = config, objective, max_grad_norm
        self.device = torch.device(device)
        self.group = rollout.lengths.shape[1]
        half = np.dtype(size.dtype) != np.float32
        self.precision = (
            torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()
        )
        tensors = official_tensors(config, params)
        self.qwen = self._place(load_qwen(size, tensors, attention))
        sam = {n: torch.from_numpy(x) for n, x in tensors.items() if n.startswith("sam.")}
        self.sam = self._place(load_sam(config.sam, sam.__getitem__, attn_implementation=attention))
        self.context = {
            name: torch.nn.Parameter(torch.from_numpy(x).to(self.device))
            for name, x in tensors.items()
            if name.startswith(PREFIXES)
        }
        del tensors, sam
        self.reference = self._place(
            load_qwen(size, official_tensors(config, reference), attention)
        )
        self.reference.requires_grad_(False)
        if half:
            self.reference.to(torch.bfloat16)
        self.sam.vision_encoder.requires_grad_(False)
        self.sam.no_memory_embedding.requires_grad_(False)
        modules = (self.qwen, self.sam.prompt_encoder, self.sam.mask_decoder)
        self.trained = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.trained += self.context.values()
        self.optimizer = torch.optim.AdamW(self.trained, learning_rate, weight_decay=0.0)

        prompts, targets = inputs.prompts, inputs.targets
        copies = lambda x: torch.from_numpy(np.repeat(x, self.group, axis=0)).to(self.device)  # noqa: E731
        flat = lambda x: torch.from_numpy(np.array(x)).flatten(0, 1).to(self.device)  # noqa: E731
        self.prompt, self.patches = copies(prompts.tokens).long(), copies(inputs.patches)
        self.patches = self.patches.flatten(0, 1)
        grid = torch.tensor([(1, *size.grid)] * len(self.prompt))
        self.grid = grid.to(self.device)
        self.positions = copies(prompts.positions).permute(1, 0, 2).long()
        self.following = copies(prompts.next_position).long()
        pixels = (prompts.sam_pixels.astype(np.float32) - PIXEL_MEAN) / PIXEL_STD
        self.pixels = copies(pixels.transpose(0, 3, 1, 2))
        self.truth = copies(targets.mask.astype(np.float32))
        self.tokens, self.lengths = flat(rollout.tokens).long(), flat(rollout.lengths).long()
        self.advantages = flat(advantages)
        self.counted = (
            torch.arange(self.tokens.shape[1], device=self.device) < self.lengths[:, None]
        )

    def step(self) -> tuple[float, float]:
        """One update. Returns the loss, and the norm of its gradient before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision:
            loss = self.loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        return loss.item(), norm.item()

    def loss(self) -> Tensor:
        """Policy loss, KL and segmentation losses, a mean over completions."""
        with torch.no_grad():
            past, _ = self.score(self.reference, "mrope")
        queries = self.context["learnable_query"]
        scheme = self.config.context_positions
        log_probs, hidden = self.score(self.qwen, scheme, queries)
        token = connect(
            self.context.__getitem__,
            hidden,
            self.config.connector_depth,
            self.config.connector_heads,
        )
        logits = self.masks(token)

        ratio = torch.exp(log_probs - log_probs.detach())
        difference = past - log_probs
        kl = torch.exp(difference) - difference - 1
        per_token = -ratio * self.advantages[:, None] + self.objective.beta * kl
        policy = (per_token * self.counted).sum(1) / self.counted.sum(1).clamp(min=1)

        truth = self.truth
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        probs = logits.sigmoid()
        overlap, total = (probs * truth).sum((1, 2)), (probs + truth).sum((1, 2))
        segmentation = cross_entropy.mean((1, 2)) + 1 - (2 * overlap + 1) / (total + 1)
        objective = self.objective
        return torch.mean(
            objective.policy_weight * policy + objective.segmentation_weight * segmentation
        )

    def score(
        self, qwen: torch.nn.Module, scheme: str, queries: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, T] of the completions, and the queries' hidden states."""
        model, (n, p) = qwen.model, self.prompt.shape
        t = self.tokens.shape[1]
        pictures = model.visual(
            self.patches.to(model.visual.dtype), grid_thw=self.grid
        ).pooler_output
        embed = model.get_input_embeddings()
        prompt = embed(self.prompt)
        shown = (self.prompt == self.config.mllm.image_token_id)[..., None].expand_as(prompt)
        prompt = prompt.masked_scatter(shown, pictures.to(prompt.dtype))
        parts, mask = [prompt, embed(self.tokens)], [torch.ones_like(self.prompt), self.counted]
        offsets = torch.arange(t, device=self.device).expand(n, t)
        if queries is not None:
            m = queries.shape[1]
            parts.append(queries.to(prompt.dtype).expand(n, -1, -1))
            mask.append(torch.ones(n, m, dtype=torch.long, device=self.device))
            added = self.lengths[:, None] + torch.arange(m, device=self.device)
            offsets = torch.cat([offsets, added], 1)
        if scheme == "mrope":
            before, first = self.positions, self.following
        else:
            before = torch.arange(p, device=self.device).expand(3, n, p)
            first = torch.full((n,), p, device=self.device)
        after = (first[:, None] + offsets).expand(3, -1, -1)
        hidden = model.language_model(
            inputs_embeds=torch.cat(parts, 1),
            attention_mask=torch.cat([x.long() for x in mask], 1),
            position_ids=torch.cat([before, after], 2),
            use_cache=False,
        ).last_hidden_state
        log_probs = qwen.lm_head(hidden).float().log_softmax(-1)
        taken = log_probs[:, p - 1 : p + t - 1].gather(-1, self.tokens[..., None])[..., 0]
        return taken, hidden[:, p + t :]

    def masks(self, token: Tensor) -> Tensor:
        """Logits of the masks at the pictures' size."""
        sam = self.sam
        with torch.no_grad():
            fine, medium, coarse = sam.vision_encoder(self.pixels).fpn_hidden_states
            coarse = coarse + sam.no_memory_embedding.reshape(1, -1, 1, 1)
        decoder = sam.mask_decoder
        no_mask = sam.prompt_encoder.no_mask_embed.weight[..., None, None]
        logits = decoder(
            image_embeddings=coarse,
            image_positional_embeddings=sam.get_image_wide_positional_embeddings().expand(
                len(token), -1, -1, -1
            ),
            sparse_prompt_embeddings=token[:, None, None],
            dense_prompt_embeddings=no_mask.expand_as(coarse),
            multimask_output=False,
            high_resolution_features=[decoder.conv_s0(fine), decoder.conv_s1(medium)],
        )[0][:, 0]
        size = self.truth.shape[1:]
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)[:, 0]

    def _place(self, model: torch.nn.Module) -> torch.nn.Module:
        # In training the decoder always gives its first mask.
        return model.to(self.device).train()


def official_tensors(config: LensConfig, params: nnx.State) -> dict[str, np.ndarray]:
    """Our parameters under their official names; of a part of them, that part."""
    flat = dict(checkpoints.unstack(nnx.to_pure_dict(params)))
    return {
        e.source: np.ascontiguousarray(e.transform.inverse(np.asarray(flat[e.target], np.float32)))
        for e in lens_table(config).entries
        if e.target in flat
    }


def load_qwen(
    size: Size,
    tensors: Mapping[str, np.ndarray],
    attention: str | None = None,
    dtype: str = "float32",
) -> torch.nn.Module:
    """A Qwen2.5-VL of transformers with those of `tensors` that are its own."""
    own = {n: torch.from_numpy(x) for n, x in tensors.items() if n.startswith(qwen_vl.PREFIXES)}
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    hf = {"model_type": size.qwen.vision.family} | write_qwen_vl(size.qwen)
    return load_model(model_class, hf, own, **options)
