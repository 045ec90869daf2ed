"""Other people's attacks against an oracle that may only be asked, with the queries counted.

    counted     the oracle as all of them see it: in batches that it takes, counted
    art         as a `BlackBoxClassifier` of the Adversarial Robustness Toolbox     extra `art`
    foolbox     as a Foolbox `Model`                                                extra `foolbox`
    torch       as an `nn.Module`, for AutoAttack and the like

Each takes any oracle: a `RemoteOracle`, a function, the defended stack in front of one, smoothed or not. What the
oracle refuses is raised through the attack as it is, `BudgetExhausted` above all, and nothing beyond it is charged.
"""
