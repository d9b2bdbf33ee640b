"""`python -m dalikd`: the console script."""

from dalikd.tools.main import main

if __name__ == "__main__":
    main()
