"""Every command of every README: run here in small, or its flags checked and the reason said why it is not run.

`pytest -m commands` runs them (CI does); the default tests look whether each is known and its flags exist.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from luffy.cli import main, parse_train

TINY = dict(max_steps=2, rollout_batch_size=2, mini_batch_size=2, num_problems=8, eval_steps=1, eval_problems=2)
TINY |= dict(final_eval_problems=2, final_eval_samples=1)
SMALL = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in TINY.items())
HUB, GPUS, CI = "needs the hub", "needs GPUs", "CI runs it"

# (how a command begins, what is added where it is run, or why it is not); the first that fits counts
RUN: list[tuple[str, str]] = [
    ("luffy train --method gated:gated", SMALL),
    ("luffy train --method luffy --steps 200", SMALL),  # (the last of repeated flags counts)
    ("luffy resume runs/mine", ""),
    ("luffy evaluate --models tiny:own_share=0.4 runs/mine", "--limit 2 --samples 1"),
    ("luffy arena --methods luffy hpt", f"--values '{json.dumps(TINY)}'"),
    ("luffy plan paper", ""),
    ("python -m paper_figures figure2 table4", ""),
]
NOT_RUN: list[tuple[str, str]] = [
    ('pip install -e ".[test', CI),
    ("pip install -e . &&", "its parts are run: the tests are in such an environment, the notebook is the smoke one"),
    ("pre-commit install", "changes the clone"),
    (".ci/run", "runs these tests"),
    ("nox ", CI),
    ("pytest tests/training/test_deepspeed.py", CI),
    ("papermill notebooks/ablation.ipynb smoke.ipynb", CI),
    ("papermill notebooks/figures.ipynb", CI),
    ("papermill notebooks/evaluate.ipynb", HUB),
    ("luffy data ", HUB),
    ("luffy train --config mine.yaml", HUB),
    ("luffy train --config paper", GPUS),
    ("luffy resume runs/luffy --nproc 8", GPUS),
    ("luffy evaluate --model runs/luffy", GPUS),
    ("luffy serve", GPUS),
    ("python -m paper_figures figure5 --runs", "tests/test_paper_figures.py draws from run directories"),
    ("python -m paper_figures.make_runs", "hours; tests/test_make_runs.py makes small ones"),
    ("python -m paper_figures.baselines --accept", "rewrites what is committed; CI compares with it"),
    ("for host in", "needs several machines"),
    ("ssh ", "needs several machines"),
    ("done; wait", "needs several machines"),
    ("head=$(scontrol", "needs Slurm"),
    ("srun ", "needs Slurm"),
]


def read(name):
    return (ROOT / name).read_text()


def documents():
    listed = subprocess.run(["git", "ls-files", "*.md"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def commands():
    """Every line of every block of shell, without its comment, lines that go on joined."""
    found = []
    for name in documents():
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", read(name), re.S):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [(name, re.sub(r"\s+#.*", "", line).strip()) for line in lines]
    return [(name, line) for name, line in found if line and not line.startswith("#")]


def fitting(line, table):
    return next((said for begin, said in table if line.startswith(begin)), None)


def test_every_command_is_run_or_has_a_reason():
    found = commands()
    assert len(found) > 30 and {"README.md", "CONTRIBUTING.md", "luffy/training/CLUSTER.md"} <= {f for f, _ in found}
    for name, line in found:
        known = [table for table in (RUN, NOT_RUN) if fitting(line, table) is not None]
        assert len(known) == 1, f"{name}: {line}"
    for begin, _ in (*RUN, *NOT_RUN):
        assert any(line.startswith(begin) for _, line in found), f"{begin!r} stands nowhere any more"


def ours(line):
    """The words of a command of luffy that a line holds, if it does."""
    found = re.search(r"(?:^|[\s\"])luffy ((?:train|resume|evaluate|arena|plan|serve|data|notebooks)\b.*)", line)
    if not found:
        return []
    words = found.group(1).split(" &&")[0].removesuffix("&").strip()
    if words.count('"') % 2:  # the command stands in quotes itself
        words = words.removesuffix('"')
    return shlex.split(words.replace("$head", "head").replace("$SCRATCH", "scratch"))


@pytest.mark.parametrize(("name", "line"), [pair for pair in commands() if ours(pair[1])])
def test_its_flags_exist(name, line, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ours(line)
    if words[0] == "train":
        config, run_dir, _ = parse_train(words[1:])
        assert run_dir.name in line and config.max_steps > 0
        return
    command = words[: 2 if words[0] == "data" else 1]
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    shown = capsys.readouterr().out
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word)}\b", shown), word


def prepare(folder):
    """What the commands of READMEs find in the current folder: its own examples, and the notebooks."""
    method = re.search(r"```python\n(from luffy\.methods import.*?)```", read("CONTRIBUTING.md"), re.S).group(1)
    (folder / "gated.py").write_text(method)
    mine = re.search(r"```yaml\n(.*?)```", read("luffy/study/presets/README.md"), re.S).group(1)
    (folder / "mine.yaml").write_text(mine)
    for name in ("notebooks", "paper_figures", "tests"):
        (folder / name).symlink_to(ROOT / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("commands")
    prepare(made)
    return made


@pytest.mark.commands
@pytest.mark.parametrize(("name", "line"), [pair for pair in commands() if fitting(pair[1], RUN) is not None])
def test_it_runs(name, line, folder):
    """In the order in which a reader meets them, in one folder."""
    python = Path(sys.executable).parent
    command = f"{line} {fitting(line, RUN)}"
    environment = {"PATH": f"{python}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.commands
@pytest.mark.parametrize("name", [name for name in documents() if "```python" in read(name)])
def test_its_python_runs(name, folder):
    """Blocks of Python in the order of the text, in the folder of the commands; one that trains takes two steps."""
    blocks = re.findall(r"```python\n(.*?)```", read(name), re.S)
    code = "\n".join(blocks).replace("max_steps=200, gamma=0.3", "max_steps=2, gamma=0.3, final_eval_problems=2")
    code = code.replace("runs/mine", "runs/python")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_links_lead_somewhere():
    for name in documents():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", read(name)):
            if not re.match(r"https?://", target):
                assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"


def test_pictures_have_a_text():
    for name in documents():
        for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", read(name)):
            assert len(text.split()) >= 4, f"{name}: {target}"


def test_the_readme_is_short():
    assert len(read("README.md").split()) <= 1200
