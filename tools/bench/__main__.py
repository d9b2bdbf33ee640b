"""`python -m dalikd.tools.bench NAME`."""

from dalikd.tools.bench.commands import main

if __name__ == "__main__":
    main()
