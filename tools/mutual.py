"""`dalikd mutual`: train several nets together that imitate each other."""

from collections.abc import Sequence
from functools import partial

from dalikd.tools.cli import run_command
from dalikd.tools.train import train


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("mutual", partial(train, command="mutual"), argv)


if __name__ == "__main__":
    main()
