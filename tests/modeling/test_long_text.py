"""A long text costs what its keys and values cost, and nothing else grows while it is written."""

import os
from pathlib import Path

import pytest
import torch
from nemotron_super import HybridCache
from nemotron_super.modeling.static_cache import StaticHybridCache
from transformers.generation.streamers import BaseStreamer

TOKENS = 800


class Watch(BaseStreamer):
    """Bytes of a cache's keys and values, of its other tensors, and of the process, after every 100 tokens."""

    def __init__(self, cache):
        self.cache, self.written, self.seen = cache, 0, {}

    def put(self, value):
        self.written += value.numel()
        if self.written % 100 == 0:
            keys = rest = 0
            for layer in self.cache.layers:
                keys += sum(
                    t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None
                )
                for states in ("conv_states", "recurrent_states"):
                    rest += sum(t.nbytes for t in getattr(layer, states, {}).values())
                pending = getattr(layer, "pending", None)
                rest += 0 if pending is None else pending.nbytes
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen[self.written] = keys, rest, pages * os.sysconf("SC_PAGE_SIZE")

    def end(self):
        pass


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory of the process is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_nothing_grows_but_keys_and_values(kind, make_model):
    model = make_model("MM*M")
    cache = HybridCache(model.config) if kind == "growing" else StaticHybridCache(model.config, TOKENS + 4)
    watch = Watch(cache)
    ids = torch.tensor([[3, 1, 4, 1]])
    torch.manual_seed(0)
    model.generate(
        ids, cache=cache, max_new_tokens=TOKENS - 4, do_sample=True, eos_token_id=None, pad_token_id=0, streamer=watch
    )
    early, late = watch.seen[300], watch.seen[TOKENS]
    token = 2 * model.config.num_key_value_heads * model.config.head_dim * 4  # float32
    assert late[0] - early[0] == ((TOKENS - 300) * token if kind == "growing" else 0)
    # The newest token is chosen but not read yet.
    assert late[0] == ((TOKENS - 1) * token if kind == "growing" else (TOKENS + 4) * token)
    assert early[1] == late[1] > 0
    assert late[2] - early[2] < 16 << 20
