"""The formulas of methods.md sections 1 and 2, written out in float64, and what they are given.

The formulas see full logits and shift, mask and reduce in their own loops; they share no code with
the package.
"""

import math

import torch

from unlearn_llm.scoring import ChunkedDistribution, Head
from unlearn_llm.types import Scored

VOCABULARY = 7
# Per sequence: the label at every position, -100 where no loss is taken. Unequal lengths, with
# padding at the end (attention 0) and an end token that is scored.
LABELS = {
    "original": [[-100, -100, 3, 1, 6, 2], [-100, 5, 2, -100, -100], [-100, -100, -100, 4, 2]],
    "idk": [[-100, -100, 1, 2], [-100, 6, 0, 4, 2], [-100, -100, -100, 2]],
    "random": [[-100, -100, 5, 0, 2], [-100, 3, 2], [-100, -100, -100, 1, 1, 2]],
    "alternate": [[-100, -100, 4, 6, 2], [-100, 1, 1, 3, 2], [-100, -100, -100, 0, 2]],
}  # fmt: skip
ATTENTION = {
    "original": [[1] * 6, [1, 1, 1, 0, 0], [1] * 5],
    "idk": [[1] * 4, [1] * 5, [1, 1, 1, 1]],
    "random": [[1] * 5, [1] * 3, [1] * 6],
    "alternate": [[1] * 5, [1] * 5, [1] * 5],
}
WIDTH = 6


def padded(rows, fill):
    return torch.tensor([[*row, *[fill] * (WIDTH - len(row))] for row in rows])


def random_logits(seed, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        answer: scale * torch.randn(3, WIDTH, VOCABULARY, generator=generator, dtype=torch.float64)
        for answer in LABELS
    }


def scored(logits, positions, layers=()):
    """What the scorer hands to a loss, from full logits; hidden states are logits, turned."""
    result = {}
    for answer, values in logits.items():
        labels, attention = padded(LABELS[answer], -100), padded(ATTENTION[answer], 0)
        mask = attention[:, 1:].bool() if positions == "attended" else labels[:, 1:] != -100
        if positions == "answer_after_first":
            for row in mask:
                row[row.nonzero()[0]] = False
        targets = labels[:, 1:].clamp(min=0)
        head = Head(lambda rows: rows, VOCABULARY)
        distribution = ChunkedDistribution(values[:, :-1][mask], targets[mask], head)
        states = {layer: values[:, :-1].roll(layer, -1)[mask] for layer in layers}
        result[answer] = Scored(mask, targets, distribution, hidden=states)
    return result


# The formulas of methods.md.


def token_nlls(logits, answer):
    """Negative log-likelihoods of the labels of each sequence."""
    return [
        torch.stack(
            [
                torch.logsumexp(logits[answer][row, t], 0) - logits[answer][row, t, labels[t + 1]]
                for t in range(len(labels) - 1)
                if labels[t + 1] != -100
            ]
        )
        for row, labels in enumerate(LABELS[answer])
    ]


def answer_positions(answer):
    """Sequence, position and label of every token that is predicted."""
    for row, labels in enumerate(LABELS[answer]):
        for t in range(len(labels) - 1):
            if labels[t + 1] != -100:
                yield row, t, labels[t + 1]


def nlls(logits, answer):
    """S_i and T_i: summed negative log-likelihood and number of labels of each sequence."""
    terms = token_nlls(logits, answer)
    return torch.stack([each.sum() for each in terms]), [len(each) for each in terms]


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def token_mean(logits, answer):
    sums, lengths = nlls(logits, answer)
    return sums.sum() / sum(lengths)


def formula_ga(policy, reference):
    return -token_mean(policy, "original")


def formula_me(policy, reference):
    terms = []
    for row, labels in enumerate(LABELS["original"]):
        for t in range(len(labels) - 1):
            if labels[t + 1] != -100:
                p = torch.exp(policy["original"][row, t])
                p = p / p.sum()
                uniform = 1 / VOCABULARY
                terms.append(sum(uniform * (math.log(uniform) - torch.log(p[v])) for v in range(7)))
    return sum(terms) / len(terms)


def formula_idk(policy, reference):
    return token_mean(policy, "idk")


def formula_dpo(policy, reference, beta=0.1, chosen="idk"):
    def ratio(logits):
        return -nlls(logits, chosen)[0] + nlls(logits, "original")[0]

    delta = ratio(policy) - ratio(reference)
    return -(2 / beta) * log_sigmoid(beta * delta).mean()


def formula_npo(policy, reference, beta=0.1):
    difference = nlls(policy, "original")[0] - nlls(reference, "original")[0]
    return -(2 / beta) * log_sigmoid(beta * difference).mean()


def formula_simnpo(policy, reference, beta=2.5, delta=0.0):
    sums, lengths = nlls(policy, "original")
    return -(2 / beta) * log_sigmoid(beta * (sums / torch.tensor(lengths) - delta)).mean()


def probabilities(logits, answer):
    return torch.exp(-torch.cat(token_nlls(logits, answer)))


def formula_wga(policy, reference, beta=1.0):
    p = probabilities(policy, "original")
    return -(p.detach() ** beta * -torch.log(p)).mean()


def formula_satimp(policy, reference, beta1=5.0, beta2=1.0):
    p = probabilities(policy, "original")
    constant = p.detach()
    return -(constant**beta1 * (1 - constant) ** beta2 * -torch.log(p)).mean()


def formula_tnpo(policy, reference, beta=4.0):
    return formula_wtnpo(policy, reference, beta, alpha=0.0)


def formula_wtnpo(policy, reference, beta=4.0, alpha=1.5):
    p, q = (probabilities(logits, "original") for logits in (policy, reference))
    return (p.detach() ** alpha * (2 / beta) * torch.log(1 + (p / q) ** beta)).mean()


def cross_entropy(target, logits):
    return -(target * torch.log(torch.exp(logits) / torch.exp(logits).sum())).sum()


def formula_undial(policy, reference, beta=10.0):
    terms = []
    for row, t, label in answer_positions("original"):
        teacher = reference["original"][row, t].clone()
        teacher[label] = teacher[label] - beta
        terms.append(cross_entropy(torch.softmax(teacher, 0), policy["original"][row, t]))
    return sum(terms) / len(terms)


def formula_ceu(policy, reference):
    terms, seen = [], set()
    for row, t, label in answer_positions("original"):
        if row in seen:
            logits = policy["original"][row, t]
            p = torch.exp(logits) / torch.exp(logits).sum()
            q = [p[v] / (1 - p[label]) for v in range(VOCABULARY)]
            others = [v for v in range(VOCABULARY) if v != label]
            terms.append(sum(q[v] * torch.log(q[v] / p[v]) for v in others))
        seen.add(row)
    return sum(terms) / len(terms)


def formula_pdu(policy, reference):
    rows = [policy["original"][row, t] for row, t, _ in answer_positions("original")]
    return sum((max(row) - sum(row) / VOCABULARY) ** 2 for row in rows) / len(rows)


def formula_scrub(policy, reference):
    return -divergence(policy, reference, list(answer_positions("original")))


def divergence(policy, reference, places):
    """Mean over places of KL(reference || policy), summed over the vocabulary."""
    terms = []
    for row, t, _ in places:
        p, q = (torch.softmax(logits["original"][row, t], 0) for logits in (policy, reference))
        terms.append((q * (q.log() - p.log())).sum())
    return sum(terms) / len(terms)


def formula_adaga(policy, reference, lambd=0.5):
    sums, lengths = nlls(policy, "original")
    means = [nll / length for nll, length in zip(sums, lengths, strict=True)]
    weights = [1 / float(mean.detach()) ** lambd for mean in means]
    normalised = [len(weights) * weight / sum(weights) for weight in weights]
    terms = [-weight * mean for weight, mean in zip(normalised, means, strict=True)]
    return sum(terms) / len(terms)


def formula_flat(policy, reference, divergence="tv"):
    """-g*(P_refusal) + f*(g*(P_answer)), with f* and g* of the f-GAN paper's tables."""
    g, conjugate = {
        "tv": (lambda u: torch.tanh(u) / 2, lambda t: t),
        "kl": (lambda u: u, lambda t: torch.exp(t - 1)),
        "pearson": (lambda u: u, lambda t: t * t / 4 + t),
        "js": (
            lambda u: math.log(2) - torch.log(1 + torch.exp(-u)),
            lambda t: -torch.log(2 - torch.exp(t)),
        ),
    }[divergence]
    terms = zip(token_nlls(policy, "idk"), token_nlls(policy, "original"), strict=True)
    return sum(
        -g(torch.exp(-refusal).mean()) + conjugate(g(torch.exp(-answer).mean()))
        for refusal, answer in terms
    ) / len(LABELS["idk"])


def formula_llmu(policy, reference, ascent=0.5):
    means = {
        answer: torch.stack([terms.mean() for terms in token_nlls(policy, answer)])
        for answer in ("original", "random")
    }
    return (means["random"] - ascent * means["original"]).mean()


def formula_altpo(policy, reference, beta=0.1):
    return formula_dpo(policy, reference, beta, chosen="alternate")


def hidden_states(logits, layers):
    """Of every layer the states at the positions of the answer's tokens."""
    return [
        [logits["original"][row, t].roll(layer) for row, t, _ in answer_positions("original")]
        for layer in layers
    ]


def mean_over_tokens_and_layers(function, policy, reference, layers):
    ours, theirs = hidden_states(policy, layers), hidden_states(reference, layers)
    terms = [
        function(h, h_ref)
        for states, others in zip(ours, theirs, strict=True)
        for h, h_ref in zip(states, others, strict=True)
    ]
    return sum(terms) / len(terms)


def formula_rmu(policy, reference, layers=(7,), steering=2.0, seed=0):
    r = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    u = steering * r / torch.sqrt(sum(r * r))

    def error(h, h_ref):
        return sum((h - u) ** 2) / VOCABULARY

    return mean_over_tokens_and_layers(error, policy, reference, layers)


def formula_rr(policy, reference, layers=(9, 19)):
    def rerouted(h, h_ref):
        cosine = sum(h * h_ref) / torch.sqrt(sum(h * h)) / torch.sqrt(sum(h_ref * h_ref))
        return torch.clamp(cosine, min=0)

    return mean_over_tokens_and_layers(rerouted, policy, reference, layers)


def formula_embed_diff(policy, reference, layers=(7,)):
    def error(h, h_ref):
        return sum((h - h_ref) ** 2) / VOCABULARY

    return mean_over_tokens_and_layers(error, policy, reference, layers)


def formula_embed_l2(policy, reference, layers=(9, 19)):
    def distance(h, h_ref):
        return torch.sqrt(sum((h - h_ref) ** 2))

    return mean_over_tokens_and_layers(distance, policy, reference, layers)


def formula_gd(policy, reference):
    return token_mean(policy, "original")


def formula_kl(policy, reference):
    """KL(reference || policy) summed over the vocabulary, mean over predictions of real tokens."""
    places = [
        (row, t, None)
        for row, attention in enumerate(ATTENTION["original"])
        for t in range(len(attention) - 1)
        if attention[t + 1]
    ]
    return divergence(policy, reference, places)


def formula_gd_kl(policy, reference, alpha=0.5, gamma=1.0):
    places = list(answer_positions("original"))
    return gamma * token_mean(policy, "original") + alpha * divergence(policy, reference, places)


def formula_ap(policy, reference, beta=0.1):
    margin = nlls(policy, "idk")[0] - nlls(policy, "original")[0]
    return -(1 / beta) * log_sigmoid(beta * margin).mean()


FORMULAS = {
    ("forget", "ga"): formula_ga,
    ("forget", "me"): formula_me,
    ("forget", "idk"): formula_idk,
    ("forget", "dpo"): formula_dpo,
    ("forget", "npo"): formula_npo,
    ("forget", "simnpo"): formula_simnpo,
    ("forget", "wga"): formula_wga,
    ("forget", "satimp"): formula_satimp,
    ("forget", "tnpo"): formula_tnpo,
    ("forget", "wtnpo"): formula_wtnpo,
    ("forget", "undial"): formula_undial,
    ("forget", "ceu"): formula_ceu,
    ("forget", "pdu"): formula_pdu,
    ("forget", "flat"): formula_flat,
    ("forget", "llmu"): formula_llmu,
    ("forget", "altpo"): formula_altpo,
    ("forget", "adaga"): formula_adaga,
    ("forget", "scrub"): formula_scrub,
    ("forget", "rmu"): formula_rmu,
    ("forget", "rr"): formula_rr,
    ("retain", "embed_diff"): formula_embed_diff,
    ("retain", "embed_l2"): formula_embed_l2,
    ("retain", "gd"): formula_gd,
    ("retain", "kl"): formula_kl,
    ("retain", "ap"): formula_ap,
    ("retain", "gd_kl"): formula_gd_kl,
}
# Losses whose gradient holds a part of them constant: not the slope of their value.
CONSTANT_WEIGHTS = {("forget", name) for name in ("wga", "satimp", "wtnpo", "adaga")}
