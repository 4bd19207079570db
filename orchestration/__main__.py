"""``python -m orchestration``: the command where it is not installed, as in a job of a cluster."""

from orchestration.cli.app import main

if __name__ == "__main__":
    main()
