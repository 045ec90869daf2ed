"""The wire both programs read: messages, codec, errors. numpy and pydantic only; no I/O, no torch."""
