"""Masks from pictures and sentences: `python launch/predict.py --help`."""

import dataclasses
import errno
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lens_jax import interrupts
from lens_jax.commands import cli
from lens_jax.files import explain, printable
from lens_jax.progress import Bar, counted

if TYPE_CHECKING:
    import numpy as np

    from lens_jax.data.processor import Processor
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
    overwrite: bool = False,
) -> int:
    """Segments what a sentence describes, in a picture, in all pictures of a folder, or in those
    that a JSONL file lists with a sentence each.

    For every picture it writes STEM.mask.png (0 and 255, the picture's own size), STEM.overlay.png
    and STEM.json: image, prompt, completion, ended (false: cut off at the checkpoint's
    max_new_tokens), well_formed (it has the form of the training), box ([x0, y0, x1, y1] in pixels,
    clipped to the picture, or null if nothing of one lies in it), mask_area (pixels) and rle
    (COCO's run lengths). The last line counts what was segmented, and what is cut off, has no box,
    an empty mask or one outside of its box, names something else, or has another form. STEM is the
    picture's name without its ending; where that is taken already by an earlier question, in
    capitals or not, -2, -3, ... are appended, in the order of the questions.

    The same command again goes on where it was stopped: questions whose files are there, from the
    same picture, sentence, checkpoint and flags, are not asked again. Where STEM is taken by the
    answer to another question, one that differs in any of these, nothing is asked and the exit code
    is 2: give another --output, or --overwrite true. A picture that cannot be read, a
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
        overwrite: Replace answers to other questions in the output folder.
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
    from lens_jax.data.processor import Processor
    from lens_jax.models import precision as precisions

    passed_over: list[str] = []
    if jsonl is not None:
        try:
            pairs = questions.read_list(jsonl)
        except (questions.ListError, OSError) as error:
            message = explain(error) if isinstance(error, OSError) else str(error)
            raise cli.UsageError(f"--jsonl: {message}") from None
    elif image.is_dir():
        folder = questions.ImageFolder.of(image)
        passed_over = folder.passed_over
        if not folder.pictures:
            what = "".join(f", {said}" for said in passed_over)
            raise cli.UsageError(f"--image: the folder {image} holds no pictures{what}")
        pairs = [(file, prompt.strip()) for file in folder.pictures]
    elif image.exists():
        pairs = [(image, prompt.strip())]
    else:
        raise cli.UsageError(f"--image: {image} does not exist: give a picture or a folder of them")
    asked = questions.name(pairs)

    checkpoints.read_config(checkpoint)
    if output.exists() and not output.is_dir():
        raise cli.UsageError(f"--output: {output} is a file: give the folder to write into")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass  # whatever keeps all answers from being written is said before the first
    precision = precision or precisions.default()
    identity = answers.identify(checkpoint, reasoning=reasoning, precision=precision)
    work = Work(
        output,
        identity,
        Processor.from_pretrained(checkpoint),
        inference.Generation.from_pretrained(checkpoint).max_new_tokens,
        reasoning,
    )
    if not overwrite:
        work.check_taken(asked)

    def so_far() -> str:
        answered = f"{work.answered} of {counted(len(asked), 'picture')}"
        return printable(f"{answered} done in {output}; the same command goes on")

    interrupts.tell(so_far)
    lens = None
    cli.announce(checkpoint, precision)
    with Bar(
        total=len(asked), unit="picture", dynamic_ncols=True, disable=len(asked) == 1
    ) as progress:
        for batch in work.batches(asked):
            if lens is None:
                lens = inference.Lens.from_pretrained(checkpoint, precision=precision)
            results = lens.segment_batch(
                [pixels for _, pixels, _ in batch],
                [question.prompt for question, *_ in batch],
                reasoning=reasoning,
            )
            for (question, pixels, fingerprint), result in zip(batch, results, strict=True):
                try:
                    with interrupts.held():
                        answer = answers.write(output, question, pixels, result, fingerprint)
                        work.count(question, answer)
                except OSError as error:
                    if error.errno in NO_MORE_ROOM:
                        message = f"{explain(error)} ({so_far()})"
                        raise cli.UsageError(message) from None
                    work.refuse(question, error)
            progress.update(work.answered + work.refused - progress.n)
        progress.update(len(asked) - progress.n)
    said = work.summary(passed_over)
    if len(asked) > 1 or not work.refused:
        print(printable(f"{said}: see {output}"))
    return 2 if work.refused else 0


@dataclasses.dataclass
class Work:
    """The questions so far: answered, answered before, refused."""

    output: Path
    identity: str
    processor: "Processor"
    max_new_tokens: int
    reasoning: bool
    answered: int = 0
    before: int = 0
    refused: int = 0
    counts: Counter[str | None] = dataclasses.field(default_factory=Counter)
    """What answers lack (None: nothing) -> how many do."""
    first: dict[str | None, str] = dataclasses.field(default_factory=dict)
    """The same -> the image of the first."""

    def check_taken(self, questions: Sequence["Question"]) -> None:
        """Raises UsageError if files of answers to other questions would be overwritten."""
        from lens_jax import answers
        from lens_jax.data.sample import SampleError

        taken = []
        for question in questions:
            if not answers.there(self.output, question):
                continue
            try:
                fingerprint = answers.fingerprint(question, self.identity)
                taken.append(answers.other(self.output, question, fingerprint))
            except (SampleError, OSError):
                continue  # `batches` says so
        if taken := [said for said in taken if said]:
            more = f" (and {len(taken) - 1} more of that kind)" if len(taken) > 1 else ""
            raise cli.UsageError(
                f"{taken[0]}{more}: give another --output, or --overwrite true to replace what is "
                "there"
            )

    def batches(
        self, questions: Sequence["Question"]
    ) -> Iterator[list[tuple["Question", "np.ndarray", str]]]:
        """Questions with pixels and fingerprints: those that can be asked and were not before."""
        from lens_jax import answers
        from lens_jax.data.arrays import read_picture
        from lens_jax.data.sample import SampleError
        from lens_jax.inference import check_length

        batch = []
        for question in interrupts.checked(questions):
            try:
                fingerprint = answers.fingerprint(question, self.identity)
                answers.check_room(self.output, question)
                if answer := answers.done(self.output, question, fingerprint):
                    self.count(question, answer)
                    self.before += 1
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

    def count(self, question: "Question", answer: Mapping[str, Any]) -> None:
        """Notes an answer (a STEM.json) that is there."""
        from lens_jax import answers

        lacks = answers.shortcoming(answer, self.max_new_tokens)
        self.answered += 1
        self.counts[lacks] += 1
        self.first.setdefault(lacks, question.image.name)

    def refuse(self, question: "Question", error: Exception) -> None:
        """Says why a question has no answer."""
        message = explain(error) if isinstance(error, OSError) else str(error)
        named = str(question.image)[:100] in message
        cli.complain(ValueError(message if named else f"{question.image}: {message}"))
        self.refused += 1

    def summary(self, passed_over: Sequence[str]) -> str:
        """All of them, counted; of what went wrong the first picture is named."""
        whole = self.counts.pop(None, 0)
        said = [f"{counted(whole, 'picture') if whole else 'no picture'} segmented"]
        for lacks, count in self.counts.most_common():
            more = ", ..." if count > 1 else ""
            said.append(f"{count} {lacks} ({self.first[lacks]}{more})")
        if self.before and len(said) == 1:
            said[0] += f" ({self.before} of them before)"
        elif self.before:
            said.append(f"{self.before} of all these before")
        if self.refused:
            said.append(f"{self.refused} refused")
        return ", ".join([*said, *passed_over])


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(predict, argv, prog="launch/predict.py", example=EXAMPLE)
