"""Accuracy against training queries, for every estimator at several budgets: what a query buys.

    python -m benchmarks.frontier --out DIR                                                    digits
    python -m benchmarks.frontier --out DIR --dataset cifar10 --data DIR --model cifar-resnet20 --weights FILE \
        --budgets 50000 150000 500000 1500000 5000000

Starts an oracle, trains each variant over HTTP with each budget and seed (a client and an account of its own, audited),
certifies all with the same images and noise, and writes `frontier.md`, `frontier.json` and `frontier.png`, with the
zero-query baselines beside them, and a table of how good the estimates are: their cosine and length against autograd on
the runs' own states. Resumable: what is done asks nothing again.

A budget is of training queries. A variant whose samples cost what they cost is given the steps that the budget buys at
the cost of a sample of the pre-trained stack; what it then really spent is what is drawn. The optimizer, its rate and
schedule, the batch, the pre-trained stack and the validation rule are the same for all variants.
"""
