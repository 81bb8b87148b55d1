"""Templates with `{% generation %}`: the characters that they call the assistant's.

transformers counts characters of the finished pieces of a rendering, which is wrong inside of a macro. Here the blocks
print marks at their ends, and what is left without the marks must be the plain rendering.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ...base.messages import BadRecord
from .characters import Spans

OPEN, CLOSE = "\ue0f1\ue0f3\ue0f1", "\ue0f1\ue0f4\ue0f1"  # private-use characters, as in chat.py
_COMMENT = r"\{#.*?#\}"
_BLOCK = re.compile(rf"{_COMMENT}|\{{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}}", re.DOTALL)


def has_markers(template: str) -> bool:
    """Whether a template says which characters are the assistant's; in a comment it does not."""
    return any(match[2] for match in _BLOCK.finditer(template))


def marked_spans(template: str, text: str, render: Callable[[str], str]) -> Spans:
    """Characters [start, end) of the blocks in `text`, which is the template's rendering; `render` renders another.

    Raises `BadRecord` if the blocks cannot be followed.
    """
    marked = render(_BLOCK.sub(_with_mark, template))
    spans: Spans = []
    plain, start, length = [], None, 0
    for piece in re.split(f"({OPEN}|{CLOSE})", marked):
        if piece == OPEN and start is None:
            start = length
        elif piece == CLOSE and start is not None:
            spans.append((start, length))
            start = None
        else:
            plain.append(piece)
            length += len(piece)
    if "".join(plain) != text or start is not None:
        raise BadRecord(
            "the chat template's generation markers cannot be followed (a filter changes what they enclose, or they "
            "are nested); put them around what the template prints"
        )
    return spans


def _with_mark(match: re.Match[str]) -> str:
    """Marks inside of the block; empty comments trim the white space around it as the block does."""
    left, kind, right = match[1], match[2], match[3]
    if kind is None:
        return match[0]
    if kind == "generation":
        return f"{{%{left} generation %}}{{{{ '{OPEN}' }}}}{{# {right}#}}"
    return f"{{#{left} #}}{{{{ '{CLOSE}' }}}}{{% endgeneration {right}%}}"
