"""Losses per row, in float64: a finite difference of losses loses digits that float32 does not have to spare."""

from __future__ import annotations

from math import log

from torch import Tensor
from torch.nn import functional as F


def stability_labels(logits: Tensor) -> Tensor:
    """The oracle's own hard labels, argmax f(x): logits [n, k] of clean images -> labels [n], int64.

    Training against these asks the defended model to agree with the oracle, and needs no ground truth
    (the stability loss of Zhang et al., ICLR 2022, section 4).

    Raises:
        ValueError: logits that are not [n, k].
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [n, k], not {list(logits.shape)}")
    return logits.argmax(dim=1)


def squared_error(answers: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each row: answers [n, k], targets [n, k] -> losses [n] >= 0, float64.

    Differentiable in `answers`.

    Raises:
        ValueError: shapes other than these.
    """
    if answers.ndim != 2 or targets.shape != answers.shape:
        raise ValueError(f"answers and targets [n, k] expected, not {list(answers.shape)} and {list(targets.shape)}")
    # l_i = |answer_i - target_i|^2 / k
    return (answers.double() - targets.double()).square().mean(dim=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row: logits [n, k], labels [n] (int64, 0 to k - 1) -> losses [n] >= 0, float64.

    Differentiable in `logits`, so that white-box training shares it.

    Raises:
        ValueError: logits that are not [n, k], or labels that are not [n].
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits [n, k] and labels [n] expected, not {list(logits.shape)} and {list(labels.shape)}")
    # l_i = -log softmax(logits_i)[label_i]
    return F.cross_entropy(logits.double(), labels, reduction="none")


def mean_log_scores(logits: Tensor) -> Tensor:
    """Scores of a smoothed classifier from its draws: logits [m, b, k] -> log of the mean softmax [b, k], float64.

    In logarithms, so that neither a margin nor a gradient is lost where a softmax is 0 or 1 to the last digit. One draw
    gives its log softmax. The cross-entropy of these scores is -log of the label's mean probability.

    Raises:
        ValueError: logits that are not [m, b, k].
    """
    if logits.ndim != 3:
        raise ValueError(f"logits must be [m, b, k], not {list(logits.shape)}")
    # s = log 1/m sum_j softmax(f(x + delta_j))    (the soft smoothed classifier of Salman et al., NeurIPS 2019)
    return logits.double().log_softmax(dim=2).logsumexp(dim=0) - log(len(logits))
