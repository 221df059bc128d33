"""Replies: tokens that a model generates go in; their text comes out, whole or streamed, the same to the character.

Imported inside functions only, as runtime, which stands on it: it loads the libraries.
"""

from intactkv_export.replies.completion import CompletionLlama

__all__ = ["CompletionLlama"]
