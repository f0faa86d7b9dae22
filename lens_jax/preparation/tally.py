"""Counts of findings in a data set, each with its first place."""

from lens_jax.files import printable


class Tally:
    """Counts of what is added, each with the text that came with its first one."""

    def __init__(self):
        self._counts: dict[str, tuple[int, str]] = {}

    def add(self, what: str, text: str) -> None:
        count, first = self._counts.get(what, (0, printable(text)))
        self._counts[what] = (count + 1, first)

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, how often, the first one's text), the most frequent first."""
        return sorted(((k, *v) for k, v in self._counts.items()), key=lambda row: -row[1])
