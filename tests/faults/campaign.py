"""The fault campaign: `python tests/faults/campaign.py` tries some 1,760 faults and prints the table of
tests/faults/README.md, those of vLLM and its servers where vLLM and DeepSpeed are installed. `--only soak network`
runs some of its parts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from answers import HONEST, Case, boxed, honest, hostile, near_misses
from disk import damaged, damaged_cache, full, read_only, too_large
from jupyter_kernels import kernel_kills
from kills import KINDS, kills, second_start, verifier_kills
from outcome import Outcome, table
from soak import soak

from luffy.verifier import Verifier


def judged(cases: list[Case], right: bool) -> Iterator[Outcome]:
    """Answers by family: paid or not as they should be, none beyond its deadline."""
    with Verifier(workers=1, timeout_s=2, memory_mb=1024) as verifier:
        verifier.score([boxed("1/2")], ["0.5"])  # (its process starts)
        for case in cases:
            started = time.monotonic()
            (score,) = verifier.score([case.completion], [case.gold])
            seconds = time.monotonic() - started
            lost = "" if (score > 0) == right else "not paid" if right else "paid"
            lost = lost or ("" if seconds < 8 else f"took {seconds:.1f} s")
            yield Outcome(f"answers, {case.family}", f"{case.gold} / {case.completion[:80]!r}", lost)


def throughput(_: Path) -> Iterator[Outcome]:
    """Honest answers alone, and with a hostile one among fifty: until the last honest one is judged, with the usual
    time limit. (One among ten is told besides, and is no fault.)"""
    good, bad, rates = list(honest(1000)), list(hostile(6)), []
    for count in (0, 20, 100):
        mixed = list(good)
        for i in range(count):  # some of every family, at even distances
            mixed.insert(i * (len(good) // count + 1), bad[i * len(bad) // count])
        with Verifier(workers=2, memory_mb=1024) as verifier:
            verifier.score([case.completion for case in good[:20]], [case.gold for case in good[:20]])
            started = time.monotonic()
            verdicts = [verifier.submit(case.completion, case.gold) for case in mixed]
            for case, verdict in zip(mixed, verdicts, strict=True):
                if case.family.startswith(HONEST):
                    verdict.result()
            rates.append(len(good) / (time.monotonic() - started))
    lost = "" if rates[1] > rates[0] / 2 else "less than half"
    told = "alone {:.0f} a second, one hostile among fifty {:.0f}, among ten {:.0f}".format(*rates)
    print(told, file=sys.stderr)
    yield Outcome("honest answers a second beside hostile ones", told, lost)


PARTS: dict[str, Callable[[Path], Iterator[Outcome]]] = {
    **{f"kills-{kind}": lambda folder, kind=kind: kills(folder, 40, [kind]) for kind in KINDS},
    "starts": second_start,
    "verifier": lambda folder: verifier_kills(folder, 20),
    "notebook": lambda folder: kernel_kills(folder, 10),
    "limits": lambda folder: too_large(folder, 60),
    "full": lambda folder: full(folder, 20),
    "readonly": lambda folder: read_only(folder, 5),
    "damage": lambda folder: damaged(folder, 60),
    "cache": lambda folder: damaged_cache(folder, 200),
    "hostile": lambda _: judged(list(hostile(24)), right=False),
    "near": lambda _: judged(list(near_misses(22)), right=False),
    "honest": lambda _: judged(list(honest(300)), right=True),
    "throughput": throughput,
    "soak": lambda folder: soak(folder, 2000, in_notebook=True),
}
if find_spec("vllm") and find_spec("deepspeed"):
    from engines import network, server_kills, slice_kills, vllm_kills

    PARTS |= {
        "vllm": lambda folder: vllm_kills(folder, 10),
        "servers": lambda folder: server_kills(folder, 10),
        "slices": lambda folder: slice_kills(folder, 6),
        "network": network,
        "soak-vllm": lambda folder: soak(folder, 200, "soak with vLLM", sampler="vllm"),
    }


def tried(name: str) -> list[Outcome]:
    """A part, in a process of its own."""
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = list(PARTS[name](Path(folder)))
    lost = sum(bool(outcome.lost) for outcome in found)
    seconds = time.monotonic() - started
    print(f"{name}: {len(found)} tried, {lost} lost, {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS), help="some of the parts")
    parser.add_argument("--at-once", type=int, default=2, help="parts that run at the same time, one core each")
    chosen = parser.parse_args()
    together = [name for name in chosen.only if name != "throughput"]
    with ProcessPoolExecutor(chosen.at_once, get_context("spawn"), max_tasks_per_child=1) as pool:
        found = [outcome for part in pool.map(tried, together) for outcome in part]
    if "throughput" in chosen.only:  # which needs the machine for itself
        found += tried("throughput")
    print(table(found))
    print("".join(f"\n{outcome.kind}: {outcome.fault}" for outcome in found if outcome.kind.startswith("soak")))
    sys.exit(any(outcome.lost for outcome in found))


if __name__ == "__main__":
    main()
