"""Getting the pinned source and patching it, what stops a build and how it says so, and what a build installs."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from intactkv_export import library
from tests.support.paths import REPO

NATIVE = REPO / "native"
ARCHIVE = "llama_cpp_python-0.3.36.tar.gz"
PINNED = re.search(r'SHA256 = "(\w+)"', (NATIVE / "get_source.py").read_text())[1]  # type: ignore[index]


def get_source(*arguments: object, native: Path = NATIVE, **env: object) -> subprocess.CompletedProcess[str]:
    """native/get_source.py as a process; env is added to the environment."""
    return subprocess.run(
        [sys.executable, str(native / "get_source.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **{name: str(value) for name, value in env.items()}},
        timeout=900,
    )


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence with which a process failed."""
    lines = [line for line in done.stderr.splitlines() if "downloading the source" not in line]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(lines) == 1 and lines[0].startswith("intactkv-export: "), done.stderr
    return lines[0].removeprefix("intactkv-export: ")


@pytest.fixture
def native_copy(tmp_path: Path) -> Path:
    """The fetch script and the patch in a directory where a test may change the patch."""
    copy = tmp_path / "native"
    copy.mkdir()
    for name in ("get_source.py", "llama.cpp.patch"):
        shutil.copy(NATIVE / name, copy)
    return copy


def no_index(tmp_path: Path, **more: object) -> dict[str, object]:
    """An environment in which pip knows no index and the cache is empty."""
    off = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    return {**off, "INTACTKV_SOURCE_CACHE": tmp_path / "cache", "INTACTKV_SOURCE": "", **more}


# --- the archive ---


def test_wrong_checksum_of_a_named_archive(tmp_path: Path) -> None:
    other = tmp_path / ARCHIVE
    other.write_bytes(b"not the source")
    said = sentence(get_source(tmp_path / "dest", INTACTKV_SOURCE=other))
    assert "wrong checksum" in said and str(other) in said and "INTACTKV_SOURCE" in said
    assert hashlib.sha256(b"not the source").hexdigest() in said and PINNED in said
    assert not (tmp_path / "dest").exists()


def test_wrong_checksum_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(b"")
    said = sentence(get_source("--archive", INTACTKV_SOURCE="", INTACTKV_SOURCE_CACHE=tmp_path))
    assert "wrong checksum" in said and str(tmp_path / ARCHIVE) in said and "delete that file" in said


def test_named_archive_is_missing(tmp_path: Path) -> None:
    said = sentence(get_source("--archive", INTACTKV_SOURCE=tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in said and "No such file" in said


def test_no_network(tmp_path: Path) -> None:
    # Port 9 of this machine: refused at once, as an unreachable index would be after a while.
    env = no_index(tmp_path, PIP_NO_INDEX="0", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    said = sentence(get_source("--archive", **env))
    assert "cannot download llama-cpp-python 0.3.36" in said and "check the network" in said
    assert "refused" in said and "INTACTKV_SOURCE" in said
    assert not list((tmp_path / "cache").iterdir())


def test_index_without_the_package(tmp_path: Path) -> None:
    said = sentence(get_source("--archive", **no_index(tmp_path)))
    assert "cannot download" in said and "index settings" in said
    assert not list((tmp_path / "cache").iterdir())


def test_index_serves_other_bytes(tmp_path: Path) -> None:
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.3.36\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": """
from pathlib import Path
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    name = "llama_cpp_python-0.3.36.dist-info"
    Path(directory, name).mkdir()
    Path(directory, name, "METADATA").write_text(Path("PKG-INFO").read_text())
    return name
""",
    }
    links = tmp_path / "links"
    links.mkdir()
    with tarfile.open(links / ARCHIVE, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-0.3.36/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    said = sentence(get_source("--archive", **no_index(tmp_path, PIP_FIND_LINKS=links)))
    assert "wrong checksum" in said and "the index served other bytes" in said
    assert not list((tmp_path / "cache").iterdir())


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    said = sentence(get_source("--archive", **no_index(tmp_path)))
    assert "cannot write to the source cache" in said and "INTACTKV_SOURCE_CACHE" in said


# --- the patch ---


def test_source_is_patched_once(native_copy: Path, tmp_path: Path) -> None:
    """The same bytes as patch(1) makes; nothing is touched when nothing changed, and only what must be otherwise."""
    dest, pristine = tmp_path / "dest", tmp_path / "pristine"
    patch = native_copy / "llama.cpp.patch"
    assert get_source(dest, native=native_copy).returncode == 0
    assert get_source(pristine, "--unpatched", native=native_copy).returncode == 0
    assert (dest / "LICENSE").is_file() and (dest / "tools").exists() and not (dest / "tests").exists()
    changed = set(re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE))
    files = [path.relative_to(dest) for path in dest.rglob("*") if path.is_file()]
    assert {str(file) for file in files if (dest / file).read_bytes() != (pristine / file).read_bytes()} == changed
    if shutil.which("patch"):
        subprocess.run(["patch", "-p1", "-s", "-i", str(patch)], cwd=pristine, check=True)
        assert all((pristine / file).read_bytes() == (dest / file).read_bytes() for file in files)

    def times() -> dict[Path, int]:
        return {file: (dest / file).stat().st_mtime_ns for file in files}

    before = times()
    # The stamp is enough: neither cache nor network is asked.
    assert get_source(dest, native=native_copy, **no_index(tmp_path)).returncode == 0
    assert times() == before

    first = patch.read_bytes().split(b"diff --git ")[1]
    patch.write_bytes(b"diff --git " + first)
    assert get_source(dest, native=native_copy).returncode == 0
    still = re.search(rb"^\+\+\+ b/(\S+)", first, re.MULTILINE)[1].decode()  # type: ignore[index]
    assert {str(file) for file, time in times().items() if time != before[file]} == changed - {still}


def test_interrupted_source_is_made_again(native_copy: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    assert get_source(dest, native=native_copy).returncode == 0
    (tmp_path / "dest.stamp").unlink()
    (dest / "CMakeLists.txt").write_text("half")
    (dest / "left-over.cpp").touch()
    assert get_source(dest, native=native_copy).returncode == 0
    assert "project" in (dest / "CMakeLists.txt").read_text() and not (dest / "left-over.cpp").exists()


def broken_context(patch: str) -> str:
    return re.sub(r"^ (\S.*)$", r" \1 // no longer so", patch, count=1, flags=re.MULTILINE)


def other_file(patch: str) -> str:
    return patch.replace("--- a/src/", "--- a/source/", 1)


def cut_short(patch: str) -> str:
    return patch.rstrip("\n").rpartition("\n")[0] + "\n"


def no_diff_at_all(patch: str) -> str:
    return "@@ nothing\n"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (broken_context, "the patch expects '.* // no longer so'"),
        (other_file, "it changes 'source/.*', which llama-cpp-python 0.3.36 does not have"),
        (cut_short, "is not part of a hunk: ''"),
        (no_diff_at_all, "is not a hunk header: '@@ nothing'"),
    ],
)
def test_patch_that_does_not_apply(native_copy: Path, tmp_path: Path, change: Callable[[str], str], says: str) -> None:
    patch = native_copy / "llama.cpp.patch"
    patch.write_text(change(patch.read_text()))
    said = sentence(get_source(tmp_path / "dest", native=native_copy))
    assert said.startswith("the patch does not apply: ") and re.search(says, said), said
    assert not (tmp_path / "dest").exists()


def test_no_patch(native_copy: Path, tmp_path: Path) -> None:
    (native_copy / "llama.cpp.patch").unlink()
    said = sentence(get_source(tmp_path / "dest", native=native_copy))
    assert "cannot read the patch" in said and str(native_copy / "llama.cpp.patch") in said


# --- cmake ---


def configure(build: Path, **env: object) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=search)
    if not cmake:
        pytest.skip("no cmake")
    return subprocess.run(
        [cmake, "-S", str(NATIVE), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": search, **{name: str(value) for name, value in env.items()}},
        timeout=600,
    )


def test_no_compiler(tmp_path: Path) -> None:
    done = configure(tmp_path / "build", CC="/nonexistent/cc", CXX="/nonexistent/c++")
    said = [line.strip() for line in done.stderr.splitlines() if "intactkv-export: " in line]
    assert done.returncode != 0 and len(said) == 1, done.stderr
    assert said[0].startswith("intactkv-export: no working C and C++ compiler found: install one")


def test_cmake_says_why_there_is_no_source(tmp_path: Path) -> None:
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler")
    done = configure(tmp_path / "build", INTACTKV_SOURCE=NATIVE / "CMakeLists.txt")
    said = [line.strip() for line in done.stderr.splitlines() if "intactkv-export: " in line]
    assert done.returncode != 0 and len(said) == 1, done.stderr
    assert said[0].startswith("intactkv-export: wrong checksum: ") and PINNED in said[0]


# --- what is installed ---


def python(code: str, **env: object) -> subprocess.CompletedProcess[str]:
    full = {name: value for name, value in os.environ.items() if name != library.VARIABLE}
    full.update({name: str(value) for name, value in env.items()})
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=full, timeout=600)


def test_installed_files() -> None:
    try:
        lib = library.library_path()
    except library.IntactKVError:
        pytest.skip("runs on libraries that LLAMA_CPP_LIB_PATH names: none are installed")
    names = {path.name.removeprefix("lib").split(".")[0] for path in lib.iterdir()}
    assert names >= {"llama", "ggml", "ggml-base", "ggml-cpu"}
    assert not any(path.is_symlink() for path in lib.iterdir())
    converter = library.converter_path()
    assert converter.is_file() and (converter.parent / "gguf-py" / "gguf" / "gguf_writer.py").is_file()
    assert (converter.parent / "conversion" / "llama.py").is_file()
    licences = lib.parent / "licenses"
    for name in ("llama.cpp", "llama-cpp-python", "gguf-py"):
        assert "MIT License" in (licences / f"LICENSE.{name}").read_text()
    done = subprocess.run([sys.executable, "-m", "intactkv_export.library"], capture_output=True, text=True)
    assert done.stdout == f"{lib}\n" and done.returncode == 0


def test_importing_the_package_is_cheap() -> None:
    done = python(
        "import sys, intactkv_export\n"
        "print(intactkv_export.__version__, *sorted(set(sys.modules) & {'llama_cpp', 'numpy', 'torch', 'gguf'}))"
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout), done.stdout + done.stderr


def test_public_names() -> None:
    done = python(
        "from intactkv_export import convert, IntactLlama, library_path\n"
        "print(callable(convert), convert.__module__, IntactLlama.__name__, library_path.__name__)\n"
        "import intactkv_export; intactkv_export.nothing"
    )
    assert done.stdout == "True intactkv_export.conversion.convert IntactLlama library_path\n", done.stderr
    assert done.stderr.endswith("AttributeError: module 'intactkv_export' has no attribute 'nothing'\n")


def test_libraries_are_ours_and_without_amx() -> None:
    assert library.is_patched()
    assert b"AMX" not in library.load().llama_print_system_info()


def test_a_library_path_that_the_user_chose_is_respected(stock_lib: Path) -> None:
    done = python(
        "from intactkv_export import library; library.load(); print(library.is_patched())",
        LLAMA_CPP_LIB_PATH=stock_lib,
    )
    assert done.stdout == "False\n", done.stderr


def test_llama_cpp_imported_before_with_other_libraries(stock_lib: Path) -> None:
    done = python(
        f"""
import os
os.environ["LLAMA_CPP_LIB_PATH"] = {str(stock_lib)!r}
import llama_cpp
del os.environ["LLAMA_CPP_LIB_PATH"]  # as if they were the package's own
from intactkv_export import library
try:
    library.load()
except library.IntactKVError as error:
    print(error)
"""
    )
    assert done.stdout.startswith("llama_cpp was imported before intactkv_export with the libraries in "), done.stderr
    assert str(stock_lib) in done.stdout and "LLAMA_CPP_LIB_PATH" in done.stdout


def test_a_library_path_with_nothing_in_it(tmp_path: Path) -> None:
    code = "from intactkv_export import library\ntry: library.load()\nexcept library.IntactKVError as e: print(e)"
    done = python(code, LLAMA_CPP_LIB_PATH=tmp_path)
    assert done.stdout.count("\n") == 1 and f"libraries in {tmp_path} (" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "env, spins",
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["ours", "spins given", "policy given"],
)
def test_waiting_threads_leave_the_core_to_others(env: dict[str, str], spins: str) -> None:
    """They look a few times whether the others have come, then sleep; what the user set wins, and nothing is left."""
    code = "import os; from intactkv_export import library; library.load(); print(os.environ.get('GOMP_SPINCOUNT'))"
    done = python(code, OMP_DISPLAY_ENV="verbose", **env)
    said = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not said:
        pytest.skip("these libraries do not use GNU's OpenMP")
    assert set(said) == {spins}
    assert done.stdout == f"{env.get('GOMP_SPINCOUNT')}\n"
