"""Several teachers of one student: each one's T. stddev, resuming, several students, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dalikd.kd.backbones import create_model
from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.picking import entropy
from dalikd.tools import distill
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.tasks.distill import Distillation


def _with_small_windows(loop: Any) -> Distillation:
    task = loop.task
    task.goodness, task.goodness_of_each = TeacherStddev(3, 20), [TeacherStddev(3, 20) for _ in task.goodness_of_each]
    return task


@pytest.mark.parametrize("ensemble", ["mean", "entropy"])
def test_each_has_the_stddev_that_it_has_alone(make_loop, make_net, distill_options, ensemble):
    """On the same images: those of identity."""
    options = {"teacher_weights": [1.0, 3.0], "teacher_ensemble": ensemble, "teachers": [TeacherConfig("small")] * 2}
    loop = make_loop(options=distill_options(**options), teacher=[make_net(1), make_net(2)])
    together = _with_small_windows(loop)
    for _ in range(3):
        loop.step()
    found = together.metrics()
    assert [teacher["name"] for teacher in found["teachers"]] == ["net0", "net1"]
    for seed, teacher in zip((1, 2), found["teachers"], strict=True):
        loop = make_loop(f"alone{seed}", options=distill_options(), teacher=make_net(seed))
        alone = _with_small_windows(loop)
        for _ in range(3):
            loop.step()
        expected = alone.metrics()
        assert expected["windows"] == found["windows"] == 9
        assert "teachers" not in expected
        for name in ("t_stddev", "t_entropy"):
            assert teacher[name] == expected[name] != found[name]


def test_the_student_learns_from_what_they_say_together(make_loop, make_net, distill_options):
    options = distill_options(augmentation="cutmixpick_teacher")
    task = make_loop(options=options, teacher=[make_net(1), make_net(2)]).task
    batch = make_loop("other", options=options).loader.next()
    fed = task.prepare(batch, 0.0)
    expected = (make_net(1).eval()(batch.pixels) + make_net(2).eval()(batch.pixels)) / 2
    torch.testing.assert_close(fed.teacher.logits, expected, rtol=1e-4, atol=1e-4)  # batch norms are folded
    pool = task._pass(batch, 0, turned=False)[0].branches[0].pool_logits  # picks are the more uncertain half
    assert entropy(fed.augmented_logits).mean() > entropy(pool).mean()


@pytest.mark.parametrize("augmentation", ["identity", "manifold_mixup"])
def test_each_ones_stddev_goes_on(make_loop, make_net, distill_options, augmentation):
    parts = {"options": distill_options(augmentation=augmentation), "teacher": [make_net(1), make_net(2)]}
    whole = make_loop("whole", **parts)
    for _ in range(2):
        whole.step()
    state = whole.task.get_extra_state()
    again = make_loop("again", **parts)
    again.task.set_extra_state(state)
    batch = whole.loader.next()
    for task in (whole.task, again.task):
        task.prepare(batch, 0.0)
    for metric, other in zip(whole.task.goodness_of_each, again.task.goodness_of_each, strict=True):
        assert metric.originals == 96
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(other.state_dict()[k]))
            for k, a in metric.state_dict().items()
        )


# ------------------------------------------------------------------------------------------- the command line


def _weights(folder: Path, *, classes: int = 3, seed: int) -> str:
    torch.manual_seed(seed)
    path = folder / f"small{classes}-{seed}.pt"
    torch.save(create_model("small", classes).state_dict(), path)
    return str(path)


def _two(folder: Path, *seeds: int) -> str:
    entries = [{"name": "small", "weights": _weights(folder, seed=seed)} for seed in seeds]
    return yaml.safe_dump(entries, default_flow_style=True, width=10**6).strip()


@pytest.fixture(scope="module")
def common(tree, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("teachers")
    return [
        *("--data.root", str(tree), "--data.image_size", "12", "--data.threads", "1", "--device", "cpu"),
        *("--batch_size", "32", "--mix.group", "8", "--augmentation", "cutmixpick_teacher"),
        *("--teachers", _two(folder, 1, 2), "--teacher_ensemble", "entropy", "--epochs", "5", "--eval_every", "5"),
    ]


@pytest.fixture(scope="module")
def run(common, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "run"
    distill.main([*common, "--teacher_weights", "[1, 3]", "--model", "small", "--output", str(folder)])
    return folder


def test_results_say_what_each_teacher_is_and_its_stddev(run):
    results = json.loads((run / "results.json").read_text())
    assert [(teacher["name"], len(teacher["sha256"])) for teacher in results["teachers"]] == [("small", 64)] * 2
    assert results["teacher_weights"] == [0.25, 0.75]
    assert "teacher" not in results
    figures = results["last"]
    assert figures["windows"] == 2
    stddevs = [figures["t_stddev"], *(teacher["t_stddev"] for teacher in figures["teachers"])]
    assert len({*stddevs}) == 3
    assert all(stddev > 0 for stddev in stddevs)
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert [entry["name"] for entry in kept["teachers"]] == ["small", "small"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--teachers", (2, 1)), "the teacher's weights or normalisation: others than before"),
        (("--teacher_weights", "[3, 1]"), "--teacher_weights was [1.0, 3.0], now it is [3.0, 1.0]"),
    ],
)
def test_a_run_of_other_teachers_is_another_run(run, tmp_path, capsys, change, message):
    option, value = change
    words = [option, value if isinstance(value, str) else _two(tmp_path, *value)]
    with pytest.raises(SystemExit):
        distill.main(["--resume", str(run), *words])
    assert message in capsys.readouterr().err


def test_files_of_the_same_content_are_the_same_teachers(run, tmp_path, capsys):
    distill.main(["--resume", str(run), "--teachers", _two(tmp_path, 1, 2)])
    assert "small alone: " in capsys.readouterr().out


def test_several_students_have_the_same_teachers(common, run, tmp_path):
    """With equal weights for all students of one pass; each ends as alone."""
    file = tmp_path / "students.yaml"
    file.write_text(
        yaml.safe_dump([{"name": "same", "model": "small"}, {"name": "other", "model": "small", "seed": 3}])
    )
    words = [*common, "--teacher_weights", "[1, 3]", "--students", str(file), "--output", str(tmp_path / "out")]
    distill.main(words)
    alone = json.loads((run / "results.json").read_text())
    for name in ("same", "other"):
        results = json.loads((tmp_path / "out" / name / "results.json").read_text())
        assert results["last"]["teachers"] == alone["last"]["teachers"]
        assert (results["last"]["val"] == alone["last"]["val"]) == (name == "same")


PLAIN = ("--augmentation", "identity")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*PLAIN, "--loss", "AT"],
            "--loss AT needs the teacher's features, and several teachers have their logits alone",
        ),
        ([*PLAIN, "--loss", "HSAKD", "--model", "resnet8_aux"], "--loss HSAKD needs the teacher's turned"),
        (["--teachers", "[{name: small}]"], "--teachers, entry 1: the teacher small has no weights"),
        (["--teachers+", "{name: unknown, weights: x.pt}"], "--teachers, entry 3: teacher unknown"),
        (["--teachers+", "{name: small, weights: FIVE}"], "--teachers, entry 3: teacher small: "),
        (["--teachers+", "{name: small, weigths: x.pt}"], "Option 'weigths' is not accepted"),
        (["--teachers+", "{name: small, weights: $NOWHERE/x.pt}"], "--teachers, entry 1: weights $NOWHERE/x.pt"),
        (["--teachers", "[small]"], "--teachers, entry 1 is small: give its options, {name: VALUE, …}"),
        (["--teachers", "[{name: small"], 'Parser key "teachers"'),
        (["--teacher.name", "small"], "--teacher and --teachers are both given"),
        (["--teacher.cache", "x"], "a teacher cache holds the answers of one teacher"),
        (["--teachers+", "{name: small, cache: x}"], "a teacher cache holds the answers of one teacher"),
        (["--teacher_weights", "[1]"], "--teacher_weights [1.0]: give a number above 0 for each of --teachers, 2 in"),
        (["--teacher_weights", "[1, 0]"], "--teacher_weights [1.0, 0.0]: give a number above 0 for each"),
        (["--teacher_weights", "[1, .inf]"], "--teacher_weights [1.0, inf]: give a number above 0 for each"),
        (["--teachers", "[]"], "--teacher_ensemble entropy weighs several teachers: name --teachers"),
    ],
)
def test_what_does_not_go_together_is_named(common, tmp_path, capsys, words, message):
    words = [word.replace("FIVE", _weights(tmp_path, classes=5, seed=0)) for word in words]
    model = [] if "--model" in words else ["--model", "resnet8"]
    with pytest.raises(SystemExit):
        distill.main([*common, *model, *words, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_paths_in_entries_are_expanded(common, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PLACE", str(tmp_path))
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump({"teachers": [{"name": "small", "weights": "$PLACE/none.pt"}]}))
    for words in (["--config", str(config)], ["--teachers", "[{name: small, weights: $PLACE/none.pt}]"]):
        with pytest.raises(SystemExit):
            distill.main([*common, "--model", "small", *words])
        assert f"{tmp_path}/none.pt" in capsys.readouterr().err
