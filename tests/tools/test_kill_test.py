"""Kills come when they should: a script that only pretends to train is killed."""

import sys

from tools.kill_test import Victim

PRETENDS = """
import pathlib, shutil, sys, time
run = pathlib.Path(sys.argv[-1])
rows, place = run / "metrics.jsonl", run / "checkpoints" / "grpo"
place.mkdir(parents=True, exist_ok=True)
done = max([0, *(int(p.name) for p in place.iterdir() if p.name.isdecimal())])
lines = rows.read_text().splitlines()[:done] if rows.exists() else []
unfinished = run / "rows"
unfinished.write_text("".join(line + "\\n" for line in lines))
unfinished.replace(rows)
time.sleep(0.2)
for step in range(done + 1, 31):
    with rows.open("a") as file:
        file.write(f"{step}\\n")
    if step % 5 == 0:
        for left in place.glob("*-tmp"):
            shutil.rmtree(left)
            time.sleep(0.03)
        unfinished = place / f"{step}.orbax-checkpoint-tmp"
        unfinished.mkdir()
        time.sleep(0.1)
        (unfinished / "manifest.json").write_text("")
        unfinished.rename(place / str(step))
    time.sleep(0.02)
"""


def test_kills_of_every_kind(tmp_path):
    victim = Victim(tmp_path / "run", [])
    victim.command = [sys.executable, "-c", PRETENDS, str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    kill = victim.kill("start", 1, 0.02)
    assert (kill.step, kill.saved) == (0, 0)
    kill = victim.kill("step", 8, 0.0)
    assert kill.saved == 5 and 8 <= kill.step < 15
    # In the second save of each process; what it has left is begun again.
    for saved in (10, 15):
        kill = victim.kill("save", 2, 0.0)
        assert (kill.step, kill.saved) == (saved + 5, saved)
    # A kill before the first step comes with it at the latest.
    kill = victim.kill("start", 1, 60.0)
    assert 15 < kill.step < 20
    victim.finish()
    assert victim.saved() == 30
    assert victim.kill("save", 1, 0.0) is None
