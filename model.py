"""
A GPT whose MLPs can be replaced by memory layers.

It has nanoGPT's parts: layer norms, no biases, tied embeddings, flash attention through
scaled_dot_product_attention. Two things are newer: positions are rotary, and matrices begin with
std 1/sqrt(inputs). `ffn` in the config says what replaces the MLP in the blocks of `mem_layers`.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size=512, ffn="memory", mem_layers=(1,)))
    print(model.param_counts(), model.flops_per_token())

B, T, C batch, tokens, channels · nh attention heads of size hs, C = nh*hs · V vocabulary
n half-keys per side, so n*n slots in a memory table · D dims of a slot
H heads of a memory layer · K slots read per head · R = H*K reads per token
"""
import pkgutil
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from memory import Layer, draw_matrix
from support.fields import check_limits, setting

# What can replace the MLP: the name for --ffn, then module and class (see memory.Layer). To add a
# kind of layer, write it into a file of its own and add a line here.
KINDS = {
    "dense": "model:MLP",
    "memory": "memory:ProductKeyMemory",
    "ultramem": "support.rivals:UltraMem",
    "hash": "support.rivals:HashedMemory",
    "peer": "support.rivals:PEER",
    "moe": "support.rivals:MixtureOfExperts",
}


def kind_of(config):
    """The class of the layers in the blocks of mem_layers. ValueError if --ffn is unknown."""
    if config.ffn not in KINDS:
        raise ValueError(f"--ffn {config.ffn} is unknown: choose {', '.join(KINDS)}")
    return pkgutil.resolve_name(KINDS[config.ffn])


# ---- settings

# n half-keys make n * n slots, which are counted in 32 bits.
MOST_HALF_KEYS = 46340


@dataclass
class GPTConfig:
    vocab_size: int = setting(50304, "tokens in the vocabulary", 1, 2**16)
    block_size: int = setting(1024, "longest context, in tokens", 1, 2**20)
    n_layer: int = setting(12, "blocks", 1, 1000)
    n_head: int = setting(12, "attention heads", 1, 1000)
    n_embd: int = setting(768, "width C", 1, 2**16)
    dropout: float = setting(0.0, "on attention, MLP and embeddings", 0, 0.999)
    ffn: str = setting("dense", f"{' | '.join(KINDS)}: what replaces the MLP in the blocks of "
                       "mem_layers")
    mem_layers: tuple = setting((4, 6, 8), "0-based blocks with a memory layer, as 4,6,8")
    mem_n_keys: int = setting(256, "n half-keys per side: the table has n*n slots",
                              1, MOST_HALF_KEYS)
    mem_heads: int = setting(4, "H queries per token", 1, 1000)
    mem_topk: int = setting(32, "K slots read per head", 1, MOST_HALF_KEYS)
    mem_key_dim: int = setting(0, "full key dim, two halves; 0: n_embd / 2", 0, 2**16)
    mem_value_dim: int = setting(0, "D; 0: n_embd", 0, 2**16)
    mem_gate: bool = setting(True, "out = W2 (y * silu(W1 x)), Memory+")
    mem_dtype: str = setting("float32", "float32 | bfloat16: the table's values; "
                             "RowAdam trains one in 8 or 6 bytes a value")
    qk_norm: bool = setting(True, "RMS-norm on query halves and half-keys")
    moe_experts: int = setting(0, "E experts, with as many weights in all as the memory layer's "
                               "table; 0: as many as mem_n_keys, at least 128", 0, 2**16)
    moe_topk: int = setting(0, "K experts per token; 0: as many as the MLP's FLOPs allow",
                            0, 2**16)
    moe_balance: float = setting(0.01, "weight of the loss that keeps experts equally busy",
                                 0, 1e9)

    def check(self):
        """Raise ValueError, in one line, for sizes that cannot work. Returns self."""
        check_limits(self)
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"--n-embd {self.n_embd} is not a multiple of 2 * --n-head = "
                             f"{2 * self.n_head}: heads must have an even size, change one of them")
        kind = kind_of(self)
        if kind is not MLP:
            self.check_blocks()
            kind.check(self)
        return self

    def check_blocks(self):
        """Raise ValueError for mem_layers that do not exist, and for an unknown mem_dtype."""
        if self.mem_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--mem-dtype {self.mem_dtype} is unknown: choose float32 or bfloat16")
        blocks = set(self.mem_layers)
        if not blocks:
            raise ValueError("--mem-layers is empty: name at least one block, or use --ffn dense")
        if len(blocks) < len(self.mem_layers):
            raise ValueError(f"--mem-layers {self.mem_layers} names a block twice: name each once")
        missing = blocks - set(range(self.n_layer))
        if missing:
            raise ValueError(f"--mem-layers {min(missing)} is not in 0..{self.n_layer - 1}: choose "
                             f"blocks that exist or raise --n-layer (now {self.n_layer})")

    def key_dim(self):
        return self.mem_key_dim or self.n_embd // 2

    def value_dim(self):
        return self.mem_value_dim or self.n_embd


# ---- the parts of a block

def rotary(hs, positions):
    """Rotary positions (RoPE, arXiv 2104.09864): the cos and sin that rotate() takes.

    Both are (positions, hs) float32: [cos, cos] and [-sin, sin], so that rotate() is a product and
    a sum.
    """
    freq = 10000 ** (-torch.arange(0, hs, 2, device="cpu").float() / hs)  # (hs/2,)
    angle = torch.arange(positions, device="cpu").float()[:, None] * freq  # (positions, hs/2)
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x, cos, sin):
    """Turn each pair (a, b) = (x[i], x[i + hs/2]) by its angle. x (..., T, hs), cos, sin (T, hs).

    The result is (a cos - b sin, b cos + a sin).
    """
    swapped = x.roll(x.size(-1) // 2, dims=-1)  # (..., T, hs): (b, a)
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

    def init_weights(self, divisor):
        draw_matrix(self.qkv.weight)
        draw_matrix(self.proj.weight, divisor)


class MLP(Layer):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))  # (B, T, C)

    @classmethod
    def from_config(cls, config, block, table):
        return cls(config)

    @classmethod
    def label(cls, config):
        return f"Dense, width {config.n_embd}"

    def init_weights(self, divisor):
        draw_matrix(self.fc.weight)
        draw_matrix(self.proj.weight, divisor)


class Block(nn.Module):
    def __init__(self, config, number, table):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=False)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = Attention(config)
        kind = kind_of(config) if number in config.mem_layers else MLP
        self.ffn = kind.from_config(config, number, table)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope, tokens, cache=None):
        """x (B, T, C) -> (B, T, C), and the cache. rope, cache: see Attention.

        tokens (B, T + 2): those of x and the two before, for a layer that wants them.
        """
        y, cache = self.attn(self.norm1(x), rope, cache)  # (B, T, C)
        x = x + self.drop(y)  # (B, T, C)
        h = self.norm2(x)  # (B, T, C)
        y = self.ffn(h, tokens) if self.ffn.wants_tokens else self.ffn(h)  # (B, T, C)
        x = x + self.drop(y)  # (B, T, C)
        return x, cache


# ---- the GPT

# Upper bounds for what is evaluated at a time: bytes of logits, and tokens.
LOGITS_BYTES = 2**26
TOKENS_AT_ONCE = 2**13


class GPT(nn.Module):
    def __init__(self, config, mesh=None):
        """mesh: of several ranks, see memory.MemoryTable. Raises ValueError as config.check."""
        super().__init__()
        self.config = config.check()
        C = config.n_embd
        # All memory layers read one table. None: this kind of layer has none.
        self.table = kind_of(config).make_table(config, mesh)
        self.wte = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(Block(config, i, self.table) for i in range(config.n_layer))
        self.norm = nn.LayerNorm(C, bias=False)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        self.register_buffer("cos", torch.empty(0, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty(0, dtype=torch.float32), persistent=False)
        self.fill_in()
        self.register_load_state_dict_post_hook(GPT.fill_in)
        self.init_weights()

    def fill_in(self, _=None):
        """Tie the head and make the positions, also after load_state_dict.

        ckpt.pt does not hold them, and a model that comes from the meta device has lost them.
        """
        self.head.weight = self.wte.weight  # tied (V, C)
        hs = self.config.n_embd // self.config.n_head
        cos, sin = rotary(hs, self.config.block_size)  # (block_size, hs) both
        self.cos = cos.to(self.wte.weight.device, self.cos.dtype)
        self.sin = sin.to(self.wte.weight.device, self.sin.dtype)

    @torch.no_grad()
    def init_weights(self):
        """The embedding, tied to the head, is normal with std 0.02. Layers draw their own weights.

        What writes to the residual stream is divided by sqrt(2 * n_layer), as in nanoGPT.
        """
        self.wte.weight.normal_(std=0.02)  # (V, C)
        divisor = (2 * self.config.n_layer) ** 0.5
        for block in self.blocks:
            block.attn.init_weights(divisor)
            block.ffn.init_weights(divisor)

    def memories(self):
        """The layers that replace an MLP, as (block number, layer)."""
        pairs = enumerate(block.ffn for block in self.blocks)
        return [(i, ffn) for i, ffn in pairs if not isinstance(ffn, MLP)]

    def forward(self, idx, targets=None, reduction="mean", caches=None, history=None):
        """idx (B, T) int64, targets (B, T) int64 or None -> (logits, loss).

        With targets: logits (B, T, V), which carry no gradient, and the mean cross-entropy in nats
        (reduction="none": that of each token, (B, T)). Without: logits of the last position only,
        (B, 1, V), and None. caches: a list with (k, v) or None for each block, read and refilled in
        place, for generation; once they are filled, T = 1. history: all tokens up to and including
        idx, (B, >= T), for a layer that wants tokens. Raises ValueError if the context is longer
        than block_size. In training, the weighted mean of the layers' balance losses is added.
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
        history = idx if history is None else history
        tokens = F.pad(history, (2, 0), value=-1)[:, -(T + 2):]  # (B, T + 2); -1: no token
        x = F.dropout(self.wte(idx), self.config.dropout, self.training)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x, cache = block(x, rope, tokens, None if caches is None else caches[i])  # (B, T, C)
            if caches is not None:
                caches[i] = cache
        x = self.norm(x)  # (B, T, C)
        balanced = [layer for _, layer in self.memories() if layer.balance_weight]
        balances = [layer.balance for layer in balanced]
        # A loss that stayed in its layer would keep its graph alive, and could not be copied.
        for _, layer in self.memories():
            layer.balance = None
        if targets is None:
            return self.head(x[:, -1:]), None  # (B, 1, V)
        logits = self.head(x)  # (B, T, V)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(),
                               reduction=reduction)
        if reduction == "none":
            loss = loss.view(B, T)
        if self.training and balanced:
            loss = loss + balanced[0].balance_weight * torch.stack(balances).mean()
        return logits.detach(), loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 generator=None):
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
                caches = [None] * self.config.n_layer  # refilled by the call below
            logits, _ = self(new, caches=caches, history=context)  # (B, 1, V)
            token = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
            context = torch.cat((context, token), dim=1)  # (B, T + 1)
            new = token
            yield token

    @torch.no_grad()
    def answer(self, windows, spans):
        """Does the model know how these sentences end?

        windows (W, T) tokens as numpy integers, spans (W, 2) = [start, end) of the answer in each,
        start >= 1.
        Returns right (W,) bool: every token of the answer is the likeliest one after what stands
        before it; and nats (W,): the answer's cross-entropy.
        """
        was_training = self.training
        self.eval()
        device = self.wte.weight.device
        right = [torch.empty(0, dtype=torch.bool)]  # so that no windows give an empty result
        nats = [torch.empty(0)]
        b = self.windows_at_once(windows.shape[1] - 1)  # so that their logits stay small
        for i in range(0, len(windows), b):
            w = torch.from_numpy(windows[i:i + b].astype("int64")).to(device)  # (b, T)
            span = torch.from_numpy(spans[i:i + b].astype("int64")).to(device)  # (b, 2)
            place = torch.arange(1, w.shape[1], device=device)  # (T-1,)
            inside = (place >= span[:, :1]) & (place < span[:, 1:])  # (b, T-1)
            logits, loss = self(w[:, :-1], w[:, 1:], reduction="none")  # (b, T-1, V), (b, T-1)
            correct = logits.argmax(-1) == w[:, 1:]  # (b, T-1)
            right.append((correct | ~inside).all(dim=1).cpu())
            nats.append((loss * inside).sum(dim=1).cpu())
        self.train(was_training)
        return torch.cat(right).numpy(), torch.cat(nats).double().numpy()

    def windows_at_once(self, T):
        """How many windows of T tokens to evaluate at a time, so that memory is bounded.

        The largest tensors are the logits, in float32, and what a memory layer makes for its
        search. At least one window is evaluated.
        """
        tokens = min(LOGITS_BYTES // (4 * self.config.vocab_size), TOKENS_AT_ONCE)
        return max(tokens // T, 1)

    @torch.no_grad()
    def memory_reads(self, idx):
        """What each layer reads from the table: idx (B, T) -> list of (block, slots, weights).

        slots and weights are (B, T, R). Of a layer with heads, the R = H * K reads of a token are
        those of its first head, then of the next.
        """
        was_training = self.training
        self.eval()
        self.table.record = []
        try:
            self(idx)
            # The layers have left one record each, in the order of the blocks: (B*T, R) both.
            return [(block, slots.view(*idx.shape, -1), weights.view(*idx.shape, -1))
                    for (block, _), (slots, weights) in zip(self.memories(), self.table.record)]
        finally:
            self.table.record = None
            self.train(was_training)

    def param_counts(self):
        """Parameters by what they do: embedding, dense, half_keys, values, experts, and two sums.

        total: of all these. active: what one token uses, that is all but the rows of the table
        that it does not read, and the experts that it is not routed to. experts: only if there are
        any.
        """
        values = self.table.values.numel() * self.table.parts if self.table else 0
        counts = Counter(embedding=self.wte.weight.numel(), dense=self.norm.weight.numel(),
                         half_keys=0, values=values)
        inactive = 0
        for block in self.blocks:
            others = (block.norm1, block.norm2, block.attn)
            counts["dense"] += sum(p.numel() for part in others for p in part.parameters())
            own = block.ffn.param_counts()
            counts.update(own)  # adds them
            inactive += sum(own.values()) - block.ffn.active_params()
        counts["total"] = sum(counts.values())
        read = sum(layer.numbers_read() for _, layer in self.memories())
        read = min(read, counts["values"])  # a small table cannot be read more than once over
        counts["active"] = counts["total"] - counts["values"] + read - inactive
        return dict(counts)

    def flops_per_token(self):
        """FLOPs to train on one token, forward and backward.

        6 for each weight of a matrix that the token is multiplied with, the tied head included; the
        embedding is a lookup. 12 * n_layer * T * C for attention (PaLM, appendix B). Layers in the
        place of the MLP: see their flops_per_token.
        """
        c = self.config
        flops = 6 * self.wte.weight.numel() + 12 * c.n_layer * c.block_size * c.n_embd
        for block in self.blocks:
            flops += 6 * sum(p.numel() for p in block.attn.parameters())
            flops += block.ffn.flops_per_token()
        return flops

    def parameter_groups(self):
        """All parameters but the table's, for the optimizer.

        -> {(weight decay or not, name of the setting of their rate): list of parameters}. Matrices
        are decayed; embedding, norms and half-keys are not.
        """
        matrices = []
        rest = [self.wte.weight]
        groups = {(True, "learning_rate"): matrices, (False, "learning_rate"): rest}
        for block in self.blocks:
            rest += [block.norm1.weight, block.norm2.weight]
            matrices += block.attn.parameters()
            for parameters, decay, rate in block.ffn.parameter_groups():
                groups.setdefault((decay, rate), []).extend(parameters)
        rest.append(self.norm.weight)
        return groups


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
