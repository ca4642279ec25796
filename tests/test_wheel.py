"""The wheel that is built from the tree holds every file of the package, and works where nothing else of it is."""

import subprocess
import sys
import sysconfig
import zipfile

import pytest
from paths import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("luffy-*.whl")
    return made


def test_the_wheel_holds_every_file(wheel):
    listing = ["git", "ls-files", "luffy", "paper_figures"]
    tracked = subprocess.run(listing, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    expected = {name for name in tracked.splitlines() if (ROOT / name).exists()}
    assert len(expected) > 120 and expected <= set(zipfile.ZipFile(wheel).namelist())


def test_it_trains_two_steps_in_a_fresh_environment(wheel, tmp_path):
    """A new virtual environment with this wheel; the packages it depends on are borrowed from the one of the tests,
    whose own luffy is not found there."""
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = subprocess.run(
        [str(python), "-c", "import luffy; print(luffy.__file__)"], capture_output=True, text=True, cwd=tmp_path
    ).stdout
    assert str(site) in where
    flags = "--steps 2 --num-problems 8 --rollout-batch-size 2 --mini-batch-size 2 --eval-problems 2 --save-steps 2"
    flags += " --final-eval-problems 2 --final-eval-samples 1 --run-dir run --method luffy --seed 1"
    done = subprocess.run(
        [str(python), "-m", "luffy.cli", "train", *flags.split()], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "evaluation.json").is_file()
    preset = [str(python), "-m", "luffy.cli", "plan", "paper"]
    assert "7.62B parameters" in subprocess.run(preset, capture_output=True, text=True, cwd=tmp_path).stdout
    numbers = "from luffy import read_published; print(len(read_published('table1')))"
    assert int(subprocess.run([str(python), "-c", numbers], capture_output=True, text=True, cwd=tmp_path).stdout) > 20
    copying = [str(python), "-m", "luffy.cli", "notebooks", "copies"]
    copied = subprocess.run(copying, capture_output=True, text=True, cwd=tmp_path)
    assert copied.returncode == 0, copied.stderr
    names = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {path.name for path in (tmp_path / "copies").glob("*.ipynb")} == names
    assert (tmp_path / "copies" / "pictures" / "map.png").is_file()
    again = subprocess.run(copying, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 1 and "has ablation.ipynb" in again.stderr and "Traceback" not in again.stderr
