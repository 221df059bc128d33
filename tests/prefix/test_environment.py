"""LLAMA_INTACTKV, for what takes one prefix and was told none: IntactLlama and chat."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.prefix import ikv
from intactkv_export.runtime import IntactLlama
from tests.support.smol import Smol


@pytest.fixture(scope="module")
def made(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the first token's prefix embedded."""
    return ikv.embed(smol.gguf, ikv.read(smol.bos), tmp_path_factory.mktemp("embedded") / "made.gguf")


def source(model: Path) -> Path | None:
    prefix = ikv.own(model)
    return None if prefix is None else prefix.source


def test_the_variable_goes_before_the_model(
    made: Path, smol: Smol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_INTACTKV", raising=False)
    assert source(made) == made
    for said in ("", os.pathsep):
        monkeypatch.setenv("LLAMA_INTACTKV", said)
        assert source(made) == made
    monkeypatch.setenv("LLAMA_INTACTKV", "off")
    assert source(made) is None
    with pytest.raises(UsageError, match="LLAMA_INTACTKV is off, and a prefix of .* is needed"):
        ikv.of_model(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv("LLAMA_INTACTKV", f"{os.pathsep}{smol.ikv}")
        assert source(made) == smol.ikv
        monkeypatch.setenv("LLAMA_INTACTKV", str(made))
        assert source(smol.gguf) == made
    for name, path in (("b.ikv", smol.bos), ("a.ikv", smol.ikv)):
        shutil.copy(path, tmp_path / name)
    monkeypatch.setenv("LLAMA_INTACTKV", os.pathsep.join([str(tmp_path), str(smol.bos)]))
    with pytest.warns(UserWarning, match="LLAMA_INTACTKV names 3 prefixes, and here one is used: .*a.ikv"):
        assert source(made) == tmp_path / "a.ikv"


def test_what_it_names_and_is_not_there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_INTACTKV", "/no/such.ikv")
    with pytest.raises(IntactKVError, match=r"LLAMA_INTACTKV names a prefix that cannot be used: .*/no/such.ikv"):
        ikv.own(made)
    monkeypatch.setenv("LLAMA_INTACTKV", str(tmp_path))
    with pytest.raises(UsageError, match="LLAMA_INTACTKV names .*there is no .ikv file in the directory"):
        ikv.own(made)


def test_who_names_one_has_it(made: Path, smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    for said, prefix, path in (("off", "auto", None), ("off", smol.ikv, smol.ikv), (str(smol.ikv), "auto", smol.ikv)):
        monkeypatch.setenv("LLAMA_INTACTKV", said)
        llama = IntactLlama(made, prefix, "q8_0", n_ctx=256, n_threads=2)
        assert llama.prefix_path == path
        llama.eval(smol.tokens)
        assert llama.intact_cells == (0 if path is None else len(smol.tokens))
        llama.close()


def test_chat_says_why_in_one_sentence(made: Path) -> None:
    command = [sys.executable, "-m", "intactkv_export", "chat", str(made), "-p", "Hello", "-n", "1"]
    environment = {**os.environ, "LLAMA_INTACTKV": "/no/such.ikv"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1, done
    assert done.stderr.startswith("intactkv-export: LLAMA_INTACTKV names a prefix"), done
