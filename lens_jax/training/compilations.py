"""Counts the programs that a run compiles.

Shapes are padded to buckets, so each program is compiled once a bucket and a step after warm-up
compiles nothing.
"""

from collections import Counter

import jax

from lens_jax.progress import counted

# What JAX calls the event; it also comes when the program is found in the persistent cache.
_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts the programs compiled while it is open, by name; a context manager."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.by_name: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self.by_name.total()

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, seconds: float, **details: str | int) -> None:
        if event == _EVENT:
            self.seconds += seconds
            self.by_name[str(details.get("fun_name"))] += 1

    def __str__(self) -> str:
        return f"{counted(self.count, 'program')} compiled or loaded, in {self.seconds:.0f} s"
