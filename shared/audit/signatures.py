"""What the ledger's key signs (Ed25519, RFC 8032): the head of the chain, and a receipt for each charge.

The two are told apart by the first line of what is signed. A head is overwritten by the next one and kept nowhere else
on the server, so that an older head cannot stand in for the present one; a receipt can never stand in for a head.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import asdict, dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.audit.chain import DIGEST_BYTES, Entry, canonical_json, link, read_entry

_HEAD, _RECEIPT = b"zo-defense head 1\n", b"zo-defense receipt 1\n"
KEY_BYTES, SIGNATURE_BYTES = 32, 64


class SignatureInvalid(ValueError):
    """A signature that the key did not make, or a text that is not what it should be."""


@dataclass(frozen=True)
class Head:
    """The end of the chain: the last entry's `seq` and `hash` (hexadecimal); 0 and hash_0 for an empty ledger."""

    ledger: str
    seq: int
    hash: str
    at: str

    def message(self) -> bytes:
        """What is signed."""
        return _HEAD + canonical_json(asdict(self))


@dataclass(frozen=True)
class SignedHead:
    """A head with its signature (64 bytes, hexadecimal)."""

    head: Head
    signature: str

    def verify(self, public_key: bytes) -> None:
        """Raises SignatureInvalid unless the key made the signature."""
        verify(public_key, bytes_of(self.signature, SIGNATURE_BYTES, "signature"), self.head.message())


@dataclass(frozen=True)
class Receipt:
    """What a client holds of a charge: the entry itself, the chain's hash before it, and the signature of both.

    It proves that the ledger held this entry at this place. An export in which the place holds anything else is not the
    ledger that the receipt was given from.
    """

    ledger: str
    previous: str
    entry: Entry
    signature: str

    @property
    def hash(self) -> str:
        """The chain's hash at the entry, hexadecimal."""
        return link(bytes_of(self.previous, DIGEST_BYTES, "hash"), self.entry.leaf()).hex()

    def verify(self, public_key: bytes) -> None:
        """Raises SignatureInvalid unless the key made the signature."""
        message = _receipt_message(self.ledger, self.previous, self.entry)
        verify(public_key, bytes_of(self.signature, SIGNATURE_BYTES, "signature"), message)

    def text(self) -> str:
        """As the header Query-Receipt carries it: `BODY.SIGNATURE`, both base64url."""
        body = canonical_json({"ledger": self.ledger, "previous": self.previous, "entry": self.entry.fields()})
        return f"{_encode(body)}.{_encode(bytes.fromhex(self.signature))}"

    @staticmethod
    def parse(text: str) -> Receipt:
        """Read `text()` back. Raises SignatureInvalid where it is none; the signature is not looked at."""
        body, dot, signature = text.partition(".")
        try:
            fields = json.loads(_decode(body))
            entry = read_entry(fields["entry"])
            receipt = Receipt(str(fields["ledger"]), str(fields["previous"]), entry, _decode(signature).hex())
            bytes_of(receipt.previous, DIGEST_BYTES, "hash")
            if dot and receipt.text() == text:
                return receipt
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise SignatureInvalid("this is not a receipt of this protocol")


class Signer:
    """The private half of a ledger's key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()

    def sign_head(self, head: Head) -> SignedHead:
        """Sign the end of the chain."""
        return SignedHead(head, self._key.sign(head.message()).hex())

    def sign_receipt(self, ledger: str, previous: bytes, entry: Entry) -> Receipt:
        """Sign an entry and the hash before it; the same entry has the same receipt always (Ed25519 is deterministic).

        Args:
            ledger: the ledger's id.
            previous: the chain's hash before the entry, 32 bytes.
        """
        signature = self._key.sign(_receipt_message(ledger, previous.hex(), entry))
        return Receipt(ledger, previous.hex(), entry, signature.hex())


def verify(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Raises SignatureInvalid unless the key made the signature of the message."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise SignatureInvalid("the signature was not made by this key, or what it signs was changed") from None


def read_public_key(text: str) -> bytes:
    """A public key of 64 hexadecimal digits as 32 bytes. Raises SignatureInvalid where it is none."""
    return bytes_of(text.strip(), KEY_BYTES, "public key")


def bytes_of(text: object, length: int, what: str) -> bytes:
    """`length` bytes, written as lower-case hexadecimal digits. Raises SignatureInvalid where it is not that."""
    try:
        value = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        value = b""
    if len(value) != length or value.hex() != text:
        raise SignatureInvalid(f"a {what} is {2 * length} hexadecimal digits")
    return value


def _receipt_message(ledger: str, previous: str, entry: Entry) -> bytes:
    return _RECEIPT + canonical_json({"ledger": ledger, "previous": previous, "entry": entry.fields()})


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
