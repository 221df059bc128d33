"""Layers on other machines: two of upstream's RPC servers on the loopback, logits as when all is here.

An RPC server takes every op, so these are also the tests of what must not leave this process.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from tests.support import own_process
from tests.support.smol import Smol


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """Addresses of two servers. Skips where upstream's programs were not built."""
    try:
        program = library.programs_path() / "ggml-rpc-server"
    except IntactKVError as error:
        pytest.skip(f"{error} (`make tools`)")
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (one, other)]
    started = [
        subprocess.Popen([program, "--host", "127.0.0.1", "--port", str(port), "--threads", "1"], stdout=-3, stderr=-3)
        for port in ports
    ]
    try:
        for port in ports:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for process in started:
            process.kill()
            process.wait()


SETUP = """
import ctypes, json, os
import numpy as np
from intactkv_export import library
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from tests.native.test_attention_now import Counted
from tests.support import lowlevel
from tests.support.lowlevel import Context, L, kl

model, machines, prefix = {model!r}, {machines!r}, ikv.read({prefix!r})

def load(n_layers):
    params = L.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = n_layers, False  # repacked weights are multiplied otherwise
    return L.llama_model_load_from_file(model.encode(), params)

here = load(0)
ggml, base = (ctypes.CDLL(f"{{os.environ[library.VARIABLE]}}/lib{{name}}.so") for name in ("ggml", "ggml-base"))
ggml.ggml_backend_reg_by_name.restype = base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
base.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
address = base.ggml_backend_reg_get_proc_address(ggml.ggml_backend_reg_by_name(b"RPC"), b"ggml_backend_rpc_add_server")
for machine in machines:
    ggml.ggml_backend_register(ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)(machine.encode()))
lines = []
log = L.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
L.llama_log_set(log, None)
there = load({n_layers})
used = [machine for machine in machines if any(f"[{{machine}}] model buffer" in line for line in lines)]

text = "What is the capital of France? Tell me about its river, its history and its people.<|im_end|>\\n"
tokens = prefix.tokens + lowlevel.tokenize(here, text)
n, end = len(prefix.tokens), len(prefix.tokens) + len(lowlevel.tokenize(here, text))
found = {{"used": used}}
"""

ALL = """
for k, v, tail in [("q8_0", "q4_0", 16), ("q4_0", "q4_0", 0), ("f16", "f16", 0)]:
    outputs = []
    for each in (here, there):
        ctx = Context(each, k, v, tail=tail, offload_kqv={offload})
        bindings.load(ctx.ptr, prefix.data)
        logits = [ctx.decode(tokens[n:-3], n), *(ctx.decode([tokens[i]], i) for i in range(end - 3, end))]
        counts = [ctx.attention(), ctx.n_intact(), ctx.n_tail(), ctx.arena_bytes()]
        assert ctx.restore(ctx.save())
        logits.append(ctx.decode([tokens[-1]], end))
        L.llama_memory_seq_rm(ctx.memory, 0, n + 4, n + 8)  # a context shift: rows of the arena are rotated
        L.llama_memory_seq_add(ctx.memory, 0, n + 8, -1, -4)
        logits.append(ctx.decode([tokens[5]], end - 3))
        outputs.append((counts, np.concatenate(logits)))
    (counts, a), (counts_there, b) = outputs
    found[f"{{k}},{{v}}"] = [counts, counts_there, float(np.abs(a - b).max() / np.abs(a).max())]
print(json.dumps(found))
"""


@pytest.mark.parametrize(("attention", "offload"), [("portable", True), ("fused", False)], ids=["all", "not the cache"])
def test_layers_on_two_machines(machines: list[str], smol: Smol, attention: str, offload: bool) -> None:
    """Prefix, tail, saved state and shift, all with their rows in the memory of others; or with the cache here, where
    the kernel reads it between layers that are elsewhere."""
    code = (SETUP + ALL).format(
        model=str(smol.gguf), machines=machines, prefix=str(smol.ikv), n_layers=99, offload=offload
    )
    done = own_process.run(code, INTACTKV_ATTN=attention, LLAMA_INTACTKV="off")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("used") == machines
    n = len(smol.tokens)
    for kv, (counts, counts_there, error) in found.items():
        assert counts_there == counts, kv
        quantized = kv != "f16,f16"
        assert counts[0] == (attention if quantized or not offload else "stock"), kv
        assert (counts[1] >= n) == quantized, (kv, counts)
        assert (counts[2] > 0) == (kv == "q8_0,q4_0") and (counts[3] > 0) == quantized, (kv, counts)
        assert error < 1e-3, (kv, error)  # seen: the same bits


SOME = """
counted, outputs = Counted(), []
for each, params in [(here, {{}}), (there, {{"cb_eval": counted.cb_eval}})]:
    ctx = Context(each, "q8_0", **params)
    bindings.load(ctx.ptr, prefix.data)
    outputs.append(ctx.decode(tokens[n:], n))
print(json.dumps([kl(*outputs), ctx.attention(), sorted(counted.ran)]))
"""


def test_some_layers_elsewhere(machines: list[str], smol: Smol) -> None:
    """Each layer has the attention that the memory of its rows allows."""
    code = (SETUP + SOME).format(model=str(smol.gguf), machines=machines, prefix=str(smol.ikv), n_layers=10)
    done = own_process.run(code, INTACTKV_ATTN="", LLAMA_INTACTKV="off")
    assert done.returncode == 0, done.stderr[-2000:]
    apart, said, ran = json.loads(done.stdout.splitlines()[-1])
    assert (said, ran) == ("portable", ["CUSTOM", "FLASH_ATTN_EXT"])
    assert apart < 2e-3
