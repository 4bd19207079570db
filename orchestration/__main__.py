"""``python -m orchestration``: runs the command without an installation, as in a cluster's job."""

from orchestration.cli.app import main

if __name__ == "__main__":
    main()
