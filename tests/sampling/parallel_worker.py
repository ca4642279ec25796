"""Two ranks with one vLLM engine, as test_tensor_parallel.py starts them: after each of three updates, greedy tokens
and log-probs; then a member of the group is killed while it generates, and the work done again. Writes what the leader
has found."""

import os
import signal
import sys
import threading
from pathlib import Path

import torch
from helpers import listening, trained_logprobs
from vllm_runs import EOS, moved, options, requests, sample, tokens, weights

from luffy import make_config
from luffy.model.loading import TINY_MODEL, load_model
from luffy.sampling.local import TransformersSampler
from luffy.sampling.ranks import join
from luffy.sampling.tensor_parallel import TensorParallelSampler
from luffy.training.clock import Clock
from luffy.training.restart import Restarting


def main() -> None:
    ranks = join(make_config("luffy", engine="deepspeed", device="cpu"))
    model = load_model("tiny", device="cpu").eval()
    settings = options(TINY_MODEL, tensor_parallel_size=2, tensor_parallel_rank=ranks.rank)
    sampler = TensorParallelSampler(settings, ranks.neighbours(2), timeout_s=600)
    using = Restarting(sampler, lambda: weights(model), ranks, Clock(), together=2)
    plain = TransformersSampler(model, eos_ids=[EOS], pad_id=0)
    reqs, found = requests(), []

    def work(sampler):
        return [sample(sampler, reqs, temperature=t) for t in (0.0, 0.7)]

    for update in range(4):
        moved(model, update)
        if update == 3 and not ranks.first:
            killed_when_asked(sampler)
        result = using.use(work, list)
        if ranks.first:
            greedy, drawn = result
            same = tokens(greedy) == [r.token_ids.tolist() for r in sample(plain, reqs, temperature=0.0)]
            ours = torch.tensor([logp for r in drawn for logp in r.logprobs])
            found.append((same, (ours - trained_logprobs(model, reqs, drawn, 0.7)).abs().max().item()))
    if ranks.first:
        Path(sys.argv[1]).write_text(repr([found, using.restarted, listening(sampler.sampler.child.pid)]))
    using.close()


def killed_when_asked(sampler):
    """The follower's child stops as requests come, and is killed while the leader's waits for its part of them."""
    follow = sampler.follow

    def stopped():
        child, sampler.follow = sampler.sampler.child, follow
        child.send_signal(signal.SIGSTOP)
        threading.Timer(2.0, child.kill).start()
        follow()

    sampler.follow = stopped


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
