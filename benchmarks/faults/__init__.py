"""The fault campaign: everything a machine can do to the ledger, done to it, and the account checked to the query.

    python -m benchmarks.faults --faults 2000 --seed 0 --ledger sqlite --out faults.txt

Its parts: `stores` are real databases that can be locked, filled up and crashed; `servers` are real servers that die
and come back; `proxy` cuts connections and writes down every answer; `defenders` and `racers` are the clients;
`injection` draws faults and does them; `judge` has the last word, from the exported ledger and what was observed.
"""
