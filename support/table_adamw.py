"""AdamW for memory tables: float32 or bfloat16, whole or in slices over several ranks."""
import functools
import math

import torch
import torch.distributed as dist

from memory import round_randomly, scramble
from support.machine import will_compile



class TableAdamW(torch.optim.AdamW):
    """AdamW for memory tables, without decay. It updates all rows: a batch reads most of them.

    tables: list of MemoryTable. clip: largest norm of the gradient, that of all tables together.
    compile: torch.compile for the step of bfloat16 tables; None: with CUDA and Triton.

    float32 tables go through torch's AdamW. bfloat16 tables go through adamw_bfloat16_ and take 10
    bytes a value: the value and two moments in bfloat16, and the gradient, summed in float32 over
    layers and micro-steps. Over several ranks it averages the gradients: DDP does not see them.
    """

    def __init__(self, tables, lr, betas, clip=math.inf, compile=None):
        values = [table.values for table in tables]
        super().__init__(values, lr=lr, betas=betas, weight_decay=0.0, fused=True)
        self.tables = tables
        self.clip = clip
        self.compile = will_compile(compile, values[0].device.type)
        for table in tables:
            p = table.values  # (S, D/P)
            if not p.requires_grad:
                wide = torch.promote_types(p.dtype, torch.float32)
                table.grad_sum = torch.zeros_like(p, dtype=wide)  # (S, D/P)
            if p.dtype == torch.bfloat16:
                self.state[p] = dict(step=0, exp_avg=torch.zeros_like(p),
                                     exp_avg_sq=torch.zeros_like(p))

    @torch.no_grad()
    def step(self):
        """Use up the gradients: they are zero or gone afterwards.

        Returns their norm before clipping, a scalar tensor. A table has a grad_sum if its values
        have no .grad, see MemoryTable.
        """
        grads = []  # (S, D/P) each
        for table in self.tables:
            grads.append(table.values.grad if table.grad_sum is None else table.grad_sum)
        norm, ranks = self.reduce(grads)
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0) / ranks  # ()
        for table, grad in zip(self.tables, grads):
            if table.values.dtype == torch.bfloat16:
                self.step_bfloat16(table, scale)
            else:
                table.values.grad = grad.mul_(scale)  # for torch's AdamW, below
        super().step()  # bfloat16 tables have no .grad, so it leaves them alone
        for table, grad in zip(self.tables, grads):
            table.values.grad = None
            if table.grad_sum is not None and table.values.dtype != torch.bfloat16:
                grad.zero_()
        self.norm = norm
        return norm

    def reduce(self, grads):
        """Add up the gradients of the replicas -> (norm of their mean, number of ranks).

        They stay sums: step() divides them by the number of ranks when it scales them.
        """
        mesh = self.tables[0].mesh
        if mesh is not None:
            for grad in grads:
                dist.all_reduce(grad, group=mesh.get_group("replica"))
        norm = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()  # ()
        if mesh is None:
            return norm, 1
        norm = norm.square()
        dist.all_reduce(norm, group=mesh.get_group("slice"))  # over all dims
        return norm.sqrt() / mesh.size(), mesh.size()

    def step_bfloat16(self, table, scale):
        state = self.state[table.values]
        group = self.param_groups[0]
        state["step"] += 1
        adamw_bfloat16_(table.values, table.grad_sum, state["exp_avg"], state["exp_avg_sq"],
                        state["step"], group["lr"], *group["betas"], scale=scale,
                        eps=group["eps"], first_column=table.dims.start, compile=self.compile)

    def slices(self):
        """What a checkpoint keeps of each table: this rank's values and moments, (S, D/P) each."""
        kept = []
        for table in self.tables:
            state = self.state[table.values]
            kept.append(dict(values=table.values.detach(), exp_avg=state["exp_avg"],
                             exp_avg_sq=state["exp_avg_sq"]))
        return kept

    def load(self, saved, step):
        """Go on after `step` steps.

        saved: for each table {"exp_avg": [(S, D/P), ...], "exp_avg_sq": ...}, the slices of all
        ranks that saved it, however many those were.
        """
        for table, slices in zip(self.tables, saved):
            p = table.values
            state = self.state[p]
            state["step"] = step
            if p.dtype != torch.bfloat16:  # torch's AdamW keeps its step count on the device
                state["step"] = torch.tensor(float(step), device=p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                mine = columns(slices[name], table.dims)  # (S, D/P)
                state[name] = mine.to(p.device, copy=True)


def adamw_bfloat16_(values, grad_sum, exp_avg, exp_avg_sq, step, lr, beta1, beta2, scale=1.0,
                    eps=1e-8, first_column=0, compile=False):
    """One step of AdamW without decay (arXiv 1711.05101) on a bfloat16 table, in place.

    values, exp_avg, exp_avg_sq (S, W) bfloat16, rounded randomly; grad_sum (S, W) float32, is
    multiplied by scale (a number or a scalar tensor), and zero afterwards. step: 1, 2, ... A table
    in slices is rounded as the whole one: first_column is where these W columns begin.
    Held: 2 + 2 + 2 + 4 bytes a value. Compiled, one pass reads 10 bytes and writes 10.
    """
    device = values.device
    # torch.compile compiles again for each new Python number, so these are tensors. They are made
    # on the device, since the CPU would have to wait for a copy.
    scalars = dict(
        scale=scale if torch.is_tensor(scale) else torch.full((), float(scale), device=device),
        rate=torch.full((), lr / (1 - beta1**step), device=device),
        unbias=torch.full((), 1 / (1 - beta2**step), device=device),
        step=torch.full((), step, device=device))
    column = first_column + torch.arange(values.shape[1], device=device)  # (W,)
    row = torch.arange(len(values), device=device)  # (S,)
    if compile:
        compiled_update()(values, grad_sum, exp_avg, exp_avg_sq, row, column, beta1=beta1,
                          beta2=beta2, eps=eps, **scalars)
        return
    # Some rows at a time: not compiled, every operation makes a tensor of its own.
    numbers_at_once = 2**20 if device.type == "cpu" else 2**24
    some = max(numbers_at_once // values.shape[1], 1)
    for i in range(0, len(values), some):
        here = slice(i, i + some)
        update_bfloat16_(values[here], grad_sum[here], exp_avg[here], exp_avg_sq[here], row[here],
                         column, beta1=beta1, beta2=beta2, eps=eps, **scalars)


@functools.cache
def compiled_update():
    return torch.compile(update_bfloat16_)


def update_bfloat16_(values, grad_sum, exp_avg, exp_avg_sq, row, column, scale, rate, unbias, step,
                     beta1, beta2, eps):
    """AdamW's formulas in float32, then the three results rounded. row (S,), column (W,) int64."""
    g = grad_sum * scale  # (S, W), as all below
    m = exp_avg.float().lerp(g, 1 - beta1)
    v = exp_avg_sq.float().lerp(g.square(), 1 - beta2)
    p = values.float() - rate * m / ((v * unbias).sqrt() + eps)
    noise = scramble(scramble(scramble(step) ^ row[:, None]) ^ column)  # 32 bits for each place
    values.copy_(round_randomly(p, noise & 0xFFFF))
    exp_avg.copy_(round_randomly(m, noise >> 16))
    exp_avg_sq.copy_(round_randomly(v, scramble(noise + 1) & 0xFFFF))
    grad_sum.zero_()


def columns(slices, dims):
    """Columns `dims` (a slice) of a matrix (S, D) that is stored as P slices (S, D/P).

    The whole matrix is never built.
    """
    width = slices[0].shape[1]
    parts = []
    for i, s in enumerate(slices):
        begin = max(dims.start - i * width, 0)
        end = max(dims.stop - i * width, 0)
        parts.append(s[:, begin:end])  # empty where this slice holds none of them
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
