"""Prefill of a long prompt on a CPU: memory grows linearly with the length, and little."""

import json
import subprocess
import sys

import pytest

# Peak memory never falls, so the lengths go up. It is read from /proc, because `ru_maxrss` begins with what the process that
# started this one held.
PROGRAM = """
import json, re, torch
from nemotron_super import NemotronHConfig, NemotronHForCausalLM

torch.set_num_threads(2)
config = NemotronHConfig(
    hybrid_override_pattern="MEMEMEM*EMEMEME", vocab_size=8192, hidden_size=512, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
    n_routed_experts=64, num_experts_per_tok=6, moe_latent_size=128, moe_intermediate_size=336,
    moe_shared_expert_intermediate_size=672, routed_scaling_factor=2.5,
)
model = NemotronHForCausalLM(config).eval()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before, peaks = peak(), {}
for length in (8192, 16384, 32768, 65536):
    with torch.inference_mode():
        model(torch.randint(3, 8192, (1, length)), use_cache=True, logits_to_keep=1)
    peaks[length] = peak() - before
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_65536_tokens():
    """The model of the CPU benchmark: 72 million parameters, one attention layer among 15."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=900)
    peaks = {int(length): megabytes for length, megabytes in json.loads(done.stdout).items()}
    print(f"MB beyond the weights: {peaks}")
    assert peaks[65536] < 1500
    # Linear: what one more token costs does not grow. The first step holds the fixed part as well.
    steps = [(peaks[2 * n] - peaks[n]) / n for n in (8192, 16384, 32768)]
    assert steps[2] < 1.5 * max(steps[1], steps[0]), peaks
