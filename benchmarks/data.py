"""Samples a second on one core: the training pipeline against the official preprocessing.

Both read the same generated images of 640 x 480 pixels in RefCOCO's layout: JPEG, mask, Qwen's
patches, SAM's image, prompt. The official side prepares a sample as its data set class does, with
transformers' image processor and chat template; a first sample of both must be equal. Everything
runs on one core, without threads.

    python benchmarks/data.py --size small --json data.json
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import interpreter  # noqa: F401

# isort: split
import numpy as np
from PIL import Image

from benchmarks import common, frame
from lens_jax.data import images
from lens_jax.data.buckets import Buckets
from lens_jax.data.pipeline import Pipeline
from lens_jax.data.processor import Processor
from lens_jax.data.prompts import IMAGE_TOKEN, Templates
from lens_jax.data.sample import Sample, Source
from lens_jax.data.sources import open_source
from lens_jax.flags import PositiveInt
from lens_jax.preparation import shapes, shapes_refcoco

QWEN = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny" / "qwen2_5_vl"
WIDTH, HEIGHT = 640, 480
SAMPLES, BATCH = 32, 8  # of one round; of one batch
SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DataOptions(frame.Options):
    repeats: PositiveInt = 7


def write_pictures(directory: Path, scenes: int = 32) -> None:
    """The generated data set with its images and polygons enlarged; grain like a camera's."""
    shapes_refcoco.write_refcoco(directory, {"train": scenes}, seed=0)
    rng = np.random.default_rng(0)
    for file in directory.rglob("*.jpg"):
        image = Image.open(file).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 8, (HEIGHT, WIDTH, 3))
        values = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(values).save(file, quality=90)
    file = directory / "refer_seg/refcoco/instances.json"
    instances = json.loads(file.read_text())
    scale = np.array([WIDTH, HEIGHT]) / shapes.SIDE
    for image in instances["images"]:
        image["width"], image["height"] = WIDTH, HEIGHT
    for annotation in instances["annotations"]:
        x, y, w, h = annotation["bbox"] = (np.array(annotation["bbox"]) * [*scale, *scale]).tolist()
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        if isinstance(annotation["segmentation"], list):
            points = np.array(annotation["segmentation"][0]).reshape(-1, 2)
            outline = (points * scale).reshape(-1).tolist()
        annotation["segmentation"] = [outline]
    file.write_text(json.dumps(instances))


class OfficialDataset:
    """A sample as the official training code prepares it, in NumPy where it has tensors."""

    def __init__(self, source: Source, tokenizer: Any, sam_size: int):
        self.source, self.tokenizer, self.sam_size = source, tokenizer, sam_size
        from transformers import Qwen2VLImageProcessor

        self.processor = Qwen2VLImageProcessor.from_pretrained(QWEN, max_pixels=images.MAX_PIXELS)
        self.templates = Templates()

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        sample: Sample = self.source[index]
        patches = self.processor(images=[Image.fromarray(sample.image)], return_tensors="np")
        text = self.tokenizer.apply_chat_template(
            self.templates.messages(sample.expressions[0]),
            tokenize=False,
            add_generation_prompt=True,
        )
        tokens = int(patches["image_grid_thw"].prod()) // self.processor.merge_size**2
        text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * tokens)
        side = (self.sam_size, self.sam_size)
        image = Image.fromarray(sample.image).resize(side, Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float32) / 255
        return {
            "patches": patches["pixel_values"],
            "tokens": np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"]),
            "sam": ((pixels - SAM_MEAN) / SAM_STD).astype(np.float32).transpose(2, 0, 1),
            "mask": sample.mask.astype(np.float32),
        }


def agree(processor: Processor, official: OfficialDataset) -> None:
    """Raises SystemExit unless the first sample is the same to both."""
    theirs, sample = official[0], official.source[0]
    ours = processor.example(sample, sample.expressions[0])
    size = images.smart_resize(HEIGHT, WIDTH)
    grid = (size[0] // 14, size[1] // 14)
    source = images.window_layout(grid, processor.geometry.window_units)[0]
    slots = source >= 0
    patches = np.empty_like(theirs["patches"])
    patches[source[slots]] = ours.prompt.patches[slots]
    pixels = ((ours.prompt.sam_pixels / 255 - SAM_MEAN) / SAM_STD).transpose(2, 0, 1)
    pairs = {
        "patches": patches,
        "tokens": ours.prompt.tokens,
        "sam": pixels,
        "mask": ours.mask.astype(np.float32),
    }
    for name, values in pairs.items():
        if values.shape != theirs[name].shape or not np.allclose(values, theirs[name], atol=1e-5):
            frame.stop(f"{name} differ between the sides")
    print(f"the same sample: {len(patches)} patches, {len(ours.prompt.tokens)} tokens")


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """This process on one of its cores, where the system can be asked for it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def sides(size: common.Size, directory: Path) -> dict[str, Callable[[], None]]:
    """Functions that prepare SAMPLES samples, ours in batches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    source = open_source("refcoco", "train", directory)
    processor = Processor(tokenizer, sam_size=size.sam.image_size)
    official = OfficialDataset(source, tokenizer, size.sam.image_size)
    agree(processor, official)
    batches = Pipeline(
        source, processor, BATCH, seed=0, buckets=Buckets(), num_threads=0, prefetch=0
    )

    def ours() -> None:
        for _ in range(SAMPLES // BATCH):
            next(batches)
        if batches.bad_samples:
            raise SystemExit("error: a sample could not be read")

    def theirs() -> None:
        for index in range(SAMPLES):
            official[index % len(source)]

    return {"ours": ours, "theirs": theirs}


def measure(options: DataOptions) -> tuple[str, dict[str, frame.Comparison]]:
    with tempfile.TemporaryDirectory() as directory, one_core():
        write_pictures(Path(directory))
        both = sides(common.SIZES[options.size], Path(directory))
        row = frame.compare(**both, repeats=options.repeats)
    rates = SAMPLES / row.ours, SAMPLES / row.theirs
    rows = {"pipeline": frame.Comparison(*rates, row.ratio, "samples/s on a core")}
    return f"preparing samples, {WIDTH} x {HEIGHT} pixels, size {options.size}", rows


def main(argv: Sequence[str] | None = None) -> int:
    return frame.run(measure, DataOptions, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
