"""The entropy log: what it keeps, its files, and its plot."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from dalikd.kd.entropy_log import EntropyLog, draw_entropies, plot_entropies

KINDS = ("originals", "candidates", "picks")


def filled(steps: int, every: int = 10, seed: int = 0) -> EntropyLog:
    """Batches of 8, the third one of 5; two candidates an image, and 6 picks of 8."""
    generator = torch.Generator().manual_seed(seed)
    log = EntropyLog(every)
    for index in range(steps):
        rows = 5 if index == 2 else 8
        log.add(index * every, *(torch.rand(size, generator=generator) for size in (rows, 2 * rows, rows - 2)))
    return log


def save(log: EntropyLog, path: Path) -> None:
    with path.open("wb") as file:
        log.save(file)


def assert_equal(log: EntropyLog, other: EntropyLog) -> None:
    for name, values in other.arrays().items():
        np.testing.assert_array_equal(log.arrays()[name], values)


def test_every_so_many_steps():
    log = EntropyLog(100)
    assert [step for step in range(301) if log.due(step)] == [0, 100, 200, 300]
    assert all(EntropyLog(1).due(step) for step in range(5))


def test_arrays_are_by_step_and_filled_up():
    log = EntropyLog(10)
    log.add(0, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.0, 4.0]))
    log.add(10, torch.tensor([5.0], dtype=torch.float64), torch.tensor([6.0, torch.nan]), torch.tensor([6.0]))
    arrays = log.arrays()
    assert len(log) == 2
    assert arrays["steps"].tolist() == [0, 10]
    assert arrays["sizes"].tolist() == [[2, 4, 2], [1, 2, 1]]
    np.testing.assert_array_equal(arrays["originals"], np.array([[1, 2], [5, np.nan]], dtype=np.float32))
    np.testing.assert_array_equal(arrays["candidates"], [[1, 2, 3, 4], [6, np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(arrays["picks"], [[3, 4], [6, np.nan]])
    assert all(arrays[name].dtype == np.float32 for name in KINDS)


def test_records_are_copies():
    log, rows = EntropyLog(1), torch.ones(4, requires_grad=True)
    log.add(0, rows, rows, rows)
    with torch.no_grad():
        rows.zero_()
    assert log.arrays()["picks"].tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_file_holds_everything(steps: int, tmp_path: Path):
    log, path = filled(steps), tmp_path / "entropies.npz"
    save(log, path)
    save(log, path)  # over the first one
    loaded = EntropyLog.load(path)
    assert_equal(loaded, log)
    assert (loaded.every, len(loaded)) == (10, steps)
    with np.load(path) as file:
        assert sorted(file) == ["candidates", "every", "originals", "picks", "sizes", "steps"]


def test_a_broken_entropy_survives_a_file(tmp_path: Path):
    log = EntropyLog(1)
    log.add(0, torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan]), torch.tensor([2.0]))
    save(log, tmp_path / "entropies.npz")
    assert EntropyLog.load(tmp_path / "entropies.npz").arrays()["sizes"].tolist() == [[2, 1, 1]]


@pytest.mark.parametrize("steps", [0, 3])
def test_resuming(steps: int):
    file = io.BytesIO()
    torch.save(filled(steps).state_dict(), file)
    resumed = EntropyLog(10)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert_equal(resumed, filled(steps))
    rows = torch.rand(7)
    whole = filled(steps)
    for log in (resumed, whole):
        log.add(30, rows, rows, rows)
    assert_equal(resumed, whole)


def test_a_saved_state_does_not_change_afterwards():
    log = filled(2)
    state = log.state_dict()
    log.add(100, torch.ones(3), torch.ones(3), torch.ones(3))
    restored = EntropyLog(10)
    restored.load_state_dict(state)
    assert_equal(restored, filled(2))


def test_unusable_records_are_refused():
    rows = torch.ones(4)
    with pytest.raises(ValueError, match="every is 0"):
        EntropyLog(0)
    log = filled(2)
    for step in (10, 0):
        with pytest.raises(ValueError, match=f"step {step} comes after step 10"):
            log.add(step, rows, rows, rows)
    for wrong in (torch.ones(4, 2), torch.ones(()), torch.ones(0)):
        with pytest.raises(ValueError, match="entropies of candidates have shape"):
            log.add(20, rows, wrong, rows)
    assert len(log) == 2


def test_unusable_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"missing\.npz: no such file"):
        EntropyLog.load(tmp_path / "missing.npz")
    text, foreign, cut, array = (tmp_path / name for name in ("text.npz", "foreign.npz", "cut.npz", "array.npz"))
    text.write_text("no zip")
    np.savez(foreign, other=np.zeros(3))
    save(filled(3), cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    with array.open("wb") as file:
        np.save(file, np.zeros(3))
    for path in (text, foreign, cut, array):
        with pytest.raises(ValueError, match=rf"{path.name}: no entropy log"):
            EntropyLog.load(path)


def test_the_plot_shows_shares_means_and_steps():
    log = EntropyLog(10)
    for step in (0, 10, 20):
        log.add(step, torch.full((4,), 0.5), torch.tensor([0.0, 1.0] * 4), torch.tensor([1.0, 2.0]))
    figure = draw_entropies(log, "cutmix")
    *panels, along = figure.axes
    texts = [panel.texts[0].get_text() for panel in panels]
    assert texts == ["originals\nmean 0.5", "candidates\nmean 0.5", "picks\nmean 1.5"]
    assert panels[0].get_title(loc="left") == "cutmix"
    for panel, mean, shares in zip(
        panels, (0.5, 0.5, 1.5), ({12: 100}, {0: 50, 25: 50}, {25: 50, 49: 50}), strict=True
    ):
        assert panel.lines[0].get_xdata() == [mean, mean]
        values = panel.patches[0].get_data().values  # type: ignore[attr-defined]
        assert {int(index): values[index] for index in np.flatnonzero(values)} == shares
        assert panel.get_xlim() == (0, 2)
    assert [line.get_ydata().tolist() for line in along.lines] == [[0.5] * 3, [0.5] * 3, [1.5] * 3]  # type: ignore[union-attr]
    assert along.lines[0].get_xdata().tolist() == [0, 10, 20]  # type: ignore[union-attr]


def test_one_record_has_no_steps_to_plot():
    assert len(draw_entropies(filled(1)).axes) == 3
    log = EntropyLog(1)
    log.add(0, torch.zeros(4), torch.zeros(8), torch.zeros(4))
    assert draw_entropies(log).axes[0].get_xlim() == (0, 1)


def test_many_records_are_averaged():
    log = EntropyLog(1)
    for step in range(450):  # 3 records in a point
        log.add(step, torch.full((2,), float(step)), torch.ones(2), torch.ones(2))
    line = draw_entropies(log).axes[-1].lines[0]
    assert np.asarray(line.get_ydata()).tolist() == np.arange(1, 450, 3).tolist()


def test_plots_are_written_from_logs_and_files(tmp_path: Path):
    save(filled(4), tmp_path / "entropies.npz")
    plot_entropies(tmp_path / "entropies.npz", tmp_path / "file.png")
    plot_entropies(filled(4), tmp_path / "log.png")
    assert (tmp_path / "file.png").read_bytes() == (tmp_path / "log.png").read_bytes()
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_entropies(EntropyLog(1), tmp_path / "empty.png")
    with pytest.raises(NotADirectoryError, match="no such folder"):
        plot_entropies(filled(1), tmp_path / "missing" / "log.png")
