"""
A memory layer: a token looks up the K of S trained slots whose keys fit its query best, and reads their values.

    s = softmax(top-K scores)        y = sum over the K slots of s * value        (Memory Layers at Scale, arXiv 2412.09764)

It holds S*D parameters and touches K*D of them: memory, not compute. Two ideas make it cheap. Product keys: the S = n*n keys are
never built; a key is a pair of half-keys, so 2n dot products find the best of n*n slots (product_key_topk). And one table of values
is shared by all memory layers of the model (MemoryTable), each with its own way of asking (ProductKeyMemory).

B, T, C batch, tokens, channels · N = B*T · H memory heads · K slots read per head · R = H*K reads per token
n half-keys per side · S = n*n slots · D value dim · d = key dim / 2, the size of a half-key
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernel import adamw_, gather, topk_sums


def product_key_topk(queries, half_keys, K):
    """The K slots whose product keys score highest. Slot i*n + j has the key (half_keys[0, h, i], half_keys[1, h, j]).

    queries (N, H, 2, d), half_keys (2, H, n, d), one dtype -> scores (N, H, K), largest first, slots (N, H, K) int64 in [0, n*n).
    Exact (product keys, arXiv 1907.05242). Raises ValueError if K > n.
    """
    scores = queries.permute(2, 1, 0, 3) @ half_keys.transpose(-1, -2)      # (2, H, N, n)
    best, slots = topk_sums(scores, K)                                      # (H, N, K) both
    return best.transpose(0, 1), slots.transpose(0, 1)                      # (N, H, K) both


def brute_force_topk(queries, half_keys, K):
    """The twin of product_key_topk that scores all n*n slots: the definition, for tests and for reading."""
    left, right = torch.einsum("nhsd,shkd->snhk", queries, half_keys)       # (N, H, n) both
    every = (left[..., :, None] + right[..., None, :]).flatten(-2)          # (N, H, S)
    return every.topk(K, dim=-1)                                            # (N, H, K), (N, H, K)


class MemoryTable(nn.Module):
    """The values: S = n_keys**2 slots of dim D. Made once by GPT and handed to every memory layer that reads it.

    In float32 the values are a parameter like any other: with its gradient and AdamW's two moments 16 bytes a value, and autograd makes a
    gradient of the table's size for each layer that reads it. In bfloat16 they take 10 (TableAdamW), and gradients only touch rows read.
    """

    def __init__(self, n_keys, value_dim, dtype=torch.float32):
        super().__init__()
        self.values = nn.Parameter(torch.empty(n_keys**2, value_dim, dtype=dtype), requires_grad=dtype == torch.float32)  # (S, D)
        self.grad_sum = None  # (S, D) float32 where TableAdamW trains it: the gather adds the gradient there
        self.register_buffer("read_weight", torch.zeros(n_keys**2, dtype=torch.int64), persistent=False)  # (S,)
        self.counting = False

    def read(self, slots, weights):
        """slots (N, R) int64, weights (N, R) -> (N, D)."""
        if self.counting:  # in 2^-24ths: whole numbers add up to the same sum in any order, so any device gives the same statistics
            share = (weights.detach().float() * 2**24).ceil().long()        # (N, R)
            self.read_weight.index_add_(0, slots.reshape(-1), share.reshape(-1))
        return gather(self.values, slots, weights, self.grad_sum)           # (N, D)

    def count(self, on):
        """Start counting reads from zero, or stop."""
        self.counting = on
        if on:
            self.read_weight.zero_()

    def usage(self):
        """What the reads counted since count(True) used: (share of slots read at all in [0, 1], KL of the slots' read weight from
        uniform in nats: 0 when all slots share the weight evenly, log S when one slot takes it all)."""
        p = self.read_weight.cpu().double()                                 # (S,)
        used, p = (p > 0).double().mean().item(), p / p.sum().clamp(min=1)
        return used, (p * (p * len(p)).clamp(min=1e-300).log()).sum().item()


class TableAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 tables (kernel.adamw_): values and both moments in bfloat16, rounded randomly, and the gradient summed in float32
    over layers and micro-steps: 10 bytes a value. It steps all rows, read or not: a batch reads most of them anyway."""

    def __init__(self, tables, lr, betas, clip=math.inf):
        super().__init__([table.values for table in tables], dict(lr=lr, peak=lr, betas=betas, clip=clip))
        self.tables = tables
        for table in tables:
            table.grad_sum = torch.zeros_like(table.values, dtype=torch.float32)                  # (S, D)
            self.state[table.values] = dict(step=0, m=torch.zeros_like(table.values), v=torch.zeros_like(table.values))

    @torch.no_grad()
    def step(self):
        """Average the gradients over ranks, clip their norm, step, leave them zero. Returns the norm before clipping, a scalar tensor."""
        group, ranks, sums = self.param_groups[0], 1, [table.grad_sum for table in self.tables]
        if dist.is_initialized():  # DDP does not see them
            ranks = dist.get_world_size()
            for total in sums:
                dist.all_reduce(total)                                      # (S, D)
        norm = torch.nn.utils.get_total_norm(sums) / ranks                  # ()
        scale = (group["clip"] / (norm + 1e-6)).clamp(max=1.0) / ranks      # (): applied on the way, not in a pass of its own
        for table in self.tables:
            state = self.state[table.values]
            state["step"] += 1
            adamw_(table.values, table.grad_sum, state["m"], state["v"], state["step"], group["lr"], *group["betas"], scale)
        return norm


class ProductKeyMemory(nn.Module):
    """One memory layer, in place of a block's MLP: x (B, T, C) -> (B, T, C). It owns query, half-keys and gate; the table is shared.

    Memory:  y = sum_h softmax(top-K scores of head h) @ values.  Memory+: out = W2 (y * silu(W1 x)), and with qk_norm the query
    halves and half-keys are RMS-normed before they meet, the score divided by sqrt(d) (arXiv 2412.09764).
    """

    def __init__(self, config, table):
        super().__init__()
        C, D = config.n_embd, config.mem_value_dim or config.n_embd
        self.n_keys, self.heads, self.topk, self.qk_norm = config.mem_n_keys, config.mem_heads, config.mem_topk, config.qk_norm
        key_dim = config.mem_key_dim or C // 2
        self.half_dim = key_dim // 2                                                              # d
        self.query = nn.Linear(C, self.heads * key_dim, bias=False)                               # W (H*2d, C)
        self.half_keys = nn.Parameter(torch.empty(2, self.heads, self.n_keys, self.half_dim))     # (2, H, n, d)
        self.gate = nn.Linear(C, D, bias=False) if config.mem_gate else None                      # W1 (D, C)
        self.out = nn.Linear(D, C, bias=False) if config.mem_gate or D != C else None             # W2 (C, D)
        self.tables = [table]  # in a list, so that the table is a submodule of the GPT alone

    def search(self, x):
        """The slots each token reads and how much of each. x (N, C) -> slots (N, H, K) int64, weights (N, H, K), summing to 1 over K."""
        q = self.query(x).view(len(x), self.heads, 2, self.half_dim)        # (N, H, 2, d)
        keys = self.half_keys.to(q.dtype)                                   # (2, H, n, d)
        if self.qk_norm:
            q = F.rms_norm(q, (self.half_dim,)) / math.sqrt(self.half_dim)  # (N, H, 2, d)
            keys = F.rms_norm(keys, (self.half_dim,))                       # (2, H, n, d)
        scores, slots = product_key_topk(q, keys, self.topk)                # (N, H, K), (N, H, K)
        return slots, scores.float().softmax(dim=-1)

    def forward(self, x):
        B, T, C = x.size()
        slots, weights = self.search(x.view(B * T, C))                      # (N, H, K), (N, H, K)
        y = self.tables[0].read(slots.flatten(1), weights.flatten(1))       # (N, D): heads read the same table and are summed
        y = y.view(B, T, -1).to(x.dtype)                                    # (B, T, D)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))                                    # (B, T, D)
        return y if self.out is None else self.out(y)                       # (B, T, C)
