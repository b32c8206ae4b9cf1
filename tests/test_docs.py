"""What the documentation shows is run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlflow
import nbformat
import pandas as pd
import pytest
from conftest import small_settings

from benchmarks import ladder, notebooks
from benchmarks.pages import RUNS_COLUMNS
from dann_experiments import DomainAdaptationMethod, InputError, adapt, load_config
from dann_experiments.names import metric_table

PROJECT = Path(__file__).parents[1]


@pytest.mark.usefixtures("pretrained_place")
def test_the_documented_method_adapts(workplace, squares, monkeypatch):
    text = (PROJECT / "docs" / "your-own-method.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (workplace / "my_methods.py").write_text(code.group(1))
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.setenv("PYTHONPATH", ".")
    settings = small_settings(
        squares,
        domain_adaptation__method__class_path="my_methods.MeanAlignment",
        domain_adaptation__method__init_args={"weight": 0.1},
    )
    result = adapt(load_config(None, settings))
    client = mlflow.MlflowClient(tracking_uri=result.tracking_uri)
    assert len(client.get_metric_history(result.run_id, "da/mean_distance")) == 8
    assert client.get_run(result.run_id).data.tags["dann.method"] == "MeanAlignment"
    wrong = {**settings, "domain_adaptation.method.init_args": {"wait": 1}}
    with pytest.raises(InputError, match="refuses init_args"):
        adapt(load_config(None, wrong))
    del sys.modules["my_methods"]


class NeedsDecoder(DomainAdaptationMethod):
    """A method that wants a layer which the settings do not capture."""

    feature_layers = ("decoder",)

    def loss(self, outputs, progress):
        raise AssertionError("never reached")


def test_a_method_that_needs_a_layer_nobody_captures_is_refused(workplace, squares):
    settings = small_settings(squares, domain_adaptation__method__class_path=f"{__name__}.NeedsDecoder")
    with pytest.raises(InputError, match=r"feature_layers .*decoder"):
        adapt(load_config(None, settings))


@pytest.mark.parametrize("notebook", sorted((PROJECT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(notebook):
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


def test_files_and_links_that_the_documentation_names_exist():
    for document in [PROJECT / "README.md", *PROJECT.glob("docs/**/*.md")]:
        text = document.read_text()
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


RUN_ID = re.compile(r"\b(?=[0-9]*[a-f])(?=[a-f]*[0-9])(?:[0-9a-f]{8}|[0-9a-f]{32})\b")
"""A whole id, or the eight characters that name a run for short; numbers of eight digits are none."""


@pytest.mark.parametrize("text", ["run c901edc9 of", "| 6df97cc0 2c877e23 |", "`5bded97e392c4396b2264b74211d0456`"])
def test_a_run_id_is_recognized(text):
    assert RUN_ID.search(text)


def test_run_ids_are_in_tables_of_their_own_and_not_in_prose():
    for document in [PROJECT / "README.md", *PROJECT.glob("docs/**/*.md")]:
        assert RUN_ID.findall(document.read_text()) == [], f"{document.name}: move it to docs/results_runs.csv"


def test_each_row_of_run_ids_names_a_page_that_links_to_it_and_a_run():
    table = pd.read_csv(PROJECT / "docs" / "results_runs.csv", dtype=str)
    assert list(table.columns) == RUNS_COLUMNS
    assert table["run_id"].str.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{32}").all()
    for page in table["page"].unique():
        assert "(results_runs.csv)" in (PROJECT / "docs" / page).read_text(), page


def shown_by(folder: Path, name: str) -> dict[str, dict[str, str]]:
    """Source of each cell that ended with an output -> that output: `text` if it was printed, else by type."""
    cells = nbformat.read(folder / f"{name}.ipynb", as_version=4).cells
    return {
        cell.source: cell.outputs[-1].get("data") or {"text": cell.outputs[-1].text}
        for cell in cells
        if cell.cell_type == "code" and cell.outputs
    }


def output(shown: dict[str, dict[str, str]], words: str) -> dict[str, str]:
    (found,) = [content for source, content in shown.items() if words in source]
    return found


@pytest.mark.slow
def test_the_notebooks_run_and_show_what_they_promise():
    """With the settings that a reader has; `make notebooks` before it leaves nothing to run here."""
    folder = notebooks.execute()
    first, sweep, verdict = (shown_by(folder, name) for name in ("01_first_run", "02_sweep", "03_did_it_help"))
    assert "lambda = 0 control" in output(first, "run.metrics for name")["text/html"]
    assert "image/png" in output(first, "predictions_target.png")
    assert "image/png" in output(first, "def curve")
    assert output(sweep, "mlflow.search_runs")["text/html"].count("FINISHED") == 5
    assert "over the control" in output(sweep, "study.best()")["text"]
    assert output(verdict, "verdict.line")["text"].startswith("DANN: ")
    assert "image/png" in output(verdict, "summary.png")
    assert "report.html" in output(verdict, "report.html")["text"]


def test_no_placeholder_is_left_in_what_people_read():
    for document in [PROJECT / "README.md", *PROJECT.glob("docs/**/*.md"), *PROJECT.glob("recipes/*.yaml")]:
        assert not re.search(r"@[A-Z_]+@", document.read_text()), document.name


def test_the_page_of_reliability_holds_counts_that_are_all_as_promised():
    text = (PROJECT / "docs" / "reliability.md").read_text()
    found = re.search(r"<!-- counts: start -->\n(.*)\n<!-- counts: end -->", text, re.DOTALL)
    assert found is not None
    rows = [line for line in found.group(1).splitlines() if line.startswith("| ")]
    assert len(rows) > 20, "run make chaos"
    assert "not as promised" not in found.group(1)
    assert "--seed" in found.group(1)


def test_the_page_of_metrics_has_the_table_of_the_vocabulary():
    assert metric_table() in (PROJECT / "docs" / "metrics.md").read_text()


def test_the_tables_of_methods_by_pairs_are_those_of_their_file():
    table = pd.read_csv(ladder.FILE)
    for page, name, expected in (
        ("docs/ladder.md", "scores", ladder.scores_table(table)),
        ("README.md", "ladder", ladder.short_table(table)),
        ("docs/which-method.md", "which", ladder.which_text(table)),
    ):
        marked = f"<!-- {name}: start -->\n{expected}\n<!-- {name}: end -->"
        assert marked in (PROJECT / page).read_text(), f"{page}: run python -m benchmarks.ladder write"


def test_the_short_table_has_the_arm_that_is_chosen_and_every_verdict():
    arms = {
        "source only": (0.5, 0.9),
        "lambda = 0 control": (0.4, 0.8),
        "DANN": (0.6, 0.7),
        "style": (0.55, 0.95),
        "oracle": (0.9, None),
    }
    kinds = {"source only": "source_only", "lambda = 0 control": "control", "oracle": "oracle"}
    lines = [
        {
            "pair": "a → b", "set": "test", "arm": arm, "seed": seed, "score": score + 0.1 * seed, "floor": 0.3,
            "kind": kinds.get(arm, "adapted"), "outcome": {"DANN": "no evidence", "style": "helped"}.get(arm),
            "seeds": 2, "source_kept": 1.0, "guard": 0.0, "seed_agreement": agreement, "consensus": agreement,
            **dict.fromkeys(("entropy", "infomax", "snd", "bnm", "share_distance"), 0.0),
        }
        for arm, (score, agreement) in arms.items() for seed in (0, 1)
    ]  # fmt: skip
    found = ladder.short_table(pd.DataFrame(lines))
    assert found.splitlines()[2:] == [
        "| source only | 55.0 ± 7.1 |",
        "| lambda = 0 control | 45.0 ± 7.1 |",
        "| DANN | 65.0 ± 7.1 no evidence |",
        "| chosen without labels | style 60.0 ± 7.1 **helped** |",
        "| oracle | 95.0 ± 7.1 |",
        "| *floor* | 30.0 |",
    ]


def test_the_readme_has_at_most_900_words():
    words = [word for word in (PROJECT / "README.md").read_text().split() if any(map(str.isalnum, word))]
    assert len(words) <= 900
