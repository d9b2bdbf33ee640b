import hashlib
import re
from pathlib import Path

import pytest
import torch
import torchvision

from dalikd.kd import known_weights
from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.known_weights import KNOWN, KnownWeights, check_sha256, file_sha256, identify, published_classes

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100, "ImageNet": 1000}


@pytest.fixture
def known(monkeypatch):
    """A list of one file, of which only the first digits are published."""
    entry = KnownWeights("net-1.pt", DIGEST[:8], "resnet8", "CIFAR-10", HALF, 90.0, "https://example.org")
    monkeypatch.setattr(known_weights, "KNOWN", (entry,))
    return entry


def test_a_file_is_known_by_its_content_whatever_its_name(known, tmp_path):
    for name in ("net-1.pt", "teacher.pth"):
        (tmp_path / name).write_bytes(CONTENT)
        assert identify(tmp_path / name) is known
    (tmp_path / "other.pt").write_bytes(b"other")
    assert identify(str(tmp_path / "other.pt")) is None


def test_a_known_name_with_another_content_is_a_damaged_download(known, tmp_path):
    path = tmp_path / known.file
    path.write_bytes(CONTENT[:-1])
    found = hashlib.sha256(CONTENT[:-1]).hexdigest()[:8]
    message = rf"net-1\.pt is a damaged download: .*begins with {found}, .*with {DIGEST[:8]}; fetch it again from https"
    with pytest.raises(ValueError, match=message):
        identify(path)


@pytest.mark.parametrize("sha256", [DIGEST, DIGEST.upper(), DIGEST[:8], f" {DIGEST[:20]}\n"])
def test_a_checksum_or_its_first_digits_are_checked(sha256, tmp_path):
    (tmp_path / "net.pt").write_bytes(CONTENT)
    check_sha256(tmp_path / "net.pt", sha256)
    (tmp_path / "net.pt").write_bytes(CONTENT + b".")
    with pytest.raises(ValueError, match=r"net\.pt is damaged or another file: its SHA-256 is [0-9a-f]{64}, not "):
        check_sha256(tmp_path / "net.pt", sha256)


@pytest.mark.parametrize("sha256", ["", DIGEST[:7], DIGEST + "0", "x" * 64])
def test_what_is_no_checksum_is_refused(sha256, tmp_path):
    (tmp_path / "net.pt").write_bytes(CONTENT)
    with pytest.raises(ValueError, match=f'"{sha256}" is no SHA-256: give its 64 hexadecimal digits'):
        check_sha256(tmp_path / "net.pt", sha256)


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(CONTENT)
    assert file_sha256(path) == DIGEST
    (tmp_path / "new.pt").write_bytes(CONTENT[::-1])
    (tmp_path / "new.pt").replace(path)
    assert file_sha256(path) == hashlib.sha256(CONTENT[::-1]).hexdigest()


# ------------------------------------------------------------------------------------------------------- the list


def test_names_and_checksums_are_unique_and_agree():
    assert len({entry.file for entry in KNOWN}) == len({entry.sha256[:8] for entry in KNOWN}) == len(KNOWN)
    for entry in KNOWN:
        assert re.fullmatch("[0-9a-f]{8}|[0-9a-f]{64}", entry.sha256)
        assert Path(entry.file).stem.endswith(f"-{entry.sha256[:8]}")


@pytest.mark.parametrize("entry", KNOWN, ids=lambda entry: entry.file)
def test_the_net_of_an_entry_exists(entry):
    with torch.device("meta"):
        assert create_model(entry.model, CLASSES[entry.data]) is not None
    assert str(entry) == f"{entry.model}, trained on {entry.data} ({entry.publisher})"


@pytest.mark.parametrize("entry", [entry for entry in KNOWN if entry.data == "ImageNet"], ids=lambda entry: entry.file)
def test_entries_of_torchvision_are_what_torchvision_says_of_them(entry):
    name = entry.model.removeprefix("timm:")
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    transform = weights.transforms()
    assert weights.url.endswith(f"/{entry.file}")
    assert entry.top1 == pytest.approx(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"], abs=0.006)
    assert entry.normalisation == (tuple(transform.mean), tuple(transform.std))
    with torch.device("meta"):
        theirs, ours = torchvision.models.get_model(name).state_dict(), create_model(entry.model, 1000).state_dict()
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in ours.items()}


def test_the_documented_list_is_this_one():
    text = (Path(__file__).parents[2] / "docs" / "weights.md").read_text("utf-8")
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    found = [(file, model, data, top1, mean, std) for file, model, data, top1, mean, std in rows[2:]]
    assert found == [
        (entry.file, entry.model, entry.data, f"{entry.top1:.2f}", *(_listed(part) for part in entry.normalisation))
        for entry in KNOWN
    ]
    assert all(f"- {entry.publisher}: " in text for entry in KNOWN)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def test_the_classes_of_published_data_are_known_in_their_order():
    """All three publish their classes by the alphabet."""
    for data, count in CLASSES.items():
        names = published_classes(data)
        assert names is not None
        assert len(names) == len(set(names)) == count
        assert list(names) == sorted(names)
    assert {known.data for known in KNOWN} == CLASSES.keys()
    assert published_classes("a folder") is None
