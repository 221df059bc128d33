"""Chat templates: rendered as llama.cpp's server does, with tools, arguments and a date; as the prefix was."""

from intactkv_export.prefix.chat_template.day import asks_clock, checked_date, date_variables, with_date
from intactkv_export.prefix.chat_template.rendering import Rendering, checked_tools, from_json
from intactkv_export.prefix.chat_template.template import (
    BOS_ONLY,
    DATE,
    Template,
    chat_template_of,
    of_prefix,
    system_messages,
)

__all__ = [
    "BOS_ONLY", "DATE", "Rendering", "Template", "asks_clock", "chat_template_of", "checked_date", "checked_tools",
    "date_variables", "from_json", "of_prefix", "system_messages", "with_date",
]  # fmt: skip
