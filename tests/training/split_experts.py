"""Experts split over two gloo processes that share every batch (`tp_size` 2, `ep_size` 2), beside the whole model.

`torchrun --nproc-per-node 2 split_experts.py FOLDER` saves a small model, loads it split, and compares logits, greedy
generation, the loss and its gradients with those of the whole model, in every process; and what is saved again.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from nemotron_super import NemotronHConfig, NemotronHForCausalLM
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from train_small import SMALL
from transformers.distributed import DistributedConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole = NemotronHForCausalLM(NemotronHConfig(**SMALL)).eval()
    if dist.get_rank() == 0:
        whole.save_pretrained(folder / "before")
    dist.barrier()
    split = NemotronHForCausalLM.from_pretrained(
        folder / "before", distributed_config=DistributedConfig(tp_size=2, ep_size=2)
    ).eval()
    experts = [m for m in split.modules() if getattr(m, "_is_expert_parallel", False)]
    assert len(experts) == 3 and all(m.num_experts == 3 for m in experts), "two layers and the MTP head"

    ids = torch.randint(1, 61, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = (m(ids, output_mtp_logits=True, use_cache=False) for m in (split, whole))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mtp_logits, expected.mtp_logits, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert split.generate(ids, **options).equal(whole.generate(ids, **options))

    losses = [m.train()(ids, labels=ids, use_cache=False).loss for m in (split, whole)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in split.named_parameters()}
    for name, p in whole.named_parameters():
        grad = gradients[name].full_tensor() if isinstance(gradients[name], DTensor) else gradients[name]
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")

    split.save_pretrained(folder / "after", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    before, after = (load_file(folder / when / "model.safetensors") for when in ("before", "after"))
    assert before.keys() == after.keys() and all(after[name].equal(before[name]) for name in before)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
