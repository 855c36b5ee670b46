"""Chapter 12 against transformers' logits processors, brute force, sampling statistics and misuse."""

import itertools, math

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from cs336_lm.corpora import END_OF_TEXT
from cs336_lm.generation import (
    apply_temperature,
    draw,
    encode_prompt,
    generate,
    generate_batch,
    generate_tokens,
    generate_tokens_batch,
    generate_tokens_naive,
    keep_top_k,
    keep_top_p,
    next_logits,
    next_logits_naive,
    next_token_probabilities,
    seeded_generator,
    stream,
    whole_characters,
)
from cs336_lm.tokenizer import Tokenizer
from cs336_lm.transformer import ModelConfig, TransformerLM


pytestmark = pytest.mark.usefixtures("one_thread")


def toy(**changes) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(
        ModelConfig(
            **{**dict(vocab_size=257, context_length=12, d_model=16, num_layers=2, num_heads=2, d_ff=32), **changes}
        )
    )


@pytest.fixture(scope="module")
def model():
    return toy()


@pytest.fixture(scope="module")
def tokenizer():
    return BYTES


BYTES = Tokenizer({**{i: bytes([i]) for i in range(256)}, 256: END_OF_TEXT.encode()}, [], [END_OF_TEXT])
logit_rows = st.lists(st.integers(-160, 160).map(lambda n: n / 8), min_size=2, max_size=12, unique=True)


# the distribution


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.05, 20), st.integers(1, 60), st.floats(0.01, 1.0))
def test_equals_transformers_processors(seed, temperature, top_k, top_p):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    theirs = processors.TemperatureLogitsWarper(temperature)(None, logits)
    theirs = processors.TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = processors.TopPLogitsWarper(top_p)(None, theirs)
    theirs, ours = theirs.softmax(-1), next_token_probabilities(logits, temperature, top_k, top_p)
    # where the mass reaches p within rounding, one token more or less is right
    at_the_edge = ((theirs > 0).sum(-1) - (ours > 0).sum(-1)).abs()
    assert at_the_edge.max() <= 1
    if at_the_edge.max() == 0:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_transformers_processors_agree_without_an_edge():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    for p in (0.2, 0.6, 0.8, 0.9, 0.99):
        theirs = processors.TopPLogitsWarper(p)(None, logits).softmax(-1)
        torch.testing.assert_close(next_token_probabilities(logits, top_p=p), theirs)


@settings(deadline=None)
@given(logit_rows, st.floats(0.05, 1.0, exclude_max=True))
def test_top_p_is_the_smallest_set(row, p):
    probabilities = apply_temperature(torch.tensor(row), 1.0)
    kept = set(keep_top_p(probabilities, p).nonzero().flatten().tolist())
    mass = lambda ids: sum(probabilities[i].item() for i in ids)
    assert mass(kept) >= p - 1e-5
    smaller = itertools.combinations(range(len(row)), len(kept) - 1)
    assert len(kept) == 1 or max(map(mass, smaller)) < p + 1e-5


@settings(deadline=None)
@given(logit_rows, st.floats(0.01, 100), st.none() | st.integers(1, 20), st.none() | st.floats(0.01, 1))
def test_is_a_distribution_and_keeps_the_order(row, temperature, top_k, top_p):
    logits = torch.tensor(row)
    p = next_token_probabilities(logits, temperature, top_k, top_p)
    assert p.shape == logits.shape and p.dtype == torch.float32 and (p >= 0).all()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    assert (p[logits.argsort()].diff() >= 0).all()
    assert top_k is None or (p > 0).sum() <= top_k
    assert p[logits.argmax()] > 0


@pytest.mark.parametrize("temperature", [1e-4, 0.3, 1.0, 2.5, 1e3])
def test_temperature_divides_the_log_odds(temperature):
    logits = torch.tensor([0.0, -1.0, 2.0, 0.5]) * min(temperature, 1.0)
    odds = apply_temperature(logits, temperature).double().log()
    torch.testing.assert_close(odds - odds[0], (logits.double() - logits[0]) / temperature, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-45, 1e-8, 0.5, 1e4, 1e30])
def test_extreme_values_stay_finite(temperature):
    for logits in ([1e30, -1e30, 0.0], [0.0, 0.0, -math.inf], [3e38, 3e38, 1.0]):
        p = next_token_probabilities(torch.tensor(logits), temperature)
        assert torch.isfinite(p).all() and p.sum().item() == pytest.approx(1)


def test_half_precision_logits_are_widened():
    assert next_token_probabilities(torch.zeros(5, dtype=torch.bfloat16)).dtype == torch.float32


def test_ties_go_to_the_smaller_id():
    flat = torch.full((2, 6), 0.5)
    assert next_token_probabilities(flat, 0).argmax(-1).tolist() == [0, 0]
    assert next_token_probabilities(flat, top_k=2).nonzero()[:, 1].tolist() == [0, 1] * 2
    assert next_token_probabilities(flat, top_p=0.3).nonzero()[:, 1].tolist() == [0, 1] * 2


def test_top_p_crosses_and_stops_exactly():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert (keep_top_p(p, 0.5) > 0).tolist() == [True, False, False, False]
    assert (keep_top_p(p, 0.5001) > 0).tolist() == [True, True, False, False]
    assert torch.equal(next_token_probabilities(p.log(), top_p=1.0), next_token_probabilities(p.log()))


def test_top_k_does_not_change_its_input():
    p = torch.tensor([0.5, 0.3, 0.2])
    before = p.clone()
    keep_top_k(p, 1), keep_top_p(p, 0.1)
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(temperature=-0.1), "-0.1"),
        (dict(temperature=math.inf), "inf"),
        (dict(temperature=math.nan), "nan"),
        (dict(top_k=0), "0"),
        (dict(top_k=-3), "-3"),
        (dict(top_k=2.5), "2.5"),
        (dict(top_k=math.nan), "nan"),
        (dict(top_k=math.inf), "inf"),
        (dict(top_p=0.0), "0.0"),
        (dict(top_p=1.01), "1.01"),
        (dict(top_p=math.nan), "nan"),
    ],
)
def test_bad_settings_are_named(wrong, said, model, tokenizer):
    name = next(iter(wrong))
    for call in (
        lambda: next_token_probabilities(torch.zeros(4), **wrong),
        lambda: generate_tokens(model, [0], **wrong),
        lambda: generate_tokens_batch(model, [[0]], **wrong),
        lambda: stream(model, tokenizer, **wrong),
    ):
        with pytest.raises(ValueError, match=name) as error:
            call()  # raised at the call, before any token is asked for
        assert said in str(error.value)


@pytest.mark.parametrize("logits", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_of_a_diverged_model(logits):
    with pytest.raises(ValueError, match="not finite"):
        next_token_probabilities(torch.tensor(logits))


# drawing


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20).filter(any), st.floats(0, 1, exclude_max=True, width=32))
@example([0, 1, 0], 0.0)
@example([0, 1, 0], 1 - 2**-24)
@example([3, 3, 3], 1 - 2**-24)
def test_draw_is_the_inverse_cdf(weights, u):
    p = torch.tensor(weights, dtype=torch.float32) / sum(weights)
    i = draw(p[None], torch.tensor([u])).item()
    assert weights[i] > 0
    assert sum(weights[:i]) / sum(weights) - 1e-5 <= u <= sum(weights[: i + 1]) / sum(weights) + 1e-5


def test_draws_follow_the_distribution():
    p = next_token_probabilities(torch.randn(30, generator=seeded_generator(0)), 1.3, top_k=20, top_p=0.95)
    n = 50_000
    counts = torch.bincount(draw(p.expand(n, -1), torch.rand(n, generator=seeded_generator(1))), minlength=30)
    assert (counts[p == 0] == 0).all()
    expected = n * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 45  # 18 degrees of freedom or fewer: 42.3 once in a thousand times


# the loops


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(position="none"),
        dict(norm="post"),
        dict(norm="none"),
        dict(ffn="silu"),
        dict(tied_embeddings=True),
        dict(attention="clear"),
    ],
)
def test_cache_gives_the_same_logits(changes):
    model = toy(**changes)
    ids, cache = torch.randint(257, (3, 20), generator=seeded_generator(0)), model.make_cache()
    for n in (1, 2, 3, 7, 8, 11, 12, 13, 20):
        torch.testing.assert_close(
            next_logits(model, ids[:, :n], cache), next_logits_naive(model, ids[:, :n]), atol=1e-4, rtol=1e-4
        )


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(0, 256), min_size=1, max_size=30),
    st.integers(0, 99),
    st.sampled_from([{}, dict(temperature=0), dict(top_k=5), dict(top_p=0.7)]),
)
def test_cache_gives_the_same_tokens(prompt, seed, kwargs):
    model = toy()
    naive, fast = (
        list(f(model, prompt, max_new_tokens=18, generator=seeded_generator(seed), **kwargs))
        for f in (generate_tokens_naive, generate_tokens)
    )
    assert naive == fast and len(fast) == 18


def test_greedy_is_argmax_over_the_sliding_window(model):
    ids = list(range(20))  # longer than the context of 12
    for _ in range(5):
        ids.append(model(torch.tensor([ids[-12:]]))[0, -1].argmax().item())
    assert list(generate_tokens(model, range(20), max_new_tokens=5, temperature=0)) == ids[20:]
    assert list(generate_tokens(model, range(8, 20), max_new_tokens=5, temperature=0)) == ids[20:]


def test_stops_before_the_stop_token_and_at_the_length(model):
    free = list(generate_tokens(model, [1], max_new_tokens=10, generator=seeded_generator(0)))
    stop = free[4]
    stopped = list(generate_tokens(model, [1], max_new_tokens=10, stop_id=stop, generator=seeded_generator(0)))
    assert stopped == free[: free.index(stop)]
    assert list(generate_tokens(model, [1], max_new_tokens=0)) == []


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 256), min_size=1, max_size=20), min_size=1, max_size=6),
    st.integers(1, 7),
    st.integers(0, 10),
    st.none() | st.integers(0, 50),
)
@example([[5], [6, 7, 8]], 2, 10, 3)
def test_batch_equals_one_by_one(prompts, batch_size, max_new_tokens, stop_at):
    model, kwargs = toy(), dict(max_new_tokens=max_new_tokens, temperature=0.3)

    def one_by_one():
        return [
            list(generate_tokens(model, p, generator=seeded_generator(9 + i), **kwargs)) for i, p in enumerate(prompts)
        ]

    free = [token for row in one_by_one() for token in row]
    if stop_at is not None and free:
        kwargs["stop_id"] = free[stop_at % len(free)]  # a token that does come
        assert sum(map(len, one_by_one())) < len(free)
    assert generate_tokens_batch(model, prompts, seed=9, batch_size=batch_size, **kwargs) == one_by_one()


def test_empty_batch(model, tokenizer):
    assert generate_tokens_batch(model, []) == [] == generate_batch(model, tokenizer, [])


def test_leaves_gradients_and_the_global_generator_alone(model):
    before = torch.get_rng_state()
    for _ in generate_tokens(model, [1], max_new_tokens=3, generator=seeded_generator(0)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(before, torch.get_rng_state())
    assert not next_logits(model, torch.tensor([[1]]), model.make_cache()).requires_grad
    model(torch.tensor([[1, 2]])).sum().backward()  # no inference tensor got into the model
    model.zero_grad()


def test_repeatable_with_a_seed_and_not_without(model, tokenizer):
    texts = [generate(model, tokenizer, "a", seed=s, max_new_tokens=20, stop=None) for s in (1, 1, 2, None, None)]
    assert texts[0] == texts[1] and len(set(texts)) == 4


@pytest.mark.parametrize("prompt, said", [([], "no tokens"), ([257], "257"), ([3, -1], "-1")])
def test_bad_prompts(prompt, said, model):
    with pytest.raises(ValueError, match=said):
        generate_tokens(model, prompt)
    with pytest.raises(ValueError, match=said):
        generate_tokens_batch(model, [[1], prompt])


@pytest.mark.parametrize("wrong", [dict(max_new_tokens=-1), dict(batch_size=0)])
def test_bad_counts(wrong, model):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate_tokens_batch(model, [[1]], **wrong)


# text


@settings(deadline=None)
@given(st.lists(st.integers(0, 256)), st.text())
def test_whole_characters_join_to_the_decoded_text(ids, text):
    tokenizer = BYTES
    assert "".join(whole_characters(ids, tokenizer)) == tokenizer.decode(ids)
    text_ids = list(text.encode())
    assert list(whole_characters(text_ids, tokenizer)) == list(text)  # one character a piece: none is cut


def test_generate_stream_and_ids_agree(model, tokenizer):
    kwargs = dict(max_new_tokens=40, temperature=1.2, top_k=200)
    text = generate(model, tokenizer, "né", seed=4, **kwargs)
    assert text == "".join(stream(model, tokenizer, "né", seed=4, **kwargs))
    ids = list(
        generate_tokens(model, encode_prompt(tokenizer, "né"), stop_id=256, generator=seeded_generator(4), **kwargs)
    )
    assert text == tokenizer.decode(ids) and END_OF_TEXT not in text
    assert text == generate_batch(model, tokenizer, ["", "x", "né"], seed=2, **kwargs)[2]


def test_prompt_is_the_beginning_of_a_document(tokenizer):
    assert encode_prompt(tokenizer, "") == [256] == encode_prompt(tokenizer, END_OF_TEXT)
    assert encode_prompt(tokenizer, "ab") == [256, 97, 98]
    plain = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    assert encode_prompt(plain, "ab") == [97, 98]
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt(plain, "")


def test_a_tokenizer_without_separator_generates_to_the_length(model):
    plain = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, plain, "")
    assert len(generate(model, plain, "ab", max_new_tokens=9, seed=0).encode("utf-8", "replace")) >= 1


def test_model_and_tokenizer_must_fit(tokenizer):
    with pytest.raises(ValueError, match="257 entries but the model only 200"):
        generate(toy(vocab_size=200), tokenizer, "a")
    wide = toy(vocab_size=400)  # more rows than tokens: such an id is U+FFFD
    assert "\ufffd" in generate(wide, tokenizer, "a", seed=0, max_new_tokens=30, stop=None)


def test_bad_stop_and_bad_prompts_argument(model, tokenizer):
    with pytest.raises(ValueError, match="'the end'"):
        generate(model, tokenizer, "a", stop="the end")
    with pytest.raises(ValueError, match="list of prompts"):
        generate_batch(model, tokenizer, "abc")
    assert "a" not in generate(model, tokenizer, "x", stop="a", seed=0, max_new_tokens=300)
