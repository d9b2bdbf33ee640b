import json
from pathlib import Path

import pytest
import yaml

from dalikd.kd.teacher import Teacher
from dalikd.pipelines.data import training_view
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.bench import teacher as bench
from dalikd.tools.cli import parse
from dalikd.trainers.augmentation import AUGMENTATIONS, Augmenter
from dalikd.trainers.launch import start
from dalikd.trainers.measure import build_scorer
from dalikd.trainers.models import build_model

PASS = [16] * 6 + [3]  # originals in the batches of a pass over 99


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(bench, "settle", lambda: None)


@pytest.fixture
def arguments(options, tmp_path):
    own = ["--batch_size", 16, "--mix.group", 8, "--teacher.name", "small", "--output", tmp_path / "out"]
    return [str(word) for word in (*options, *own)]


@pytest.fixture
def compare(arguments):
    """Builds the comparison of one augmentation, and notes the sizes of the batches its teacher sees."""
    loaders = []

    def make(name):
        options, _ = parse("bench teacher", arguments)
        accelerator = start("cpu", "fp32")
        source = bench.open_images(options)
        augmenter = Augmenter(name, options, source, training_view(options.data, source), seed=0)
        sampler = Sampler(len(source), 16, drop_last=False, group=8)
        loaders.append(Loader(source, sampler, augmenter.draw_spec, threads=1))
        teacher, sizes = Teacher(build_model("small", source)), []
        student = build_scorer(options, source, [augmenter])
        comparison = bench.Comparison(augmenter, loaders[0], teacher, accelerator, options, student)
        teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        return comparison, loaders[0], sizes

    yield make
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("name", sorted(set(AUGMENTATIONS) - {"autoaugment"}))
def test_every_side_asks_the_teacher_the_same_number_of_times_about_as_many_images(compare, name):
    comparison, _, sizes = compare(name)
    asked = {"identity": 1, "cutmixpick_teacher": 3}.get(name, 2)
    for side, measure in comparison.timers().items():
        sizes.clear()
        assert measure() > 0, side
        asked_for = sizes[name == "manifold_mixup" and side == "measure" :]  # two images show that it can be mixed
        assert asked_for == [asked * size for size in PASS], side


def test_only_the_teacher_alone_does_without_the_loader(compare):
    comparison, loader, _ = compare("cutmix")
    assert loader.position == 0
    moved = {}
    for side, measure in comparison.timers().items():
        before = loader.position
        measure()
        moved[side] = loader.position - before
    assert moved == {"measure": 7, "loaded teacher": 7, "teacher alone": 0}


def test_the_run_writes_a_row_for_each_augmentation(arguments, tmp_path, capsys):
    names = ["identity", "cutmixpick_teacher", "cutmixpick_student"]
    bench.main([*arguments, "--augmentation", *names, "--images", "40"])
    (path,) = (tmp_path / "out").glob("*.json")
    assert path.with_suffix(".md").is_file()
    assert path.with_suffix(".png").is_file()
    record = json.loads(path.read_text(), parse_constant=refuse)
    assert [row["augmentation"] for row in record["rows"]] == names
    assert [row["teacher images an original"] for row in record["rows"]] == [1, 3, 2]
    assert "one pass over 40 originals" in record["notes"][0]
    for row in record["rows"]:
        measured, alone = row["measure, originals/s"]["values"], row["teacher alone, originals/s"]["values"]
        assert len(measured) == 5
        assert min(measured + alone + row["loaded teacher, originals/s"]["values"]) > 0
        shares = [one / other for one, other in zip(measured, alone, strict=True)]
        assert row["measure / teacher alone"]["values"] == shares
        assert row["measure, teacher images/s"]["median"] == pytest.approx(
            row["teacher images an original"] * row["measure, originals/s"]["median"]
        )
    assert "| cutmixpick_student |" in capsys.readouterr().out


def test_a_config_of_measure_is_taken_without_its_passes_and_its_results_file(tmp_path):
    path = tmp_path / "run.yaml"
    content = {
        "augmentation": "cutmix",
        "output": "runs/mine",
        "epochs": 240,
        "measure": {"epochs": 10, "augmentation": ["flip", "mixup"], "json": "result.json", "window": 320},
        "bench teacher": {"images": 50},
    }
    path.write_text(yaml.safe_dump(content))
    options, config = parse("bench teacher", ["--config", str(path), "--rounds", "6"])
    assert (options.augmentation, options.window, options.images, options.rounds) == (["flip", "mixup"], 320, 50, 6)
    assert (options.epochs, options.json, options.folder) == (1, None, Path("runs/bench"))
    assert "epochs" not in config
    chosen, _ = parse("bench teacher", ["--config", str(path), "--augmentation", "identity", "cutout"])
    assert chosen.augmentation == ["identity", "cutout"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "0"], "--images 0: give at least 1"),
        (["--images", "2"], "--images 2: give at least one for each of 3 classes"),
        (["--rounds", "3"], "--rounds 3: give at least 5"),
        (["--augmentation", "cutmx"], 'unknown --augmentation "cutmx": did you mean cutmix'),
        (["--json", "x.json"], "--json"),
        (["--teacher.name", "smal"], "smal"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*arguments, *more])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]


def test_the_plan_is_made_of_options_that_exist(tmp_path):
    for planned in bench.plan(tmp_path):
        options, _ = parse("bench teacher", planned.arguments)
        assert options.augmentation == ["published"]
        assert options.data.root == str(tmp_path)
