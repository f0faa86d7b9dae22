"""launch/demo.py in a browser: open, type, click, and look at what appears."""

import json
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from PIL import Image

from lens_jax import answers, progress
from lens_jax.commands import demo
from lens_jax.inference import Lens

PICTURE = demo.EXAMPLES / demo.QUESTIONS[0][0]


def test_examples_are_small_pictures():
    for file, sentence in demo.QUESTIONS:
        assert sentence and (demo.EXAMPLES / file).stat().st_size < 20_000


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A page on a free port, and the browser's view of it.

    LENS_DEMO_CHECKPOINT names a trained checkpoint for a screenshot, which LENS_DEMO_SCREENSHOT
    says where to write.
    """
    needed = "pip install -e '.[browser]' brings it"
    pytest.importorskip("gradio", reason=f"gradio is not installed: {needed}")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason=f"playwright is not installed: {needed}"
    )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("answers")

    def serve(checkpoint: Path):
        page = demo.build(Lens.from_pretrained(checkpoint), "test", folder)
        demo.serve(page, folder, "127.0.0.1", port)
        return page

    with playwright.sync_playwright() as driver:
        names = ("chromium", "chromium-browser", "google-chrome", driver.chromium.executable_path)
        chromium = next(filter(None, map(shutil.which, names)), None)
        if chromium is None:
            pytest.skip("no Chromium is installed: playwright install chromium brings one")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1000, "height": 980})
        view.set_default_timeout(120_000)
        yield serve, view, f"http://127.0.0.1:{port}"
        browser.close()


def test_open_type_click(site, checkpoint, tmp_path, monkeypatch):
    serve, view, address = site
    logged = []  # the server's threads outlive what pytest captures
    monkeypatch.setattr(progress, "write", logged.append)
    monkeypatch.setattr(traceback, "print_exc", lambda *_, **__: logged.append("Traceback"))
    trained = os.environ.get("LENS_DEMO_CHECKPOINT")
    page = serve(Path(trained) if trained else checkpoint)
    try:
        view.goto(address)
        segment = view.locator("#segment")
        segment.click()
        view.get_by_text("Choose a picture first.").wait_for()

        wrong = tmp_path / "wrong.png"
        wrong.write_bytes(b"this is no picture")
        upload = view.locator("input[type=file]").first
        sentence = view.locator("#sentence textarea, #sentence input")
        upload.set_input_files(PICTURE)
        view.locator(
            "button[aria-label='Remove Image'], button[aria-label='Clear']"
        ).first.wait_for()
        segment.click()
        view.get_by_text("the sentence is empty").wait_for()

        sentence.fill(demo.QUESTIONS[0][1])
        segment.click()
        view.locator("#overlay img").wait_for()
        completion = view.locator("#completion textarea")
        view.wait_for_function(
            "document.querySelector('#box textarea, #box input').value.length > 0"
        )
        assert "Traceback" not in view.content()
        with view.expect_download() as download:
            view.locator("#json").click()
        answer = json.loads(Path(download.value.path()).read_text())
        assert answer["prompt"] == demo.QUESTIONS[0][1]
        assert completion.input_value() == answer["completion"]
        assert view.locator("#state textarea, #state input").input_value() == (
            answers.shortcoming(answer, 12) or "segmented" if not trained else ANY
        )
        with view.expect_download() as download:
            view.locator("#mask").click()
        with Image.open(download.value.path()) as mask, Image.open(PICTURE) as picture:
            assert mask.size == picture.size
            assert int((np.asarray(mask) == 255).sum()) == answer["mask_area"]
        if file := os.environ.get("LENS_DEMO_SCREENSHOT"):
            view.get_by_text("the sentence is empty").wait_for(state="hidden")
            view.screenshot(path=file)

        view.locator("button[aria-label='Remove Image'], button[aria-label='Clear']").first.click()
        view.locator("input[type=file]").first.set_input_files(wrong)
        view.wait_for_timeout(500)
        segment.click()
        view.get_by_text("not a readable picture").wait_for()
        assert "refused: Choose a picture first." in logged and "Traceback" not in logged
    finally:
        page.close()


def test_mistakes_are_one_line(refused, tmp_path):
    assert "no checkpoint there" in refused(demo.main, "--checkpoint", tmp_path / "nowhere")
    assert "did you mean --port" in refused(demo.main, "--checkpoint", tmp_path, "--prot", 3)
    assert "--port: expected a whole number" in refused(
        demo.main, "--checkpoint", tmp_path, "--port", "x"
    )


def test_without_gradio_one_line_says_how_to_get_it(refused, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in refused(demo.main, "--checkpoint", checkpoint)


def test_a_taken_port_is_one_line(checkpoint, monkeypatch, capsys):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    with gradio.Blocks(analytics_enabled=False) as page:
        pass
    monkeypatch.setattr(Lens, "from_pretrained", lambda directory, **_: None)
    monkeypatch.setattr(demo, "build", lambda *_: page)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo.main(["--checkpoint", str(checkpoint), "--port", str(port)]) == 2
    start, error = capsys.readouterr().err.splitlines()
    assert start.startswith("lens-jax: ") and error.startswith("error: ")
    assert f"127.0.0.1:{port} is in use" in error and "--port" in error
