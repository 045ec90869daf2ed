"""The `defender-client` command."""

from shared import process


def main() -> None:
    """Prepare the process, then run the command line (which loads torch)."""
    process.prepare()
    from defender_client.cli import app

    app()


if __name__ == "__main__":
    main()
