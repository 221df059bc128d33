"""The rows of what is to be kept, computed beside the server by the model that it serves.

Not read from the server's cache: that is quantized as a rule. In a process of its own, on what others leave of the
cores, and as the model computes with a cache at F16: its rows are what the model can do, not what the reference can.
But for those of the tokens with which a prefix begins that is served too, the reference's or trained: the model takes
these as it does when it answers, or what is kept would put its own in their place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import intactkv_export
from intactkv_export.engines import llama_engine
from intactkv_export.errors import IntactKVError
from intactkv_export.keeping import directory as directories
from intactkv_export.keeping.directory import Directory, Wanted
from intactkv_export.libllama import Vocabulary
from intactkv_export.prefix import BEHIND, Prefix, ikv
from intactkv_export.work import run

_LOOK_EVERY = 0.5  # seconds


class Keeper:
    """Computes what the library notes in a directory, one after the other, until this process ends.

    n_ctx: tokens of a conversation's context. say: is told what was kept, and what could not be.
    """

    def __init__(self, directory: Directory, n_ctx: int, n_threads: int | None, say: Callable[[str], None]) -> None:
        self._directory, self._n_ctx, self._n_threads, self._say = directory, n_ctx, n_threads, say
        self._failed: set[Path] = set()  # notes that cannot be removed
        # A daemon: the process of a computation ends with this one, and its note is there at the next start.
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        never = threading.Event()
        while not never.wait(_LOOK_EVERY):
            for wanted in [each for each in self._directory.wanted() if each.path not in self._failed]:
                try:
                    self._keep(wanted)
                except (IntactKVError, OSError) as error:
                    self._say(f"a prompt of {len(wanted.tokens)} tokens is not kept: {error}")
                try:
                    wanted.path.unlink(missing_ok=True)
                except OSError:
                    self._failed.add(wanted.path)

    def _keep(self, wanted: Wanted) -> None:
        there, model = self._directory, self._directory.model
        n = len(wanted.tokens)
        if there.has(wanted.tokens):
            return
        behind = there.behind(wanted.tokens)
        if behind is not None and (behind.n_extra or behind.in_sight):
            raise IntactKVError(
                f"the trained prefix of {behind.source} that it begins with has cells that a kept one cannot have: "
                "make one of the whole prompt with `intactkv-export prefix`"
            )
        path = there.path / directories.file_name(model.weights_sha256, wanted.tokens)
        kept = {**model.about, "requests": wanted.requests}
        if behind is not None:
            kept[BEHIND] = behind.sha256
        origin = {"reference": model.origin, "kept": kept}
        done = run(_make, model.path, wanted.tokens, path, origin, self._n_threads, self._n_ctx, *self._given(behind))
        removed = there.make_room(path)
        if path in removed:
            self._say(
                f"a prompt of {n} tokens is not kept: it has {done.value:,} bytes, all may have {there.n_bytes:,} "
                "(--keep-size)"
            )
            return
        gone = f"; removed {', '.join(each.name for each in removed)}" if removed else ""
        self._say(f"kept {path}: {n} tokens, {done.value:,} bytes, computed in {done.seconds:.1f} s{gone}")

    def _given(self, behind: Prefix | None) -> tuple[str, int]:
        """What LLAMA_INTACTKV has to name for the model to be given this prefix, and the cells that it takes."""
        if behind is None:
            return "", 0
        embedded = behind.source is None or behind.source.resolve() == self._directory.model.path.resolve()
        return "" if embedded else str(behind.source), behind.n_cells


def _make(
    gguf: Path,
    tokens: list[int],
    out: Path,
    origin: dict[str, Any],
    n_threads: int | None,
    n_ctx: int,
    named: str = "",
    n_given: int = 0,
) -> int:
    """A prefix by a model itself: a stage of its own. named: the file of a prefix of n_given cells that it begins with,
    "": it is the model's; 0: with none. Returns its bytes. Raises IntactKVError."""
    _give_way()
    os.environ[ikv.VARIABLE] = named
    with Vocabulary(gguf) as vocabulary:
        text = vocabulary.text(tokens)
    model, K, V, states = llama_engine.compute(
        gguf, tokens, cache_dtype="f16", n_threads=n_threads, n_ctx=max(n_ctx, len(tokens) + 1), n_automatic=n_given
    )
    manifest = {
        "text": text,
        "messages": None,
        "bos_only": False,
        "chat_template_sha256": None,
        **origin,
        "engine": {
            "name": "llama",
            "dtype": origin["reference"]["dtype"].lower(),
            "versions": llama_engine.versions(),
        },
        "calibrated": None,
        "created_by": f"intactkv-export {intactkv_export.__version__}",
    }
    data = ikv.build(model, tokens, K, V, manifest, states)
    directories.write(out, data)
    return len(data)


def _give_way() -> None:
    """Threads made from now on compute when others leave a core, and a little beside them: it ends some day."""
    with suppress(OSError):
        os.nice(19)
