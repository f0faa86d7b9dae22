"""launch/evaluate.py on golden's data sets, with golden's checkpoint, against the official run."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax import checkpoints
from lens_jax.commands import evaluate
from lens_jax.convert_weights import from_torch
from lens_jax.data.buckets import Buckets
from lens_jax.data.images import window_layout
from lens_jax.inference import inputs, programs
from lens_jax.inference.lens import Lens
from lens_jax.rollout.sampler import Rollout
from tests.golden import weights

# The official output layer's last hypernetwork, scaled so that the multimask rule decides.
UNSTABLE = "sam.sam_mask_decoder.output_hypernetworks_mlps.0.layers."
DATASETS = {"reasonseg": "reason_seg", "gs": "grounding_suite"}
NEW_TOKENS = 32  # that are regenerated of each completion; the stored ones are fed beyond


@dataclasses.dataclass(frozen=True)
class Official:
    """One official run: scores, items, and for each expression the tokens and low-res logits."""

    name: str
    scores: dict
    items: list[dict]
    prompts: list[np.ndarray]
    completions: list[np.ndarray]  # end token included
    low_res: list[np.ndarray]
    end_tokens: list[int]

    @property
    def unstable(self) -> bool:
        return self.name.startswith("unstable_")

    def flags(self) -> list[str]:
        """evaluate.py's flags for this run."""
        name = self.name.removeprefix("unstable_")
        if name.startswith("refcoco"):
            dataset, _, split = name.split(".")
        else:
            kind, _, rest = name.partition("_")
            dataset, split = DATASETS[kind], rest.removesuffix("_cot") or "all"
        flags = ["--dataset", dataset, "--split", split, "--official_masks", "true"]
        return [*flags, "--reasoning", str(name.endswith("_cot")).lower()]


@pytest.fixture(scope="module")
def runs(golden_dir) -> dict[str, Official]:
    stored = json.loads((golden_dir / "eval_end2end.json").read_text())
    ends = stored["eos_token_ids_used"]
    with np.load(golden_dir / "eval_end2end.npz") as file:
        arrays = dict(file)
    runs = {}
    for name, scores in stored.items():
        if not isinstance(scores, dict):
            continue
        run = Official(name, scores, scores["items"], [], [], [], ends)
        for i, item in enumerate(run.items):
            ids, mask, out, low_res = (
                arrays[f"{name}_{i}_{key}"]
                for key in ("prompt_input_ids", "prompt_attention_mask", "llm_out", "low_res")
            )
            assert len(ids) == item["n_expr"]
            for row in range(len(ids)):
                completion = out[row, ids.shape[1] :]
                end = np.flatnonzero(np.isin(completion, ends))
                run.prompts.append(ids[row][mask[row] == 1])
                run.completions.append(completion[: end[0] + 1 if len(end) else None])
                run.low_res.append(low_res[row, 0])
        runs[name] = run
    assert runs
    return runs


@pytest.fixture(scope="module")
def buckets(golden_dir, runs) -> Buckets:
    """One static shape for all of them: little to compile."""
    config = json.loads((golden_dir / "lens_tiny" / "config.json").read_text())
    units = config["vision_config"]["window_size"] // 28
    with np.load(golden_dir / "eval_end2end.npz") as arrays:
        grids = [tuple(map(int, arrays[k][0, 1:])) for k in arrays if k.endswith("_grid")]
    return Buckets(
        prompt_tokens=(max(len(p) for run in runs.values() for p in run.prompts),),
        windows=(max(len(window_layout(grid, units)[0]) for grid in grids),),
        canvas=((1, 1),),
    )


@pytest.fixture(scope="module")
def convert(golden_dir, runs, tmp_path_factory):
    """A converted checkpoint whose completions end at the official run's end tokens."""
    made = {}

    def convert(unstable: bool):
        if unstable not in made:
            tensors = weights.lens_tensors(golden_dir)
            if unstable:
                last = max(name for name in tensors if name.startswith(UNSTABLE))
                last = last.rpartition(".")[0]
                for part in ("weight", "bias"):
                    tensors[f"{last}.{part}"] *= np.float32(0.25)
            root = tmp_path_factory.mktemp("evaluation")
            official = weights.write_lens(golden_dir, root / "official", tensors)
            file = official / "generation_config.json"
            settings = json.loads(file.read_text())
            settings["eos_token_id"] = next(iter(runs.values())).end_tokens
            file.write_text(json.dumps(settings))
            from_torch(output=root / "lens", lens=official)
            config = checkpoints.read_config(root / "lens") | {"max_new_tokens": NEW_TOKENS}
            (root / "lens" / checkpoints.CONFIG).write_text(json.dumps(config))
            checkpoints.write_manifest(root / "lens")
            made[unstable] = root / "lens"
        return made[unstable]

    return convert


def evaluated(run: Official, checkpoint, golden_dir, folder, monkeypatch, buckets, room):
    """Runs the command; returns its scores, its rows, and all responses in order.

    What the official run's own numbers determine of a completion must come out the same; masks are
    drawn for the stored ones, which may run to the length limit.
    """
    gaps = [gap for item in run.items for gap in item["min_top1_minus_top2"]]
    write, respond = programs.generate, Lens.respond
    responses = []

    def stored(state, prompts, sample_id, key, sampling, ends, limit, **static):
        written, embedded, _ = write(
            state, prompts, sample_id, key, sampling, ends, limit, **static
        )
        number = int(sample_id[0])
        prompt, completion = run.prompts[number], run.completions[number]
        np.testing.assert_array_equal(prompts.tokens[0, : prompts.length[0]], prompt)
        ended = completion[-1] in run.end_tokens
        if gaps[number] > 1e-3:
            ours = written.tokens[0, 0, : int(written.lengths[0, 0])]
            np.testing.assert_array_equal(ours, completion[:NEW_TOKENS])
            assert bool(written.ended[0, 0]) == (ended and len(completion) <= NEW_TOKENS)
        tokens = np.zeros((1, 1, room), np.int32)
        tokens[0, 0, : len(completion)] = completion
        lengths, ended = np.array([[len(completion)]], np.int32), np.array([[ended]])
        tokens, lengths, ended = map(jnp.asarray, (tokens, lengths, ended))
        return Rollout(tokens, lengths, written.log_probs, ended), embedded, None

    def record(lens, prompts, sample_id, *, limit, **options):
        completion = run.completions[int(sample_id[0])]
        ended = completion[-1] in run.end_tokens
        assert len(completion) <= limit[0] if ended else len(completion) == limit[0]
        out = respond(lens, prompts, sample_id, limit=limit, **options)
        responses.extend(zip(out.mask_logits, out.box, out.box_found, strict=True))
        return out

    monkeypatch.setattr(programs, "generate", stored)
    monkeypatch.setattr(Lens, "respond", record)
    monkeypatch.setattr(inputs, "BUCKETS", buckets)
    monkeypatch.setattr(programs, "COMPLETION_BUCKET", room)
    scores, rows = folder / "scores.json", folder / "rows.jsonl"
    flags = ["--checkpoint", checkpoint, "--data_dir", golden_dir / "datasets", *run.flags()]
    flags += ["--output", scores, "--rows", rows, "--devices", "1", "--batch_size", "1"]
    assert evaluate.main([str(flag) for flag in flags]) == 0
    rows = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return json.loads(scores.read_text()), rows, responses


@pytest.mark.parametrize("unstable", [False, True])
def test_official_evaluation(unstable, runs, convert, golden_dir, tmp_path, monkeypatch, buckets):
    chosen = [run for run in runs.values() if run.unstable == unstable]
    assert chosen
    room = max(len(completion) for run in runs.values() for completion in run.completions)
    load = functools.cache(Lens.from_pretrained)  # and what it has compiled
    monkeypatch.setattr(Lens, "from_pretrained", load)
    for run in chosen:
        checkpoint = convert(run.unstable)
        assert checkpoints.read_config(checkpoint)["context_positions"] == "text"
        with monkeypatch.context() as patch:
            scores, rows, responses = evaluated(
                run, checkpoint, golden_dir, tmp_path, patch, buckets, room
            )
        check(run, scores, rows, responses)


def check(run: Official, scores, rows, responses) -> None:
    assert scores["samples"] == len(rows) == len(run.completions)
    for row, (logits, _, _), low_res in zip(rows, responses, run.low_res, strict=False):
        step = logits.shape[0] // low_res.shape[0]
        np.testing.assert_allclose(logits[::step, ::step], low_res, atol=8e-4, rtol=0)
        assert row["number"] < len(rows)
    # Pixels so near the threshold that rounding decides.
    near = [n for item in run.items for n in item["pixels_with_abs_logit_below_1e-3"]]
    start = 0
    for item in run.items:
        part = rows[start : start + item["n_expr"]]
        slack = np.mean(near[start : start + item["n_expr"]])
        for row, text in zip(part, item["decoded"], strict=True):
            assert text.endswith("assistant\n" + row["completion"])
        for key in ("intersection", "union"):
            ours = np.mean([row[key] for row in part])
            assert abs(ours - item[key][1]) <= slack + 1e-3, (key, ours, item[key])
        iou = np.mean([row["iou"] for row in part])
        assert abs(iou - item["acc_iou"][1]) <= slack / item["union"][1] + 1e-6
        if item["box_iou"] is not None:
            ours = np.mean([row["box_iou"] for row in part])
            assert ours == pytest.approx(item["box_iou"], abs=1e-5)
        start += item["n_expr"]
    slack = sum(near) / sum(row["union"] for row in rows)
    assert abs(scores["ciou"] - run.scores["ciou"]) <= slack + 1e-6
    slack = np.mean([n / row["union"] for n, row in zip(near, rows, strict=True)])
    assert abs(scores["giou"] - run.scores["giou"]) <= slack + 1e-6
    if run.scores["box_iou"] is not None:
        assert scores["box_iou"] == pytest.approx(run.scores["box_iou"], abs=1e-5)
