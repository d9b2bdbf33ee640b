"""`dalikd export`: the net of a run alone, in files that others can load."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dalikd.pipelines.files import build_once
from dalikd.tools.cli import resolve, run_function
from dalikd.tools.layers import Layer
from dalikd.tools.summary import give_json
from dalikd.trainers.export import (
    Format,
    Parity,
    check_formats,
    check_login,
    check_target,
    open_images,
    open_net,
    push_folder,
    write_export,
)


def export(
    run: Path,
    output: Path | None = None,
    format: list[Format] = ["safetensors", "torch"],  # noqa: B006
    epoch: Literal["last", "best"] = "last",
    net: str | None = None,
    pixels: bool = False,
    tolerance: float = 1e-4,
    images: int = 64,
    root: Path | None = None,
    license: str | None = None,
    push: str | None = None,
    private: bool = False,
    overwrite: bool = False,
    json: Path | None = None,
) -> dict[str, Parity]:
    """Write the net of a run as files that others can load, without teacher and trainer, and with a model card.

    Args:
        run: folder of the run.
        output: the new folder; default: RUN-export, beside the run.
        format: which files, one word or several: safetensors (model.safetensors; of a timm net in timm's own layout),
            torch (model.pt2, of torch.export), onnx (model.onnx; pip install 'dalikd[onnx]').
        epoch: weights of the last epoch or of the best one.
        net: of several nets, or of a net and its average, the name of its file, such as net1 or student; default: the
            one that the run's accuracy is of.
        pixels: model.pt2 and model.onnx take uint8 pixels [N, 3, S, S] and normalise them; else normalised images.
        tolerance: largest difference of a logit of model.pt2 or model.onnx from the net's, in fp32 on the CPU; above it
            nothing is written.
        images: of the validation split that they are compared on, 256 at most.
        root: folder of the run's data set, where it lies elsewhere now.
        license: of the weights, for the model card, such as apache-2.0.
        push: repository on the Hugging Face Hub, USER/NAME, that the folder is uploaded to in the end.
        private: make that repository private, if it is new.
        overwrite: replace an earlier export in the folder.
        json: JSON file for what was written and how the files compare with the net, - for stdout.
    """
    if not (tolerance > 0 and 1 <= images <= 256):
        raise ValueError(f"--tolerance {tolerance:g} --images {images}: give a number above 0, and 1 to 256 images")
    check_formats(format)
    folder = output or run.absolute().with_name(f"{run.absolute().name}-export")
    check_target(folder, overwrite=overwrite)
    if push is not None:
        check_login(push)
    saved = open_net(run, epoch, net)
    data = {**saved.config.get("data", {}), **({"root": str(root)} if root else {})}
    given = {"data": data, "seed": saved.config.get("seed", 0), "device": "cpu", "precision": "fp32"}
    run_options, _ = resolve("evaluate", [Layer(str(run / "config.yaml"), given)])
    view, shown = open_images(run_options, images if set(format) - {"safetensors"} else 0)
    found: dict[str, Parity] = {}

    def build(place: Path) -> None:
        more = {"pixels": pixels, "tolerance": tolerance, "license": license, "repository": push}
        found.update(write_export(place, saved, format, view, shown, **more))

    build_once(folder, build, replace=overwrite)
    for what, parity in found.items():
        print(f"{what}: {parity}")
    print(f"written: {folder}{f'; {saved.unfinished}' if saved.unfinished else ''}")
    written = {"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())}
    address = None if push is None else push_folder(folder, push, private=private)
    if address is not None:
        print(f"pushed: {address}")
    compared = {what: parity._asdict() for what, parity in found.items()}
    give_json(json, {**written, "compared": compared, "state": saved.unfinished or "finished", "pushed": address})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("export", export, argv, lists=("format",), positional=True)


if __name__ == "__main__":
    main()
