"""What a terminal would obey in a text that came from elsewhere: shown, not sent.

Models, prefix files and their names are downloaded, and a model can reply anything. A control character in them could
move the cursor over what was printed before, set the window's title, or reorder a line (CVE-2021-42574).
"""

from __future__ import annotations

import re

# C0 without tab and line break, DEL, C1, line and paragraph separators, and what reorders bidirectional text. Marks of
# direction (U+200E, U+200F) stay: they belong into Arabic and Hebrew, and reorder nothing beyond themselves.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    r"""The text with its control characters written out, as \x1b or \u202e; line breaks and tabs stay."""
    return _OBEYED.sub(_written, text.replace("\r\n", "\n"))


def shown_in_json(text: str) -> str:
    """JSON that gives the same values, its control characters written out as JSON writes them."""
    return _OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _written(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
