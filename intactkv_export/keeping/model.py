"""The model that is served, as far as kept prefixes have to know it: whose rows are whose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from intactkv_export.errors import IntactKVError
from intactkv_export.models import KEY_REFERENCE, check_same_reference, gguf_file, identity, locate


class ServedModel:
    """A GGUF, in whichever number of parts. Raises IntactKVError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = gguf_file.first_part(path)
        self._reference = locate(self.path, allow_requantize=True)
        self._values = gguf_file.read(self.path).values

    @property
    def about(self) -> dict[str, Any]:
        """The field `kept` of a prefix that it made: which weights, and a file in which they were seen."""
        return {"model": self._reference.name, "weights_sha256": self.weights_sha256, **self._file}

    @property
    def origin(self) -> dict[str, Any]:
        """The field `reference`: of the reference that it says it is of, or of no other than itself."""
        stamp = self._values.get(KEY_REFERENCE)
        return {
            "sha256": stamp if isinstance(stamp, str) else self.weights_sha256,
            "dtype": self._reference.dtype,
            "name": self._reference.name,
            "quantized": self._reference.quantized,
        }

    @cached_property
    def weights_sha256(self) -> str:
        """All of its weights are read for that."""
        return identity(self._reference)

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raises IntactKVError if a prefix is of another model, as far as that is known without running it."""
        arch, own = manifest["model"]["arch"], self._values.get("general.architecture")
        if arch != own:
            raise IntactKVError(f"it is of another model: its architecture is {arch!r}, here it is {own!r}")
        kept = manifest.get("kept")
        if kept is None:
            check_same_reference("it", manifest["reference"]["sha256"], str(self.path), self._values.get(KEY_REFERENCE))
        elif kept["weights_sha256"] != self.weights_sha256:
            raise IntactKVError(
                f"it is of another model: {kept['model']} with the weights {kept['weights_sha256'][:16]}, here they "
                f"are {self.weights_sha256[:16]}"
            )

    def recognize(self, manifests: Iterable[Mapping[str, Any]]) -> None:
        """Knows its weights by a prefix that the very file has kept before: they need not be read."""
        for kept in (manifest.get("kept") for manifest in manifests):
            if kept and all(kept.get(key) == value for key, value in self._file.items()):
                self.__dict__["weights_sha256"] = kept["weights_sha256"]

    @property
    def _file(self) -> dict[str, int]:
        stats = [file.stat() for file in self._reference.files]
        return {"n_bytes": sum(x.st_size for x in stats), "mtime_ns": max(0, *(x.st_mtime_ns for x in stats))}
