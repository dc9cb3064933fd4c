"""`python -m pmcore.cli`."""

from pmcore.cli.entry import main

if __name__ == "__main__":
    main()
