"""Methods measured in turn with their nets alone."""

METHODS = ("KD", "CRD", "MLKD", "DistillationToken")
NETS = ["--teacher.name", "resnet8", "--teacher.weights", "null", "--model", "resnet8", "--batch_size", "8"]


def test_methods_are_measured_against_the_nets_alone(bench, training, teacher):
    words = [*training, *teacher, *NETS]
    record, _ = bench("methods", *words, "--steps", 1, "--warmup", 1, "--methods", *METHODS)
    rows = {row["method"]: row for row in record.rows}
    assert list(rows) == ["nets alone", "KD", "CRD", "MLKD", "one pass"]
    assert rows["nets alone"]["time of the nets alone"]["median"] == 1.0
    assert rows["KD"]["own MiB"] == 0.0
    images = 99  # two memories of 128 numbers an image
    assert rows["CRD"]["own MiB"] * 2**20 > 2 * images * 128 * 4
    assert rows["MLKD"]["kept MiB"] > 1.5 * rows["KD"]["kept MiB"] > 0  # of two views
    assert record.notes[0].startswith("DistillationToken is left out: DistillationToken needs a student with two heads")
    assert record.notes[1].startswith("2 students on one teacher pass (KD, CRD) are ")  # MLKD has another augmentation


def test_images_can_be_simulated(bench, training, teacher):
    words = [*training, *teacher, *NETS]
    record, _ = bench("methods", *words, "--steps", 1, "--warmup", 1, "--methods", "CRD", "--samples", 20000)
    assert record.rows[1]["own MiB"] > 20000 * 2 * 128 * 4 / 2**20
    assert "20,000 simulated images" in record.title


def test_unknown_methods_are_named(refused, training, teacher):
    assert "--methods KDD: there are AB, AT, CATKD" in refused("methods", *training, *teacher, "--methods", "KDD")
