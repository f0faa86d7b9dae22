"""Compiles a run's programs for a TPU slice without one: `python launch/compile.py --help`."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lens_jax.commands import cli
from lens_jax.flags import Parser, PositiveInt

ROOT = Path(__file__).resolve().parents[2]

EXAMPLE = """\
  python launch/compile.py --config configs/lens_3b_refcoco.yaml --topology v5e:4x4 \\
      --output refcoco_v5e.json --grpo.per_device_batch_size 2
  python launch/compile.py --suggest v5e,v5p,v6e"""

Stage = Literal["alignment", "grpo", "evaluation"]


def compile_for(
    overrides: Sequence[str],
    config: Path | None = None,
    topology: str | None = None,
    suggest: str | None = None,
    slices: PositiveInt = 1,
    output: Path | None = None,
    stage: Stage | None = None,
    program: str = "",
    hlo_dir: Path | None = None,
) -> int:
    """Compiles the programs of a run for a TPU slice, without one, and says whether they fit.

    Further flags are keys of the configuration, as for launch/train.py.

    Args:
        config: The run's YAML file; --topology needs it.
        topology: The slice: v5e:4x4, v5p:2x2x4, v6e:8x8, ...
        suggest: In place of --topology: prints the smallest slice of each of these chips that fits,
            as v5e,v5p,v6e; without --config, for every recipe in configs/.
        slices: How many of it; mesh.data goes over them.
        output: Where the report is written as JSON.
        stage: Only this one; if not given, the stages that run, and evaluation.
        program: Only programs whose name begins so, as grpo.rollout.
        hlo_dir: Where the scheduled HLO of each is written.
    """
    from lens_jax import config as configuration

    if (topology is None) == (suggest is None):
        raise cli.UsageError("give one of --topology and --suggest")
    if topology and not config:
        raise cli.UsageError("give --config, the run to compile")
    stages = [stage] if stage else list(get_args(Stage))

    def load(file: Path) -> configuration.RunConfig:
        return configuration.load(["--config", str(file), *overrides])

    if suggest:
        if output or program or hlo_dir or slices > 1:
            raise cli.UsageError("--suggest prints; beside it --config and --stage alone count")
        files = [config] if config else sorted((ROOT / "configs").glob("lens_*"))
        runs = {file: load(file) for file in files}
        if len(files) > 1 and stage:
            runs = {file: run for file, run in runs.items() if has(run, stage)}
        families = suggest.split(",")
        found = [smallest(f, run, family, stages) for f, run in runs.items() for family in families]
        return 0 if all(found) else 1
    run = load(config)
    if output:  # before minutes are spent on what could not be written
        cli.check_writable(output)
    report = compile_run(run, topology, stages, slices=slices, only=program, hlo_dir=hlo_dir)
    print(table(report))
    if output:
        output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["fits"] else 1


def make_parser() -> Parser:
    """The flags of this command; keys of the configuration become `overrides`."""
    from lens_jax.config import key_names

    return cli.parser_of(
        compile_for,
        prog="launch/compile.py",
        example=EXAMPLE,
        skip=["overrides"],
        others=[f"--{key}" for key in key_names()],
    )


def main(argv: Sequence[str] | None = None) -> int:
    # libtpu is only asked to compile, and JAX to compute nothing.
    os.environ["JAX_PLATFORMS"] = "cpu"
    return cli.call(compile_for, make_parser(), argv)


def has(config: Any, stage: str) -> bool:
    """Whether a run has any step of a stage; it always evaluates."""
    return stage == "evaluation" or getattr(config, stage).steps > 0


def compile_run(
    config: Any,
    topology: str,
    stages: Sequence[str],
    *,
    slices: int = 1,
    only: str = "",
    hlo_dir: Path | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """The report that --output writes.

    Args:
        slices: how many slices of that topology.
        only: programs whose name begins so.
        hlo_dir: where their scheduled HLO is written.
        quick: without updates of shorter completions, which take less than that of the longest,
            only until a program does not fit, and without compiling what cannot.
    """
    from lens_jax.aot import tpu
    from lens_jax.aot.compiling import compile_program, make_mesh, suggestions
    from lens_jax.aot.run_models import model_shapes, texts
    from lens_jax.aot.run_programs import list_programs
    from lens_jax.training import programs

    chip = tpu.chip(topology)
    mesh = make_mesh(topology, config, slices)
    rows, names = [], []
    with programs.precision(config):
        listed = list_programs(config, model_shapes(config), mesh, stages=stages, **texts(config))
        for program in listed:
            names.append(program.name)
            if not program.name.startswith(only) or (quick and program.shorter):
                continue
            if not rows:
                cli.announce(f"for {topology}", config.run_dir, config.precision)
            begin = time.monotonic()
            print(f"compiling {program.name} for {topology} ...", file=sys.stderr, flush=True)
            row, compiled = compile_program(program, mesh, chip, hopeless=not quick)
            print(f"  {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
            advice = [] if row.fits else suggestions(config, mesh, program.name)
            rows.append(dataclasses.asdict(row) | {"suggestions": advice})
            if hlo_dir and compiled:
                hlo_dir.mkdir(parents=True, exist_ok=True)
                (hlo_dir / f"{program.name}.txt").write_text(compiled)
            if quick and not row.fits:
                break
    if not rows:
        what = ", ".join(names) if names else f"no step of {' and '.join(stages)}"
        raise cli.UsageError(f"nothing to compile for {topology}: the run has {what}")
    return {
        "topology": topology,
        "slices": slices,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "fits": all(row["fits"] for row in rows),
        "programs": rows,
    }


def smallest(file: Path, config: Any, family: str, stages: Sequence[str]) -> dict[str, Any] | None:
    """Prints, and returns the report of, the smallest slice of a kind of chip that a run fits."""
    from lens_jax.aot import tpu
    from lens_jax.config import ConfigError

    if family not in tpu.SLICES:
        raise tpu.TopologyError(f"{family}: --suggest knows {', '.join(tpu.SLICES)}")
    for grid in tpu.SLICES[family]:
        try:
            report = compile_run(config, f"{family}:{grid}", stages, quick=True)
        except ConfigError as error:
            print(f"{file}: {family}:{grid}: {error}")
            continue
        if report["fits"]:
            most = max(row["resident_bytes_per_chip"] for row in report["programs"])
            print(
                f"{file}: {family}:{grid} ({report['chips']} chips) is the smallest that fits, "
                f"{most / 1e9:.1f} GB on a chip"
            )
            return report
    print(f"{file}: fits no slice of {family}")
    return None


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    rows = report["programs"]
    kinds = [*dict.fromkeys(kind for row in rows for kind in row["resident"])]
    kinds = [kind for kind in kinds if any(row["resident"].get(kind) for row in rows)]
    memory = [["GB on a chip while it runs", *kinds, "sum", "of", ""]]
    work = [
        ["of one chip", "TFLOP", "HBM GB", "collectives GB", "estimated ms", "MFU at most",
         "compiled in s"]
    ]  # fmt: skip
    giga = lambda x, digits=2: "" if x is None else f"{x / 1e9:.{digits}f}"  # noqa: E731
    for row in rows:
        memory.append(
            [
                row["name"],
                *(giga(row["resident"].get(kind)) for kind in kinds),
                giga(row["resident_bytes_per_chip"]),
                giga(row["hbm_limit"]),
                "" if row["fits"] else "DOES NOT FIT",
            ]
        )
        time_, bound = row["estimated_ms"], row["model_flops_utilisation_bound"]
        work.append(
            [
                row["name"],
                f"{row['flops_per_chip'] / 1e12:.1f}",
                giga(row["traffic_bytes_per_chip"], 1),
                giga(row["collective_bytes_per_chip"]),
                "" if time_ is None else f"{time_:.0f}",
                "" if bound is None else f"{bound:.2f}",
                f"{row['compile_seconds']:.0f}",
            ]
        )
    several = f"{report['slices']} x " if report["slices"] > 1 else ""
    lines = [f"{several}{report['topology']}: {report['chips']} chips, {mesh}", ""]
    lines += [cli.table(memory)]
    lines += ["", cli.table(work)]
    for row in rows:
        lines += [f"{row['name']} does not fit: try {x}" for x in row["suggestions"]]
    return "\n".join(lines)
