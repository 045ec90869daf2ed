"""The ledger as a stranger reads it: entries, their hash chain, its signatures, and the rules of the account."""
