"""
Other layers in the place of the MLP, to compare with. Each adds parameters, and hardly any compute.

                      how slots are found        how they are weighted    what is read
    ProductKeyMemory  by a query                 softmax of the scores    a value
    UltraMem          by two queries, combined   the score itself         a value, in one of 4 ways
    HashedMemory      by a hash of the tokens    softmax of a gate        a value
    PEER              by a query                 softmax of the scores    a neuron: two vectors
    MixtureOfExperts  by a router over all       softmax of the router    a small MLP

Made from a GPTConfig, each has about as many parameters as the memory layer with its table, and at
most about the FLOPs of the MLP: see the `sizes` of each class. What else a layer says of itself is
described in memory.Layer.

B, T, C batch, tokens, channels · N tokens, B*T · H heads · K slots read per head · R = H*K
n half-keys per side · S = n*n slots · D value dim · d half-key dim · E experts, h hidden units each
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from memory import Layer, MemoryTable, ProductKeyMemory, draw_matrix


def check_plain_values(config):
    """Raise ValueError if the settings of the table's values do not suit a rival."""
    if config.value_dim() != config.n_embd or config.mem_dtype != "float32":
        raise ValueError(f"--ffn {config.ffn} has no --mem-value-dim and no --mem-dtype bfloat16: "
                         f"leave them out")


# ---- a hash of the last tokens

class HashedMemory(Layer):
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

    wants_tokens = True
    can_be_sliced = True

    def __init__(self, dim, table, reads=128, seed=0):
        super().__init__()
        self.reads = reads  # R
        self.weigh = nn.Linear(dim, reads, bias=False)  # W (R, C)
        needs_out = table.dim != dim
        self.out = nn.Linear(table.dim, dim, bias=False) if needs_out else None  # (C, D)
        self.use_table(table)
        self.seed = seed
        self.register_buffer("factors", None, persistent=False)
        self.draw_factors()
        self.register_load_state_dict_post_hook(HashedMemory.draw_factors)

    def draw_factors(self, _=None):
        """Draw the hash functions, also after load_state_dict: see GPT.fill_in."""
        # A random odd factor for each read and each of the three tokens, 0 for a token that the
        # read does not look at.
        with torch.device("cpu"):  # wherever the model is
            generator = torch.Generator().manual_seed(self.seed)
            factors = torch.randint(2**31, (self.reads, 3), generator=generator) * 2 + 1  # (R, 3)
            order = 1 + torch.arange(self.reads)[:, None] % 3  # (R, 1)
            factors = factors * (torch.arange(3) < order)  # (R, 3)
        self.factors = factors.to(self.weigh.weight.device)  # (R, 3)

    def search(self, tokens):
        """Which slots each token reads: tokens (B, T + 2) -> slots (B, T, R) int32."""
        B = tokens.shape[0]
        T = tokens.shape[1] - 2
        # The token itself, the one before it, the one before that.
        last = torch.stack([tokens[:, 2 - i:2 - i + T] for i in range(3)], dim=-1)  # (B, T, 3)
        words = (last[:, :, None] + 2) * self.factors  # (B, T, R, 3), 64 bits, may overflow
        h = words.sum(-1)  # (B, T, R)
        h = (h ^ (h >> 29)) * 0x2545F4914F6CDD1D  # mixes the upper bits, where the factors meet ...
        slots = (h >> 33) % len(self.table.values)  # ... and takes the best mixed ones
        return slots.int().view(B, T, self.reads)

    def forward(self, x, tokens):
        B, T, C = x.size()
        slots = self.search(tokens).view(B * T, -1)  # (N, R)
        weights = self.weigh(x).view(B * T, -1).softmax(dim=-1)  # (N, R)
        y = self.table.read(slots, weights).view(B, T, -1).to(x.dtype)  # (B, T, D)
        if self.out is not None:
            y = self.out(y)  # (B, T, C)
        return y

    @classmethod
    def make_table(cls, config, mesh=None):
        return ProductKeyMemory.make_table(config, mesh)

    @classmethod
    def from_config(cls, config, block, table):
        return cls(config.n_embd, table, config.mem_heads * config.mem_topk, seed=block)

    @classmethod
    def label(cls, config):
        return f"Hashed memory, {config.mem_n_keys ** 2:,} slots"

    def init_weights(self, divisor):
        draw_matrix(self.weigh.weight)
        if self.out is not None:
            draw_matrix(self.out.weight, divisor)


# ---- UltraMem

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


class UltraMem(Layer):
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

    reads_are_rows = False
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
        if table.mesh is not None or table.values.dtype == torch.bfloat16:
            raise ValueError("UltraMem reads whole tables in float32: make the table with neither "
                             "dtype nor mesh")
        sets = 2 * heads * self.RANK
        self.query = nn.Linear(dim, sets * self.half_dim, bias=False)  # weight (2*H*r*d, C)
        half_keys = torch.empty(2, heads, self.RANK, self.side, self.half_dim)  # (2, H, r, m, d)
        self.half_keys = nn.Parameter(half_keys)
        self.core = nn.Parameter(torch.empty(heads, self.RANK, self.RANK))  # (H, r, r)
        self.out = nn.Linear(self.WAYS * table.dim, dim, bias=False)  # all W: weight (C, 4*D)
        self.use_table(table)
        self.register_buffer("shuffle", None, persistent=False)
        self.draw_shuffle()
        self.register_load_state_dict_post_hook(UltraMem.draw_shuffle)
        self.reset_parameters()

    def draw_shuffle(self, _=None):
        """Draw the permutation, also after load_state_dict: see GPT.fill_in."""
        generator = torch.Generator().manual_seed(0)
        shuffle = torch.randperm(self.side**2, generator=generator, device="cpu")  # (m*m,)
        self.shuffle = shuffle.to(self.half_keys.device)

    @torch.no_grad()
    def reset_parameters(self):
        """Half-keys as in ProductKeyMemory. The core is 1/r everywhere, which has rank one."""
        self.half_keys.uniform_(-1, 1).mul_((2 * self.half_dim) ** -0.5)  # (2, H, r, m, d)
        self.core.fill_(1 / self.RANK)

    def search(self, x):
        """x (N, C) -> slots and ways (N, R) int64, weights (N, R)."""
        d = self.half_dim
        queries = self.query(x).view(x.shape[0], 2, self.heads, self.RANK, d)  # (N, 2, H, r, d)
        queries = F.rms_norm(queries, (d,)) / math.sqrt(d)  # (N, 2, H, r, d)
        keys = F.rms_norm(self.half_keys.to(queries.dtype), (d,))  # (2, H, r, m, d)
        row_scores, column_scores = queries.permute(1, 2, 3, 0, 4) @ keys.transpose(-1, -2)
        core = self.core.to(row_scores.dtype)
        scores, rows, columns = tucker_topk(row_scores, column_scores, core, self.topk)
        virtual = self.shuffle[(rows * self.side + columns).flatten(1)]  # (N, R)
        S = self.table.values.shape[0]
        return virtual % S, virtual // S, scores.flatten(1) / self.topk

    def forward(self, x):
        slots, ways, weights = self.search(x.reshape(-1, x.shape[-1]))  # (N, R) each
        self.table.count_reads(slots, weights)
        values = self.table.rows(slots).to(weights.dtype)  # (N, R, D)
        # A read's weight stands in the column of its way, the other columns are 0.
        by_way = weights[..., None] * F.one_hot(ways, self.WAYS)  # (N, R, 4)
        sums = torch.einsum("nrw,nrd->nwd", by_way, values)  # (N, 4, D)
        return self.out(sums.flatten(1)).view(x.shape)  # (..., C)

    @classmethod
    def sizes(cls, config):
        """-> n, H, K that match the memory layer of these settings.

        A value has C/2 dims, so there are twice as many as there are slots. The 4 matrices have as
        many weights as 4C values. So have the two of the gate, W1 and W2; where the memory layer
        has no gate, there are 4C fewer values. A head has two sets of half-keys, each almost three
        times as many as the memory layer, so there are a quarter of the heads. K is not larger,
        because the search scores K * K pairs.
        """
        slots = 2 * config.mem_n_keys**2
        if not config.mem_gate:
            slots -= cls.WAYS * config.n_embd
        n = round(max(slots, 0) ** 0.5)
        return n, max(config.mem_heads // 4, 1), 2 * config.mem_topk

    @classmethod
    def check(cls, config):
        check_plain_values(config)
        ProductKeyMemory.check(config)
        n, _, topk = cls.sizes(config)
        if n < 1:
            raise ValueError(f"--ffn ultramem: its matrices alone are as large as a table of "
                             f"--mem-n-keys {config.mem_n_keys}: raise it")
        if topk > 2 * n:
            raise ValueError(f"--mem-topk {config.mem_topk}: UltraMem reads twice as many slots "
                             f"per head, {topk}, and has only {2 * n} half-keys: lower --mem-topk "
                             f"or raise --mem-n-keys")

    @classmethod
    def make_table(cls, config, mesh=None):
        return MemoryTable(cls.sizes(config)[0], config.n_embd // 2)

    @classmethod
    def from_config(cls, config, block, table):
        _, heads, topk = cls.sizes(config)
        return cls(config.n_embd, table, heads, topk, config.key_dim())

    @classmethod
    def label(cls, config):
        return f"UltraMem, {cls.sizes(config)[0] ** 2:,} slots"

    def init_weights(self, divisor):
        draw_matrix(self.query.weight)
        draw_matrix(self.out.weight, divisor)

    def param_counts(self):
        half_keys = self.half_keys.numel()
        return dict(dense=super().param_counts()["dense"] - half_keys, half_keys=half_keys)

    def flops_per_token(self):
        """The core is left out: it belongs to the search."""
        return super().flops_per_token() - 6 * self.core.numel()


# ---- PEER

class PEER(Layer):
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
        self.heads = heads  # H
        self.reads = heads * topk  # R
        self.use_table(table)

    @staticmethod
    def std(dim, reads):
        """The std of a slot's numbers: u has variance 1/C, v has 1/R, so that y has 1. -> (2C,)"""
        return torch.tensor([dim**-0.5] * dim + [reads**-0.5] * dim, device="cpu")

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, x.shape[-1])  # (N, C)
        slots, weights = self.finder.search(x)  # (N, H, K) both
        slots = slots.flatten(1)  # (N, R)
        weights = weights.flatten(1)  # (N, R)
        self.table.count_reads(slots, weights)
        u, v = self.table.rows(slots).to(x.dtype).chunk(2, dim=-1)  # (N, R, C) both
        hidden = F.gelu(torch.einsum("nc,nrc->nr", x, u))  # (N, R)
        y = torch.einsum("nr,nrc->nc", weights.to(x.dtype) * hidden, v)  # (N, C)
        return y.view(shape)  # (..., C)

    def written_by(self, row):
        """v, what a neuron writes; u stands before it."""
        return row.chunk(2)[1]

    @classmethod
    def sizes(cls, config):
        """-> n, K: an expert is two vectors, so there are half as many as there are slots."""
        return max(round(config.mem_n_keys / 2**0.5), 1), max(config.mem_topk // 2, 1)

    @classmethod
    def check(cls, config):
        check_plain_values(config)
        ProductKeyMemory.check(config)

    @classmethod
    def make_table(cls, config, mesh=None):
        n, topk = cls.sizes(config)
        std = cls.std(config.n_embd, config.mem_heads * topk)
        return MemoryTable(n, 2 * config.n_embd, std=std)

    @classmethod
    def from_config(cls, config, block, table):
        _, topk = cls.sizes(config)
        return cls(config.n_embd, table, config.mem_heads, topk, config.key_dim(), config.qk_norm)

    @classmethod
    def label(cls, config):
        return f"PEER, {cls.sizes(config)[0] ** 2:,} experts"

    def init_weights(self, divisor):
        self.finder.init_weights(divisor)

    def param_counts(self):
        return self.finder.param_counts()


# ---- a mixture of experts

class MixtureOfExperts(Layer):
    """E small MLPs, and each token is routed to K of them (token choice).

    p = softmax(W_r x)        y = sum over the top K of p_e / (sum of these p) * W2_e gelu(W1_e x)

    Many small experts, as in OLMoE (arXiv 2409.02060). No token is dropped: each expert gets room
    for as many tokens as the most popular one has. That number comes from the data, so
    torch.compile cuts its graph there. With K = 1 the weight is p itself: 1 would give the router
    no gradient.

    balance: after a forward in training, the Switch loss E * sum_e f_e P_e (arXiv 2101.03961): f_e
    is the share of assignments that expert e got, P_e the mean of p_e. It is 1 when all experts get
    the same. The model adds a little of it to the loss.

    dim: C. experts: E. hidden: h. topk: K.
    """

    def __init__(self, dim, experts, hidden, topk):
        super().__init__()
        self.topk = topk  # K
        self.router = nn.Linear(dim, experts, bias=False)  # W_r (E, C)
        self.experts_in = nn.Parameter(torch.empty(experts, dim, hidden))  # W1 (E, C, h)
        self.experts_out = nn.Parameter(torch.empty(experts, hidden, dim))  # W2 (E, h, C)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
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
        shape = x.shape
        C = shape[-1]
        E = len(self.experts_in)
        K = self.topk
        x = x.reshape(-1, x.shape[-1])  # (N, C)
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
        y = torch.einsum("nk,nkc->nc", weights.to(y.dtype), y.view(-1, K, C))  # (N, C)
        return y.view(shape)  # (..., C)

    @classmethod
    def sizes(cls, config):
        """-> E, h, K.

        E: many small experts, but not more than the smallest of tables has weights for. h: the
        weights of all experts, E * 2 * C * h, are as many as the table's, S * C. K: router and
        experts, C * E + K * 2 * C * h, are no more than the MLP's 8 * C * C.
        """
        n = config.mem_n_keys
        experts = config.moe_experts or min(max(n, 128), 4 * n)
        hidden = n**2 // (2 * experts)
        budget = 8 * config.n_embd - experts
        topk = config.moe_topk or budget // max(2 * hidden, 1)
        return experts, hidden, topk

    @classmethod
    def check(cls, config):
        check_plain_values(config)
        experts, hidden, topk = cls.sizes(config)
        slots = config.mem_n_keys**2
        if hidden < 1:
            raise ValueError(f"--moe-experts {experts} do not share the weights of {slots} slots: "
                             f"choose 1 to {slots // 2}")
        if not 1 <= topk <= experts:
            raise ValueError(f"--moe-topk {topk}: {experts} experts of {hidden} hidden units "
                             f"cannot be matched with the MLP's FLOPs: change --moe-experts or "
                             f"--mem-n-keys, or set --moe-topk to 1..{experts}")

    @classmethod
    def from_config(cls, config, block, table):
        layer = cls(config.n_embd, *cls.sizes(config))
        layer.balance_weight = config.moe_balance
        return layer

    @classmethod
    def label(cls, config):
        return f"MoE, {cls.sizes(config)[0]:,} experts"

    @torch.no_grad()
    def init_weights(self, divisor):
        """The router. The experts, drawn before, write to the residual stream: they are divided."""
        draw_matrix(self.router.weight)
        self.experts_out.div_(divisor)

    def param_counts(self):
        experts = self.experts_in.numel() + self.experts_out.numel()
        return dict(dense=self.router.weight.numel(), experts=experts)

    def active_params(self):
        """The router and K experts of 2 * C * h weights."""
        experts, C, hidden = self.experts_in.shape
        return self.router.weight.numel() + self.topk * 2 * C * hidden

    def flops_per_token(self):
        return 6 * self.active_params()

    def parameter_groups(self):
        experts = [self.experts_in, self.experts_out]
        return [([self.router.weight], True, "learning_rate"), (experts, True, "expert_lr")]
