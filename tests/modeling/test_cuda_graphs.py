"""The memory of recorded steps, without a GPU."""

import contextlib

import torch
from nemotron_super.modeling import cuda_graphs


def test_graphs_share_memory_that_goes_with_the_last_of_them(monkeypatch):
    """torch records nothing into a pool whose graphs are gone."""
    device, used, handles = torch.device("cuda", 0), [], iter(range(9))

    @contextlib.contextmanager
    def graph(made, pool, stream, capture_error_mode):
        used.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setitem(cuda_graphs._streams, device, None)
    graphs = [cuda_graphs.record(device, lambda: None) for _ in range(2)]
    assert used[0] == used[1]
    del graphs[0]
    graphs.append(cuda_graphs.record(device, lambda: None))
    assert used[2] == used[0]
    graphs.clear()
    graphs.append(cuda_graphs.record(device, lambda: None))
    assert used[3] not in used[:3]
