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

Its rivals stand below it. Each adds parameters, and hardly any compute, in another way:

                      how slots are found        how they are weighed     what is read
    ProductKeyMemory  by a query                 softmax of the scores    a value
    UltraMem          by two queries, combined   the score itself         a value, in one of 4 ways
    HashedMemory      by a hash of the tokens    softmax of a gate        a value
    PEER              by a query                 softmax of the scores    a neuron: two vectors
    MixtureOfExperts  by a router over all       softmax of the router    a small MLP

Over several ranks the table is cut into slices along D: see "parallel memory" below.

B, T, C batch, tokens, channels · N = B*T · H heads · K slots read per head · R = H*K
n half-keys per side · S = n*n slots · D value dim · d half-key dim · P ranks that share one table
E experts, of h hidden units each
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernel import gather, topk_sums

# ---- which slots: product keys


def half_key_scores(queries, half_keys):
    """The dot products. queries (N, H, 2, d), half_keys (2, H, n, d) -> (2, H, N, n)."""
    return queries.permute(2, 1, 0, 3) @ half_keys.transpose(-1, -2)


def product_key_topk(queries, half_keys, K):
    """The K slots whose product keys score highest (product keys, arXiv 1907.05242).

    The key of slot i*n + j is (half_keys[0, h, i], half_keys[1, h, j]), and its score with a query
    is the sum of two dot products, one for each half.

    queries (N, H, 2, d), half_keys (2, H, n, d), of one dtype -> scores (N, H, K), largest first,
    and slots (N, H, K) int32 in [0, n*n). Exact. Raises ValueError if K > n.
    """
    scores = half_key_scores(queries, half_keys)  # (2, H, N, n)
    best, slots = topk_sums(scores, K)  # (H, N, K) both
    return best.transpose(0, 1), slots.transpose(0, 1)  # (N, H, K) both


def brute_force_topk(queries, half_keys, K):
    """The definition of product_key_topk: score all n*n slots. For tests and for reading."""
    left, right = torch.einsum("nhsd,shkd->snhk", queries, half_keys)  # (N, H, n) both
    every = left[..., :, None] + right[..., None, :]  # (N, H, n, n)
    return every.flatten(-2).topk(K, dim=-1)  # (N, H, K) both


def unevenness(scores):
    """How unevenly the tokens like the half-keys: scores (2, H, N, n) -> a number >= 0.

    log n minus the entropy of p, the mean over the tokens of softmax(scores): 0 if all half-keys
    are liked the same, log n if one is. The softmax is over all n, so that it gives a gradient to
    half-keys that nobody reads, too (the entropy loss of vector quantization, arXiv 2310.05737).
    """
    p = scores.float().softmax(dim=-1).mean(dim=2)  # (2, H, n)
    return math.log(p.shape[-1]) - torch.special.entr(p).sum(dim=-1).mean()


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
    std: of the values that init_weights draws, a number or a (dim,) tensor; default 1/sqrt(dim).
    """

    def __init__(self, n_keys, dim, dtype=torch.float32, mesh=None, std=None):
        super().__init__()
        self.std = dim**-0.5 if std is None else std
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
        self.record = None  # a list: read() adds to it what it is asked for
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal. Whole rows are drawn, so that any slicing gets the same numbers."""
        for rows in self.values.split(4096):  # (<= 4096, D/P)
            whole = torch.empty(len(rows), self.dim).normal_().mul_(self.std)  # (<= 4096, D)
            rows.copy_(whole[:, self.dims])

    def read(self, slots, weights):
        """slots (N, R) int32 or int64, weights (N, R) -> their weighted sums (N, D).

        Over several ranks, N must be the same on all ranks that share the table.
        """
        self.count_reads(slots, weights)
        if self.parts == 1:
            return gather(self.values, slots, weights, self.grad_sum)  # (N, D)
        slots = AllGather.apply(slots.int(), self.group)  # (P*N, R)
        weights = AllGather.apply(weights, self.group)  # (P*N, R)
        y = gather(self.values, slots, weights, self.grad_sum)  # (P*N, D/P)
        return Exchange.apply(y, self.group)  # (N, D)

    def count_reads(self, slots, weights):
        """While counting, add up how much of each slot is read. slots, weights (N, R)."""
        if self.record is not None:
            self.record.append((slots.detach(), weights.detach()))
        if not self.counting:
            return
        # In units of 2^-24. Integers have one sum, whatever the order and the device. Rounded up,
        # so that a read with a tiny weight is a read. Without its sign: UltraMem's may be negative.
        share = (weights.detach().float().abs() * 2**24).ceil().long()  # (N, R)
        self.read_weight.index_add_(0, slots.reshape(-1), share.reshape(-1))

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
    default C/2. gate_open: the gate has a bias, and starts at 1 for every x. balanced: keep in
    self.balance how uneven the half-keys were in the last forward of training; GPT adds a little of
    it to the loss. Raises ValueError for sizes that cannot work.
    """

    OPEN = 1.2784645  # silu(OPEN) = 1

    def __init__(self, dim, table, heads=4, topk=32, key_dim=None, gate=True, qk_norm=True,
                 gate_open=False, balanced=False):
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
        self.reads = heads * topk  # R
        self.half_dim = key_dim // 2  # d
        self.qk_norm = qk_norm
        self.balanced = balanced
        self.balance = None
        self.query = nn.Linear(dim, heads * key_dim, bias=False)  # weight (H*2d, C)
        half_keys = torch.empty(2, heads, table.n_keys, self.half_dim)  # (2, H, n, d)
        self.half_keys = nn.Parameter(half_keys)
        self.gate = nn.Linear(dim, table.dim, bias=gate_open) if gate else None  # W1 (D, C)
        needs_out = gate or table.dim != dim
        self.out = nn.Linear(table.dim, dim, bias=False) if needs_out else None  # W2 (C, D)
        self.tables = [table]  # a list hides it from nn.Module: it belongs to the whole model
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Half-keys U(-b, b) with b = 1/sqrt(key dim). The matrices are as nn.Linear draws them."""
        self.half_keys.uniform_(-1, 1).mul_((2 * self.half_dim) ** -0.5)  # (2, H, n, d)
        if self.gate is not None and self.gate.bias is not None:
            self.gate.weight.zero_()  # (D, C)
            self.gate.bias.fill_(self.OPEN)  # (D,)

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
        if self.balanced and self.training:  # makes the half-scores a second time
            self.balance = unevenness(half_key_scores(queries, keys))
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


# ---- its rivals


class HashedMemory(nn.Module):
    """The same table without a search: a hash of the last one, two or three tokens names the slots.

    y = sum over r of softmax(W x)_r * values[hash_r(the last 1 + r % 3 tokens)]

    Hashed tables of n-grams are an old idea (hash layers, arXiv 2106.04426). Engram (arXiv
    2601.07372) puts such tables into large models. How do they differ from product keys? A hash
    sees the last tokens and nothing else: the same three tokens read the same slots, whatever came
    before. A query is made from all that the model has understood of the context.

    It is the cheapest of the layers here, and it tells apart two questions: is it the size of the
    table that helps, or the way it is addressed?

    dim: C. table: a MemoryTable. reads: R. seed: of the hash functions; layers that share a table
    should have different ones. tokens (B, T + 2): the tokens of x (B, T, C), and the two before
    each of them; numbers below 0 stand for what is not there.
    """

    def __init__(self, dim, table, reads=128, seed=0):
        super().__init__()
        self.reads = reads  # R
        self.weigh = nn.Linear(dim, reads, bias=False)  # W (R, C)
        needs_out = table.dim != dim
        self.out = nn.Linear(table.dim, dim, bias=False) if needs_out else None  # (C, D)
        self.tables = [table]  # as in ProductKeyMemory
        # A random odd factor for each read and each of the three tokens, 0 for a token that the
        # read does not look at.
        generator = torch.Generator().manual_seed(seed)
        factors = torch.randint(2**31, (reads, 3), generator=generator) * 2 + 1  # (R, 3)
        order = 1 + torch.arange(reads)[:, None] % 3  # (R, 1)
        factors = factors * (torch.arange(3) < order)  # (R, 3)
        self.register_buffer("factors", factors, persistent=False)

    def search(self, tokens):
        """Which slots each token reads: tokens (B, T + 2) -> slots (B, T, R) int32."""
        table, = self.tables
        B = len(tokens)
        T = tokens.shape[1] - 2
        # The token itself, the one before it, the one before that.
        last = torch.stack([tokens[:, 2 - i:2 - i + T] for i in range(3)], dim=-1)  # (B, T, 3)
        words = (last[:, :, None] + 2) * self.factors  # (B, T, R, 3), 64 bits, may overflow
        h = words.sum(-1)  # (B, T, R)
        h = (h ^ (h >> 29)) * 0x2545F4914F6CDD1D  # mixes the upper bits, where the factors meet ...
        slots = (h >> 33) % len(table.values)  # ... and takes the best mixed ones
        return slots.int().view(B, T, self.reads)

    def forward(self, x, tokens):
        B, T, C = x.size()
        table, = self.tables
        slots = self.search(tokens).view(B * T, -1)  # (N, R)
        weights = self.weigh(x).view(B * T, -1).softmax(dim=-1)  # (N, R)
        y = table.read(slots, weights).view(B, T, table.dim).to(x.dtype)  # (B, T, D)
        if self.out is not None:
            y = self.out(y)  # (B, T, C)
        return y


def tucker_topk(row_scores, column_scores, core, K):
    """The K best of n * n pairs of a row and a column, nearly: by rows^T core columns.

    row_scores, column_scores (H, r, N, n): r scores of every row and column, for N tokens. core
    (H, r, r). -> scores, rows, columns (N, H, K), the highest score first. arXiv 2411.12364, TDQKR.

    n * n pairs are too many to score. Were the core the product u v^T of two vectors, the score of
    a pair would be (u . its row's scores) * (v . its column's). Take for u and v the leading
    singular vectors of the core: the K rows and the K columns that are best by them are a
    shortlist, and all of its K * K pairs are scored. With K = n this is exact. Pairs of two
    negative factors are not looked for. Gradients flow through the scores, not through the choice.
    """
    r = core.shape[1]
    v = torch.linalg.svd(core.detach().float())[2][:, 0]  # (H, r)
    u = torch.einsum("hqr,hr->hq", core.detach().float(), v)  # (H, r), as long as it likes
    # The sign of the two together is arbitrary. This one makes the first core look for high scores.
    sign = torch.where(u.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)  # (H, 1)
    u = (u * sign).to(row_scores.dtype)  # (H, r)
    v = (v * sign).to(row_scores.dtype)  # (H, r)
    rows = torch.einsum("hr,hrni->hni", u, row_scores.detach()).topk(K).indices  # (H, N, K)
    columns = torch.einsum("hr,hrnj->hnj", v, column_scores.detach()).topk(K).indices  # (H, N, K)
    left = row_scores.gather(3, rows[:, None].expand(-1, r, -1, -1))  # (H, r, N, K)
    right = column_scores.gather(3, columns[:, None].expand(-1, r, -1, -1))  # (H, r, N, K)
    left = torch.einsum("hqni,hqr->hrni", left, core)  # (H, r, N, K)
    with torch.no_grad():  # no gradients for a whole grid
        grid = torch.einsum("hrni,hrnj->hnij", left, right)  # (H, N, K, K)
        best = grid.flatten(2).topk(K).indices  # (H, N, K)
    i = best // K  # (H, N, K)
    j = best % K  # (H, N, K)
    left = left.gather(3, i[:, None].expand(-1, r, -1, -1))  # (H, r, N, K)
    right = right.gather(3, j[:, None].expand(-1, r, -1, -1))  # (H, r, N, K)
    scores = (left * right).sum(dim=1)  # (H, N, K)
    found = scores, rows.gather(2, i), columns.gather(2, j)  # (H, N, K) each
    return tuple(x.transpose(0, 1) for x in found)


class UltraMem(nn.Module):
    """Product keys with a richer score, and a table whose slots are read in four ways.

    y = sum over heads of 1/K * sum over the K reads of score * W_way value

    Two ideas of UltraMem (arXiv 2411.12364). Tucker scores: there are r = 2 sets of half-keys per
    side, each with a query of its own, and a small trained matrix, the core, says how their scores
    combine. There is no softmax. Implicit value expansion: there are 4 times as many virtual slots
    as slots. A fixed permutation gives each of them a slot and a way, and a way has a matrix W of
    its own. So each slot is read in all 4 ways.

    Not here: its memory layer stands beside an MLP and is added some blocks later, the two halves
    of a value have cores of their own (multi-core scoring), a loss keeps the core near rank one.

    dim: C. table: a float32 MemoryTable of any dim, not in slices. heads, topk: H, K. key_dim: of a
    pair of half-keys, default C/2. Below, m is the number of half-keys in a set: m*m = 4*S. Raises
    ValueError for sizes that cannot work.
    """

    RANK = 2  # r
    WAYS = 4  # a square number

    def __init__(self, dim, table, heads=1, topk=64, key_dim=None):
        super().__init__()
        key_dim = dim // 2 if key_dim is None else key_dim
        self.heads = heads  # H
        self.topk = topk  # K
        self.reads = heads * topk  # R
        self.half_dim = key_dim // 2  # d
        self.side = table.n_keys * math.isqrt(self.WAYS)  # m
        if not 1 <= topk <= self.side:
            raise ValueError(f"topk {topk} is not between 1 and the {self.side} half-keys: lower "
                             f"topk or make the table with more n_keys")
        if key_dim < 2 or key_dim % 2:
            raise ValueError(f"key_dim {key_dim} is not an even number above 0: "
                             f"a key has two halves, so choose an even one")
        if not table.values.requires_grad:
            raise ValueError("UltraMem reads whole tables in float32: make the table with neither "
                             "dtype nor mesh")
        sets = 2 * heads * self.RANK
        self.query = nn.Linear(dim, sets * self.half_dim, bias=False)  # weight (2*H*r*d, C)
        half_keys = torch.empty(2, heads, self.RANK, self.side, self.half_dim)  # (2, H, r, m, d)
        self.half_keys = nn.Parameter(half_keys)
        self.core = nn.Parameter(torch.empty(heads, self.RANK, self.RANK))  # (H, r, r)
        self.out = nn.Linear(self.WAYS * table.dim, dim, bias=False)  # all W: weight (C, 4*D)
        self.tables = [table]  # as in ProductKeyMemory
        shuffle = torch.randperm(self.side**2, generator=torch.Generator().manual_seed(0))
        self.register_buffer("shuffle", shuffle, persistent=False)  # (m*m,)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Half-keys as in ProductKeyMemory. The core is 1/r everywhere, which has rank one."""
        self.half_keys.uniform_(-1, 1).mul_((2 * self.half_dim) ** -0.5)  # (2, H, r, m, d)
        self.core.fill_(1 / self.RANK)

    def search(self, x):
        """x (N, C) -> slots and ways (N, R) int64, weights (N, R)."""
        table, = self.tables
        d = self.half_dim
        queries = self.query(x).view(len(x), 2, self.heads, self.RANK, d)  # (N, 2, H, r, d)
        queries = F.rms_norm(queries, (d,)) / math.sqrt(d)  # (N, 2, H, r, d)
        keys = F.rms_norm(self.half_keys.to(queries.dtype), (d,))  # (2, H, r, m, d)
        row_scores, column_scores = queries.permute(1, 2, 3, 0, 4) @ keys.transpose(-1, -2)
        core = self.core.to(row_scores.dtype)
        scores, rows, columns = tucker_topk(row_scores, column_scores, core, self.topk)
        virtual = self.shuffle[(rows * self.side + columns).flatten(1)]  # (N, R)
        S = len(table.values)
        return virtual % S, virtual // S, scores.flatten(1) / self.topk

    def forward(self, x):
        B, T, C = x.size()
        table, = self.tables
        slots, ways, weights = self.search(x.view(B * T, C))  # (N, R) each
        table.count_reads(slots, weights)
        values = F.embedding(slots, table.values).to(weights.dtype)  # (N, R, D)
        # A read's weight stands in the column of its way, the other columns are 0.
        by_way = weights[..., None] * F.one_hot(ways, self.WAYS)  # (N, R, 4)
        sums = torch.einsum("nrw,nrd->nwd", by_way, values)  # (N, 4, D)
        return self.out(sums.flatten(1)).view(B, T, C)


class PEER(nn.Module):
    """A million tiny experts (arXiv 2407.04153): each has one hidden unit, two vectors u and v.

    y = sum over the R best experts of softmax(scores)_i * gelu(x . u_i) * v_i

    They are found as ProductKeyMemory finds its slots, whose search it has. A slot of the table
    holds u and v, so the same number of parameters makes half as many slots, and half as many reads
    move as many bytes.

    dim: C. table: a MemoryTable with dim 2C. heads, topk, key_dim, qk_norm: see ProductKeyMemory.
    """

    def __init__(self, dim, table, heads=4, topk=16, key_dim=None, qk_norm=True):
        super().__init__()
        self.finder = ProductKeyMemory(dim, table, heads, topk, key_dim, gate=False,
                                       qk_norm=qk_norm)
        self.finder.out = None  # of the finder nothing but its search is used
        self.reads = heads * topk  # R
        self.tables = [table]

    @staticmethod
    def std(dim, reads):
        """The std of a slot's numbers: u has variance 1/C, v has 1/R, so that y has 1. -> (2C,)"""
        return torch.tensor([dim**-0.5] * dim + [reads**-0.5] * dim)

    def forward(self, x):
        B, T, C = x.size()
        table, = self.tables
        x = x.view(B * T, C)  # (N, C)
        slots, weights = self.finder.search(x)  # (N, H, K) both
        slots = slots.flatten(1)  # (N, R)
        weights = weights.flatten(1)  # (N, R)
        table.count_reads(slots, weights)
        u, v = F.embedding(slots, table.values).to(x.dtype).chunk(2, dim=-1)  # (N, R, C) both
        hidden = F.gelu(torch.einsum("nc,nrc->nr", x, u))  # (N, R)
        y = torch.einsum("nr,nrc->nc", weights.to(x.dtype) * hidden, v)  # (N, C)
        return y.view(B, T, C)


class MixtureOfExperts(nn.Module):
    """E small MLPs, of which each token uses the K that the router likes best (token choice).

    p = softmax(W_r x)        y = sum over the top K of p_e / (sum of these p) * W2_e gelu(W1_e x)

    Many small experts, as in OLMoE (arXiv 2409.02060). No token is dropped: each expert gets room
    for as many tokens as the most popular one has. That number comes from the data, so
    torch.compile cuts its graph there. With K = 1 the weight is p itself: 1 would give the router
    no gradient.

    balance: after a forward in training, the Switch loss E * sum_e f_e P_e (arXiv 2101.03961): f_e
    is the share of assignments that expert e got, P_e the mean of p_e. It is 1 when all experts get
    the same. GPT adds a little of it to the loss.

    dim: C. experts: E. hidden: h. topk: K.
    """

    def __init__(self, dim, experts, hidden, topk):
        super().__init__()
        self.topk = topk  # K
        self.router = nn.Linear(dim, experts, bias=False)  # W_r (E, C)
        self.experts_in = nn.Parameter(torch.empty(experts, dim, hidden))  # W1 (E, C, h)
        self.experts_out = nn.Parameter(torch.empty(experts, hidden, dim))  # W2 (E, h, C)
        self.balance = None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Experts are normal, std 1/sqrt(inputs). The router is as nn.Linear draws it."""
        for weight in (self.experts_in, self.experts_out):  # (E, inputs, outputs)
            weight.normal_(std=weight.shape[1] ** -0.5)

    def route(self, x):
        """x (N, C) -> weights, experts (N, K), and p (N, E)."""
        p = self.router(x).float().softmax(dim=-1)  # (N, E)
        weights, experts = p.topk(self.topk, dim=-1)  # (N, K) both
        if self.topk > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)  # (N, K)
        return weights, experts, p

    def forward(self, x):
        B, T, C = x.size()
        E = len(self.experts_in)
        K = self.topk
        x = x.view(B * T, C)  # (N, C)
        weights, experts, p = self.route(x)
        # Sort the N*K assignments by expert, and give each its place in its expert's queue.
        experts, order = experts.flatten().sort(stable=True)  # (N*K,) both
        load = experts.bincount(minlength=E)  # (E,): how many assignments an expert has
        place = torch.arange(len(order), device=x.device) - (load.cumsum(0) - load)[experts]
        if self.training:
            self.balance = E * (load / len(order) * p.mean(dim=0)).sum()
        queues = x.new_zeros(E, load.max(), C)  # (E, longest, C)
        # Each row is copied once, and the copies' gradients are added up in order. x[order // K]
        # would be shorter, but its backward adds in any order.
        copies = x[:, None].expand(-1, K, -1).reshape(-1, C)  # (N*K, C)
        queues = queues.index_put((experts, place), copies[order])
        hidden = F.gelu(queues @ self.experts_in.to(x.dtype))  # (E, longest, h)
        answers = (hidden @ self.experts_out.to(x.dtype))[experts, place]  # (N*K, C), sorted
        y = torch.empty_like(answers).index_put((order,), answers)  # (N*K, C), as they were
        y = torch.einsum("nk,nkc->nc", weights.to(y.dtype), y.view(B * T, K, C))  # (N, C)
        return y.view(B, T, C)


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
