"""make_masks.py: the command line that writes masks."""

import numpy as np
import pytest
from PIL import Image

import make_masks
from maskgit.masks import FAMILIES, make_holes


def test_command_line_writes_the_labs_polarity(tmp_path, capsys):
    out = tmp_path / "new" / "masks"
    make_masks.main(["--family", "thick", "--count", "3", "--size", "32", "--seed", "4", "--out", str(out)])
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["mask_000.png", "mask_001.png", "mask_002.png"]
    for file, hole in zip(files, make_holes("thick", 3, 32, 4), strict=True):
        pixels = np.array(Image.open(file))
        np.testing.assert_array_equal(pixels, np.where(hole[0].numpy(), 0, 255))  # 0 = hole, 255 = known
    assert f"3 thick masks in {out}" in capsys.readouterr().out


def test_command_line_numbers_sort_beyond_a_thousand(tmp_path):
    make_masks.main(["--family", "box", "--count", "1001", "--size", "8", "--out", str(tmp_path)])
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names[0] == "mask_0000.png" and names[-1] == "mask_1000.png" and len(names) == 1001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0", "--out", "x"], "count 0"),
        (["--family", "blob", "--out", "x"], "blob"),
        (["--count", "1"], "--out"),
    ],
)
def test_command_line_refuses_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        make_masks.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_explains_every_family(capsys):
    with pytest.raises(SystemExit):
        make_masks.main(["--help"])
    text = capsys.readouterr().out
    assert "0 = hole, 255 = known" in text and "examples:" in text
    for name in FAMILIES:
        assert f"\n  {name} " in text
