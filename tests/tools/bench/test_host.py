"""CPU time of the main thread, by part; on images of 32 pixels and in rounds too short to mean anything."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.bench import host
from dalikd.tools.bench.host import AHEAD, LOADER
from dalikd.tools.bench.record import Watch


def _work(seconds: float) -> None:
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


def test_the_innermost_part_is_charged_waiting_is_not_and_threads_are_apart():
    watch = Watch()
    inner = watch.of("inner", lambda: _work(0.03))

    def outer():
        _work(0.01)
        inner()
        time.sleep(0.1)
        ThreadPoolExecutor(1).submit(inner).result()

    watch.of("outer", outer)()
    assert watch.seconds == pytest.approx({"inner": 0.03, AHEAD: 0.03, "outer": 0.01}, abs=0.008)


def test_every_part_of_a_step_has_a_row(bench):
    """The sums are those of their parts; picking takes more operators than looking at originals."""
    record, out = bench("host", "--batch_size", 32, "--steps", 1, "--data.threads", 1)
    rows = {(row["augmentation"], row["part"]): row for row in record.rows}
    for name in ("identity", "cutmixpick_teacher"):
        parts = [rows[name, part]["µs an image"]["values"] for part in LOADER]
        assert all(len(values) == 2 for values in parts)
        assert all(min(values) > 0 for values in parts[2:])  # of the others a thread has more
        assert sum(rows[name, AHEAD]["µs an image"]["values"]) > sum(parts[0] + parts[1])
        whole = rows[name, "all of the loader"]
        assert whole["µs an image"]["values"] == pytest.approx([sum(values) for values in zip(*parts, strict=True)])
        assert rows[name, "wall time"]["ms a step"]["low"] > whole["ms a step"]["low"]
    plain, picked = (rows[name, "all of the step"]["operators a step"] for name in ("identity", "cutmixpick_teacher"))
    assert picked > plain + 50 > 50
    assert record.notes[0].startswith("All of the loader, µs an image: identity ")
    assert "| DALI takes the inputs |" in out


def test_the_loaders_time_holds_what_dali_does_to_take_its_inputs(source, monkeypatch):
    loader = Loader(source, Sampler(300, 50), DrawSpec(View(32, "random_resized_crop")), threads=1)
    from nvidia.dali import external_source

    name = "_prep_data_for_feed_input"
    prepare = getattr(external_source, name)
    monkeypatch.setattr(external_source, name, lambda *args, **more: (_work(0.01), prepare(*args, **more))[1])
    cost = host.loader_microseconds(loader, batches=3)
    loader.close()
    assert cost > 3 * 0.01 / 50 * 1e6  # three inputs: paths, and a window's start and shape


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--augmentations", "cutmx"), 'unknown --augmentation "cutmx": did you mean cutmix'),
        (("--steps", 0), "--steps 0: give at least 1"),
    ],
)
def test_mistakes_are_one_line(refused, words, message):
    assert message in refused("host", *words)
