"""
A memory layer: a token looks up the K of S trained slots whose keys fit its query best, and reads their values.

    s = softmax(top-K scores)        y = sum over the K slots of s * value        (Memory Layers at Scale, arXiv 2412.09764)

It holds S*D parameters and a token touches R*D of them: memory, not compute. Two ideas make it cheap. Product keys: the S = n*n keys are
never built; a key is a pair of half-keys, so 2n dot products find the best of n*n slots (product_key_topk). And one table of values
is shared by all memory layers of the model (MemoryTable), each with its own way of asking (ProductKeyMemory). Over several ranks the
table is sliced along D (parallel memory): `python memory.py` prints what that costs and what a replicated table would.

B, T, C batch, tokens, channels · N = B*T · H memory heads · K slots read per head · R = H*K reads per token
n half-keys per side · S = n*n slots · D value dim · d = key dim / 2, the size of a half-key · P ranks that share one table
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernel import adamw_, gather, topk_sums


def product_key_topk(queries, half_keys, K):
    """The K slots whose product keys score highest. Slot i*n + j has the key (half_keys[0, h, i], half_keys[1, h, j]).

    queries (N, H, 2, d), half_keys (2, H, n, d), one dtype -> scores (N, H, K), largest first, slots (N, H, K) int32 in [0, n*n).
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


# torch 2.13 renamed it and warns at the old name
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class AllGather(torch.autograd.Function):
    """Each rank of a group gets the tokens of all: x (N, R) -> (P*N, R), in order of rank, N the same everywhere. Backward: a
    reduce-scatter, made of an exchange and a sum in order of rank, so that the bits are the same on every run."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        every = x.new_empty(group.size() * len(x), x.shape[1])              # (P*N, R)
        all_gather(every, x.contiguous(), group=group)
        return every.view_as(every)  # for the buffer itself, torch 2.11 compiles a backward without gradients

    @staticmethod
    def backward(ctx, grad):
        P, mine = ctx.group.size(), torch.empty_like(grad)                  # (P*N, R)
        dist.all_to_all_single(mine, grad.contiguous(), group=ctx.group)
        return mine.view(P, len(grad) // P, -1).sum(0), None                # (N, R)


class Exchange(torch.autograd.Function):
    """Slices for tokens: y (P*N, D/P), this rank's slice of the outputs of all tokens -> (N, D), the outputs of this rank's tokens,
    N the same everywhere. Backward: the same way back."""

    @staticmethod
    def forward(ctx, y, group):
        ctx.group, P, slices = group, group.size(), torch.empty_like(y)     # (P*N, D/P)
        dist.all_to_all_single(slices, y.contiguous(), group=group)
        return slices.view(P, len(y) // P, -1).transpose(0, 1).reshape(len(y) // P, -1)           # (N, D)

    @staticmethod
    def backward(ctx, grad):
        P, (N, D) = ctx.group.size(), grad.shape
        slices = grad.view(N, P, D // P).transpose(0, 1).reshape(P * N, D // P)                   # (P*N, D/P)
        mine = torch.empty_like(slices)                                     # (P*N, D/P)
        dist.all_to_all_single(mine, slices, group=ctx.group)
        return mine, None


def parallel_bytes(N, R, D, P, number=4):
    """Bytes that each rank sends (and receives) for one memory layer in one training step, parallel memory (arXiv 2412.09764).

    N tokens of each rank, R reads per token, P ranks; values and activations of `number` bytes. To P - 1 peers: forward N*R slots
    (int32) and weights (float32), and N outputs of D/P numbers; backward N grad_y of D/P numbers and N*R weights' gradients (float32).
    The number of slots S does not appear: nothing of the table's size is ever sent within the group.
    """
    return (P - 1) * (N * R * (4 + 4 + 4) + 2 * N * D * number // P)


def replicated_bytes(S, D, W):
    """Bytes that each of W ranks sends per training step if each holds the whole table: a ring all-reduce of its float32 gradient."""
    return 2 * (W - 1) * S * D * 4 // W


class MemoryTable(nn.Module):
    """The values: S = n_keys**2 slots of dim D. Made once by GPT and handed to every memory layer that reads it.

    In float32, in one process, the values are a parameter like any other: with its gradient and AdamW's two moments 16 bytes a value, and
    autograd makes a gradient of the table's size for each layer that reads it. In bfloat16 they take 10. There, and over several ranks,
    the gather adds the gradient to grad_sum, and TableAdamW takes it from there; one layer alone is faster without (README.md, Speed).

    mesh: over several ranks, a DeviceMesh ("replica", "slice"). The P ranks of a row of "slice" hold D/P dims of all slots each; all
    read the slots of all tokens of the row, then exchange what they found. Raises ValueError if P does not divide D.
    """

    def __init__(self, n_keys, value_dim, dtype=torch.float32, mesh=None):
        super().__init__()
        self.mesh, self.group = mesh, None if mesh is None else mesh.get_group("slice")
        self.parts, part = (1, 0) if mesh is None else (self.group.size(), self.group.rank())     # P, which of them
        if value_dim % self.parts:
            raise ValueError(f"mem_value_dim {value_dim} does not divide into mem_parallel {self.parts} slices: change one of them")
        self.value_dim, width = value_dim, value_dim // self.parts          # D, D/P
        self.dims = slice(part * width, (part + 1) * width)                 # the columns of the whole table that are here
        self.values = nn.Parameter(torch.empty(n_keys**2, width, dtype=dtype), requires_grad=mesh is None and dtype == torch.float32)  # (S, D/P)
        self.grad_sum = None  # (S, D/P) in at least float32, made by TableAdamW
        self.register_buffer("read_weight", torch.zeros(n_keys**2, dtype=torch.int64), persistent=False)  # (S,)
        self.counting = False

    @torch.no_grad()
    def init_weights(self, std):
        """Normal, and the same numbers however the table is sliced: made a few whole rows at a time."""
        for rows in self.values.split(4096):                                # (<= 4096, D/P)
            rows.copy_(torch.empty(len(rows), self.value_dim).normal_(std=std)[:, self.dims])

    def read(self, slots, weights):
        """slots (N, R) int32 or int64, weights (N, R) -> (N, D). In parallel, N is the same on all ranks of the group."""
        if self.counting:  # in 2^-24ths: whole numbers add up to the same sum in any order, so any device gives the same statistics
            share = (weights.detach().float() * 2**24).ceil().long()        # (N, R)
            self.read_weight.index_add_(0, slots.reshape(-1), share.reshape(-1))
        if self.parts == 1:
            return gather(self.values, slots, weights, self.grad_sum)       # (N, D)
        slots, weights = AllGather.apply(slots.int(), self.group), AllGather.apply(weights, self.group)  # (P*N, R) both
        return Exchange.apply(gather(self.values, slots, weights, self.grad_sum), self.group)            # (N, D), of (P*N, D/P)

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


def columns(slices, dims):
    """Columns `dims` (a slice) of a matrix (S, D) that is there in P slices (S, D/P), without putting it together."""
    width = slices[0].shape[1]
    parts = [s[:, max(dims.start - i * width, 0):max(dims.stop - i * width, 0)] for i, s in enumerate(slices)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class TableAdamW(torch.optim.AdamW):
    """AdamW for the tables, without decay: averages the gradients over ranks, clips their norm, that of the whole table, and steps all rows,
    read or not: a batch reads most of them anyway. bfloat16 tables go through kernel.adamw_: values and both moments in bfloat16,
    rounded randomly, and the gradient summed in float32 over layers and micro-steps: 10 bytes a value."""

    def __init__(self, tables, lr, betas, clip=math.inf):
        super().__init__([table.values for table in tables], lr=lr, betas=betas, weight_decay=0.0, fused=True)
        self.param_groups[0].update(peak=lr, clip=clip)                     # train.py's schedule sets lr from peak
        self.tables = tables
        for table in tables:
            if not table.values.requires_grad:
                table.grad_sum = torch.zeros_like(table.values, dtype=torch.promote_types(table.values.dtype, torch.float32))  # (S, D/P)
            if table.values.dtype == torch.bfloat16:
                self.state[table.values] = dict(step=0, exp_avg=torch.zeros_like(table.values), exp_avg_sq=torch.zeros_like(table.values))

    @torch.no_grad()
    def step(self):
        """Take the gradients, leave them zero. Returns their norm before clipping, a scalar tensor."""
        group, mesh, ranks = self.param_groups[0], self.tables[0].mesh, 1
        grads = [table.values.grad if table.grad_sum is None else table.grad_sum for table in self.tables]  # (S, D/P) each
        if mesh is not None:  # DDP does not see them
            ranks = mesh.size()
            for grad in grads:
                dist.all_reduce(grad, group=mesh.get_group("replica"))
        norm = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()             # ()
        if mesh is not None:
            norm = norm.square()
            dist.all_reduce(norm, group=mesh.get_group("slice"))
            norm = norm.sqrt()                                              # (): over all slices
        norm = norm / ranks
        scale = (group["clip"] / (norm + 1e-6)).clamp(max=1.0) / ranks      # ()
        for table, grad in zip(self.tables, grads):
            state = self.state[table.values]
            if table.values.dtype == torch.bfloat16:
                state["step"] += 1
                adamw_(table.values, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group["lr"], *group["betas"], scale,
                       columns=(table.dims.start, table.value_dim))
            else:  # float32: torch's AdamW below takes it from .grad
                if grad.device.type != "cpu" or scale != 1:                 # to look is free on a CPU, and spares a pass over the table
                    grad.mul_(scale)
                table.values.grad = grad                                    # (S, D/P)
        super().step()                                                      # of float32 tables: those in bfloat16 have no .grad
        for table, grad in zip(self.tables, grads):
            table.values.grad = None
            if table.grad_sum is not None and table.values.dtype != torch.bfloat16:
                grad.zero_()
        return norm

    def slices(self):
        """What a checkpoint keeps of each table, this rank's dims: values and AdamW's moments, (S, D/P) each."""
        tables = [(table.values.detach(), self.state[table.values]) for table in self.tables]
        return [dict(values=values, exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"]) for values, state in tables]

    def load(self, saved, step):
        """Go on after `step` steps. saved: for each table what all ranks' slices() said of it, {name: [(S, D/P), ...]}, for any P."""
        for table, sliced in zip(self.tables, saved):
            p = table.values
            moments = {k: columns(sliced[k], table.dims).to(p.device, copy=True) for k in ("exp_avg", "exp_avg_sq")}  # (S, D/P) both
            self.state[p] = dict(step=step if p.dtype == torch.bfloat16 else torch.tensor(float(step), device=p.device)) | moments


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
        """The slots each token reads and how much of each. x (N, C) -> slots (N, H, K) int32, weights (N, H, K), summing to 1 over K."""
        q = self.query(x).view(len(x), self.heads, 2, self.half_dim)        # (N, H, 2, d)
        keys = self.half_keys.to(q.dtype)                                   # (2, H, n, d)
        if self.qk_norm:
            q = F.rms_norm(q, (self.half_dim,)) / math.sqrt(self.half_dim)  # (N, H, 2, d)
            keys = F.rms_norm(keys, (self.half_dim,))                       # (2, H, n, d)
        scores, slots = product_key_topk(q, keys, self.topk)                # (N, H, K), (N, H, K)
        return slots, scores.softmax(dim=-1)

    def forward(self, x):
        B, T, C = x.size()
        slots, weights = self.search(x.view(B * T, C))                      # (N, H, K), (N, H, K)
        y = self.tables[0].read(slots.flatten(1), weights.flatten(1))       # (N, D): heads read the same table and are summed
        y = y.view(B, T, -1).to(x.dtype)                                    # (B, T, D)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))                                    # (B, T, D)
        return y if self.out is None else self.out(y)                       # (B, T, C)


if __name__ == "__main__":
    N, R, D, layers, sizes = 8192, 128, 2048, 3, (20, 22, 24, 26)
    print(f"GB that each GPU sends in a training step, computed: {N} tokens a GPU, {layers} memory layers of {R} reads, D = {D}, values in bfloat16.\n"
          "sliced: over all GPUs, any number of slots. whole: each GPU holds the table, its float32 gradient is averaged.\n")
    print(f"{'GPUs':10s}{'sliced':>10s}" + "".join(f"{f'whole, 2^{k} slots':>20s}" for k in sizes))
    for W in (2, 4, 8, 16, 32, 64):
        print(f"{W:<10d}{layers * parallel_bytes(N, R, D, W, number=2) / 1e9:10.1f}" + "".join(f"{replicated_bytes(2**k, D, W) / 1e9:20.1f}" for k in sizes))
    print(f"{'GB to hold':20s}" + "".join(f"{10e-9 * 2**k * D:20.1f}" for k in sizes) + "\n\nTo hold: 10 bytes a value, with gradient and moments; of a table "
          "in P slices each GPU holds a P-th.")
