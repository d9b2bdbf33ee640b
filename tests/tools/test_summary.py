import re
from pathlib import Path
from types import SimpleNamespace

from dalikd.tools.cli import parse
from dalikd.tools.measure import comparison
from dalikd.tools.summary import next_steps, print_training, ranking_table

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
