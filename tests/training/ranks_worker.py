"""Trains several configurations one after the other in the ranks that a launcher has started (tests/test_deepspeed.py).

`python ranks_worker.py JOBS.json`: a list of [run directory, method, fields].
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from luffy import make_config, train
from luffy.runs import RunDirectory

if __name__ == "__main__":
    for folder, method, values in json.loads(Path(sys.argv[1]).read_text()):
        run = RunDirectory(folder)
        train(run.config() if not method else make_config(method, **values), folder)
    dist.barrier()
    dist.destroy_process_group()
