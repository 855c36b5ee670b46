"""Candidates for chapter 09b's kernels, checked and timed side by side on one GPU: `python benchmarks/kernel_trial.py`.

One line a candidate: relative error against the clear version in float32, and milliseconds (median). "present" and "three"
are the kernels of several passes, "row" those of one, "two" and the forward "row" are of this file alone. What is most
promising comes first; after `BUDGET` seconds the rest is left out. Chapter 09b reads `figures/runs/kernel-trial-h200.txt`.
"""
import math, sys, time
from functools import partial

import torch
if not torch.cuda.is_available(): sys.exit("the kernels are timed on a GPU, and PyTorch sees none here")
import triton, triton.language as tl

import cs336_lm.kernels as k
from cs336_lm.layers import rope_angles

BUDGET, START = 115, time.perf_counter()
BATCH, TIME, HEADS, D = 256, 256, 16, 32
DEVICE = "cuda"
SCALE = 1 / (math.log(2) * math.sqrt(D))


def error(x, y): return ((x.float() - y).norm() / y.norm()).item()


def trial(name, run, check) -> None:
    "Run once and check, then time; whatever goes wrong is printed and the next one tried."
    if time.perf_counter() - START > BUDGET: return print(f"{name:72s} left out: {BUDGET} s are over", flush=True)
    try:
        begun = time.perf_counter()
        kernel = run()
        torch.cuda.synchronize()
        compiled, wrong = time.perf_counter() - begun, check()
        ms = triton.testing.do_bench(run, warmup=20, rep=80, return_mode="median")
        used = f"{kernel.n_regs} registers, {kernel.n_spills} spills, {kernel.metadata.shared} B shared" if hasattr(kernel, "n_regs") else ""
        print(f"{name:72s} {ms:7.4f} ms  error {wrong:.2e}  compiled in {compiled:4.1f} s  {used}", flush=True)
    except Exception as problem:
        print(f"{name:72s} {type(problem).__name__}: {' '.join(str(problem).split())[-300:]}", flush=True)


@triton.jit
def forward_row(QKV, COS, SIN, OUT, LSE, T, H, scale, TURN: tl.constexpr, D: tl.constexpr, B: tl.constexpr, BLOCKS: tl.constexpr):
    "One program a head: each key is turned once, for all queries."
    head, W = tl.program_id(0), H * D
    start = (head // H).to(tl.int64) * T * W
    Q, ks, vs = QKV + start * 3 + (head % H) * D, (), ()
    for i in tl.static_range(BLOCKS):
        rows = i * B + tl.arange(0, B)
        ks = ks + (k._load(Q + W, rows, T, 3 * W, COS, SIN, TURN, B, D),)
        vs = vs + (k._load(Q + 2 * W, rows, T, 3 * W, COS, SIN, False, B, D),)
        q = k._load(Q, rows, T, 3 * W, COS, SIN, TURN, B, D)
        top, total = tl.full((B,), -float("inf"), tl.float32), tl.zeros((B,), tl.float32)
        out = tl.zeros((B, D), tl.float32)
        for n in tl.static_range(i + 1):
            s = tl.dot(q, tl.trans(ks[n])) * scale
            if n == i: s = tl.where(tl.arange(0, B)[None, :] <= tl.arange(0, B)[:, None], s, -float("inf"))
            new = tl.maximum(top, tl.max(s, 1))
            p, shrink = tl.exp2(s - new[:, None]), tl.exp2(top - new)
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(vs[n].dtype), vs[n], out * shrink[:, None])
            top = new
        k._store(OUT + start + (head % H) * D, out / total[:, None], rows, T, W, COS, SIN, False, B, D)
        tl.store(LSE + head.to(tl.int64) * T + rows, top + tl.log2(total), mask=rows < T)


@triton.jit
def queries_and_delta(QKV, COS, SIN, LSE, DELTA, OUT, GRAD, DQKV, T, H, scale, TURN: tl.constexpr,
                      D: tl.constexpr, B: tl.constexpr, STREAM: tl.constexpr):
    "`_attention_backward_queries`, which also makes delta, for the keys' side after it."
    m0, head = k._own_block(T, B)
    W = H * D
    start, own = (head // H).to(tl.int64) * T * W, m0 + tl.arange(0, B)
    Q, DQ, here = QKV + start * 3 + (head % H) * D, DQKV + start * 3 + (head % H) * D, start + (head % H) * D
    q = k._load(Q, own, T, 3 * W, COS, SIN, TURN, B, D)
    g = k._load(GRAD + here, own, T, W, COS, SIN, False, B, D)
    o = k._load(OUT + here, own, T, W, COS, SIN, False, B, D)
    lse = tl.load(LSE + head.to(tl.int64) * T + own, mask=own < T, other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(DELTA + head.to(tl.int64) * T + own, delta, mask=own < T)
    dq = tl.zeros((B, D), tl.float32)
    for n0 in range(0, tl.minimum(m0 + B, T), STREAM):
        cols = n0 + tl.arange(0, STREAM)
        key = k._load(Q + W, cols, T, 3 * W, COS, SIN, TURN, STREAM, D)
        v = k._load(Q + 2 * W, cols, T, 3 * W, COS, SIN, False, STREAM, D)
        s = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        p = tl.where(cols[None, :] <= own[:, None], tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(ds.to(key.dtype), key, input_precision="ieee")
    k._store(DQ, dq * (scale * 0.6931471805599453), own, T, 3 * W, COS, SIN, TURN, B, D)


def loss_trials(rows: int, vocab: int, candidates) -> None:
    "`candidates`: (name, kernel, blocks, warps)."
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    targets[::7] = -100
    losses, count = torch.empty(rows, device=DEVICE), (targets != -100).sum().float()
    some = min(2_048, rows)
    wide, kept = logits[:some].float(), targets[:some] != -100
    right = wide.softmax(-1)
    right[torch.arange(some, device=DEVICE), targets[:some].where(kept, 0)] -= 1
    right = right * kept[:, None] / count
    loss = torch.nn.functional.cross_entropy(wide, targets[:some], reduction="none")
    def check():  # the first run was on `fresh`; what is timed runs on gradients, which costs the same
        return max(error(losses[:some], loss), error(state["first"][:some], right))
    for name, kernel, blocks, warps in candidates:
        state = {"first": logits.clone()}
        def run(kernel=kernel, blocks=blocks, warps=warps):
            return kernel[(rows,)](state["first"], targets, losses, count, vocab, -100, *blocks, num_warps=warps)
        trial(f"loss {rows}x{vocab} {name} blocks {blocks} warps {warps}", run, check)
        del state


def attention():
    "Inputs and, in float32 from the clear version, what should come out."
    torch.manual_seed(0)
    angles = rope_angles(10_000.0, D, TIME).to(DEVICE)
    cos, sin = angles.cos().float(), angles.sin().float()
    qkv = torch.randn(BATCH, TIME, 3 * HEADS * D, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(BATCH, TIME, HEADS * D, device=DEVICE, dtype=torch.bfloat16)
    right = [], []
    for rows in range(0, BATCH, 64):
        wide = qkv[rows:rows + 64].float()
        out, lse = k.attention_forward_clear(wide, cos, sin, HEADS)
        right[0].append(out)
        right[1].append(k.attention_backward_clear(grad[rows:rows + 64].float(), wide, cos, sin, out, lse, HEADS))
    return qkv, cos, sin, grad, torch.cat(right[0]), torch.cat(right[1])


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    one = k._cross_entropy_row
    tokens = BATCH * TIME
    loss_trials(tokens, 10_000, [("present", k._cross_entropy, (4096,), 4), ("row", one, (8192, 2048), 8), ("row", one, (8192, 2048), 16),
                                 ("row", one, (8192, 2048), 4), ("present", k._cross_entropy, (2048,), 4), ("present", k._cross_entropy, (4096,), 8)])
    qkv, cos, sin, grad, right, right_grad = attention()
    out, lse, dqkv = torch.empty_like(grad), torch.empty(BATCH, HEADS, TIME, device=DEVICE), torch.empty_like(qkv)
    delta, heads = torch.empty_like(lse), BATCH * HEADS

    def forward(bm, bn, warps, stages):
        return k._attention_forward[(triton.cdiv(TIME, bm) * heads,)](qkv, cos, sin, out, lse, TIME, HEADS, SCALE, True, D, bm, BN=bn,
                                                                     num_warps=warps, num_stages=stages)

    def forward_one(block, warps):
        return forward_row[(heads,)](qkv, cos, sin, out, lse, TIME, HEADS, SCALE, True, D, block, triton.cdiv(TIME, block), num_warps=warps)

    def three(block, stream, warps, stages):
        k._attention_delta[(triton.cdiv(TIME, 128) * heads,)](out, grad, delta, TIME, HEADS, D, 128, num_warps=4)
        for kernel in (k._attention_backward_keys, k._attention_backward_queries):
            last = kernel[(triton.cdiv(TIME, block) * heads,)](qkv, cos, sin, lse, delta, grad, dqkv, TIME, HEADS, SCALE, True, D, block,
                                                              STREAM=stream, num_warps=warps, num_stages=stages)
        return last

    def two(block, stream, warps, stages):
        grid, sizes = (triton.cdiv(TIME, block) * heads,), dict(STREAM=stream, num_warps=warps, num_stages=stages)
        queries_and_delta[grid](qkv, cos, sin, lse, delta, out, grad, dqkv, TIME, HEADS, SCALE, True, D, block, **sizes)
        return k._attention_backward_keys[grid](qkv, cos, sin, lse, delta, grad, dqkv, TIME, HEADS, SCALE, True, D, block, **sizes)

    def row(block, keys, warps, stages, **more):
        return k._attention_backward_row[(heads,)](qkv, cos, sin, out, lse, grad, dqkv, TIME, HEADS, SCALE, True, D, block, keys,
                                                   triton.cdiv(TIME, block), num_warps=warps, num_stages=stages, **more)

    def check_forward(): return error(out, right)
    def check_backward(): return error(dqkv, right_grad)
    def try_backward(name, run, *sizes, **more):
        dqkv.fill_(torch.nan)
        delta.fill_(torch.nan)
        trial(f"backward {name} {sizes} {more or ''}", partial(run, *sizes, **more), check_backward)
    def try_forward(name, run, *sizes):
        out.fill_(torch.nan)
        trial(f"forward {name} {sizes}", partial(run, *sizes), check_forward)

    try_forward("present", forward, 64, 64, 4, 3)
    try_backward("present: block, stream, warps, stages", three, 64, 32, 4, 3)
    for sizes in ((128, 64, 8, 1), (256, 64, 8, 1), (64, 64, 4, 1), (128, 64, 8, 2)):
        try_backward("row: queries, keys, warps, stages", row, *sizes)
    for sizes in ((64, 32, 4, 3), (64, 64, 4, 2)): try_backward("two (delta with the queries): block, stream, warps, stages", two, *sizes)
    for sizes in ((64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3)):
        try_backward("three: block, stream, warps, stages", three, *sizes)
    k.ONE_PASS_TIME, k.ONE_READ_VOCAB = 256, 32_768  # the operators themselves, at sizes that are no multiples of a block
    for sizes in ({}, dict(batch=2, time=70, heads=3, d=16, vocab=50)):
        try: print("both new kernels on:", sizes, {name: float(f"{e:.2e}") for name, e in k.kernel_errors(**sizes).items()}, flush=True)
        except Exception as problem: print("both new kernels on:", sizes, type(problem).__name__, str(problem)[-300:], flush=True)
    k.ONE_PASS_TIME = k.ONE_READ_VOCAB = 0
    for sizes in ((64, 4), (128, 8), (64, 8)): try_forward("row: block, warps", forward_one, *sizes)
    for sizes in ((128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 4), (128, 64, 4, 2)):
        try_forward("present: queries, keys, warps, stages", forward, *sizes)
    forward(64, 64, 4, 3)  # what the backward candidates read
    loss_trials(16_384, 32_000, [("present", k._cross_entropy, (4096,), 4), ("row", one, (16_384, 16_384), 16),
                                 ("row", one, (16_384, 16_384), 32), ("row", one, (16_384, 16_384), 8)])
    for sizes, more in (((128, 64, 8, 1), dict(maxnreg=128)), ((64, 64, 8, 1), {}), ((256, 64, 8, 1), dict(maxnreg=128)), ((256, 64, 16, 1), {}),
                        ((128, 64, 8, 3), {}), ((64, 64, 4, 1), dict(maxnreg=168)), ((256, 64, 8, 2), {}), ((256, 32, 8, 1), {})):
        try_backward("row: queries, keys, warps, stages", row, *sizes, **more)
    for sizes in ((64, 32, 4, 2), (64, 32, 2, 3), (128, 32, 8, 3), (64, 32, 8, 3), (32, 32, 2, 3), (64, 32, 4, 1)):
        try_backward("three: block, stream, warps, stages", three, *sizes)


if __name__ == "__main__": main()
