"""What the project says of itself: pins, commands, import time, one-way imports."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from luffy.runs import RunDirectory

ROOT = Path(__file__).resolve().parents[1]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    import yaml

    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    listed = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    return {normal(n): v for n, v in (line.split("==") for line in listed if "==" in line)}


def test_environment_pins_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert {normal(re.match(r"[\w.-]+", line)[0]) for line in direct} <= pins().keys()


@pytest.mark.skipif(not os.getenv("LUFFY_PINNED"), reason="only where the pinned versions were installed (CI)")
def test_environment_is_what_is_installed():
    installed = {normal(d.name): d.version.split("+")[0] for d in metadata.distributions()}
    ours = {"luffy", "pip", "setuptools", "wheel"}
    assert {name: version for name, version in installed.items() if name not in ours} == pins()


def test_readme_and_ci_use_the_same_test_command():
    command = 'pip install -e ".[test]" && pytest'
    assert command in (ROOT / "README.md").read_text()
    assert command.replace("install", "install -q") in (ROOT / ".ci" / "run").read_text()


def test_import_is_quick_and_light():
    """No torch, transformers or matplotlib at import; half a second at most (best of three, other work may be on)."""
    code = (
        "import time, sys; s = time.perf_counter(); import luffy; t = time.perf_counter() - s\n"
        "print(t, [m for m in ('torch', 'transformers', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    outputs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(3)]
    assert all(output.split(" ", 1)[1].strip() == "[]" for output in outputs)
    assert min(float(output.split()[0]) for output in outputs) < 0.5


def test_everything_exported_exists():
    import luffy

    for name in luffy.__all__:
        assert getattr(luffy, name) is not None
    with pytest.raises(AttributeError):
        luffy.nothing  # noqa: B018


def imports_of(module):
    tree = ast.parse((ROOT / "luffy" / f"{module}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def test_imports_point_one_way():
    for module in ("shaping", "notation", "hub", "batching"):
        assert imports_of(module) == set(), module
    assert imports_of("objective") == {"shaping"}
    assert imports_of("answers") == imports_of("expressions") == {"notation"}
    assert imports_of("readings") == {"answers", "expressions", "notation"}
    assert imports_of("verifier") == {"answers"}
    assert imports_of("grading") == {"answers", "notation", "verifier"}
    assert imports_of("data") == {"answers", "grading", "hub"}
    for module in (path.stem for path in (ROOT / "luffy").glob("*.py")):
        if module not in ("__init__", "trainer", "cli", "explore"):
            assert "trainer" not in imports_of(module), module


def test_help_lists_every_field():
    done = subprocess.run([sys.executable, "-m", "luffy", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for flag in ("--gamma", "--num-off-policy", "--learning-rate", "--run-dir", "--config"):
        assert flag in done.stdout


def test_command_line_trains(tmp_path):
    flags = "--method mixed --steps 2 --seed 3 --rollout-batch-size 2 --mini-batch-size 2 --eval-steps 0 --gamma 0.2"
    flags += " --final-eval-problems 2 --final-eval-samples 1 --num-problems 8"
    command = [sys.executable, "-m", "luffy", "train", *flags.split(), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2/2: reward" in done.stderr
    run = RunDirectory(tmp_path / "run")
    assert run.is_complete and run.config().gamma == 0.2 and run.config().seed == 3
    assert subprocess.run(command).returncode == 0  # complete: nothing left to do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--steps", "0", "--run-dir", "x"], "steps must be positive"),
        (["train", "--method", "lufy", "--run-dir", "x"], "no method 'lufy'"),
        (["train", "--steps", "3"], "--run-dir"),
        (["train", "--config", "missing.yaml", "--run-dir", "x"], "cannot read the configuration"),
        (["resume", "nowhere"], "not a run directory"),
        (["train", "--dataset", "missing.jsonl", "--run-dir", "x"], "no data file missing.jsonl"),
        (["train", "--model", "./missing", "--run-dir", "x"], "no model './missing'"),
    ],
)
def test_bad_calls_end_in_one_line(arguments, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "luffy", *arguments], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("checkpoints"))
