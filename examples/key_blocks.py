"""An indexer that selects blocks of keys, by the stages of the operator: it learns where the highest keys lie.

    p[t,b] = max over the keys s of block b of sum_h a[t,h,s], divided by its sum over blocks
    i[t,b] = sum_j w[t,j] ReLU(index_q[t,j]·index_k[b])              --scores pooled-keys: one index key a block (Qwen4)
             max over the keys s of block b of the same with index_k[s]     --scores highest-key (as MiniMax M3 pools)

A few rows of queries at a time: attention of all heads is formed of the model's logsumexp, blocks take its maximum, and
the loss and its gradients follow in closed form, so that memory is linear in the number of tokens.
"""

import argparse

import torch
from torch import Tensor, nn

from flash_indexer import causal_intervals
from flash_indexer.intervals import KeyBlocks, key_blocks
from flash_indexer.ops import attention_forward, index_gradients, index_scores, kl_rows, teacher_scores


def block_kl(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    blocks: KeyBlocks,
    visible: tuple[Tensor, Tensor],
    *,
    softmax_scale: float,
    rows: int = 256,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """KL[t] = sum_b p (log p - log softmax(i)), the entropy of p, and the gradients of the mean KL.

    q: [T, H, D]. k: [S, G, D]. lse: [T, H]. index: index_q [T, I, E], index_k of all blocks [N, E] or of all keys
    [S, E], index_weights [T, I]. visible: key_start and key_end [T].
    """
    index_q, index_k, index_weights = index
    of_blocks = index_k.shape[0] == len(blocks.tokens)
    gradients = tuple(torch.zeros_like(x) for x in index)
    weight = (blocks.end > blocks.start).to(lse.dtype)
    weight /= weight.sum().clamp_min(1)
    kls, entropies = [], []
    for part in torch.arange(len(q), device=q.device).split(rows):
        seen, seen_blocks = [x[part] for x in visible], (blocks.start[part], blocks.end[part])
        p = teacher_scores(q[part], k, lse[part], *seen, softmax_scale=softmax_scale)[:, blocks.tokens].amax(-1)
        complete = torch.arange(len(blocks.tokens), device=q.device)
        outside = (complete < seen_blocks[0][:, None]) | (complete >= seen_blocks[1][:, None])
        p.masked_fill_(outside, 0.0)
        scores, relu = index_scores(index_q[part], index_k, index_weights[part], *(seen_blocks if of_blocks else seen))
        highest = None
        if not of_blocks:
            scores, place = scores[:, blocks.tokens].max(-1)
            highest = blocks.tokens.expand(len(part), -1, -1).gather(-1, place[..., None])[..., 0]
            scores.masked_fill_(outside, torch.finfo(scores.dtype).min)
        kl, entropy, di = kl_rows(p, scores, weight[part], *seen_blocks)
        if highest is not None:  # a block's gradient is that of its highest key
            di = di.new_zeros(len(part), len(k)).scatter_(1, highest, di)
        index_gradients(
            di, relu, index_q[part], index_k, index_weights[part], d_index_q=gradients[0][part[0] : part[-1] + 1],
            d_index_k=gradients[1], d_index_w=gradients[2][part[0] : part[-1] + 1],
        )  # fmt: skip
        kls.append(kl)
        entropies.append(entropy)
    return torch.cat(kls), torch.cat(entropies), gradients


def main() -> None:
    """Trains an indexer of blocks and prints its loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scores", choices=["pooled-keys", "highest-key"], default="pooled-keys")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    size, width, heads, head_dim, index_heads, index_dim = 16, 64, 8, 64, 4, 32
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_default_device(device)
    # What stands for a frozen model: text whose topic changes every 16 tokens, heads that look for their own topic.
    topics, to_k = torch.randn(8, width), torch.randn(width, head_dim) / 10
    to_q = to_k.repeat(1, heads) + torch.randn(width, heads * head_dim) / 20

    query, key = nn.Linear(width, index_heads * index_dim), nn.Linear(width, index_dim)
    weight, norm = nn.Linear(width, index_heads), nn.LayerNorm(index_dim)
    optimizer = torch.optim.AdamW([p for x in (query, key, weight, norm) for p in x.parameters()], lr=3e-3)
    cu_seqlens = torch.tensor([0, options.tokens // 3, options.tokens])  # two documents
    blocks, visible = key_blocks(cu_seqlens, size), causal_intervals(cu_seqlens)
    sees = blocks.end > blocks.start
    for step in range(options.steps):
        topic = torch.randint(8, (options.tokens // 16 + 1,)).repeat_interleave(16)[: options.tokens]
        hidden = topics[topic] + torch.randn(options.tokens, width)
        q, k = (hidden @ to_q).view(-1, heads, head_dim).to(dtype), (hidden @ to_k)[:, None].to(dtype)
        scale = head_dim**-0.5
        _, lse = attention_forward(q, k, k, softmax_scale=scale, key_start=visible[0], key_end=visible[1])

        keys = norm(key(hidden))
        index_k = keys if options.scores == "highest-key" else keys[blocks.tokens].mean(1)
        index_weights = weight(hidden) * (index_heads * index_dim) ** -0.5
        index = query(hidden).view(-1, index_heads, index_dim), index_k, index_weights
        with torch.no_grad():
            kl, entropy, gradients = block_kl(q, k, lse, index, blocks, visible, softmax_scale=scale)
        torch.autograd.backward(index, gradients)
        optimizer.step()
        optimizer.zero_grad()
        uniform = ((blocks.end - blocks.start)[sees].log() - entropy[sees]).mean()
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step + 1}: KL {kl[sees].mean():.4f}, of the uniform prediction {uniform:.4f}")


if __name__ == "__main__":
    main()
