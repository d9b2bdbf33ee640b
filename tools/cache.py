"""`dalikd cache`: write down what the teacher says, for later runs of `dalikd distill --teacher.cache`; verify it."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalikd.tools.cli import run_command
from dalikd.tools.summary import give_json
from dalikd.trainers.launch import start
from dalikd.trainers.teacher_cache.fill import CacheOptions, Comparison, fill_cache, verify_cache


def cache(options: CacheOptions, config: dict[str, Any]) -> Path:
    """Fill a cache, or verify one; a cache that differs from its teacher ends the process with exit code 1."""
    accelerator = start(options.device, options.precision)
    if options.verify is None:
        filled = fill_cache(options, accelerator, config)
        folder, layout = filled.folder, filled.layout
        accelerator.print(f"finished; read it with: dalikd distill --teacher.cache {folder}")
        if accelerator.is_main_process:
            sizes = {"epochs": layout.epochs, "images": layout.rows, "storage": layout.storage}
            give_json(options.json, {"folder": str(folder), **sizes})
        return folder
    found = verify_cache(options, accelerator)
    print(_report(options.verify, found))
    differences = {
        name: {"max": largest, "mean": mean} if math.isfinite(largest) else None
        for name, (largest, mean) in (("logits", found.logits), ("probabilities", found.probabilities))
    }
    kept = {name: getattr(found, name) for name in ("storage", "rows", "picks", "most_picks", "tolerance", "passes")}
    give_json(options.json, {"folder": options.verify, **kept, "differences": differences})
    if not found.passes:
        sys.exit(1)
    return Path(options.verify)


def _report(folder: str, found: Comparison) -> str:
    judged = "probabilities" if found.storage == "topk" else "logits"
    figures = "; ".join(
        f"|difference| of {name}: max {largest:.3g}, mean {mean:.3g}"
        for name, (largest, mean) in (("logits", found.logits), ("probabilities", found.probabilities))
    )
    verdict = "agrees with" if found.passes else "DIFFERS from"
    return (
        f"{found.rows} images of the teacher cache {folder} ({found.storage})\n{figures}\n"
        f"other picks now: {found.picks}\n"
        f"the cache {verdict} its teacher (tolerance {found.tolerance:g} of {judged}, "
        f"{100 * found.most_picks:g} % of the picks)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("cache", cache, argv)


if __name__ == "__main__":
    main()
