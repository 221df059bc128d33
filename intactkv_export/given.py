"""The prefixes a model is evaluated with: the reference's, its first token alone, the calibrated one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from intactkv_export import compute, prefix_file
from intactkv_export.errors import IntactKVError
from intactkv_export.prefix_file import Prefix
from intactkv_export.prompt import Prompt
from intactkv_export.reference import Reference
from intactkv_export.stages import Stages

# How the model gets the prefix: it computes it itself; it is given the reference's, rounded to the KV type as the rest
# of the cache is; the reference's first token, intact; the reference's, intact; the one calibrated for it, intact.
MODES = ("plain", "rounded", "bos", "prompt", "calibrated")


@dataclass(frozen=True)
class Given:
    """The tokens of a prefix and, for each mode that there is, the bytes of the prefix file that is loaded."""

    prefix: Prefix
    data: dict[str, bytes | None]

    @property
    def tokens(self) -> list[int]:
        return self.prefix.tokens


def find(
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
    path = prefix or prefix_file.find(model)
    if path is None:
        raise IntactKVError(
            f"{model} has no prefix, neither embedded nor beside it: make one with `intactkv-export prefix`, or name "
            "one with --prefix"
        )
    whole = prefix_file.read(path)
    tuned = None if calibrated is None else prefix_file.read(calibrated)
    if tuned is not None and tuned.tokens != whole.tokens:
        raise IntactKVError(
            f"the calibrated prefix {calibrated} has {len(tuned.tokens)} tokens and {path} has {len(whole.tokens)} "
            "others: give two prefixes of the same prompt"
        )
    if whole.manifest["calibrated"] is not None:
        tuned = tuned or whole
        whole = _computed(whole, work, reference, gguf)
    data: dict[str, bytes | None] = {"plain": None, "rounded": whole.data}
    if len(whole.tokens) > 1 and all(0 in layer.positions for layer in whole.layers):
        data["bos"] = first_token(whole)
    data["prompt"] = whole.data
    if tuned is not None:
        data["calibrated"] = tuned.data
    return Given(whole, data)


def first_token(prefix: Prefix) -> bytes:
    """A prefix file of the first token alone: it saw no other, so its K and V are those in the whole prefix."""
    other = {key: prefix.manifest[key] for key in prefix.manifest.keys() - {"format", "tokens", "model"}}
    return prefix_file.build(
        prefix.manifest["model"],
        prefix.tokens[:1],
        {layer.il: layer.K[layer.positions == 0] for layer in prefix.layers},
        {layer.il: layer.V[layer.positions == 0] for layer in prefix.layers},
        {**other, "bos_only": True, "messages": None},
    )


def _computed(calibrated: Prefix, work: Stages, reference: Reference, gguf: Path) -> Prefix:
    """The prefix that a calibrated one began as."""
    m = calibrated.manifest
    prompt = Prompt(calibrated.tokens, m["text"], m["messages"], m["bos_only"], m["chat_template_sha256"])
    engine = compute.Engine("llama", None, "cpu", None, None, 0)
    return compute.compute(work, engine, reference, gguf, prompt, m["reference"]["sha256"])
