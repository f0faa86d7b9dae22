"""The rows of a global batch that a process holds."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of a global batch that one process holds: these of its `count` equal parts."""

    parts: tuple[int, ...] = (0,)
    count: int = 1
    repeated: tuple[int, ...] = ()
    """The parts that a process before this one holds as well: not to be counted twice."""

    @property
    def whole(self) -> bool:
        return len(self.parts) == self.count
