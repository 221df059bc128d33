"""The day that a chat template writes: today's, or one that was chosen, so that a prefix can go beyond it.

Templates ask for it in two ways. date_string and datetime are variables, which a request can give. strftime_now() is a
function of the server's own that asks the clock: there the day is written into the template.
"""

from __future__ import annotations

import re
from datetime import date, datetime, time
from typing import Any

from intactkv_export.errors import UsageError

_CALL = re.compile(r"\bstrftime_now\s*\(\s*(?:'([^'\\]*)'|\"([^\"\\]*)\")\s*\)")
_ANY_CALL = re.compile(r"\bstrftime_now\s*\(")


def checked_date(given: object) -> date | None:
    """The day that a user chose, YYYY-MM-DD or a date; None: none. Raises UsageError for anything else."""
    if given is None or (isinstance(given, date) and not isinstance(given, datetime)):
        return given
    try:
        if not isinstance(given, str) or not re.fullmatch(r"[1-9]\d{3}-\d\d-\d\d", given, re.ASCII):
            raise ValueError
        return date.fromisoformat(given)
    except ValueError:
        raise UsageError(
            f"the date is {str(given)[:50]!r}: give a day of the calendar without time and time zone, as 2026-11-26"
        ) from None


def beginning(day: date) -> datetime:
    """Its first moment: the time of day that templates get."""
    return datetime.combine(day, time.min)


def date_variables(now: date) -> dict[str, str]:
    """What llama.cpp's server gives every template, as chat_template_kwargs of a request could."""
    return {"datetime": now.strftime("%b %d %Y"), "date_string": now.strftime("%d %b %Y")}


def with_date(template: str, day: date) -> str:
    """The template with the day written into it, for a server that would ask the clock. Its calls of strftime_now
    become texts. Raises UsageError where a call says its format in another way than by a text."""
    now = beginning(day)

    def text(match: re.Match[str]) -> str:
        quote = "'" if match[2] is None else '"'
        return f"{quote}{now.strftime(match[1] if match[2] is None else match[2])}{quote}"

    made = _CALL.sub(text, template)
    if _ANY_CALL.search(made):
        raise UsageError(
            "the model's chat template computes how it writes the date, so llama-server cannot be given another day: "
            "leave out the date"
        )
    return made


def asks_clock(template: str) -> bool:
    """Whether it calls strftime_now."""
    return _ANY_CALL.search(template) is not None


def to_text(day: date | None) -> dict[str, Any]:
    """The field of a manifest; none: no field."""
    return {} if day is None else {"date": day.isoformat()}
