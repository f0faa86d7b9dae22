"""Text rewards as the official code computes them: Python's `re` on the decoded completion.

It is part of benchmarks/rewards.py, whose --help says what is needed.
"""

import re
from typing import Any

NUMBER = r"(-?\d+(?:\.\d+)?)"
PAIR = rf"{NUMBER},\s*{NUMBER}"
BOXES = [
    rf"\[\s*{PAIR},\s*{PAIR}\s*\]",
    rf"\(\s*{PAIR},\s*{PAIR}\s*\)",
    rf"\(\s*{PAIR}\),\s*\(\s*{PAIR}\)",
]
THINK = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
GROUNDING = (
    r"<\|object_ref_start\|>.*?<\|object_ref_end\|><\|box_start\|>.*?<\|box_end\|><\|im_end\|>"
)


def expected(text: str) -> dict[str, Any]:
    """The findings of the official functions in a completion; `box` is four floats or None."""
    clean = text.replace("<|endoftext|>", "")
    matches = (re.search(form, clean) for form in BOXES)
    match = next(filter(None, matches), None)
    return {
        "think_format": bool(THINK.match(text)),
        "grounding_format": bool(re.match(GROUNDING, clean)),
        "grounding_format_reasoning": bool(re.match(r"<think>.*?</think>\n" + GROUNDING, clean)),
        "box": [float(number) for number in match.groups()] if match else None,
    }
