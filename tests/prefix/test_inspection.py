"""inspect: what it says about a prefix, and that pivot tokens stand out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.prefix import ikv, inspection
from tests.support import extra_cells
from tests.support.smol import Smol


def text(smol: Smol, every: bool = False) -> list[str]:
    prefix = ikv.load(smol.ikv)
    return [line.plain for line in inspection.report(prefix, inspection.token_texts(prefix, smol.gguf), None, every)]


def test_report_fits_a_terminal_and_says_what_there_is(smol: Smol) -> None:
    lines = text(smol)
    assert max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    prefix = ikv.read(smol.ikv)
    for part in ("24 tokens", "named SmolLM", "3 KV heads of 64", "RoPE base 100000", "F16.gguf", prefix.sha256[:32]):
        assert part in said
    assert "0-29" in said and f"{24 * 2 * 3 * 64 * 2:,} bytes each" in said


def test_extra_cells_are_shown_and_counted(smol: Smol, tmp_path: Path) -> None:
    prefix = extra_cells.write(smol.ikv, smol.reference, tmp_path / "x.ikv")
    lines = [line.plain for line in inspection.report(prefix, inspection.token_texts(prefix, smol.gguf), None)]
    said = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80 and "24 tokens and 16 extra cells" in said and "0-29: 40 cells, 3 KV" in said
    assert f"{40 * 2 * 3 * 64 * 2:,} bytes each" in said and " cells that stand out less" in said
    every = [line.plain for line in inspection.report(prefix, None, None, every=True)]
    assert sum("(no token)" in line for line in every) == 16 and not any(x.startswith("*2") for x in every)
    made = json.loads(json.dumps(inspection.as_json(prefix), allow_nan=False))
    assert made["extra_cells"] == made["manifest"]["extra_cells"] == 16 and made["pivots"] == [0]
    assert len(made["layers"][0]["K_norm"]) == made["layers"][0]["cells"] == 40
    assert inspection.as_json(ikv.read(smol.ikv))["extra_cells"] == 0


def test_norms_are_those_of_the_rows(smol: Smol) -> None:
    prefix = ikv.read(smol.ikv)
    K, V = inspection.norms(prefix)
    assert K.shape == V.shape == (30, 24)
    row = prefix.layers[7].K[5].astype(np.float64)
    assert K[7, 5] == pytest.approx(np.sqrt((row**2).sum()))


def test_the_first_token_is_the_pivot(smol: Smol) -> None:
    prefix = ikv.read(smol.ikv)
    assert inspection.as_json(prefix)["pivots"] == [0]
    rows = [line for line in text(smol) if "<|im_start|>" in line]
    assert rows[-2].startswith("* 0 ") and rows[-1].startswith(" 21 ")
    first, later = (sum(line.count(c) for c in "▓█") for line in rows[-2:])
    assert first > 30 > 10 > later, "visible at a glance"


def test_long_prefixes_are_shortened_and_all_shows_them(smol: Smol) -> None:
    prefix = ikv.read(smol.ikv)
    K = {x.il: np.concatenate([x.K] * 20) for x in prefix.layers}
    V = {x.il: np.concatenate([x.V] * 20) for x in prefix.layers}
    rest = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")}
    data = ikv.build(prefix.manifest["model"], prefix.tokens * 20, K, V, rest)
    long = ikv.read(data)
    lines = [line.plain for line in inspection.report(long, None, None)]
    assert len(lines) < 90 and max(map(len, lines)) <= 80
    assert any("tokens that stand out less" in line for line in lines)
    pivots = inspection.as_json(long)["pivots"]
    assert pivots == list(range(0, 480, 24)) and f"*{pivots[3]:3} id 1" in "\n".join(lines)
    assert sum(line.plain[1:4].strip().isdigit() for line in inspection.report(long, None, None, every=True)) >= 480


def test_a_sliding_window_leaves_blanks() -> None:
    model = {
        "arch": "gemma3", "n_ctx_train": 64, "n_vocab": 10, "vocab_sha256": "0" * 64,
        "caches": [
            {"n_swa": 0, "swa_type": 0, "layers": [_layer(0)]},
            {"n_swa": 2, "swa_type": 1, "layers": [_layer(1)]},
        ],
        "rope": {
            "type": "neox", "n_rot": 4, "scale": 1.0, "scaling": "none", "n_ctx_orig": 64, "ext_factor": 0.0,
            "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "factors": "none",
        },
    }  # fmt: skip
    rows = {il: np.ones((5, 1, 4), np.float16) for il in (0, 1)}
    manifest = {
        "text": "x", "messages": None, "bos_only": False, "chat_template_sha256": None, "calibrated": None,
        "reference": {"sha256": "0" * 64, "dtype": "F32", "name": "x", "quantized": False},
        "engine": {"name": "llama", "dtype": "f32", "versions": {}}, "created_by": "the tests",
    }  # fmt: skip
    prefix = ikv.read(ikv.build(model, [1, 2, 3, 4, 5], rows, rows, manifest))
    K, _ = inspection.norms(prefix)
    assert np.isnan(K[1, :3]).all() and (K[1, 3:] == 2).all() and (K[0] == 2).all()
    said = "\n".join(line.plain for line in inspection.report(prefix, None, None))
    assert "0: 5 tokens" in said and "1: 2 tokens" in said
    json.dumps(inspection.as_json(prefix), allow_nan=False)


def _layer(il: int) -> dict[str, object]:
    return {"il": il, "n_head_kv": 1, "head_dim_k": 4, "head_dim_v": 4, "rope_base": 10000.0}


def test_files_that_are_none(tmp_path: Path, smol: Smol) -> None:
    (tmp_path / "x").write_bytes(b"not a prefix")
    for path, reason in ((tmp_path / "x", "neither"), (tmp_path / "y", "cannot read"), (smol.reference, "no prefix")):
        with pytest.raises(IntactKVError, match=reason):
            ikv.load(path)
