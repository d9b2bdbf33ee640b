"""The page of a report: what it says, what it refuses, and that a browser shows it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from dalikd.tools import report

STDDEV = {"flip": 0.05, "mixup": 0.03, "cutmix": 0.01, "<b>&": 0.04, "identity": 0.06}


@pytest.fixture
def folder(make_run, write_measurement, tmp_path):
    """Two seeds of five augmentations, one with a name that HTML would take for its own, and a teacher."""
    for number, (name, stddev) in enumerate(STDDEV.items()):
        for seed in (0, 1):
            make_run(f"run{number}-{seed}", name, seed, loss=100 * stddev + seed, top1=0.9 - 10 * stddev + seed / 50)
    weights = {"last/student.safetensors": "abc"}
    made = {"command": "train", "teacher": None, "sha256": weights, "model": "resnet20"}
    make_run("teacher", results=made, top1=0.95)
    write_measurement(STDDEV)
    return tmp_path


class _Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps the text of the page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, _):
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, *_):
        """Of a plot's parts, which hold nothing."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(arguments, tmp_path):
    page = tmp_path / "new" / "page.html"
    report.main([*map(str, arguments), "--output", str(page)])
    text = page.read_text()
    tags = _Tags(text)
    assert tags.open == []
    return text, tags.text


def test_a_page_has_all_of_its_parts_and_needs_nothing_else(folder, tmp_path, capsys):
    text, shown = written([folder, "--samples", 0], tmp_path)
    assert re.findall(r"(?:src|href)=\"(?!#|data:)|url\(|<script|https?:", text) == []
    assert re.findall(r"\d\. ([^0-9]+)", shown)[:5] == ["cutmix", "mixup", "<b>&", "flip", "identity"]
    assert "Student's t over a setting's seeds" in shown
    assert "Teacher resnet20: top1 95.00 %" in shown
    assert "1.00 (1.00 to 1.00)" in shown  # the mean loss over the seeds is linear in T. stddev
    assert shown.count("32.0 s") == 6  # five augmentations and the teacher
    assert "data.root" not in shown.partition("options that all runs have in common")[2]
    assert capsys.readouterr().out.startswith("11 runs\nwritten: ")


def test_runs_without_labelled_images_have_a_table_of_their_own(make_run, tmp_path):
    last = {"epoch": 2, "train": {"loss": 3.0, "agreement": 0.25}, "val": None, "t_stddev": 0.02}
    results = {"data": {"name": "images"}, "fingerprint": {"train": "i", "val": None}, "best": {}, "last": last}
    config = {"data": {"name": "images", "root": "gone"}}
    bare = [make_run(f"bare{seed}", "flip", seed, config=config, results=results) for seed in (0, 1)]
    make_run("labelled", "mixup")
    text, shown = written([tmp_path, "--samples", 0, "--json", tmp_path / "told.json"], tmp_path)
    told = json.loads((tmp_path / "told.json").read_text())
    assert [(one["name"], one["last"] is None) for one in told["settings"]] == [
        ("data.name images · flip", True),
        ("data.name imagefolder · mixup", False),
    ]
    assert "data images (? training images), imagefolder (? training images); 200 validation images." in shown
    assert re.search(r">1. data.name imagefolder · mixup<", text)
    assert re.search(r'>data.name images · flip</td><td class="n">25.00</td><td class="n">3.0000</td>', text)
    text, shown = written([*bare, "--samples", 0], tmp_path)
    assert "data images (? training images); no labelled images to evaluate on." in shown
    assert 'class="n">25.00</td>' in text


def test_one_run_is_a_page_too(folder, tmp_path):
    _, shown = written([folder / "run1-0"], tmp_path)
    assert "One run, seed 0; data imagefolder" in shown
    assert "Wilson" in shown
    assert "it needs several augmentations with a T. stddev" in shown
    assert "cannot be read here: " in shown  # its images are gone


def test_what_is_not_finished_is_left_out_of_a_folder_and_named(folder, make_run, tmp_path, capsys):
    make_run("run0-0", results={"finished": False, "steps": 3})
    _, shown = written([folder, "--samples", 0], tmp_path)
    words = "run0-0 is not finished, 3 steps are done: go on with it by dalikd distill --resume"
    assert words in shown
    assert f"left out: {folder}/{words}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (None, ["none"], "none: no such folder"),
        (None, ["empty"], "empty holds no finished run"),
        (None, [".", "--samples", "99"], "--samples 99: give 0 to 32"),
        (("run0-0", {"results": {"finished": False}}), ["run0-0"], "run0-0 is not finished"),
        (("run0-0", {"results": {"last": {}}}), ["."], "last.epoch is missing: the run is damaged"),
        (("run0-0", {"results": {"fingerprint": {"train": "x", "val": "v"}}}), ["."], "different images"),
        (
            ("run0-0", {"results": {"data": {"name": "digits"}, "fingerprint": {"train": "d", "val": "e"}}}),
            *(["."], "evaluated on other images: data.name is digits in "),
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_no_page(folder, make_run, capsys, spoil, arguments, words):
    (folder / "empty").mkdir()
    if spoil:
        make_run(spoil[0], **spoil[1])
    first, *others = arguments
    with pytest.raises(SystemExit) as stop:
        report.main([str(folder / first), *others, "--output", str(folder / "page.html")])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert words in error
    assert list(folder.glob("*.html")) == []


def test_samples_are_images_of_the_run(make_run, tree, tmp_path):
    data = {"name": "imagefolder", "root": str(tree), "image_size": 32, "threads": 1}
    for name in ("cutmix", "manifold_mixup", "flip"):
        make_run(f"run-{name}", name, config={"data": data, "compile": "off"})
    text, _ = written([tmp_path, "--samples", 3], tmp_path)
    rows = re.findall(r"<figcaption>([\w ]+)</figcaption><div class=\"images\">(.*?)</div>", text)
    assert [name for name, _ in rows] == ["original", "cutmix", "flip"]
    for _, images in rows:
        found = re.findall(r"base64,([^\"]+)", images)
        assert [Image.open(io.BytesIO(base64.b64decode(image))).size for image in found] == [(32, 32)] * 3
    assert rows[0][1] != rows[1][1]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_a_browser_shows_it_without_an_error(folder, tmp_path):
    written([folder, "--samples", 0], tmp_path)
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    page = (tmp_path / "new" / "page.html").as_uri()
    ended = subprocess.run(["chromium", *words, profile, page], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ended.stderr
    assert ended.stdout.count("<svg") > 20
    assert "Made by dalikd report" in ended.stdout
