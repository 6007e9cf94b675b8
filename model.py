"""
A GPT whose MLPs can be replaced by memory layers: nanoGPT's shape with today's parts (rotary positions, RMS norms, no biases, tied
embeddings, flash attention through scaled_dot_product_attention). GPT.__init__ makes the tables and says which block reads which.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size=512, ffn="memory", mem_layers=(1,)))
    print(model.param_counts(), model.flops_per_token())

B, T, C batch, tokens, channels · nh attention heads of size hs, C = nh*hs · V vocabulary · S, D slots and dim of the memory table
"""
import functools
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from memory import MemoryTable, ProductKeyMemory, TableAdamW, columns


class Trouble(ValueError):
    """Something the user can mend: train.py and sample.py print it as one line and exit with status 1."""


def pick_device(name):
    """auto | cpu | cuda | cuda:1 | mps -> the device, auto: the fastest there is. Raises Trouble when this machine has none of that name."""
    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    there = [*cuda, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    if name not in ["auto", *there]:
        raise Trouble(f"--device {name} is not to be had on this machine: use --device {there[0]}")
    return there[0] if name == "auto" else name


@dataclass
class GPTConfig:
    vocab_size: int = 50304     # tokens in the vocabulary
    block_size: int = 1024      # longest context, in tokens
    n_layer: int = 12           # blocks
    n_head: int = 12            # attention heads
    n_embd: int = 768           # width C
    dropout: float = 0.0        # on attention, MLP and embeddings
    ffn: str = "dense"          # dense | memory: what replaces the MLP in the blocks of mem_layers
    mem_layers: tuple = (4, 6, 8)  # 0-based blocks with a memory layer
    mem_n_keys: int = 256       # n half-keys per side: the table has n*n slots
    mem_heads: int = 4          # H queries per token
    mem_topk: int = 32          # K slots read per head
    mem_key_dim: int = 0        # full key dim, two halves; 0: n_embd / 2
    mem_value_dim: int = 0      # D; 0: n_embd
    mem_gate: bool = True       # out = W2 (y * silu(W1 x)), Memory+
    mem_share: bool = True      # one table for all memory layers
    mem_dtype: str = "float32"  # float32 | bfloat16: the table's values; to train one takes 16 or 10 bytes a value
    qk_norm: bool = True        # RMS-norm on query halves and half-keys

    def check(self):
        """Raise ValueError with the value, the limit and the way out for sizes that cannot work. Returns self."""
        def need(ok, message):
            if not ok:
                raise ValueError(message)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            need(getattr(self, name) >= 1, f"{name} {getattr(self, name)} < 1: give a positive number")
        need(0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1): give a share")
        need(self.n_embd % (2 * self.n_head) == 0, f"n_embd {self.n_embd} is not a multiple of 2 * n_head = {2 * self.n_head}: "
             f"heads of an even size are needed, change n_embd or n_head")
        need(self.ffn in ("dense", "memory"), f"ffn {self.ffn!r} is unknown: choose dense or memory")
        if self.ffn == "dense":
            return self
        for name in ("mem_n_keys", "mem_heads", "mem_topk"):
            need(getattr(self, name) >= 1, f"{name} {getattr(self, name)} < 1: give a positive number")
        need(self.mem_dtype in ("float32", "bfloat16"), f"mem_dtype {self.mem_dtype!r} is unknown: choose float32 or bfloat16")
        need(self.mem_value_dim >= 0, f"mem_value_dim {self.mem_value_dim} < 0: give a positive number, or 0 for n_embd")
        need(self.mem_layers, "mem_layers is empty: name at least one block, or use --ffn dense")
        need(len(set(self.mem_layers)) == len(self.mem_layers), f"mem_layers {self.mem_layers} names a block twice: name each once")
        for layer in self.mem_layers:
            need(0 <= layer < self.n_layer, f"mem_layers {layer} is not in 0..{self.n_layer - 1}: "
                 f"choose blocks that exist or raise n_layer {self.n_layer}")
        need(self.mem_topk <= self.mem_n_keys, f"mem_topk {self.mem_topk} > {self.mem_n_keys} half-keys: lower mem_topk or raise mem_n_keys")
        key_dim = self.mem_key_dim or self.n_embd // 2
        need(key_dim >= 2 and key_dim % 2 == 0, f"mem_key_dim {key_dim} is not an even number >= 2: a key is two halves, set mem_key_dim")
        need(self.mem_n_keys**2 < 2**31, f"mem_n_keys {self.mem_n_keys} makes {self.mem_n_keys**2} slots, the limit is 2^31 - 1: lower mem_n_keys")
        return self


def rotary(hs, positions, device):
    """Rotary angles (RoPE, arXiv 2104.09864): cos, sin (positions, hs/2) float32."""
    freq = 10000 ** (-torch.arange(0, hs, 2, device=device).float() / hs)   # (hs/2,)
    angle = torch.arange(positions, device=device).float()[:, None] * freq  # (positions, hs/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + hs/2]) by its angle. x (..., T, hs), cos, sin (T, hs/2) -> (..., T, hs)."""
    a, b = x.chunk(2, dim=-1)                                               # (..., T, hs/2) both
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        """x (B, T, C), rope: cos, sin (T, hs/2), cache: (k, v) of the tokens before, or None -> (B, T, C), the cache with these tokens."""
        B, T, C = x.size()
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        (q, k), v = rotate(qkv[:2], *rope), qkv[2]                          # (B, nh, T, hs) each
        if cache is not None:
            k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)  # (B, nh, past + T, hs) both
        # with a cache there is one new token, which may look at everything: no mask needed
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)        # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))                                # (B, T, C)


class Block(nn.Module):
    def __init__(self, config, table):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.n_embd), nn.RMSNorm(config.n_embd)
        self.attn = Attention(config)
        self.ffn = MLP(config) if table is None else ProductKeyMemory(config, table)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache=None):
        y, cache = self.attn(self.norm1(x), rope, cache)                    # (B, T, C)
        x = x + self.drop(y)                                                # (B, T, C)
        return x + self.drop(self.ffn(self.norm2(x))), cache                # (B, T, C)


class GPT(nn.Module):
    def __init__(self, config, mesh=None):
        """mesh: over several ranks, the DeviceMesh ("replica", "slice") of parallel memory (memory.MemoryTable)."""
        super().__init__()
        self.config = config.check()
        C = config.n_embd
        layers = config.mem_layers if config.ffn == "memory" else ()
        n_tables = min(len(layers), 1) if config.mem_share else len(layers)
        self.tables = nn.ModuleList(MemoryTable(config.mem_n_keys, config.mem_value_dim or C, getattr(torch, config.mem_dtype), mesh)
                                    for _ in range(n_tables))
        table_of = {layer: self.tables[0 if config.mem_share else i] for i, layer in enumerate(layers)}
        self.wte = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(Block(config, table_of.get(i)) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(C)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight                                  # tied (V, C)
        cos, sin = rotary(C // config.n_head, config.block_size, "cpu")     # (block_size, hs/2) both
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """embedding N(0, 0.02) · matrices N(0, 1/sqrt(inputs)), those that write to the residual stream over sqrt(2 * n_layer) (nanoGPT) ·
        half-keys U(+-1/sqrt(key dim)) · values N(0, 1/sqrt(D)) (arXiv 2412.09764) · norms 1."""
        for table in self.tables:
            table.init_weights(std=table.value_dim ** -0.5)                 # (S, D/P)
        for name, p in self.named_parameters():
            if name.endswith("half_keys"):
                p.uniform_(-1, 1).mul_((2 * p.shape[-1]) ** -0.5)           # (2, H, n, d)
            elif p.dim() == 2 and not name.endswith("values"):
                p.normal_(std=0.02 if name.startswith("wte") else p.shape[1] ** -0.5)
                if name.endswith(("proj.weight", "out.weight")):
                    p.div_((2 * self.config.n_layer) ** 0.5)

    def memories(self):
        """The memory layers, as (block number, ProductKeyMemory)."""
        return [(i, b.ffn) for i, b in enumerate(self.blocks) if isinstance(b.ffn, ProductKeyMemory)]

    def forward(self, idx, targets=None, reduction="mean", caches=None):
        """idx (B, T) int64; targets (B, T) int64 or None. Returns (logits, loss).

        With targets: logits (B, T, V) and the mean cross-entropy in nats (reduction="none": (B, T)). Without: logits of the last
        position only, (B, 1, V), and None. caches: a list of n_layer (k, v) or None, read and refilled in place, for generation: once they
        are filled, T = 1. Logits beside a loss are for reading: they carry no gradient.
        """
        B, T = idx.size()
        past = 0 if caches is None or caches[0] is None else caches[0][0].size(2)
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens > block_size {self.config.block_size}: shorten the context")
        rope = self.cos[past:past + T], self.sin[past:past + T]             # (T, hs/2) both
        x = F.dropout(self.wte(idx), self.config.dropout, self.training)    # (B, T, C)
        for i, block in enumerate(self.blocks):
            x, cache = block(x, rope, None if caches is None else caches[i])  # (B, T, C)
            if caches is not None:
                caches[i] = cache
        x = self.norm(x)                                                    # (B, T, C)
        if targets is None:
            return self.head(x[:, -1:]), None                               # (B, 1, V)
        logits = self.head(x)                                               # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten(), reduction=reduction)
        return logits.detach(), loss if reduction == "mean" else loss.view(B, T)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, use_cache=True):
        """Yield max_new_tokens times the next token of each row, (B, 1). idx (B, T) int64, any T >= 1.

        temperature 0 takes the likeliest token. When the context is full, its last half is kept and read anew, with a cache or without:
        both give the same tokens, a cache only saves the time.
        """
        context, caches = idx[:, -self.config.block_size:], None            # (B, <= block_size)
        for _ in range(max_new_tokens):
            if context.size(1) > self.config.block_size:
                context, caches = context[:, -(self.config.block_size // 2 or 1):], None
            if caches is None:
                fresh, caches = context, [None] * self.config.n_layer       # (B, T)
            logits, _ = self(fresh, caches=caches if use_cache else None)   # (B, 1, V)
            token = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)  # (B, 1)
            context = torch.cat((context, token), dim=1)                    # (B, T + 1)
            fresh = token if use_cache else context
            yield token

    @torch.no_grad()
    def answer(self, windows, spans):
        """Fill in the ends of sentences. windows (F, T) numpy tokens, spans (F, 2) = [start, end) of the answer in its window ->
        right (F,) bool: every token of the answer is the likeliest one after what stands before it; nats (F,): its cross-entropy."""
        training, device, right, nats = self.training, self.wte.weight.device, [torch.empty(0, dtype=torch.bool)], [torch.empty(0)]  # for no windows
        self.eval()
        for i in range(0, len(windows), 1024):
            w = torch.from_numpy(windows[i:i + 1024].astype("int64")).to(device)             # (b, T)
            span = torch.from_numpy(spans[i:i + 1024].astype("int64")).to(device)            # (b, 2)
            at = torch.arange(1, w.shape[1], device=device)                                  # (T - 1,)
            inside = (at >= span[:, :1]) & (at < span[:, 1:])                                # (b, T - 1)
            logits, loss = self(w[:, :-1], w[:, 1:], reduction="none")                       # (b, T - 1, V), (b, T - 1)
            right.append(((logits.argmax(-1) == w[:, 1:]) | ~inside).all(dim=1).cpu())
            nats.append((loss * inside).sum(dim=1).cpu())
        self.train(training)
        return torch.cat(right).numpy(), torch.cat(nats).double().numpy()

    @classmethod
    def load(cls, folder, device="cpu", mesh=None):
        """The run folder of train.py -> (GPT, checkpoint: model, optimizer, tables, step, seconds, settings). The tables may have been saved
        whole or in any number of slices (they stay in the files until they are used); with a mesh, the GPT holds this rank's dims of them.
        Raises Trouble when there is no checkpoint, or one that is broken or another program's."""
        path = Path(folder) / "ckpt.pt"
        if not path.exists():
            raise Trouble(f"{path} does not exist: give the folder of a run that has saved a checkpoint")
        try:
            # mapped on the CPU, so that what is not used of tables and optimizer is never read; Windows cannot replace a mapped file
            read = functools.partial(torch.load, map_location="cpu", weights_only=True, mmap=sys.platform != "win32")
            state = read(path)
            config = {f.name: state["settings"][f.name] for f in fields(GPTConfig)}
            model = cls(GPTConfig(**config | {"mem_layers": tuple(config["mem_layers"])}), mesh)
            saved = [read(path.with_name(name))["tables"] for name in state["slices"]] or [state["tables"]]
            state["tables"] = [{k: [s[i][k] for s in saved] for k in saved[0][i]} for i in range(len(model.tables))]
            values = {f"tables.{i}.values": columns(t["values"], model.tables[i].dims) for i, t in enumerate(state["tables"])}
            model.load_state_dict(state["model"] | values)
            state["step"], state["optimizer"]  # KeyError if one is missing
        except FileNotFoundError as e:
            raise Trouble(f"{e.filename} is missing: {path} and the slices of the table belong together, bring them into one folder") from None
        except Exception as e:  # a foreign or broken file can raise anything
            raise Trouble(f"{path} is not a whole checkpoint of this program ({type(e).__name__}): train anew in another folder") from None
        return model.to(device), state

    def save(self, folder, optimizers, write, step, seconds, settings):
        """Write the checkpoint that load() reads; called on all ranks. Tensors and plain types alone, so that it loads with weights_only=True.
        Slices of a table are written by the ranks that hold them, before ckpt.pt names them: whenever a run is killed, ckpt.pt and the files
        it names are whole. write(path, f): calls f(another path) and renames that to path."""
        rank, parts = dist.get_rank() if dist.is_initialized() else 0, max([table.parts for table in self.tables], default=1)
        names = [f"ckpt-{step}-{i}of{parts}.pt" for i in range(parts)] if parts > 1 else []
        tables = dict(tables=optimizers[1].slices() if self.tables else [])
        if rank < len(names):
            write(folder / names[rank], lambda part: torch.save(tables, part))
        if names:
            dist.barrier()
        if rank == 0:
            dense = {k: v for k, v in self.state_dict().items() if not k.endswith(".values")}
            state = dict(model=dense, optimizer=optimizers[0].state_dict(), slices=names, step=step, seconds=seconds, settings=settings)
            write(folder / "ckpt.pt", lambda part: torch.save(state if names else state | tables, part))
            for old in folder.glob("ckpt-[0-9]*of*.pt*"):
                if old.name not in names:
                    old.unlink()
        if dist.is_initialized():
            dist.barrier()  # nobody goes on or leaves while another still writes

    def make_optimizers(self, s):
        """AdamW in groups that add up to the model: matrices (decayed) and the rest (not); for the memory's values an optimizer of their own
        (own rate, not decayed, clipped apart) -> [AdamW, and with memory TableAdamW], the parameters of the first."""
        matrices = [p for n, p in self.named_parameters() if p.dim() == 2 and not n.startswith("wte") and not n.endswith(".values")]
        rest = [p for n, p in self.named_parameters() if n.startswith("wte") or p.dim() != 2]
        assert len(self.tables) + len(matrices) + len(rest) == len(list(self.parameters()))
        groups = [dict(params=matrices, peak=s.learning_rate, weight_decay=s.weight_decay), dict(params=rest, peak=s.learning_rate)]
        optimizers = [torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), weight_decay=0.0, fused=True)]
        if self.tables:
            optimizers.append(TableAdamW(list(self.tables), s.value_lr, (s.beta1, s.beta2), s.grad_clip))
        return optimizers, matrices + rest

    def param_counts(self):
        """Parameters by what they do: embedding, dense, half_keys, values, their total, and active: those that one token uses (a memory
        layer reads heads * topk of the table's rows)."""
        counts = dict.fromkeys(("embedding", "dense", "half_keys", "values"), 0)
        for name, p in self.named_parameters():
            kind = "embedding" if name.startswith("wte") else name.split(".")[-1] if name.endswith(("half_keys", "values")) else "dense"
            counts[kind] += p.numel() * (self.tables[0].parts if kind == "values" else 1)
        counts["total"] = sum(counts.values())
        reads = sum(m.heads * m.topk * m.tables[0].value_dim for _, m in self.memories())
        counts["active"] = counts["total"] - counts["values"] + min(reads, counts["values"])
        return counts

    def flops_per_token(self):
        """FLOPs to train on one token, forward and backward: 6 for each weight of a matrix that the token is multiplied with (half-keys
        included, and the tied head; the embedding is a lookup), 12 * n_layer * T * C for attention (PaLM, appendix B), and 6 for each
        number read from the table: R rows of D, however large the table is."""
        c, counts = self.config, self.param_counts()
        matrices = sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and not n.endswith("values"))
        reads = sum(m.heads * m.topk * m.tables[0].value_dim for _, m in self.memories())
        return 6 * (matrices + counts["half_keys"] + reads) + 12 * c.n_layer * c.block_size * c.n_embd


def sample_token(logits, temperature, top_k, top_p, generator):
    """logits (B, V) float32 -> a token per row (B, 1): after temperature, from the top_k likeliest, and from the smallest set with
    probability top_p (nucleus, arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature                                           # (B, V)
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]       # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p and top_p < 1:
        ranked, order = logits.sort(descending=True)                        # (B, V) both
        cut = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1) >= top_p   # (B, V): where the likelier ones have it already
        logits = logits.masked_fill(cut.scatter(1, order, cut), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
