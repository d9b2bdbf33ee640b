"""`python -m dalikd.tools.bench NAME`."""

from dalikd.tools.bench import main

if __name__ == "__main__":
    main()
