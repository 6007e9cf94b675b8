"""
A GPT whose MLPs can be replaced by memory layers.

It has nanoGPT's parts: layer norms, no biases, tied embeddings, flash attention through
scaled_dot_product_attention. Only the positions are newer: they are rotary. `ffn` in the config
says what stands in the place of the MLP in the blocks of `mem_layers`.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size=512, ffn="memory", mem_layers=(1,)))
    print(model.param_counts(), model.flops_per_token())

B, T, C batch, tokens, channels · nh attention heads of size hs, C = nh*hs · V vocabulary
S, D slots and dims of the memory table · P ranks that share it, each with D/P dims of every slot
"""
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from memory import (PEER, HashedMemory, MemoryTable, MixtureOfExperts, ProductKeyMemory,
                    UltraMem)


# ---- settings

def setting(default, help):
    """A field of a dataclass of settings; train.py shows `help` for --help."""
    return field(default=default, metadata={"help": help})


@dataclass
class GPTConfig:
    vocab_size: int = setting(50304, "tokens in the vocabulary")
    block_size: int = setting(1024, "longest context, in tokens")
    n_layer: int = setting(12, "blocks")
    n_head: int = setting(12, "attention heads")
    n_embd: int = setting(768, "width C")
    dropout: float = setting(0.0, "on attention, MLP and embeddings")
    ffn: str = setting("dense", "dense | memory | ultramem | hash | peer | moe: what replaces "
                       "the MLP in the blocks of mem_layers")
    mem_layers: tuple = setting((4, 6, 8), "0-based blocks with a memory layer, as 4,6,8")
    mem_n_keys: int = setting(256, "n half-keys per side: the table has n*n slots")
    mem_heads: int = setting(4, "H queries per token")
    mem_topk: int = setting(32, "K slots read per head")
    mem_key_dim: int = setting(0, "full key dim, two halves; 0: n_embd / 2")
    mem_value_dim: int = setting(0, "D; 0: n_embd")
    mem_gate: bool = setting(True, "out = W2 (y * silu(W1 x)), Memory+")
    mem_gate_open: bool = setting(False, "a gate with a bias that starts at 1: silu(W1 x + b)")
    mem_share: bool = setting(True, "one table for all memory layers")
    mem_dtype: str = setting("float32", "float32 | bfloat16: the table's values; "
                             "to train one takes 16 or 10 bytes a value")
    qk_norm: bool = setting(True, "RMS-norm on query halves and half-keys")
    mem_balance: float = setting(0.0, "weight of a loss that keeps half-keys equally liked, "
                                 "for a table of which little is used; try 0.01")
    moe_experts: int = setting(0, "E experts, with as many weights in all as the memory layer's "
                               "table; 0: as many as mem_n_keys, at least 128")
    moe_topk: int = setting(0, "K experts per token; 0: as many as the MLP's FLOPs allow")
    moe_balance: float = setting(0.01, "weight of the loss that keeps experts equally busy")

    def check(self):
        """Raise ValueError, in one line, for sizes that cannot work. Returns self."""
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            check_positive(self, name)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} is not in [0, 1): give a fraction")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"--n-embd {self.n_embd} is not a multiple of 2 * --n-head = "
                             f"{2 * self.n_head}: heads must have an even size, change one of them")
        if self.ffn not in ("dense", *RIVALS):
            raise ValueError(f"--ffn {self.ffn} is unknown: choose dense, {', '.join(RIVALS)}")
        if self.ffn != "dense":
            self.check_memory()
        if self.ffn == "moe":
            self.check_experts()
        if self.ffn == "ultramem":
            self.check_ultramem()
        return self

    def check_memory(self):
        """The same for the settings of the memory layers."""
        for name in ("mem_n_keys", "mem_heads", "mem_topk"):
            check_positive(self, name)
        if self.mem_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--mem-dtype {self.mem_dtype} is unknown: "
                             f"choose float32 or bfloat16")
        if self.mem_value_dim < 0:
            raise ValueError(f"--mem-value-dim {self.mem_value_dim} < 0: "
                             f"give a positive number, or 0 for n_embd")
        if not self.mem_layers:
            raise ValueError("--mem-layers is empty: name at least one block, or use --ffn dense")
        if len(set(self.mem_layers)) < len(self.mem_layers):
            raise ValueError(f"--mem-layers {self.mem_layers} names a block twice: name each once")
        for layer in self.mem_layers:
            if not 0 <= layer < self.n_layer:
                raise ValueError(f"--mem-layers {layer} is not in 0..{self.n_layer - 1}: "
                                 f"choose blocks that exist or raise --n-layer (now "
                                 f"{self.n_layer})")
        if self.mem_topk > self.mem_n_keys:
            raise ValueError(f"--mem-topk {self.mem_topk} > {self.mem_n_keys} half-keys: "
                             f"lower --mem-topk or raise --mem-n-keys")
        if self.key_dim() < 2 or self.key_dim() % 2:
            raise ValueError(f"--mem-key-dim {self.key_dim()} is not an even number >= 2: "
                             f"a key is two halves, set --mem-key-dim")
        if self.mem_gate_open and not (self.mem_gate and self.ffn == "memory"):
            raise ValueError("--mem-gate-open is for --ffn memory with --mem-gate: leave it out")
        if not self.mem_balance >= 0:
            raise ValueError(f"--mem-balance {self.mem_balance} is not at least 0: raise it")
        if self.mem_balance and self.ffn != "memory":
            raise ValueError(f"--mem-balance {self.mem_balance} is for --ffn memory: leave it out")
        if self.mem_n_keys**2 >= 2**31:
            raise ValueError(f"--mem-n-keys {self.mem_n_keys} makes {self.mem_n_keys**2} slots, "
                             f"the limit is 2^31 - 1: lower --mem-n-keys")
        is_plain = self.value_dim() == self.n_embd and self.mem_dtype == "float32"
        if self.ffn in ("peer", "moe", "ultramem") and not is_plain:
            raise ValueError(f"--ffn {self.ffn} has no --mem-value-dim and no --mem-dtype "
                             f"bfloat16: leave them out")

    def check_experts(self):
        """The same for the settings of the mixture of experts."""
        E = self.experts()
        if self.moe_experts < 0 or self.expert_hidden() < 1:
            raise ValueError(f"--moe-experts {E} do not share the weights of "
                             f"{self.mem_n_keys**2} slots: choose 1 to {self.mem_n_keys**2 // 2}")
        if not 1 <= self.experts_per_token() <= E:
            raise ValueError(f"--moe-topk {self.experts_per_token()}: {E} experts of "
                             f"{self.expert_hidden()} hidden units cannot be matched with the "
                             f"MLP's FLOPs: change --moe-experts or --mem-n-keys, or set "
                             f"--moe-topk to 1..{E}")
        if not self.moe_balance >= 0:
            raise ValueError(f"--moe-balance {self.moe_balance} is not at least 0: raise it")

    def check_ultramem(self):
        """The same for the sizes of UltraMem."""
        n = self.ultramem_n_keys()
        if n < 1:
            raise ValueError(f"--ffn ultramem: its matrices alone are as large as a table of "
                             f"--mem-n-keys {self.mem_n_keys}: raise it")
        if self.ultramem_topk() > 2 * n:
            raise ValueError(f"--mem-topk {self.mem_topk}: UltraMem reads twice as many slots per "
                             f"head, {self.ultramem_topk()}, and has only {2 * n} half-keys: lower "
                             f"--mem-topk or raise --mem-n-keys")

    # Each rival has as many parameters as the memory layer, and about as many FLOPs as the MLP.

    def peer_n_keys(self):
        """An expert of PEER is two vectors, so there are half as many as there are slots."""
        return max(round(self.mem_n_keys / 2**0.5), 1)

    def peer_topk(self):
        return max(self.mem_topk // 2, 1)

    def ultramem_n_keys(self):
        """A value of UltraMem has C/2 dims, so there are twice as many as there are slots.

        Its 4 matrices have as many weights as 4C values. So have the two of the gate, W1 and W2;
        where the memory layer has no gate, there are 4C fewer values.
        """
        slots = 2 * self.mem_n_keys**2
        if not self.mem_gate:
            slots -= UltraMem.WAYS * self.n_embd
        return round(max(slots, 0) ** 0.5)

    def ultramem_heads(self):
        """A head has two sets of half-keys, each almost three times as many as the memory layer."""
        return max(self.mem_heads // 4, 1)

    def ultramem_topk(self):
        """Not more: the search scores K * K pairs."""
        return 2 * self.mem_topk

    def experts(self):
        """E: many small experts, but not more than the smallest of tables has weights for."""
        n = self.mem_n_keys
        return self.moe_experts or min(max(n, 128), 4 * n)

    def expert_hidden(self):
        """h: the weights of all experts, E * 2 * C * h, are as many as the table's, S * C."""
        return self.mem_n_keys**2 // (2 * self.experts())

    def experts_per_token(self):
        """K: router and experts, C * E + K * 2 * C * h, are no more than the MLP's 8 * C * C."""
        budget = 8 * self.n_embd - self.experts()
        return self.moe_topk or budget // (2 * self.expert_hidden())

    def key_dim(self):
        return self.mem_key_dim or self.n_embd // 2

    def value_dim(self):
        return self.mem_value_dim or self.n_embd


# What --ffn can put in the place of the MLP.
RIVALS = ("memory", "ultramem", "hash", "peer", "moe")
# Those that read a table, and of these, those whose table can be cut into slices over ranks.
READ_A_TABLE = ("memory", "ultramem", "hash", "peer")
CAN_BE_SLICED = ("memory", "hash")


def check_positive(config, name):
    value = getattr(config, name)
    if value < 1:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} {value} < 1: give a positive number")


# ---- the parts of a block

def rotary(hs, positions, device):
    """Rotary positions (RoPE, arXiv 2104.09864): the cos and sin that rotate() takes.

    Both are (positions, hs) float32: of each angle twice, and once with -sin.
    """
    freq = 10000 ** (-torch.arange(0, hs, 2, device=device).float() / hs)  # (hs/2,)
    angle = torch.arange(positions, device=device).float()[:, None] * freq  # (positions, hs/2)
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x, cos, sin):
    """Turn each pair (a, b) = (x[i], x[i + hs/2]) by its angle. x (..., T, hs), cos, sin (T, hs).

    The result is (a cos - b sin, b cos + a sin).
    """
    swapped = x.roll(x.size(-1) // 2, dims=-1)  # (..., T, hs): the b, then the a
    return (x * cos + swapped * sin).type_as(x)  # (..., T, hs)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        """x (B, T, C), rope: cos, sin (T, hs), cache: (k, v) of the tokens before, or None.

        Returns (B, T, C) and the cache with these tokens, (B, nh, tokens, hs) both.
        """
        B, T, C = x.size()
        qk, v = self.qkv(x).split((2 * C, C), dim=2)  # (B, T, 2C), (B, T, C)
        qk = qk.view(B, T, 2 * self.n_head, C // self.n_head).transpose(1, 2)  # (B, 2nh, T, hs)
        q, k = rotate(qk, *rope).chunk(2, dim=1)  # (B, nh, T, hs) both
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k = torch.cat((cache[0], k), dim=2)  # (B, nh, past + T, hs)
            v = torch.cat((cache[1], v), dim=2)  # (B, nh, past + T, hs)
        # With a cache there is one new token, which may look at everything: it needs no mask.
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.proj(y), (k, v)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))  # (B, T, C)


def make_ffn(config, layer, table):
    """What follows attention in block `layer`: an MLP, or in the blocks of mem_layers a rival.

    A new kind of layer is added here; it needs a name in RIVALS, and if it reads a table, that is
    made by make_table. Its forward takes x (B, T, C) and returns (B, T, C).
    """
    if config.ffn == "dense" or layer not in config.mem_layers:
        return MLP(config)
    C = config.n_embd
    H = config.mem_heads
    if config.ffn == "moe":
        return MixtureOfExperts(C, config.experts(), config.expert_hidden(),
                                config.experts_per_token())
    if config.ffn == "hash":
        return HashedMemory(C, table, reads=H * config.mem_topk, seed=layer)
    if config.ffn == "ultramem":
        return UltraMem(C, table, config.ultramem_heads(), config.ultramem_topk(),
                        config.key_dim())
    if config.ffn == "peer":
        return PEER(C, table, H, config.peer_topk(), config.key_dim(), config.qk_norm)
    return ProductKeyMemory(C, table, heads=H, topk=config.mem_topk, key_dim=config.key_dim(),
                            gate=config.mem_gate, qk_norm=config.qk_norm,
                            gate_open=config.mem_gate_open,
                            balanced=config.mem_balance > 0)


def make_table(config, mesh):
    """The table that a layer of this kind reads."""
    if config.ffn == "peer":
        reads = config.mem_heads * config.peer_topk()
        return MemoryTable(config.peer_n_keys(), 2 * config.n_embd,
                           std=PEER.std(config.n_embd, reads))
    if config.ffn == "ultramem":
        return MemoryTable(config.ultramem_n_keys(), config.n_embd // 2)
    dtype = getattr(torch, config.mem_dtype)
    return MemoryTable(config.mem_n_keys, config.value_dim(), dtype, mesh)


class Block(nn.Module):
    def __init__(self, config, layer, table):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=False)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = Attention(config)
        self.ffn = make_ffn(config, layer, table)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope, tokens, cache=None):
        """tokens (B, T + 2): those of x and the two before, for a layer that needs them."""
        y, cache = self.attn(self.norm1(x), rope, cache)  # (B, T, C)
        x = x + self.drop(y)  # (B, T, C)
        h = self.norm2(x)  # (B, T, C)
        y = self.ffn(h, tokens) if isinstance(self.ffn, HashedMemory) else self.ffn(h)
        x = x + self.drop(y)  # (B, T, C)
        return x, cache


# ---- the GPT

class GPT(nn.Module):
    def __init__(self, config, mesh=None):
        """mesh: of several ranks, see memory.MemoryTable. Raises ValueError as config.check."""
        super().__init__()
        self.config = config.check()
        C = config.n_embd
        self.tables = nn.ModuleList()
        table_of = {}  # block number: the table that its memory layer reads
        memory_blocks = config.mem_layers if config.ffn in READ_A_TABLE else ()
        for layer in memory_blocks:
            if not config.mem_share or not self.tables:
                self.tables.append(make_table(config, mesh))
            table_of[layer] = self.tables[-1]
        self.wte = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(
            Block(config, i, table_of.get(i)) for i in range(config.n_layer))
        self.norm = nn.LayerNorm(C, bias=False)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight  # tied (V, C)
        cos, sin = rotary(C // config.n_head, config.block_size, "cpu")  # (block_size, hs) both
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The embedding and all matrices.

        embedding     normal, std 0.02
        matrices      normal, std 1/sqrt(inputs)
        Those that write to the residual stream, experts too, are divided by sqrt(2 * n_layer), as
        in nanoGPT. Norms are 1; values, half-keys and experts are as memory.py draws them, and so
        is an open gate.
        """
        as_drawn = ("values", "gate.weight") if self.config.mem_gate_open else ("values",)
        for name, p in self.named_parameters():
            if name.startswith("wte"):  # the head too: a tied weight is listed once
                p.normal_(std=0.02)  # (V, C)
            elif p.dim() == 2 and not name.endswith(as_drawn):
                p.normal_(std=p.shape[1] ** -0.5)
            if name.endswith(("proj.weight", "out.weight", "experts_out")):
                p.div_((2 * self.config.n_layer) ** 0.5)

    def memories(self):
        """The layers that stand in the place of an MLP, as (block number, layer)."""
        pairs = enumerate(block.ffn for block in self.blocks)
        return [(i, ffn) for i, ffn in pairs if not isinstance(ffn, MLP)]

    def table_of(self, layer):
        """Which of self.tables a layer of memories() reads, as a number."""
        return [table is layer.tables[0] for table in self.tables].index(True)

    def forward(self, idx, targets=None, reduction="mean", caches=None, before=None):
        """idx (B, T) int64, targets (B, T) int64 or None -> (logits, loss).

        With targets: logits (B, T, V), which carry no gradient, and the mean cross-entropy in nats
        (reduction="none": that of each token, (B, T)). Without: logits of the last position only,
        (B, 1, V), and None. caches: a list with (k, v) or None for each block, read and refilled in
        place, for generation; once they are filled, T = 1. before: the two tokens that come before
        idx, (B, 2); those in the caches are not seen otherwise. Raises ValueError if the context is
        longer than block_size. In training the balance of layers that keep one is added.
        """
        B, T = idx.size()
        past = 0
        if caches is not None and caches[0] is not None:
            past = caches[0][0].size(2)
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens > block_size {self.config.block_size}: "
                             f"shorten the context")
        if past and T > 1:  # there is no mask for them
            raise ValueError(f"{T} tokens at once with a filled cache: give one at a time")
        rope = self.cos[past:past + T], self.sin[past:past + T]  # (T, hs) both
        if before is None:
            before = idx.new_full((B, 2), -1)  # (B, 2): nothing
        tokens = torch.cat((before, idx), dim=1)  # (B, T + 2)
        x = F.dropout(self.wte(idx), self.config.dropout, self.training)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x, cache = block(x, rope, tokens, None if caches is None else caches[i])  # (B, T, C)
            if caches is not None:
                caches[i] = cache
        x = self.norm(x)  # (B, T, C)
        if targets is None:
            return self.head(x[:, -1:]), None  # (B, 1, V)
        logits = self.head(x)  # (B, T, V)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(),
                               reduction=reduction)
        if reduction == "none":
            loss = loss.view(B, T)
        weight = {"moe": self.config.moe_balance, "memory": self.config.mem_balance}
        if self.training and weight.get(self.config.ffn):
            balance = torch.stack([layer.balance for _, layer in self.memories()])
            loss = loss + weight[self.config.ffn] * balance.mean()
        return logits.detach(), loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 generator=None, use_cache=True):
        """Yield the next token of each row, (B, 1) int64, max_new_tokens times.

        idx (B, T) int64, any T >= 1. temperature 0 takes the likeliest token. When the context is
        full, its last half is kept and read again. A cache changes the time, not the tokens.
        """
        context = idx[:, -self.config.block_size:]  # (B, <= block_size)
        caches = None
        for _ in range(max_new_tokens):
            if context.size(1) > self.config.block_size:
                half = max(self.config.block_size // 2, 1)
                context = context[:, -half:]  # (B, half)
                caches = None
            if caches is None:
                new = context  # (B, T)
                caches = [None] * self.config.n_layer  # without use_cache it stays like this
            before = F.pad(context, (2, 0), value=-1)[:, -new.size(1) - 2:-new.size(1)]  # (B, 2)
            logits, _ = self(new, caches=caches if use_cache else None, before=before)  # (B, 1, V)
            token = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
            context = torch.cat((context, token), dim=1)  # (B, T + 1)
            new = token if use_cache else context
            yield token

    @torch.no_grad()
    def answer(self, windows, spans):
        """Does the model know how these sentences end?

        windows (W, T) tokens as numpy integers, spans (W, 2) = [start, end) of the answer in each,
        start >= 1. Below, b windows are read at a time.
        Returns right (W,) bool: every token of the answer is the likeliest one after what stands
        before it; and nats (W,) float64: the answer's cross-entropy.
        """
        was_training = self.training
        self.eval()
        device = self.wte.weight.device
        right = [torch.empty(0, dtype=torch.bool)]  # so that no windows give an empty result
        nats = [torch.empty(0)]
        for i in range(0, len(windows), 1024):
            w = torch.from_numpy(windows[i:i + 1024].astype("int64")).to(device)  # (b, T)
            span = torch.from_numpy(spans[i:i + 1024].astype("int64")).to(device)  # (b, 2)
            place = torch.arange(1, w.shape[1], device=device)  # (T-1,)
            inside = (place >= span[:, :1]) & (place < span[:, 1:])  # (b, T-1)
            logits, loss = self(w[:, :-1], w[:, 1:], reduction="none")  # (b, T-1, V), (b, T-1)
            correct = logits.argmax(-1) == w[:, 1:]  # (b, T-1)
            right.append((correct | ~inside).all(dim=1).cpu())
            nats.append((loss * inside).sum(dim=1).cpu())
        self.train(was_training)
        return torch.cat(right).numpy(), torch.cat(nats).double().numpy()

    @torch.no_grad()
    def memory_reads(self, idx):
        """What each layer reads from its table: idx (B, T) -> list of (block, slots, weights).

        slots and weights are (B, T, R). Of a layer with heads, the R = H * K reads of a token are
        those of its first head, then of the next.
        """
        was_training = self.training
        self.eval()
        for table in self.tables:
            table.record = []
        self(idx)
        found = []
        for block, layer in self.memories() if self.tables else []:
            table, = layer.tables
            slots, weights = table.record.pop(0)  # (B*T, R) both
            found.append((block, slots.view(*idx.shape, -1), weights.view(*idx.shape, -1)))
        for table in self.tables:
            table.record = None
        self.train(was_training)
        return found

    def param_counts(self):
        """Parameters by what they do: embedding, dense, half_keys, values, experts, and two sums.

        total: of all these. active: what one token uses, that is all but the rows of the tables
        that it does not read, and the experts that it does not ask. experts: only if there are any.
        """
        counts = dict.fromkeys(("embedding", "dense", "half_keys", "values"), 0)
        for name, p in self.named_parameters():
            if name.startswith("wte"):
                counts["embedding"] += p.numel()
            elif name.endswith("half_keys"):
                counts["half_keys"] += p.numel()
            elif name.endswith("values"):
                counts["values"] += p.numel() * self.tables[0].parts  # p holds one rank's dims
            elif name.endswith(("experts_in", "experts_out")):
                counts["experts"] = counts.get("experts", 0) + p.numel()
            else:
                counts["dense"] += p.numel()
        counts["total"] = sum(counts.values())
        read = min(self.numbers_read(), counts["values"])  # of a small table the same rows again
        counts["active"] = counts["total"] - counts["values"] + read
        if "experts" in counts:
            counts["active"] += self.numbers_asked() - counts["experts"]
        return counts

    def numbers_read(self):
        """Numbers that a token reads from the tables: R rows of D, for each memory layer."""
        layers = self.memories() if self.tables else []
        return sum(layer.reads * layer.tables[0].dim for _, layer in layers)

    def numbers_asked(self):
        """Weights of experts that a token is multiplied with: K * 2*C*h, for each layer."""
        if self.config.ffn != "moe":
            return 0
        c = self.config
        return len(c.mem_layers) * c.experts_per_token() * 2 * c.n_embd * c.expert_hidden()

    def flops_per_token(self):
        """FLOPs to train on one token, forward and backward.

        6 for each weight of a matrix that the token is multiplied with, half-keys and the tied head
        included; the embedding is a lookup. 12 * n_layer * T * C for attention (PaLM, appendix B).
        6 for each number that is read from a table, however large the table is, and for each weight
        of an expert that is asked. What a search does with the scores is not counted: sorting,
        sums of half-scores, UltraMem's grid of K * K pairs.
        """
        c = self.config
        matrices = 0
        for name, p in self.named_parameters():
            if p.dim() == 2 and not name.endswith("values"):
                matrices += p.numel()
        multiplied = matrices + self.param_counts()["half_keys"] + self.numbers_read()
        multiplied += self.numbers_asked()
        return 6 * multiplied + 12 * c.n_layer * c.block_size * c.n_embd


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draw a token for each row: logits (B, V) float32 -> (B, 1) int64.

    Logits are divided by the temperature (0: the likeliest token is taken). Then the draw is from
    the top_k likeliest tokens, and among those from the smallest set that has probability top_p
    (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    logits = logits / temperature  # (B, V)
    if top_k:
        best = logits.topk(min(top_k, logits.size(-1))).values  # (B, top_k)
        logits = logits.masked_fill(logits < best[:, -1:], float("-inf"))
    if top_p and top_p < 1:
        ranked, order = logits.sort(descending=True)  # (B, V) both
        probability = ranked.softmax(-1)  # (B, V)
        before = probability.cumsum(-1) - probability  # (B, V): of all likelier tokens
        cut = before >= top_p  # (B, V), ranked
        cut = cut.scatter(1, order, cut)  # (B, V), back in the order of the vocabulary
        logits = logits.masked_fill(cut, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (B, 1)
