"""The first call and the first step of training on a GPU: kernels are compiled beside each other, and nothing else changes."""

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
# In a process whose kernels are not compiled yet: who compiles them, and what comes out then and without compiling ahead.
MODEL = """
import json, sys, threading
import torch
from nemotron_super import NemotronHForCausalLM, preset
from nemotron_super.modeling import captured_decoding, first_call, generation_mixin
from test_captured_on_gpu import WIDTHS
from triton import knobs

options, by = json.loads(sys.argv[1]), []
knobs.compilation.listener = lambda *args, **named: by.append(threading.current_thread() is threading.main_thread())
torch.manual_seed(0)
model = NemotronHForCausalLM(preset("tiny", **WIDTHS)).eval().to(torch.bfloat16).cuda()
ids = torch.randint(3, 4096, (2, 40)).cuda()
"""
GENERATE = (
    MODEL
    + """
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
)
TRAIN = (
    MODEL
    + """
if options.pop("checkpointing", False):
    model.gradient_checkpointing_enable()
packed = torch.arange(20).repeat(2, 2).cuda() if options.pop("packed", False) else None

def step():
    model.train().zero_grad()
    loss = model(ids, labels=ids, position_ids=packed).loss
    loss.backward()
    return [loss.item()] + [p.grad.float() for p in model.parameters()]

def near(found, other):
    return all(abs(a - b) < 0.01 * (1 + abs(b)) if isinstance(a, float) else (a - b).norm() < 0.02 * b.norm() + 1e-6
               for a, b in zip(found, other))

first = step()
main, threads = sum(by), len(by) - sum(by)
again = step()
total = len(by)
first_call._gone_through[model] = {first_call._STEP}
without = step()
print(json.dumps([main, threads, total, near(first, without), near(again, without)]))
"""
)


def ran(script, options, cache):
    """What it prints."""
    here = os.path.dirname(__file__)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", script, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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
    main, threads, total, first, again, idle = ran(GENERATE, options, tmp_path)
    assert threads >= 15 and main == 0
    assert total == threads
    assert first and again
    assert idle == (1 if "cache_implementation" in options else 0)


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"packed": True}])
def test_kernels_of_a_first_step_are_compiled_by_threads(options, tmp_path):
    main, threads, total, first, again = ran(TRAIN, options, tmp_path)
    assert threads >= 15 and main == 0
    assert total == threads
    assert first and again
