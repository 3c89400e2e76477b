"""Opening a packed checkpoint in several files: how much CPU memory that takes beyond the model itself.

Measured in a process of its own, as the kernel counts it (/proc/self/status), by a thread that looks every millisecond. Where the
model does not stay in CPU memory, the whole growth of the process counts, pages of mapped files included. The meta device takes
the place of a GPU, where there is none: tensors are read, sent there and forgotten. On the CPU what counts is memory that is no file's
(RssAnon) beyond the stacked experts, which are copies; the other weights stay mapped, and pages of files are the kernel's to drop.
"""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from nemotron_super import NemotronHConfig, NemotronHForCausalLM
from nemotron_super.conversion.quantizer import ModelOptQuantizer, install_empty, resolve_recipe
from nemotron_super.modeling.unmapped_slices import Room, unmapped_slices
from safetensors.torch import load_file
from transformers.modeling_utils import LoadStateDictConfig

PROGRAM = """
import json, re, sys, threading, time
import torch
from nemotron_super import NemotronHForCausalLM
from safetensors.torch import load_file

folder, device = sys.argv[1:]
fields = ("RssAnon",) if device == "cpu" else ("RssAnon", "RssFile", "RssShmem")
torch.set_num_threads(1)


def memory():
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{field}:\\s+(\\d+) kB", status)[1]) * 1024 for field in fields)


def growth():
    peak, done = memory(), threading.Event()
    before = peak

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = NemotronHForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device})
    done.set()
    watcher.join()
    kept = sum(t.nbytes for n, t in model.state_dict().items() if ".experts." in n) if device == "cpu" else 0
    return peak - before - kept


if device == "cuda":  # what CUDA keeps on the host, which the first model makes, is not a checkpoint's
    NemotronHForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device})
load = NemotronHForCausalLM._load_pretrained_model


def all_at_once(model, state_dict, files, *rest):
    return load(model, {n: t.clone() for file in files for n, t in load_file(file).items()}, files, *rest)


as_it_is = growth()
NemotronHForCausalLM._load_pretrained_model = staticmethod(all_at_once)
print(json.dumps([as_it_is, growth()]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The release's mix: random weights in five files, most of it experts whose stacks span two files."""
    config = NemotronHConfig(
        hybrid_override_pattern="MEMEM*EMEME",
        vocab_size=45_056,  # embeddings and head are most of a file each
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        mamba_num_heads=16,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_groups=8,
        n_routed_experts=32,
        num_experts_per_tok=6,
        moe_latent_size=512,
        moe_intermediate_size=1600,
        moe_shared_expert_intermediate_size=1024,
    )
    with torch.device("meta"):
        model = NemotronHForCausalLM(config).to(torch.bfloat16)
    recipe = resolve_recipe(model, "release")
    install_empty(model, recipe).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        if tensor.element_size() == 1:
            tensor.view(torch.uint8).random_(1, 127)  # codes of either format, and scales that are numbers
        else:
            tensor.fill_(1.0)
    model.hf_quantizer = ModelOptQuantizer(recipe, pre_quantized=False)
    model.config.quantization_config = recipe
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="60MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "device",
    [
        "meta",
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU to load to"),
            ],
        ),
    ],
)
def test_less_than_the_largest_file(checkpoint, device):
    files = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert len(files) >= 5 and sum(files) > 4 * max(files)
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), device]
    # Large blocks are given back when they are freed: what an earlier load has left would not count.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    as_it_is, all_at_once = (grown / max(files) for grown in json.loads(done.stdout))
    print(f"{device}: {as_it_is:.2f} times the largest file; all files at once, {all_at_once:.2f}")
    assert as_it_is < 1.3
    assert all_at_once > 3  # a loader that holds everything is seen to do so


@pytest.mark.parametrize(
    "places", [None, {"": "cpu"}, {"model": "meta", "lm_head": "cpu"}, {"model": "meta", "mtp": "disk"}]
)
def test_files_stay_mapped_where_tensors_stay(places):
    assert unmapped_slices([], LoadStateDictConfig(device_map=places)) is None


def test_read_as_they_are(checkpoint):
    files = sorted(checkpoint.glob("*.safetensors"))[1:2]
    # To several devices transformers sends them, to one they go at once.
    slices = unmapped_slices(files, LoadStateDictConfig(device_map={"model": "cuda:0", "lm_head": "cuda:1"}))
    sent = unmapped_slices(files, LoadStateDictConfig(device_map={"": "meta"}))
    expected = load_file(files[0])
    assert slices.keys() == sent.keys() == expected.keys()
    for name, tensor in expected.items():
        assert slices[name].nbytes == tensor.nbytes and list(tensor.shape) == slices[name].get_shape()
        assert sent[name][...].is_meta and sent[name][...].shape == tensor.shape
        if tensor.dim() > 1:
            assert slices[name][...].view(torch.uint8).equal(tensor.view(torch.uint8))
            assert slices[name][1:].view(torch.uint8).equal(tensor[1:].view(torch.uint8))


def test_who_finds_no_room_waits():
    room, order = Room(10), []

    def take(size):
        with room.take(size):
            order.append(size)

    with room.take(6):
        waiting = threading.Thread(target=take, args=(5,))
        waiting.start()
        take(4)
        waiting.join(0.1)
        assert waiting.is_alive() and order == [4]
    waiting.join(10)
    assert order == [4, 5]
    with pytest.raises(KeyError), room.take(10):
        raise KeyError
    take(10)
