"""Every adapter in the shapes and with the meaning that the course's public suite uses, against PyTorch and by hand."""
import inspect, io, math, random, subprocess, sys
from pathlib import Path

import adapters
import numpy as np
import pytest
import torch
import torch.nn.functional as F

SIGNATURES = """
run_linear d_in d_out weights in_features
run_embedding vocab_size d_model weights token_ids
run_swiglu d_model d_ff w1_weight w2_weight w3_weight in_features
run_scaled_dot_product_attention Q K V mask=None
run_multihead_self_attention d_model num_heads q_proj_weight k_proj_weight v_proj_weight o_proj_weight in_features
run_multihead_self_attention_with_rope d_model num_heads max_seq_len theta q_proj_weight k_proj_weight v_proj_weight o_proj_weight in_features token_positions=None
run_rope d_k theta max_seq_len in_query_or_key token_positions
run_transformer_block d_model num_heads d_ff max_seq_len theta weights in_features
run_transformer_lm vocab_size context_length d_model num_layers num_heads d_ff rope_theta weights in_indices
run_rmsnorm d_model eps weights in_features
run_silu in_features
run_get_batch dataset batch_size context_length device
run_softmax in_features dim
run_cross_entropy inputs targets
run_gradient_clipping parameters max_l2_norm
get_adamw_cls
run_get_lr_cosine_schedule it max_learning_rate min_learning_rate warmup_iters cosine_cycle_iters
run_save_checkpoint model optimizer iteration out
run_load_checkpoint src model optimizer
get_tokenizer vocab merges special_tokens=None
run_train_bpe input_path vocab_size special_tokens **kwargs
""".strip().splitlines()

BATCH, TIME, D_MODEL, HEADS, D_FF, LAYERS, VOCAB, CONTEXT, THETA = 4, 12, 64, 4, 128, 3, 10_000, 16, 10_000.0


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(4)


def close(a, b, atol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("line", SIGNATURES, ids=lambda line: line.split()[0])
def test_signature_and_hints(line):
    name, *wanted = line.split()
    signature = inspect.signature(getattr(adapters, name))
    shown = [("**" if p.kind is p.VAR_KEYWORD else "") + p.name + ("" if p.default is p.empty else f"={p.default}") for p in signature.parameters.values()]
    assert shown == wanted
    assert signature.return_annotation is not signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())


def test_no_other_adapter_and_no_course_packages():
    public = {n for n, f in vars(adapters).items() if inspect.isfunction(f) and f.__module__ == "adapters" and not n.startswith("_")}
    assert public == {line.split()[0] for line in SIGNATURES}
    done = subprocess.run([sys.executable, "-c", "import sys, adapters; print([m for m in ('torch', 'jaxtyping') if m in sys.modules])"],
                          cwd=Path(adapters.__file__).parent, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done


# layers

def random_weights(prefix=""):
    "Weights of one block by the handout's names, of a size at which every part shows."
    def matrix(rows, columns): return torch.randn(rows, columns) / math.sqrt(columns)
    names = {f"attn.{n}_proj.weight": matrix(D_MODEL, D_MODEL) for n in ("q", "k", "v", "output")}
    names |= {"ffn.w1.weight": matrix(D_FF, D_MODEL), "ffn.w2.weight": matrix(D_MODEL, D_FF), "ffn.w3.weight": matrix(D_FF, D_MODEL)}
    names |= {f"ln{i}.weight": torch.rand(D_MODEL) + 0.5 for i in (1, 2)}
    return {prefix + name: weight for name, weight in names.items()}


def turned(x, positions, theta=THETA):
    "RoPE by complex numbers."
    d = x.shape[-1]
    turns = torch.exp(1j * positions.double().unsqueeze(-1) * theta ** (-torch.arange(0, d, 2).double() / d))
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turns).flatten(-2).float()


def attention_by_hand(w, x, prefix="attn.", rope=False, positions=None):
    q, k, v = (F.linear(x, w[f"{prefix}{n}_proj.weight"]).unflatten(-1, (HEADS, -1)).transpose(-3, -2) for n in "qkv")
    if rope: q, k = (turned(t, torch.arange(x.shape[-2]) if positions is None else positions) for t in (q, k))
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2), w[prefix + "output_proj.weight"])


def block_by_hand(w, x):
    x = x + attention_by_hand(w, F.rms_norm(x, (D_MODEL,), w["ln1.weight"], 1e-5), rope=True)
    h = F.rms_norm(x, (D_MODEL,), w["ln2.weight"], 1e-5)
    return x + F.linear(F.silu(F.linear(h, w["ffn.w1.weight"])) * F.linear(h, w["ffn.w3.weight"]), w["ffn.w2.weight"])


def test_linear():
    W, x = torch.randn(D_FF, D_MODEL), torch.randn(BATCH, TIME, D_MODEL)
    close(adapters.run_linear(D_MODEL, D_FF, W, x), F.linear(x, W), atol=1e-4)


def test_embedding():
    W, ids = torch.randn(VOCAB, D_MODEL), torch.randint(0, VOCAB, (BATCH, TIME))
    assert (adapters.run_embedding(VOCAB, D_MODEL, W, ids) == W[ids]).all()


def test_swiglu_silu_rmsnorm_softmax():
    w, x = random_weights(), torch.randn(BATCH, TIME, D_MODEL)
    W1, W2, W3 = (w[f"ffn.w{i}.weight"] for i in (1, 2, 3))
    close(adapters.run_swiglu(D_MODEL, D_FF, W1, W2, W3, x), F.linear(F.silu(F.linear(x, W1)) * F.linear(x, W3), W2))
    close(adapters.run_silu(x), F.silu(x))
    close(adapters.run_rmsnorm(D_MODEL, 1e-5, w["ln1.weight"], x), F.rms_norm(x, (D_MODEL,), w["ln1.weight"], 1e-5))
    for shift in (0, 100): close(adapters.run_softmax(x[0] + shift, dim=-1), F.softmax(x[0], dim=-1))


@pytest.mark.parametrize("front", [(BATCH,), (2, HEADS)])
def test_scaled_dot_product_attention(front):
    Q, K, V = (torch.randn(*front, n, 16) for n in (TIME, CONTEXT, CONTEXT))
    mask = torch.randn(*front, TIME, CONTEXT) > 0.5
    close(adapters.run_scaled_dot_product_attention(Q=Q, K=K, V=V, mask=mask), F.scaled_dot_product_attention(Q, K, V, attn_mask=mask))
    close(adapters.run_scaled_dot_product_attention(Q, K, V), F.scaled_dot_product_attention(Q, K, V))


@pytest.mark.parametrize("positions", [None, torch.arange(TIME), torch.arange(TIME)[None], torch.arange(TIME).flip(0).expand(BATCH, TIME)])
def test_multihead_self_attention(positions):
    w, x = random_weights(), torch.randn(BATCH, TIME, D_MODEL)
    matrices = dict(q_proj_weight=w["attn.q_proj.weight"], k_proj_weight=w["attn.k_proj.weight"], v_proj_weight=w["attn.v_proj.weight"], o_proj_weight=w["attn.output_proj.weight"])
    close(adapters.run_multihead_self_attention(d_model=D_MODEL, num_heads=HEADS, in_features=x, **matrices), attention_by_hand(w, x))
    ours = adapters.run_multihead_self_attention_with_rope(d_model=D_MODEL, num_heads=HEADS, max_seq_len=CONTEXT, theta=THETA, in_features=x, token_positions=positions, **matrices)
    by_head = positions[:, None] if positions is not None and positions.ndim == 2 else positions
    close(ours, attention_by_hand(w, x, rope=True, positions=by_head))


def test_rope():
    x = torch.randn(BATCH, TIME, D_MODEL)
    for positions in (torch.arange(TIME), torch.randint(0, CONTEXT, (BATCH, TIME))):
        close(adapters.run_rope(d_k=D_MODEL, theta=THETA, max_seq_len=CONTEXT, in_query_or_key=x, token_positions=positions), turned(x, positions))


def test_transformer_block():
    w, x = random_weights(), torch.randn(BATCH, TIME, D_MODEL)
    close(adapters.run_transformer_block(D_MODEL, HEADS, D_FF, CONTEXT, THETA, w, x), block_by_hand(w, x), atol=1e-4)


@pytest.mark.parametrize("time", [CONTEXT, CONTEXT // 2])
def test_transformer_lm(time):
    w = {"token_embeddings.weight": torch.randn(VOCAB, D_MODEL), "ln_final.weight": torch.rand(D_MODEL) + 0.5, "lm_head.weight": torch.randn(VOCAB, D_MODEL) / 8}
    for i in range(LAYERS): w |= random_weights(f"layers.{i}.")
    ids = torch.randint(0, VOCAB, (BATCH, time))
    x = w["token_embeddings.weight"][ids]
    for i in range(LAYERS): x = block_by_hand({k.removeprefix(f"layers.{i}."): v for k, v in w.items()}, x)
    theirs = F.linear(F.rms_norm(x, (D_MODEL,), w["ln_final.weight"], 1e-5), w["lm_head.weight"])
    close(adapters.run_transformer_lm(VOCAB, CONTEXT, D_MODEL, LAYERS, HEADS, D_FF, THETA, w, ids), theirs, atol=1e-4)


def test_a_missing_weight_is_named():
    w = random_weights()
    del w["ffn.w3.weight"]
    with pytest.raises(KeyError, match="ffn.w3.weight"): adapters.run_transformer_block(D_MODEL, HEADS, D_FF, CONTEXT, THETA, w, torch.randn(1, 2, D_MODEL))


# optimization

@pytest.mark.parametrize("size", [1, 1000])
def test_cross_entropy(size):
    inputs, targets = size * torch.rand(8, 5), torch.randint(0, 5, (8,))
    close(adapters.run_cross_entropy(inputs, targets), F.cross_entropy(inputs, targets))


def test_gradient_clipping():
    tensors = [torch.randn(5, 5) for _ in range(6)]
    ours, theirs = ([torch.nn.Parameter(t.clone(), requires_grad=i < 5) for i, t in enumerate(tensors)] for _ in range(2))
    for parameters in (ours, theirs): torch.cat([p for p in parameters if p.requires_grad]).sum().mul(3).backward()
    adapters.run_gradient_clipping(ours, 1e-2)
    torch.nn.utils.clip_grad_norm_(theirs, 1e-2)
    for a, b in zip(ours, theirs):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None: close(a.grad, b.grad, atol=1e-7)


def trained(optimizer_class, steps=1000):
    torch.manual_seed(42)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.rand(3)
        ((torch.stack((x[0] + x[1], -x[2])) - model(x)) ** 2).sum().backward()
        optimizer.step()
    return model.weight.detach()


def test_adamw(): close(trained(adapters.get_adamw_cls()), trained(torch.optim.AdamW))


def test_cosine_schedule():
    ours = [adapters.run_get_lr_cosine_schedule(it=t, max_learning_rate=1.0, min_learning_rate=0.1, warmup_iters=7, cosine_cycle_iters=21) for t in range(25)]
    theirs = [t / 7 if t < 7 else 0.1 + 0.45 * (1 + math.cos(math.pi * (t - 7) / 14)) if t <= 21 else 0.1 for t in range(25)]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


# data and checkpoints

def test_get_batch():
    dataset, counts = np.arange(100), np.zeros(100, int)
    for _ in range(300):
        x, y = adapters.run_get_batch(dataset=dataset, batch_size=32, context_length=7, device="cpu")
        assert x.shape == y.shape == (32, 7) and x.dtype == y.dtype == torch.int64
        assert (y == x + 1).all() and (x == x[:, :1] + torch.arange(7)).all()
        counts += np.bincount(x[:, 0], minlength=100)
    assert (counts[93:] == 0).all() and counts[:93].min() > 0
    expected = 9600 / 93  # every start is equally likely: within six standard deviations
    assert abs(counts[:93] - expected).max() < 6 * math.sqrt(expected)


def test_get_batch_on_a_device_that_is_not_there():
    with pytest.raises((RuntimeError, AssertionError)) as error: adapters.run_get_batch(np.arange(100), 4, 7, device="cuda:99")
    assert "CUDA error" in str(error.value) or "Torch not compiled with CUDA enabled" in str(error.value) or "NVIDIA driver" in str(error.value)


@pytest.mark.parametrize("place", ["path", "str", "open file", "memory"])
def test_checkpoint(place, tmp_path):
    def make():
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
        return model, adapters.get_adamw_cls()(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model, optimizer = make()
    for _ in range(10): step(model, optimizer, torch.randn(2, 5))
    path = tmp_path / "checkpoint.pt"
    out = {"path": path, "str": str(path), "open file": open(path, "w+b") if place == "open file" else None, "memory": io.BytesIO()}[place]
    adapters.run_save_checkpoint(model, optimizer, iteration=10, out=out)
    if hasattr(out, "seek"): out.seek(0)
    other, other_optimizer = make()
    assert adapters.run_load_checkpoint(src=out, model=other, optimizer=other_optimizer) == 10
    x = torch.randn(2, 5)
    for m, o in ((model, optimizer), (other, other_optimizer)): step(m, o, x)  # the moments came along too
    for a, b in zip(model.parameters(), other.parameters()): assert (a == b).all()
    if place == "open file": out.close()


# tokenizer

def sample_text(characters):
    rng = random.Random(0)
    words = ["the", "cat", "dogs", "ran", "to", "a", "big", "house.", "Then", "it", "don't", "été", "猫", "123", "\n", "🙂"]
    return " ".join(rng.choice(words) for _ in range(characters // 4))[:characters]


def test_train_bpe_and_tokenizer(tmp_path):
    text = ("low " * 5 + "lower " * 2 + "widest " * 3 + "newest " * 6).strip() + "<|endoftext|>" + sample_text(3000)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    vocab, merges = adapters.run_train_bpe(input_path=tmp_path / "text.txt", vocab_size=300, special_tokens=["<|endoftext|>"])
    assert len(vocab) == 300 and len(merges) == 300 - 256 - 1 and b"<|endoftext|>" in vocab.values()
    assert {bytes([b]) for b in range(256)} <= set(vocab.values())
    assert not any(b"<|" in token for token in vocab.values() if token != b"<|endoftext|>")
    tokenizer = adapters.get_tokenizer(vocab, merges, special_tokens=["<|endoftext|>", "<|endoftext|><|endoftext|>"])
    doubled = text + "<|endoftext|><|endoftext|>" + "<|endoftext|>"
    ids = tokenizer.encode(doubled)
    assert tokenizer.decode(ids) == doubled and [tokenizer.decode([i]) for i in ids].count("<|endoftext|><|endoftext|>") == 1
    assert list(tokenizer.encode_iterable(io.StringIO(doubled))) == ids
    assert adapters.get_tokenizer(vocab, merges).encode("<|endoftext|>") != tokenizer.encode("<|endoftext|>")


def test_train_bpe_takes_a_vocabulary_of_bytes_and_specials_only(tmp_path):
    (tmp_path / "text.txt").write_text("aaaa bbbb", encoding="utf-8")
    vocab, merges = adapters.run_train_bpe(str(tmp_path / "text.txt"), 257, ["<|endoftext|>"])
    assert len(vocab) == 257 and merges == []


LIMITED = """
import os, resource, sys
import torch, adapters  # as in the suite, where PyTorch is there already
tokenizer = adapters.get_tokenizer(*adapters.run_train_bpe(sys.argv[1], 300, ["<|endoftext|>"]), ["<|endoftext|>"])
resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
with open(sys.argv[1], encoding="utf-8") as file:
    resource.setrlimit(resource.RLIMIT_AS, (resident + 1_000_000, -1))
    count = sum(1 for _ in tokenizer.encode_iterable(file))
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(count, len(tokenizer.encode(open(sys.argv[1], encoding="utf-8").read())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited and read as Linux does")
def test_encode_iterable_with_no_room_for_a_new_mapping(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(sample_text(300_000), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], cwd=Path(adapters.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    limited, whole = map(int, done.stdout.split())
    assert limited == whole > 10_000
