from PIL import Image

from dalikd.tools.bench.plots import bars
from dalikd.tools.bench.record import summary


def test_draws_a_bar_a_row_in_the_colour_of_its_series(tmp_path):
    path = tmp_path / "new" / "plot.png"
    values = [summary([90.0, 100.0, 120.0]), summary([50.0]), summary([70.0, 75.0])]
    bars(path, ["a", "b", "c"], values, "A title " * 20, "images/s", ["x", "y", "x"])
    with Image.open(path) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
        height = picture.height
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colors
    assert (0x00, 0x9E, 0x73) not in colors
    bars(path, ["a"], values[:1], "", "images/s")
    with Image.open(path) as picture:
        assert picture.height < height
