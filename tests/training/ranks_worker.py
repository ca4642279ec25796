"""Trains several configurations one after the other in the ranks that a launcher has started (tests/test_deepspeed.py).

`python ranks_worker.py JOBS.json`: a list of [run directory, method, fields]. The field "gather_all" is for this
script: ZeRO 3 then shards parameters of every size, as it does those of large models.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from luffy import make_config, train
from luffy.runs import RunDirectory
from luffy.training import deepspeed_engine


def sharded(settings):
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


if __name__ == "__main__":
    usual = deepspeed_engine.settings
    for folder, method, values in json.loads(Path(sys.argv[1]).read_text()):
        gather_all = values.pop("gather_all", False)
        deepspeed_engine.settings = lambda config, every=gather_all: sharded(usual(config)) if every else usual(config)
        run = RunDirectory(folder)
        train(run.config() if not method else make_config(method, **values), folder)
    dist.barrier()
    dist.destroy_process_group()
