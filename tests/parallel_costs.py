"""What does one value table cost over several GPUs? The bytes that each GPU sends, computed.

    python tests/parallel_costs.py

The table compares the two ways to train one value table on W GPUs:

    sliced    each GPU holds some dims of every slot; what travels are slots, weights and outputs
              of tokens (parallel_bytes), so the number of slots does not matter
    whole     each GPU holds the whole table, and averages its gradient with the others
              (replicated_bytes)
"""
N = 8192  # tokens on each GPU
R = 128  # reads per token
D = 2048  # dims of a slot
LAYERS = 3  # memory layers
LOG2_SLOTS = (20, 22, 24, 26)
GPUS = (2, 4, 8, 16, 32, 64)
BYTES_HELD = 6  # per value in bfloat16: 2, and 4 for the gradient
GB = 1e9


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


def table():
    """The text to print."""
    lines = [
        f"GB that each GPU sends in a training step, computed: {N} tokens a GPU, {LAYERS} memory "
        f"layers of {R} reads, D = {D}, values in bfloat16.",
        "sliced: over all GPUs, any number of slots. "
        "whole: each GPU holds the table, its float32 gradient is averaged.",
        "",
    ]
    titles = [f"whole, 2^{k} slots" for k in LOG2_SLOTS]
    lines.append(f"{'GPUs':10s}{'sliced':>10s}" + "".join(f"{title:>20s}" for title in titles))
    for W in GPUS:
        sliced = LAYERS * parallel_bytes(N, R, D, W, number=2) / GB
        whole = [replicated_bytes(2**k, D, W) / GB for k in LOG2_SLOTS]
        lines.append(f"{W:<10d}{sliced:10.1f}" + "".join(f"{x:20.1f}" for x in whole))
    held = [BYTES_HELD * 2**k * D / GB for k in LOG2_SLOTS]
    lines.append(f"{'GB to hold':20s}" + "".join(f"{x:20.1f}" for x in held))
    lines.append("")
    lines.append(f"To hold: {BYTES_HELD} bytes a bfloat16 value, with its gradient; "
                 f"of a table in P slices each GPU holds a P-th.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
