"""The command line. Importing it, before torch, prepares a process that runs a command."""

import os
import sys
from types import TracebackType

# OpenMP's threads spin while they wait for work. Beside another busy process they would take its cores, and the step
# waits for a thread that has none; so they spin shortly and then sleep. Whoever says something else is heard.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"


def _stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C where no command catches it, as while torch is imported: one line and exit code 130."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    words = [word.rpartition("/")[2] for word in sys.orig_argv]
    modules = [
        word.removeprefix("dalikd.tools.").replace(".", " ") for word in words if word.startswith("dalikd.tools.")
    ]
    after = words[words.index("dalikd") + 1 :] if "dalikd" in words else []
    print(f"{' '.join(['dalikd', *(modules or after)[:1]])}: stopped (Ctrl-C)", file=sys.stderr)
    sys.exit(130)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _stopped
