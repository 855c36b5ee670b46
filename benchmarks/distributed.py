"""DDP and FSDP2 against one process: the same losses, and tokens a second. Start it with torchrun:

    torchrun --nproc-per-node 2 benchmarks/distributed.py                     GPUs by NCCL (or CPU processes by gloo)
    torchrun --nproc-per-node 2 benchmarks/distributed.py --output runs.json  also write what was measured
    torchrun --nproc-per-node 2 benchmarks/distributed.py --skip-speed        only compare losses
    torchrun --nproc-per-node 2 benchmarks/distributed.py --compile           blocks (FSDP2) or the loss as a whole (DDP) compiled

The reference runs on rank 0 alone with the whole batch, by chapters 08 and 09 only. Tokens a second count all ranks; the batch
a rank is the same for one process and for many (alone, the ranks train at the same time without a word to each other, and one counts).
"""
import argparse, gc, json, os, platform, shutil, statistics, tempfile, time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

from cs336_lm import distributed as d
from cs336_lm.accounting import count_parameters
from cs336_lm.optimization import AdamW, clip_gradients, cross_entropy
from cs336_lm.transformer import PRESETS, ModelConfig, TransformerLM

SMALL = ModelConfig(vocab_size=512, context_length=64, d_model=128, num_layers=3, num_heads=4, d_ff=320)
# preset, rows a rank: the handout's model, and two of GPT-2's sizes
SPEED_CUDA = [("tinystories", 256), ("gpt2-medium-2026", 16), ("gpt2-xl-2026", 4)]
SPEED_CPU = [("demo", 8)]


def build(config: ModelConfig, device: str) -> TransformerLM:
    "The same weights on every rank: drawn on the CPU where they are few."
    torch.manual_seed(0)
    few = sum(count_parameters(config).values()) < 10**8
    return TransformerLM(config).to(device) if few else TransformerLM(config, device=device)


def adamw(model: torch.nn.Module, lr: float = 3e-3) -> AdamW: return AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def batch(config: ModelConfig, rows: int, step: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    "Rows with something to learn: each token is the one before it plus a step of its row, now and then another."
    g = torch.Generator().manual_seed(step)
    V, T = config.vocab_size, config.context_length + 1
    ids = (torch.randint(V, (rows, 1), generator=g) + torch.arange(T) * torch.randint(1, 4, (rows, 1), generator=g)) % V
    noise = torch.rand(rows, T, generator=g) < 0.1
    ids = torch.where(noise, torch.randint(V, (rows, T), generator=g), ids).to(device)
    return ids[:, :-1], ids[:, 1:]


def autocast(device: str, precision: str, strategy: str):
    "bf16 products by autocast, but not within FSDP2, whose policy has cast the weights."
    if precision != "bf16" or strategy == "fsdp": return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def loss_of(model: TransformerLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: return cross_entropy(model(inputs), targets)


def step(call: d.ModelCall, optimizer, data, clip, device: str, precision: str, strategy: str, function=loss_of) -> tuple[torch.Tensor, torch.Tensor]:
    with autocast(device, precision, strategy): loss = call(function, *data)
    optimizer.zero_grad()
    loss.backward()
    norm = clip(call.parameters(), 1.0)
    optimizer.step()
    return loss.detach(), norm


def alone_curve(world: d.World, precision: str, rows: int, steps: int) -> list[list[float]]:
    "Loss and gradient norm of each step on rank 0 with the whole batch."
    model = d.ModelCall(build(SMALL, world.device))
    optimizer, curve = adamw(model), []
    for i in range(1, steps + 1):
        loss, norm = step(model, optimizer, batch(SMALL, rows, i, world.device), clip_gradients, world.device, precision, "alone")
        curve.append([loss.item(), norm.item()])
    return curve


def shared_curve(world: d.World, strategy: str, precision: str, rows: int, steps: int) -> list[list[float]]:
    "The same over all ranks; on the way the state goes through rank 0 and through a checkpoint into new models."
    model = d.distribute_model(d.ModelCall(build(SMALL, world.device)), world, strategy, precision)
    optimizer, curve = adamw(model), []
    mine = d.rank_slice(rows, world)
    for i in range(1, steps + 1):
        data = tuple(t[mine] for t in batch(SMALL, rows, i, world.device))
        loss, norm = step(model, optimizer, data, d.clip_gradients_over_ranks, world.device, precision, strategy)
        curve.append([d.mean_over_ranks(loss).item(), norm.item()])
        if i == steps // 4: model, optimizer = through_memory(model, optimizer, world, strategy, precision)
        if i == steps // 2: model, optimizer = through_checkpoint(model, optimizer, world, strategy, precision)
    return curve


def emptied(world: d.World, strategy: str, precision: str):
    "A new model and optimizer; its weights are 0, so that what is not loaded shows."
    fresh = build(SMALL, world.device)
    for p in fresh.parameters(): p.data.zero_()
    fresh = d.distribute_model(d.ModelCall(fresh), world, strategy, precision)
    return fresh, adamw(fresh)


def through_memory(model, optimizer, world: d.World, strategy: str, precision: str):
    "Everything gathered on rank 0, as for a single file, and spread again."
    state, (fresh, fresh_optimizer) = d.gather_state(model, optimizer), emptied(world, strategy, precision)
    d.spread_state(state, fresh, fresh_optimizer)
    return fresh, fresh_optimizer


def through_checkpoint(model, optimizer, world: d.World, strategy: str, precision: str):
    "The same by a sharded checkpoint."
    folder = Path(d.on_rank_0(tempfile.mkdtemp))
    d.save_shards(folder / "shards", model, optimizer, 1)
    fresh, fresh_optimizer = emptied(world, strategy, precision)
    d.load_shards(folder / "shards", fresh, fresh_optimizer)
    d.on_rank_0(lambda: shutil.rmtree(folder))
    return fresh, fresh_optimizer


def compare(world: d.World, steps: int = 12, rows: int = 16) -> dict:
    "Curves in float32 and, on a GPU, in bfloat16, with the largest distance from the reference."
    found = {}
    for precision in ("fp32", "bf16") if world.device != "cpu" else ("fp32",):
        alone = d.on_rank_0(lambda: alone_curve(world, precision, rows, steps))
        found[precision] = {"alone": alone}
        for strategy in d.STRATEGIES:
            curve = shared_curve(world, strategy, precision, rows, steps)
            apart = max(abs(a[0] - b[0]) for a, b in zip(alone, curve))
            found[precision][strategy] = {"curve": curve, "apart": apart}
            say(world, f"{precision} {strategy:5} loss {alone[0][0]:.3f} -> {alone[-1][0]:.3f}, furthest from one process {apart:.1e}")
            limit = 5e-4 if precision == "fp32" else 5e-2
            assert apart < limit, f"{precision} {strategy}: {apart} is more than {limit}"
    return found


def clear(device: str) -> None:
    gc.collect()
    if device == "cpu": return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def prepared(config: ModelConfig, world: d.World, strategy: str, precision: str, compiled: bool):
    "The model ready to train, and the function of it that gives the loss."
    model = build(config, world.device)
    if compiled and strategy == "fsdp":
        for block in model.layers: block.compile(dynamic=False)
    call = d.ModelCall(model)
    if strategy != "alone": call = d.distribute_model(call, world, strategy, precision)
    return call, torch.compile(loss_of, dynamic=False) if compiled and strategy != "fsdp" else loss_of


def speed(config: ModelConfig, rows: int, world: d.World, strategy: str, precision: str, steps: int, compiled: bool) -> dict:
    "Tokens a second of all ranks, median over windows of steps, and a rank's memory."
    clear(world.device)
    wait = (lambda: torch.cuda.synchronize()) if world.device != "cpu" else (lambda: None)
    model, function = prepared(config, world, strategy, precision, compiled)
    optimizer = adamw(model, 1e-4)
    clip = clip_gradients if strategy == "alone" else d.clip_gradients_over_ranks
    data = batch(config, rows, world.rank, world.device)
    seconds = []
    for window in range(4):
        wait()
        since = time.perf_counter()
        for _ in range(steps): step(model, optimizer, data, clip, world.device, precision, strategy, function)
        wait()
        seconds.append((time.perf_counter() - since) / steps)
    per_step = statistics.median(seconds[1:])
    ranks = 1 if strategy == "alone" else world.size
    memory = None if world.device == "cpu" else torch.cuda.max_memory_allocated()
    return {"rows_a_rank": rows, "step_seconds": per_step, "tokens_per_second": ranks * rows * config.context_length / per_step, "memory_bytes": memory}


def all_reduce_rate(world: d.World, size: int = 1 << 28) -> float:
    "Bytes a second that a rank sends in an all-reduce of float32 numbers (a ring's count)."
    numbers = torch.ones(size if world.device != "cpu" else size >> 6, device=world.device)
    times = []
    for _ in range(8):
        dist.barrier()
        if world.device != "cpu": torch.cuda.synchronize()
        since = time.perf_counter()
        dist.all_reduce(numbers)
        if world.device != "cpu": torch.cuda.synchronize()
        times.append(time.perf_counter() - since)
    return 2 * (world.size - 1) / world.size * numbers.numel() * 4 / statistics.median(times[3:])


def speeds(world: d.World, compiled: bool, budget: float) -> dict:
    "The table; a model that does not fit is said so, and none is begun after `budget` seconds."
    began, found = time.perf_counter(), {"all_reduce_bytes_per_second": all_reduce_rate(world)}
    say(world, f"all-reduce: a rank sends {found['all_reduce_bytes_per_second'] / 1e9:.1f} GB/s")
    cpu = world.device == "cpu"
    precision = "fp32" if cpu else "bf16"
    for preset, rows in SPEED_CPU if cpu else SPEED_CUDA:
        for strategy in ("alone", *d.STRATEGIES):
            if d.any_rank(time.perf_counter() - began > budget):
                say(world, f"{preset} {strategy}: not run, {budget:.0f} s are over")
                continue
            one = attempt(world, preset, rows, strategy, precision, compiled)
            found.setdefault(preset, {})[strategy] = one
            said = "does not fit" if one is None else f"{one['tokens_per_second']:12,.0f} tokens/s {one['step_seconds'] * 1e3:8.1f} ms a step"
            if one and one["memory_bytes"]: said += f" {one['memory_bytes'] / 1e9:6.1f} GB"
            say(world, f"{preset:18} {rows:4d} rows a rank {precision} {strategy:5} {said}")
    return found


def attempt(world: d.World, preset: str, rows: int, strategy: str, precision: str, compiled: bool) -> dict | None:
    "One measurement; None where a rank's memory is not enough. Alone, all ranks do the same without a word to each other."
    result, full = None, False
    try: result = speed(PRESETS[preset], rows, world, strategy, precision, 3 if world.device == "cpu" else 6, compiled)
    except torch.OutOfMemoryError: full = True
    return None if d.any_rank(full) else result


def say(world: d.World, text: str) -> None:
    if world.writes: print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--output", type=Path, help="write what was measured there, as JSON")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--budget", type=float, default=40.0, help="no measurement of speed begins after so many seconds")
    args = parser.parse_args()
    with d.processes(args.device, timeout=120) as world:
        if world.size == 1: raise SystemExit("this compares several processes with one: start it with torchrun --nproc-per-node 2")
        torch.backends.cuda.matmul.allow_tf32 = False
        if world.device == "cpu": torch.set_num_threads(1)
        where = f"{os.cpu_count()} CPU cores ({platform.machine()})" if world.device == "cpu" else torch.cuda.get_device_name()
        say(world, f"{world.size} ranks on {where}, torch {torch.__version__}")
        found = {"ranks": world.size, "device": where, "torch": torch.__version__, "date": date.today().isoformat(),
                 "compiled": args.compile, "losses": compare(world)}
        if not args.skip_speed: found["speed"] = speeds(world, args.compile, args.budget)
        if args.output and world.writes: args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
