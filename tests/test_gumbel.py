import math
from collections import Counter

import torch

from unlearn_llm.gumbel import GumbelNoise


def test_samples_follow_the_models_distribution():
    # 4000 draws of p = (.6, .3, .1): standard deviations below .008; four of them.
    noise = GumbelNoise([str(row) for row in range(4000)], 2.0, torch.device("cpu"))
    logits = 2.0 * torch.tensor([0.6, 0.3, 0.1]).log().expand(4000, 3)
    counts = Counter(noise(None, logits).argmax(-1).tolist())
    for token, p in enumerate((0.6, 0.3, 0.1)):
        assert math.isclose(counts[token] / 4000, p, abs_tol=0.032)


def test_a_sample_is_fixed_by_its_seed_and_not_by_its_neighbours():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = GumbelNoise(["a", "b", "c"], 1.0, torch.device("cpu"))(None, logits)
    alone = GumbelNoise(["b"], 1.0, torch.device("cpu"))(None, logits[1:2])
    assert torch.equal(together[1:2], alone)
