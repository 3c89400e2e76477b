"""A small training run with torch's FSDP2 alone, block by block, on as many gloo processes as it is started with.

`torchrun --nproc-per-node N train_sharded.py OUTPUT.json [--steps 50] [--checkpointing]` writes the losses. accelerate offers
FSDP2 on accelerators only, so this speaks to torch itself: it is the model's part of sharded training that is tried.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from nemotron_super import NemotronHConfig, NemotronHForCausalLM
from nemotron_super.modeling.block import NemotronHBlock
from nemotron_super.modeling.mtp import NemotronHMTPBlock
from nemotron_super.training.best_fit import PadRows
from nemotron_super.training.load_balancing import RouterLoads, update_correction_bias
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from train_small import SMALL, make_rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**SMALL)).train()
    if options.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (world,))
    for module in [m for m in model.modules() if isinstance(m, NemotronHBlock | NemotronHMTPBlock)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    loads = RouterLoads(model, coefficient=1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows, per_rank, collate, losses = make_rows(), 4 // world, PadRows(0), []
    for step in range(options.steps):
        batch = rows[4 * step : 4 * step + 4]
        items = sum(label != -100 for row in batch for label in row["labels"][1:])
        mine = collate(batch[rank * per_rank : (rank + 1) * per_rank])
        loss = model(**mine, num_items_in_batch=items, use_cache=False).loss
        (loss * world).backward()  # gradients are averaged over ranks
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_correction_bias(loads, 1e-2)
        loads.reset()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    if rank == 0:
        options.output.write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
