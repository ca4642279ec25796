"""What the project says of itself: pins, commands, import time, one-way imports."""

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from paths import ROOT

from luffy.cli import main
from luffy.runs import RunDirectory


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


def test_every_module_can_be_imported():
    import importlib

    import paper_figures

    for path in [*FILES, *sorted(Path(paper_figures.__file__).parent.glob("*.py"))]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith(("__main__", "deepspeed_engine", "gloo")):  # (the last two import an extra)
            importlib.import_module(name)


def test_everything_exported_exists():
    import luffy

    for name in luffy.__all__:
        assert getattr(luffy, name) is not None
    with pytest.raises(AttributeError):
        luffy.nothing  # noqa: B018


# From the bottom up: a room may import those before it. Within a room there must be no circle.
ROOMS = (
    "errors", "shaping", "objective", "display", "methods", "config", "runs", "verifier", "data", "model", "sampling",
    "evaluation", "training", "study", "cli",
)  # fmt: skip
LUFFY = ROOT / "luffy"
FILES = [path for path in sorted(LUFFY.rglob("*.py")) if path != LUFFY / "__init__.py"]


def imports_of(path):
    """The modules of luffy that a file imports, as ("room", "module") or ("room", ""); those for types alone apart."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    here = list(path.relative_to(LUFFY).with_suffix("").parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in for_types:
            base = [*here[: len(here) - node.level], *((node.module or "").split(".") if node.module else [])]
            names = [alias.name for alias in node.names]
            for name in names:
                parts = [*base, name] if len(base) < 2 and (LUFFY.joinpath(*base, f"{name}.py").exists()) else base
                if not parts or parts == ["__version__"] or (len(base) == 0 and (LUFFY / name).is_dir()):
                    parts = [name]
                if parts[0] != "__version__":
                    yield parts[0], parts[1] if len(parts) > 1 else ""


def room_of(path):
    """A file's, or folder's, first part within luffy."""
    return path.relative_to(LUFFY).with_suffix("").parts[0]


def test_rooms_import_downwards():
    assert {room_of(path) for path in FILES} == set(ROOMS)
    seen = 0
    for path in FILES:
        room = room_of(path)
        for other, _ in imports_of(path):
            seen += 1
            assert ROOMS.index(other) <= ROOMS.index(room), f"{path.relative_to(LUFFY)} imports {other}"
    assert seen > 150


def test_no_circles_within_a_room():
    for room in (name for name in ROOMS if (LUFFY / name).is_dir()):
        after = {
            path.stem: {
                module for other, module in imports_of(path) if other == room and module and module != path.stem
            }
            for path in (LUFFY / room).glob("*.py")
            if path.stem != "__init__"
        }
        list(graphlib.TopologicalSorter(after).static_order())  # raises CycleError


def test_the_house_can_be_seen_at_a_glance():
    """At most 16 entries at the top, no file above 450 lines, and every room says in two lines what it is for."""
    entries = [path for path in LUFFY.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 16, sorted(path.name for path in entries)
    lengths = {path: len(path.read_text().splitlines()) for path in LUFFY.rglob("*.py")}
    assert max(lengths.values()) <= 450, max(lengths, key=lengths.get)
    assert lengths[LUFFY / "training" / "trainer.py"] <= 350
    for room in (path for path in entries if path.is_dir()):
        documentation = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
        assert len(documentation.splitlines()) == 2 and "ay import" in documentation, room


def test_the_trainer_knows_no_method():
    from luffy import METHODS

    for path in (LUFFY / "training" / f"{name}.py" for name in ("trainer", "collect", "update", "metrics", "engine")):
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        assert not set(METHODS) & {value for value in strings if isinstance(value, str)}, path


def test_help_lists_every_field():
    done = subprocess.run([sys.executable, "-m", "luffy.cli", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for flag in ("--gamma", "--num-off-policy", "--learning-rate", "--run-dir", "--config"):
        assert flag in done.stdout


def test_command_line_trains(tmp_path):
    flags = "--method mixed --steps 2 --seed 3 --rollout-batch-size 2 --mini-batch-size 2 --eval-steps 0 --gamma 0.2"
    flags += " --final-eval-problems 2 --final-eval-samples 1 --num-problems 8"
    command = [sys.executable, "-m", "luffy.cli", "train", *flags.split(), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2/2: reward" in done.stderr
    run = RunDirectory(tmp_path / "run")
    assert run.is_complete and run.config().method.gamma == 0.2 and run.config().seed == 3
    main(command[3:])  # complete: nothing left to do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--steps", "0", "--run-dir", "x"], "max_steps must be greater than 0"),
        (["train", "--method", "lufy", "--run-dir", "x"], "no method 'lufy'"),
        (["train", "--steps", "3"], "--run-dir"),
        (["train", "--config", "missing.yaml", "--run-dir", "x"], "cannot read the configuration"),
        (["resume", "nowhere"], "not a run directory"),
        (["train", "--dataset", "missing.jsonl", "--run-dir", "x"], "no data file missing.jsonl"),
        (["train", "--model", "./missing", "--run-dir", "x"], "no model './missing'"),
    ],
)
def test_bad_calls_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = f"{ended.value} {capsys.readouterr().err}"
    assert ended.value.code not in (0, None) and message in shown and "Traceback" not in shown
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_bad_call_of_the_command(tmp_path):
    command = [sys.executable, "-m", "luffy.cli", "resume", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "luffy: nowhere is not a run directory: it has no config.json\n"
