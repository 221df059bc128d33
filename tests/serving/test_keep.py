"""serve --keep: what came again and again is there after the next start, whatever happened to the one before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intactkv_export.cli.main import main
from intactkv_export.engines import llama_engine
from intactkv_export.prefix import ikv
from intactkv_export.serving import choose_settings
from tests.serving.conftest import request, served
from tests.support import automatic, hybrids, lowlevel, random_models
from tests.support.lowlevel import Context
from tests.support.smol import Smol

SYSTEM = "You are the night porter of a hotel in Trieste. " + " ".join(
    f"Room {100 + i} is on floor {1 + i // 20} and costs {80 + i} euros a night." for i in range(16)
)
ORIGIN = {
    "text": "", "messages": None, "bos_only": False, "chat_template_sha256": None, "calibrated": None,
    "reference": {"sha256": "0" * 64, "dtype": "F32", "name": "x", "quantized": False},
    "engine": {"name": "llama", "dtype": "f32", "versions": {}}, "created_by": "the tests",
}  # fmt: skip
QUESTIONS = ["What does room 110 cost?", "Is there a lift?", "My key does not work.", "Good evening"]


def ask(url: str, text: str) -> tuple[str, float]:
    """The answer, and how long its prompt took in milliseconds."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    with request(f"{url}/v1/chat/completions", body) as answer:
        got = json.load(answer)
    return str(got["choices"][0]["message"]["content"]), float(got["timings"]["prompt_ms"])


def until(done: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def kept_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("kept-*.ikv"))


def notes_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.tokens"))


def keep(smol: Smol, directory: Path, *more: Any) -> Any:
    return served(smol.gguf, "--ctx-size", 1024, "--parallel", 1, "--keep", directory, *more)


def test_the_second_start_has_it_and_computes_nothing_of_it(programs: None, smol: Smol, tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    with keep(smol, directory) as first:
        assert first["keep"] == str(directory)
        took = [ask(first["url"], text)[1] for text in QUESTIONS[:3]]
        (path,) = until(lambda: kept_in(directory))
        until(lambda: not notes_in(directory))
        first["process"].terminate()
        said = first["process"].stderr.read()
    prefix = ikv.read(path)
    assert f"kept {path}: {len(prefix.tokens)} tokens" in said and "night porter" not in said
    assert path.stat().st_mode & 0o777 == 0o600 and directory.stat().st_mode & 0o777 == 0o700
    assert prefix.manifest["text"].startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>")
    assert prefix.kept is not None and prefix.kept["model"] == "smol.gguf" and prefix.kept["requests"] == 3
    origin = prefix.manifest["reference"]
    assert origin["quantized"] and origin["sha256"] == ikv.read(smol.ikv).manifest["reference"]["sha256"]

    os.utime(path, (1e9, 1e9))
    with keep(smol, directory) as second:
        assert str(path) in [p["file"] for p in second["prefixes"]]
        answer, now = ask(second["url"], QUESTIONS[3])
        assert answer and now < took[0] / 4, (now, took)  # some 500 tokens, or 10
        assert path.stat().st_mtime > 1e9  # it was used
        for text in QUESTIONS:
            ask(second["url"], text)
        assert notes_in(directory) == [] and kept_in(directory) == [path]

    # The same, counted, in a context of this process; the rows are those that the model computes of these tokens
    params = lowlevel.L.llama_model_default_params()
    params.use_extra_bufts = False  # products of repacked weights round otherwise, as do batches of other sizes
    model = lowlevel.L.llama_model_load_from_file(str(smol.gguf).encode(), params)
    tokens = [*prefix.tokens, *lowlevel.tokenize(model, "user\nGood evening<|im_end|>\n<|im_start|>assistant\n")]
    with automatic.environment(str(path)):
        ctx = Context(model, "f16")
    (loaded,) = automatic.evaluate(ctx, tokens, 1024, wanted=len(tokens) - 1)
    assert ctx.n_not_computed() == len(prefix.tokens)
    with automatic.environment("off"):
        plain = Context(model, "f16")
    n = len(prefix.tokens)
    assert plain.batch([(token, pos, [0], False) for pos, token in enumerate(tokens[:n])]) == 0
    (computed,) = automatic.evaluate(plain, tokens, 1024, start=n, wanted=len(tokens) - 1)
    assert lowlevel.kl(computed[None], loaded[None]) < 1e-6


@pytest.mark.parametrize("victim", ["serve", "llama-server"])
def test_kill_9_before_it_is_written(programs: None, smol: Smol, tmp_path: Path, victim: str) -> None:
    """What was noted is computed after the next start; what was kept before is as it was."""
    (tmp_path / "mine.ikv").write_bytes(smol.ikv.read_bytes())
    tmp_path.chmod(0o700)
    with keep(smol, tmp_path) as first:
        for text in QUESTIONS[:3]:
            ask(first["url"], text)
        until(lambda: notes_in(tmp_path) or kept_in(tmp_path))
        os.kill(first["process"].pid if victim == "serve" else first["pid"], signal.SIGKILL)
        first["process"].wait(30)
    assert (tmp_path / "mine.ikv").read_bytes() == smol.ikv.read_bytes()
    with keep(smol, tmp_path) as second:
        assert str(tmp_path / "mine.ikv") in [p["file"] for p in second["prefixes"]]
        (path,) = until(lambda: kept_in(tmp_path))
        until(lambda: not notes_in(tmp_path))
    assert len(ikv.read(path).tokens) > 300
    assert {p.name for p in tmp_path.iterdir()} == {"mine.ikv", ".lock", path.name}


def test_what_is_wrong_is_left_out_and_it_serves(programs: None, smol: Smol, tmp_path: Path) -> None:
    """A torn file; one directory serves one server; what would change the rows, and a size that is none."""
    tmp_path.chmod(0o700)
    (tmp_path / "torn.ikv").write_bytes(smol.ikv.read_bytes()[:-100])
    (tmp_path / "right.ikv").write_bytes(smol.ikv.read_bytes())
    with keep(smol, tmp_path) as facts:
        assert [p["file"] for p in facts["prefixes"]] == [str(tmp_path / "right.ikv")]
        for arguments, code, said in [
            (["--keep", tmp_path], 1, "another server keeps its prompts in"),
            (["--keep", tmp_path, "--no-prefix"], 2, "none are to be used"),
            (["--keep", tmp_path, "--keep-size", "many"], 2, "give a size, such as 500M"),
            (["--keep", tmp_path, "--", "--rope-freq-base", "10"], 2, "--rope-freq-base changes it"),
            (["--keep", smol.gguf], 2, "is no directory to keep prompts in"),
        ]:
            command = [sys.executable, "-m", "intactkv_export", "serve", smol.gguf, *arguments]
            done = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout) == (code, ""), done
            assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
        facts["process"].terminate()
        said = facts["process"].stderr.read()
    assert "torn.ikv is left out" in said and said.count("\n") == 1, said


def test_a_prefix_longer_than_a_window_is_not_cut(tmp_path: Path) -> None:
    """llama-server would evaluate the prompt in two parts for a checkpoint, and the first would be computed."""
    pytest.importorskip("torch")
    random_models.to_gguf([random_models.build("gemma3", tmp_path / "gemma3")])
    gguf = tmp_path / "gemma3.gguf"  # a window of 8
    long = {}
    for n in (6, 1600):
        tokens = [1, *([7, 8, 9] * n)][:n]
        description, K, V, _ = llama_engine.compute(gguf, tokens, cache_dtype="f16", n_threads=2)
        (tmp_path / f"{n}.ikv").write_bytes(ikv.build(description, tokens, K, V, ORIGIN))
        settings = choose_settings(gguf, prefixes=[tmp_path / f"{n}.ikv"], port=0, kv_type="f16")
        long[n] = "--ctx-checkpoints 0 --batch-size 2112" in " ".join(settings.arguments), len(settings.notes)
    assert long == {6: (False, 0), 1600: (True, 1)}


def test_one_is_made_again_at_full_precision(programs: None, smol: Smol, tmp_path: Path) -> None:
    """prefix REFERENCE --like FILE: in the directory it takes the place of the kept one."""
    directory = tmp_path / "kept"
    with keep(smol, directory) as facts:
        for text in QUESTIONS[:3]:
            ask(facts["url"], text)
        (path,) = until(lambda: kept_in(directory))
    out = directory / "porter.ikv"
    assert main(["prefix", str(smol.reference), "--like", str(path), "-o", str(out)]) == 0
    assert ikv.read(out).tokens == ikv.read(path).tokens
    with keep(smol, directory) as facts:
        assert [p["file"] for p in facts["prefixes"]] == [str(out)]
    assert not path.exists()


@pytest.mark.parametrize("batch", [2048, 64])
def test_a_model_without_attention_layers(programs: None, tmp_path: Path, batch: int) -> None:
    """No cell says which tokens a sequence has, and the server cuts each prompt, for checkpoints, and goes on behind
    them: what three prompts begin with is kept all the same, and the next start has it."""
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    raw = hybrids.write_rwkv7(tmp_path / "raw.gguf")
    path = ikv.rewrite(raw, {"tokenizer.chat_template": template}, tmp_path / "rwkv7.gguf")
    directory = tmp_path / "kept"
    arguments = [path, "--ctx-size", 2048, "--parallel", 1, "--kv-type", "f16", "--keep", directory]
    arguments += ["--", "--no-warmup", "--batch-size", batch, "--ubatch-size", min(batch, 512)]
    with served(*arguments) as first:
        for text in QUESTIONS[:3]:
            ask(first["url"], text)
        (kept,) = until(lambda: kept_in(directory))
        until(lambda: not notes_in(directory))
    prefix = ikv.read(kept)
    text = prefix.manifest["text"].replace("\u2581", " ")  # spaces, as such a vocabulary writes them
    assert text.endswith(f"<system>{SYSTEM}\n<user>") and len(prefix.tokens) > 512
    os.utime(kept, (1e9, 1e9))
    with served(*arguments) as second:
        assert [p["tokens"] for p in second["prefixes"]] == [len(prefix.tokens)]
        for text in QUESTIONS:
            assert ask(second["url"], text)
        assert kept.stat().st_mtime > 1e9  # it was used
        assert kept_in(directory) == [kept] and not notes_in(directory)
