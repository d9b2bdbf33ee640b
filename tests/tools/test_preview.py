import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from dalikd.kd.backbones import create_model
from dalikd.kd.picking import entropy
from dalikd.tools.cli import parse
from dalikd.tools.preview import main, preview
from dalikd.trainers.launch import start
from dalikd.trainers.preview import look
from dalikd.trainers.setup import open_run
from dalikd.trainers.tasks.distill import DistillOptions

GROUP, COLUMNS = 8, 12  # a group and a half are shown


@pytest.fixture
def arguments(options, teacher):
    return [*map(str, options), *map(str, teacher), "--mix.group", str(GROUP), "--images", str(COLUMNS), "--seed", "3"]


def _looked(arguments, *more):
    return look(parse("preview", [*arguments, *more])[0], start("cpu", "fp32"))


def test_images_and_picks_are_those_of_a_runs_first_step(arguments):
    """Of the student's picks too, which depend on its fresh weights."""
    names = ["cutmixpick_teacher", "cutmixpick_student"]
    found = _looked(arguments, "--augmentation", *names)
    for number, name in enumerate(names):
        own = [word for word in arguments if word not in ("--images", str(COLUMNS))]
        options = parse("distill", [*own, "--augmentation", name, "--batch_size", "48"])[0]
        assert isinstance(options, DistillOptions)
        setup = open_run(options, start("cpu", "fp32"))
        task = options.build(setup).train()
        loader = task.loader(setup)
        batch = loader.next()
        inputs = task.prepare(batch, 0.0)
        loader.close()
        base = batch.images[:COLUMNS].numpy()
        assert np.array_equal(np.stack([tile.image for tile in found.rows[0].tiles]), base)
        rows = found.rows[1 + 2 * number : 3 + 2 * number]
        assert [row.title for row in rows] == [f"{name}, run {run} of 2" for run in (1, 2)]
        picked = [tile.image for row in rows for tile in row.tiles[:GROUP] if tile.picked]
        expected = inputs.augmented[:GROUP].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(np.stack(picked), expected)


def test_labels_and_answers_are_names_of_the_class_list(arguments):
    """A teacher whose classes come in another order is seen: its sure answers have other names than the images."""
    options = parse("preview", [*arguments, "--augmentation", "cutmix"])[0]
    accelerator = start("cpu", "fp32")
    found, setup = look(options, accelerator), open_run(options, accelerator, "train")
    labels = dict(zip(map(setup.source.path, range(len(setup.source))), setup.source.labels, strict=True))
    assert {path.split("/")[-2] for path in labels} == {f"class{label}" for label in labels.values()}
    base, mixed = found.rows
    for tile in base.tiles:  # the red channel tells the class of these images
        assert tile.label == f"class{round((float(tile.image[8:24, 8:24, 0].mean()) - 60) / 60)}"
        assert tile.right is (tile.answer == tile.label)
    logits = setup.teacher(options.teacher)(
        torch.tensor(np.stack([tile.image for tile in mixed.tiles])).permute(0, 3, 1, 2)
    )
    assert [tile.answer for tile in mixed.tiles] == [f"class{label}" for label in logits.argmax(1).tolist()]
    assert [tile.entropy for tile in mixed.tiles] == pytest.approx(entropy(logits).tolist(), abs=1e-5)
    assert all(re.fullmatch(r"\d+ % class\d", tile.partner) for tile in mixed.tiles)


def test_several_teachers_answer_and_pick_as_in_a_run(arguments, weights, tmp_path):
    """Of images without labels too: the classes are those of the first teacher."""
    torch.manual_seed(1)
    torch.save(create_model("small", 3).state_dict(), tmp_path / "other.pt")
    teachers = f"[{{name: small, weights: {weights}}}, {{name: small, weights: {tmp_path}/other.pt}}]"
    own = [word for word in arguments if word not in ("--teacher.name", "--teacher.weights", "small", str(weights))]
    own = [word for word in own if word != "--model"]
    more = ["--teachers", teachers, "--teacher_weights", "[3, 1]", "--augmentation", "cutmixpick_teacher"]
    found = _looked(own, *more)
    bare = _looked(own, *more, "--data.name", "images", "--data.train_split", "train")
    options = parse("preview", [*own, *more])[0]
    setup = open_run(options, start("cpu", "fp32"), "train")
    nets = [setup.teacher(one) for one in options.teachers]
    for row, other in zip(found.rows, bare.rows, strict=True):
        pixels = torch.tensor(np.stack([tile.image for tile in row.tiles])).permute(0, 3, 1, 2)
        logits = 0.75 * nets[0](pixels) + 0.25 * nets[1](pixels)
        assert [tile.entropy for tile in row.tiles] == pytest.approx(entropy(logits).tolist(), abs=1e-5)
        assert [tile.answer for tile in row.tiles] == [f"class{label}" for label in logits.argmax(1).tolist()]
        assert {tile.label for tile in other.tiles} == {""}
    assert sum(tile.picked for row in found.rows for tile in row.tiles[:GROUP]) == GROUP
    assert "; together: right on " in found.lines[1]


class _Images(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.outside += [
            value for name, value in attrs if name in ("href", "src") and not f"{value}".startswith("data:")
        ]
        if tag == "img":
            content = base64.b64decode(str(attributes["src"]).partition(",")[2])
            self.found.append((np.asarray(Image.open(io.BytesIO(content))), attributes["alt"]))


def test_both_files_show_all_images(arguments, tmp_path, capsys):
    files = [str(tmp_path / "new" / f"preview{ending}") for ending in (".png", ".html")]
    more = ["--output", str(tmp_path / "new" / "preview"), "--json", str(tmp_path / "told.json")]
    options = parse("preview", [*arguments, "--augmentation", "cutmixpick_teacher", *more])
    found = preview(*options)
    assert f"written: {files[1]}" in capsys.readouterr().out
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["files"], told["lines"]) == (files, found.lines)
    for row, drawn in zip(told["rows"], found.rows, strict=True):
        assert row["title"] == drawn.title
        assert row["tiles"][1] == {name: value for name, value in drawn.tiles[1]._asdict().items() if name != "image"}
    page = _Images()
    page.feed((tmp_path / "new" / "preview.html").read_text("utf-8"))
    tiles = [tile for row in found.rows for tile in row.tiles]
    assert page.outside == []
    assert all(np.array_equal(image, tile.image) for (image, _), tile in zip(page.found, tiles, strict=True))
    assert ["picked" in alt for _, alt in page.found] == [tile.picked for tile in tiles]
    drawn = np.asarray(Image.open(files[0]))
    frames = (drawn == (0xD5, 0x5E, 0x00)).all(2).sum()  # four pixels wide around images of 128
    assert frames == sum(tile.picked for tile in tiles) * (136**2 - 128**2)


def test_without_a_teacher_images_are_drawn_and_nothing_is_picked(options):
    names = ["identity", "cutmixpick_student", "cutmixpick_teacher"]
    more = ["--images", "3", "--mix.group", str(GROUP), "--model", "small", "--augmentation", *names]
    found = _looked(list(map(str, options)), *more)
    assert len(found.rows) == 1 + 2 * 2  # identity is the base view
    notes = {row.title: row.note for row in found.rows}
    assert notes["cutmixpick_teacher, run 1 of 2"] == "no picks without --teacher.name"
    assert notes["cutmixpick_student, run 1 of 2"] == "framed: picked"
    assert not any(tile.answer for row in found.rows for tile in row.tiles)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "a.jpg"], "--output a.jpg: give a file that ends in .png or .html"),
        (["--images", "0"], "--images 0: give at least 1"),
        (["--augmentation", "cutmx"], 'unknown --augmentation "cutmx": did you mean cutmix'),
    ],
)
def test_bad_input_is_one_line(options, more, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, options), *more])
    assert message in capsys.readouterr().err


def test_the_config_of_a_run_is_read_but_for_its_folder(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("{output: runs/x, augmentation: cutmix, seed: 4, epochs: 3}")
    options = parse("preview", ["--config", str(config)])[0]
    assert (options.output, options.augmentation, options.seed) == ("preview.png", ["cutmix"], 4)
    config.write_text("{output: runs/x, preview: {output: a.html}}")
    assert parse("preview", ["--config", str(config)])[0].output == "a.html"
