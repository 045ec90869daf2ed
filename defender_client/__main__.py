"""`python -m defender_client` is the `defender-client` command."""

from defender_client.cli import app

app()
