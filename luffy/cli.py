"""The command line: `luffy train` and `luffy evaluate` (every field of their configurations is a flag), `luffy resume
DIR`, `luffy plan` (will it fit), `luffy data` (OpenR1-Math to training sets), `luffy serve` (vLLM for others).

The exit code is 0 only if the run, or the evaluation, is complete.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from . import hub, methods
from .config import TINY, Config, ConfigError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="luffy", description="Learning to reason under off-policy guidance.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="start a run, or go on with it", add_help=False)
    train.add_argument("rest", nargs=argparse.REMAINDER)
    commands.add_parser("evaluate", help="ask models the problems of benchmarks, or go on with it", add_help=False)
    resume = commands.add_parser("resume", help="go on with the run in a directory")
    resume.add_argument("run_dir", type=Path)
    resume.add_argument("--nproc", type=int, default=1, help="processes (GPUs) of engine deepspeed on this machine")
    plan = commands.add_parser("plan", help="estimate memory and time of a configuration; nothing is loaded")
    plan.add_argument("config", help="a name of luffy/configs, or a YAML or JSON file with fields")
    plan.add_argument("--method", help="one of the nine methods; default: the file's, or luffy")
    plan.add_argument("--gpus", type=int, default=8, help="ranks")
    plan.add_argument("--gpu", choices=("a100", "h100", "h200", "a40"), default="a100")
    plan.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of a GPU")
    plan.add_argument("--mean-length", type=int, default=0, help="tokens of a completion; 0: 27%% of the window")
    data = commands.add_parser("data", help="prepare training data, or a base model with a long context")
    kinds = data.add_subparsers(dest="kind", required=True)
    openr1 = kinds.add_parser("openr1", help="OpenR1-Math to training set, complement and SFT file")
    openr1.add_argument(
        "--source", default="open-r1/OpenR1-Math-220k", help='hub name, file in its schema, or "example"'
    )
    openr1.add_argument("--tokenizer", required=True, help="the student: a folder or hub name, or tiny")
    openr1.add_argument(
        "--set", choices=("full", "easy", "hard"), default="full", help="traces up to 8,192, 2,048, 4,096"
    )
    openr1.add_argument("--max-trace-tokens", type=int, default=0, help="another longest trace")
    openr1.add_argument("--num-traces", type=int, default=1, help="traces kept per problem")
    openr1.add_argument("--drop-repeated", action="store_true", help="a problem of several rows once, not in each")
    openr1.add_argument("--limit", type=int, default=0, help="rows read; 0: all")
    openr1.add_argument("--out", type=Path, required=True)
    longer = kinds.add_parser("extend-context", help="a model's folder with rope_theta 40,000 and 16,384 positions")
    longer.add_argument("--model", required=True)
    longer.add_argument("--rope-theta", type=float, default=40_000.0)
    longer.add_argument("--positions", type=int, default=16_384)
    longer.add_argument("--out", type=Path, required=True)
    serve = commands.add_parser("serve", help="generate with vLLM for trainers elsewhere (vllm_servers)")
    serve.add_argument("--model", required=True, help="the trainers' base model: a folder or hub name")
    serve.add_argument("--address", default="127.0.0.1:8765", help="host:port to listen on")
    serve.add_argument("--max-model-len", type=int, required=True, help="max_prompt_length + max_completion_length")
    serve.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    serve.add_argument("--gpu-memory", type=float, default=0.9, help="share of the GPU's memory")
    serve.add_argument("--cache-mb", type=int, default=0, help="size of the key-value cache; 0: what there is")
    serve.add_argument("--max-rows", type=int, default=512, help="completions at once")
    parser.add_argument("--version", action="version", version=_version())
    raw = sys.argv[1:] if arguments is None else arguments
    # tyro parses the flags of these two; argparse would want to know them
    if raw[:1] == ["train"]:
        _run(lambda: _train(raw[1:]))
    elif raw[:1] == ["evaluate"]:
        _run(lambda: _evaluate(raw[1:]))
    else:
        parsed = parser.parse_args(raw)
        commands_by_name = {"resume": _resume, "plan": _plan, "data": _data, "serve": _serve}
        _run(lambda: commands_by_name[parsed.command](parsed))


def _version() -> str:
    from . import __version__

    return f"luffy {__version__}"


def parse_train(arguments: list[str]) -> tuple[Config, Path, int]:
    """The configuration, run directory and number of processes that the flags of `luffy train` say: method, then file,
    then flags."""
    before = argparse.ArgumentParser(prog="luffy train", add_help=False, allow_abbrev=False)
    before.add_argument("--config", help="a name of luffy/configs, or a YAML or JSON file with fields")
    before.add_argument("--run-dir", "--run_dir", type=Path)
    before.add_argument("--method")
    before.add_argument("--nproc", type=int, default=1)
    before.add_argument("--template-kwargs", "--template_kwargs", default=None)
    known, rest = before.parse_known_args(arguments)
    base = _read_config(known.config, known.method)

    import tyro

    description = (
        "Trains one run. Besides the fields below: --run-dir DIR (required), --config FILE (YAML or JSON with fields) "
        "and --nproc N (processes of engine deepspeed, one per GPU). "
        f"Methods: {', '.join(methods.METHODS)}. The defaults shown are those of {base.method}."
    )
    parsed = tyro.cli(Config, args=rest, default=base, prog="luffy train", description=description)
    if known.run_dir is None:
        raise ConfigError("--run-dir DIR is missing: where the run is to be written")
    values = parsed.to_dict()
    if known.template_kwargs is not None:
        values["template_kwargs"] = known.template_kwargs
    config = methods.make_config(**values)
    if known.nproc > 1 and config.engine != "deepspeed":
        raise ConfigError(f"--nproc {known.nproc} needs engine deepspeed")
    return config, known.run_dir, known.nproc


def _read_config(path: str | None, method: str | None) -> Config:
    """The configuration of a file, by name or path, and a method; the file may name the method too."""
    if path is None:
        return methods.make_config(method or "luffy")
    method = method or methods.read_values(path, "").get("method", "luffy")
    return methods.make_config(**{**methods.read_values(path, method), "method": method})


def _train(arguments: list[str]) -> None:
    config, run_dir, nproc = parse_train(arguments)
    _check_models([config.model])
    from .runs import RunDirectory, make_manifest

    if nproc > 1:
        RunDirectory(run_dir).start(config, make_manifest(config.seed))
        _launch(run_dir, nproc)
    from .trainer import train

    train(config, run_dir)


def _check_models(models: list[str]) -> None:
    """Raises ConfigError for a model that is nowhere, before what takes seconds to import and before a run is begun."""
    for model in models:
        try:
            if model != TINY:
                hub.check_model(model)
        except hub.NotFoundError as error:
            raise ConfigError(f"no model {model!r}: {error}") from error


def _launch(run_dir: Path, nproc: int) -> NoReturn:
    """Goes on as torch's launcher of `nproc` processes that train the run in a directory."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    os.execv(sys.executable, [*launcher, "-m", "luffy", "resume", str(run_dir)])


def _evaluate(arguments: list[str]) -> None:
    """Evaluates and writes the tables beside the evaluations."""
    before = argparse.ArgumentParser(prog="luffy evaluate", add_help=False, allow_abbrev=False)
    before.add_argument("--models", "--model", nargs="+", default=["tiny"])
    before.add_argument("--benchmarks", nargs="+", default=["tinyworld"])
    before.add_argument("--out-dir", "--out_dir", type=Path, default=Path("runs/evaluate"))
    before.add_argument("--limit", type=int, default=0)
    before.add_argument("--against", default="")
    before.add_argument("--option-seed", "--option_seed", type=int, default=0)
    before.add_argument("--template-kwargs", "--template_kwargs", default={})
    known, rest = before.parse_known_args(arguments)
    _check_models(known.models)

    import tyro

    import paper_figures

    from . import benchmarks, tables
    from .eval_runs import EvaluationConfig, evaluate_models

    description = (
        "Asks models the problems of benchmarks. Besides the fields below: --models MODEL ... (folders, hub names, run "
        "directories), --benchmarks NAME ... (files, hub names, tinyworld, "
        f"{', '.join(name for name, b in benchmarks.BENCHMARKS.items() if b.hub)}), --limit N (problems of each), "
        "--against LABEL (the model that the others are compared with), --option-seed N (order of multiple-choice "
        "options), --out-dir DIR."
    )
    config = tyro.cli(EvaluationConfig, args=rest, prog="luffy evaluate", description=description)
    loaded = benchmarks.load(known.benchmarks, limit=known.limit, option_seed=known.option_seed)
    settings = {name: value for name, value in config.to_dict().items() if name != "model"}
    settings["template_kwargs"] = known.template_kwargs
    evaluations = evaluate_models(known.models, loaded, known.out_dir, **settings)
    frames = tables.report(evaluations, loaded, paper_figures.read_published("table1"), against=known.against)
    tables.write(frames, known.out_dir)
    print(frames["table"].to_markdown())


def _resume(flags: argparse.Namespace) -> None:
    if flags.nproc > 1:
        _launch(flags.run_dir, flags.nproc)
    from .trainer import resume

    resume(flags.run_dir)


def _plan(flags: argparse.Namespace) -> None:
    """Exits with an error if the plan is impossible."""
    from .plan import plan

    made = plan(
        _read_config(flags.config, flags.method),
        ranks=flags.gpus,
        gpu=flags.gpu,
        gpu_memory=flags.gpu_memory,
        mean_length=flags.mean_length,
    )
    print(made.table())
    if made.problems:
        raise ConfigError("this does not fit")


def _data(flags: argparse.Namespace) -> None:
    from . import openr1
    from .engine import load_tokenizer

    if flags.kind == "extend-context":
        openr1.extend_context(
            flags.model, flags.out, rope_theta=flags.rope_theta, max_position_embeddings=flags.positions
        )
        return
    openr1.write(
        flags.source,
        flags.out,
        load_tokenizer(flags.tokenizer),
        max_trace_tokens=flags.max_trace_tokens or openr1.SETS[flags.set],
        num_traces=flags.num_traces,
        limit=flags.limit,
        drop_repeated=flags.drop_repeated,
    )


def _serve(flags: argparse.Namespace) -> None:
    import torch

    from .engine import eos_ids, load_tokenizer, model_path
    from .vllm_worker import VLLMOptions, serve

    key = os.environ.get("LUFFY_SERVE_KEY", "")
    if not key:
        raise ConfigError(
            "set LUFFY_SERVE_KEY to a secret, here and for the trainer: whoever knows it can run code here"
        )
    host, _, port = flags.address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--address is host:port, not {flags.address!r}")
    options = VLLMOptions(
        model=model_path(flags.model),
        eos_ids=tuple(eos_ids(flags.model, load_tokenizer(flags.model))),
        max_model_len=flags.max_model_len,
        dtype=flags.precision,
        device="cuda" if torch.cuda.is_available() else "cpu",
        gpu_memory=flags.gpu_memory,
        cache_mb=flags.cache_mb,
        max_rows=flags.max_rows,
    )
    serve(options, host, int(port), key.encode())


def _run(command: Any) -> None:
    if {"-h", "--help"} & set(sys.argv):  # `luffy train --help | head` ends where its reader does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from .data import DataError
    from .runs import RunError
    from .templates import TemplateError

    try:
        command()
    except (ConfigError, DataError, RunError, TemplateError) as error:  # anything else keeps its traceback
        sys.exit(f"luffy: {error}")
