"""An indexer that ranks compressed keys, by the operator alone: one key of 4 tokens each, beside a window and a sink.

As in DeepSeek-V4's sparse layers, a head has one softmax over a sink, the keys of the last tokens, and a compressed key
for every 4 tokens before. Only the compressed keys are ranked: they are the k of `indexer_kl`, their intervals count
them, and lse counts all that the softmax does, so that a head weighs as much as the attention that it gives to them.
"""

import argparse

import torch
from torch import nn

from flash_indexer import causal_intervals, indexer_kl, select_keys
from flash_indexer.intervals import key_blocks
from flash_indexer.ops import attention_forward

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--tokens", type=int, default=2048)
options = parser.parse_args()
RATIO, WINDOW, TOPK, TOPICS = 4, 32, 16, 8
WIDTH, HEADS, HEAD_DIM, INDEX_HEADS, INDEX_DIM = 64, 8, 64, 4, 32
SCALE = HEAD_DIM**-0.5

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
torch.manual_seed(0)
torch.set_default_device(device)

# What stands for a frozen model: text whose topic changes every 16 tokens, and heads that look for their own topic by
# queries, keys of tokens, compressed keys (here of means) and sinks.
topics = torch.randn(TOPICS, WIDTH)
to_k, to_compressed = torch.randn(2, WIDTH, HEAD_DIM) / 10
to_q = to_compressed.repeat(1, HEADS) + torch.randn(WIDTH, HEADS * HEAD_DIM) / 20
sinks = torch.randn(HEADS)

query, key = nn.Linear(WIDTH, INDEX_HEADS * INDEX_DIM), nn.Linear(WIDTH, INDEX_DIM)
weight, norm = nn.Linear(WIDTH, INDEX_HEADS), nn.LayerNorm(INDEX_DIM)
optimizer = torch.optim.AdamW([p for part in (query, key, weight, norm) for p in part.parameters()], lr=3e-3)
cu_seqlens = torch.tensor([0, options.tokens // 3, options.tokens])  # two documents
blocks = key_blocks(cu_seqlens, RATIO)
first, end = causal_intervals(cu_seqlens)
window = torch.maximum(first, end - WINDOW)
for step in range(options.steps):
    topic = torch.randint(TOPICS, (options.tokens // 16 + 1,)).repeat_interleave(16)[: options.tokens]
    hidden = topics[topic] + torch.randn(options.tokens, WIDTH)
    pooled = hidden[blocks.tokens].mean(1)
    q = (hidden @ to_q).view(-1, HEADS, HEAD_DIM).to(dtype)
    k, compressed = ((x @ w)[:, None].to(dtype) for x, w in ((hidden, to_k), (pooled, to_compressed)))
    parts = [
        attention_forward(q, keys, keys, softmax_scale=SCALE, key_start=start, key_end=stop)[1]
        for keys, start, stop in ((k, window, end), (compressed, blocks.start, blocks.end))
    ]
    lse = torch.stack([*parts, sinks.expand_as(parts[0])]).logsumexp(0)

    index_q = query(hidden).view(-1, INDEX_HEADS, INDEX_DIM).to(dtype)
    index_k = norm(key(pooled)).to(dtype)
    index_weights = weight(hidden) * (INDEX_HEADS * INDEX_DIM) ** -0.5
    found = indexer_kl(
        q, compressed, index_q, index_k, index_weights, softmax_scale=SCALE, lse=lse, key_start=blocks.start,
        key_end=blocks.end,
    )  # fmt: skip
    found.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    sees = blocks.end > blocks.start
    uniform = (blocks.end - blocks.start)[sees].log() - found.entropy[sees]
    if step % 25 == 0 or step == options.steps - 1:
        print(f"step {step + 1}: KL {found.loss.item():.4f}, of the uniform prediction {uniform.mean().item():.4f}")

selection = select_keys(index_q, index_k, index_weights, key_start=blocks.start, key_end=blocks.end, topk=TOPK)
same = topic[blocks.tokens].eq(topic[-1]).all(1)
same[: int(blocks.start[-1])] = False
chosen = same[selection.indices[-1].long()]
print(f"the last query selects {TOPK} compressed keys, {int(chosen.sum())} of the {int(same.sum())} of its topic")
