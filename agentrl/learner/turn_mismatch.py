"""How far the learner's logprobs are from the sampler's, turn by turn.

A mean over all tokens hides one broken turn among a hundred: a prompt rendered otherwise than it was sampled, a cache entry of
other weights, a wrong temperature. All numbers are of the whole step, so cuts into micro-batches and ranks cannot show in them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HIGH_NATS = 0.1
"""Mean |log trained - log rollout| per token above which a turn counts as off: its probabilities differ by a tenth. Engines and
trainers in bf16 differ by a few hundredths."""


def turns_of_slots(sampled: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """[M] the turn of each sampled token, 0, 1, … in token order.

    A turn is a run of sampled tokens within one sequence. Two generations with nothing between them are one turn here.

    Args:
        sampled: [N] response mask of all sequences, end to end.
        offsets: [S + 1] where each sequence starts, and the end.
    """
    follows = np.zeros(len(sampled), dtype=np.bool_)
    follows[1:] = sampled[:-1]
    starts = offsets[:-1]
    follows[starts[starts < len(sampled)]] = False
    return np.cumsum(sampled & ~follows, dtype=np.int64)[sampled] - 1


def turn_mismatch(trained: Tensor, rollout: Tensor, turns: Tensor) -> dict[str, float]:
    """``rollout_corr/turn_logprob_diff_*``: of each turn the mean |log trained - log rollout|, then mean, max and share of high ones.

    Args:
        trained: [M] logprobs by the learner.
        rollout: [M] as the servers reported.
        turns: [M] the turn of each token; numbers may be left out. Empty gives no metrics.
    """
    if not len(turns):
        return {}
    _, places, counts = torch.unique(turns, return_inverse=True, return_counts=True)
    gaps = (trained.double() - rollout.double()).abs()
    per_turn = torch.zeros(len(counts), dtype=torch.float64, device=gaps.device).index_add(0, places, gaps) / counts
    return {
        "rollout_corr/turn_logprob_diff_mean": float(per_turn.mean()),
        "rollout_corr/turn_logprob_diff_max": float(per_turn.max()),
        "rollout_corr/turn_logprob_diff_fraction_high": float((per_turn > HIGH_NATS).double().mean()),
    }
