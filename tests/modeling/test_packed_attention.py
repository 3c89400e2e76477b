"""Attention within packed documents: where they lie, and that all at once is one by one."""

import pytest
import torch
from nemotron_super.modeling.packed_attention import Documents, attend_documents, takes_variable_lengths


def one_by_one(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    ).transpose(1, 2)


def test_documents_lie_where_ids_change_and_rows_end():
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 2], [0, 1, 2, 2, 0]]))
    assert documents.bounds.tolist() == [0, 2, 5, 10, 11, 12, 14, 15]
    assert documents.spans == [(0, 0, 2), (0, 2, 5), (1, 0, 5), (2, 0, 1), (2, 1, 2), (2, 2, 4), (2, 4, 5)]


def test_a_document_sees_itself_only():
    torch.manual_seed(0)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    got = attend_documents(query, key, value, Documents.of(seq_idx), 8**-0.5, one_by_one)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    seen = (seq_idx.unsqueeze(2) == seq_idx.unsqueeze(1)) & torch.ones(6, 6, dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    torch.testing.assert_close(got, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2))


def test_a_cpu_attends_one_by_one():
    assert not takes_variable_lengths(torch.device("cpu"), torch.bfloat16, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: FlashAttention runs there")
@pytest.mark.parametrize("batch, length, heads, kv_heads, head_dim", [(1, 4096, 32, 2, 128), (3, 257, 8, 2, 32)])
def test_all_at_once_is_one_by_one(batch, length, heads, kv_heads, head_dim):
    """Forward and gradients, with at most twice the error of attention document by document in the same dtype."""
    torch.manual_seed(0)
    assert takes_variable_lengths(torch.device("cuda"), torch.bfloat16, head_dim)
    seq_idx = (torch.rand(batch, length, device="cuda") < 8 / length).cumsum(1)
    documents = Documents.of(seq_idx)
    assert len(documents.spans) > batch
    shapes = [(batch, n, length, head_dim) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    grad = torch.randn(batch, length, heads, head_dim, device="cuda", dtype=torch.bfloat16)

    def run(dtype, one):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = attend_documents(*leaves, documents, head_dim**-0.5, one)
        return [t.float() for t in (out, *torch.autograd.grad(out, leaves, grad.to(dtype)))]

    exact = run(torch.float32, one_by_one)
    for got, same, want in zip(run(torch.bfloat16, None), run(torch.bfloat16, one_by_one), exact, strict=True):
        error, usual = ((t - want).norm() / want.norm() for t in (got, same))
        assert error <= 2 * usual + 1e-3
