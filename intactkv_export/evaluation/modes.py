"""How a model can be given its prefix for an evaluation, and the prefixes that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from intactkv_export.engines import Engine, compute
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Vocabulary, rope_of
from intactkv_export.models import Reference, gguf_file
from intactkv_export.prefix import EXTRA, Prefix, Prompt, Rendering, ikv, of_model, prompt_for, run_settings
from intactkv_export.work import Stages

# How the model gets the prefix, in the order of tables and legends: name -> what that is
MODES = {
    "plain": "prefix computed by the quantized model",
    "rounded": "reference's prefix, rounded to the KV type",
    "bos": "first token intact",
    "prompt": "whole prefix intact",
    "calibrated": "whole prefix intact, calibrated",
}
REFERENCE = "reference"  # no mode of a quantized model: the full-precision model itself, its cache at F16
# What is compared with what, where both were evaluated.
PAIRS = (
    ("rounded", "plain"),
    ("bos", "plain"),
    ("prompt", "plain"),
    ("calibrated", "plain"),
    ("prompt", "rounded"),
    ("calibrated", "prompt"),
)


@dataclass(frozen=True)
class Given:
    """The tokens of a prefix and, for each mode that there is, the bytes of the prefix file that is loaded.

    prompt: a system prompt that begins with the prefix, its other tokens computed by the model itself; None: texts
    stand right behind the prefix. system_prompt: its text, as it was given.
    """

    prefix: Prefix
    data: dict[str, bytes | None]
    n_extra: int = 0  # extra cells, of the mode that has most
    prompt: Prompt | None = None
    system_prompt: str | None = None

    @property
    def n_cells(self) -> int:
        """Cells that what stands before a text takes in a KV cache, at most."""
        return len(self.tokens) + self.n_extra

    @property
    def tokens(self) -> list[int]:
        """What stands before a text."""
        return self.prefix.tokens if self.prompt is None else self.prompt.tokens

    def like(self, other: Given) -> bool:
        """Whether the reference behind the one is the reference behind the other: tokens, and how RoPE is set."""
        mine, theirs = self.prefix.manifest, other.prefix.manifest
        return self.tokens == other.tokens and (
            (mine.get("rope_options"), mine["model"]["rope"]["factors"])
            == (theirs.get("rope_options"), theirs["model"]["rope"]["factors"])
        )


def find_given(
    model: str | Path,
    prefix: str | Path | None,
    calibrated: str | Path | None,
    work: Stages,
    reference: Reference,
    gguf: Path,
) -> Given:
    """The prefixes for a model, a GGUF.

    gguf: the reference as one. prefix: an `.ikv` or a GGUF with one embedded; None: the one embedded in the model or
    beside it. If that one is calibrated itself, it is the calibrated one (unless another is given), and what it began
    as is computed again by the reference. A prefix of one token has no mode "bos", it is that already; nor has one
    whose first token was left behind by a sliding window, or one of a model with recurrent layers, whose states are
    those after the last token.

    Raises IntactKVError if there is no prefix, or the two are not of the same tokens.
    """
    if not Path(model).is_file():
        raise IntactKVError(f"no model at {model}: give the path of a GGUF file")
    whole = of_model(model, prefix)
    tuned = None if calibrated is None else ikv.read(calibrated)
    if tuned is not None and tuned.tokens != whole.tokens:
        raise IntactKVError(
            f"the calibrated prefix {calibrated} has {len(tuned.tokens)} tokens and {whole.source} "
            f"has {len(whole.tokens)} others: give two prefixes of the same prompt"
        )
    if whole.manifest["calibrated"] is not None:
        tuned = tuned or whole
        whole = _computed(whole, work, reference, gguf)
    data: dict[str, bytes | None] = {"plain": None, "rounded": whole.data}
    if len(whole.tokens) > 1 and not whole.states and all(0 in layer.cells for layer in whole.layers):
        data["bos"] = first_token(whole)
    data["prompt"] = whole.data
    if tuned is not None:
        data["calibrated"] = tuned.data
    return Given(whole, data, max(whole.n_extra, 0 if tuned is None else tuned.n_extra))


def behind_prompt(given: Given, gguf: Path, system_prompt: str) -> Given:
    """The same prefixes at the beginning of a whole system prompt, rendered by the chat template of a GGUF.

    A model without a template reads it as a paragraph, behind the first token. Of the first token alone the mode is
    "bos", as of a longer prefix's first token: it is not the prompt's. Raises UsageError if the prompt does not begin
    with the prefix's tokens.
    """
    rope = rope_of(given.prefix.manifest.get("rope_options"))
    if gguf_file.read(gguf).values.get("tokenizer.chat_template"):
        prompt = prompt_for(gguf, system_prompt, False, None, rope, Rendering.of(given.prefix.manifest))
    else:
        prompt = _paragraph(gguf, system_prompt)
    own = given.prefix.tokens
    if prompt.tokens[: len(own)] != own:
        name, text = given.prefix.source or "of the model", given.prefix.manifest["text"]
        raise UsageError(
            f"the prefix {name} has the {len(own)} tokens {_shortened(text)!r}, with which the prompt "
            f"{_shortened(prompt.text)!r} does not begin: give a prefix of the first token, or the prompt of this one"
        )
    data = given.data
    if len(own) == 1 < len(prompt.tokens):
        data = {"bos" if mode == "prompt" else mode: rows for mode, rows in data.items()}
    return replace(given, data=data, prompt=prompt, system_prompt=system_prompt)


def _paragraph(gguf: Path, text: str) -> Prompt:
    """A prompt as a text by itself. No template renders it, so it counts as one of the first token where turns are made
    (texts.Turns): they follow it as they are."""
    first = prompt_for(gguf, None, True, None).tokens
    with Vocabulary(gguf) as vocabulary:
        tokens = [*first, *vocabulary.tokenize(f"{text}\n\n", special=False)]
        return Prompt(tokens, vocabulary.text(tokens), None, True, None)


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole_prefix(given: Given, work: Stages, reference: Reference, gguf: Path) -> Prefix:
    """The prefix of all that stands before a text: of a longer prompt, computed by the reference."""
    if given.prompt is None:
        return given.prefix
    return _reference_prefix(given.prompt, given.prefix, work, reference, gguf)


def first_token(prefix: Prefix) -> bytes:
    """A prefix file of the first token alone: it saw no other, so its K and V are those in the whole prefix."""
    other = {key: prefix.manifest[key] for key in prefix.manifest.keys() - {"format", "tokens", "model", EXTRA}}
    return ikv.build(
        prefix.manifest["model"],
        prefix.tokens[:1],
        {layer.il: layer.K[layer.cells == 0] for layer in prefix.layers},
        {layer.il: layer.V[layer.cells == 0] for layer in prefix.layers},
        {**other, "bos_only": True, "messages": None},
    )


def _computed(calibrated: Prefix, work: Stages, reference: Reference, gguf: Path) -> Prefix:
    """The prefix that a calibrated one began as."""
    return _reference_prefix(Prompt.of(calibrated.tokens, calibrated.manifest), calibrated, work, reference, gguf)


def _reference_prefix(prompt: Prompt, like: Prefix, work: Stages, reference: Reference, gguf: Path) -> Prefix:
    """A prompt's, by the reference, its RoPE as that of a prefix there is."""
    m = like.manifest
    long = run_settings(like, gguf).get("kv_overrides")
    n_ctx = m["model"]["n_ctx_train"] if long else 0  # for the long factors
    engine = Engine("llama", None, "cpu", None, None, n_ctx, rope_of(m.get("rope_options")))
    return compute(work, engine, reference, gguf, prompt, m["reference"]["sha256"])
