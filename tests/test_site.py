"""The site: generated pages are those of the code, lists and tables look as on GitHub, bad pages are refused."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import nbformat
import pytest
from conftest import SharedRuns, copy_store, small_settings
from markdown import Markdown
from markdown_it import MarkdownIt
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from benchmarks import gradients_figure, notebooks, reference
from benchmarks.docs_site import BESIDE, PROJECT, fenced, repository_path, site_path, with_gaps
from benchmarks.pages import DOCS
from dann_experiments import CompareConfig, PredictConfig, WeakLabelsConfig, load_config
from dann_experiments.cli import COMMANDS
from dann_experiments.names import Job, Tag
from sweeps.cli import COMMANDS as SWEEP_COMMANDS

SHOWN = ("li", "ul", "ol", "table", "tr", "pre", "blockquote", "h2", "h3", "img", "strong", "em")
PAGES = [*sorted(DOCS.rglob("*.md")), *(PROJECT / path for path in BESIDE if path.endswith(".md"))]


@pytest.mark.parametrize("name", sorted(reference.pages()))
def test_a_generated_page_is_that_of_the_code(name):
    assert (DOCS / name).read_text() == reference.pages()[name], "run python -m benchmarks.reference"


@pytest.mark.parametrize("variant", sorted(gradients_figure.VARIANTS))
def test_the_figure_of_gradients_is_that_of_its_program(variant):
    shown = (DOCS / "images" / f"dann_{variant}.svg").read_text()
    assert shown == gradients_figure.figure(gradients_figure.VARIANTS[variant]), (
        "run python -m benchmarks.gradients_figure"
    )


def test_each_tag_has_a_meaning_and_each_command_its_options():
    meanings = dict(reference.tag_meanings())
    assert set(meanings) == {value for name, value in vars(Tag).items() if name.isupper()}
    assert all(meanings.values())
    page = reference.commands_page()
    for program, commands in (("dann", COMMANDS), ("dann-sweep", SWEEP_COMMANDS)):
        for name, command in commands.items():
            section = page.partition(f"### {program} {name}\n")[2].partition("\n### ")[0]
            assert all(f"| `--{option}" in section for option in command.options), (program, name)


def counted(html: str) -> dict[str, int]:
    return {tag: len(re.findall(rf"<{tag}[ >]", html)) for tag in SHOWN}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_a_page_has_the_lists_and_tables_of_github(page):
    text = page.read_text()
    site = Markdown(extensions=["tables", "attr_list", "md_in_html", "pymdownx.superfences"]).convert(with_gaps(text))
    github = MarkdownIt("commonmark").enable("table").render(text)
    assert counted(site) == counted(github)


def test_pages_of_the_site_and_files_of_the_repository_name_each_other():
    for path in (*BESIDE, "docs/data.md", "docs/decisions/x.md", "recipes/digits.yaml", "notebooks/02_sweep.ipynb"):
        assert repository_path(site_path(path)) == path


def test_code_that_holds_a_fence_stays_one_block():
    html = Markdown(extensions=["pymdownx.superfences"]).convert(fenced("a\n```\n````yaml\nb", "text"))
    assert html.count("<pre") == 1
    assert "````yaml" in html


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Path:
    """A notebook whose outputs are kept nowhere yet."""
    file = tmp_path / "notebooks" / "a.ipynb"
    file.parent.mkdir()
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("table()\n")]), file)
    monkeypatch.setattr(notebooks, "PROJECT", tmp_path)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", (file,))
    monkeypatch.setattr(notebooks, "KEPT", tmp_path / "build")
    (tmp_path / "constraints.txt").touch()
    return file


def test_a_notebook_that_was_not_run_says_so_on_the_site(notebook):
    page, pictures = notebooks.page(notebook)
    assert page.startswith("# Title\n")
    assert "without running the notebooks" in page
    assert "`make notebooks`" in page
    assert page.endswith("\n\n```python\ntable()\n```")
    assert pictures == {}


def test_a_notebook_that_was_run_has_its_tables_pictures_and_prints_on_the_site(notebook):
    ran = nbformat.read(notebook, as_version=4)
    html = '<div><style scoped>th {}</style><table border="1" class="dataframe"><tr><td>7</td></tr></table></div>'
    ran.cells[1].outputs = [
        new_output("stream", name="stderr", text="a warning"),
        new_output("stream", name="stdout", text="printed\n"),
        new_output("display_data", {"image/png": "aGVsbG8=", "text/plain": "<Figure>"}),
        new_output("execute_result", {"text/html": html, "text/plain": "7"}),
    ]
    kept = notebooks.folder_of_outputs()
    kept.mkdir(parents=True)
    nbformat.write(ran, kept / notebook.name)
    page, pictures = notebooks.page(notebook)
    assert pictures == {"a_1.png": b"hello"}
    assert page.endswith(
        "```{ .text .output }\nprinted\n```\n\n![Picture made by the cell above](a_1.png)\n\n"
        '<div class="output">\n<table><tr><td>7</td></tr></table>\n</div>'
    )
    assert "a warning" not in page
    assert "make notebooks" not in page


def test_what_a_notebook_showed_is_dropped_when_it_or_the_code_changes(notebook):
    before = notebooks.folder_of_outputs()
    assert notebooks.folder_of_outputs() == before
    (notebooks.PROJECT / "sweeps").mkdir()
    (notebooks.PROJECT / "sweeps" / "a.py").write_text("x = 1\n")
    with_code = notebooks.folder_of_outputs()
    notebook.write_text(notebook.read_text().replace("Title", "Other"))
    assert len({before, with_code, notebooks.folder_of_outputs()}) == 3


def test_notebooks_are_run_once_for_the_same_code(notebook):
    notebook.write_text(notebook.read_text().replace("table()", "print(1 + 1)"))
    folder = notebooks.execute()
    (cell,) = [cell for cell in nbformat.read(folder / "a.ipynb", as_version=4).cells if cell.cell_type == "code"]
    assert cell.outputs[0].text == "2\n"
    (folder / "a.ipynb").touch()
    changed = (folder / "a.ipynb").stat().st_mtime_ns
    assert notebooks.execute() == folder
    assert (folder / "a.ipynb").stat().st_mtime_ns == changed


def unlisted(job: str, store_uri: str) -> set[str]:
    """The files of a job's runs that the page does not name."""
    patterns = [re.sub("|".join(map(re.escape, reference.VARIES)), "*", file) for file in reference.FILES[job]]
    client = mlflow.MlflowClient(store_uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{Tag.JOB}` = '{job}'")
    assert runs, job
    found = set()
    for run in runs:
        folder = Path(str(run.info.artifact_uri).removeprefix("file://"))
        found |= {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert found
    unseen = {file for file in reference.FILES[job] if "(" not in reference.FILES[job][file]} - {
        file for file, pattern in zip(reference.FILES[job], patterns, strict=True) if fnmatch.filter(found, pattern)
    }
    assert unseen == set(), "no run has them; say in brackets when a run has them"
    return {file for file in found if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)}


@pytest.mark.parametrize("job", [Job.PRETRAIN, Job.ADAPT])
def test_the_page_of_files_has_those_of_a_training(shared_runs: SharedRuns, job):
    assert unlisted(job, shared_runs.result(Job.ADAPT).tracking_uri) == set()


@pytest.mark.slow
def test_the_page_of_files_has_those_of_every_other_job(shared_runs, squares, workplace, monkeypatch):
    from dann_experiments import check_data, compare, evaluate, predict, weak_labels
    from dann_experiments.comparison.suggest_labels import suggest_labels
    from dann_experiments.config.suggestions import SuggestLabelsConfig
    from sweeps.driver import run_sweep
    from sweeps.settings import SweepConfig

    copy_store(shared_runs.folder / "mlflow.db", workplace)
    monkeypatch.chdir(workplace)
    config, model = load_config(None, small_settings(squares)), f"runs:/{shared_runs.result(Job.ADAPT).run_id}"
    scene = str(squares / "target_val" / "images" / "0.png")
    check_data(config)
    evaluate(load_config(None, small_settings(squares, domain_adaptation__pretrained_checkpoint__path=model)))
    predict(PredictConfig(model=model, input=scene, output="map.tif"))
    weak_labels(WeakLabelsConfig(rule="excess_green", red=1, green=2, blue=3, input=scene, output="weak.tif"))
    compared = compare(config, CompareConfig(seeds=2, workers=1))
    suggest_labels(SuggestLabelsConfig(comparison=compared.run_id))
    space = {"optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
    run_sweep(SweepConfig(study="files", n_trials=4, workers=1, space=space), config)
    for job in reference.FILES:
        if job not in (Job.PRETRAIN, Job.ADAPT):
            assert unlisted(job, f"sqlite:///{workplace}/mlflow.db") == set()


def dead_addresses(site: Path) -> set[tuple[str, str]]:
    """Pages of the site with the addresses on them that name no file of it; those that begin with a scheme are left out."""
    return {
        (str(page.relative_to(site)), address)
        for page in site.rglob("*.html")
        for address in re.findall(r'(?:href|src)="(?![a-z]+:|#)([^"#?]+)', page.read_text())
        if not (site / address.lstrip("/") if address.startswith("/") else page.parent / address).is_file()
    }


@pytest.mark.slow
def test_a_dead_link_a_dead_anchor_a_lost_page_and_a_stale_page_end_the_build(tmp_path):
    kept = {"mkdocs.yml", "LICENSE", "constraints.txt", "docs", "benchmarks",
            "notebooks", "findings", "recipes", "dann_experiments", "sweeps",
            *(Path(path).parts[0] for path in BESIDE)}  # fmt: skip
    for name in kept:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)

    def build() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)

    built = build()
    assert built.returncode == 0, built.stderr
    assert dead_addresses(tmp_path / "site") == set()
    (tmp_path / "docs" / "lost.md").write_text(
        "[dead](none.md), [dead](data.md#nowhere), [dead](../recipes/none.yaml)\n"
    )
    with (tmp_path / "docs" / "tags.md").open("a") as page:
        page.write("stale\n")
    built = build()
    assert built.returncode != 0
    for word in ("none.md", "#nowhere", "recipes/none.yaml", "lost.md", "docs/tags.md is out of date"):
        assert any("WARNING" in line and word in line for line in built.stderr.splitlines()) or word == "lost.md", word
    assert "lost.md" in built.stderr.partition("not included in the")[2]
