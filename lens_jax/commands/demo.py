"""A web page to try a checkpoint on: `python launch/demo.py --help`."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lens_jax import interrupts, progress
from lens_jax.commands import cli
from lens_jax.flags import PositiveInt

EXAMPLE = """\
  python launch/demo.py --checkpoint runs/tiny/final
  python launch/demo.py --checkpoint lens --host 0.0.0.0 --port 8080"""

EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTIONS = (
    ("circles.jpg", "the large green circle"),
    ("circles.jpg", "the green triangle"),
    ("squares.jpg", "the blue square above the red circle"),
)
# Small pictures are shown as large as large ones, and none lies under its label.
STYLE = """
#picture img, #overlay img {
  width: 100%; height: 100%; object-fit: contain; padding-top: 26px; box-sizing: border-box;
}"""


def demo(
    checkpoint: Path,
    host: str = "127.0.0.1",
    port: PositiveInt = 7860,
    precision: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Serves a page: picture and sentence in; mask, box and completion out.

    It is served to this machine alone. On another --host, whoever reaches it may use it.

    Needs Gradio: pip install -e ".[demo]", or pip install gradio.

    Args:
        checkpoint: A pretrained checkpoint, such as runs/tiny/final.
        host: The address to listen on; 0.0.0.0 for all of the machine's.
        port: The port to listen on.
        precision: Of matrix products; float32 on CPU and bfloat16 elsewhere if not given.
    """
    from lens_jax import checkpoints, inference
    from lens_jax.models import precision as precisions

    checkpoints.read_config(checkpoint)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise cli.UsageError(
            'the page needs Gradio: run pip install -e ".[demo]" or pip install gradio'
        ) from None
    precision = precision or precisions.default()
    cli.announce(checkpoint, precision)
    lens = inference.Lens.from_pretrained(checkpoint, precision=precision)
    with tempfile.TemporaryDirectory(prefix="lens-demo-") as folder:
        page = build(lens, checkpoint.resolve().parent.name, Path(folder))
        try:
            serve(page, Path(folder), host, port)
        except OSError as error:
            raise cli.UsageError(
                f"{host}:{port} is in use, or no address of this machine: give another --port or "
                "--host"
            ) from error
        print(f"{page.local_url} until Ctrl-C", flush=True)
        interrupts.tell(lambda: "the page is served no more")
        try:
            while page.is_running:
                time.sleep(0.1)
        finally:
            page.close(verbose=False)


def serve(page, folder: Path, host: str, port: int) -> None:
    """Serves `page`, whose answers lie in `folder`, until it is closed."""
    page.launch(
        server_name=host,
        server_port=port,
        allowed_paths=[str(folder)],
        show_error=True,
        css=STYLE,
        quiet=True,
        prevent_thread_lock=True,
    )


def build(lens, name: str, folder: Path):
    """The page for a model; answers are written into folders of their own below `folder`."""
    import gradio

    from lens_jax import answers
    from lens_jax.data.arrays import read_picture
    from lens_jax.data.questions import Question
    from lens_jax.data.sample import SampleError
    from lens_jax.data.sources import annotations
    from lens_jax.files import explain

    busy = threading.Lock()  # one question at a time: the model fills its device

    def refusal(title: str, message: str) -> gradio.Error:
        """The error that a visitor sees; the log has it in one line, without a traceback."""
        progress.write(f"refused: {message}")
        return gradio.Error(message, title=title, print_exception=False)

    def answer(file: str | None, sentence: str, reasoning: bool):
        if not file:
            raise refusal("No picture", "Choose a picture first.")
        try:
            annotations.sentence(sentence or "", "the sentence")
        except ValueError as error:
            raise refusal("No sentence", f"Say what to segment: {error}.") from None
        image = Path(file)
        try:
            pixels = read_picture(image)
            with busy:
                result = lens.segment(pixels, sentence.strip(), reasoning=reasoning)
        except (SampleError, ValueError) as error:
            reason = str(error).removeprefix(f"{image}: ")
            raise refusal("This cannot be asked", f"{image.name}: {reason}") from None
        question = Question(Path(image.name), sentence.strip(), image.stem)
        try:
            place = Path(tempfile.mkdtemp(dir=folder))
            written = answers.write(place, question, pixels, result)
        except OSError as error:
            raise refusal("The answer cannot be kept", explain(error)) from None
        overlay, mask, text = (
            str(place / f"{image.stem}.{end}") for end in ("overlay.png", "mask.png", "json")
        )
        _forget(folder, keep=50)
        box = "none" if result.box is None else ", ".join(f"{v:.1f}" for v in result.box)
        state = answers.shortcoming(written, lens.generation.max_new_tokens) or "segmented"
        if warning := lens.processor.unfamiliar(pixels.shape[:2]):
            state += f"; {warning}"
        return overlay, result.completion, state, box, mask, text

    # Uploads are deleted after an hour, or at the end.
    with gradio.Blocks(
        title=f"LENS: {name}", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gradio.Markdown("# LENS\nA picture and a sentence in; what the sentence describes out.")
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(
                    label="Picture",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=["fullscreen"],
                    height=320,
                    elem_id="picture",
                )
                # The file as it came: `answer` says what is wrong with one that is no picture.
                picture.preprocess = lambda upload: upload and upload.path
                sentence = gradio.Textbox(
                    label="Sentence", placeholder="the red circle on the left", elem_id="sentence"
                )
                reasoning = gradio.Checkbox(label="Think before answering (reasoning)")
                ask = gradio.Button("Segment", variant="primary", elem_id="segment")
            with gradio.Column():
                overlay = gradio.Image(
                    label="Mask and box",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    height=320,
                    elem_id="overlay",
                )
                completion = gradio.Textbox(label="Completion", elem_id="completion")
                state = gradio.Textbox(label="What came of it", elem_id="state")
                box = gradio.Textbox(label="Box: x0, y0, x1, y1 in pixels", elem_id="box")
                with gradio.Row():
                    mask = gradio.DownloadButton("Mask (PNG)", elem_id="mask")
                    text = gradio.DownloadButton("Answer (JSON)", elem_id="json")
        gradio.Examples(
            [[str(EXAMPLES / file), words] for file, words in QUESTIONS], [picture, sentence]
        )
        given, shown = [picture, sentence, reasoning], [overlay, completion, state, box, mask, text]
        ask.click(answer, given, shown, api_name="segment")
        sentence.submit(answer, given, shown, api_name=False)
    return page


def _forget(folder: Path, keep: int) -> None:
    """Deletes all but the newest answers."""
    answers = sorted(folder.iterdir(), key=lambda place: place.stat().st_mtime_ns)
    for place in answers[:-keep]:
        shutil.rmtree(place, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(demo, argv, prog="launch/demo.py", example=EXAMPLE)
