"""What objects show of themselves in a notebook, and what the Tab key offers there."""

from html.parser import HTMLParser

import pytest

from luffy import METHODS, Evaluation, EvaluationConfig, benchmarks, display, make_config, train
from luffy.methods import Luffy
from luffy.runs import RunDirectory


class Table(HTMLParser):
    """Cells of a table, row by row, and what it links to."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.caption, self.inside = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1] += data
        else:
            self.caption += data

    @property
    def cells(self):
        return dict(self.rows)


def test_a_configuration_shows_what_differs():
    shown = Table(make_config("luffy", gamma=0.3, learning_rate=1e-4)._repr_html_())
    assert shown.caption == "Config"
    assert shown.cells.items() >= {"method": "LUFFY", "gamma": "0.3", "learning_rate": "0.0001", "seed": "0"}.items()
    assert "mini_batch_size" not in shown.cells and "num_off_policy" not in shown.cells  # as by default


def test_a_method_shows_its_fields():
    shown = Table(Luffy(gamma=0.2)._repr_html_())
    assert shown.caption == "LUFFY" and shown.cells["gamma"] == "0.2" and shown.cells["num_off_policy"] == "1"


def test_text_is_no_markup():
    shown = display.table("<b>", {"<i>": "<script>x</script>", "long": "x" * 200})
    assert "<script>" not in shown and "<i>" not in shown
    assert Table(shown).cells["<i>"] == "<script>x</script>" and len(Table(shown).cells["long"]) == 100


def test_a_run_and_an_evaluation_show_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory("run")
    assert Table(run._repr_html_()).cells == {"state": "not begun"}
    small = dict(rollout_batch_size=2, mini_batch_size=2, num_problems=4, eval_steps=0, final_eval_problems=2)
    train(make_config("luffy", max_steps=1, final_eval_samples=1, **small), "run")
    shown = Table(run._repr_html_())
    assert shown.cells["state"] == "complete, step 1 of 1" and shown.cells["method"] == "LUFFY"
    accuracy = run.evaluation()["averages"]["id"]
    assert shown.cells["accuracy, id"] == f"{100 * accuracy:.1f} %"
    assert "run/metrics.jsonl" in shown.links and all((tmp_path / link).exists() for link in shown.links)

    loaded = benchmarks.load(["chain"], limit=2)
    settings = EvaluationConfig(model="run", samples=2, max_completion_length=32, device="cpu", verifier_workers=1)
    evaluation = Evaluation(settings, loaded, "evaluations")
    assert Table(evaluation._repr_html_()).cells["scored"] == "0 of 2 problems"
    evaluation.run()
    shown = Table(evaluation._repr_html_())
    assert shown.cells["chain"] == f"avg@2 {100 * evaluation.results()['chain'].accuracy:.1f} %"
    assert any(link.endswith("scores.jsonl") for link in shown.links)


@pytest.mark.parametrize(
    ("code", "offered"),
    [
        ('luffy.METHODS["lu', {"luffy"}),
        ('luffy.make_config(luffy.METHODS["chord', {"chord_mu", "chord_phi"}),
        ('luffy.presets.PRESETS["paper', {"paper", "paper_1.5b", "paper_plus", "paper_7b_instruct", "paper_llama"}),
    ],
)
def test_tab_offers_methods_and_presets(code, offered):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("import luffy")
    _, found = shell.complete(code)
    assert {name.rpartition('"')[2].rstrip("]") for name in found} >= offered


def test_a_configuration_of_a_method_itself():
    assert make_config(METHODS["sft"]) == make_config("sft")
