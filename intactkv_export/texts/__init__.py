"""Texts that may stand behind a prefix, as tokens: the reference's own, a user's, or prose that every Python has."""

from intactkv_export.texts.beginnings import begin
from intactkv_export.texts.chunks import cut_text, cut_windows, default_text, token_hash
from intactkv_export.texts.growing import Growing
from intactkv_export.texts.sampled import batch_size, sample, sample_from, write
from intactkv_export.texts.seeds import FOLLOW_UPS, OPENINGS, QUESTIONS
from intactkv_export.texts.turns import Turns
from intactkv_export.texts.user_file import read_two_lengths, read_user_file

__all__ = [
    "FOLLOW_UPS", "OPENINGS", "QUESTIONS", "Growing", "Turns", "batch_size", "begin", "cut_text", "cut_windows",
    "default_text", "read_two_lengths", "read_user_file", "sample", "sample_from", "token_hash", "write",
]  # fmt: skip
