"""Checking a ledger entry by entry: its chain, its rules, and at the end its signed head."""

from __future__ import annotations

from shared.audit.accounts import Accounts, RuleBroken
from shared.audit.chain import DIGEST_BYTES, Entry, genesis, link
from shared.audit.signatures import SignatureInvalid, SignedHead, bytes_of


class Verifier:
    """Takes a ledger's entries in their order, each with the hash that is kept beside it.

    Args:
        ledger: the ledger's id.
        public_key: the key the ledger must be signed with, 32 bytes; from somewhere else than the ledger itself.

    Attributes:
        findings: what is wrong, one sentence each; empty for a ledger that nobody touched.
        accounts: what the entries amount to, those left out not counted.
        seq, hash: where the chain stands.
    """

    def __init__(self, ledger: str, public_key: bytes) -> None:
        self.findings: list[str] = []
        self.accounts = Accounts()
        self.seq = 0
        self.hash = genesis(ledger, public_key)
        self._ledger, self._public_key = ledger, public_key
        self._whole = True

    def take(self, entry: Entry, kept_hash: str | None) -> None:
        """One more entry."""
        self._link(entry.seq, entry.leaf(), kept_hash)
        if self._whole:
            try:
                self.accounts.apply(entry)
            except RuleBroken as broken:
                self.findings.append(str(broken))
                self._whole = False  # what follows from a broken account says nothing more

    def take_redacted(self, seq: int, leaf: bytes, kept_hash: str | None) -> None:
        """An entry that was left out, of which only the leaf is shown."""
        self._link(seq, leaf, kept_hash)

    def finish(self, signed: SignedHead) -> None:
        """The end of the ledger, as the key signed it."""
        head = signed.head
        try:
            signed.verify(self._public_key)
        except SignatureInvalid as invalid:
            self.findings.append(f"the signed head: {invalid}")
        if head.ledger != self._ledger:
            self.findings.append(f"the signed head is of ledger {head.ledger}, and this is {self._ledger}")
        if (head.seq, head.hash) != (self.seq, self.hash.hex()):
            self.findings.append(
                f"the signed head is entry {head.seq} with hash {head.hash[:16]}..., and the entries end at "
                f"{self.seq} with {self.hash.hex()[:16]}...: entries were changed, cut off or added"
            )

    def _link(self, seq: int, leaf: bytes, kept_hash: str | None) -> None:
        # Every number is given once: a gap is an entry that was taken out, whatever the hashes say.
        if seq != self.seq + 1:
            self.findings.append(f"entry {seq} stands after entry {self.seq}: entries are missing, or in another order")
        self.hash, self.seq = link(self.hash, leaf), seq
        if kept_hash != self.hash.hex():
            self.findings.append(f"entry {seq}: it, or one before it, is not what its hash was made of")
            # Go on from the hash that is kept: what stands behind it may be whole, and then only this one is named.
            try:
                self.hash = bytes_of(kept_hash, DIGEST_BYTES, "hash")
            except SignatureInvalid:
                self.findings.append(f"entry {seq}: its hash is not one")
