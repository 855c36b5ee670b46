"""What test_training_ranks.py starts on two processes with torchrun: `training_worker.py JOBS`, a JSON list of runs."""
import json, os, signal, sys

import torch

from cs336_lm import training
from cs336_lm.distributed import processes
from cs336_lm.training import config_from_dict, train

torch.set_num_threads(1)
plain_step = training.next_step

with processes("cpu") as world:
    for job in json.loads(sys.argv[1]):
        def step(run, job=job):
            plain_step(run)
            if world.rank == 1 and run.step == job.get("term_at"): signal.raise_signal(signal.SIGTERM)
            if world.rank == 1 and run.step == job.get("kill_at"): os.kill(os.getpid(), signal.SIGKILL)
        training.next_step = step
        result = train(config_from_dict(job["config"]), resume=job.get("resume", False), progress=False)
        if world.writes: print(json.dumps({"name": result.folder.name, "status": result.status, "reason": result.reason}), flush=True)
