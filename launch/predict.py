"""Masks from pictures and sentences: `python launch/predict.py --help`."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pycocotools import mask as coco_mask
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import cli

if TYPE_CHECKING:
    from lens_jax.data.pipeline import Processor

EXAMPLE = """\
  python launch/predict.py --checkpoint runs/tiny/final --image photo.jpg \\
      --prompt "the red circle on the left" --output predictions
  python launch/predict.py --checkpoint runs/tiny/final --jsonl questions.jsonl

where a line of questions.jsonl is {"image": "photo.jpg", "prompt": "the red circle"}."""

BATCH = 8  # pictures decoded together; a last, smaller batch is filled up, so shapes stay the same
OURS = (".mask.png", ".overlay.png")
KEY = "lens"  # the text of a mask's PNG that says what was asked of which checkpoint


@dataclasses.dataclass(frozen=True)
class Question:
    """What to look for in which picture, and what the files of the answer are called."""

    image: Path
    prompt: str
    stem: str


def predict(
    checkpoint: Path,
    image: Path | None = None,
    prompt: str = "",
    jsonl: Path | None = None,
    output: Path = Path("predictions"),
    reasoning: bool = False,
) -> int:
    """Segments what a sentence describes, in a picture, in all pictures of a folder, or in those
    that a JSONL file lists with a sentence each.

    For every picture it writes STEM.mask.png (0 and 255, the picture's own size), STEM.overlay.png
    and STEM.json: prompt, completion, box ([x0, y0, x1, y1] in pixels, or null), mask_area (pixels)
    and rle (COCO's run lengths). STEM is the picture's name without its ending; where that is taken
    already by an earlier question, -2, -3, ... are appended, in the order of the questions.

    The same command again goes on where it was stopped: questions whose files are there, from the
    same picture, sentence and checkpoint, are not asked again. A picture that cannot be read, or a
    sentence that is too long, is named, the others are done, and the exit code is 2.

    Args:
        checkpoint: A pretrained checkpoint, such as runs/tiny/final.
        image: A picture, or a folder of pictures.
        prompt: The sentence.
        jsonl: In place of --image and --prompt: one object with image and prompt a line; paths are
            relative to the file.
        output: Where to write.
        reasoning: Ask for a line of thought before the answer.
    """
    if (image is None) == (jsonl is None):
        raise cli.UsageError("give either --image and --prompt, or --jsonl")
    if jsonl is not None and prompt:
        raise cli.UsageError("--prompt goes with --image; in a --jsonl file each line has its own")
    pairs = _listed(jsonl) if jsonl is not None else _pictures(image, prompt)
    questions = name(pairs)

    from lens_jax import checkpoints, inference
    from lens_jax.data.pipeline import Processor

    checkpoints.read_config(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    identity = _identity(checkpoint, reasoning)
    missing = [q for q in questions if not is_done(output, q, identity)]
    done = len(questions) - len(missing)
    if done:
        print(f"{done} {'question is' if done == 1 else 'questions are'} answered already")
    refused: list[Path] = []
    lens = None
    size = min(BATCH, len(questions))
    processor = Processor.from_pretrained(checkpoint)
    with tqdm(
        total=len(questions),
        initial=done,
        unit="picture",
        dynamic_ncols=True,
        disable=len(questions) == 1,
    ) as progress:
        for batch in _batches(missing, size, processor, reasoning, refused):
            if lens is None:
                lens = inference.Lens.from_pretrained(checkpoint)
            full = batch + batch[-1:] * (size - len(batch))
            results = lens.segment_batch(
                [pixels for _, pixels in full],
                [question.prompt for question, _ in full],
                reasoning=reasoning,
            )
            for (question, pixels), result in zip(batch, results, strict=False):
                write(output, question, pixels, result, identity)
            progress.update(len(batch))
    done = len(questions) - len(refused)
    if done:
        print(f"{done} {'picture' if done == 1 else 'pictures'} segmented: see {output}")
    return 2 if refused else 0


def is_done(output: Path, question: Question, identity: str) -> bool:
    """Whether the files of an answer to this very question are there, whole."""
    mask, text = (output / f"{question.stem}.{end}" for end in ("mask.png", "json"))
    try:
        with Image.open(mask) as picture:
            return text.is_file() and picture.info.get(KEY) == _fingerprint(question, identity)
    except OSError:
        return False


def _identity(checkpoint: Path, reasoning: bool) -> str:
    """What answers depend on besides the question: the checkpoint's configuration and checksums."""
    files = [checkpoint / name for name in ("lens_config.json", "manifest.json")]
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    return f"{hashlib.sha256(content).hexdigest()} {reasoning}"


def _fingerprint(question: Question, identity: str) -> str:
    state = question.image.stat()
    asked = f"{identity} {state.st_size} {state.st_mtime_ns} {question.prompt}"
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()


def name(pairs: Sequence[tuple[Path, str]]) -> list[Question]:
    """Questions with stems of their own; a picture's first one is called like the picture."""
    taken = {image.stem for image, _ in pairs}
    given: set[str] = set()
    questions = []
    for image, prompt in pairs:
        stem, number = image.stem, 1
        while stem in given or (number > 1 and stem in taken):
            number += 1
            stem = f"{image.stem}-{number}"
        given.add(stem)
        questions.append(Question(image, prompt, stem))
    return questions


def write(output: Path, question: Question, pixels: np.ndarray, result, identity: str = "") -> None:
    """The three files of an answer; the JSON, written last, says that all are there."""
    from lens_jax.training import drawing

    box = result.box
    if box is not None and not np.isfinite(box).all():
        box = None
    rle = coco_mask.encode(np.asfortranarray(result.mask.astype(np.uint8)))
    answer = {
        "prompt": question.prompt,
        "completion": result.completion,
        "box": None if box is None else [float(v) for v in box],
        "mask_area": int(result.mask.sum()),
        "rle": {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")},
    }
    mask = Image.fromarray(result.mask.astype(np.uint8) * 255)
    info = PngInfo()
    if identity:
        info.add_text(KEY, _fingerprint(question, identity))
    (output / f"{question.stem}.json").unlink(missing_ok=True)
    mask.save(output / f"{question.stem}.mask.png", pnginfo=info)
    overlay = drawing.overlay(pixels, box, result.mask, side=max(drawing.PANEL, *mask.size))
    overlay.save(output / f"{question.stem}.overlay.png")
    text = json.dumps(answer, ensure_ascii=False, indent=1)
    (output / f"{question.stem}.json").write_text(text + "\n", encoding="utf-8")


def _pictures(image: Path, prompt: str) -> list[tuple[Path, str]]:
    """A picture, or those of a folder by name, with one sentence for all."""
    if not prompt.strip():
        raise cli.UsageError("--prompt is empty: say what to segment")
    if image.is_dir():
        endings = Image.registered_extensions()
        files = sorted(
            file
            for file in image.iterdir()
            if file.suffix.lower() in endings and not file.name.endswith(OURS)
        )
        if not files:
            raise cli.UsageError(f"--image: the folder {image} holds no pictures")
    elif image.exists():
        files = [image]
    else:
        raise cli.UsageError(f"--image: {image} does not exist")
    return [(file, prompt) for file in files]


def _listed(jsonl: Path) -> list[tuple[Path, str]]:
    """The pairs of a JSONL file; empty lines are passed over."""
    pairs = []
    try:
        lines = jsonl.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise cli.UsageError(f"{jsonl} is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{jsonl}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise cli.UsageError(f"{where}: not JSON ({error})") from None
        for key in ("image", "prompt"):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise cli.UsageError(f"{where}: {key!r} is missing or empty")
        pairs.append((jsonl.parent / row["image"], row["prompt"]))
    if not pairs:
        raise cli.UsageError(f"{jsonl} holds no questions")
    return pairs


def _batches(
    questions: Sequence[Question],
    size: int,
    processor: "Processor",
    reasoning: bool,
    refused: list[Path],
) -> Iterator[list[tuple[Question, np.ndarray]]]:
    """Questions with their pixels; those that cannot be asked are named and collected."""
    from lens_jax.data.sample import SampleError, read_image
    from lens_jax.inference import check_length

    batch = []
    for question in questions:
        try:
            pixels = read_image(question.image)
            check_length(processor, pixels.shape[:2], question.prompt, reasoning)
        except (SampleError, ValueError) as error:
            message = str(error)
            named = str(question.image) in message
            cli.complain(error if named else ValueError(f"{question.image}: {message}"))
            refused.append(question.image)
            continue
        batch.append((question, pixels))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(predict, argv, prog="launch/predict.py", example=EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
