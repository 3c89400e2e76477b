"""The first call of `generate` on a GPU: kernels are compiled beside each other, and nothing else changes."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU: kernels are compiled and loaded here"
    ),
]
# In a process whose kernels are not compiled yet: who compiles them, and what is written then and without compiling ahead.
SCRIPT = """
import json, sys, threading
import torch
from nemotron_super import NemotronHForCausalLM
from nemotron_super.modeling import captured_decoding, generation_mixin
from test_captured_on_gpu import WIDTHS
from nemotron_super import preset
from triton import knobs

options, by = json.loads(sys.argv[1]), []
knobs.compilation.listener = lambda *args, **named: by.append(threading.current_thread() is threading.main_thread())
torch.manual_seed(0)
model = NemotronHForCausalLM(preset("tiny", **WIDTHS)).eval().to(torch.bfloat16).cuda()
ids = torch.randint(3, 4096, (2, 40)).cuda()

def ask():
    torch.manual_seed(1)
    return model.generate(ids, max_new_tokens=9, pad_token_id=0, **{"do_sample": False} | options).tolist()

first = ask()
main, threads = sum(by), len(by) - sum(by)
again = ask()
generation_mixin.compile_first_call = lambda *args: None
without = ask()
idle = len(captured_decoding._idle.get(model, []))
print(json.dumps([main, threads, len(by), first == without, again == without, idle]))
"""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "do_sample": True, "top_p": 0.9},
        {"cache_implementation": "static", "use_mtp": True, "num_assistant_tokens": 3},
        {"use_mtp": True, "num_assistant_tokens": 3},
        {"cache_implementation": "static", "return_dict_in_generate": False, "prefill_chunk_size": 16},
    ],
)
def test_kernels_of_a_first_call_are_compiled_by_threads(options, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    here = os.path.dirname(__file__)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(options)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    main, threads, total, first, again, idle = json.loads(done.stdout.splitlines()[-1])
    assert threads >= 15 and main == 0
    assert total == threads
    assert first and again
    assert idle == (1 if "cache_implementation" in options else 0)
