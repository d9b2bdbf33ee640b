import pytest
import yaml

from dalikd.tools.bench import teacher as bench_teacher
from dalikd.tools.bench.teacher import Measuring, compare
from dalikd.tools.cli import parse

PASS = [16] * 6 + [3]  # originals in the batches of a pass over 99


@pytest.fixture
def arguments(options):
    own = ["--batch_size", 16, "--mix.group", 8, "--teacher.name", "small"]
    return [str(word) for word in (*options, *own)]


@pytest.mark.parametrize("name", ["identity", "flip", "cutmix", "cutmixpick_teacher", "cutmixpick_student"])
def test_every_side_asks_the_teacher_about_as_many_images_and_one_does_without_the_loader(arguments, name):
    options, _ = parse("bench teacher", [*arguments, "--augmentation", name])
    opened, sizes, moved = Measuring(options), [], {}
    sides, loader = compare(opened.augmenters[0], opened)
    opened.teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    asked = {"identity": 1, "cutmixpick_teacher": 3}.get(name, 2)
    assert loader.position == 0
    for side, measure in sides.items():
        sizes.clear()
        before = loader.position
        assert measure() > 0, side
        assert sizes == [asked * size for size in PASS], side
        moved[side] = loader.position - before
    assert moved == {"measure": 7, "loaded teacher": 7, "teacher alone": 0}
    loader.close()


def test_the_run_writes_a_row_for_each_augmentation(arguments, bench):
    names = ["identity", "cutmixpick_teacher"]
    record, out = bench("teacher", *arguments, "--augmentation", *names, "--images", 40)
    assert [row["augmentation"] for row in record.rows] == names
    assert [row["teacher images an original"] for row in record.rows] == [1, 3]
    assert "one pass over 40 originals" in record.notes[0]
    for row in record.rows:
        measured, alone = row["measure, originals/s"]["values"], row["teacher alone, originals/s"]["values"]
        assert min(measured + alone + row["loaded teacher, originals/s"]["values"]) > 0
        shares = [one / other for one, other in zip(measured, alone, strict=True)]
        assert row["measure / teacher alone"]["values"] == shares
        assert row["measure, teacher images/s"]["median"] == pytest.approx(
            row["teacher images an original"] * row["measure, originals/s"]["median"]
        )
    assert "| cutmixpick_teacher |" in out


def test_images_without_labels_have_the_classes_of_the_teacher(arguments, weights):
    bare = [*arguments, "--data.name", "images", "--data.train_split", "train", "--augmentation", "flip"]
    opened = Measuring(parse("bench teacher", [*bare, "--teacher.weights", str(weights), "--images", "20"])[0])
    assert (opened.setup.source.classes, len(opened.setup.source)) == (("0", "1", "2"), 20)
    with pytest.raises(ValueError, match="the teacher small has no weights: give a file"):
        Measuring(parse("bench teacher", bare)[0])


def test_a_config_of_measure_is_taken_without_its_passes_and_its_results_file(tmp_path):
    path = tmp_path / "run.yaml"
    own = {"epochs": 10, "augmentation": ["flip", "mixup"], "json": "result.json", "window": 320}
    shared = {"augmentation": "cutmix", "output": "runs/mine", "epochs": 240}
    path.write_text(yaml.safe_dump({**shared, "measure": own, "bench teacher": {"images": 50}}))
    options, config = parse("bench teacher", ["--config", str(path), "--rounds", "6"])
    assert (options.augmentation, options.window, options.images, options.rounds) == (["flip", "mixup"], 320, 50, 6)
    assert (options.epochs, options.json, options.output) == (1, None, None)
    assert "epochs" not in config
    chosen, _ = parse("bench teacher", ["--config", str(path), "--augmentation", "identity", "cutout"])
    assert chosen.augmentation == ["identity", "cutout"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "0"], "--images 0: give at least 1"),
        (["--images", "2"], "--images 2"),
        (["--augmentation", "cutmx"], 'unknown --augmentation "cutmx": did you mean cutmix'),
        (["--teacher.name", "smal"], "smal"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, more, message, refused):
    assert message in refused("passes", *arguments, *more)


def test_one_pass_and_a_pass_each_see_the_same_images(arguments, bench, monkeypatch):
    measured, original = [], bench_teacher.measure_branches

    def noted(branches, *rest):
        report = original(branches, *rest)
        measured.append([result["augmentation"] for result in report["results"]])
        assert all(result["images"] == 40 for result in report["results"])
        return report

    monkeypatch.setattr(bench_teacher, "measure_branches", noted)
    names = ["identity", "flip", "cutmix", "cutmixpick_teacher"]
    record, _ = bench("passes", *arguments, "--augmentation", *names, "--images", 40)
    assert record.variant == "small-32-fp32"
    (row,) = record.rows
    assert row["augmentations"] == "4"
    # originals, flip, and two runs of cutmix; alone: 1, 2, 2 and 3
    assert row["one pass, teacher images an original"] == 4
    assert row["a pass each, teacher images an original"] == 8
    assert row["a pass each / one pass, seconds"]["median"] > 0
    assert measured.count(names) == measured.count(["flip"]) == 3  # a warm-up and two rounds
    assert len(measured) == 3 * 5
    assert record.notes == [f"A round goes once over 40 originals on either side: {', '.join(names)}."]
