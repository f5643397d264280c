"""The equations of the ops, written out one row at a time. Slow, and without a line of the package.

They take fp64 tensors and stay differentiable, so that autograd gives the gradients as well.
"""

import decimal
import math

import torch


def ranked(scores):
    """Indices from the largest score to the smallest; equal scores in order of index."""
    scores = scores.detach().tolist()
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def probabilities(logits):
    exponentials = (logits - logits.detach().max()).exp()
    return exponentials / exponentials.sum()


def symmetric_kl(student, teacher, forward_weight, reverse_weight):
    """Rows of scaled logits to per-row losses."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        p_s, p_t = probabilities(s), probabilities(t)
        forward = sum(p_t[c] * (p_t[c].log() - p_s[c].log()) for c in range(len(s)))
        reverse = sum(p_s[c] * (p_s[c].log() - p_t[c].log()) for c in range(len(s)))
        losses.append(forward_weight * forward + reverse_weight * reverse)
    return torch.stack(losses)


def exact_kl(p_logits, q_logits):
    """KL of two rows of logits (lists of numbers) in 60 digits."""
    with decimal.localcontext() as context:
        context.prec = 60
        p_logits = [decimal.Decimal(x) for x in p_logits]
        q_logits = [decimal.Decimal(x) for x in q_logits]
        p_sum = sum(x.exp() for x in p_logits)
        q_sum = sum(x.exp() for x in q_logits)
        shift = q_sum.ln() - p_sum.ln()
        pairs = zip(p_logits, q_logits, strict=True)
        return float(sum(p.exp() / p_sum * (p - q + shift) for p, q in pairs))


def perplexity_terms(prompts, hidden, embedding, top_k, temperature, detach_targets, counted=None):
    """counted: a list of the words that count, in ascending order; None, all of them."""
    counted = list(range(len(embedding))) if counted is None else counted
    words = embedding[counted]
    lengths = [max(math.sqrt(float(e @ e)), 1e-12) for e in words]
    lengths = torch.tensor(lengths, dtype=torch.float64)
    perplexity, inverted = [], []
    for c, h in zip(prompts, hidden, strict=True):
        cosines = (words @ c) / lengths / (c @ c).sqrt()
        chosen = ranked(cosines)[:top_k]
        y = probabilities(cosines[chosen] / temperature)
        p = probabilities(words @ h)[chosen]
        q = p / p.sum()
        y_target, q_target = (y.detach(), q.detach()) if detach_targets else (y, q)
        perplexity.append(-sum(y_target[j] * p[j].log() for j in range(len(chosen))))
        inverted.append(-sum(q_target[j] * y[j].log() for j in range(len(chosen))))
    return torch.stack(perplexity), torch.stack(inverted)


def gated_mixture(images, gate, texts, student_logits, labels, logit_scale, temperature, top_k):
    distillation, selection = [], []
    for image, student, label in zip(images, student_logits, labels.tolist(), strict=True):
        scores = image @ gate
        chosen = ranked(scores)[:top_k]
        weights = probabilities(scores[chosen])
        p_s = probabilities(student / temperature)
        distilled, selected = 0.0, 0.0
        for weight, head in zip(weights, chosen, strict=True):
            teacher = logit_scale * (texts[head] @ image)
            p_t = probabilities(teacher / temperature)
            divergence = (p_t * (p_t.log() - p_s.log())).sum()
            distilled = distilled + weight * temperature**2 * divergence
            selected = selected - weight * probabilities(teacher)[label].log()
        distillation.append(distilled)
        selection.append(selected)
    return torch.stack(distillation), torch.stack(selection)


def prefix_attention(qkv, prefixes, suffixes, scale):
    """prefixes, suffixes: lists of lengths; the suffixes are divided evenly among the prefixes."""
    rows, starts = [], [0]
    for length in [*prefixes, *suffixes]:
        starts.append(starts[-1] + length)
    for run, length in enumerate([*prefixes, *suffixes]):
        seen = []
        if prefixes and run >= len(prefixes):
            prefix = (run - len(prefixes)) * len(prefixes) // len(suffixes)
            seen = list(range(starts[prefix], starts[prefix + 1]))
        for token in range(starts[run], starts[run] + length):
            seen = [*seen, token]
            heads = []
            for head in range(qkv.shape[2]):
                query, key, value = qkv[token, 0, head], qkv[seen, 1, head], qkv[seen, 2, head]
                heads.append(probabilities(key @ query * scale) @ value)
            rows.append(torch.stack(heads))
    return torch.stack(rows)
