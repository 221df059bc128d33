"""Texts that may stand behind a prefix, as tokens: the reference's own, a user's, or prose that every Python has."""

from intactkv_export.texts.chunks import cut_text, default_text, token_hash
from intactkv_export.texts.sampled import sample, sample_from
from intactkv_export.texts.seeds import FOLLOW_UPS, OPENINGS, QUESTIONS
from intactkv_export.texts.turns import Turns
from intactkv_export.texts.user_file import read_user_file

__all__ = [
    "FOLLOW_UPS", "OPENINGS", "QUESTIONS", "Turns", "cut_text", "default_text", "read_user_file", "sample",
    "sample_from", "token_hash",
]  # fmt: skip
