"""Chapter 10 against the model itself, FlopCounterMode, known figures, and by properties."""
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cs336_lm.accounting import (CARDS, COMPONENTS, account, activation_numbers, adamw_flops, count_gpt2_parameters,
                                 count_parameters, flops_per_token, forward_flops, matrix_products, max_batch_size,
                                 memory_bytes, memory_line, training_flops, training_seconds)
from cs336_lm.transformer import PRESETS, ModelConfig, TransformerLM

sizes = dict(vocab_size=st.integers(2, 300), context_length=st.integers(1, 40), num_layers=st.integers(1, 4),
             d_ff=st.integers(1, 100), norm=st.sampled_from(["pre", "post", "none"]), attention=st.just("clear"),
             position=st.sampled_from(["rope", "none"]), ffn=st.sampled_from(["swiglu", "silu"]),
             tied_embeddings=st.booleans())
configs = st.tuples(st.integers(1, 9), st.integers(1, 6)).flatmap(lambda pair: st.builds(
    ModelConfig, d_model=st.just(2 * pair[0] * pair[1]), num_heads=st.just(pair[1]), **sizes))


def total(counts): return sum(counts.values())


@settings(deadline=None, max_examples=60)
@given(configs)
def test_parameters_are_the_models(config):
    assert total(count_parameters(config)) == sum(p.numel() for p in TransformerLM(config, device="meta").parameters())


@settings(deadline=None, max_examples=20)
@given(configs, st.integers(1, 4), st.data())
def test_flops_are_what_torch_counts(config, batch_size, data):
    length = data.draw(st.integers(1, config.context_length))
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    model = TransformerLM(config, device="meta")
    with FlopCounterMode(display=False) as counter: logits = model(ids)
    assert counter.get_total_flops() == total(forward_flops(config, batch_size, length))
    with FlopCounterMode(display=False) as counter: logits.sum().backward()
    assert counter.get_total_flops() == 2 * total(forward_flops(config, batch_size, length))
    assert total(training_flops(config, batch_size, length)) == 3 * total(forward_flops(config, batch_size, length))


@pytest.mark.parametrize("name", ["gpt2-medium-2026", "gpt2-xl-two-matrix"])
def test_flops_of_gpt2_by_component(name):
    config = replace(PRESETS[name], attention="clear")
    model = TransformerLM(config, device="meta")
    with FlopCounterMode(display=False) as counter: model(torch.zeros(1, 1024, dtype=torch.long, device="meta"))
    counts = {key: {str(op): flops for op, flops in ops.items()} for key, ops in counter.get_flop_counts().items()}
    layers = [counts[key] for key in counts if key.endswith(".attn")]
    assert forward_flops(config) == {
        "attention_projections": sum(c["aten.mm"] for c in layers),
        "attention_core": sum(c["aten.bmm"] for c in layers),
        "feed_forward": sum(c["aten.mm"] for key, c in counts.items() if key.endswith(".ffn")),
        "lm_head": counts["TransformerLM.lm_head"]["aten.mm"]}


@settings(deadline=None, max_examples=40)
@given(configs, st.integers(1, 5))
def test_products_have_the_sizes_they_claim(config, batch_size):
    products = matrix_products(config, batch_size)
    assert {p.component for p in products} == set(COMPONENTS)
    assert sum(p.flops for p in products) == total(forward_flops(config, batch_size))
    for p in products:
        a, b = torch.empty(p.rows, p.inner, device="meta"), torch.empty(p.inner, p.columns, device="meta")
        with FlopCounterMode(display=False) as counter: c = a @ b
        assert p.flops == p.count * counter.get_total_flops()
        assert p.numbers_moved == p.count * (a.numel() + b.numel() + c.numel())


def test_openais_parameter_counts():
    # of the models gpt2, gpt2-medium, gpt2-large and gpt2-xl as published on the Hugging Face hub
    known = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}
    for size, parameters in known.items():
        assert count_gpt2_parameters(PRESETS[f"gpt2-{size}-two-matrix"]) == parameters


@pytest.mark.parametrize("size", ["small", "xl"])
def test_openais_parameters_are_those_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    config = PRESETS[f"gpt2-{size}-two-matrix"]
    theirs = transformers.GPT2Config(vocab_size=config.vocab_size, n_positions=config.context_length,
                                     n_embd=config.d_model, n_layer=config.num_layers, n_head=config.num_heads)
    with torch.device("meta"): model = transformers.GPT2Model(theirs)      # without the output matrix, which is tied
    assert sum(p.numel() for p in model.parameters()) == count_gpt2_parameters(config)


def test_a_token_of_the_tinystories_model():
    config = ModelConfig()
    assert flops_per_token(config) == 6 * (4 * (4 * 512**2 + 3 * 512 * 1344) + 512 * 10_000) + 12 * 4 * 256 * 512
    assert flops_per_token(config, 1) < flops_per_token(config)


# --- memory

@settings(deadline=None, max_examples=60)
@given(configs, st.integers(1, 9), st.floats(0, 1e9))
def test_memory_is_a_line_and_the_largest_batch_is_its_last_point_below(config, batch_size, capacity):
    a, b = memory_line(config)
    assert total(memory_bytes(config, batch_size)) == a * batch_size + b and b == 16 * total(count_parameters(config))
    largest = max_batch_size(config, capacity)
    assert a * (largest + 1) + b > capacity and (largest == 0 or a * largest + b <= capacity)


def test_activations_by_hand():
    config = ModelConfig(vocab_size=7, context_length=3, d_model=4, num_layers=2, num_heads=2, d_ff=5)
    B, T, d, f, square = 6, 3, 4, 5, 6 * 2 * 9
    swiglu = 2 * (8 * B * T * d + 2 * square + 4 * B * T * f) + B * T * d + 2 * B * T * 7
    assert total(activation_numbers(config, B)) == swiglu
    assert total(activation_numbers(config, B, ffn="silu")) == swiglu - 2 * 2 * B * T * f
    assert total(activation_numbers(replace(config, norm="none"), B)) == swiglu - (2 * 2 + 1) * B * T * d
    assert total(activation_numbers(replace(config, norm="post"), B)) == swiglu - B * T * d


def test_half_precision_halves_everything():
    config = PRESETS["tinystories"]
    full, half = memory_bytes(config, 3), memory_bytes(config, 3, bytes_per_number=2)
    assert {name: 2 * size for name, size in half.items()} == full


# --- the answers

def test_muon_keeps_one_number_for_each_weight_of_the_blocks_matrices():
    config = PRESETS["demo"]
    counts = count_parameters(config)
    one = memory_bytes(config)["optimizer_state"] - memory_bytes(config, optimizer="muon")["optimizer_state"]
    assert one == 4 * (counts["attention"] + counts["feed_forward"])
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'muon', but is 'sgd'"): memory_bytes(config, optimizer="sgd")


def test_adamw_flops_per_parameter():
    assert adamw_flops(PRESETS["demo"]) == 14 * total(count_parameters(PRESETS["demo"]))


XL = dict(V=50_257, T=1_024, d=1_600, L=48, H=25)


@pytest.mark.parametrize("name, matrices, f, tied, listed, peak", [
    ("gpt2-xl-2025", 3, 6_400, False, 2, 19.5e12), ("gpt2-xl-2026", 3, 4_288, False, 4, 495e12),
    ("gpt2-xl-two-matrix", 2, 6_400, True, 2, 19.5e12), ("gpt2-xl-two-matrix-untied", 2, 6_400, False, 2, 19.5e12)])
def test_account_of_xl_written_out(name, matrices, f, tied, listed, peak):
    V, T, d, L, H = XL.values()
    found = account(name)
    parameters = (1 if tied else 2) * V * d + L * (4 * d * d + matrices * d * f + 2 * d) + d
    core, ffn = L * 4 * T * T * d, L * 2 * matrices * T * d * f
    flops = L * 8 * T * d * d + core + ffn + 2 * T * d * V
    row = 4 * (L * (8 * T * d + 2 * H * T * T + listed * T * f) + T * d + 2 * T * V)
    assert found["parameters"] == parameters and found["parameter_bytes"] == 4 * parameters
    assert found["forward_flops"] == flops
    share, adamw = found["forward_share"], found["adamw"]
    assert math.isclose(share["attention_core"], core / flops) and math.isclose(share["feed_forward"], ffn / flops)
    assert math.isclose(sum(share.values()), 1) and list(share) == list(COMPONENTS)
    assert adamw["bytes_fixed"] == 16 * parameters and adamw["update_flops"] == 14 * parameters
    assert adamw["bytes_per_sequence"] == row
    assert adamw["max_batch_80gb"] == (80e9 - 16 * parameters) // row
    assert adamw["max_batch_80gib"] == (80 * 1024**3 - 16 * parameters) // row
    assert math.isclose(found["train_seconds_50pct"], 400_000 * 1_024 * 3 * flops / (peak / 2))
    assert json.loads(json.dumps(found)) == found


def test_the_third_matrix_of_2025():
    adamw = account("gpt2-xl-2025")["adamw"]
    V, T, d, L, H = XL.values()
    assert adamw["with_third_matrix"]["bytes_per_sequence"] - adamw["bytes_per_sequence"] == 4 * L * 2 * T * 6_400
    for name in ("gpt2-xl-2026", "gpt2-xl-two-matrix"): assert "with_third_matrix" not in account(name)["adamw"]


@pytest.mark.parametrize("change", [{"d_ff": 4_352}, {"num_layers": 49}, {"vocab_size": 50_304}, {"d_model": 1_625}])
def test_every_answer_follows_the_configuration(change):
    base = replace(PRESETS["gpt2-xl-2026"], position="none")
    before, after = (account(config, edition="2026") for config in (base, replace(base, **change)))
    for key in ("parameters", "parameter_bytes", "forward_flops", "train_seconds_50pct"):
        assert after[key] > before[key]
    for key in ("bytes_fixed", "bytes_per_sequence", "update_flops"): assert after["adamw"][key] > before["adamw"][key]
    assert all(after["forward_share"][name] != before["forward_share"][name] for name in COMPONENTS)


def test_batch_and_context_of_an_account():
    one, four = account("gpt2-small-2026"), account("gpt2-small-2026", batch_size=4)
    assert four["forward_flops"] == 4 * one["forward_flops"] and four["adamw"] == one["adamw"]
    long = account("gpt2-xl-2025", context_length=16_384)
    assert long["forward_flops"] == total(forward_flops(PRESETS["gpt2-xl-2025"], 1, 16_384))
    other = account("gpt2-small-2026", edition="2025")
    assert other["train_seconds_50pct"] / one["train_seconds_50pct"] == pytest.approx(495 / 19.5)
    assert account(PRESETS["tinystories"]) == account("tinystories") and set(CARDS) == {"2025", "2026"}


def test_training_time_at_full_utilisation():
    config = PRESETS["gpt2-xl-2026"]
    assert training_seconds(config, 2, 3, 1e15, 1.0) == 2 * total(training_flops(config, 3)) / 1e15


@pytest.mark.parametrize("call, words", [
    (lambda: account("gpt2-huge"), "gpt2-huge.*tinystories"), (lambda: account("demo", edition="2024"), "2024"),
    (lambda: forward_flops(PRESETS["demo"], 0), "batch_size.*0"),
    (lambda: memory_bytes(PRESETS["demo"], 1, -5), "context_length.*-5"),
    (lambda: activation_numbers(PRESETS["demo"], ffn="gelu"), "gelu"),
    (lambda: training_seconds(PRESETS["demo"], 1, 1, 1e12, 1.5), "1.5"),
    (lambda: account("demo", context_length=0), "context_length")])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words): call()
