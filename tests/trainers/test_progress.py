from types import SimpleNamespace

from dalikd.trainers.progress import progress


def test_only_the_main_process_has_a_bar(capsys):
    for main in (True, False):
        bar = progress(SimpleNamespace(is_main_process=main), "train", range(3))
        assert bar.disable != main
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # done within two seconds


def test_a_log_file_gets_few_lines(monkeypatch):
    for terminal, seconds in ((True, 0.1), (False, 10.0)):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        bar = progress(SimpleNamespace(is_main_process=True), "train", total=3)
        assert bar.mininterval == seconds
        bar.close()
