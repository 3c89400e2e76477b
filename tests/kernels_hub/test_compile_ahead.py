"""Kernels that are compiled beside each other before their launches. Compiling needs no GPU; nothing is launched here."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# For a GPU that is not there, outside Triton's interpreter.
SCRIPT = """
import json, threading
import torch
from nemotron_super.kernels_hub import compile_ahead, registry
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

class Hopper:
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

driver.set_active(Hopper())
torch.cuda.set_device = lambda device: None
compiled, loaded = [], []
main = threading.main_thread()
knobs.compilation.listener = lambda *args, **named: compiled.append(threading.current_thread() is main)
CompiledKernel._init_handles = lambda kernel: loaded.append(kernel.name)
bundle = registry._bundle()
x, weight = torch.randn(64, 256).bfloat16(), torch.ones(256)
found = {}
kernels = list(compile_ahead._bundled_kernels())
with compile_ahead.compiling_ahead(torch.device("cuda", 0)):
    found["active"] = compile_ahead.active()
    y = [bundle.rms_norm(x, weight, 1e-5) for _ in range(3)]
    bundle.relu_squared(x)
    found["zeros"] = not any(t.any() for t in y) and torch.full((9,), 7.0).sum().item() == 63
    found["new"] = [t.any().item() for t in (torch.empty(999), torch.empty_like(y[0]), x.new_empty(999))]
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(compile_ahead.active()))
    thread.start(); thread.join()
found["elsewhere"] = elsewhere
found["left"] = compile_ahead.active() or any("run" in vars(kernel) for kernel in kernels)
found["compiled"], found["loaded"] = compiled, sorted(loaded)
# What the launch would find: no second compiling.
forward = next(k for k in kernels if k.__name__ == "_forward_kernel" and "rms_norm" in k.__module__)
found["kept"] = [len(forward.device_caches[0][0])]
print(json.dumps(found))
"""


def ran(script, cache):
    """What it prints, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_kernels_are_compiled_by_threads_and_not_launched(tmp_path):
    found = ran(SCRIPT, tmp_path)
    assert found["active"] and found["elsewhere"] == [False] and not found["left"]
    assert found["zeros"] and found["new"] == [False] * 3
    # Of three equal calls one is compiled; its launcher is made there too.
    assert found["compiled"] == [False, False] and len(found["loaded"]) == 2
    assert found["kept"] == [1]


def test_a_kernel_that_cannot_be_compiled_is_left_to_its_launch(tmp_path):
    broken = SCRIPT.replace("loaded.append(kernel.name)", "1 / 0")
    assert ran(broken, tmp_path)["kept"] == [0]
