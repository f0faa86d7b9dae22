"""Masks from pictures and sentences: `python launch/predict.py --help`."""

import errno
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import cli

# isort: split
from tqdm import tqdm

from lens_jax.files import printable

if TYPE_CHECKING:
    import numpy as np

    from lens_jax.data.pipeline import Processor
    from lens_jax.data.questions import Question

EXAMPLE = """\
  python launch/predict.py --checkpoint runs/tiny/final --image photo.jpg \\
      --prompt "the red circle on the left" --output predictions
  python launch/predict.py --checkpoint runs/tiny/final --jsonl questions.jsonl

where a line of questions.jsonl is {"image": "photo.jpg", "prompt": "the red circle"}."""

BATCH = 8  # pictures decoded together
NO_MORE_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # for this answer, nor for any other


def predict(
    checkpoint: Path,
    image: Path | None = None,
    prompt: str = "",
    jsonl: Path | None = None,
    output: Path = Path("predictions"),
    reasoning: bool = False,
    precision: Literal["float32", "bfloat16"] | None = None,
) -> int:
    """Segments what a sentence describes, in a picture, in all pictures of a folder, or in those
    that a JSONL file lists with a sentence each.

    For every picture it writes STEM.mask.png (0 and 255, the picture's own size), STEM.overlay.png
    and STEM.json: image, prompt, completion, box ([x0, y0, x1, y1] in pixels, or null), mask_area
    (pixels) and rle (COCO's run lengths). STEM is the picture's name without its ending; where that
    is taken already by an earlier question, in capitals or not, -2, -3, ... are appended, in the
    order of the questions.

    The same command again goes on where it was stopped: questions whose files are there, from the
    same picture, sentence and checkpoint, are not asked again. A picture that cannot be read, a
    sentence that is too long, or an answer that cannot be written is named, the others are done,
    and the exit code is 2. Files in the output folder that are no answers are not overwritten.

    Args:
        checkpoint: A pretrained checkpoint, such as runs/tiny/final.
        image: A picture, or a folder of pictures.
        prompt: The sentence.
        jsonl: In place of --image and --prompt: one object with image and prompt a line; paths are
            relative to the file.
        output: Where to write.
        reasoning: Ask for a line of thought before the answer.
        precision: Of matrix products; float32 on CPU and bfloat16 elsewhere if not given.
    """
    if (image is None) == (jsonl is None):
        raise cli.UsageError("give either --image and --prompt, or --jsonl")
    if jsonl is not None and prompt:
        raise cli.UsageError("--prompt goes with --image; in a --jsonl file each line has its own")
    if image is not None:
        from lens_jax.data.sources.annotations import sentence

        try:
            sentence(prompt, "--prompt")
        except ValueError as error:
            raise cli.UsageError(f"{error}: say what to segment") from None

    from lens_jax import answers, checkpoints, inference
    from lens_jax.data import questions
    from lens_jax.data.pipeline import Processor
    from lens_jax.models import precision as precisions

    passed_over: list[str] = []
    if jsonl is not None:
        try:
            pairs = questions.read_list(jsonl)
        except questions.ListError as error:
            raise cli.UsageError(str(error)) from None
    elif image.is_dir():
        folder = questions.Folder.of(image)
        passed_over = folder.passed_over
        if not folder.pictures:
            what = "".join(f", {said}" for said in passed_over)
            raise cli.UsageError(f"--image: the folder {image} holds no pictures{what}")
        pairs = [(file, prompt.strip()) for file in folder.pictures]
    elif image.exists():
        pairs = [(image, prompt.strip())]
    else:
        raise cli.UsageError(f"--image: {image} does not exist")
    asked = questions.name(pairs)

    checkpoints.read_config(checkpoint)
    if output.exists() and not output.is_dir():
        raise cli.UsageError(f"--output: {output} is a file, not a folder")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass  # whatever keeps all answers from being written is said before the first
    precision = precision or precisions.default()
    identity = answers.identify(checkpoint, reasoning=reasoning, precision=precision)
    work = Work(output, identity, Processor.from_pretrained(checkpoint), reasoning)
    lens = None
    with tqdm(
        total=len(asked), unit="picture", dynamic_ncols=True, disable=len(asked) == 1
    ) as progress:
        for batch in work.batches(asked):
            if lens is None:
                cli.announce(checkpoint, precision)
                lens = inference.Lens.from_pretrained(checkpoint, precision=precision)
            results = lens.segment_batch(
                [pixels for _, pixels, _ in batch],
                [question.prompt for question, *_ in batch],
                reasoning=reasoning,
            )
            for (question, pixels, fingerprint), result in zip(batch, results, strict=True):
                try:
                    answers.write(output, question, pixels, result, fingerprint)
                    work.written += 1
                except OSError as error:
                    if error.errno in NO_MORE_ROOM:
                        raise
                    work.refuse(question, error)
            progress.update(work.written + work.refused + work.done - progress.n)
        progress.update(len(asked) - progress.n)
    said = work.summary(passed_over)
    if len(asked) > 1 or not work.refused:
        print(printable(f"{said}: see {output}"))
    return 2 if work.refused else 0


class Work:
    """What has become of the questions so far."""

    def __init__(self, output: Path, identity: str, processor: "Processor", reasoning: bool):
        self.output, self.identity = output, identity
        self.processor, self.reasoning = processor, reasoning
        self.written = self.done = self.refused = 0

    def batches(
        self, questions: Sequence["Question"]
    ) -> Iterator[list[tuple["Question", "np.ndarray", str]]]:
        """Questions with pixels and fingerprints: those that can be asked and were not before."""
        from lens_jax import answers
        from lens_jax.data.arrays import read_picture
        from lens_jax.data.sample import SampleError
        from lens_jax.inference import check_length

        batch = []
        for question in questions:
            try:
                fingerprint = answers.fingerprint(question, self.identity)
                answers.check_room(self.output, question)
                if answers.is_done(self.output, question, fingerprint):
                    self.done += 1
                    continue
                pixels = read_picture(question.image)
                check_length(self.processor, pixels.shape[:2], question.prompt, self.reasoning)
            except (SampleError, answers.TakenError, OSError, ValueError) as error:
                self.refuse(question, error)
                continue
            batch.append((question, pixels, fingerprint))
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def refuse(self, question: "Question", error: Exception) -> None:
        """Says why a question has no answer."""
        message = str(error)
        named = str(question.image)[:100] in message
        cli.complain(error if named else ValueError(f"{question.image}: {message}"))
        self.refused += 1

    def summary(self, passed_over: Sequence[str]) -> str:
        """All of them, counted."""
        total = self.written + self.done
        counts = [f"{total or 'no'} {'picture' if total == 1 else 'pictures'} segmented"]
        if self.done:
            counts[0] += f" ({self.done} of them before)"
        if self.refused:
            counts.append(f"{self.refused} refused")
        return ", ".join([*counts, *passed_over])


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(predict, argv, prog="launch/predict.py", example=EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
