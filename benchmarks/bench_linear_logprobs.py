"""Log-probabilities of 2,048 tokens through SmolLM2's head (V = 49,152, H = 576) in bfloat16, forward and backward, head frozen.

Beside the plain expression, log_softmax of whole logits, and TRL's chunked function in tiles of 32,768 words. Then DPO's loss
of 4 pairs of 256 tokens from policy's and reference's hidden states, beside Liger's fused linear DPO. Then the memory that each
takes beyond its inputs, in a process of its own, at two numbers of tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from posttrain import kernels
from posttrain.kernels import cpu

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench

N, H, V = 2048, 576, 49_152


def plain(hidden, weight, labels):
    return torch.log_softmax((hidden @ weight.t()).float(), 1).gather(1, labels[:, None])[:, 0]


def trl(hidden, weight, labels):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32_768, None, 1.0, ())[0]


CANDIDATES = {"posttrain": kernels.linear_logprobs, "plain": plain}
if importlib.util.find_spec("trl"):
    CANDIDATES["TRL chunked"] = trl


LENGTH = 256  # tokens of a completion


def dpo(hidden, ref_hidden, weight, labels):
    """The mean loss of pairs: rows of LENGTH tokens, all chosen ones first; beta 0.1."""
    with torch.no_grad():
        ref = kernels.linear_logprobs(ref_hidden, weight, labels).view(2, -1, LENGTH).sum(2)
    policy = kernels.linear_logprobs(hidden, weight, labels).view(2, -1, LENGTH).sum(2)
    return kernels.dpo_loss(*policy, *ref)[0].mean()


def plain_dpo(hidden, ref_hidden, weight, labels):
    policy, ref = (plain(h, weight, labels).view(2, -1, LENGTH).sum(2) for h in (hidden, ref_hidden))
    (chosen, rejected), (ref_chosen, ref_rejected) = policy, ref
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - ref_chosen - rejected + ref_rejected)).mean()


@functools.cache
def _liger(compiled: bool):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(compiled=compiled)


def liger_dpo(hidden, ref_hidden, weight, labels, compiled: bool = True):
    rows = (t.view(-1, LENGTH, H) for t in (hidden, ref_hidden))
    policy, ref = rows
    return _liger(compiled)(weight, policy, labels.view(-1, LENGTH), ref_input=ref, ref_weight=weight)[0]


DPO = {"posttrain": dpo, "plain": plain_dpo}
if importlib.util.find_spec("liger_kernel"):
    DPO |= {"Liger compiled": liger_dpo, "Liger": functools.partial(liger_dpo, compiled=False)}


def dpo_step(name: str, hidden, weight, labels, ref_hidden):
    hidden.grad = None
    loss = DPO[name](hidden, ref_hidden, weight, labels)
    loss.backward()
    return loss.detach(), hidden.grad


def inputs(tokens: int):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, H).bfloat16().requires_grad_()
    return hidden, (torch.randn(V, H) / H**0.5 * 3).bfloat16(), torch.randint(V, (tokens,))


def step(name: str, hidden, weight, labels):
    hidden.grad = None
    logprobs = CANDIDATES[name](hidden, weight, labels)
    logprobs.sum().backward()
    return logprobs.detach(), hidden.grad


def memory(what: str, name: str, tokens: int) -> float:
    """MiB that a step ("logprobs" or "dpo") adds to the peak of a fresh process that has already made a small one."""
    command = [sys.executable, __file__, "--one", what, name, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def one(what: str, name: str, tokens: int) -> None:
    torch.set_num_threads(2)
    run = {"logprobs": step, "dpo": lambda name, *given: dpo_step(name, *given, torch.randn_like(given[0]).detach())}[what]
    run(name, *inputs(2 * LENGTH))
    given = inputs(tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = resident("VmRSS")
    run(name, *given)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """MiB of this process that are in memory now (VmRSS), or were at the most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def compare_dpo(options) -> dict:
    given = (*inputs(N), torch.randn(N, H).bfloat16())
    results = {name: dpo_step(name, *given) for name in DPO}
    hidden, weight, labels, ref_hidden = given
    wide = hidden.detach().float().requires_grad_(), weight.float(), labels, ref_hidden.float()
    exact = dpo_step("plain", *wide)[1]
    errors = {name: ((grad.float() - exact).norm() / exact.norm()).item() for name, (_, grad) in results.items()}
    print("DPO's gradient against float32:", ", ".join(f"{name} {error:.2e}" for name, error in errors.items()))
    assert errors["posttrain"] <= 2 * errors["plain"], "less accurate than plain PyTorch"
    times = _bench.in_turn({name: lambda name=name: dpo_step(name, *given) for name in DPO}, options)
    return _bench.row(f"DPO of {N // LENGTH // 2} pairs, H={H} V={V}", times, 2 * (2 * N + V) * H, _bench.bandwidth(options))


def main() -> None:
    options = _bench.arguments(__doc__)
    print(cpu.describe())
    given = inputs(N)
    few = inputs(LENGTH)
    exact = plain(few[0].double(), few[1].double(), few[2]).detach()
    errors = {name: (step(name, *few)[0].double() - exact).norm().item() for name in CANDIDATES}
    print(f"error of {LENGTH} log-probabilities:", ", ".join(f"{name} {error:.2e}" for name, error in errors.items()))
    assert errors["posttrain"] <= 2 * errors["plain"], "less accurate than plain PyTorch"
    times = _bench.in_turn({name: lambda name=name: step(name, *given) for name in CANDIDATES}, options)
    rows = [_bench.row(f"log-probabilities N={N} H={H} V={V}", times, 2 * (N + V) * H, _bench.bandwidth(options))]
    start = time.perf_counter()
    for _ in range(3):
        given[0].detach() @ given[1].t()
    product = (time.perf_counter() - start) / 3 * 1e3
    print(f"{'':34} one of torch's products alone takes {product:.0f} ms; by those, two are the limit")
    rows.append(compare_dpo(options))
    peaks = {}
    for (what, names), tokens in itertools.product((("logprobs", CANDIDATES), ("dpo", DPO)), (N // 4, N)):
        taken = {name: statistics.median(memory(what, name, tokens) for _ in range(3)) for name in names}
        peaks[f"{what} {tokens}"] = taken
        print(f"memory beyond the inputs, {what}, N={tokens}: " + ", ".join(f"{name} {m:.0f} MiB" for name, m in taken.items()))
    _bench.save("linear_logprobs", rows, options, {"product_milliseconds": product, "memory_MiB": peaks, **cpu.describe()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:4], int(sys.argv[4]))
    else:
        main()
