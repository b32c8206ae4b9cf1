"""The cases of docs/field-cases.md that were reported against this project, by their generator, through the real command."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import mlflow
import pytest
import rasterio

from dann_experiments.__main__ import main

GENERATOR = Path(__file__).parents[2] / "shared" / "cases" / "make_inputs.py"
pytestmark = pytest.mark.skipif(not GENERATOR.exists(), reason="the generator of the cases is not beside this clone")
GOOD = "Nothing is wrong with the data."
LOOK = "should be looked at"
DEGREES = "pixels of 9e-06 degree, but data.target.pixel_size is 1"
ENCODER = ["--config", "mine.yaml", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def case(workplace: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The inputs of one case in the current folder."""
    monkeypatch.setattr(sys, "argv", [str(GENERATOR), request.param])
    runpy.run_path(str(GENERATOR), run_name="__main__")
    return request.param


@pytest.mark.parametrize(
    ("case", "code", "said"),
    [
        ("plain", 0, GOOD), ("color_map", 0, GOOD), ("nodata_text", 0, GOOD), ("degrees", 2, DEGREES),
        ("elsewhere", 2, "are in different places"), ("exif", 0, GOOD), ("exif_oblong", 0, GOOD), ("nan_masks", 0, GOOD),
        ("reflectance", 0, "nearly all values are between"), ("jpeg_masks", 2, "The file has a lossy compression"),
        ("excel", 0, GOOD), ("pairs_list", 0, GOOD), ("mask_nodata", 0, GOOD), ("partial_nodata", 0, LOOK),
        ("names_pattern", 0, GOOD),
    ],
    indirect=["case"],
)  # fmt: skip
def test_check_data_says_what_is_right(case: str, code: int, said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["check-data", *ENCODER]) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert (GOOD in printed.out) == (said == GOOD)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["color_map", "nan_masks", "partial_nodata"], indirect=True)
def test_what_is_good_trains_to_its_end(case: str):
    assert main(["adapt", *ENCODER]) == 0
    client = mlflow.MlflowClient()
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert {run.data.tags["dann.job"]: run.info.status for run in runs} == {"adapt": "FINISHED", "pretrain": "FINISHED"}


@pytest.mark.parametrize("case", ["two"], indirect=True)
def test_of_two_networks_in_a_file_the_user_chooses(case: str, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", *ENCODER, "--source_checkpoint", "two.ckpt"]) == 2
    told = capsys.readouterr().err
    assert "'ema_model'" in told
    assert "'model'" in told
    assert "source_prefix" in told
    key = "--domain_adaptation.pretrained_checkpoint.source_prefix"
    assert main(["evaluate", *ENCODER, "--source_checkpoint", "two.ckpt", key, "ema_model"]) == 0


@pytest.mark.parametrize(("case", "file"), [("compiled", "compiled.pt"), ("compiled", "net.pth")], indirect=["case"])
def test_wrapped_and_named_state_dicts_are_read(case: str, file: str):
    assert main(["evaluate", *ENCODER, "--source_checkpoint", file]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["four_bands"], indirect=True)
def test_predict_says_how_to_choose_bands_and_takes_them(case: str, capsys: pytest.CaptureFixture[str]):
    assert main(["pretrain", *ENCODER]) == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    command = ["predict", "--model", f"runs:/{run.info.run_id}", "--input", "four.tif", "--output", "map.tif"]
    assert main(command) == 2
    assert "--bands 1,2,3" in capsys.readouterr().err
    assert main([*command, "--bands", "1,2,3"]) == 0
    with rasterio.open("map.tif") as made, rasterio.open("four.tif") as given:
        assert (made.shape, made.crs, made.transform) == (given.shape, given.crs, given.transform)
