"""The choice among arms without target labels, and the tiles whose labels would tell most."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from conftest import small_settings, write_raster
from PIL import Image
from rasterio.transform import from_origin
from sklearn.metrics import cohen_kappa_score

from dann_experiments import load_config
from dann_experiments.__main__ import main
from dann_experiments.comparison import choice
from dann_experiments.comparison.choice import choice_table, chosen_arm
from dann_experiments.comparison.compare import compare
from dann_experiments.comparison.disagreement import disagreement_of, most_disputed
from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.comparison.target_maps import TargetMaps, Tile
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.names import OneDomain
from dann_experiments.prediction.rasters import write_window
from dann_experiments.scores.agreement import count_agreement, kappa, vote_entropy

TARGET = OneDomain("target")


def maps(tiles: int, **ids: list[list[int]]) -> TargetMaps:
    """Maps of arms (a list of seeds each) on tiles of 1 x 4 pixels."""
    cut = [Tile(Path(f"{number}.png"), (0, 0, 4, 1), (1, 4), 4 * number, TARGET, number) for number in range(tiles)]
    found = {(arm, seed): np.array(one, np.uint8) for arm, seeds in ids.items() for seed, one in enumerate(seeds)}
    return TargetMaps(cut, found)


def test_kappa_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    one, other = random.integers(0, 4, (2, 500))
    other[:300] = one[:300]
    counts = count_agreement(one.astype(np.uint8), other.astype(np.uint8), 4)
    assert kappa(counts) == pytest.approx(cohen_kappa_score(one, other))


def test_pixels_without_data_do_not_count():
    counts = count_agreement(np.array([0, 255, 1, 1], np.uint8), np.array([0, 0, 255, 0], np.uint8), 2)
    assert counts.tolist() == [[1, 0], [1, 0]]
    assert math.isnan(kappa(np.zeros((2, 2)))), "no pixel"
    assert math.isnan(kappa(np.array([[9, 0], [0, 0]]))), "two maps of one class agree whatever they were made from"


def test_vote_entropy_is_zero_where_all_agree_and_one_for_a_tie_of_all_classes():
    votes = np.array([[3, 1, 2], [0, 1, 1], [0, 1, 0]])
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    assert vote_entropy(votes) == pytest.approx([0, 1, expected])


def test_each_arm_has_one_vote_whatever_its_seeds():
    found = maps(1, a=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], b=[[0, 1, 1, 255]])
    disputed = disagreement_of(found, found.tiles[0], 2, ["a", "b"])
    assert disputed.shape == (1, 4)
    assert disputed[0, :3].tolist() == [0, 1, 1]


def test_the_most_disputed_tile_comes_first_and_tiles_without_data_never():
    found = maps(3, a=[[0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]], b=[[0, 0, 0, 1, 0, 0, 1, 1, 255, 255, 255, 255]])
    ranked = most_disputed(found, 2, ["a", "b"], 5)
    assert [(tile.number, value) for tile, value in ranked] == [(1, 0.5), (0, 0.25)]
    assert len(most_disputed(found, 2, ["a", "b"], 1)) == 1


def run_of(arm: str, seed: int, **metrics: float) -> ArmRun:
    return ArmRun(arm, seed, f"{arm}{seed}", {name.replace("__", "/"): value for name, value in metrics.items()})


def test_the_scores_of_an_arm():
    found = maps(
        1, source=[[0, 0, 1, 1], [0, 0, 1, 1]], dann=[[0, 0, 1, 1], [0, 1, 0, 1]], other=[[0, 0, 1, 1], [0, 0, 1, 1]]
    )
    shares = {"true_share__source_val__ground": 0.75, "true_share__source_val__tree": 0.25}
    runs = [run_of("source", 0, **shares), run_of("dann", 0, select__bnm=0.2, select__source_kept=1.0),
            run_of("dann", 1, select__bnm=0.4, select__source_kept=0.0)]  # fmt: skip
    arms = [Arm("source", "source_only"), Arm("dann", "adapted"), Arm("other", "control")]
    table = choice_table(arms, runs, found, ["ground", "tree"]).set_index("arm")
    assert table.loc["dann", ["bnm", "source_kept", "seeds"]].tolist() == pytest.approx([0.3, 0.5, 2])
    # kappa of [0, 0, 1, 1] and [0, 1, 0, 1]: half are equal, as by chance
    assert table["seed_agreement"].to_dict() == {"source": 1.0, "dann": 0.0, "other": 1.0}
    # dann's seeds against the majority of source and other, [0, 0, 1, 1]: 1 and 0
    assert table.loc["dann", "consensus"] == pytest.approx(0.5)
    assert table["share_distance"].tolist() == pytest.approx([0.25] * 3), "half of the pixels are trees, not a quarter"


def test_a_tile_is_written_as_it_is_stored(tmp_path):
    values = np.arange(4 * 30 * 40, dtype=np.uint16).reshape(4, 30, 40)
    place = from_origin(500000, 4000000, 10, 10)
    image = write_raster(tmp_path / "scene.tif", values, crs="EPSG:32612", transform=place, nodata=7)
    write_window(image, (10, 5, 30, 25), tmp_path / "tile.tif")
    with rasterio.open(tmp_path / "tile.tif") as file:
        assert np.array_equal(file.read(), values[:, 5:25, 10:30])
        assert (file.crs.to_epsg(), file.nodata, file.dtypes[0]) == (32612, 7, "uint16")
        assert file.transform * (0, 0) == (500100, 3999950)


def test_a_tile_keeps_the_mask_of_its_image(tmp_path):
    values = np.full((3, 20, 20), 9, np.uint8)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"):
        image = write_raster(tmp_path / "scene.tif", values)
        hidden = np.full((20, 20), 255, np.uint8)
        hidden[:, :12] = 0
        with rasterio.open(image, "r+") as file:
            file.write_mask(hidden)
    write_window(image, (10, 0, 20, 20), tmp_path / "tile.tif")
    with rasterio.open(tmp_path / "tile.tif") as file:
        assert np.array_equal(file.dataset_mask(), hidden[:, 10:])


@pytest.fixture(scope="module")
def compared(squares, tmp_path_factory):
    """Folder, and id of a comparison of two seeds."""
    folder = tmp_path_factory.mktemp("choice")
    settings = small_settings(
        squares, tracking__uri=f"sqlite:///{folder}/mlflow.db", tracking__folder=str(folder / "outputs")
    )
    arms = {
        "control": {"kind": "control"},
        "DANN": None,
        "NA": {"domain_adaptation.companions": ["style"]},
        "statistics": {"kind": "statistics"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = compare(load_config(None, settings), CompareConfig(arms=arms, seeds=2, workers=1))
    return folder, result


@pytest.mark.slow
def test_the_tiles_to_label_are_written_as_files(compared, capsys, monkeypatch):
    folder, result = compared
    monkeypatch.chdir(folder)
    words = ["suggest-labels", "--comparison", result.run_id, "--count", "3", "--output", "labels",
             "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Tiles to label" in printed
    assert "agreement" in printed
    (table,) = (folder / "mlruns").rglob("tiles.csv")
    rows = list(csv.DictReader(table.open()))
    assert [float(row["disagreement"]) for row in rows] == sorted(
        (float(row["disagreement"]) for row in rows), reverse=True
    )
    assert sorted(path.name for path in (folder / "labels").iterdir()) == [Path(row["file"]).name for row in rows]
    assert list((folder / "mlruns").rglob("figures/tiles.png"))
    with Image.open(rows[0]["file"]) as opened:  # with which tools for labels open them
        assert opened.mode == "RGB"
    (folder / "file").touch()
    assert main([*words[:-3], "file/tiles", *words[-2:]]) == 2, "before any model is asked"
    assert main(words) == 2, "the folder is not empty any more"
    assert "labels" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("given", "said"), [("nothing", "does not have"), ("adapt", "another job")])
def test_only_a_comparison_can_be_asked(compared, given, said, capsys, monkeypatch):
    folder, result = compared
    monkeypatch.chdir(folder)
    run_id = given if given == "nothing" else result.comparison.runs[-1].run_id
    assert main(["suggest-labels", "--comparison", run_id, "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]) == 2
    assert said in capsys.readouterr().err


def row_of(arm: str, agreement: float, kept: float = 1.0, guard: float = 0.0, seeds: int = 3) -> dict[str, object]:
    return {"arm": arm, "seeds": seeds, "seed_agreement": agreement, "source_kept": kept, "guard": guard}


NAN = math.nan


@pytest.mark.parametrize(
    ("rows", "arm", "said"),
    [
        (
            [row_of("source", 0.5, guard=NAN), row_of("DANN", 0.7), row_of("BN", 0.6, NAN, NAN)],
            "DANN",
            "kappa 0.70",
        ),
        (
            [row_of("source", 0.5), row_of("forgot", 0.9, kept=0.5), row_of("wild", 0.8, guard=0.5)],
            "source",
            "forgot, wild",
        ),
        ([row_of("source", NAN, seeds=1), row_of("DANN", NAN, seeds=1)], None, "two seeds"),
        ([row_of("source", 0.1), row_of("DANN", 0.15)], None, "at most kappa 0.15"),
        ([row_of("source", NAN), row_of("DANN", 0.9, guard=1.0)], None, "one class"),
        ([row_of("source", 0.6), row_of("flat", NAN, guard=1.0)], "source", "flat"),
        ([row_of("source", 0.9, kept=0.0)], None, "label some tiles"),
    ],
)
def test_the_rule_takes_the_arm_whose_maps_agree_most_unless_it_is_implausible(rows, arm, said):
    chosen, reason = chosen_arm(pd.DataFrame(rows))
    assert chosen == arm
    assert said in reason


def test_many_pixels_are_counted_in_parts(monkeypatch):
    found = maps(3, a=[[0, 1, 0, 1] * 3], b=[[0, 1, 1, 1] * 3], c=[[0, 1, 0, 1] * 3])
    arms = [Arm(name, "adapted") for name in "abc"]
    whole = choice_table(arms, [], found, ["ground", "tree"])
    monkeypatch.setattr(choice, "CHUNK", 5)
    assert choice_table(arms, [], found, ["ground", "tree"]).equals(whole)
