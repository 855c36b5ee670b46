"""The fused operators against the layers they replace; the Triton kernels themselves in Triton's interpreter and on a GPU."""
import importlib.util, subprocess, sys
from types import SimpleNamespace

import pytest, torch
from hypothesis import given, settings, strategies as st

import cs336_lm.kernels as kernels
from cs336_lm.kernels import (attention_op, fused_attention, fused_training_loss, kernel_errors, kernels_fit, linear_cross_entropy_op,
                              use_kernels)
from cs336_lm.layers import CausalMultiHeadSelfAttention, RotaryPositionalEmbedding
from cs336_lm.optimization import cross_entropy
from cs336_lm.transformer import ModelConfig, TransformerLM

SMALL = ModelConfig(vocab_size=40, context_length=16, d_model=32, num_layers=2, num_heads=2, d_ff=64)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 3), time=st.integers(1, 12), heads=st.integers(1, 4), turn=st.booleans(), seed=st.integers(0, 2**31))
def test_fused_attention_is_the_layer(batch, time, heads, turn, seed):
    torch.manual_seed(seed)
    rope = RotaryPositionalEmbedding(10_000.0, 4, 12) if turn else None
    layer = CausalMultiHeadSelfAttention(4 * heads, heads, rope, "clear").double()
    x = torch.randn(batch, time, 4 * heads, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    weight = torch.randn(batch, time, 4 * heads, dtype=torch.float64)
    results = []
    for fused in (False, True):
        layer.fused = use_kernels(TransformerLM(SMALL)).layers[0].attn.fused if fused else None
        out = layer(x)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_attention_operator_passes_gradcheck():
    qkv = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(6, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: attention_op(x, angles.cos(), angles.sin(), 2)[0], qkv)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), vocab=st.integers(1, 20), seed=st.integers(0, 2**31), factor=st.floats(-3, 3))
def test_fused_loss_is_cross_entropy(rows, vocab, seed, factor):
    torch.manual_seed(seed)
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (rows, vocab))
    targets = torch.randint(0, vocab, (rows,))
    targets[1::3] = -100
    ours, theirs = linear_cross_entropy_op(hidden, weight, targets, -100)[0], cross_entropy(hidden @ weight.T, targets)
    for a, b in zip(*([loss, *torch.autograd.grad(factor * loss, (hidden, weight))] for loss in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_model_keeps_its_names_cache_and_cpu_path():
    model = TransformerLM(SMALL)
    names = list(model.state_dict())
    ids = torch.randint(0, 40, (2, 10))
    before = model(ids)
    use_kernels(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(ids), before)
    cache = model.make_cache()
    torch.testing.assert_close(torch.cat([model(ids[:, :6], cache), model(ids[:, 6:], cache)], 1), before)
    assert use_kernels(model, on=False).layers[0].attn.fused is None
    assert not kernels_fit(SMALL, torch.device("cpu"), "bf16")


@pytest.mark.parametrize("front", [(), (1,), (2, 3), (2, 1, 2)])
def test_any_axes_in_front(front):
    torch.manual_seed(0)
    model, ids = TransformerLM(SMALL).double(), torch.randint(0, 40, (*front, 10))
    plain, plain_loss = model(ids), cross_entropy(model(ids), ids)
    use_kernels(model)
    torch.testing.assert_close(model(ids), plain)
    torch.testing.assert_close(fused_training_loss(model, ids, ids), plain_loss)


def test_a_row_longer_than_the_tables_is_refused_as_by_the_layer():
    layer, messages = CausalMultiHeadSelfAttention(8, 2, RotaryPositionalEmbedding(10_000.0, 4, 6)), []
    for attend in (layer, lambda x: fused_attention(layer, x)):
        with pytest.raises(ValueError) as error: attend(torch.zeros(1, 7, 8))
        messages.append(str(error.value))
    assert messages[0] == messages[1] == "7 positions, but the RoPE tables hold 6"


@pytest.mark.parametrize("wrong, words", [
    (lambda t: t.T, r"hidden vectors' shape \(2, 10, 32\) without its last entry, but have \(10, 2\)"),
    (lambda t: t.double(), r"but are torch.float64: convert with \.long"), (lambda t: t + 40, "from 0 to 39 or ignore_index"),
    (lambda t: t - 41, "from 0 to 39 or ignore_index")], ids=["turned", "float", "large", "negative"])
def test_wrong_targets_are_refused(wrong, words):
    ids = torch.randint(0, 40, (2, 10))
    with pytest.raises(ValueError, match=words): fused_training_loss(TransformerLM(SMALL), ids, wrong(ids))


def test_the_operator_wants_a_target_for_each_row():
    with pytest.raises(ValueError, match=r"\(6, 8\) without its last entry, but have \(5,\)"):
        linear_cross_entropy_op(torch.zeros(6, 8), torch.zeros(9, 8), torch.zeros(5, dtype=torch.long), -100)


def test_what_operators_keep_for_themselves_has_no_gradient():
    qkv = torch.randn(2, 5, 24, requires_grad=True)
    out, lse = attention_op(qkv, None, None, 2)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss, grad = linear_cross_entropy_op(hidden, weight, torch.randint(0, 9, (6,)), -100)
    assert out.requires_grad and loss.requires_grad and not lse.requires_grad and not grad.requires_grad
    torch.library.opcheck(attention_op, (qkv, None, None, 2))
    torch.library.opcheck(linear_cross_entropy_op, (hidden, weight, torch.randint(0, 9, (6,)), -100))


def test_strided_projections_and_targets():
    torch.manual_seed(0)
    qkv, angles = torch.randn(5, 2, 24, dtype=torch.float64).transpose(0, 1).requires_grad_(), torch.rand(5, 2, dtype=torch.float64)
    assert not qkv.is_contiguous()
    torch.library.opcheck(attention_op, (qkv, angles.cos(), angles.sin(), 2))
    hidden, weight, targets = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8), torch.randint(0, 9, (6, 2))[:, 0]
    torch.library.opcheck(linear_cross_entropy_op, (hidden, weight, targets, -100))


def test_the_arriving_gradient_keeps_its_precision_in_bf16():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64).bfloat16().requires_grad_() for n in (200, 300))
    loss, _ = linear_cross_entropy_op(hidden, weight, torch.randint(0, 300, (200,)), -100)
    whole, third = (torch.autograd.grad(loss, (hidden, weight), torch.tensor(f), retain_graph=True) for f in (1.0, 1 / 3))
    for a, b in zip(third, whole):  # 1/3 in bf16 is 0.2 % too large
        assert abs(3 * a.double().norm() / b.double().norm() - 1) < 5e-4


def test_bf16_stream_stays_near_the_float32_stream():
    torch.manual_seed(0)
    model, ids = TransformerLM(SMALL), torch.randint(0, 40, (4, 17))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    exact = cross_entropy(model(inputs), targets)
    use_kernels(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(inputs).dtype == torch.bfloat16
        loss = fused_training_loss(model, inputs, targets)
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.02 * exact.item()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiles_without_a_graph_break():
    torch.manual_seed(0)
    model, ids = use_kernels(TransformerLM(SMALL)), torch.randint(0, 40, (2, 9))
    compiled = torch.compile(fused_training_loss, backend="aot_eager", fullgraph=True)
    losses = [f(model, ids[:, :-1], ids[:, 1:]) for f in (compiled, fused_training_loss)]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for a, b in zip(*grads): torch.testing.assert_close(a, b)


INTERPRETED = """
import torch, triton.runtime.interpreter as interpreter
before = interpreter._patch_lang_tensor
def patched(tensor, *rest):
    before(tensor, *rest)
    tensor.__index__ = lambda self: int(self.handle.data.item())  # numpy 2.4 turns no array of one number into an int
interpreter._patch_lang_tensor = patched
import cs336_lm.kernels as k
torch.manual_seed(0)
for batch, time, heads, d, turn in ((2, 70, 2, 16, True), (1, 33, 1, 32, False)):
    qkv, angles = torch.randn(batch, time, 3 * heads * d), torch.rand(time, d // 2)
    cos, sin = (angles.cos(), angles.sin()) if turn else (None, None)
    clear, clear_lse = k.attention_forward_clear(qkv, cos, sin, heads)
    out, lse, grad, got = torch.empty_like(clear), torch.empty_like(clear_lse), torch.randn_like(clear), torch.empty_like(qkv)
    scale, sizes = 1 / (0.6931471805599453 * d**0.5), (time, batch * heads)
    k._launch(k._attention_forward, *sizes, (qkv, cos, sin, out, lse, time, heads), scale, turn, d, 64, BN=64)
    torch.testing.assert_close((out, lse), (clear, clear_lse), rtol=1e-4, atol=1e-5)
    delta = torch.empty_like(lse)
    k._attention_delta[(batch * heads,)](out, grad, delta, time, heads, d, 128)
    for kernel in (k._attention_backward_keys, k._attention_backward_queries):
        k._launch(kernel, *sizes, (qkv, cos, sin, lse, delta, grad, got, time, heads), scale, turn, d, 64, STREAM=32)
    right = k.attention_backward_clear(grad, qkv, cos, sin, clear, clear_lse, heads)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    for block, keys in ((64, 32), (64, 64), (128, 64), (32, 16)):
        got.fill_(torch.nan)
        k._launch_row(batch * heads, time, (qkv, cos, sin, clear, clear_lse, grad, got), heads, turn, d, block, keys, 8)
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
for limit, vocab, integers in ((0, 100, torch.int64), (32_768, 100, torch.int32), (32_768, 64, torch.int64), (32_768, 1, torch.int64), (32_768, 130, torch.int64)):
    k.ONE_READ_VOCAB = limit
    hidden, weight, targets = torch.randn(7, 8), torch.randn(vocab, 8), torch.randint(0, vocab, (7,), dtype=integers)
    targets[1], targets[2], targets[3] = vocab - 1, -100, 0
    logits, losses, count = hidden @ weight.T, torch.empty(7), torch.tensor(6.0)
    k._launch_loss(logits, targets, losses, count, -100)
    loss, grad = k.linear_cross_entropy_clear(hidden, weight, targets.long(), -100)
    torch.testing.assert_close((losses.sum() / 6, logits), (loss, grad), rtol=1e-4, atol=1e-6)
    targets[0], targets[5], logits = vocab, -1, hidden @ weight.T  # no entries of the vocabulary: nan, not a number from another row
    k._launch_loss(logits, targets, losses, count, -100)
    wrong = torch.tensor([True, False, False, False, False, True, False])
    assert torch.equal(losses.isnan(), wrong) and torch.equal(logits.isnan(), wrong[:, None].expand(7, vocab))
    torch.testing.assert_close(logits[~wrong], grad[~wrong], rtol=1e-4, atol=1e-6)
"""
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="Triton is not installed (it comes with CUDA builds of torch)")


@NEEDS_TRITON
def test_kernels_in_tritons_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


CARDS = {"RTX 4090": (89, 101_376), "A100": (80, 166_912), "H100": (90, 232_448), "T4": (75, 65_536)}  # shared memory of a program


@pytest.mark.parametrize("card, widths", [("RTX 4090", (16, 32, 64, 128)), ("H100", (16, 32, 64, 128)), ("T4", (16, 32, 64))])
def test_kernels_fit_where_the_shared_memory_is_enough(monkeypatch, card, widths):
    monkeypatch.setattr(kernels, "triton", SimpleNamespace())
    properties = SimpleNamespace(shared_memory_per_block_optin=CARDS[card][1], shared_memory_per_block=49_152)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    fits = {d: kernels_fit(ModelConfig(d_model=2 * d, num_heads=2), torch.device("cuda"), "bf16") for d in (8, 16, 32, 64, 128)}
    assert tuple(d for d, fit in fits.items() if fit) == widths


def shared_memory(kernel, d, capability, stages, warps=4, **sizes):
    "Bytes of shared memory of a kernel for bf16, compiled without a GPU."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    constants = dict(TURN=True, D=d, **sizes)
    types = {"T": "i32", "H": "i32", "scale": "fp32", **dict.fromkeys(("COS", "SIN", "LSE", "DELTA"), "*fp32")}
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] in "*i"}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps, num_stages=stages)).metadata.shared


@NEEDS_TRITON
@pytest.mark.parametrize("card, d", [("RTX 4090", 64), ("RTX 4090", 128), ("A100", 128), ("H100", 128)])
def test_kernels_compile_to_the_shared_memory_of_a_card(card, d):
    capability, room = CARDS[card]
    stages = kernels._stages(d, 2, room)
    assert stages == (2 if (card, d) == ("RTX 4090", 128) else 3)
    assert shared_memory(kernels._attention_forward, d, capability, stages, BM=64, BN=64) <= room
    for kernel in (kernels._attention_backward_keys, kernels._attention_backward_queries):
        assert shared_memory(kernel, d, capability, stages, B=64, STREAM=32) <= room


@NEEDS_TRITON
@pytest.mark.parametrize("card", ["RTX 4090", "A100", "H100"])
def test_the_one_pass_kernel_compiles_to_what_is_said_of_it(card):
    (capability, room), (block, keys, warps) = CARDS[card], kernels.ROW_BLOCKS
    assert kernels.ROW_SHARED * 32 * 2 <= room
    used = shared_memory(kernels._attention_backward_row, 32, capability, 1, warps, BM=block, BN=keys, BLOCKS=-(-256 // block))
    assert used <= kernels.ROW_SHARED * 32 * 2


def test_one_pass_only_where_registers_and_shared_memory_are_enough(monkeypatch):
    assert not kernels._one_pass(1, 32, 2, 232_448) or kernels.ONE_PASS_TIME
    monkeypatch.setattr(kernels, "ONE_PASS_TIME", 256)
    fits = {(t, d, i, room): kernels._one_pass(t, d, i, room) for t in (1, 256, 257) for d in (16, 32, 64) for i in (2, 4) for room in (65_536, 232_448)}
    assert {sizes for sizes, fit in fits.items() if fit} == {(t, d, 2, room) for t in (1, 256) for d in (16, 32) for room in (65_536, 232_448)
                                                             if (d, room) != (32, 65_536)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sizes", [{}, dict(batch=4096, time=16, heads=16, d=16), dict(batch=1, time=64, heads=1, d=16), dict(batch=2, time=513, heads=3, d=64), dict(d=128, vocab=50_257)])
@pytest.mark.parametrize("short", [False, True])
def test_kernels_on_a_gpu(monkeypatch, sizes, short):
    monkeypatch.setattr(kernels, "ONE_PASS_TIME", 256 * short)
    monkeypatch.setattr(kernels, "ONE_READ_VOCAB", 32_768 * short)
    errors = kernel_errors(**sizes)
    assert max(errors.values()) < 2e-2, errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_strides_and_wrong_targets_on_a_gpu():
    torch.manual_seed(0)
    qkv = torch.randn(70, 2, 96, device="cuda", dtype=torch.bfloat16).transpose(0, 1).requires_grad_()
    outs = [attention_op(x, None, None, 2)[0] for x in (qkv, qkv.contiguous())]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(out.float().square().sum(), qkv)[0] for out in outs), rtol=0, atol=0)
    hidden, weight = (torch.randn(n, 64, device="cuda").bfloat16() for n in (6, 100))
    targets = torch.randint(0, 100, (6, 2), device="cuda")[:, 0]
    torch.testing.assert_close(*(linear_cross_entropy_op(hidden, weight, t, -100)[0] for t in (targets, targets.contiguous())), rtol=0, atol=0)
    for wrong in (100, -1):
        targets[3] = wrong
        assert linear_cross_entropy_op(hidden, weight, targets, -100)[0].isnan()
