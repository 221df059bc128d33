"""Names of outputs, and what they must not take the place of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from intactkv_export.errors import UsageError
from intactkv_export.prefix import ikv, outputs
from tests.support.smol import Smol


@pytest.mark.parametrize(
    ("out", "gguf", "ikv_", "bare"),
    [
        ("x", "x.gguf", "x.ikv", "x"),
        ("x.gguf", "x.gguf", None, "x"),
        ("x.GGUF", "x.GGUF", None, "x"),
        ("x.ikv", None, "x.ikv", "x"),
        ("x.Ikv", None, "x.Ikv", "x"),
        ("x-1.5b", "x-1.5b.gguf", "x-1.5b.ikv", "x-1.5b"),
        ("folder.gguf", None, None, "folder"),  # convert finds that the GGUF itself is a directory
        ("folder", None, None, None),
        ("new/", None, None, None),
        ("absent/x", None, None, None),
    ],
)
def test_one_rule_for_names(tmp_path: Path, out: str, gguf: str | None, ikv_: str | None, bare: str | None) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.gguf").mkdir()
    given = f"{tmp_path}/{out}"
    for function, wanted in (
        (lambda: outputs.named(given, ".gguf"), gguf),
        (lambda: outputs.named(given, ".ikv"), ikv_),
        (lambda: outputs.without_ending(given), bare),
    ):
        if wanted is None:
            with pytest.raises(UsageError, match="give|make it") as caught:
                function()
            assert "\n" not in str(caught.value)
        else:
            assert function() == tmp_path / wanted


def test_a_directory_of_the_name_is_no_obstacle(tmp_path: Path) -> None:
    """`convert ./SmolLM2 -o SmolLM2.gguf`"""
    (tmp_path / "SmolLM2").mkdir()
    assert outputs.without_ending(tmp_path / "SmolLM2.gguf") == tmp_path / "SmolLM2"
    with pytest.raises(UsageError, match="or SmolLM2.gguf for the files beside it"):
        outputs.without_ending(tmp_path / "SmolLM2")


def test_a_device_is_no_beginning_of_a_name() -> None:
    for function in (lambda path: outputs.named(path, ".ikv"), outputs.without_ending):
        with pytest.raises(UsageError, match="is a device"):
            function("/dev/null")


def test_no_other_model_is_replaced(smol: Smol, model: Callable[[str], Path], tmp_path: Path) -> None:
    whole = ikv.read(smol.ikv)
    other = shutil.copyfile(model("Q4_K_M"), tmp_path / "other.gguf")
    stamped = ikv.stamp(model("Q4_K_M"), whole.manifest["reference"]["sha256"], tmp_path / "stamped.gguf")
    prefix = shutil.copyfile(smol.ikv, tmp_path / "prefix.gguf")
    for path, why in ((other, "another model"), (stamped, "another model"), (prefix, "is a prefix file")):
        before = path.read_bytes()
        with pytest.raises(UsageError, match=why):
            ikv.embed(smol.gguf, whole, path)
        assert path.read_bytes() == before
    for path in (other, smol.gguf, smol.reference):
        with pytest.raises(UsageError, match="is a GGUF"):
            ikv.write(path, whole.data)
    copy = ikv.embed(smol.gguf, whole, tmp_path / "copy.gguf")
    ikv.embed(smol.gguf, ikv.read(smol.bos), copy)  # made before from the same model
    assert len(ikv.read(copy).tokens) == 1


def test_calibrate_and_extract_replace_no_input(smol: Smol, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from intactkv_export.calibration import calibrate

    start = shutil.copyfile(smol.ikv, tmp_path / "start.ikv")
    (tmp_path / "data.ikv").write_text("texts")
    (tmp_path / "link.ikv").symlink_to(smol.reference)
    for out, why in (
        (start, "is read here"),
        (tmp_path / "data.ikv", "is read here"),
        (smol.gguf, "is the name of a model"),
        (smol.reference, "is the name of a model"),
        (tmp_path / "link.ikv", "is a GGUF"),
    ):
        with pytest.raises(UsageError, match=why):
            calibrate(smol.reference, smol.gguf, prefix=start, data=tmp_path / "data.ikv", out=out)
    assert start.read_bytes() == smol.ikv.read_bytes() and not list(tmp_path.glob("*.calibrating"))


def test_what_convert_replaces(smol: Smol, model: Callable[[str], Path], tmp_path: Path) -> None:
    """What a conversion made, half a file, and nothing else."""
    outputs.check_converted(tmp_path / "absent.gguf")
    outputs.check_converted(smol.gguf)
    (tmp_path / "half.gguf").write_bytes(smol.gguf.read_bytes()[:1000])
    outputs.check_converted(tmp_path / "half.gguf")
    kept = ikv.rewrite(smol.gguf, {"intactkv.converted.sha256": "ab"}, tmp_path / "kept.gguf")
    outputs.check_converted(kept, kept_reference=True)
    for path, is_kept in ((model("Q4_K_M"), False), (smol.reference, False), (kept, False), (smol.gguf, True)):
        with pytest.raises(UsageError, match="would be lost: choose another name"):
            outputs.check_converted(path, is_kept)


def test_an_ending_is_no_name(tmp_path: Path) -> None:
    for call in (lambda: outputs.named(tmp_path / ".gguf", ".gguf"), lambda: outputs.without_ending(tmp_path / ".ikv")):
        with pytest.raises(UsageError, match="is an ending without a name: give one, such as .*/model"):
            call()
