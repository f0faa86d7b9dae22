"""GroundingSuite-Eval: one object a line, with a box and a run-length encoded mask.

DATA_DIR/GroundingSuite-Eval.jsonl    {"image_path", "caption", "box", "segmentation", ...}
DATA_DIR/coco/unlabeled2017/<image_path>

Boxes and masks speak for the pixels as they are stored, for the official code reads them so;
samples hold stored pixels, whatever EXIF says.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lens_jax.data.sample import Sample, SampleError, read_image
from lens_jax.data.sources.annotations import fitting_box, inside, numbers, sentence, short
from lens_jax.data.sources.refcoco import summed_mask

FILE = "GroundingSuite-Eval.jsonl"
IMAGE_FOLDER = "coco/unlabeled2017"


@dataclasses.dataclass(frozen=True)
class SuiteRow:
    """A line of the file before its image is read; `error` says why it cannot be used."""

    line: int
    image_path: str = ""
    caption: str = ""
    box: tuple[float, ...] | None = None  # xyxy; None: nothing is meant
    segmentation: Any = None
    error: str | None = None


class GroundingSuite:
    """The whole file, which has no splits, in its order. A broken line raises when asked for.

    Args:
        data_dir: the folder that holds GroundingSuite-Eval.jsonl and coco/.
        evaluation: captions as the official evaluation asks them, else as its training does.
        official_masks: where an object's parts overlap, count the overlap as background, as the
            official evaluation does.

    Raises:
        FileNotFoundError, ValueError: the file is not there, or is no text.
    """

    def __init__(
        self, data_dir: str | Path, *, evaluation: bool = False, official_masks: bool = False
    ):
        self.evaluation, self.official_masks = evaluation, official_masks
        self.file = Path(data_dir) / FILE
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is missing: data_dir must hold it, beside coco/")
        self.image_folder = Path(data_dir) / IMAGE_FOLDER
        try:
            text = self.file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file}: its text is not UTF-8 ({error})") from error
        lines = enumerate(text.split("\n"), 1)
        self.rows = [_row(line, number, evaluation) for number, line in lines if line.strip()]
        self.num_expressions = [1] * len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        where = f"{self.file}: line {row.line} is broken"
        if row.error is not None:
            raise SampleError(f"{where} ({row.error})")
        path = self.image_folder / row.image_path
        image = read_image(path, pixels="stored")
        try:
            mask = summed_mask(row.segmentation, *image.shape[:2])
            box = fitting_box(row.box, mask > 0, "box")
        except (ValueError, TypeError, OverflowError) as error:
            raise SampleError(f"{where} ({error}; its picture is {path})") from error
        return Sample(
            image=image,
            expressions=(question(row.caption, self.evaluation),),
            mask=mask == 1 if self.official_masks else mask > 0,
            box=box,
            ref_id=index,
            image_id=index,
            image_path=str(path),
        )


def _row(line: str, number: int, evaluation: bool) -> SuiteRow:
    try:
        content = json.loads(line)
        if not isinstance(content, dict):
            raise ValueError(f"it must be a JSON object, not {short(content)}")
        caption = sentence(content.get("caption"), "caption")
        sentence(question(caption, evaluation), 'caption without "is" and "are"')
        inside(Path(), content.get("image_path"), "image_path")
        box, segmentation = (content[key] for key in ("box", "segmentation"))
        box = None if box is None else numbers(box, 4, "box")
        return SuiteRow(number, content["image_path"], caption, box, segmentation)
    except KeyError as key:
        return SuiteRow(number, error=f"{key} is missing")
    except (ValueError, RecursionError) as error:
        return SuiteRow(number, error=str(error))


def question(caption: str, evaluation: bool) -> str:
    """A caption as the official code asks it.

    Training puts it in quotes. Evaluation deletes "is" and "are" wherever they stand, even inside
    of words, and then lower-cases it, so that "Is" and "Are" stay.
    """
    if not evaluation:
        return f'"{caption}"'
    return caption.replace("is", "").replace("are", "").lower()
