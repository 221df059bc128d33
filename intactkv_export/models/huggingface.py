"""A Hugging Face directory as upstream's converter will meet it: its chat template, and what would stop the converter.

What the converter says of a directory that it cannot read is often an assertion of its own, after minutes of work; the
causes that are known are named here, before any.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intactkv_export.errors import IntactKVError, UsageError, first_line

# Types of tensors that are not quantized weights: what else has bytes in a file packs weights. pickle: not looked into
_WHOLE = {"F64", "F32", "F16", "BF16", "I64", "BOOL", "pickle"}
_FEW = 0.05  # of a model's bytes, which buffers of odd types stay below
# quantization_config.quant_method -> that upstream's converter dequantizes
_READABLE = {"bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4"}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def read_json(path: Path) -> dict[str, Any]:
    """A file that must be there and hold an object. Raises UsageError, IntactKVError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path.parent} has no {path.name}, so it is no Hugging Face model: check the path") from error
    except (OSError, ValueError) as error:
        raise IntactKVError(f"cannot read {path}: {first_line(error)}: get the model again") from error
    if not isinstance(value, dict):
        raise IntactKVError(f"{path} is not a JSON object: get the model again")
    return value


def chat_template(directory: Path) -> str | None:
    """The chat template that transformers uses: a file of its own comes before an entry in tokenizer_config.json.

    Of several, the one named "default". None: there is none. Raises IntactKVError if a file cannot be read.
    """
    return _default(_templates(directory))


def quantized_by(config: Mapping[str, Any], kinds: Mapping[str, int]) -> str:
    """How the weights of a directory are quantized, "" if they are not. kinds: bytes of its tensors, by type."""
    text = config.get("text_config") or {}
    method = config.get("quantization_config") or text.get("quantization_config")
    if isinstance(method, Mapping) and method.get("quant_method"):
        return str(method["quant_method"])
    packed = Counter({kind: n for kind, n in kinds.items() if kind not in _WHOLE})
    kind = packed.most_common(1)[0][0] if packed.total() > _FEW * sum(kinds.values()) else ""
    if config.get("quantization") or text.get("quantization") or (method and kind == "U32"):
        return "MLX"
    return kind or ("quantization_config" if method else "")


def check(directory: Path, config: Mapping[str, Any], method: str) -> None:
    """Refuse what upstream's converter cannot read. method: as quantized_by() says.

    Raises IntactKVError: weights quantized in a way that it does not know; no tokenizer that it reads; a tokenizer with
    more tokens than the model has embeddings for.
    """
    if method and method not in _READABLE and not method.startswith("F8"):
        raise IntactKVError(
            f"{directory} is quantized ({method}) in a way that upstream's converter cannot read: give the "
            "full-precision model it was made from"
        )
    if not any((directory / name).is_file() for name in _TOKENIZERS) and not _custom_tokenizer(directory):
        other = next((x.name for x in sorted(directory.glob("*")) if x.name in ("tekken.json", "tiktoken.model")), None)
        has = f"a tokenizer only as {other}, which upstream's converter cannot read" if other else "no tokenizer"
        raise IntactKVError(
            f"{directory} has {has}: put tokenizer.json or tokenizer.model of the same model beside it, as its "
            "Hugging Face conversion has"
        )
    # What is read from tokenizer.model leaves tokens out that are beyond the embeddings.
    if not (directory / "tokenizer.model").is_file() and (why := too_many_tokens(directory, config)):
        raise IntactKVError(why)


@contextmanager
def with_template(directory: Path, scratch: Path) -> Iterator[Path]:
    """The directory for upstream's converter, which prefers tokenizer_config.json: with transformers' choice there.

    The directory itself if both choose the same, else one of links to its files, in `scratch` while it is used.
    """
    wanted = _templates(directory)
    path = directory / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if wanted is None or settings.get("chat_template") == wanted:
        yield directory
        return
    linked = scratch / directory.resolve().name  # the name is all that says what some models are called
    linked.mkdir(parents=True)
    try:
        for file in directory.iterdir():
            if file.name != path.name:
                (linked / file.name).symlink_to(file.resolve())
        (linked / path.name).write_text(json.dumps(settings | {"chat_template": wanted}), encoding="utf-8")
        yield linked
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _templates(directory: Path) -> Any:
    """A template, or several as [{"name", "template"}], as tokenizer_config.json may hold them; None: there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        named = {"default": _text(file)}
        named |= {x.stem: _text(x) for x in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
        return _plain(named)
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = directory / name
        found = read_json(path).get("chat_template") if path.is_file() else None
        if found is not None:
            return _plain(found) if isinstance(found, dict) else found
    return None


def _plain(named: Mapping[str, str]) -> Any:
    if len(named) == 1 and "default" in named:
        return named["default"]
    return [{"name": name, "template": template} for name, template in named.items()]


def _default(templates: Any) -> str | None:
    if isinstance(templates, list):
        named = (x for x in templates if isinstance(x, dict))
        templates = next((x.get("template") for x in named if x.get("name") == "default"), None)
    return templates if isinstance(templates, str) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise IntactKVError(f"cannot read {path}: {first_line(error)}: get the model again") from error


def _custom_tokenizer(directory: Path) -> bool:
    """Whether the directory brings a program or a table that only its own architecture's converter reads."""
    names = set(os.listdir(directory)) - {"tekken.json", "tiktoken.model"}
    return any(
        name.startswith("tokenization_") or name.endswith((".model", ".tiktoken", ".bpe")) or "vocab" in name
        for name in names
    )


def too_many_tokens(directory: Path, config: Mapping[str, Any]) -> str:
    """Why a tokenizer does not fit the model, as a sentence; "" if it has no token without an embedding."""
    path = directory / "tokenizer.json"
    n_vocab = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not path.is_file() or not isinstance(n_vocab, int):
        return ""
    tokenizer = read_json(path)
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = {i: name for name, i in vocab.items() if isinstance(i, int)} if isinstance(vocab, dict) else {}
    added = [x for x in tokenizer.get("added_tokens") or [] if isinstance(x, dict) and isinstance(x.get("id"), int)]
    ids |= {x["id"]: str(x.get("content")) for x in added}
    beyond = sorted(i for i in ids if i >= n_vocab)
    if not beyond:
        return ""
    return (
        f"the tokenizer in {directory} has {len(beyond)} tokens beyond the {n_vocab} that the model has embeddings "
        f"for, the first is {ids[beyond[0]]!r} with number {beyond[0]}: resize the model's embeddings "
        "(resize_token_embeddings in transformers), or take the added tokens out of tokenizer.json"
    )
