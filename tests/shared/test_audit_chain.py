"""Bytes and signatures: golden ones, and the same computed elsewhere."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from audit_support import BODY, Written, small
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.audit.chain import Entry, NotAnEntry, genesis, link, read_entry
from shared.audit.signatures import Head, Receipt, SignatureInvalid, SignedHead, Signer, read_public_key, verify

GOLDEN = Entry(7, "2026-01-02T03:04:05.000006+00:00", 3, "charge", 4, None, "ключ", "ab", 6, None)


def test_an_entry_has_one_spelling() -> None:
    assert GOLDEN.canonical() == (
        b'{"amount":null,"at":"2026-01-02T03:04:05.000006+00:00","body_sha256":"ab","client_id":3,'
        b'"idempotency_key":"\\u043a\\u043b\\u044e\\u0447","kind":"charge","note":null,"refers_to":6,"rows":4,"seq":7}'
    )
    assert GOLDEN.leaf().hex() == hashlib.sha256(b"\x00" + GOLDEN.canonical()).hexdigest()
    assert GOLDEN.leaf().hex() == "adf5d8d779b88044426441d453d087d4d2a5a8f4bf475326e40b3728f36431fc"


def test_the_chain_is_what_its_definition_says() -> None:
    written = small()
    value = genesis(written.ledger, written.public_key)
    assert value == written.hashes[0]
    for entry, expected in zip(written.entries, written.hashes[1:], strict=True):
        value = link(value, entry.leaf())
        assert value == expected


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": True}, "rows is of type bool"),
        ({"rows": 1.0}, "rows is of type float"),
        ({"at": None}, "at is of type NoneType"),
        ({"note": b"x"}, "note is of type bytes"),
        ({"extra": 1}, "fields of an entry"),
    ],
)
def test_only_entries_are_read(change: dict[str, object], told: str) -> None:
    fields = {name: getattr(GOLDEN, name) for name in Entry.__dataclass_fields__}
    assert read_entry(fields) == GOLDEN
    with pytest.raises(NotAnEntry, match=told):
        read_entry(fields | change)
    for name in fields:
        with pytest.raises(NotAnEntry):
            read_entry({key: value for key, value in fields.items() if key != name})


# RFC 8032, section 7.1: secret key, public key, message, signature of TEST 1 to 3.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
        "655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aee"
        "b00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28d"
        "c027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC_8032)
def test_signatures_are_those_of_rfc_8032(secret: str, public: str, message: str, signature: str) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    assert Signer(key).public_key == read_public_key(public)
    assert key.sign(bytes.fromhex(message)).hex() == signature
    verify(read_public_key(public), bytes.fromhex(signature), bytes.fromhex(message))
    with pytest.raises(SignatureInvalid):
        verify(read_public_key(public), bytes.fromhex(signature), bytes.fromhex(message) + b"x")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not on this machine")
def test_a_stranger_with_openssl_can_check_a_head(tmp_path: Path) -> None:
    written = small()
    signed = written.signer.sign_head(written.head)
    message = (
        b"zo-defense head 1\n"
        + (
            f'{{"at":"now","hash":"{written.hashes[-1].hex()}","ledger":"{written.ledger}","seq":{len(written.entries)}}}'
        ).encode()
    )
    # A SubjectPublicKeyInfo of RFC 8410 is twelve bytes and the key.
    (tmp_path / "key.der").write_bytes(bytes.fromhex("302a300506032b6570032100") + written.public_key)
    (tmp_path / "message").write_bytes(message)
    (tmp_path / "signature").write_bytes(bytes.fromhex(signed.signature))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-keyform", "DER", "-inkey", "key.der", "-rawin"]
    command += ["-in", "message", "-sigfile", "signature"]
    for whole in (True, False):
        if not whole:
            (tmp_path / "message").write_bytes(message.replace(b'"now"', b'"then"'))
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) is whole, done.stderr


def test_a_receipt_says_what_was_charged_and_is_read_back() -> None:
    written = small()
    entry = written.entries[5]
    receipt = written.signer.sign_receipt(written.ledger, written.hashes[5], entry)
    assert Receipt.parse(receipt.text()) == receipt
    assert receipt.hash == written.hashes[6].hex()
    receipt.verify(written.public_key)
    for other in (
        replace(receipt, ledger="00"),
        replace(receipt, previous=written.hashes[4].hex()),
        replace(receipt, entry=replace(entry, rows=5)),
    ):
        with pytest.raises(SignatureInvalid):
            other.verify(written.public_key)
    with pytest.raises(SignatureInvalid):
        receipt.verify(Written(seed=2).public_key)


def test_what_is_no_receipt() -> None:
    written = small()
    text = written.signer.sign_receipt(written.ledger, written.hashes[5], written.entries[5]).text()
    body, _, signature = text.partition(".")
    odd = replace(written.entries[5], rows=True)
    unsound = written.signer.sign_receipt(written.ledger, written.hashes[5], odd).text()
    for wrong in ("", ".", text + "=", text + ".", f"{signature}.{body}", body, "ключ." + signature, text[1:], unsound):
        with pytest.raises(SignatureInvalid):
            Receipt.parse(wrong)


def test_a_receipt_cannot_stand_in_for_a_head() -> None:
    written = Written()
    entry = written.add("client", note="x", body_sha256=BODY)
    receipt = written.signer.sign_receipt(written.ledger, written.hashes[0], entry)
    with pytest.raises(SignatureInvalid):
        SignedHead(written.head, receipt.signature).verify(written.public_key)
    signed = written.signer.sign_head(Head(written.ledger, 1, written.hashes[1].hex(), "now"))
    signed.verify(written.public_key)
    with pytest.raises(SignatureInvalid):
        replace(receipt, signature=signed.signature).verify(written.public_key)
