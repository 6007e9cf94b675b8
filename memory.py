"""
A memory layer stands in the place of a transformer's MLP. Each token looks up the K of S trained
slots whose keys fit its query best, and gets the weighted sum of their values:

    s = softmax(top-K scores)        y = sum over the K slots of s * value

This is Memory Layers at Scale (arXiv 2412.09764). The layer holds S*D parameters, and a token
touches R*D of them, R = heads * K: it adds memory, hardly any compute. Two ideas make it cheap:

    product keys      The S = n*n keys are never built. A key is a pair of half-keys, so 2n dot
                      products find the best of n*n slots. See product_key_topk.
    a shared table    One table of values serves all memory layers of a model (MemoryTable). Each
                      layer has its own way of asking it (ProductKeyMemory).

To put a layer into a model of your own:

    table = MemoryTable(n_keys=128, dim=256)            # 16,384 slots; register it in your model
    layer = ProductKeyMemory(256, table)                # x (B, T, 256) -> (B, T, 256)

Over several ranks the table is cut into slices along D: see "parallel memory" below.

B, T, C batch, tokens, channels · N = B*T · H heads · K slots read per head · R = H*K
n half-keys per side · S = n*n slots · D value dim · d half-key dim · P ranks that share one table
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernel import gather, topk_sums

# ---- which slots: product keys


def product_key_topk(queries, half_keys, K):
    """The K slots whose product keys score highest (product keys, arXiv 1907.05242).

    The key of slot i*n + j is (half_keys[0, h, i], half_keys[1, h, j]), and its score with a query
    is the sum of two dot products, one for each half.

    queries (N, H, 2, d), half_keys (2, H, n, d), of one dtype -> scores (N, H, K), largest first,
    and slots (N, H, K) int32 in [0, n*n). Exact. Raises ValueError if K > n.
    """
    scores = queries.permute(2, 1, 0, 3) @ half_keys.transpose(-1, -2)  # (2, H, N, n)
    best, slots = topk_sums(scores, K)  # (H, N, K) both
    return best.transpose(0, 1), slots.transpose(0, 1)  # (N, H, K) both


def brute_force_topk(queries, half_keys, K):
    """The definition of product_key_topk: score all n*n slots. For tests and for reading."""
    left, right = torch.einsum("nhsd,shkd->snhk", queries, half_keys)  # (N, H, n) both
    every = left[..., :, None] + right[..., None, :]  # (N, H, n, n)
    return every.flatten(-2).topk(K, dim=-1)  # (N, H, K) both


# ---- what they hold: the table


class MemoryTable(nn.Module):
    """The values: S = n_keys**2 slots of `dim` numbers, shared by all layers that read them.

    A layer does not own its table: register the table once in your model.

    float32, in one process: values is a parameter like any other. Training takes 16 bytes a value
    (the gradient and AdamW's two moments included), and autograd makes a gradient of the table's
    size for each layer that reads it.
    bfloat16, or over several ranks: values has no .grad. The gather adds the gradients of all
    layers to `grad_sum` in place. train.TableAdamW makes grad_sum and steps the values with it;
    without it they do not train.

    mesh: a torch DeviceMesh ("replica", "slice") of several ranks. The P ranks along "slice" hold
    D/P dims of every slot each. Raises ValueError if P does not divide dim.
    init: False leaves the values unset, for a model that draws all its weights itself.
    """

    def __init__(self, n_keys, dim, dtype=torch.float32, mesh=None, init=True):
        super().__init__()
        self.n_keys = n_keys
        self.dim = dim  # D, of the whole table
        self.mesh = mesh
        self.group = None if mesh is None else mesh.get_group("slice")
        self.parts = 1 if mesh is None else self.group.size()  # P
        part = 0 if mesh is None else self.group.rank()
        if dim % self.parts:
            raise ValueError(f"a table of {dim} dims cannot be cut into {self.parts} equal "
                             f"slices: choose a number of slices that divides {dim}")
        width = dim // self.parts  # D/P
        self.dims = slice(part * width, (part + 1) * width)  # the columns that are here
        has_grad = mesh is None and dtype == torch.float32
        values = torch.empty(n_keys**2, width, dtype=dtype)  # (S, D/P)
        self.values = nn.Parameter(values, requires_grad=has_grad)
        self.grad_sum = None  # (S, D/P) in at least float32
        read_weight = torch.zeros(n_keys**2, dtype=torch.int64)  # (S,)
        self.register_buffer("read_weight", read_weight, persistent=False)
        self.counting = False
        if init:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal with std 1/sqrt(D). Whole rows are drawn, so any slicing gets the same numbers."""
        for rows in self.values.split(4096):  # (<= 4096, D/P)
            whole = torch.empty(len(rows), self.dim).normal_(std=self.dim**-0.5)  # (<= 4096, D)
            rows.copy_(whole[:, self.dims])

    def read(self, slots, weights):
        """slots (N, R) int32 or int64, weights (N, R) -> their weighted sums (N, D).

        Over several ranks, N must be the same on all ranks that share the table.
        """
        if self.counting:
            # In units of 2^-24. Integers have one sum, whatever the order and the device. Rounded
            # up, so that a read with a tiny weight is a read.
            share = (weights.detach().float() * 2**24).ceil().long()  # (N, R)
            self.read_weight.index_add_(0, slots.reshape(-1), share.reshape(-1))
        if self.parts == 1:
            return gather(self.values, slots, weights, self.grad_sum)  # (N, D)
        slots = AllGather.apply(slots.int(), self.group)  # (P*N, R)
        weights = AllGather.apply(weights, self.group)  # (P*N, R)
        y = gather(self.values, slots, weights, self.grad_sum)  # (P*N, D/P)
        return Exchange.apply(y, self.group)  # (N, D)

    def count(self, on):
        """Start counting reads, from zero, or stop."""
        self.counting = on
        if on:
            self.read_weight.zero_()

    def usage(self):
        """How much of the table the counted reads used -> (share, KL).

        share: how many of all S slots were read at least once, in [0, 1]. KL: the divergence of the
        slots' read weights from uniform, in nats. 0 means that all slots got the same, log(S) that
        one got everything. It counts the tokens of this rank only.
        """
        weight = self.read_weight.cpu().double()  # (S,)
        share = (weight > 0).double().mean().item()
        p = weight / weight.sum().clamp(min=1)  # (S,)
        ratio = (p * len(p)).clamp(min=1e-300)  # (S,), relative to uniform; unread slots add 0
        return share, (p * ratio.log()).sum().item()


# ---- the layer


class ProductKeyMemory(nn.Module):
    """A memory layer, in place of a block's MLP: x (B, T, C) -> (B, T, C).

    Memory    y = sum over heads of softmax(top-K scores) @ values
    gate      W2 (y * silu(W1 x)); without it W2 y if D != C
    qk_norm   the halves of queries and keys are RMS-normed before they meet, and the score is
              divided by sqrt(d)
    Memory+   both

    dim: C. table: a MemoryTable, which several layers may share. key_dim: of both halves together,
    default C/2. Raises ValueError for sizes that cannot work.
    init: False leaves the half-keys unset, for a model that draws all its weights itself.
    """

    def __init__(self, dim, table, heads=4, topk=32, key_dim=None, gate=True, qk_norm=True,
                 init=True):
        super().__init__()
        key_dim = dim // 2 if key_dim is None else key_dim
        if heads < 1:
            raise ValueError(f"heads {heads} < 1: give a positive number")
        if not 1 <= topk <= table.n_keys:
            raise ValueError(f"topk {topk} is not between 1 and the table's {table.n_keys} "
                             f"half-keys: lower topk or make the table with more n_keys")
        if key_dim < 2 or key_dim % 2:
            raise ValueError(f"key_dim {key_dim} is not an even number above 0: "
                             f"a key has two halves, so choose an even one")
        self.heads = heads  # H
        self.topk = topk  # K
        self.half_dim = key_dim // 2  # d
        self.qk_norm = qk_norm
        self.query = nn.Linear(dim, heads * key_dim, bias=False)  # weight (H*2d, C)
        half_keys = torch.empty(2, heads, table.n_keys, self.half_dim)  # (2, H, n, d)
        self.half_keys = nn.Parameter(half_keys)
        self.gate = nn.Linear(dim, table.dim, bias=False) if gate else None  # W1 (D, C)
        needs_out = gate or table.dim != dim
        self.out = nn.Linear(table.dim, dim, bias=False) if needs_out else None  # W2 (C, D)
        self.tables = [table]  # a list hides it from nn.Module: it belongs to the whole model
        if init:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Half-keys U(-b, b) with b = 1/sqrt(key dim). The matrices are as nn.Linear draws them."""
        self.half_keys.uniform_(-1, 1).mul_((2 * self.half_dim) ** -0.5)  # (2, H, n, d)

    def search(self, x):
        """Which slots each token reads, and how much of each.

        x (N, C) -> slots (N, H, K) int32, weights (N, H, K), which sum to 1 over K.
        """
        queries = self.query(x).view(len(x), self.heads, 2, self.half_dim)  # (N, H, 2, d)
        keys = self.half_keys.to(queries.dtype)  # (2, H, n, d)
        if self.qk_norm:
            d = self.half_dim
            queries = F.rms_norm(queries, (d,)) / math.sqrt(d)  # (N, H, 2, d)
            keys = F.rms_norm(keys, (d,))  # (2, H, n, d)
        scores, slots = product_key_topk(queries, keys, self.topk)  # (N, H, K) both
        return slots, scores.softmax(dim=-1)

    def forward(self, x):
        B, T, C = x.size()
        table, = self.tables
        slots, weights = self.search(x.view(B * T, C))  # (N, H, K) both
        # Heads read the same table and are summed, so they are just more reads: R = H*K.
        y = table.read(slots.flatten(1), weights.flatten(1))  # (N, D)
        y = y.view(B, T, table.dim).to(x.dtype)  # (B, T, D)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))  # (B, T, D)
        if self.out is not None:
            y = self.out(y)  # (B, T, C)
        return y


# ---- parallel memory: one table over P ranks
#
# Each rank holds D/P dims of all slots. In a memory layer the ranks gather the slots and weights
# of all their tokens (AllGather), each rank reads its dims for all of them, and an exchange gives
# every token's dims back to the rank that owns the token (Exchange). Nothing of the table's size
# is sent.

# torch 2.13 renamed the function and warns about the old name.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class AllGather(torch.autograd.Function):
    """Every rank of a group gets the tokens of all: x (N, R) -> (P*N, R), in order of rank.

    N is the same on all ranks. Backward, the gradients of a token's P copies are added up. This is
    an exchange and a sum in order of rank, so that the bits are the same on every run.
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        every = x.new_empty(group.size() * len(x), x.shape[1])  # (P*N, R)
        all_gather(every, x.contiguous(), group=group)
        # A view: for the buffer itself, torch 2.11 compiles a backward that gives no gradients.
        return every.view_as(every)

    @staticmethod
    def backward(ctx, grad):
        P = ctx.group.size()
        mine = torch.empty_like(grad)  # (P*N, R)
        dist.all_to_all_single(mine, grad.contiguous(), group=ctx.group)
        return mine.view(P, len(grad) // P, -1).sum(0), None  # (N, R)


class Exchange(torch.autograd.Function):
    """Some dims of all tokens become all dims of some: y (P*N, D/P) -> (N, D).

    y holds this rank's dims of the outputs of every rank's tokens, N of each rank. The result holds
    the whole outputs of this rank's own tokens. Backward is the reverse exchange.
    """

    @staticmethod
    def forward(ctx, y, group):
        ctx.group = group
        P = group.size()
        N = len(y) // P
        slices = torch.empty_like(y)  # (P*N, D/P)
        dist.all_to_all_single(slices, y.contiguous(), group=group)
        return slices.view(P, N, -1).transpose(0, 1).reshape(N, -1)  # (N, D)

    @staticmethod
    def backward(ctx, grad):
        P = ctx.group.size()
        N, D = grad.shape
        slices = grad.view(N, P, D // P).transpose(0, 1).reshape(P * N, D // P)  # (P*N, D/P)
        mine = torch.empty_like(slices)  # (P*N, D/P)
        dist.all_to_all_single(mine, slices, group=ctx.group)
        return mine, None


def parallel_bytes(N, R, D, P, number=4):
    """Bytes that each rank sends (and receives) for one memory layer in one training step.

    N tokens of each rank, R reads per token, P ranks; values and activations of `number` bytes.
    To each of P - 1 peers go N*R slots, weights and gradients of weights (4 bytes each), and N
    outputs and N gradients of outputs of D/P numbers. The number of slots S does not appear.
    """
    return (P - 1) * (N * R * (4 + 4 + 4) + 2 * N * D * number // P)


def replicated_bytes(S, D, W):
    """Bytes that each of W ranks sends in a training step if each holds the whole table.

    This is a ring all-reduce of the table's float32 gradient.
    """
    return 2 * (W - 1) * S * D * 4 // W
