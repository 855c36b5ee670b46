"""Training steps of this package and of peers of the same size, in turn in one process: tokens a second, losses, memory.

    python benchmarks/training.py                        on a GPU: the TinyStories model at 256 and 64 rows; on a CPU: a tiny one
    python benchmarks/training.py --tokens train.npy     real tokens (a token file of `cs336 encode`); default: random ones
    python benchmarks/training.py --ladder --profile     also what each change bought, and where a step's time goes
    python benchmarks/training.py --loop --tokens T.npy  also the whole loop of `train` (data, logging, checkpoints) as a share of the bare step's rate
    python benchmarks/training.py --record FILE.json     write the numbers there
    python benchmarks/training.py --first-step           only: seconds from the start of the process to the first finished step

Peers: a GPT-2 block (LayerNorm, GELU, learned positions, tied table; PyTorch's SDPA) and transformers' Llama, both compiled, bf16
autocast, PyTorch's fused AdamW and clipping. Llama gets our initial weights, so that its losses can be compared with ours.
"""
import sys, time
STARTED = time.time()
sys.path.pop(0)  # this folder, whose tokenizers.py would stand in for the package that transformers imports
import argparse, gc, importlib, json, re, statistics, tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cs336_lm.accounting import flops_per_token
from cs336_lm.kernels import fused_training_loss, kernel_errors, use_kernels
from cs336_lm.optimization import AdamW, adamw_update_capturable
from cs336_lm.training import (TrainConfig, TrainParts, TrainStep, build_run, device_name, finish_saving, float32_products, loop_rate, resolve_config,
                               save_run, train, training_loss)
from cs336_lm.transformer import ModelConfig, TransformerLM
IMPORTED = time.time()

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MODEL = ModelConfig() if CUDA else ModelConfig(vocab_size=1_024, context_length=128, d_model=128, num_layers=2, num_heads=4, d_ff=384)
OPTIMIZER = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
RATE, CLIP = 1e-3, 1.0


class Ours:
    "The engine of chapter 11, as `cs336 train` runs it."
    def __init__(self, batch_size: int, model: ModelConfig = MODEL) -> None:
        config = resolve_config(TrainConfig(name="benchmark", train_tokens="none", valid_tokens="none", model=model, batch_size=batch_size, **OPTIMIZER))
        self.parts = TrainParts()
        self.parts.fit(config)
        self.model = self.parts.model
        optimizer = AdamW(self.model.parameters(), **OPTIMIZER, capturable=CUDA)
        optimizer.update = self.parts.update
        self.train_step = TrainStep(self.model, optimizer, self.parts.loss_function, precision=config.precision, max_grad_norm=CLIP, graph=config.graph == "on")

    def __call__(self, inputs, targets): return self.train_step(inputs, targets, RATE)[0]


class Variant:
    "A step put together from parts, to see what each of them buys."
    def __init__(self, attention="sdpa", precision="bf16", compiled=False, foreach=True, update=False, graph=False, stream=False, kernel=False, loss=False):
        torch.compiler.reset()
        torch.manual_seed(0)
        self.model, self.precision = TransformerLM(replace(MODEL, attention=attention)).to(DEVICE), precision
        use_kernels(self.model, kernel)
        self.model.stream_dtype = torch.bfloat16 if stream else None
        function = fused_training_loss if loss else training_loss
        optimizer = AdamW(self.model.parameters(), **OPTIMIZER, foreach=foreach, capturable=update)
        if update: optimizer.update = torch.compile(adamw_update_capturable)
        self.step = TrainStep(self.model, optimizer, torch.compile(function) if compiled else function, precision=precision, max_grad_norm=CLIP, graph=graph)

    def __call__(self, inputs, targets):
        with float32_products(self.precision): return self.step(inputs, targets, RATE)[0]


LADDER = [("float32, equations of chapter 07, AdamW tensor by tensor", dict(attention="clear", precision="fp32", foreach=False))]
for label, change in (("TF32 products", dict(precision="tf32")), ("bf16 products", dict(precision="bf16")),
                      ("AdamW on all tensors at once", dict(foreach=True)), ("PyTorch's fused attention", dict(attention="sdpa")),
                      ("torch.compile of the loss", dict(compiled=True)), ("AdamW compiled", dict(update=True)),
                      ("one CUDA graph a step", dict(graph=True)), ("residual stream in bf16", dict(stream=True)),
                      ("attention with RoPE in one kernel", dict(kernel=True)), ("loss and its gradient in one kernel", dict(loss=True))):
    LADDER.append((label, {**LADDER[-1][1], **change}))


class Peer:
    "A peer's model under the usual training step."
    def __init__(self, model: nn.Module, logits) -> None:
        self.model = model.to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, **OPTIMIZER, fused=CUDA)
        def loss(model, inputs, targets): return nn.functional.cross_entropy(logits(model, inputs).flatten(0, 1), targets.flatten())
        self.loss = torch.compile(loss) if CUDA else loss

    def __call__(self, inputs, targets):
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA): loss = self.loss(self.model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()


class GPT2Block(nn.Module):
    "GPT-2's block: LayerNorm, attention, LayerNorm, GELU between two matrices."
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, d = c.num_heads, c.d_model
        self.ln1, self.ln2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.ln2(x))))


class GPT2(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(c.context_length, c.d_model)
        for table in (self.tokens, self.positions): nn.init.normal_(table.weight, std=0.02)
        self.blocks, self.ln = nn.ModuleList(GPT2Block(c) for _ in range(c.num_layers)), nn.LayerNorm(c.d_model, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight[:ids.shape[1]]
        for block in self.blocks: x = block(x)
        return self.ln(x) @ self.tokens.weight.T


def llama(like: TransformerLM) -> nn.Module | None:
    "transformers' Llama with the sizes and weights of our model; None where transformers is not installed."
    try: from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError: return None
    c = like.config
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_heads, max_position_embeddings=c.context_length, rms_norm_eps=1e-5, rope_theta=c.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, hidden_act="silu", attention_bias=False, mlp_bias=False,
        tie_word_embeddings=c.tied_embeddings, use_cache=False))
    places = {"token_embeddings": "embed_tokens", "ln_final": "norm", "attn.output_proj": "self_attn.o_proj", "attn": "self_attn", "ffn.w1": "mlp.gate_proj",
              "ffn.w3": "mlp.up_proj", "ffn.w2": "mlp.down_proj", "ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    state = {}
    for name, weight in like.state_dict().items():
        if re.search("[qk]_proj", name):  # Llama's RoPE turns halves of a head where ours turns neighbours
            weight = weight.unflatten(0, (c.num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        name = re.sub("|".join(re.escape(place) for place in places), lambda found: places[found[0]], name)
        state[name if name.startswith("lm_head") else f"model.{name}"] = weight
    model.load_state_dict(state)
    return model.float()


class Batches:
    "The same batches for everybody: rows of a token stream that lies on the device."
    def __init__(self, path: Path | None, batch_size: int) -> None:
        tokens = np.load(path, mmap_mode="r")[:20_000_000] if path else np.random.default_rng(0).integers(MODEL.vocab_size, size=2_000_000)
        self.tokens, self.rows = torch.from_numpy(np.asarray(tokens).astype(np.int32)).to(DEVICE), batch_size
        if int(self.tokens.max()) >= MODEL.vocab_size: sys.exit(f"{path} has ids up to {int(self.tokens.max())}, the model's vocab_size is {MODEL.vocab_size}; give another file")

    def __call__(self, step: int):
        starts = np.random.default_rng((0, step)).integers(len(self.tokens) - MODEL.context_length - 1, size=self.rows)
        starts = torch.from_numpy(starts).pin_memory().to(DEVICE, non_blocking=True) if CUDA else torch.from_numpy(starts)
        ids = self.tokens[starts[:, None] + torch.arange(MODEL.context_length + 1, device=DEVICE)].long()
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def synchronize() -> None:
    if CUDA: torch.cuda.synchronize()


def timed(step, batches, first: int, count: int) -> float:
    "Seconds a step over `count` steps."
    synchronize()
    began = time.perf_counter()
    for i in range(first, first + count): step(*batches(i))
    synchronize()
    return (time.perf_counter() - began) / count


def matmul_rate() -> float:
    "FLOP/s of a large bf16 (on a CPU: float32) matrix product on random data."
    n, dtype = (8_192, torch.bfloat16) if CUDA else (1_024, torch.float32)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b)


def copy_rate() -> float:
    "Bytes a second that a large copy within the device's memory reads and writes."
    source = torch.ones(2**28 if CUDA else 2**24, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def seconds_of(work, times: int = 12) -> float:
    "Median seconds of `work()` until the device has done it; the first two times do not count."
    found = []
    for _ in range(times):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


def compare(batch_size: int, tokens: Path | None, steps: int, repeats: int) -> list[dict]:
    "Ours and the peers in turn, `repeats` times `steps` steps each."
    torch.compiler.reset()
    gc.collect()  # what an earlier batch size left would be freed during the first step here, and its memory come out too small
    batches, makers, rows = Batches(tokens, batch_size), {}, []
    ours = Ours(batch_size)
    makers["ours"] = ours
    initial = TransformerLM(MODEL)
    initial.load_state_dict(ours.model.state_dict())
    makers["GPT-2 block"] = Peer(GPT2(MODEL), lambda model, ids: model(ids))
    if (peer := llama(initial)) is not None: makers["transformers Llama"] = Peer(peer, lambda model, ids: model(input_ids=ids).logits)
    else: print("transformers is not installed: its row is left out")
    losses, seconds, memory = {}, {name: [] for name in makers}, {}
    for name, step in makers.items():
        if CUDA: torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if CUDA else 0
        losses[name] = torch.stack([step(*batches(i)).detach().float().clone() for i in range(10)]).tolist()
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else None
    for repeat in range(repeats):
        for name, step in makers.items(): seconds[name].append(timed(step, batches, 10 + repeat * steps, steps))
    for name in makers:
        median = statistics.median(seconds[name])
        rate = batch_size * MODEL.context_length / median
        rows.append({"name": name, "batch": batch_size, "ms": 1e3 * median, "ms_all": [1e3 * s for s in seconds[name]], "tokens_per_second": rate,
                     "gib_beside_weights": memory[name], "losses": losses[name]})
        print(f"{name:20s} batch {batch_size:4d}: {1e3 * median:8.2f} ms, {rate / 1e6:7.4f} Mtok/s, loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f}", flush=True)
    print(f"  ratio to the best peer: {min(r['ms'] for r in rows[1:]) / rows[0]['ms']:.2f}", flush=True)
    return rows


def ladder(batch_size: int, tokens: Path | None, steps: int) -> Iterator[list[dict]]:
    "What each change buys: every row has the changes of the rows above it. All rows so far, after each."
    batches, rows = Batches(tokens, batch_size), []
    for label, options in LADDER:
        try:
            step = Variant(**options)
            for i in range(8): loss = step(*batches(i))
            times = [timed(step, batches, 8 + k * steps, steps) for k in range(5)]
            rows.append({"change": label, "ms": 1e3 * statistics.median(times), "loss_at_8": loss.item()})
            print(f"{label:60s} {rows[-1]['ms']:8.2f} ms, loss after 8 steps {loss.item():.4f}", flush=True)
        except torch.OutOfMemoryError: print(f"{label:60s} does not fit")
        yield rows
        step = None
        torch.cuda.empty_cache()


def loop(batch_size: int, tokens: Path, steps: int, rounds: int = 3, parts_too: bool = False) -> dict:
    """Tokens a second of whole runs of `train` and of their step alone on one batch, in turn; evaluations are left out of both.

    A run's rate is that from its log's second line to the last, one checkpoint between them: as often as a run's default says where `steps` is above that by a log line.
    How long the loop stands still for a checkpoint is measured by itself. `parts_too`: also runs without checkpoints, and with only a few log lines.
    """
    log_every = min(TrainConfig.log_every, max(1, steps // 5))
    every, stretch = min(TrainConfig.checkpoint_every, steps - log_every), max(2, min(50, steps // 20))
    config = TrainConfig(name="loop", train_tokens=str(tokens), valid_tokens=str(tokens), model=MODEL, batch_size=batch_size, steps=steps, max_lr=RATE, warmup_steps=steps // 10,
                         min_lr=RATE / 10, log_every=log_every, eval_every=0, checkpoint_every=every, keep_checkpoints=2, **OPTIMIZER)
    kinds = {"loop": {}} | ({"no checkpoints": dict(keep_checkpoints=0), "few lines": dict(log_every=steps // 2)} if parts_too else {})
    parts, rates, bare_rates, evaluating = TrainParts(), {kind: [] for kind in kinds}, [], []
    run = build_run(resolve_config(config), parts)
    data = run.batch(1)
    bare = lambda *_: run.train_step(*data, RATE)
    timed(bare, lambda _: (), 0, 8)
    for _ in range(rounds):
        for kind, change in kinds.items():  # the bare step is timed beside each run, for a GPU's clock falls as it gets warm
            bare_rates += [batch_size * MODEL.context_length / timed(bare, lambda _: (), 0, stretch) for _ in range(4)]
            rate, seconds = whole_run(replace(config, **change), parts)
            rates[kind].append(rate)
            evaluating += seconds
        bare_rates += [batch_size * MODEL.context_length / timed(bare, lambda _: (), 0, stretch) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        run.folder = Path(folder)
        (run.folder / "checkpoints").mkdir()
        saves = [saving_seconds(run) for _ in range(3)]
    found = {"batch": batch_size, "steps": steps, "checkpoint_every": every, "log_every": log_every, "loop_rates": rates["loop"], "step_rates": bare_rates,
             "loop_tokens_per_second": statistics.median(rates["loop"]), "step_tokens_per_second": statistics.median(bare_rates),
             "eval_seconds": evaluating, "evaluated_tokens": len(np.load(tokens, mmap_mode="r")), "checkpoint_seconds": [held for held, _ in saves], "written_seconds": [w for _, w in saves]}
    found["share"] = found["loop_tokens_per_second"] / found["step_tokens_per_second"]
    if parts_too: found["parts"] = {kind: statistics.median(rates[kind]) / found["step_tokens_per_second"] for kind in kinds}
    print(f"whole loop, batch {batch_size}: {found['loop_tokens_per_second'] / 1e6:.4f} Mtok/s, {found['share']:.1%} of the step alone, a checkpoint every {every} steps; "
          f"it holds the loop for {', '.join(f'{1e3 * held:.0f}' for held, _ in saves)} ms and is on the disk after {', '.join(f'{1e3 * written:.0f}' for _, written in saves)} ms", flush=True)
    for kind, share in found.get("parts", {}).items(): print(f"  {kind}: {share:.1%}", flush=True)
    return found


def whole_run(config: TrainConfig, parts: TrainParts) -> tuple[float, list[float]]:
    "Tokens a second of a run by its log, and the seconds of its evaluations."
    records = []
    with tempfile.TemporaryDirectory() as folder: result = train(replace(config, runs_dir=folder), progress=False, parts=parts, on_record=records.append)
    if result.status != "finished": raise RuntimeError(f"the loop's run ended as {result.status}: {result.reason}")
    rate = loop_rate([r for r in records if r.get("step", 0) > 1])  # the line of step 1 comes before the step's recording as a CUDA graph
    return rate, [r["eval_seconds"] for r in records if r["kind"] == "eval"]


def saving_seconds(run) -> tuple[float, float]:
    "Seconds until a step could follow a checkpoint of the run (the device has copied its state), and until it is on the disk."
    synchronize()
    began = time.perf_counter()
    save_run(run)
    synchronize()
    held = time.perf_counter() - began
    finish_saving(run)
    return held, time.perf_counter() - began


KINDS = [("attention", "_attention_"), ("loss", "_cross_entropy"), ("matrix products", "nvjet|gemm|cutlass|splitK"), ("SiLU and gate", "triton_poi.*(sigmoid|silu)"),
         ("optimizer, clipping", "triton_for|multi_tensor|foreach"), ("norms and residual", "triton_(per|red)_fused.*(pow|rsqrt|mean)|reduce_kernel<128"), ("rest", "")]


def profile(batch_size: int, tokens: Path | None) -> dict[str, float]:
    "Milliseconds of device time a step by kind of kernel; the rest of the step is idle."
    from torch.profiler import ProfilerActivity, profile as profiler
    batches, step = Batches(tokens, batch_size), Ours(batch_size)
    for i in range(8): step(*batches(i))
    data = batches(8)
    total = timed(step, lambda _: data, 0, 20) * 1e3
    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(5): step(*data)
        synchronize()
    times = dict.fromkeys([kind for kind, _ in KINDS], 0.0)
    for event in found.key_averages():
        times[next(kind for kind, pattern in KINDS if re.search(pattern, event.key))] += event.device_time_total / 5e3
    times["idle"] = max(total - sum(times.values()), 0.0)
    print("  ".join(f"{kind} {ms:.2f}" for kind, ms in times.items()), f"of {total:.2f} ms", flush=True)
    return times


def first_step(batch_size: int, tokens: Path | None) -> dict:
    "Seconds from the start of the process to the first finished step, and where they went."
    marks = [("imports", IMPORTED)]
    def done(what: str) -> None: marks.append((what, time.time()))
    torch.ones(1, device=DEVICE).item()
    done("the device wakes up")
    for name in ("torch._dynamo", "torch._inductor.compile_fx"): importlib.import_module(name)  # what torch.compile loads when it is first called
    done("the compiler's imports")
    step = Ours(batch_size)
    done("weights, optimizer")
    data = Batches(tokens, batch_size)(0)
    done("tokens")
    if DEVICE.type == "cuda": torch.zeros(8, 8, device=DEVICE, dtype=torch.bfloat16) @ torch.zeros(8, 8, device=DEVICE, dtype=torch.bfloat16)
    synchronize()
    done("matrix products wake up")
    inner = step.train_step.optimizer.step
    def update(*args):
        synchronize()
        done("forward, backward and their compilation")
        inner(*args)
    step.train_step.optimizer.step = update
    step(*data).item()
    done("update and its compilation")
    times = [STARTED, *(at for _, at in marks)]
    return {"first_step_seconds": round(times[-1] - STARTED, 2), "parts": {what: round(b - a, 2) for (what, _), a, b in zip(marks, times, times[1:])}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, help="token file; default: random tokens")
    parser.add_argument("--batch", default="256,64" if CUDA else "8", help="rows a step, several with commas")
    parser.add_argument("--steps", type=int, default=30 if CUDA else 10, help="steps a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--ladder", action="store_true", help="also what each change bought (CUDA)")
    parser.add_argument("--profile", action="store_true", help="also where a step's time goes (CUDA)")
    parser.add_argument("--loop", type=int, nargs="?", const=1_010 if CUDA else 40, default=0, metavar="STEPS", help="also the whole loop as a share of the step (needs --tokens)")
    parser.add_argument("--loop-parts", action="store_true", help="with --loop: also runs without checkpoints, and with few log lines")
    parser.add_argument("--skip-peers", action="store_true", help="do not compare steps")
    parser.add_argument("--record", type=Path, help="JSON file for the numbers")
    parser.add_argument("--first-step", action="store_true", help="only the seconds to the first finished step")
    args = parser.parse_args()
    if args.tokens and not args.tokens.is_file(): parser.error(f"no token file {args.tokens}; make one with cs336 encode")
    if args.loop and not args.tokens: parser.error("--loop needs --tokens")
    if args.record and not args.record.parent.is_dir(): parser.error(f"no folder {args.record.parent} for the record")
    sizes = [int(b) for b in args.batch.split(",")]
    if args.first_step: return print(json.dumps(first_step(sizes[0], args.tokens)))
    record = {"device": device_name(DEVICE), "torch": torch.__version__, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
              "tokens": args.tokens.name if args.tokens else "random", "model": asdict(MODEL), "flops_per_token": flops_per_token(MODEL), "matmul_flops": matmul_rate(), "copy_bytes_per_second": copy_rate()}
    print(f"{record['device']}, torch {record['torch']}, matrix products {record['matmul_flops'] / 1e12:.1f} TFLOP/s, memory {record['copy_bytes_per_second'] / 1e12:.3f} TB/s", flush=True)
    def keep(**found) -> None:
        "Numbers are on the disk as soon as they are known: the later parts may run out of time."
        record.update(found)
        if args.record: args.record.write_text(json.dumps(record, indent=1) + "\n")

    for size in sizes if not args.skip_peers else []:
        rows = compare(size, args.tokens, args.steps, args.repeats)
        for row in rows: row["share_of_matmul_rate"] = row["tokens_per_second"] * record["flops_per_token"] / record["matmul_flops"]
        keep(rows=record.get("rows", []) + rows)
    if CUDA and not args.skip_peers: keep(kernel_errors=kernel_errors())
    if args.profile and CUDA: keep(profile={str(size): profile(size, args.tokens) for size in sizes})
    if args.loop: keep(loop=[loop(size, args.tokens, args.loop, parts_too=args.loop_parts) for size in sizes])
    if args.ladder and CUDA:
        for rows in ladder(sizes[0], args.tokens, args.steps): keep(ladder=rows)
    if args.record: print(f"written: {args.record}")


if __name__ == "__main__": main()
