"""Conversion: a reference model and a system prompt go in; quantized GGUFs and their prefix file come out."""

from intactkv_export.conversion import intact_tokens
from intactkv_export.conversion.convert import convert
from intactkv_export.conversion.new_prefix import prefix
from intactkv_export.conversion.remake import remake
from intactkv_export.conversion.result import ConvertResult, Output

__all__ = ["ConvertResult", "Output", "convert", "intact_tokens", "prefix", "remake"]
