"""Chapter 7 against torch.nn, against complex numbers, by properties, and by faults."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from cs336_lm import layers as L

quick = settings(deadline=None, max_examples=30)
SIZES = st.integers(1, 6)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def assert_same(ours, theirs, inputs, rtol=1e-4, atol=1e-5):
    "Same values, and same gradients of a nonlinear function of them."
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    gradients = [torch.autograd.grad(out.square().sum(), inputs, retain_graph=True) for out in (ours, theirs)]
    for a, b in zip(*gradients): torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# linear and embedding

@pytest.mark.parametrize("d_in, d_out", [(700, 300), (300, 700), (512, 512)])
def test_linear_starts_as_the_handout_says(d_in, d_out):
    weight = L.Linear(d_in, d_out).weight
    std = math.sqrt(2 / (d_in + d_out))
    assert weight.shape == (d_out, d_in)
    assert weight.abs().max() <= 3 * std and weight.abs().max() > 2.9 * std
    # a normal distribution cut at 3 keeps 97.334 % of its variance; the bounds are about six standard errors wide
    assert weight.var().item() / std**2 == pytest.approx(0.97334, abs=6 * math.sqrt(2 / weight.numel()))
    assert abs(weight.mean().item()) < 6 * std / math.sqrt(weight.numel())
    within_one = (weight.abs() < std).float().mean().item()
    assert within_one == pytest.approx(0.6827 / 0.9973, abs=6 * 0.47 / math.sqrt(weight.numel()))


@pytest.mark.parametrize("std", [1.0, 0.02])
def test_embedding_starts_as_asked(std):
    weight = L.Embedding(1000, 200, std=std).weight
    assert weight.shape == (1000, 200) and 2.9 * std < weight.abs().max() <= 3 * std
    assert weight.var().item() / std**2 == pytest.approx(0.97334, abs=0.02)


@quick
@given(st.lists(SIZES, max_size=3), SIZES, SIZES)
def test_linear_is_f_linear(front, d_in, d_out):
    layer, x = L.Linear(d_in, d_out), torch.randn(*front, d_in, requires_grad=True)
    assert_same(layer(x), F.linear(x, layer.weight), (x, layer.weight))
    assert [n for n, _ in layer.named_parameters()] == ["weight"]


@quick
@given(st.lists(SIZES, max_size=3), SIZES, SIZES, st.data())
def test_embedding_is_f_embedding(front, rows, width, data):
    layer = L.Embedding(rows, width)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=math.prod(front), max_size=math.prod(front)))).reshape(front).long()
    assert_same(layer(ids), F.embedding(ids, layer.weight), (layer.weight,))


@pytest.mark.parametrize("ids", [[-1], [5], [0, 1, 99], [[-7, 2]]])
def test_wrong_ids_are_named(ids):
    with pytest.raises(ValueError, match=r"token id out of range: expected 0 to 4, got values from .*(-1|5|99|-7)"):
        L.Embedding(5, 3)(torch.tensor(ids))


def test_embedding_takes_int32_and_no_tokens():
    layer = L.Embedding(5, 3)
    assert (layer(torch.tensor([1, 4], dtype=torch.int32)) == layer.weight[[1, 4]]).all()
    assert layer(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.float32])  # uint16: the type of token files
def test_ids_of_another_type_get_advice(dtype):
    with pytest.raises(ValueError, match=rf"token ids must be int32 or int64, got {dtype}: convert with \.long\(\)"):
        L.Embedding(5, 3)(torch.tensor([1, 4], dtype=dtype))
    with pytest.raises(ValueError, match=rf"positions must be int32 or int64, got {dtype}"):
        L.RotaryPositionalEmbedding(1e4, 4, 8)(torch.ones(2, 4), torch.tensor([1, 4], dtype=dtype))


# RMSNorm, SiLU, feed-forward, softmax

@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rmsnorm_is_f_rms_norm(eps):
    layer, x = L.RMSNorm(24, eps=eps), torch.randn(2, 5, 24, requires_grad=True)
    assert (layer.weight == 1).all()
    nn.init.uniform_(layer.weight, -2, 2)
    assert_same(layer(x), F.rms_norm(x, (24,), layer.weight, eps=eps), (x, layer.weight))
    assert_same(layer(0.001 * x), F.rms_norm(0.001 * x, (24,), layer.weight, eps=eps), (x,))  # eps inside the root, after the mean


@pytest.mark.parametrize("dtype, size", [(torch.float16, 300.0), (torch.float16, 6e4), (torch.bfloat16, 1e18)])
def test_rmsnorm_of_large_halves(dtype, size):
    x = (size * torch.randn(3, 512).clamp(-1, 1)).to(dtype)
    ours = L.RMSNorm(512, dtype=dtype)(x)
    wide = x.double()
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), wide / wide.square().mean(-1, keepdim=True).sqrt(), rtol=0.01, atol=0.001)


def test_rmsnorm_keeps_float64():
    x = torch.randn(4, 16, dtype=torch.double, requires_grad=True)
    layer = L.RMSNorm(16, dtype=torch.double)
    assert torch.autograd.gradcheck(layer, x)


def test_silu():
    x = torch.cat([torch.linspace(-200, 200, 1001), torch.tensor([-1e30, 1e30])]).requires_grad_()
    torch.testing.assert_close(L.silu(x), F.silu(x))
    gradients = [torch.autograd.grad(f(x[:-2]).sum(), x)[0] for f in (L.silu, F.silu)]
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_feed_forward_layers():
    x = torch.randn(2, 3, 16, requires_grad=True)
    gated, plain = L.SwiGLU(16, 40), L.SiLUFeedForward(16, 40)
    W1, W2, W3 = (getattr(gated, n).weight for n in ("w1", "w2", "w3"))
    assert_same(gated(x), F.linear(L.silu(F.linear(x, W1)) * F.linear(x, W3), W2), (x, W1, W2, W3))
    assert_same(plain(x), F.linear(L.silu(F.linear(x, plain.w1.weight)), plain.w2.weight), (x,))
    assert [n for n, _ in gated.named_parameters()] == ["w1.weight", "w2.weight", "w3.weight"]
    assert W1.shape == W3.shape == (40, 16) and W2.shape == (16, 40)
    assert L.SwiGLU(512).w1.weight.shape[0] == 1344 and L.SiLUFeedForward(16).w1.weight.shape[0] == 64


@given(st.integers(1, 20_000))
def test_swiglu_width_is_the_nearest_multiple_of_64(d_model):
    width = L.swiglu_d_ff(d_model)
    assert width % 64 == 0 and width >= 64
    if d_model >= 24: assert abs(width - 8 * d_model / 3) <= 32


@given(st.integers(1, 2_000), st.integers(1, 100))
def test_matched_silu_width(half, d_model):
    d_ff = 2 * half
    assert 2 * d_model * L.matched_silu_d_ff(d_ff) == 3 * d_model * d_ff
    assert 2 * L.matched_silu_d_ff(d_ff + 1) == 3 * (d_ff + 1) - 1  # odd: d_model weights short


@quick
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20), st.floats(-1e3, 1e3))
def test_softmax_properties(scores, shift):
    x = torch.tensor(scores)
    p = L.softmax(x, 0)
    torch.testing.assert_close(p, torch.softmax(x, 0))
    assert (p >= 0).all() and p.sum().item() == pytest.approx(1, abs=1e-5)
    small = x.clamp(-1e3, 1e3).double()
    torch.testing.assert_close(L.softmax(small + shift, 0), L.softmax(small, 0))


def test_softmax_along_every_axis():
    x = torch.randn(3, 4, 5, requires_grad=True)
    for dim in (0, 1, 2, -1, -3): assert_same(L.softmax(x, dim), torch.softmax(x, dim), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_of_many_narrow_scores(dtype):
    x = torch.zeros(70_000, dtype=dtype)  # their exponentials add up to more than float16 holds
    assert L.softmax(x, 0).dtype == dtype
    torch.testing.assert_close(L.softmax(x, 0), torch.softmax(x, 0), rtol=0, atol=0)


# RoPE

def complex_rope(x, theta, positions):
    "An independent RoPE: pairs as complex numbers, in double precision."
    d = x.shape[-1]
    speeds = torch.tensor([theta ** (-2 * k / d) for k in range(d // 2)], dtype=torch.double)
    turns = torch.exp(1j * positions.double().unsqueeze(-1) * speeds)
    return torch.view_as_real(torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2)) * turns).flatten(-2)


@quick
@given(st.integers(1, 8), st.sampled_from([10.0, 10_000.0, 500_000.0]), st.integers(1, 40))
def test_rope_is_complex_multiplication(pairs, theta, time):
    rope = L.RotaryPositionalEmbedding(theta, 2 * pairs, 64)
    x, positions = torch.randn(2, 3, time, 2 * pairs), torch.randint(0, 64, (2, 3, time))
    torch.testing.assert_close(rope(x).double(), complex_rope(x, theta, torch.arange(time)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rope(x, positions).double(), complex_rope(x, theta, positions), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rope(x, positions[0, 0]).double(), complex_rope(x, theta, positions[0, 0]), rtol=1e-5, atol=1e-5)


@quick
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 100))
def test_rope_scores_depend_on_distance_only(i, j, shift):
    rope, q, k = L.RotaryPositionalEmbedding(1e4, 16, 512).double(), torch.randn(1, 16).double(), torch.randn(1, 16).double()
    def score(a, b): return (rope(q, torch.tensor([a])) @ rope(k, torch.tensor([b])).T).item()
    assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=1e-9)


@quick
@given(st.lists(SIZES, max_size=2), SIZES, SIZES, st.integers(0, 3), st.integers(0, 1), st.sampled_from([torch.float32, torch.float64]))
def test_the_two_ways_to_turn_pairs_agree(front, time, pairs, offset, gap, dtype):
    "Whatever the layout in memory: rows that begin at `offset` entries and are followed by `gap` unused ones."
    angles = L.rope_angles(1e4, 2 * pairs, time).to(dtype)
    x = torch.randn(*front, time, offset + 2 * pairs + gap, dtype=dtype)[..., offset:offset + 2 * pairs].requires_grad_()
    assert_same(L.rotate(x, angles.cos(), angles.sin()), L.rotate_pairs(x, angles.cos(), angles.sin()), (x,), rtol=1e-5, atol=1e-5)
    assert L.is_complex_in_memory(x, angles) == (offset % 2 == 0 and (offset + gap) % 2 == 0)


def test_pairs_are_no_complex_numbers_in_another_type_or_order():
    angles, x = L.rope_angles(1e4, 8, 5).float(), torch.randn(5, 8)
    assert L.is_complex_in_memory(x, angles)
    for other in (x.bfloat16(), x.double(), torch.randn(8, 5).T, x.to("meta")): assert not L.is_complex_in_memory(other, angles)
    compiled = torch.compile(lambda x: L.rotate(x, angles.cos(), angles.sin()), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), L.rotate_pairs(x, angles.cos(), angles.sin()))


def test_rope_far_out_is_exact_to_float32():
    rope, x = L.RotaryPositionalEmbedding(1e4, 8, 200_001), torch.randn(1, 8)
    there = torch.tensor([200_000])
    torch.testing.assert_close(rope(x, there).double(), complex_rope(x, 1e4, there), rtol=1e-6, atol=1e-6)


def test_rope_tables_survive_moves_and_are_not_saved():
    fresh = L.RotaryPositionalEmbedding(1e4, 8, 32)
    assert not fresh.state_dict() and not list(fresh.parameters())
    for made in (fresh.to(torch.bfloat16), L.RotaryPositionalEmbedding(1e4, 8, 32, device="meta").to_empty(device="cpu"), fresh.double().float()):
        assert made.cos.dtype == torch.float32
        assert (made.cos == L.RotaryPositionalEmbedding(1e4, 8, 32).cos).all()
    with torch.device("meta"): assert L.RotaryPositionalEmbedding(1e4, 8, 32).cos.is_meta


def test_rope_keeps_the_type_of_its_input():
    rope = L.RotaryPositionalEmbedding(1e4, 8, 32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64): assert rope(torch.ones(3, 8, dtype=dtype)).dtype == dtype


def test_rope_refuses_what_it_cannot_do():
    for d_k in (7, 0, 1):
        with pytest.raises(ValueError, match=f"even.*got {d_k}"): L.RotaryPositionalEmbedding(1e4, d_k, 8)
    rope = L.RotaryPositionalEmbedding(1e4, 4, 8)
    with pytest.raises(ValueError, match="9 positions.*hold 8"): rope(torch.ones(9, 4))
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match="position out of range: expected 0 to 7"): rope(torch.ones(1, 4), torch.tensor([wrong]))


# attention

@quick
@given(st.lists(SIZES, max_size=2), SIZES, SIZES, SIZES, SIZES, st.booleans())
def test_attention_is_pytorchs(front, n, m, d_k, d_v, masked):
    Q, K, V = (torch.randn(*front, *size, requires_grad=True) for size in ((n, d_k), (m, d_k), (m, d_v)))
    mask = torch.rand(*front, n, m) > 0.5 if masked else None
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(Q, K, V, attn_mask=mask)
    assert_same(L.scaled_dot_product_attention(Q, K, V, mask), theirs, (Q, K, V))


def test_attention_mask_true_means_may_look():
    Q, K, V = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(L.scaled_dot_product_attention(Q, K, V, torch.eye(3).bool()), V)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_rows_that_may_look_nowhere_are_zero(dtype):
    Q, K, V = (torch.randn(2, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    out = L.scaled_dot_product_attention(Q, K, V, torch.tensor([[True, True], [False, False]]))
    assert (out[1] == 0).all() and all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (Q, K, V)))


def test_attention_scores_may_be_large_in_float16():
    q, v = torch.full((3, 128), 40.0).half(), torch.randn(3, 5).half()  # the undivided score is 204,800
    for mask in (None, L.causal_mask(3, 3)):
        ours = L.scaled_dot_product_attention(q, q, v, mask)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, q, v, attn_mask=mask), rtol=2e-3, atol=1e-3)


@quick
@given(st.integers(1, 9), st.integers(0, 9))
def test_causal_mask_and_kernels(n, earlier):
    m = n + earlier
    assert L.causal_mask(n, m).tolist() == [[j <= earlier + i for j in range(m)] for i in range(n)]
    q, k, v = (torch.randn(2, 3, time, 4, requires_grad=True) for time in (n, m, m))
    assert_same(L.causal_attention(q, k, v, "sdpa"), L.causal_attention(q, k, v, "clear"), (q, k, v))


def with_peer(kernel, d_model=24, heads=4):
    ours, peer = L.CausalMultiHeadSelfAttention(d_model, heads, kernel=kernel), nn.MultiheadAttention(d_model, heads, bias=False, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        peer.out_proj.weight.copy_(ours.output_proj.weight)
    return ours, peer


@pytest.mark.parametrize("kernel", ["sdpa", "clear"])
@pytest.mark.parametrize("time", [1, 2, 9])
def test_multihead_attention_is_pytorchs(kernel, time):
    (ours, peer), x = with_peer(kernel), torch.randn(2, time, 24, requires_grad=True)
    theirs = peer(x, x, x, attn_mask=~L.causal_mask(time, time), need_weights=False)[0]
    assert_same(ours(x), theirs, (x,))
    gradients = torch.autograd.grad(ours(x).square().sum(), [p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
    (packed,) = torch.autograd.grad(theirs.square().sum(), peer.in_proj_weight)
    torch.testing.assert_close(torch.cat(gradients), packed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["sdpa", "clear"])
def test_multihead_attention_takes_any_axes_in_front(kernel):
    layer, x = L.CausalMultiHeadSelfAttention(16, 2, L.RotaryPositionalEmbedding(1e4, 8, 10), kernel), torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))


def test_rope_in_attention_turns_queries_and_keys_of_each_head():
    rope = L.RotaryPositionalEmbedding(1e4, 6, 50)
    layer, x, positions = L.CausalMultiHeadSelfAttention(24, 4, rope), torch.randn(2, 7, 24), torch.randint(0, 50, (2, 7))
    for places in (None, positions, positions[0]):
        at = torch.arange(7) if places is None else places
        q, k, v = (torch.stack((x @ p.weight.T).split(6, -1), 1) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        angles = at if at.ndim == 1 else at[:, None].expand(2, 4, 7)
        q, k = (complex_rope(t, 1e4, angles).float() for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(layer(x, places), torch.cat(out.unbind(1), -1) @ layer.output_proj.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "clear"])
def test_the_future_does_not_matter(kernel):
    layer, x = L.CausalMultiHeadSelfAttention(16, 4, L.RotaryPositionalEmbedding(1e4, 4, 10), kernel), torch.randn(1, 10, 16)
    for t in range(10):
        moved = x.clone()
        moved[:, t:] = torch.randn(1, 10 - t, 16)
        torch.testing.assert_close(layer(moved)[:, :t], layer(x)[:, :t])
        assert (layer(moved)[:, t] - layer(x)[:, t]).abs().max() > 1e-4


@quick
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sampled_from(["sdpa", "clear"]), st.booleans())
def test_cache_gives_what_the_whole_row_gives(pieces, kernel, with_rope):
    rope = L.RotaryPositionalEmbedding(1e4, 8, 30) if with_rope else None
    layer, x = L.CausalMultiHeadSelfAttention(16, 2, rope, kernel), torch.randn(2, sum(pieces), 16)
    cache = L.KeyValueCache(sum(pieces))
    for _ in range(2):  # a cleared cache starts again
        out = torch.cat([layer(piece, cache=cache) for piece in x.split(pieces, 1)], 1)
        torch.testing.assert_close(out, layer(x), rtol=1e-4, atol=1e-5)
        assert cache.length == sum(pieces)
        cache.clear()


def test_cache_refuses_what_does_not_fit():
    cache = L.KeyValueCache(3)
    cache.append(torch.ones(2, 4, 2, 5), torch.ones(2, 4, 2, 5))
    with pytest.raises(ValueError, match="4 tokens do not fit a cache of 3"): cache.append(torch.ones(2, 4, 2, 5), torch.ones(2, 4, 2, 5))
    with pytest.raises(ValueError, match=r"rows of shape \(2, 4\), got \(1, 4\)"): cache.append(torch.ones(1, 4, 1, 5), torch.ones(1, 4, 1, 5))
    ones = torch.ones
    for k, v, words in (  # an axis of 1 would be repeated, another type converted, both in silence
            (ones(2, 4, 1, 1), ones(2, 4, 1, 5), "heads 5 wide, got 1"), (ones(2, 4, 1, 5), ones(2, 4, 1, 3), "heads 5 wide, got 3"),
            (ones(2, 4, 1, 5).double(), ones(2, 4, 1, 5), "holds torch.float32, got torch.float64"),
            (ones(2, 4, 1, 5), ones(2, 4, 1, 5).half(), "holds torch.float32, got torch.float16"),
            (ones(2, 4, 1, 5), ones(2, 1, 1, 5), r"keys \(2, 4, 1, 5\) and values \(2, 1, 1, 5\) must agree")):
        with pytest.raises(ValueError, match=words): cache.append(k, v)
    with pytest.raises(ValueError, match="must agree"): L.KeyValueCache(3).append(ones(2, 4, 2, 5), ones(2, 4, 1, 5))
    assert cache.length == 2


def test_attention_refuses_what_does_not_fit():
    for heads in (0, 5, -1):
        with pytest.raises(ValueError, match=f"num_heads={heads} and d_model=16"): L.CausalMultiHeadSelfAttention(16, heads)
    with pytest.raises(ValueError, match="got 'flash'"): L.CausalMultiHeadSelfAttention(16, 4, kernel="flash")


def test_finite_differences_through_attention():
    layer = L.CausalMultiHeadSelfAttention(8, 2, L.RotaryPositionalEmbedding(1e4, 4, 6), "clear").double()
    assert torch.autograd.gradcheck(layer, torch.randn(1, 5, 8, dtype=torch.double, requires_grad=True))


def test_no_layer_uses_pytorchs_own_layers():
    "From scratch as the handout asks: of torch.nn only Module, Parameter and init, of functional only the two marked fast versions."
    import ast, inspect
    used = {n.attr for n in ast.walk(ast.parse(inspect.getsource(L))) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in ("nn", "F")}
    assert used == {"Module", "Parameter", "init", "silu", "scaled_dot_product_attention"}
