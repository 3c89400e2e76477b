"""States in the memory of another device than the GPU's, for a while or between uses: the text stays the same."""

import pytest
import torch
from nemotron_super import HybridCache
from nemotron_super.modeling.static_cache import StaticHybridCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU: states move between it and the CPU"
    ),
]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model(make_model):
    return make_model("ME*M*", scale=1.0, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E").cuda()


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.parametrize(
    "made", [HybridCache, lambda config: StaticHybridCache(config, 64)], ids=["growing", "static"]
)
def test_to_the_cpu_and_back(made, model, ids):
    expected = model.generate(ids, max_new_tokens=12, **GREEDY)
    cache = made(model.config)
    begun = model.generate(ids, cache=cache, use_mtp=True, max_new_tokens=4, **GREEDY)
    assert cache.to("cpu").layers[0].recurrent_states[0].device.type == cache.layers[2].keys.device.type == "cpu"
    assert model.generate(begun, cache=cache.to("cuda"), use_mtp=True, max_new_tokens=8, **GREEDY).equal(expected)


def test_keys_and_values_in_cpu_memory(model, ids):
    expected = model.generate(ids, max_new_tokens=12, **GREEDY)
    found = model.generate(
        ids, cache_implementation="offloaded", return_dict_in_generate=True, max_new_tokens=12, **GREEDY
    )
    assert found.sequences.equal(expected)
    assert {layer.keys.device.type for layer in (found.cache.layers[i] for i in (2, 4))} >= {"cpu"}
