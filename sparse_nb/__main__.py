"""`python -m sparse_nb` is the command `sparse-nb`."""

from .cli.main import main

if __name__ == "__main__":
    main()
