"""The oracle over HTTP; the only package that knows httpx.

remote        batches into requests, answers into scores, the books
connection    one request and its answer: address, key, TLS
retrying      which failures may pass, and how long to keep at them
pacing        what the server says about its limits
foreign_v2    any model behind the Open Inference Protocol, foreign_json any JSON endpoint: how they are asked
recognising   whether a server is one of ours
"""

from defender_client.oracle_client.connection import OracleUnreachable
from defender_client.oracle_client.recognising import asker, keeps_a_ledger
from defender_client.oracle_client.remote import RemoteOracle

__all__ = ["OracleUnreachable", "RemoteOracle", "asker", "keeps_a_ledger"]
