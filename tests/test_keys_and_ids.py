"""Keys that are one value in two spellings, and class ids that no class has, are told instead of counted wrongly."""

from __future__ import annotations

import pytest
import torch

from dann_experiments import InputError, load_config
from dann_experiments.__main__ import main
from dann_experiments.scores import confusion_matrix, mean_iou

LABELS = "model: {{classes: 3}}\ndata: {{class_names: [a, b, c], source: {{train: [x], {key}: {labels}}}}}\n"


def written(folder, text: str) -> str:
    (folder / "c.yaml").write_text(text)
    return str(folder / "c.yaml")


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (
            "{0.2: a, 1.9: b}",
            r"data\.source\.value_map has the key 0\.2; give the value in the mask as a whole number\.",
        ),
        ("{1.0: a, 2: b}", r"has the key 1\.0; give .* a whole number, 1\."),
        ("{true: a, 2: b}", r"has the key True"),
        ("{x: a, 2: b}", r"has the key 'x'"),
        ("{0: a, 1: b, 0x1: c}", r"'0x1' appears twice \(as '1' before\)"),
        ("{1: a, 1.0: b}", r"'1\.0' appears twice \(as '1' before\)"),
        ("{true: a, 1: b}", r"'1' appears twice \(as 'true' before\)"),
        ("{1: a, '1': b}", r"has the keys 1 and '1', which are one value"),
        ("{'1': a, ' 1': b}", r"has the keys '1' and ' 1'"),
        ("{'1': a, '01': b}", r"has the keys '1' and '01'"),
    ],
)
def test_a_key_of_a_value_map_is_one_whole_number(tmp_path, labels, told):
    with pytest.raises(InputError, match=told):
        load_config(written(tmp_path, LABELS.format(key="value_map", labels=labels)))


def test_a_key_in_two_spellings_is_told_on_the_command_line_too(workplace, capsys):
    assert main(["config", "--data.source.value_map", "{0: a, 0x0: b}"]) == 2
    assert "data.source.value_map is '{0: a, 0x0: b}', in which '0x0' appears twice" in capsys.readouterr().err


def test_a_key_of_thousands_of_digits_is_told():
    with pytest.raises(InputError, match=r"value_map has a key of 5000 digits"):
        load_config(overrides={"data.source.value_map": {"1" * 5000: "a"}})


def test_other_spellings_of_a_whole_number_are_taken(tmp_path):
    config = load_config(written(tmp_path, LABELS.format(key="value_map", labels="{0: a, '7': b, 0x10: c}")))
    assert config.data.source.value_map == {0: "a", 7: "b", 16: "c"}


def test_one_color_in_two_spellings_is_told(tmp_path):
    text = LABELS.format(key="color_map", labels="{'255,0,0': a, '255, 0,0': b}")
    with pytest.raises(InputError, match=r"color_map has the keys '255,0,0' and '255, 0,0', which are one color"):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_entry_with_keys_of_several_types_is_told_by_its_key(tmp_path, split):
    with pytest.raises(InputError, match=rf"data\.source\.{split} has the entry .*, not 1\."):
        load_config(written(tmp_path, f"data: {{source: {{{split}: [{{1: a, b: b}}]}}}}\n"))


def test_a_list_of_runs_without_an_id_starts_no_comparison(workplace, capsys):
    assert main(["compare", "--runs", ","]) == 2
    assert "--runs is ',', without an id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("predicted", "labels", "told"),
    [
        ([[5, 4, 1, 1]], [[0, 0, 1, 1]], "predicted holds the id 5 .* num_classes is 3"),
        ([[255, 255, 1, 1]], [[0, 0, 1, 1]], "predicted holds the id 255"),
        ([[0, 0, 1, -1]], [[0, 0, 1, 2]], "predicted holds the id -1"),
        ([[0, 0, 1, 1]], [[3, 4, 1, 1]], "labels holds the id 3"),
        ([[0, 0, 1, 1]], [[0, 0, 1, -100]], "labels holds the id -100"),
        ([[0, 0]], [[0, 0, 1]], r"shape \(1, 2\), labels \(1, 3\)"),
        ([[0.5, 1.0]], [[0, 1]], "predicted holds torch.float32"),
    ],
)
def test_ids_without_a_class_are_not_counted_elsewhere(predicted, labels, told):
    with pytest.raises(ValueError, match=told):
        confusion_matrix(torch.tensor(predicted), torch.tensor(labels), num_classes=3)


def test_an_id_at_an_ignored_pixel_does_not_matter():
    labels = torch.tensor([[255, 0, 1, 1]])
    matrix = confusion_matrix(torch.tensor([[255, 0, 1, 0]]), labels, num_classes=3)
    assert matrix.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert mean_iou(matrix) == 0.5
