"""The native parser of prefix files: its own C++ tests, mutated files, and files that others wrote.

The C++ parts are compiled with the address and undefined-behaviour sanitizers, which end the process at the
first byte read too far. `native/tests/fuzz_file.cpp` says how to run the same target longer, under libFuzzer.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from tests.support.old_embedding import embed_as_array
from tests.support.paths import REPO
from tests.support.smol import Smol

NATIVE = REPO / "native"
BUILD = REPO / "build" / "native_tests"  # kept: nothing is compiled again when nothing changed

PREFIX_FILE = NATIVE / "src" / "prefix_file"
CODE = sorted(PREFIX_FILE.glob("*.cpp"))
TESTS = [NATIVE / "tests" / f"test_{name}.cpp" for name in ("file", "parse", "compatible", "read_bytes")]
FUZZ = [NATIVE / "tests" / f"{name}.cpp" for name in ("fuzz_file", "mutate")]
HEADERS = [*PREFIX_FILE.glob("*.h")] + [NATIVE / "tests" / f"{name}.h" for name in ("check", "sample", "gguf_sample")]

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# No leak check: it needs ptrace, which containers forbid.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
ENVIRONMENT.pop("LD_PRELOAD", None)  # the sanitizer's library must be the first


def compiler() -> str:
    """The C++ compiler; skips the test if there is none, or none with sanitizers."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        pytest.skip("no C++ compiler")
    BUILD.mkdir(parents=True, exist_ok=True)
    probe = BUILD / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [*found.split(), *SANITIZE, str(probe), "-o", str(probe.with_suffix(""))]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{found} cannot link with {SANITIZE[0]}")
    return found


def source() -> Path:
    """A directory with the headers and the SHA-256 of the pinned llama.cpp source, from its archive."""
    dest = BUILD / "source"
    if not (dest / "complete").is_file():
        spec = importlib.util.spec_from_file_location("get_source", NATIVE / "get_source.py")
        assert spec and spec.loader
        get_source = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(get_source)
        for name, content in get_source.read(get_source.archive()).items():
            if name.startswith(("vendor/hash/", "vendor/nlohmann/", "ggml/include/")):
                path = dest / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        (dest / "complete").touch()
    return dest


def build() -> None:
    """Compile `test_file` and `mutate` into BUILD, unless they are newer than all they are made from."""
    cxx = compiler()
    inputs = [*CODE, *TESTS, *FUZZ, *HEADERS, Path(__file__)]
    programs = [BUILD / "test_file", BUILD / "mutate"]
    newest = max(path.stat().st_mtime for path in inputs)
    if all(path.is_file() and path.stat().st_mtime > newest for path in programs):
        return
    pinned = source()
    include = [NATIVE / "src", pinned / "vendor", pinned / "vendor/hash", pinned / "ggml/include"]
    flags = ["-O0", "-g1", "-Wall", "-Wextra", *(f"-I{path}" for path in include)]

    def compiled(unit: Path) -> Path:
        made = BUILD / f"{unit.stem}.o"
        language = ["-x", "c"] if unit.suffix == ".c" else ["-std=c++17"]
        sanitize = SANITIZE if unit in CODE else []  # the tests need not be: it triples the time to compile
        command = [*cxx.split(), *flags, *sanitize, *language, "-c", str(unit), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return made

    # The parser first: of an inline function that several units have, the linker takes the first, with sanitizers.
    units = [*CODE, pinned / "vendor/hash/hash.cpp", pinned / "vendor/hash/sha256/sha256.c", *TESTS, *FUZZ]
    with ThreadPoolExecutor(2) as pool:
        made = dict(zip(units, pool.map(compiled, units), strict=True))
    for program, own, others in [(programs[0], TESTS, FUZZ), (programs[1], FUZZ, TESTS)]:
        objects = [str(path) for unit, path in made.items() if unit in own or unit not in others]
        subprocess.run([*cxx.split(), *SANITIZE, *objects, "-o", str(program)], check=True)


@pytest.fixture(scope="module")
def programs() -> Path:
    """The directory that holds the programs `test_file` and `mutate`."""
    build()
    return BUILD


def run(*command: Any, timeout: float) -> subprocess.CompletedProcess[str]:
    arguments = [str(argument) for argument in command]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


def check(programs: Path, *paths: Path) -> list[tuple[bool, str]]:
    """What read_bytes() and parse() say of each file: (True, its tokens) or (False, the sentence)."""
    done = run(programs / "test_file", "--check", *paths, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    assert len(lines) == len(paths)
    return [(word == "ok", rest) for word, _, rest in lines]


def test_parser(programs: Path, tmp_path: Path) -> None:
    done = run(programs / "test_file", tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    n_checks = int(done.stdout.split()[0])
    assert n_checks > 70_000, "a part of the tests did not run"


def test_mutated_files(programs: Path) -> None:
    n = 15_000
    done = run(programs / "mutate", n, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{n} mutated files\n"


def seal(state: bytes, manifest: dict[str, Any]) -> bytes:
    body = state + json.dumps(manifest).encode()
    return body + struct.pack("<Q", len(body) - len(state)) + hashlib.sha256(body).digest() + b"INTACTKV"


def manifest_of(tokens: list[int], model: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "tokens": tokens,
        "text": "",
        "messages": None,
        "bos_only": False,
        "chat_template_sha256": None,
        "model": model,
        "reference": {"sha256": "0" * 64, "dtype": "F16", "name": "x", "quantized": False},
        "engine": {"name": "llama", "dtype": "f16", "versions": {}},
        "calibrated": None,
        "created_by": "a test",
    }


@pytest.fixture(scope="module")
def upstream(model: Any) -> tuple[Any, bytes, list[int]]:
    """A context of a real model, and a prefix of it whose state llama_state_seq_save_file wrote."""
    from tests.support import lowlevel

    loaded = lowlevel.load_model(model("F16"))
    tokens = lowlevel.tokenize(loaded, lowlevel.SYSTEM)
    ctx = lowlevel.Context(loaded, "f16")
    ctx.decode(tokens, 0)
    path = BUILD / "upstream.state"
    array = (lowlevel.L.llama_token * len(tokens))(*tokens)
    assert lowlevel.L.llama_state_seq_save_file(ctx.ptr, str(path).encode(), 0, array, len(tokens))
    state = path.read_bytes()
    path.unlink()
    return ctx, seal(state, manifest_of(tokens, bindings.describe(ctx.ptr))), tokens


def test_state_by_upstream(upstream: tuple[Any, bytes, list[int]], programs: Path, tmp_path: Path) -> None:
    ctx, data, tokens = upstream
    path = tmp_path / "upstream.ikv"
    path.write_bytes(data)
    assert check(programs, path) == [(True, " ".join(map(str, tokens)))]
    assert bindings.verify(data) == len(tokens)
    assert bindings.verify(data, ctx.ptr) == len(tokens)


def test_library_refuses_what_the_parser_refuses(upstream: tuple[Any, bytes, list[int]]) -> None:
    _, data, _ = upstream
    rng = np.random.default_rng(2403)
    for at in rng.integers(len(data), size=20):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.integers(8)
        with pytest.raises(IntactKVError, match="prefix file"):
            bindings.verify(damaged)
    for size in [0, 1, 47, 48, len(data) // 2, len(data) - 1]:
        with pytest.raises(IntactKVError, match="prefix file"):
            bindings.verify(data[:size])


ALL, WINDOW = (0, 0), (1, 4)  # (swa_type, n_swa)


def described(*caches: tuple[int, int], dim_v: int = 3) -> dict[str, Any]:
    """A model of two layers for each cache. dim_v: 0: with latents."""

    def layer(il: int) -> dict[str, Any]:
        return {"il": il, "n_head_kv": 2, "head_dim_k": 5, "head_dim_v": dim_v, "rope_base": 1e6 / 3}

    return {
        "arch": "x",
        "n_ctx_train": 64,
        "n_vocab": 100,
        "vocab_sha256": "1" * 64,
        "caches": [
            {"n_swa": n_swa, "swa_type": swa_type, "layers": [layer(2 * i), layer(2 * i + 1)]}
            for i, (swa_type, n_swa) in enumerate(caches)
        ],
        "rope": {
            **{"type": "neox", "n_rot": 4, "scale": 0.125, "scaling": "linear", "n_ctx_orig": 64},
            **{"ext_factor": 0.0, "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "factors": "none"},
        },
    }


def hybrid(*caches: tuple[int, int]) -> dict[str, Any]:
    """The same with two recurrent layers behind them."""
    layers = [{"il": 5, "n_r": 6, "n_s": 4}, {"il": 6, "n_r": 0, "n_s": 7}]
    return described(*caches) | {"recurrent": {"n_layer": 7, "layers": layers}}


def written(model: dict[str, Any], tokens: list[int]) -> bytes:
    """A prefix file by the Python writer, of random values."""
    rng = np.random.default_rng(len(tokens))
    layers = [layer for cache in model["caches"] for layer in cache["layers"]]
    K, V = (
        {x["il"]: rng.normal(size=(len(tokens), 2, x[dim])).astype(np.float16) for x in layers}
        for dim in ("head_dim_k", "head_dim_v")
    )
    origin = {k: v for k, v in manifest_of(tokens, model).items() if k not in ("format", "tokens", "model")}
    recurrent = model.get("recurrent", {"layers": []})["layers"]
    S = {x["il"]: tuple(rng.normal(size=x[n]).astype(np.float32) for n in ("n_r", "n_s")) for x in recurrent}
    return ikv.build(model, tokens, K, V, {**origin, "text": "\u00e9\U0001f600\u2028"}, S)


@pytest.mark.parametrize("n_tokens", [1, 4, 5, 23])
@pytest.mark.parametrize("dim_v", [3, 0])
@pytest.mark.parametrize("caches", [[ALL], [ALL, WINDOW], [ALL, (2, 4)], [ALL, (3, 5)], [WINDOW], []], ids=str)
def test_python_writes_what_native_reads(
    programs: Path, tmp_path: Path, caches: list[tuple[int, int]], n_tokens: int, dim_v: int
) -> None:
    tokens = [99 - i for i in range(n_tokens)]
    for model in [described(*caches, dim_v=dim_v), hybrid(*caches)] if caches else [hybrid()]:
        path = tmp_path / "x.ikv"
        path.write_bytes(written(model, tokens))
        assert check(programs, path) == [(True, " ".join(map(str, tokens)))]


def variants(value: Any) -> Iterator[Any]:
    """Copies of a JSON value with one thing in it changed or removed, at every place."""
    yield from (None, True, -1, 0, 2, 1.5, 2**64 - 1, "x", "1" * 64, [], {})
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for at, inner in places:
        for other in variants(inner):
            changed = copy.copy(value)
            changed[at] = other
            yield changed
        removed = copy.copy(value)
        del removed[at]
        yield removed


def unsealed(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """The state and the manifest of a prefix file."""
    size = struct.unpack_from("<Q", data, len(data) - 48)[0]
    return data[: -48 - size], json.loads(data[-48 - size : -48])


@pytest.mark.parametrize(
    "model",
    [described(ALL, WINDOW), described(ALL, WINDOW, dim_v=0), hybrid(ALL), hybrid()],
    ids=["caches", "latents", "hybrid", "recurrent"],
)
def test_python_and_native_agree(programs: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    """Whatever the manifest says, both readers take it or both refuse it."""
    state, good = unsealed(written(model, [5, 6, 7, 8, 9, 10]))
    good["messages"] = [{"role": "system", "content": "x"}]
    files = [seal(state, bad) for bad in variants(good)]
    paths = [tmp_path / f"{i}" for i in range(len(files))]
    for path, content in zip(paths, files, strict=True):
        path.write_bytes(content)
    accepted = 0
    for content, (ok, sentence) in zip(files, check(programs, *paths), strict=True):
        try:
            ikv.read(content)
        except IntactKVError as error:
            assert not ok, error
        else:
            assert ok, sentence
            accepted += 1
    assert len(files) > 600 and 50 < accepted < len(files) / 4


def changed(value: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    other = copy.deepcopy(value)
    change(other)
    return other


def of_layers(manifest: dict[str, Any], **fields: int) -> None:
    for layer in manifest["model"]["caches"][0]["layers"]:
        layer.update(fields)


def test_faults_of_latents(programs: Path, tmp_path: Path) -> None:
    """Rows of V that are said and not there, or there and not said, other sizes, a cut, NaN, the wrong format: one
    sentence each, by both readers."""
    tokens = [5, 6, 7, 8]
    latents, latents_said = unsealed(written(described(ALL, dim_v=0), tokens))
    both, both_said = unsealed(written(described(ALL), tokens))
    row = latents.index(struct.pack("<iQ", 1, 2 * 2 * 5)) + 12
    faults = {
        "V is said": (latents, changed(latents_said, lambda m: of_layers(m, head_dim_v=5)), "ends inside"),
        "V is not said": (both, both_said | {"format": 2, "model": latents_said["model"]}, "its manifest begins at"),
        "one layer has V": (
            latents,
            changed(latents_said, lambda m: m["model"]["caches"][0]["layers"][1].update(head_dim_v=3)),
            "ends inside",
        ),
        "sizes swapped": (latents, changed(latents_said, lambda m: of_layers(m, head_dim_k=2, n_head_kv=5)), ""),
        "other sizes": (latents, changed(latents_said, lambda m: of_layers(m, head_dim_k=6)), "row size of a layer"),
        "K of nothing": (latents, changed(latents_said, lambda m: of_layers(m, head_dim_k=0)), "head_dim_k is 0"),
        "below nothing": (latents, changed(latents_said, lambda m: of_layers(m, head_dim_v=-1)), "head_dim_v is -1"),
        "format 1": (latents, latents_said | {"format": 1}, "head_dim_v is 0"),
        "format 3": (latents, latents_said | {"format": 3}, "reads the formats 1 and 2"),
        "cut": (latents[:-1], latents_said, "ends inside"),
        "more": (latents + b"\0\0", latents_said, "its manifest begins at"),
        "NaN": (latents[:row] + b"\xff\x7f" + latents[row + 2 :], latents_said, "NaN or infinity"),
        "as it is": (latents, latents_said, ""),
    }
    good = {"as it is", "sizes swapped"}  # five heads of two have the same bytes: the model refuses them
    paths = [tmp_path / name for name in faults]
    for path, (state, said, _) in zip(paths, faults.values(), strict=True):
        path.write_bytes(seal(state, said))
    for path, (ok, sentence) in zip(paths, check(programs, *paths), strict=True):
        expected = faults[path.name][2]
        assert ok == (path.name in good), (path.name, sentence)
        if ok:
            ikv.read(path)
            continue
        assert expected in sentence and "\n" not in sentence, (path.name, sentence)
        with pytest.raises(IntactKVError) as error:
            ikv.read(path)
        assert expected in str(error.value) and "\n" not in str(error.value), (path.name, str(error.value))


def test_gguf_by_the_gguf_package(programs: Path, tmp_path: Path) -> None:
    """The array that `gguf` writes is the one that is found, tensors after it or not."""
    import gguf

    data = seal(b"no state, but sealed", manifest_of([1], {}))
    for n_tensors in (0, 2):
        path = tmp_path / f"{n_tensors}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_array("tokenizer.ggml.tokens", ["a", "bb", "", "ccc"] * 1000)
        writer.add_array("tokenizer.ggml.scores", [0.5] * 4000)
        writer.add_key_value("intactkv.state", list(data), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
        writer.add_uint32("intactkv.format", 1)
        for i in range(n_tensors):
            writer.add_tensor(f"t{i}", np.ones((2, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        [(ok, sentence)] = check(programs, path)
        assert not ok and "no field model.arch" in sentence  # so the checksum of what was found is right


def test_native_finds_what_python_embeds(programs: Path, tmp_path: Path, smol: Smol) -> None:
    """Behind the tensors, in the metadata as before, and nowhere any more: both readers say the same."""
    tokens = " ".join(map(str, smol.tokens))
    behind = ikv.embed(smol.gguf, ikv.read(smol.ikv), tmp_path / "behind.gguf")
    old = embed_as_array(smol.gguf, smol.ikv.read_bytes(), tmp_path / "old.gguf")
    newer = ikv.embed(smol.gguf, ikv.read(smol.bos), tmp_path / "bos.gguf")
    newer = embed_as_array(newer, smol.ikv.read_bytes(), tmp_path / "newer.gguf")
    assert check(programs, behind, old, newer) == [(True, tokens)] * 3
    cut = tmp_path / "cut.gguf"
    whole = behind.read_bytes()
    size = smol.ikv.stat().st_size
    for n in (1, 100, size, size + 1):
        cut.write_bytes(whole[:-n])
        [(ok, sentence)] = check(programs, cut)
        assert not ok and "is lost" in sentence and "embed it again" in sentence
        with pytest.raises(IntactKVError, match="is lost"):
            ikv.read(cut)
