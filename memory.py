"""
A memory layer replaces a transformer's MLP. Each token looks up the K of S trained slots whose keys
fit its query best, and gets the weighted sum of their values:

    s = softmax(top-K scores)        y = sum over the K slots of s * value

This is Memory Layers at Scale (arXiv 2412.09764). The layer holds S*D parameters, and a token
touches R*D of them, R = heads * K: it adds memory, hardly any compute. Two ideas make it cheap:

    product keys      The S = n*n keys are never built. A key is a pair of half-keys, so 2n dot
                      products find the best of n*n slots. See product_key_topk.
    a shared table    One table of values serves all memory layers of a model (MemoryTable). Each
                      layer has its own queries and half-keys (ProductKeyMemory).

To put a layer into a model of your own, copy this file and kernel.py:

    table = MemoryTable(n_keys=128, dim=256)    # S = 16,384, D = 256
    layer = ProductKeyMemory(256, table)        # C = 256: x (..., 256) -> (..., 256)

Over several ranks the table is cut into slices along D: see "parallel memory" below. Other layers
that add parameters without compute are in support/rivals.py.

B, T, C batch, tokens, channels · N tokens, B*T · H heads · K slots read per head · R = H*K
n half-keys per side · S = n*n slots · D value dim · d half-key dim · P ranks that share one table
U rows of the table that one step moves
"""
import copy
import functools
import math
import weakref

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from kernel import gather, topk_sums, uses_triton

# ---- which slots: product keys


def half_key_scores(queries, half_keys):
    """The dot product of each half of a query with every half-key of its side.

    queries (N, H, 2, d), half_keys (2, H, n, d) -> (2, H, N, n).
    """
    return queries.permute(2, 1, 0, 3) @ half_keys.transpose(-1, -2)


def brute_force_topk(queries, half_keys, K):
    """The definition: score all n*n slots, take the K best. For tests and for reading."""
    left, right = torch.einsum("thsd,shnd->sthn", queries, half_keys)  # (N, H, n) both
    sums = left[..., :, None] + right[..., None, :]  # (N, H, n, n)
    return sums.flatten(-2).topk(K, dim=-1)  # (N, H, K) both


def product_key_topk(queries, half_keys, K):
    """The K slots whose product keys score highest (product keys, arXiv 1907.05242).

    The key of slot i*n + j is (half_keys[0, h, i], half_keys[1, h, j]), and its score with a query
    is the sum of two dot products, one for each half. kernel.topk_sums finds the largest sums. For
    how, read the ten lines of kernel.topk_sums_reference: the K best half-keys of each side, then
    the K best of their few candidate sums.

    queries (N, H, 2, d), half_keys (2, H, n, d), of one dtype -> scores (N, H, K), largest first,
    and slots (N, H, K) int32 in [0, n*n). Exact. Raises ValueError if K > n.
    """
    half_scores = half_key_scores(queries, half_keys)  # (2, H, N, n)
    scores, slots = topk_sums(half_scores, K)  # (H, N, K) both
    return scores.transpose(0, 1), slots.transpose(0, 1)  # (N, H, K) both


# ---- what they hold: the table

TRAINABLE = (torch.float32, torch.bfloat16, torch.float64)


class MemoryTable(nn.Module):
    """The values: S = n_keys**2 slots of `dim` numbers, shared by all layers that read them.

    Register a table in your model before you give it to layers. If no module has it by then, it
    becomes a part of the first layer that reads it. Its values are a parameter like any other, and
    any optimizer can train them. RowAdam, below, takes 8 bytes a value where AdamW takes 16, and
    its step on a CPU costs the rows that were read, if a forward has fewer lookups than the table
    has rows. It also trains a table in bfloat16 or in slices.

    mesh: a torch DeviceMesh ("replica", "slice") of several ranks. The P ranks along "slice" hold
    D/P dims of every slot each, and only RowAdam trains them. Raises ValueError if P does not
    divide dim, or for a dtype that cannot be trained.
    std: of the values that init_weights draws, a number or a (dim,) tensor; default 1/sqrt(dim).
    """

    def __init__(self, n_keys, dim, dtype=torch.float32, mesh=None, std=None):
        super().__init__()
        if n_keys < 1 or dim < 1:
            raise ValueError(f"a table of {n_keys} half-keys and {dim} dims is empty: give at "
                             f"least 1 of each")
        if dtype not in TRAINABLE:
            raise ValueError(f"a table in {dtype} cannot be trained: make it in float32 or "
                             f"bfloat16")
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
        values = torch.empty(n_keys**2, width, dtype=dtype)  # (S, D/P)
        # Slices have no gradient before RowAdam asks for it: DDP must leave them alone.
        self.values = nn.Parameter(values, requires_grad=mesh is None)
        self.register_buffer("read_weight", None, persistent=False)  # see count
        self.counting = False
        self.record = None  # or a list, to which count_reads appends (slots, weights)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal. Whole rows are drawn, so that any slicing gets the same numbers."""
        for rows in self.values.split(4096):  # (<= 4096, D/P)
            whole = torch.empty(len(rows), self.dim).normal_()  # (<= 4096, D)
            whole *= torch.as_tensor(self.std, device=whole.device)
            rows.copy_(whole[:, self.dims])

    reset_parameters = init_weights  # torch's name for it

    def read(self, slots, weights):
        """slots (N, R) int32 or int64, weights (N, R) -> their weighted sums (N, D).

        Over several ranks, N must be the same on all ranks that share the table.
        """
        self.count_reads(slots, weights)
        if self.parts == 1:
            return self.gather(slots, weights)  # (N, D)
        slots = AllGather.apply(slots.int(), self.group)  # (P*N, R)
        weights = AllGather.apply(weights, self.group)  # (P*N, R)
        y = self.gather(slots, weights)  # (P*N, D/P)
        return Exchange.apply(y, self.group)  # (N, D)

    def gather(self, slots, weights):
        """The weighted sums of the dims that are here: slots, weights (N, R) -> (N, D/P)."""
        return gather(self.values, slots, weights, self.by_row(slots.numel()))

    def rows(self, slots):
        """The values of slots (N, R) themselves -> (N, R, D). Only of a whole table."""
        return F.embedding(slots, self.values, sparse=self.by_row(slots.numel()))

    def by_row(self, lookups):
        """Whether this many lookups get a sparse gradient, for RowGradient, below. On a CPU."""
        if torch.compiler.is_compiling() or self.values.device.type != "cpu":
            return False
        return lookups < len(self.values) and self.values in ROW_GRADIENTS

    def count_reads(self, slots, weights):
        """While counting, add up how much of each slot is read. slots, weights (N, R)."""
        if self.record is not None:
            self.record.append((slots.detach(), weights.detach()))
        if not self.counting:
            return
        # Integers, in units of 2^-24: their sum depends on no order and no device. ceil: a tiny
        # weight still counts as a read. abs: UltraMem's weights may be negative.
        share = (weights.detach().float().abs() * 2**24).ceil().long()  # (N, R)
        self.read_weight.index_add_(0, slots.reshape(-1), share.reshape(-1))

    def count(self, on):
        """Start counting reads, from zero, or stop."""
        self.counting = on
        if on and self.read_weight is None:
            self.read_weight = torch.zeros(len(self.values), dtype=torch.int64,
                                           device=self.values.device)  # (S,), in units of 2^-24
        elif on:
            self.read_weight.zero_()

    def usage(self):
        """How much of the table the counted reads used -> (share, KL).

        share: how many of all S slots were read at least once, in [0, 1]. KL: the divergence of the
        slots' read weights from uniform, in nats. 0 means that all slots got the same, log(S) that
        one got everything. These are this rank's reads, unless read_weight was summed over ranks.
        """
        if self.read_weight is None:
            return 0.0, 0.0
        weight = self.read_weight.cpu().double()  # (S,)
        share = (weight > 0).double().mean().item()
        p = weight / weight.sum().clamp(min=1)  # (S,)
        return share, torch.xlogy(p, p * len(p)).sum().item()  # relative to uniform


HELD = weakref.WeakSet()  # the tables that a module was ever given; copies are not noted


def note_holder(module, name, part):
    """torch calls this whenever a module gets a part."""
    if isinstance(part, MemoryTable):
        HELD.add(part)


nn.modules.module.register_module_module_registration_hook(note_holder)


# ---- the interface to a GPT: skip it at first


@torch.no_grad()
def draw_matrix(weight, divisor=1.0):
    """A matrix (outputs, inputs): normal, std 1/sqrt(inputs), divided by `divisor`. In place."""
    weight.normal_(std=weight.shape[1] ** -0.5).div_(divisor)


class Layer(nn.Module):
    """What can replace a transformer's MLP: x (B, T, C) -> (B, T, C).

    Besides its forward, a layer describes itself to the model, the optimizer and the pictures. The
    defaults suit a layer made of plain matrices; a kind of layer overrides what differs. It must
    have from_config and init_weights. A layer with a table calls use_table, sets self.reads, and
    reads with table.read, or calls table.count_reads.
    """

    tables = ()  # [its MemoryTable], if it reads one
    heads = 1  # H
    reads = 0  # R, the rows of the table that a token reads
    reads_are_rows = True  # False: a row is read in several ways, and cannot be shown as a slot
    wants_tokens = False  # whether it is called as layer(x, tokens), see model.Block
    can_be_sliced = False  # whether its table can be cut into slices over ranks
    balance = None  # after a forward in training: a loss that keeps the use of its parts even
    balance_weight = 0.0  # how much of that the model adds to its loss

    def use_table(self, table):
        """Read this table. If no module has it yet, it becomes a part of this one."""
        if table not in HELD:
            self.own_table = table
        self.tables = [table]  # the list hides it from nn.Module

    def __deepcopy__(self, memo):
        """Unless its table was copied before it, the copy registers the table as its own."""
        is_alone = bool(self.tables) and id(self.table) not in memo
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if is_alone:
            new.own_table = new.table
        return new

    @property
    def table(self):
        """The MemoryTable that it reads."""
        return self.tables[0]

    @classmethod
    def check(cls, config):
        """Raise ValueError, in one line, if a model.GPTConfig asks for what cannot work."""

    @classmethod
    def make_table(cls, config, mesh=None):
        """The table that a layer of a model.GPTConfig reads, or None. mesh: see MemoryTable."""

    @classmethod
    def from_config(cls, config, block, table):
        """The layer of a model.GPTConfig in block number `block`. table: from make_table."""
        raise NotImplementedError

    @classmethod
    def label(cls, config):
        """What a picture calls a model of these settings."""
        return cls.__name__

    def init_weights(self, divisor):
        """Draw its weights for a GPT. What writes to the residual stream is divided by divisor."""
        raise NotImplementedError

    def param_counts(self):
        """Its own parameters by what they do, the table's left out -> {"dense": number, ...}."""
        return dict(dense=sum(p.numel() for p in self.parameters()))

    def active_params(self):
        """How many of its own parameters one token uses."""
        return sum(self.param_counts().values())

    def written_by(self, row):
        """Roughly what a row of the table (D,) adds to the output when it is read: (C,)."""
        out = getattr(self, "out", None)
        return row if out is None else out(row)

    def numbers_read(self):
        """Numbers that one token reads from the table: R rows of D."""
        return self.reads * self.table.dim if self.tables else 0

    def flops_per_token(self):
        """FLOPs to train on one token: 6 for each weight of a matrix and each number that is read.

        What a search does with its scores is not counted.
        """
        multiplied = sum(p.numel() for p in self.parameters() if p.dim() > 1)
        return 6 * (multiplied + self.numbers_read())

    def parameter_groups(self):
        """For the optimizer: [(parameters, weight decay or not, name of the setting of their rate)]
        """
        matrices = [p for p in self.parameters() if p.dim() == 2]
        rest = [p for p in self.parameters() if p.dim() != 2]
        return [(matrices, True, "learning_rate"), (rest, False, "learning_rate")]


# ---- the layer


class ProductKeyMemory(Layer):
    """A memory layer, in place of a block's MLP: x (..., C) -> (..., C).

    Memory    y = sum over heads of softmax(top-K scores) @ values
    gate      the output is W2 (y * silu(W1 x)); without a gate it is y, or W2 y if D != C
    qk_norm   the halves of queries and keys are RMS-normed before they meet, and the score is
              divided by sqrt(d)
    Memory+   Memory with gate and qk_norm

    dim: C. table: a MemoryTable, which several layers may share. key_dim: of both halves together,
    default C/2. Raises ValueError for sizes that cannot work.
    """

    can_be_sliced = True

    def __init__(self, dim, table, heads=4, topk=32, key_dim=None, gate=True, qk_norm=True):
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
        self.query = nn.Linear(dim, heads * key_dim, bias=False)  # weight (H*2d, C)
        half_keys = torch.empty(2, heads, table.n_keys, self.half_dim)  # (2, H, n, d)
        self.half_keys = nn.Parameter(half_keys)
        self.gate = nn.Linear(dim, table.dim, bias=False) if gate else None  # W1 (D, C)
        needs_out = gate or table.dim != dim
        self.out = nn.Linear(table.dim, dim, bias=False) if needs_out else None  # W2 (C, D)
        self.use_table(table)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Half-keys U(-b, b) with b = 1/sqrt(key dim). nn.Linear draws the other matrices."""
        self.half_keys.uniform_(-1, 1).mul_((2 * self.half_dim) ** -0.5)  # (2, H, n, d)

    def search(self, x):
        """Which slots each token reads, and how much of each.

        x (N, C) -> slots (N, H, K) int32, weights (N, H, K), which sum to 1 over K.
        """
        queries = self.query(x).view(x.shape[0], self.heads, 2, self.half_dim)  # (N, H, 2, d)
        keys = self.half_keys.to(queries.dtype)  # (2, H, n, d)
        if self.qk_norm:
            d = self.half_dim
            queries = F.rms_norm(queries, (d,)) / math.sqrt(d)  # (N, H, 2, d)
            keys = F.rms_norm(keys, (d,))  # (2, H, n, d)
        scores, slots = product_key_topk(queries, keys, self.topk)  # (N, H, K) both
        return slots, scores.softmax(dim=-1)

    def forward(self, x):
        slots, weights = self.search(x.reshape(-1, x.shape[-1]))  # (N, H, K) both
        # Heads read the same table and are summed, so they are just more reads: R = H*K.
        y = self.table.read(slots.flatten(1), weights.flatten(1))  # (N, D)
        y = y.view(*x.shape[:-1], self.table.dim).to(x.dtype)  # (..., D)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))  # (..., D)
        if self.out is not None:
            y = self.out(y)  # (..., C)
        return y

    # How a GPT makes, draws and counts this layer.

    @classmethod
    def check(cls, config):
        if config.mem_topk > config.mem_n_keys:
            raise ValueError(f"--mem-topk {config.mem_topk} > {config.mem_n_keys} half-keys: "
                             f"lower --mem-topk or raise --mem-n-keys")
        if config.key_dim() < 2 or config.key_dim() % 2:
            raise ValueError(f"--mem-key-dim {config.key_dim()} is not an even number >= 2: "
                             f"a key is two halves, set --mem-key-dim")

    @classmethod
    def make_table(cls, config, mesh=None):
        dtype = getattr(torch, config.mem_dtype)
        return MemoryTable(config.mem_n_keys, config.value_dim(), dtype, mesh)

    @classmethod
    def from_config(cls, config, block, table):
        return cls(config.n_embd, table, config.mem_heads, config.mem_topk, config.key_dim(),
                   gate=config.mem_gate, qk_norm=config.qk_norm)

    @classmethod
    def label(cls, config):
        name = "Memory+" if config.mem_gate and config.qk_norm else "Memory"
        return f"{name}, {config.mem_n_keys ** 2:,} slots"

    def init_weights(self, divisor):
        """The matrices. Half-keys stay as they were drawn."""
        draw_matrix(self.query.weight)
        if self.gate is not None:
            draw_matrix(self.gate.weight)
        if self.out is not None:
            draw_matrix(self.out.weight, divisor)

    def param_counts(self):
        half_keys = self.half_keys.numel()
        return dict(dense=super().param_counts()["dense"] - half_keys, half_keys=half_keys)

    def parameter_groups(self):
        groups = super().parameter_groups()
        return [groups[0], ([self.half_keys], False, "half_key_lr")]


# ---- the optimizer of the table


class RowAdam(torch.optim.Optimizer):
    """Adam for memory tables, without momentum and with one number per row: only read rows move.

        v <- beta2 * v + (1 - beta2) * mean over D of g^2                   v (S,)
        values <- values - lr * g / (sqrt(v / (1 - beta2^t)) + eps)         where g is not 0

    A row-wise second moment is usual for embedding tables (row-wise Adagrad, arXiv 1906.00091).
    Training takes 8 bytes a value in float32, 6 in bfloat16: the value and its float32 gradient.

    Make it after the model is loaded, moved and converted.

    tables: list of MemoryTable, in float32 or bfloat16, which is rounded randomly. clip: largest
    norm of the gradient, of all tables together. step() averages the gradient over the replicas of
    a mesh and clips it, since the norm needs all slices. Afterwards, `norm` is the norm before
    clipping. If a forward has fewer lookups than the table has rows, a step on a CPU, not compiled,
    costs the rows that were read, and one pass over v: see RowGradient. Else it goes over all.
    """

    def __init__(self, tables, lr, beta2=0.99, eps=1e-8, clip=math.inf):
        # Each once, and it may be a generator.
        tables = [] if isinstance(tables, MemoryTable) else list(dict.fromkeys(tables))
        if not tables or not all(isinstance(table, MemoryTable) for table in tables):
            raise ValueError("RowAdam trains a list of MemoryTables, such as [model.table]: give "
                             "other parameters to another optimizer")
        if not (lr >= 0 and 0 <= beta2 < 1 and eps >= 0 and clip > 0):
            raise ValueError(f"lr {lr}, beta2 {beta2}, eps {eps}, clip {clip}: lr and eps must be "
                             f"at least 0, beta2 from 0 to below 1, clip above 0")
        super().__init__([table.values for table in tables], dict(lr=lr, beta2=beta2, eps=eps))
        self.tables = tables
        self.clip = clip
        self.norm = None
        for table in self.tables:
            p = table.values  # (S, D/P)
            if p.dtype not in TRAINABLE or isinstance(p, DTensor):
                raise ValueError(f"RowAdam trains no table in {p.dtype} as a {type(p).__name__}: "
                                 f"make it in float32 or bfloat16, and share it out with a mesh")
            attach(table)
            v = torch.zeros(len(p), dtype=p.grad_dtype, device=p.device)  # (S,)
            self.state[p] = dict(step=0, v=v)

    def __getstate__(self):
        return dict(super().__getstate__(), tables=self.tables, clip=self.clip, norm=self.norm)

    def __setstate__(self, state):
        super().__setstate__(state)
        for table in self.tables:
            attach(table)

    def add_param_group(self, param_group):
        """Only for __init__. Raises ValueError afterwards."""
        if self.param_groups:
            raise ValueError("RowAdam has one group of tables: make another RowAdam for more")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """Update the tables that have a gradient. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [table for table in self.tables if table.values.grad is not None]
        if not tables:
            return loss
        # Of each table: rows, their gradient, the sums of its squares.
        found = [self.read_rows(table) for table in tables]
        self.norm = sum(squares.sum() for *_, squares in found).sqrt().float()  # ()
        scale = torch.ones_like(self.norm)  # (), also for a gradient that is infinite
        if self.clip < math.inf:
            scale = (self.clip / (self.norm + 1e-6)).clamp(max=1.0)
        for table, (rows, g, squares) in zip(tables, found):
            self.update(table, rows, g, squares, scale)
        return loss

    def fits(self, p):
        """Whether the state has the size, dtype and device of these values (S, D/P)."""
        if p not in self.state or p.dtype not in TRAINABLE:
            return False
        v = self.state[p]["v"]  # (S,)
        dtype = torch.promote_types(p.dtype, torch.float32)
        return (v.shape, v.dtype, v.device) == (p.shape[:1], dtype, p.device)

    def read_rows(self, table):
        """-> rows (U,), or None for all; their gradient g (U, D/P); sums of g^2 over all D (U,)."""
        p = table.values
        if not self.fits(p):
            raise ValueError("the table is not what it was when RowAdam was made or loaded: make "
                             "RowAdam after loading, moving or converting the model")
        if p.grad.is_sparse:  # that of torch.autograd.grad
            p.grad = p.grad.to_dense()
        if table.mesh is not None:
            dist.all_reduce(p.grad, group=table.mesh.get_group("replica"))
            p.grad.div_(table.mesh.size())  # the loss is the mean over the tokens of all ranks
        rows = ROW_GRADIENTS[p].rows_of(p.grad)
        g = take(p.grad, rows)  # (U, D/P)
        squares = torch.linalg.vector_norm(g, dim=1).double().square()  # (U,)
        if table.parts > 1:
            dist.all_reduce(squares, group=table.group)
        return rows, g, squares

    def update(self, table, rows, g, squares, scale):
        """Move the rows by the gradient scale * g. squares (U,): the sums of g^2 over all D."""
        p = table.values.detach()  # has no grad: torch.compile refuses one of another dtype
        group = self.param_groups[0]
        state = self.state[table.values]
        state["step"] += 1
        beta2 = group["beta2"]
        v = state["v"].mul_(beta2)  # (S,)
        add_rows(v, rows, squares.to(v.dtype), (1 - beta2) / table.dim * scale**2)
        root = (take(v, rows) / (1 - beta2 ** state["step"])).sqrt() + group["eps"]  # (U,)
        factor = (-group["lr"] * scale / root)[:, None]  # (U, 1)
        if p.dtype != torch.bfloat16:
            add_rows(p, rows, g, factor)
            return
        moved = take(p, rows)  # (U, D/P)
        add_rounded(moved, g, factor, *places(p, rows, table.dims, state["step"]))
        if rows is not None:
            p.index_copy_(0, rows, moved)

    def load_state_dict(self, state_dict):
        """As of every optimizer, but v stays in float32: torch would give it the table's dtype."""
        super().load_state_dict(state_dict)
        for table, saved in zip(self.tables, state_dict["state"].values()):
            p = table.values
            self.state[p]["v"] = saved["v"].to(p.device, p.grad_dtype, copy=True)


def attach(table):
    """Prepare the gradient of a table for RowAdam."""
    p = table.values  # (S, D/P)
    is_new = p not in ROW_GRADIENTS
    trains = p.requires_grad or (is_new and table.mesh is not None)  # a new slice is frozen
    p.requires_grad_(True)  # the hooks of RowGradient need it
    grad = p.grad
    p.grad = None  # torch changes the dtype of a gradient only while there is none
    p.grad_dtype = torch.promote_types(p.dtype, torch.float32)
    if grad is not None:
        p.grad = grad.to(p.grad_dtype)
    if is_new:
        ROW_GRADIENTS[p] = RowGradient(p)
    p.requires_grad_(trains)


class RowGradient:
    """Lets the gradient of some rows of a table cost what these rows cost.

    A sparse gradient is written into one dense buffer, which becomes values.grad; autograd adds
    later ones to it in place. zero_grad may set values.grad to None, but the buffer stays: before
    the next gradient is written, the rows that may be nonzero are cleared. rows: these (U,),
    sorted, or None: all. To keep a gradient beyond zero_grad, clone it.
    """

    def __init__(self, values):
        self.buffer = None  # (S, D/P)
        self.version = None  # how often the buffer had been written to when autograd was done
        self.rows = torch.empty(0, dtype=torch.int64)
        values.register_hook(self.note_rows)
        values.register_post_accumulate_grad_hook(self.make_dense)

    def note_rows(self, grad):
        """autograd calls this with each gradient, before it adds that to values.grad."""
        if not grad.is_sparse:
            self.rows = None
            return grad
        if self.buffer is not None and self.buffer._version != self.version:
            self.rows = None  # somebody has written to it, maybe to other rows
        grad = grad.coalesce()
        if self.rows is not None:
            self.rows = torch.cat((self.rows, grad.indices()[0])).unique()
        return grad

    def make_dense(self, values):
        """autograd calls this afterwards. values.grad is sparse if there was none before."""
        if not values.grad.is_sparse:
            self.version = values.grad._version
            return
        grad = values.grad.coalesce()
        if self.buffer is None:
            self.buffer = torch.zeros_like(values, dtype=grad.dtype)  # (S, D/P)
        elif (rows := self.rows_of(self.buffer)) is None:
            self.buffer.zero_()
        else:
            self.buffer.index_fill_(0, rows, 0)
        self.rows = grad.indices()[0]
        values.grad = self.buffer.add_(grad)
        self.version = self.buffer._version

    def rows_of(self, grad):
        """The rows of a gradient that may be nonzero: (U,) sorted, or None: all."""
        if grad is not self.buffer or self.rows is None or dist.is_initialized():
            return None  # other ranks have other rows
        if grad._version != self.version:
            return None  # somebody has written to it, maybe to other rows
        U = len(self.rows)
        if U == 0 or U == len(grad):
            return None
        # The first row that nobody has read. It is zero, unless somebody has written to all rows
        # of grad.data, which the version does not show.
        is_gap = self.rows != torch.arange(U)
        unread = int(is_gap.int().argmax()) if is_gap.any() else U
        return None if grad[unread].any() else self.rows


def add_rows(x, rows, change, factor):
    """Add change * factor to some rows of x (S, ...) in place, or to all if rows is None."""
    if rows is None:
        x.addcmul_(change, factor)
    else:
        x.index_add_(0, rows, change * factor)


def take(x, rows):
    """Some rows of x (S, ...), or None: x itself."""
    return x if rows is None else x.index_select(0, rows)


# The tables that RowAdam trains: values, and their RowGradient.
ROW_GRADIENTS = torch.utils.weak.WeakTensorKeyDictionary()


def places(values, rows, dims, step):
    """What the rounding of some rows, or of all if rows is None, depends on -> row, column, step.

    Tensors: (U, 1), (D/P,), (). A table in slices is rounded as the whole one.
    """
    row = take(torch.arange(len(values), device=values.device), rows)[:, None]  # (U, 1)
    column = torch.arange(dims.start, dims.stop, device=values.device)  # (D/P,)
    return row, column, torch.full((), step, device=values.device)


def add_rounded(values, g, factor, row, column, step):
    """values += g * factor in bfloat16, in place. values, g (U, D/P), factor (U, 1); see places."""
    if uses_triton(values.device):  # then torch.compile makes one pass of it
        compiled_sum()(values, g, factor, row, column, step)
        return
    for some in zip(*(x.split(4096) for x in (values, g, factor, row))):
        add_rounded_sum(*some, column, step)


def add_rounded_sum(values, g, factor, row, column, step):
    new = values.float() + g * factor  # (U, D/P)
    values.copy_(round_randomly(new, noise(row, column, step)))


@functools.cache
def compiled_sum():
    return torch.compile(add_rounded_sum)


def noise(row, column, step):
    """16 random bits for each place, from step and place alone: (U, 1), (D/P,), () -> (U, D/P)."""
    return scramble(scramble(scramble(step) ^ row) ^ column) & 0xFFFF


def scramble(x):
    """A hash of integers: int64, of which the lower 32 bits count -> int64 in [0, 2^32).

    Neighbours get unrelated results, so that it serves as noise that depends on place and step
    alone. The factor is odd and small enough for the product to fit in 64 bits.
    """
    for _ in range(2):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * 0x45D9F3B
    x = x & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_randomly(x, noise):
    """float32 -> bfloat16, up or down with the probabilities that keep the mean.

    bfloat16 is float32 without its lower 16 bits. Adding 16 random bits before cutting those off
    rounds up in proportion to what is cut off. Rounded to the nearest instead, an update below
    1/512 of a number would be lost every time. noise: integers in [0, 2^16). NaN stays NaN.
    """
    bits = x.view(torch.int32) + noise.int()
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.nan, rounded)


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
        every = x.new_empty(group.size() * x.shape[0], x.shape[1])  # (P*N, R)
        all_gather(every, x.contiguous(), group=group)
        # A view: for the buffer itself, torch 2.11 compiles a backward that gives no gradients.
        return every.view_as(every)

    @staticmethod
    def backward(ctx, grad):
        P = ctx.group.size()
        mine = torch.empty_like(grad)  # (P*N, R)
        dist.all_to_all_single(mine, grad.contiguous(), group=ctx.group)
        return mine.view(P, grad.shape[0] // P, -1).sum(0), None  # (N, R)


class Exchange(torch.autograd.Function):
    """From D/P dims of everybody's tokens to all dims of this rank's: y (P*N, D/P) -> (N, D).

    y holds this rank's dims of the outputs of every rank's tokens, N of each rank. The result holds
    the whole outputs of this rank's own tokens. Backward is the reverse exchange.
    """

    @staticmethod
    def forward(ctx, y, group):
        ctx.group = group
        P = group.size()
        N = y.shape[0] // P
        slices = torch.empty_like(y)  # (P*N, D/P)
        dist.all_to_all_single(slices, y.contiguous(), group=group)
        return slices.view(P, N, -1).transpose(0, 1).reshape(N, -1)  # (N, D)

    @staticmethod
    def backward(ctx, grad):
        P = ctx.group.size()
        N, D = grad.shape
        slices = grad.view(N, P, D // P).transpose(0, 1).reshape(P * N, D // P)  # (P*N, D/P)
        mine = torch.empty_like(slices)  # (P*N, D/P)
        dist.all_to_all_single(mine, slices.contiguous(), group=ctx.group)
        return mine, None
