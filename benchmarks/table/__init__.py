"""Every column of the paper's table (Zhang et al., ICLR 2022, table 2) over HTTP, one command.

    python -m benchmarks.table --out OUT --dataset digits --scale cpu --seeds 0 1 2
    python -m benchmarks.table --out OUT --dataset cifar10 --data DIR --model cifar-resnet20 --weights FILE --scale cpu

Starts the oracle (for RS one that hides a classifier retrained with noise), gives every run a client of its own whose
budget is what the run was planned to cost, trains and certifies each on the same images under the same noise, audits
it, and writes `table.md`, `table.json` and `certified-accuracy.png`. With --equal-queries N every zeroth-order column
is also trained with N training queries: `equal-queries.md` and `.png`.

Interrupted, the same command goes on where it stopped; run again, it asks nothing for what is done.
"""
