"""Work beside other work in a recorded step."""

import pytest
import torch
from nemotron_super.modeling.side_stream import beside


def test_without_a_recording_it_is_done_at_once():
    done = []

    def work(x):
        done.append(x)
        return x + 1

    wait = beside(work, torch.ones(2))
    assert len(done) == 1
    assert wait().tolist() == [2.0, 2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: streams are joined in a CUDA graph")
@torch.no_grad()
def test_a_recorded_step_waits_for_it():
    """Long work on another stream, three times in a row so that its memory is used again, and replays that read new numbers."""
    x, out = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    streams = set()

    def work(t):
        streams.add(torch.cuda.current_stream().cuda_stream)
        for _ in range(50):
            t = t + 1
        return t

    def step():
        total = x
        for _ in range(3):
            found = beside(work, total)
            total = total * 2
            total = total + found()
        out.copy_(total)

    main = torch.cuda.Stream()
    with torch.cuda.stream(main):
        step()
    torch.cuda.synchronize()
    streams.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=main):
        step()
    assert len(streams) == 1
    assert streams != {main.cuda_stream}
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        expected = value
        for _ in range(3):
            expected = 3 * expected + 50
        assert out.unique().tolist() == [expected]
