"""How a model can be given its prefix for an evaluation, and the prefixes that takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from intactkv_export.engines import Engine, compute
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import rope_of
from intactkv_export.models import Reference
from intactkv_export.prefix import EXTRA, Prefix, Prompt, ikv, of_model, run_settings
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
    """The tokens of a prefix and, for each mode that there is, the bytes of the prefix file that is loaded."""

    prefix: Prefix
    data: dict[str, bytes | None]
    n_extra: int = 0  # extra cells, of the mode that has most

    @property
    def n_cells(self) -> int:
        """Cells that the prefix takes in a KV cache, at most."""
        return len(self.tokens) + self.n_extra

    @property
    def tokens(self) -> list[int]:
        return self.prefix.tokens

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
    whose first token was left behind by a sliding window.

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
    if len(whole.tokens) > 1 and all(0 in layer.cells for layer in whole.layers):
        data["bos"] = first_token(whole)
    data["prompt"] = whole.data
    if tuned is not None:
        data["calibrated"] = tuned.data
    return Given(whole, data, max(whole.n_extra, 0 if tuned is None else tuned.n_extra))


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
    m = calibrated.manifest
    prompt = Prompt(calibrated.tokens, m["text"], m["messages"], m["bos_only"], m["chat_template_sha256"])
    n_ctx = (
        m["model"]["n_ctx_train"] if run_settings(calibrated, gguf).get("kv_overrides") else 0
    )  # for the long factors
    engine = Engine("llama", None, "cpu", None, None, n_ctx, rope_of(m.get("rope_options")))
    return compute(work, engine, reference, gguf, prompt, m["reference"]["sha256"])
