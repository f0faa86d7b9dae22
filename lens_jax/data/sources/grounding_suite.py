"""GroundingSuite-Eval: one object a line, with a box and a run-length encoded mask.

DATA_DIR/GroundingSuite-Eval.jsonl    {"image_path", "caption", "box", "segmentation", ...}
DATA_DIR/coco/unlabeled2017/<image_path>
"""

import json
from pathlib import Path

import numpy as np

from lens_jax.data.sample import Sample, SampleError, read_image
from lens_jax.data.sources.refcoco import summed_mask

FILE = "GroundingSuite-Eval.jsonl"
IMAGE_FOLDER = "coco/unlabeled2017"


class GroundingSuite:
    """The whole file, which has no splits, in its order.

    Args:
        data_dir: the folder that holds GroundingSuite-Eval.jsonl and coco/.
        evaluation: captions as the official evaluation asks them, else as its training does.

    Raises:
        FileNotFoundError, ValueError: the file is not there, or cannot be read.
    """

    def __init__(self, data_dir: str | Path, *, evaluation: bool = False):
        self.evaluation = evaluation
        file = Path(data_dir) / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: data_dir must hold it, beside coco/")
        self.image_folder = Path(data_dir) / IMAGE_FOLDER
        self.rows = []
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["caption"] + row["image_path"], row["segmentation"]
                if np.asarray(row["box"], float).shape != (4,):
                    raise ValueError("`box` must hold 4 numbers")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: line {number} is broken ({error})") from error
            self.rows.append(row)
        self.num_expressions = [1] * len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        path = self.image_folder / row["image_path"]
        image = read_image(path)
        try:
            mask = summed_mask(row["segmentation"], *image.shape[:2]) > 0
        except (ValueError, TypeError, OverflowError) as error:
            raise SampleError(f"{path}: object {index + 1} has a broken mask ({error})") from error
        return Sample(
            image=image,
            expressions=(question(row["caption"], self.evaluation),),
            mask=mask,
            box=np.array(row["box"], np.float64),
            ref_id=index,
            image_id=index,
            image_path=str(path),
        )


def question(caption: str, evaluation: bool) -> str:
    """A caption as the official code asks it.

    Training puts it in quotes. Evaluation deletes "is" and "are" wherever they stand, even inside
    of words, and then lower-cases it, so that "Is" and "Are" stay.
    """
    if not evaluation:
        return f'"{caption}"'
    return caption.replace("is", "").replace("are", "").lower()
