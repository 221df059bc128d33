"""The prefix: a system prompt becomes tokens; their K and V become an `.ikv`, which is read back verified."""

from intactkv_export.prefix import embedding, ikv, inspection, outputs
from intactkv_export.prefix.ikv import Prefix, check_reference, of_model
from intactkv_export.prefix.manifest import EXTRA, MAX_EXTRA
from intactkv_export.prefix.prompt import (
    Prompt,
    Template,
    check_prefix_tokens,
    check_prompt,
    first_tokens,
    make_prompt,
    prompt_for,
)
from intactkv_export.prefix.run_settings import run_settings

__all__ = [
    "EXTRA", "MAX_EXTRA", "Prefix", "Prompt", "Template", "check_prefix_tokens", "check_prompt", "check_reference",
    "embedding", "first_tokens", "ikv", "inspection", "make_prompt", "of_model", "outputs", "prompt_for",
    "run_settings",
]  # fmt: skip
