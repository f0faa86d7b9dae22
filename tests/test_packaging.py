"""What pyproject.toml asks for, and the versions that constraints.txt pins."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(python: str) -> dict[str, str]:
    """Name -> pinned version, for a version of Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(r.url is None and len(r.specifier) == 1 for r in requirements)
    applies = [
        r for r in requirements if r.marker is None or r.marker.evaluate(environment(python))
    ]
    assert len({canonicalize_name(r.name) for r in applies}) == len(applies)
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in applies}


def environment(python: str) -> dict[str, str]:
    return {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_is_pinned_to_a_version_that_it_allows(python):
    extras = [PROJECT["optional-dependencies"][name] for name in ("test", "tpu", "tfds")]
    asked = [Requirement(line) for line in sum(extras, PROJECT["dependencies"])]
    pinned = pins(python)
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            name = canonicalize_name(requirement.name)
            assert name == "lens-jax" or requirement.specifier.contains(pinned[name]), requirement


def test_python_3_11_keeps_below_what_needs_3_12():
    """jax 0.11 and flax 0.12.9 ask for Python 3.12; jax from 0.11.1 on asks for flax 0.12.9."""
    old, new = pins("3.11"), pins("3.12")
    assert old["jax"].startswith("0.10.") and old["flax"] == "0.12.8"
    assert new["jax"].startswith("0.12.") and new["flax"] == "0.12.12"
