import gzip
import hashlib
import io
import re
import tarfile
from pathlib import Path

import pytest
import torch
import torchvision

from dalikd.kd import known_weights
from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.known_weights import (
    KNOWN,
    LAYOUTS,
    KnownWeights,
    check_sha256,
    file_sha256,
    identify,
    open_weights,
    published_classes,
)

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


# -------------------------------------------------------------------------------------- folders and tars of publishers


@pytest.fixture
def tar(tmp_path):
    """With two files, one of them under two names, and a link to one."""
    path = tmp_path / "cifar_teachers.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth", "./vgg13_vanilla/ckpt_epoch_240.pth"):
            member = tarfile.TarInfo(name)
            member.size = len(CONTENT)
            archive.addfile(member, io.BytesIO(CONTENT))
        link = tarfile.TarInfo("link.pth")
        link.type, link.linkname = tarfile.SYMTYPE, "vgg13_vanilla/ckpt_epoch_240.pth"
        archive.addfile(link)
    return path


@pytest.mark.parametrize(
    "member", ["cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth", "vgg13_vanilla/ckpt_epoch_240.pth"]
)
def test_a_file_in_a_tar_is_read_without_unpacking_it(tar, member):
    assert file_sha256(f"{tar}:{member}") == DIGEST
    with open_weights(f"{tar}:{member}") as file:
        assert file.read() == CONTENT
    assert list(tar.parent.iterdir()) == [tar]


@pytest.mark.parametrize(("member", "count"), [("link.pth", "no"), ("teacher.pth", "no"), ("ckpt_epoch_240.pth", "2")])
def test_what_a_tar_has_is_listed_where_a_name_is_wrong(tar, member, count):
    listed = r"\./vgg13_vanilla/ckpt_epoch_240\.pth, cifar_teachers/resnet56_vanilla/ckpt_epoch_240\.pth$"
    with pytest.raises(ValueError, match=rf"cifar_teachers\.tar has {count} files {member}: give one of {listed}"):
        file_sha256(f"{tar}:{member}")


@pytest.mark.parametrize(
    ("name", "link", "kind"),
    [
        ("/etc/passwd", "", tarfile.REGTYPE),
        ("a/../../net.pth", "", tarfile.REGTYPE),
        ("link.pth", "/etc/passwd", tarfile.SYMTYPE),
        ("a/link.pth", "../../net.pth", tarfile.SYMTYPE),
        ("a/link.pth", "../net.pth", tarfile.LNKTYPE),
    ],
)
def test_a_tar_whose_members_lead_out_of_it_is_refused(tar, name, link, kind):
    with tarfile.open(tar, "a") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        archive.addfile(member)
    with pytest.raises(ValueError, match=rf"{tar} is damaged or not a tar: '{name}' leads out of the folder"):
        file_sha256(f"{tar}:cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth")


def test_a_tar_takes_no_more_memory_or_time_than_its_size(tar):
    member = "cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth"
    packed = gzip.compress(tar.read_bytes())
    whole = tar.read_bytes()
    negative = bytearray(whole)
    negative[124:136] = b"\xff" * 11 + b"\x00"  # the first member's size
    huge = bytearray(whole)
    huge[124:136] = b"77777777777\x00"
    for content in (packed, negative, huge):
        tar.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{tar} is damaged or not a tar"):
            file_sha256(f"{tar}:{member}")


def test_a_damaged_tar_is_named(tmp_path):
    (tmp_path / "t.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"t\.tar is damaged or not a tar: "):
        file_sha256(tmp_path / "t.tar:net.pth")
    (tmp_path / "t.tar:net.pth").write_bytes(CONTENT)  # a file that is called so
    assert file_sha256(tmp_path / "t.tar:net.pth") == DIGEST


@pytest.mark.parametrize(
    ("path", "model", "publisher"),
    [
        ("cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth", "resnet56", "mdistiller"),
        ("models/ResNet50_vanilla/ckpt_epoch_240.pth", "ResNet50", "RepDistiller"),
        ("train_teacher_cifar_arch_wrn_40_2_aux_dataset_cifar100_seed0/wrn_40_2_aux.pth.tar", "wrn_40_2_aux", "HSAKD"),
        (
            "train_student_cifar_tarch_wrn_40_2_aux_arch_resnet8x4_aux_dataset_cifar100_seed3/x_best.pth.tar",
            *("resnet8x4_aux", "HSAKD"),
        ),
        ("mine_vanilla/ckpt_epoch_240.pth", None, None),
        ("myresnet56_vanilla/ckpt_epoch_240.pth", None, None),
        ("resnet56_vanilla/ckpt_epoch_40.pth", None, None),
    ],
)
def test_a_file_without_a_published_checksum_is_known_by_its_folders(path, model, publisher, tmp_path, monkeypatch):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    monkeypatch.chdir(file.parent)
    found = identify(file.name)
    assert found == identify(file)
    if model is None:
        assert found is None
        return
    assert found is not None
    assert (found.model, found.sha256, found.top1, found.data) == (model, "", None, "CIFAR-100")
    assert found.publisher.endswith(f"/{publisher}")
    assert found.normalisation == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def test_a_tar_is_as_the_folder_in_it(tar):
    found = identify(f"{tar}:vgg13_vanilla/ckpt_epoch_240.pth")
    assert found is not None
    assert (found.model, found.publisher) == ("vgg13", "https://github.com/megvii-research/mdistiller")


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


def test_the_documented_lists_are_these():
    text = (Path(__file__).parents[2] / "docs" / "weights.md").read_text("utf-8")
    rows = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in text.splitlines() if "|" in line]
    layouts, files = ([row for row in rows if len(row) == width and row[1][:1] not in "-:"][1:] for width in (5, 6))
    assert files == [
        (entry.file, entry.model, entry.data, f"{entry.top1:.2f}", *(_listed(part) for part in entry.normalisation))
        for entry in KNOWN
    ]
    assert all(f"- {entry.publisher}: " in text for entry in KNOWN)
    assert [row[2:] for row in layouts] == [
        (layout.data, *(_listed(part) for part in layout.normalisation)) for layout in LAYOUTS
    ]
    for (path, publisher, *_), layout in zip(layouts, LAYOUTS, strict=True):
        assert publisher == layout.publisher
        assert layout.path.search(path.replace("MODEL", "resnet56").replace("N", "0"))


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
