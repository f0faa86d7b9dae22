"""Scenes drawn once for runs beside each other."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from lens_jax.data.sources import open_source
from lens_jax.preparation import scenes, shapes, shapes_refcoco

NUMBERS = {"train": 3, "val": 2}
REFS = "data/refer_seg/refcoco/refs(unc).p"


@pytest.fixture
def provide(tmp_path):
    def provide(name, seed=0, numbers=NUMBERS):
        (tmp_path / name).mkdir(exist_ok=True)
        return scenes.provide(tmp_path / name, numbers, seed)

    return provide


def test_runs_share_their_scenes_and_stay_whole(provide, tmp_path):
    assert "drawn into" in provide("a")
    assert "reused from" in provide("b")
    assert (tmp_path / "a" / REFS).samefile(tmp_path / "b" / REFS)
    (shared,) = (tmp_path / ".scenes").glob("*/manifest.json")
    for file in sorted(shared.parent.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    assert len(open_source("refcoco", "val", tmp_path / "b" / "data")) >= 2
    assert "those in" in provide("b")  # resumed
    assert "drawn into" in provide("c")
    assert not list(tmp_path.glob("*/.data.*"))


def test_they_are_what_a_run_alone_would_draw(provide, tmp_path):
    provide("a", seed=3)
    shapes_refcoco.write_refcoco(tmp_path / "alone", NUMBERS, seed=3)
    for file in (tmp_path / "alone").rglob("*.*"):
        same = tmp_path / "a" / "data" / file.relative_to(tmp_path / "alone")
        assert file.read_bytes() == same.read_bytes()


def test_other_settings_are_other_scenes(provide, tmp_path, monkeypatch):
    keys = {scenes._key(NUMBERS, 0), scenes._key(NUMBERS, 1), scenes._key({"train": 3}, 0)}
    monkeypatch.setattr(shapes, "__file__", __file__)  # another version of the drawing
    assert len(keys | {scenes._key(NUMBERS, 0)}) == 4
    provide("a")
    assert "drawn into" in provide("a", seed=1)  # begun anew, before its first update
    info = shapes_refcoco.drawn_in(tmp_path / "a" / "data")
    assert info["seed"] == 1


@pytest.mark.parametrize("damage", ["cut", "missing", "partial"])
def test_a_damaged_folder_is_not_used(provide, tmp_path, damage):
    provide("a")
    (refs,) = (tmp_path / ".scenes").glob("*/refer_seg/refcoco/refs*")
    content = refs.read_bytes()
    refs.unlink()
    if damage == "cut":
        refs.write_bytes(content[:-1])
    if damage == "partial":  # by a process that was killed
        (refs.parents[2] / "manifest.json").unlink()
    assert "drawn into" in provide("b")
    assert (tmp_path / "b" / REFS).read_bytes() == content


def test_concurrent_starts(provide, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(provide, "abcd"))
    assert sorted(text.split()[1] for text in said) == ["drawn", "reused", "reused", "reused"]
    assert len({(tmp_path / name / REFS).read_bytes() for name in "abcd"}) == 1


def test_copies_where_links_are_impossible(provide, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: os.stat("/no such file"))
    provide("a")
    assert (tmp_path / "a" / REFS).stat().st_nlink == 1


def test_a_run_draws_for_itself_where_it_cannot_share(provide, tmp_path):
    """The folder is another user's, whose files are not to be trusted."""
    (tmp_path / ".scenes").mkdir()
    os.chown(tmp_path / ".scenes", 1, -1) if os.getuid() == 0 else os.chmod(tmp_path / ".scenes", 0)
    assert "cannot be shared" in provide("a")
    assert shapes_refcoco.drawn_in(tmp_path / "a" / "data")["scenes"] == NUMBERS


def test_nothing_is_drawn_over_a_real_refcoco(provide, tmp_path):
    folder = tmp_path / "a" / "data" / "refer_seg" / "refcoco"
    folder.mkdir(parents=True)
    (folder / "instances.json").write_text(json.dumps({"info": {"description": "COCO 2014"}}))
    (folder / "refs(unc).p").write_bytes(b"mine")
    for call in (
        lambda: provide("a"),
        lambda: shapes_refcoco.write_refcoco(folder.parents[1], NUMBERS, 0),
    ):
        with pytest.raises(ValueError, match="not generated, and no scenes are drawn over it"):
            call()
    assert (folder / "refs(unc).p").read_bytes() == b"mine"
