"""The prefix file of a prompt: its K and V by one engine or the other, and the manifest that says how."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import intactkv_export
from intactkv_export.engines import llama_engine, torch_engine
from intactkv_export.engines.choose import check_device, choose
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import KV, Rope, States
from intactkv_export.models import Reference, check_dtype, gguf_file, weights
from intactkv_export.prefix import Prefix, Prompt, ikv
from intactkv_export.work import Stages

_Computed = tuple[
    dict[str, Any], KV, KV, States, str, dict[str, str]
]  # model description, K, V, states, dtype, versions
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Engine:
    """How a prefix is computed: arguments of convert(). Raises UsageError for values that do not exist."""

    engine: str
    dtype: str | None
    device: str
    offload_dir: str | os.PathLike[str] | None
    n_threads: int | None
    n_ctx: int
    rope: Rope = field(default_factory=Rope)

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.n_threads is not None and self.n_threads < 1:
            raise UsageError(f"{self.n_threads} threads cannot compute anything: give 1 or more")

    def widens(self, reference: Reference) -> bool:
        """Whether the llama engine computes with a copy of the weights at F32 (engines/llama_engine.py: why)."""
        return self.dtype != "auto" and reference.dtype != "F32"

    def chosen(self, reference: Reference) -> str:
        """The engine for this reference, "llama" or "torch".

        Raises UsageError if it cannot be, or torch has not the device.
        """
        name = choose(self.engine, reference, self.rope)
        if name == "torch" and self.offload_dir is None:
            check_device(self.device)
        if name == "llama" and self.dtype in ("float16", "bfloat16"):
            raise UsageError(f"the llama engine has no dtype {self.dtype!r}: give float32 or auto, or the torch engine")
        return name


def compute(
    work: Stages,
    engine: Engine,
    reference: Reference,
    gguf: Path | None,
    prompt: Prompt,
    identity: str,
    reader: Path | None = None,
) -> Prefix:
    """The prefix file of a prompt.

    gguf: the reference as a GGUF; the torch engine does not need it if there is a reader. reader: the model that will
    read the prefix; None: gguf. identity: the reference's (reference.identity). Raises IntactKVError if the engine
    fails, or the reader is no quantization of the reference.
    """
    name = engine.chosen(reference)
    with_engine = _with_torch if name == "torch" else _with_llama
    model, K, V, states, dtype, versions = with_engine(work, engine, reference, gguf, prompt, reader)
    manifest = {
        "text": prompt.text,
        "messages": prompt.messages,
        "bos_only": prompt.bos_only,
        "chat_template_sha256": prompt.chat_template_sha256,
        **({} if prompt.rendering is None else prompt.rendering.fields),
        "reference": {
            "sha256": identity,
            "dtype": reference.dtype,
            "name": reference.name,
            "quantized": reference.quantized,
        },
        "engine": {"name": name, "dtype": dtype, "versions": versions},
        "calibrated": None,
        "created_by": f"intactkv-export {intactkv_export.__version__}",
    }
    if engine.rope:  # what whoever uses the prefix has to set too
        manifest["rope_options"] = engine.rope.given
    return ikv.read(ikv.build(model, prompt.tokens, K, V, manifest, states))


def longrope_factors(work: Stages, engine: Engine, gguf: Path, prompt: Prompt) -> str | None:
    """The LongRoPE factors that compute() will use for a prompt, as the prefix's manifest will have them.

    gguf: the model that will read the prefix. None: it has none.
    """
    if gguf_file.longrope(gguf) is None:
        return None
    model = work.run("describe model", llama_engine.describe, gguf, _n_ctx(engine, prompt), engine.rope)
    factors: str = model["rope"]["factors"]
    return factors


def _with_torch(
    work: Stages, engine: Engine, reference: Reference, gguf: Path | None, prompt: Prompt, reader: Path | None
) -> _Computed:
    model = work.run("describe model", llama_engine.describe, reader or gguf, _n_ctx(engine, prompt))
    K, V, states, versions = work.run(
        "compute prefix",
        _torch_compute,
        reference.path,
        prompt.tokens,
        model,
        counted=True,
        device=engine.device,
        dtype=engine.dtype,
        offload_dir=engine.offload_dir,
    )
    return model, K, V, states, _SHORT.get(engine.dtype or "float32", "auto"), versions


def _torch_compute(*args: Any, **kwargs: Any) -> tuple[KV, KV, States, dict[str, str]]:
    return *torch_engine.compute(*args, **kwargs), torch_engine.versions()


def _with_llama(
    work: Stages, engine: Engine, reference: Reference, gguf: Path | None, prompt: Prompt, reader: Path | None
) -> _Computed:
    assert gguf is not None  # the caller's part of the contract
    source, dtype = gguf, reference.dtype.lower()
    if engine.widens(reference):
        source, dtype = work.directory / "f32.gguf", "f32"
        work.run(
            "widen to F32",
            weights.quantize,
            gguf,
            source,
            "F32",
            counted=True,
            allow_requantize=reference.quantized,
            n_threads=engine.n_threads,
        )
    n_ctx = _n_ctx(engine, prompt)
    own, K, V, states = work.run(
        "compute prefix",
        llama_engine.compute,
        source,
        prompt.tokens,
        counted=True,
        n_threads=engine.n_threads,
        n_ctx=n_ctx,
        rope=engine.rope,
    )
    if source != gguf:
        source.unlink()
    if reader is not None:
        described = work.run("describe model", llama_engine.describe, reader, n_ctx, engine.rope)
        _check_same(own, described, reference.path, reader)
    return own, K, V, states, dtype, llama_engine.versions()


def _n_ctx(engine: Engine, prompt: Prompt) -> int:
    return max(engine.n_ctx, len(prompt.tokens) + 1)


def _check_same(own: dict[str, Any], described: dict[str, Any], reference: Path, reader: Path) -> None:
    for key, value in own.items():
        if key != "n_ctx_train" and described.get(key) != value:
            raise IntactKVError(
                f"{reader} is not a quantization of {reference}: {key} is {_short(described.get(key))} in the one and "
                f"{_short(value)} in the other: give the reference it was quantized from"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
