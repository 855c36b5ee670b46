"""Chapter 09 against PyTorch's own loss, optimizer and clipping, by properties and by faults."""
import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from cs336_lm.optimization import (NEWTON_SCHULZ, SGD, AdamW, Muon, adamw_update, adamw_update_all, clip_gradients, cosine_schedule,
                                   cross_entropy, muon_update, muon_update_all, newton_schulz, newton_schulz_flops,
                                   newton_schulz_stack, split_parameters, token_losses)
from cs336_lm.transformer import ModelConfig, TransformerLM

seeds = st.integers(0, 2**31)


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- cross-entropy

@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.integers(1, 40), st.floats(-3, 5), st.floats(0, 1))
def test_cross_entropy_and_gradient_equal_torch(seed, batch, time, vocab, log_scale, ignored):
    logits = (10**log_scale * random(seed, batch, time, vocab)).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, (batch, time), generator=generator)
    targets[torch.rand(batch, time, generator=generator) < ignored] = -100
    ours, theirs = cross_entropy(logits, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    if (targets == -100).all(): return
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


def test_cross_entropy_passes_gradcheck():
    targets = torch.tensor([[1, 4, -1], [0, -1, 2]])
    torch.autograd.gradcheck(lambda z: cross_entropy(z, targets, ignore_index=-1), random(0, 2, 3, 5).requires_grad_())


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(-1e6, 1e6))
def test_cross_entropy_does_not_change_when_all_logits_move(seed, shift):
    logits, targets = random(seed, 4, 9), torch.tensor([0, 3, 8, 8])
    moved = cross_entropy(logits + shift, targets)
    torch.testing.assert_close(moved, cross_entropy(logits, targets), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_computes_narrow_logits_in_float32(dtype):
    logits = (3 * random(1, 64, 500)).to(dtype)
    targets = torch.arange(64)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits.double(), targets), rtol=1e-6, atol=0)
    assert torch.autograd.grad(cross_entropy(logits.requires_grad_(), targets), logits)[0].dtype == dtype


def test_cross_entropy_of_masked_vocabulary_entries():
    logits = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.tensor([[-0.5, 0.0, 0.5]]))
    assert cross_entropy(logits, torch.tensor([1])).item() == math.inf


def test_token_losses_add_up_over_batches():
    logits, targets = random(2, 7, 11), torch.tensor([1, -100, 3, 4, -100, 0, 10])
    losses = token_losses(logits, targets)
    assert losses[1] == losses[4] == 0
    parts = sum(token_losses(*part).sum() for part in zip(logits.split(3), targets.split(3)))
    torch.testing.assert_close(parts / 5, cross_entropy(logits, targets))


def test_cross_entropy_refuses_shapes_and_targets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3, 5\).*\(3, 2\)"):
        cross_entropy(torch.zeros(2, 3, 5), torch.zeros(3, 2).long())
    for bad in (5, -1):
        with pytest.raises(ValueError, match=f"from 0 to 4 or ignore_index, but are from .*{bad}"):
            cross_entropy(torch.zeros(2, 5), torch.tensor([0, bad]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.uint16, torch.bool])
def test_cross_entropy_refuses_targets_it_would_have_to_convert(dtype):
    with pytest.raises(ValueError, match=rf"targets must be int32 or int64, but are {dtype}: convert with \.long\(\)"):
        cross_entropy(torch.zeros(2, 5), torch.ones(2).to(dtype))
    assert cross_entropy(torch.zeros(2, 5), torch.ones(2, dtype=torch.int32)).item() == pytest.approx(math.log(5))


# --- optimizers

def test_toy_sgd_follows_the_contraction_factors():
    w = nn.Parameter(random(0, 10, 10))
    start, optimizer = w.detach().clone(), SGD([w], lr=7.0)
    for t in range(6):
        optimizer.zero_grad()
        optimizer.step(lambda: w.square().mean().backward())
    factor = math.prod(1 - 7.0 / (50 * math.sqrt(t + 1)) for t in range(6))
    torch.testing.assert_close(w.detach(), factor * start)


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_a_saved_optimizer_continues_exactly(make):
    def fresh():
        p = nn.Parameter(random(0, 6))
        return p, make([p], lr=0.1)

    def steps(p, optimizer, n):
        for _ in range(n):
            p.grad = p.detach() ** 3
            optimizer.step()

    whole, optimizer = fresh()
    steps(whole, optimizer, 8)
    half, optimizer = fresh()
    steps(half, optimizer, 5)
    buffer = io.BytesIO()
    torch.save({"p": half.detach(), "state": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, optimizer = fresh()
    resumed.data.copy_(saved["p"])
    optimizer.load_state_dict(saved["state"])
    steps(resumed, optimizer, 3)
    assert torch.equal(resumed, whole)


@settings(deadline=None, max_examples=40)
@given(seeds, st.floats(0, 0.5), st.floats(0, 0.99), st.floats(0, 0.9999), st.floats(1e-10, 1e-2), st.floats(0, 1),
       st.booleans())
def test_adamw_equals_torch_step_by_step(seed, lr, beta1, beta2, eps, weight_decay, foreach):
    kwargs = dict(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    ours = [nn.Parameter(random(seed, *shape)) for shape in [(3, 2), (4,), ()]]
    theirs = copy.deepcopy(ours)
    pairs = [(ours, AdamW(ours, foreach=foreach, **kwargs)), (theirs, torch.optim.AdamW(theirs, **kwargs))]
    for step in range(6):
        for params, optimizer in pairs:
            for i, p in enumerate(params):
                p.grad = None if (step + i) % 4 == 3 else 10.0 ** (i - 1) * random(seed + 10 * step + i + 1, *p.shape)
            optimizer.step()
        for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_adamw_clear_and_fast_updates_agree(dtype, tolerance):
    clear = [random(i, 50).to(dtype) for i in range(2)] + [torch.zeros(50, dtype=dtype) for _ in range(4)]
    fast = [t.clone() for t in clear]
    kwargs = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 5):
        grads = [random(10 * step + i, 50).to(dtype) for i in range(2)]
        for i in range(2): adamw_update(clear[i], grads[i], clear[2 + i], clear[4 + i], step=step, **kwargs)
        adamw_update_all(fast[:2], grads, fast[2:4], fast[4:], steps=[step, step], **kwargs)
    for a, b in zip(clear, fast): torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("first, second", [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_adamw_state_crosses_to_and_from_torch(first, second):
    p = nn.Parameter(random(0, 5))
    optimizer = first([p], lr=0.02, weight_decay=0.3)
    p.grad = random(1, 5)
    optimizer.step()
    q = nn.Parameter(p.detach().clone())
    other = second([q])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p.grad = q.grad = random(2, 5)
    optimizer.step(), other.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["maximize", "amsgrad"])
def test_adamw_refuses_a_state_or_group_whose_steps_it_does_not_have(name):
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], **{name: True})
    optimizer = AdamW([nn.Parameter(torch.zeros(2))], lr=0.5)
    with pytest.raises(ValueError, match=f"{name}=True"): optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match=f"{name}=True"): AdamW([{"params": [nn.Parameter(torch.zeros(2))], name: True}])


@pytest.mark.parametrize("form", [{"foreach": False}, {"foreach": True}, {"capturable": True}], ids=str)
def test_adamw_applies_grad_scale_in_every_form(form):
    p, q = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    ours, plain = AdamW([p], lr=0.1, eps=0.1, **form), AdamW([q], lr=0.1, eps=0.1, **form)
    ours.grad_scale = torch.tensor(0.25, dtype=torch.float64)
    for step in range(3):
        p.grad = random(step, 3)
        q.grad = 0.25 * p.grad
        ours.step(), plain.step()
        assert torch.equal(p.grad, random(step, 3))  # the caller's gradients stay as they are
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_adamw_first_step_is_the_rate_whatever_the_gradient():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    p.grad = torch.tensor([1e-3, -1.0, 1e6, 0.0], dtype=torch.float64)
    AdamW([p], lr=0.1, weight_decay=0.0, eps=0.0 + 1e-30).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1, -0.1, 0.0], dtype=torch.float64))


def test_adamw_leaves_parameters_without_gradient_and_their_decay_alone():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([used, unused], weight_decay=0.5)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state


def test_adamw_returns_the_closures_loss():
    p = nn.Parameter(torch.ones(2))
    optimizer = AdamW([p])

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2 and (p < 1).all()


BAD = [{"lr": -1.0}, {"lr": math.nan}, {"eps": -1e-8}, {"weight_decay": -0.1},
       {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_adamw_refuses_what_torch_refuses(bad):
    messages = []
    for make in (AdamW, torch.optim.AdamW):
        with pytest.raises(ValueError) as error: make([nn.Parameter(torch.zeros(1))], **bad)
        messages.append(str(error.value))
    assert messages[0].startswith(messages[1])
    with pytest.raises(ValueError, match="Invalid"): AdamW([{"params": [nn.Parameter(torch.zeros(1))], **bad}])


def test_other_refusals():
    with pytest.raises(ValueError, match="empty parameter list"): AdamW([])
    with pytest.raises(ValueError, match="-1"): SGD([nn.Parameter(torch.zeros(1))], lr=-1)
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"): AdamW([p]).step()


# --- Muon

sides = st.integers(1, 12)


def on_numbers(s, steps=5):
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps): s = s * (a + b * s**2 + c * s**4)
    return s


@settings(deadline=None, max_examples=60)
@given(seeds, sides, sides, st.integers(0, 6))
def test_newton_schulz_is_its_polynomial_on_the_singular_values(seed, rows, columns, steps):
    x = random(seed, rows, columns)
    U, s, V = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(newton_schulz(x, steps), U @ torch.diag(on_numbers(s / s.norm(), steps)) @ V, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(newton_schulz(x.mT, steps), newton_schulz(x, steps).mT)


@settings(deadline=None, max_examples=40)
@given(seeds, sides, sides, st.floats(-4, 4))
def test_newton_schulz_does_not_see_the_gradients_scale(seed, rows, columns, log_scale):
    x = random(seed, rows, columns)
    torch.testing.assert_close(newton_schulz(10**log_scale * x), newton_schulz(x), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(seeds, sides, sides)
def test_newton_schulz_of_an_orthogonal_matrix_is_a_multiple_of_it(seed, a, b):
    columns, rows = sorted((a, b))
    q = torch.linalg.qr(random(seed, rows, columns)).Q
    factor = on_numbers(torch.tensor(columns**-0.5, dtype=torch.float64))
    assert 0.68 < factor < 1.21
    torch.testing.assert_close(newton_schulz(q), factor * q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_in_narrow_types_and_at_zero(dtype):
    values = torch.linalg.svdvals(newton_schulz(random(0, 60, 200).to(dtype)).float())
    assert 0.65 < values.min() and values.max() < 1.25
    assert newton_schulz(torch.zeros(3, 4, dtype=dtype)).abs().max() == 0 == newton_schulz_stack(torch.zeros(2, 3, 4, dtype=dtype)).abs().max()


def test_newton_schulz_refusals_and_flops():
    with pytest.raises(ValueError, match=r"need a matrix.*\(3,\)"): newton_schulz(torch.zeros(3))
    with pytest.raises(ValueError, match="steps.*-1"): newton_schulz(torch.zeros(3, 3), -1)
    assert newton_schulz_flops(3, 7) == newton_schulz_flops(7, 3) == 5 * (4 * 9 * 7 + 2 * 27)


SHAPES = [(6, 9), (9, 6), (7, 7), (6, 9), (1, 5), (5, 1)]


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0, 1), st.floats(0, 0.99), st.floats(0, 1), st.booleans())
def test_muon_by_stacks_equals_the_clear_update(seed, lr, momentum, decay, tensors):
    found, scale = [], torch.tensor(0.5, dtype=torch.float64)
    for stacked in (False, True):
        params, momenta = ([random(seed + i, *s) for i, s in enumerate(SHAPES)] for _ in range(2))
        for step in range(2):
            grads = [random(seed + 10 * step + i, *s) for i, s in enumerate(SHAPES)]
            how = dict(lr=lr, momentum=momentum, weight_decay=decay)
            if stacked and tensors: muon_update_all(params, grads, momenta, grad_scale=scale, **how | {"lr": 2 * lr * scale})
            elif stacked: muon_update_all(params, [g / 2 for g in grads], momenta, **how)
            else:
                for p, g, m in zip(params, grads, momenta): muon_update(p, g / 2, m, **how)
        found.append(params + momenta)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form, tolerance", [({"dtype": torch.bfloat16}, 1e-3), ({"dtype": torch.bfloat16, "capturable": True}, 1e-3), ({}, 1e-2)], ids=str)
def test_muon_goes_torchs_way(form, tolerance):
    ways = []
    for make in (lambda p: Muon(p, lr=2e-2, weight_decay=0.2, **form),
                 lambda p: torch.optim.Muon(p, lr=2e-2, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")):
        params = [nn.Parameter(random(i, *s, dtype=torch.float32)) for i, s in enumerate([(20, 30), (30, 20), (16, 16)])]
        start, optimizer = [p.detach().clone() for p in params], make(params)
        for step in range(30):
            for i, p in enumerate(params): p.grad = random(100 * step + i, *p.shape, dtype=torch.float32) if step % 3 or i else None
            optimizer.step()
        ways.append([p.detach() - s for p, s in zip(params, start)])
        buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
        ways[-1] += [1e3 * b for b in buffers]
    for ours, theirs in zip(*ways): assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_muon_steps_matrices_and_leaves_the_others_to_adamw():
    make = lambda: [nn.Parameter(random(i, *s)) for i, s in enumerate([(4, 6), (5, 3), (7,)])]
    settings = dict(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    (a, b, c), (d, e, f) = make(), make()
    both, alone, by_hand = Muon([a], [b, c], **settings), AdamW([e, f], **settings), torch.zeros_like(d)
    for step in range(4):
        for i, (p, q) in enumerate(zip((a, b, c), (d, e, f))): p.grad = q.grad = random(9 * step + i, *p.shape)
        both.step(), alone.step()
        with torch.no_grad(): muon_update(d, d.grad, by_hand, lr=0.1, momentum=0.95, weight_decay=0.3)
    assert torch.equal(b, e) and torch.equal(c, f)
    torch.testing.assert_close(a, d, rtol=1e-10, atol=1e-10)
    assert list(both.state[a]) == ["momentum_buffer"] and "momentum" in both.param_groups[0] and "momentum" not in both.param_groups[1]


def test_muon_continues_from_its_state_and_refuses_anothers():
    params = lambda: [nn.Parameter(random(i, *s)) for i, s in enumerate([(4, 6), (5, 3)])]
    def go_on(optimizer, tensors, steps):
        for step in steps:
            for i, p in enumerate(tensors): p.grad = random(5 * step + i, *p.shape)
            optimizer.step()
    (a, b), (c, d) = params(), params()
    first = Muon([a], [b], lr=0.1)
    go_on(first, [a, b], range(3))
    state = copy.deepcopy(first.state_dict())
    with torch.no_grad(): c.copy_(a), d.copy_(b)
    second = Muon([c], [d])
    second.load_state_dict(state)
    go_on(first, [a, b], range(3, 6)), go_on(second, [c, d], range(3, 6))
    assert torch.equal(a, c) and torch.equal(b, d)
    two = AdamW([{"params": [c]}, {"params": [d]}])
    with pytest.raises(ValueError, match="group 0 of the state is Muon's"): two.load_state_dict(state)
    with pytest.raises(ValueError, match="group 0 of the state is AdamW's"): second.load_state_dict(two.state_dict())


def test_muon_refusals():
    matrix, vector = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"takes matrices.*\(3,\).*others"): Muon([matrix, vector])
    for momentum in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="momentum"): Muon([matrix], momentum=momentum)
    with pytest.raises(ValueError, match="learning rate"): Muon([matrix], lr=-1)
    matrix.grad = torch.sparse_coo_tensor([[0], [0]], [1.0], (2, 3), check_invariants=True)
    with pytest.raises(RuntimeError, match="Muon does not support sparse"): Muon([matrix]).step()


@pytest.mark.parametrize("change", [{}, {"tied_embeddings": True}, {"ffn": "silu"}, {"norm": "none"}, {"position": "none"}], ids=str)
def test_every_parameter_is_in_one_group_and_only_the_blocks_matrices_are_muons(change):
    model = TransformerLM(ModelConfig(**{**dict(vocab_size=50, context_length=8, d_model=16, num_layers=2, num_heads=2, d_ff=32), **change}))
    matrices, others = split_parameters(model)
    assert sorted(map(id, matrices + others)) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(name.startswith("layers.") and p.ndim == 2 for p in matrices for name in [names[id(p)]])
    assert not [n for n in (names[id(p)] for p in others) if "proj" in n or "ffn" in n] and len(matrices) == 2 * (4 + (2 if change.get("ffn") else 3))


# --- schedule

@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 200), st.integers(0, 200), st.floats(0, 1), st.floats(0, 1))
def test_schedule_follows_its_definition(step, warmup, length, a, b):
    low, high, end = min(a, b), max(a, b), warmup + length
    lr = cosine_schedule(step, high, low, warmup, end)
    if step < warmup: assert math.isclose(lr * warmup, step * high, rel_tol=1e-12, abs_tol=1e-300)
    elif step > end: assert lr == low
    elif length == 0: assert lr == high
    else:
        half_angle = math.pi / 2 * (step - warmup) / length
        assert math.isclose(lr, low + (high - low) * math.cos(half_angle) ** 2, rel_tol=1e-9, abs_tol=1e-15)
    if step + 1 > warmup: assert cosine_schedule(step + 1, high, low, warmup, end) <= lr or step < warmup


def test_schedule_at_its_corners():
    assert [cosine_schedule(t, 1.0, 0.1, 4, 4) for t in (0, 3, 4, 5)] == [0, 0.75, 1.0, 0.1]
    assert [cosine_schedule(t, 1.0, 0.1, 0, 0) for t in (0, 1)] == [1.0, 0.1]
    assert [cosine_schedule(t, 1.0, 0.1, 7, 21) for t in (0, 7, 21, 22)] == [0, 1.0, 0.1, 0.1]


@pytest.mark.parametrize("args", [(-1, 1.0, 0.1, 2, 5), (0, 1.0, 0.1, 6, 5), (0, 1.0, 0.1, -1, 5), (0, 0.1, 1.0, 2, 5),
                                  (0, 1.0, -0.1, 2, 5)])
def test_schedule_refuses_impossible_settings(args):
    with pytest.raises(ValueError): cosine_schedule(*args)


# --- clipping

@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(-4, 6), st.floats(0.01, 100))
def test_clipping_equals_torch(seed, log_scale, max_norm):
    ours = [nn.Parameter(torch.zeros(s)) for s in [(3, 4), (5,), (), (2,)]]
    for i, p in enumerate(ours[:3]): p.grad = (10**log_scale * random(seed + i, *p.shape)).float()
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for p, q in zip(ours[:3], theirs): q.grad = p.grad.clone()
    pointers = [p.grad.data_ptr() for p in ours[:3]]
    norm = clip_gradients(iter(ours), max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
    for p, q in zip(ours[:3], theirs): torch.testing.assert_close(p.grad, q.grad)
    assert [p.grad.data_ptr() for p in ours[:3]] == pointers and ours[3].grad is None
    assert clip_gradients(ours, math.inf) <= max(max_norm * (1 + 1e-5), 0)


def test_gradients_within_the_limit_keep_every_bit():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([p], 5.0) == 5 and p.grad.tolist() == [3.0, 4.0]


def test_the_norm_is_enlarged_by_epsilon_before_it_divides():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    clip_gradients(p, 1.0, eps=0.25)
    torch.testing.assert_close(p.grad, torch.tensor([3.0, 4.0], dtype=torch.float64) / 5.25)


def test_clipping_corners():
    assert clip_gradients([], 1.0) == 0 and clip_gradients(nn.Parameter(torch.zeros(2)), 1.0) == 0
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    assert clip_gradients(p, 0.0) == 0 and p.grad.tolist() == [0, 0]
    for bad in (math.inf, -math.inf, math.nan):
        p.grad = torch.tensor([7.0, bad])
        assert not clip_gradients(p, 1.0).isfinite() and p.grad[0] == 7
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm"): clip_gradients(p, bad)


def test_narrow_gradients_are_measured_in_float32():
    p = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    p.grad = torch.full((1000,), 0.3, dtype=torch.bfloat16)
    norm = clip_gradients(p, 1.0)
    torch.testing.assert_close(norm.double(), p.grad.new_full((1000,), 0.3).double().norm(), rtol=1e-6, atol=0)
    assert p.grad.dtype == torch.bfloat16 and p.grad.float().norm() <= 1 + 1 / 256


def test_gradients_whose_norm_is_beyond_float32_are_left():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.full((2,), 3e38)
    assert clip_gradients(p, 1.0) == math.inf and (p.grad == torch.full((2,), 3e38)).all()
