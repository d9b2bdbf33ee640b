import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dalikd.tools.cli import parse
from dalikd.tools.measure import comparison
from dalikd.tools.summary import give_json, json_asked, next_steps, print_training, ranking_table

VAL = {"top1": 0.5, "top5": 0.9, "loss": 1.25, "images": 10}


def test_a_training_report_says_last_and_best(capsys):
    results = {
        "last": {"epoch": 4, "val": VAL, "t_stddev": 0.0123456},
        "best": {"epoch": 2, "val": VAL},
        "folder": "runs/x",
        "evaluated": "ema.safetensors",
    }
    print_training(results, SimpleNamespace(is_main_process=True))
    assert capsys.readouterr().out.splitlines() == [
        "last epoch (4): top1 50.00 %, top5 90.00 %, loss 1.2500 on 10 images",
        "best epoch (2): top1 50.00 %, top5 90.00 %, loss 1.2500 on 10 images",
        "T. stddev while training: 0.012346",
        "weights: runs/x/last/ema.safetensors",
        "run folder: runs/x",
    ]
    results["last"] |= {"t_stddev": None, "windows": 1}
    print_training(results, SimpleNamespace(is_main_process=True))
    assert "T. stddev while training: too few windows (1 of at least 2; " in capsys.readouterr().out
    print_training(results, SimpleNamespace(is_main_process=False))
    assert capsys.readouterr().out == ""


def test_too_few_windows_are_said_with_what_would_be_enough():
    report = {
        "separation": None, "stopped": None, "entropy_plots": [], "window": 640, "confidence": 0.95,
        "results": [{"stddev": None, "images": 400, "windows": 1}],
    }  # fmt: skip
    assert comparison(report) == (
        "T. stddev needs two windows of 640 teacher outputs (640 originals and their augmented images); 400 originals "
        "filled 1: raise --epochs, or lower --window"
    )


def test_the_ranking_has_the_lowest_loss_first():
    points = [
        {"da": "flip", "t_stddev": 0.02, "s_test_loss": 1.5, "top1": 0.25},
        {"da": "cutmix", "t_stddev": 0.01, "s_test_loss": 1.25, "top1": 0.5},
    ]
    assert ranking_table(points).splitlines()[2:] == [
        "| cutmix | 0.010000 | 1.2500 | 50.00 % |",
        "| flip | 0.020000 | 1.5000 | 25.00 % |",
    ]


def test_the_next_steps_are_commands_that_exist():
    text = next_steps(Path("runs/demo"))
    commands = re.findall(r"^  dalikd (\w+) +(.*)$", text, re.MULTILINE)
    assert [name for name, _ in commands] == ["train", "measure", "distill"]
    for name, arguments in commands:
        options, _ = parse(name, arguments.split())
        assert options.data.root == "DATA"


def test_json_goes_to_stdout_alone_and_text_beside_it(capsys, tmp_path):
    with json_asked("-"):
        print("a table")
        give_json("-", {"a": [1]})
        print("and more")
    assert json.loads((captured := capsys.readouterr()).out) == {"a": [1]}
    assert captured.err == "a table\nand more\n"
    with json_asked(tmp_path / "new/a.json"):
        print("a table")
        give_json(tmp_path / "new/a.json", {"a": [1]})
    assert json.loads((tmp_path / "new/a.json").read_text()) == {"a": [1]}
    assert capsys.readouterr() == (f"a table\nwritten: {tmp_path}/new/a.json\n", "")
    with json_asked(None):
        give_json(None, {"a": [1]})
        print("a table")
    assert capsys.readouterr() == ("a table\n", "")


def test_a_json_file_that_cannot_be_written_is_found_before_the_work(tmp_path):
    with pytest.raises(ValueError, match=r"^--json: .* cannot be written"), json_asked(tmp_path):
        raise AssertionError
