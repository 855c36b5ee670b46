"""What test_distributed.py starts on two processes with torchrun: `distributed_worker.py FOLDER die|raise`."""
import json, os, signal, sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cs336_lm import distributed as d
from cs336_lm.dataset import IGNORE_INDEX
from cs336_lm.optimization import AdamW, clip_gradients, cross_entropy
from cs336_lm.transformer import ModelConfig, TransformerLM

CONFIG = ModelConfig(vocab_size=65, context_length=12, d_model=32, num_layers=2, num_heads=2, d_ff=48)  # 65 rows: shards differ
TIED = ModelConfig(vocab_size=65, context_length=12, d_model=32, num_layers=2, num_heads=2, d_ff=48, tied_embeddings=True)
EVEN = ModelConfig(vocab_size=64, context_length=12, d_model=32, num_layers=2, num_heads=2, d_ff=48)  # no shard is padded
BATCH, STEPS, SAVED = 8, 6, 3


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    "The whole batch of a step, with padding that the two halves have different amounts of."
    ids = torch.randint(65, (BATCH, 13), generator=torch.Generator().manual_seed(step))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[5:, 3:] = IGNORE_INDEX
    return inputs, targets


def fresh(config: ModelConfig = CONFIG) -> TransformerLM:
    torch.manual_seed(1)
    return TransformerLM(config)


def adamw(model: torch.nn.Module) -> AdamW: return AdamW(model.parameters(), lr=3e-2, betas=(0.9, 0.95), weight_decay=0.1)


def reaching_loss(model: TransformerLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    "The loss by parts of the model instead of its forward pass."
    x = model.token_embeddings(inputs)
    for block in model.layers: x = block(x)
    return cross_entropy(model.ln_final(x) @ model.lm_head.weight.T, targets)


def model_loss(model, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: return cross_entropy(model(inputs), targets)


def steps(model, optimizer, world: d.World, first: int, last: int, micro: int = 1, loss_of=model_loss) -> list[list[float]]:
    "Train; loss and gradient norm of each step, over all ranks."
    curve = []
    for step in range(first, last + 1):
        rows = d.rank_slice(BATCH, world)
        inputs, targets = (t[rows] for t in batch(step))
        share, counted = d.target_share(targets), (targets != IGNORE_INDEX).sum()
        optimizer.zero_grad()
        total = torch.zeros(())
        for i, (x, y) in enumerate(zip(inputs.chunk(micro), targets.chunk(micro))):
            with d.gradients_stay_local(model, i < micro - 1):
                loss = loss_of(model, x, y) * share * (y != IGNORE_INDEX).sum() / counted
                loss.backward()
            total += loss.detach()
        norm = d.clip_gradients_over_ranks(model.parameters(), 0.5)
        optimizer.step()
        curve.append([d.mean_over_ranks(total).item(), norm.item()])
    return curve


def alone(config: ModelConfig = CONFIG, last: int = STEPS) -> tuple[torch.nn.Module, AdamW, list[list[float]]]:
    "The same training on one process, by chapter 09's functions only."
    model = fresh(config)
    optimizer, curve = adamw(model), []
    for step in range(1, last + 1):
        inputs, targets = batch(step)
        loss = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        curve.append([loss.item(), clip_gradients(model.parameters(), 0.5).item()])
        optimizer.step()
    return model, optimizer, curve


def whole(model) -> dict[str, torch.Tensor]:
    "All weights, whole, on every rank."
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in d.bare_model(model).state_dict().items()}


def furthest(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[k].detach() - b[k].detach()).abs().max().item() for k in a)


def failures(world: d.World, folder: Path) -> dict:
    "What every rank sees when one of them fails."
    seen = {}
    def broken(): raise ValueError("no such file")
    try: d.on_rank_0(broken)
    except Exception as error: seen["on_rank_0"] = f"{type(error).__name__}: {error}"
    model = d.shard_model(fresh(), world)
    optimizer = adamw(model)
    d.save_shards(folder / "hurt", model, optimizer, 1)
    if world.writes:
        file = folder / "hurt" / "__1_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    torch.distributed.barrier()
    try: d.read_shards(folder / "hurt")
    except ValueError as error: seen["damaged"] = str(error)
    import torch.distributed.checkpoint as dcp
    write = dcp.FileSystemWriter.write_data
    def full(*args):
        if world.rank == 1: raise OSError(28, "No space left on device")
        return write(*args)
    dcp.FileSystemWriter.write_data = full
    try: d.save_shards(folder / "full", model, optimizer, 1)
    except BaseException as error: seen["full"] = f"{type(error).__name__}: {error}"[-300:]
    dcp.FileSystemWriter.write_data = write
    torch.distributed.barrier()
    seen["left"] = sorted(p.name for p in folder.iterdir() if "full" in p.name)
    return seen


class Counter(TorchDispatchMode):
    "Bytes of the whole tensor in every all-gather and reduce-scatter that is really called."
    NAMES = {"_allgather_base_": ("all_gather", 0), "_reduce_scatter_base_": ("reduce_scatter", 1)}

    def __init__(self) -> None:
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if found := self.NAMES.get(function.overloadpacket.__name__):
            kind, whole = found
            self.seen[kind] = self.seen.get(kind, 0) + args[whole].numel() * args[whole].element_size()
        return function(*args, **(kwargs or {}))


def sent(world: d.World) -> dict:
    "Bytes that a rank sends in one step, by a ring's count."
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    turn, ids = (world.size - 1) / world.size, batch(1)[0] % 64
    model = d.shard_model(fresh(EVEN), world)
    with Counter() as counter: cross_entropy(model(ids), ids).backward()
    model, buckets = d.distribute_model(fresh(EVEN), world, "ddp"), []
    def hook(_, bucket):
        buckets.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(None, bucket)
    model.register_comm_hook(None, hook)
    cross_entropy(model(ids), ids).backward()
    return {"fsdp": {kind: turn * size for kind, size in counter.seen.items()}, "ddp": {"all_reduce": 2 * turn * sum(buckets)}}


def checks(world: d.World, folder: Path) -> dict:
    "Train in all ways; the curves, and how far weights are apart."
    reference, reference_optimizer, curve = alone()
    found = {"alone": curve}
    ddp = d.distribute_model(fresh(), world, "ddp")
    optimizer = adamw(ddp)
    found["ddp"] = steps(ddp, optimizer, world, 1, STEPS)
    found["ddp_apart"] = furthest(whole(ddp), whole(reference))
    micro = d.distribute_model(fresh(), world, "ddp")
    found["micro"] = steps(micro, adamw(micro), world, 1, STEPS, micro=2)

    fsdp = d.distribute_model(fresh(), world, "fsdp")
    fsdp_optimizer = adamw(fsdp)
    found["fsdp"] = steps(fsdp, fsdp_optimizer, world, 1, SAVED)
    d.save_shards(folder / "step-3", fsdp, fsdp_optimizer, SAVED, config={"d_model": 32}, numbers=torch.arange(3))
    found["fsdp"] += steps(fsdp, fsdp_optimizer, world, SAVED + 1, STEPS)
    found["fsdp_apart"] = furthest(whole(fsdp), whole(reference))
    found["held"] = sum(d.own_rows(p).numel() for p in fsdp.parameters()) / sum(p.numel() for p in reference.parameters())

    again = d.distribute_model(TransformerLM(CONFIG), world, "fsdp")
    again_optimizer = adamw(again)
    state = d.load_shards(folder / "step-3", again, again_optimizer)
    assert state["iteration"] == SAVED and state["config"] == {"d_model": 32} and state["numbers"].tolist() == [0, 1, 2]
    found["resumed"] = steps(again, again_optimizer, world, SAVED + 1, STEPS)
    found["resumed_apart"] = furthest(whole(again), whole(fsdp))
    to_ddp = d.distribute_model(TransformerLM(CONFIG), world, "ddp")
    d.load_shards(folder / "step-3", to_ddp, to_ddp_optimizer := adamw(to_ddp))
    found["to_ddp"] = steps(to_ddp, to_ddp_optimizer, world, SAVED + 1, STEPS)

    for kind in d.STRATEGIES:
        call = d.distribute_model(d.ModelCall(fresh()), world, kind)
        call_optimizer = adamw(call)
        found[f"call_{kind}"] = steps(call, call_optimizer, world, 1, SAVED, loss_of=lambda m, x, y: m(reaching_loss, x, y))
        d.save_shards(folder / f"call-{kind}", call, call_optimizer, SAVED)
        d.load_shards(folder / f"call-{kind}", other := d.distribute_model(TransformerLM(CONFIG), world, "fsdp"), other_optimizer := adamw(other))
        found[f"call_{kind}"] += steps(other, other_optimizer, world, SAVED + 1, STEPS)

    from_one = d.distribute_model(TransformerLM(CONFIG), world, "fsdp")
    d.load_shards(folder / "one", from_one, from_one_optimizer := adamw(from_one))
    found["from_one"] = steps(from_one, from_one_optimizer, world, SAVED + 1, STEPS)

    gathered = d.gather_state(again, again_optimizer)
    if world.writes: torch.save(gathered, folder / "gathered.pt")
    for kind in ("fsdp", "ddp"):
        spread = d.distribute_model(TransformerLM(CONFIG), world, kind)
        d.spread_state(gathered, spread, spread_optimizer := adamw(spread))
        found[f"spread_{kind}"] = furthest(whole(spread), whole(fsdp))
        found[f"after_spread_{kind}"] = steps(spread, spread_optimizer, world, STEPS + 1, STEPS + 1)
    found["after"] = steps(fsdp, fsdp_optimizer, world, STEPS + 1, STEPS + 1)

    _, _, found["tied_alone"] = alone(TIED)
    tied = d.distribute_model(fresh(TIED), world, "fsdp")
    found["tied"] = steps(tied, tied_optimizer := adamw(tied), world, 1, SAVED)
    d.save_shards(folder / "tied", tied, tied_optimizer, SAVED)
    d.load_shards(folder / "tied", tied, tied_optimizer)
    found["tied"] += steps(tied, tied_optimizer, world, SAVED + 1, STEPS)
    found["sent"] = sent(world)
    found["votes"] = [d.any_rank(world.rank == 1), d.any_rank(False)]
    return found


def main() -> None:
    folder, end = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    with d.processes("cpu", timeout=60) as world:
        if end == "raise":
            if world.rank == 1: raise ValueError("the third row is\nnot a row")
            torch.distributed.barrier()
        found = checks(world, folder) | {"failures": failures(world, folder)}
        (folder / f"found-{world.rank}.json").write_text(json.dumps(found))
        torch.distributed.barrier()
        if world.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.barrier()


if __name__ == "__main__": main()
