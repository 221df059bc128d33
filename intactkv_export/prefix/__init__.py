"""The prefix: a system prompt becomes tokens; their K and V become an `.ikv`, which is read back verified."""

from intactkv_export.prefix import embedding, ikv, inspection, outputs
from intactkv_export.prefix.chat_template import (
    Rendering,
    Template,
    asks_clock,
    chat_template_of,
    checked_tools,
    date_variables,
    from_json,
    of_prefix,
    with_date,
)
from intactkv_export.prefix.ikv import Prefix, check_reference, of_model, run_settings
from intactkv_export.prefix.manifest import BEHIND, EXTRA, IN_SIGHT, MAX_EXTRA, has_windows
from intactkv_export.prefix.prompt import (
    Prompt,
    check_prefix_tokens,
    check_prompt,
    first_tokens,
    make_prompt,
    prompt_for,
)

__all__ = [
    "BEHIND", "EXTRA", "IN_SIGHT", "MAX_EXTRA", "Prefix", "Prompt", "Rendering", "Template", "asks_clock",
    "chat_template_of", "check_prefix_tokens", "check_prompt", "check_reference", "checked_tools", "date_variables",
    "embedding", "first_tokens", "from_json", "has_windows", "ikv", "inspection", "make_prompt", "of_model",
    "of_prefix", "outputs", "prompt_for", "run_settings", "with_date",
]  # fmt: skip
