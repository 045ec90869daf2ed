"""The same classifier behind what users would otherwise pick, and behind ours.

    python -m benchmarks.peers setup --venvs DIR
    python -m benchmarks.peers run --venvs DIR [--weights FILE] [--data DIR] [--model linear]

`setup` makes a virtual environment for each framework and installs it there; torch and what else is missing comes from
the environment it is started from. `run` starts every server, lets all candidates take turns and prints the table; what
does not install or start, or answers something else than the classifier's logits, is reported by name.
"""
