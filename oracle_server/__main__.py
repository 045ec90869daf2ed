"""`python -m oracle_server` is `oracle-server`."""

from oracle_server.cli import app

app()
