"""Chapter 8: the model's variants, configuration, presets, cache and ties."""
import copy, dataclasses, itertools, json, math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from cs336_lm.layers import matched_silu_d_ff
from cs336_lm.transformer import CHOICES, PRESETS, ModelConfig, TransformerBlock, TransformerLM, make_rope

SMALL = ModelConfig(vocab_size=61, context_length=12, d_model=24, num_layers=2, num_heads=3, d_ff=40)
VARIANTS = [dataclasses.replace(SMALL, norm=norm, position=position, ffn=ffn, tied_embeddings=tied, attention=attention)
            for norm, position, ffn, attention, tied in itertools.product(*(CHOICES[k] for k in ("norm", "position", "ffn", "attention")), (False, True))]


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def variant_name(config): return "-".join(str(getattr(config, k)) for k in (*CHOICES, "tied_embeddings"))


def with_gains(module):
    "Gains that are not 1, so that a norm left out or put elsewhere shows."
    for name, p in module.named_parameters():
        if "ln" in name: nn.init.uniform_(p, 0.5, 2)
    return module


def ids(*shape): return torch.randint(0, SMALL.vocab_size, shape)


# every variant

@pytest.mark.parametrize("config", VARIANTS, ids=variant_name)
def test_variant_learns_and_is_causal(config):
    model, row = with_gains(TransformerLM(config)), ids(2, 12)
    logits = model(row)
    assert logits.shape == (2, 12, 61) and logits.isfinite().all()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    changed = row.clone()
    changed[:, 7] = (row[:, 7] + 1) % 61
    difference = (model(changed) - logits).abs().amax((0, 2))
    assert difference[:7].max() < 1e-4 * logits.abs().max() and difference[7] > 1e-3


@pytest.mark.parametrize("config", VARIANTS, ids=variant_name)
def test_variant_has_exactly_the_keys_it_should(config):
    attention = [f"attn.{n}_proj.weight" for n in ("q", "k", "v", "output")]
    ffn = ["ffn.w1.weight", "ffn.w2.weight"] + ["ffn.w3.weight"] * (config.ffn == "swiglu")
    norms = ["ln1.weight", "ln2.weight"] * (config.norm != "none")
    keys = {f"layers.{i}.{k}" for i in range(2) for k in attention + ffn + norms} | {"token_embeddings.weight", "lm_head.weight"}
    if config.norm == "pre": keys.add("ln_final.weight")
    assert set(TransformerLM(config, device="meta").state_dict()) == keys


@pytest.mark.parametrize("config", [c for c in VARIANTS if not c.tied_embeddings], ids=variant_name)
@settings(deadline=None, max_examples=5)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=12).filter(lambda p: sum(p) <= 12))
def test_cache_gives_the_full_logits(config, pieces):
    model, row = TransformerLM(config), ids(2, sum(pieces))
    cache = model.make_cache()
    with torch.no_grad():
        stepwise = torch.cat([model(piece, cache) for piece in row.split(pieces, 1)], 1)
        torch.testing.assert_close(stepwise, model(row), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [c for c in VARIANTS if c.attention == "clear"], ids=variant_name)
def test_both_kernels_give_one_model(config):
    clear = with_gains(TransformerLM(config))
    fused = TransformerLM(dataclasses.replace(config, attention="sdpa"))
    fused.load_state_dict(clear.state_dict())
    row = ids(2, 12)
    torch.testing.assert_close(fused(row), clear(row), rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(m(row).logsumexp(-1).sum(), list(m.parameters())) for m in (fused, clear))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_where_the_norms_stand(norm):
    config = dataclasses.replace(SMALL, norm=norm, num_layers=1)
    model, row = with_gains(TransformerLM(config)), ids(2, 9)
    block, x = model.layers[0], model.token_embeddings.weight[row]
    def rms(h, ln): return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ln.weight
    if norm == "pre":
        z = x + block.attn(rms(x, block.ln1))
        y = z + block.ffn(rms(z, block.ln2))
        out = rms(y, model.ln_final)
    elif norm == "post":
        z = rms(x + block.attn(x), block.ln1)
        out = y = rms(z + block.ffn(z), block.ln2)
    else:
        z = x + block.attn(x)
        out = y = z + block.ffn(z)
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(row), out @ model.lm_head.weight.T, rtol=1e-4, atol=1e-5)


def test_without_positions_a_shuffled_past_looks_the_same():
    row = ids(1, 8)
    shuffled = torch.cat([row[:, torch.randperm(7)], row[:, 7:]], 1)
    assert not (shuffled == row).all()
    one = {"num_layers": 1}  # from two layers on, the causal mask itself tells positions apart
    nope, rope = (TransformerLM(dataclasses.replace(SMALL, position=p, **one)) for p in ("none", "rope"))
    torch.testing.assert_close(nope(row)[:, -1], nope(shuffled)[:, -1], rtol=1e-4, atol=1e-5)
    assert (rope(row)[:, -1] - rope(shuffled)[:, -1]).abs().max() > 1e-3


def test_matched_feed_forwards_have_equal_parameters():
    config = ModelConfig()
    silu = dataclasses.replace(config, ffn="silu", d_ff=matched_silu_d_ff(config.d_ff))
    counts = [sum(p.numel() for p in TransformerLM(c, device="meta").parameters()) for c in (config, silu)]
    assert counts[0] == counts[1] == 22_696_448


# configuration and presets

@pytest.mark.parametrize("values, words", [
    ({"num_heads": 7}, "num_heads must divide d_model, got num_heads=7 and d_model=512"),
    ({"d_model": 48, "num_heads": 16}, "even, got 48 / 16 = 3"),
    *[({name: bad}, f"{name} must be a whole number of at least 1, got {bad!r}") for name, bad in itertools.product(
        ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff"), (0, -1, 2.0, True, "8", None))],
    *[({name: bad}, f"{name} must be a positive number, got {bad!r}") for name, bad in itertools.product(
        ("rope_theta", "embedding_std"), (0, -1.0, math.inf, math.nan, True, "1"))],
    ({"norm": "layer"}, "norm must be one of pre, post, none, got 'layer'"), ({"norm": None}, "norm must be one of"),
    ({"position": "learned"}, "position must be one of rope, none, got 'learned'"),
    ({"ffn": "gelu"}, "ffn must be one of swiglu, silu, got 'gelu'"), ({"ffn": ["silu"]}, "ffn must be one of"),
    ({"attention": "flash"}, "attention must be one of sdpa, clear, got 'flash'"),
    ({"tied_embeddings": 1}, "tied_embeddings must be True or False, got 1"),
], ids=str)
def test_config_refuses_by_name(values, words):
    with pytest.raises(ValueError) as error: ModelConfig(**values)
    assert words in str(error.value)
    with pytest.raises(ValueError): dataclasses.replace(ModelConfig(), **values)


def test_config_takes_numbers_of_numpy_and_keeps_pythons():
    config = ModelConfig(vocab_size=np.int64(50), d_model=np.uint16(32), num_heads=4, rope_theta=np.float32(500))
    assert repr(config) == repr(ModelConfig(vocab_size=50, d_model=32, num_heads=4, rope_theta=500.0))
    assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(config)
    for bad in (np.int64(0), np.bool_(True), np.float64(3.0)):
        with pytest.raises(ValueError, match="vocab_size must be a whole number of at least 1"): ModelConfig(vocab_size=bad)


def test_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError): SMALL.d_model = 3
    assert hash(SMALL) == hash(copy.copy(SMALL)) and SMALL.d_head == 8
    assert ModelConfig(d_model=9, num_heads=3, position="none").d_head == 3  # odd heads are fine without RoPE
    assert eval(repr(SMALL)) == SMALL


def test_presets():
    assert PRESETS["tinystories"] == ModelConfig()
    assert PRESETS["openwebtext"] == ModelConfig(vocab_size=32_000)
    assert PRESETS["writeup-openwebtext"] == ModelConfig(32_000, 512, 512, 8, 16, 2_048, tied_embeddings=True)
    assert PRESETS["demo"].vocab_size == 1_024 and PRESETS["demo"].context_length == 160
    assert {f"gpt2-{s}-{f}" for s in ("small", "medium", "large", "xl") for f in ("2025", "2026", "two-matrix")} < set(PRESETS)
    assert [PRESETS[f"gpt2-xl-{f}"].d_ff for f in ("2025", "2026", "two-matrix", "two-matrix-untied")] == [6_400, 4_288, 6_400, 6_400]
    assert PRESETS["gpt2-xl-two-matrix-untied"] == dataclasses.replace(PRESETS["gpt2-xl-two-matrix"], tied_embeddings=False)
    # The handouts' GPT-2 XL by hand: vocabulary twice, and in each of 48 blocks 4 + 3 matrices and 2 gains, and the last gain
    for form, d_ff in (("2025", 6_400), ("2026", 4_288)):
        count = sum(p.numel() for p in TransformerLM(PRESETS[f"gpt2-xl-{form}"], device="meta").parameters())
        assert count == 2 * 50_257 * 1_600 + 48 * (4 * 1_600**2 + 3 * 1_600 * d_ff + 2 * 1_600) + 1_600


# lengths, ids, caches

def test_rows_longer_than_the_context_are_refused():
    for config in (SMALL, dataclasses.replace(SMALL, position="none")):
        model = TransformerLM(config)
        with pytest.raises(ValueError, match="13 tokens exceed the context length of 12"): model(ids(1, 13))
        cache = model.make_cache()
        model(ids(1, 12), cache)
        with pytest.raises(ValueError, match="13 tokens exceed the context length of 12"): model(ids(1, 1), cache)


def test_wrong_ids_are_refused():
    with pytest.raises(ValueError, match="expected 0 to 60, got values from 3 to 61"): TransformerLM(SMALL)(torch.tensor([[3, 61]]))


def test_any_axes_in_front():
    model, row = TransformerLM(SMALL), ids(2, 3, 5)
    torch.testing.assert_close(model(row)[1, 2], model(row[1, 2]))
    assert model(ids(0, 4)).shape == (0, 4, 61)


def test_no_gradient_through_the_cache():
    model = TransformerLM(SMALL)
    cache = model.make_cache()
    for _ in range(3): out = model(ids(1, 2), cache)
    out.sum().backward()
    assert not cache[0].keys.requires_grad


# initialization

def test_first_loss_is_that_of_an_even_guess():
    config = ModelConfig(vocab_size=2_000, d_model=256, num_layers=2, num_heads=8, d_ff=640)
    row = torch.randint(0, 2_000, (4, 129))
    def first_loss(**changes):
        with torch.no_grad(): logits = TransformerLM(dataclasses.replace(config, **changes))(row[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()).item()
    variance = 2 * 256 / (256 + 2_000)
    for norm in ("pre", "post"): assert first_loss(norm=norm) == pytest.approx(math.log(2_000) + variance / 2, abs=0.1)
    assert first_loss(tied_embeddings=True) > 50
    assert first_loss(tied_embeddings=True, embedding_std=256**-0.5) == pytest.approx(math.log(2_000) + 0.5, abs=0.3)


@pytest.mark.parametrize("tied, std", [(False, 1.0), (True, 1.0), (True, 0.02)])
def test_embedding_std_governs_the_tied_table(tied, std):
    model = TransformerLM(dataclasses.replace(SMALL, vocab_size=2_000, tied_embeddings=tied, embedding_std=std))
    for _ in range(2):
        head = std if tied else math.sqrt(2 / (24 + 2_000))
        assert model.token_embeddings.weight.std().item() == pytest.approx(0.9866 * std, rel=0.02)
        assert model.lm_head.weight.std().item() == pytest.approx(0.9866 * head, rel=0.02)
        assert model.lm_head.weight.abs().max() <= 3 * head
        model.reset_parameters()


def test_seed_fixes_the_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(TransformerLM(SMALL).state_dict())
    assert all((models[0][k] == models[1][k]).all() for k in models[0])


# ties, devices, types

TIED = dataclasses.replace(SMALL, tied_embeddings=True)


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_meta_device_then_real_is_the_same_model(config):
    model = TransformerLM(config)
    assert all(t.is_meta for t in [*TransformerLM(config, device="meta").state_dict().values(), *TransformerLM(config, device="meta").buffers()])
    made = TransformerLM(config, device="meta").to_empty(device="cpu")
    made.load_state_dict(model.state_dict())
    row = ids(1, 12)
    assert (made(row) == model(row)).all()
    assert (made.lm_head.weight is made.token_embeddings.weight) == config.tied_embeddings


def test_tie_survives():
    for model in (TransformerLM(TIED), TransformerLM(TIED).double(), TransformerLM(TIED).to(torch.bfloat16), copy.deepcopy(TransformerLM(TIED))):
        assert model.lm_head.weight is model.token_embeddings.weight
        state = model.state_dict()
        assert state["lm_head.weight"].data_ptr() == state["token_embeddings.weight"].data_ptr()
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in TransformerLM(SMALL).parameters()) - 61 * 24


@pytest.mark.parametrize("missing", ["lm_head.weight", "token_embeddings.weight", None])
def test_tied_weights_stored_once_or_twice(missing):
    source, model = TransformerLM(TIED), TransformerLM(TIED)
    state = source.state_dict()
    state.pop(missing, None)
    before = set(state)
    model.load_state_dict(state)
    assert (model.lm_head.weight == source.lm_head.weight).all() and set(state) == before
    assert model.lm_head.weight is model.token_embeddings.weight


def test_untied_weights_do_not_go_into_a_tied_model():
    with pytest.raises(ValueError, match="tied_embeddings=False"): TransformerLM(TIED).load_state_dict(TransformerLM(SMALL).state_dict())
    state = TransformerLM(SMALL).state_dict()
    del state["lm_head.weight"]
    with pytest.raises(RuntimeError, match="lm_head"): TransformerLM(SMALL).load_state_dict(state)


def test_buffers_are_few_and_not_saved():
    model = TransformerLM(dataclasses.replace(SMALL, context_length=512))
    assert sum(b.numel() for b in model.buffers()) == 2 * 512 * 4  # two RoPE tables for all layers, nothing square
    assert not set(dict(model.named_buffers())) & set(model.state_dict())
    assert len({id(block.attn.rope) for block in model.layers}) == 1


def test_autocast_and_half_models_stay_near():
    model, row = TransformerLM(SMALL), ids(2, 12)
    exact = model(row)
    with torch.autocast("cpu", dtype=torch.bfloat16): mixed = model(row)
    assert mixed.dtype == torch.bfloat16 and (mixed - exact).abs().max() < 0.05
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(row).dtype == torch.bfloat16 and (half(row) - exact).abs().max() < 0.1
    assert half.layers[0].attn.rope.cos.dtype == torch.float32


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(TIED, norm="post", position="none", ffn="silu", attention="clear")], ids=variant_name)
def test_traces_as_one_graph(config):
    "torch.compile sees the whole model without a break (a backend that needs no compiler)."
    model, row = TransformerLM(config), ids(2, 12)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(row), model(row))


def test_finite_differences_through_a_block():
    config = dataclasses.replace(SMALL, d_model=6, num_heads=1, d_ff=8)
    block = TransformerBlock(config, make_rope(config)).double()
    assert torch.autograd.gradcheck(block, torch.randn(1, 4, 6, dtype=torch.double, requires_grad=True))
