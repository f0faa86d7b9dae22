"""Names and values of keys: as YAML, side by side, and which of them a resumed run may change."""

import dataclasses
from typing import Any

import yaml

from lens_jax.config.sections import RunConfig

# Keys and sections that say where and how a run computes, not what: free to change on resuming.
FREE = (
    "run_dir",
    "resume",
    "attention",
    "remat",
    "max_skipped",
    "data.eval_batch_size",
    "data.max_bad",
    "mesh",
    "alignment.per_device_batch_size",
    "grpo.per_device_batch_size",
    "checkpoint",
    "distributed",
)


def dump_yaml(config: RunConfig) -> str:
    """All of a configuration, as a file that `--config` reads back to the same."""
    return yaml.safe_dump(_plain(config), sort_keys=False, default_flow_style=False)


def key_names() -> list[str]:
    """The dotted names of all keys."""
    return list(leaves(RunConfig()))


def leaves(config: RunConfig) -> dict[str, Any]:
    """The value of every key, by its dotted name."""
    return flatten(_plain(config))


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Dotted keys in which two runs differ, those of `FREE` apart."""
    left, right = leaves(a), leaves(b)
    return [key for key in left if left[key] != right[key] and not _is_free(key)]


def _is_free(key: str) -> bool:
    return key in FREE or key.split(".")[0] in FREE


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary with dotted keys in place of nesting."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
