"""One loop for every drafter: propose, verify in one pass of the target, keep what was accepted.

A step appends, to every running row, the accepted part of its draft and one token more, drawn by `verify_draft_tokens` or
`verify_draft_tree` (posttrain/kernels): each token is distributed as plain decoding's, whatever was proposed
(docs/math/speculative.md). At temperature 0 they are plain decoding's tokens.

Rows accept differently many. All have room in the cache for the longest; what a row lacks of it is a hole (`KVCache.keep`), which
no token sees and no position counts, so a row goes on as if alone. Holes are closed when they are a quarter of the cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from posttrain.kernels import tree_attention, verify_draft_tokens, verify_draft_tree
from posttrain.model.decoder import CausalLM
from posttrain.model.eval_mode import eval_mode
from posttrain.model.fused import fused_projections
from posttrain.model.generate import check_prompts, check_seed, given_ids, left_pad, outside_requests, request_adapters
from posttrain.model.kv_cache import KVCache
from posttrain.model.sampling import check_sampling

from . import pace
from .interface import FINAL, Drafter, Proposal, Requests
from .overlap import overlap
from .report import Report
from .typical import accept_typical

LONGEST, FIXED = 16, 5  # drafts, unless told otherwise: where their length is decided from step to step, and where it is not


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    drafter: Drafter,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int | Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    adapter_ids: Sequence[str | None] | None = None,
    *,
    draft_length: int | None = None,
    adaptive: bool = True,
    typical: tuple[float, float] | None = None,
    measure_overlap: bool = False,
) -> tuple[list[list[int]], Report]:
    """The new tokens of each prompt, as posttrain.model.generate's arguments of these names ask, and how it went.

    At temperature 0 the tokens are those of plain decoding; otherwise they have its distribution, not its draws. seed: one
    for each prompt, which then gives it the same tokens alone and in any batch, or one of which theirs are made.

    draft_length: the longest draft (default 16, or 5 where every draft is as long as it may be); of a tree, its depth. adaptive:
    how long drafts are, and whether there are any, is decided from measured acceptance and times (pace.py), so that it is not
    slower than plain decoding; a seed with temperature > 0 rules that out, since draws depend on where drafts begin.

    typical: LOSSY. (epsilon, alpha) of Medusa's typical acceptance (typical.py), of trees, where temperature > 0.
    measure_overlap: the report's `overlap` too, of chains; a pass over the distributions.

    Raises ValueError as posttrain.model.generate does, for a draft_length below 1, or where a row of logits has no finite one.
    """
    check_sampling(temperature, top_k, top_p)
    prompts, stop = given_ids(prompts, stop_ids)
    check_prompts(model, prompts, max_new_tokens)
    adaptive = adaptive and (seed is None or temperature == 0)
    if draft_length is None:
        draft_length = LONGEST if adaptive else FIXED
    if draft_length < 1:
        raise ValueError(f"draft_length is {draft_length}; expected at least 1 token (plain decoding is posttrain.model.generate)")
    report = Report()
    outputs: list[list[int]] = [[] for _ in prompts]
    device = model.model.embed_tokens.weight.device
    if not prompts or max_new_tokens == 0:
        with request_adapters(model, adapter_ids, len(prompts), device):  # an unknown name is an error here too
            return outputs, report
    adapters = request_adapters(model, adapter_ids, len(prompts), device)
    with eval_mode(model), adapters as batch, fused_projections(model):
        requests = Requests(
            [list(prompt) for prompt in prompts], [0] * len(prompts), _seeds(seed, len(prompts), device),
            torch.zeros(len(prompts), dtype=torch.int64, device=device), temperature, top_k, top_p, device,
        )  # fmt: skip
        decider = pace.Pace(draft_length, adaptive, drafter.prompt_cost, report)
        run = _Run(
            model,
            requests,
            drafter,
            decider,
            outputs,
            max_new_tokens,
            stop,
            outside_requests(on_token, batch),
            batch,
            typical,
            measure_overlap,
        )
        run.start(prompts)
        while run.rows:
            run.step()
    return outputs, report


def _seeds(seed: int | Sequence[int] | None, count: int, device: torch.device) -> Tensor:
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, int):
        check_seed(seed)
        stream = random.Random(seed)
        return torch.tensor([stream.getrandbits(62) for _ in range(count)], device=device)
    if len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} prompts; expected one for each, or a single number")
    for one in seed:
        check_seed(one)
    return torch.tensor([(int(one) + 2**63) % 2**64 - 2**63 for one in seed], device=device)  # as int64


class _Run:
    """A batch under way. rows[i] is the prompt that row i of the cache and of `requests` continues."""

    def __init__(
        self,
        model: CausalLM,
        requests: Requests,
        drafter: Drafter,
        decider: pace.Pace,
        outputs: list[list[int]],
        max_new_tokens: int,
        stop: frozenset[int],
        on_token: Callable[[int, int], None] | None,
        batch,
        typical: tuple[float, float] | None,
        measure_overlap: bool,
    ):
        self.model, self.requests, self.drafter, self.pace = model, requests, drafter, decider
        self.outputs, self.stop, self.on_token, self.batch = outputs, stop, on_token, batch
        self.typical, self.measure_overlap = typical, measure_overlap
        self.generator = torch.Generator(requests.device).manual_seed(int(requests.seeds[0]))  # for typical acceptance alone
        self.rows = list(range(len(outputs)))
        self.max_new_tokens = max_new_tokens
        # Past its first length dynamic rope turns by the length of the text: each token then needs a pass of its own.
        dynamic = model.config.rope.rope_type == "dynamic"
        self.longest = model.config.max_position_embeddings if dynamic else model.config.context_length
        drafter.begin(len(outputs))

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """The prompts' pass and each row's first token."""
        weight = self.model.model.embed_tokens.weight
        longest = max(map(len, prompts))
        self.cache = KVCache(self.model.config, len(prompts), longest + self.max_new_tokens, weight.dtype, weight.device)
        began = pace.clock()
        input_ids, mask = left_pad(prompts, longest, weight.device)
        features, hidden = self._pass(input_ids, attention_mask=mask)
        none = Proposal(input_ids[:, :0], torch.zeros(len(prompts), dtype=torch.int64, device=weight.device))
        tokens, _, _ = self._verify(none, self.model.head(hidden[:, -1:]), 0)
        new = tokens.tolist()
        self.pace.prompts_seen(pace.clock() - began, self.max_new_tokens)
        # A row's padding is followed by padding, but for the last of it, which no one should learn from either.
        following = torch.cat((input_ids[:, 1:], tokens), 1)
        self.drafter.observe(following if mask is None else following.masked_fill(~mask, -1), features)
        self._append(new)

    def step(self) -> None:
        """One pass of the target over every row's root and draft."""
        began = pace.clock()
        proposal = self._propose()
        drafted = pace.clock()
        features, logits, depth = self._see(proposal)
        if (see := getattr(self.drafter, "see", None)) is not None:
            see(logits)
        tokens, num_accepted, path = self._verify(proposal, logits, max(depth))
        new, accepted = tokens.tolist(), num_accepted.tolist()
        took = drafted - began, pace.clock() - drafted
        self.pace.stepped(proposal.num.tolist(), depth, accepted, logits.shape[1], *took)
        if self.measure_overlap and path is None:
            self.pace.report.add_overlap(*overlap(proposal, logits, num_accepted, self.requests))
        self._roll_back(accepted, path)
        if features is not None:
            features = features[:, : tokens.shape[1]] if path is None else _along(features, path)
        self.drafter.observe(tokens, features)
        self._append(new)

    def _propose(self) -> Proposal:
        limit = self.pace.length(self.requests.cap)
        if limit:
            proposal = self.drafter.propose(self.requests, limit)
            longest = int(proposal.num.max())
            if longest:
                return proposal
        empty = torch.zeros(len(self.rows), 0, dtype=torch.int64, device=self.requests.device)
        return Proposal(empty, torch.zeros(len(self.rows), dtype=torch.int64, device=self.requests.device))

    def _see(self, proposal: Proposal) -> tuple[Tensor | None, Tensor, list[int]]:
        """The target's features and logits at the root and the drafted nodes, and how deep each row's draft is."""
        self.before = self.cache.length
        input_ids = torch.cat((self.requests.roots[:, None], proposal.tokens.clamp(min=0)), 1)
        if proposal.parents is None:
            features, hidden = self._pass(input_ids)
            return features, self.model.head(hidden), proposal.num.tolist()
        tree_mask, depth = tree_attention(proposal.parents)
        places = torch.tensor([[len(tokens) - 1] for tokens in self.requests.tokens], device=input_ids.device)
        features, hidden = self._pass(input_ids, position_ids=places + depth, tree_mask=tree_mask)
        used = torch.arange(input_ids.shape[1], device=input_ids.device) <= proposal.num[:, None]
        return features, self.model.head(hidden), (depth * used).amax(1).tolist()

    def _pass(self, input_ids: Tensor, **arguments) -> tuple[Tensor | None, Tensor]:
        wanted = self.drafter.features
        states: dict[int, Tensor] = dict.fromkeys((layer for layer in wanted if layer != FINAL), input_ids)
        hidden = self.model.hidden(input_ids, cache=self.cache, states=states or None, **arguments)
        if not wanted:
            return None, hidden
        parts = [hidden if layer == FINAL else states[layer] for layer in wanted]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1), hidden

    def _verify(self, proposal: Proposal, logits: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """tokens (B, D + 1), how many were accepted (B,), and of a tree the path (B, D); behind a row's own, -1."""
        requests, path = self.requests, None
        sampling = requests.temperature, requests.top_k, requests.top_p
        noise = {"seed": requests.seeds, "offsets": requests.generated}
        if proposal.parents is None:
            tokens, num_accepted = verify_draft_tokens(
                proposal.tokens, proposal.logits, logits, proposal.num, *sampling, **noise
            )  # fmt: skip
        elif self.typical is not None and requests.temperature > 0:
            epsilon, alpha = self.typical
            tokens, num_accepted, path = accept_typical(
                proposal.tokens, proposal.parents, logits, proposal.num, *sampling, epsilon=epsilon, alpha=alpha,
                generator=self.generator,
            )  # fmt: skip
        else:
            tokens, num_accepted, path = verify_draft_tree(
                proposal.tokens, proposal.parents, logits, proposal.logits, proposal.num, *sampling,
                with_replacement=proposal.with_replacement, max_depth=depth, **noise,
            )  # fmt: skip
        return tokens, num_accepted, path

    def _roll_back(self, accepted: list[int], path: Tensor | None) -> None:
        """Of what the pass put into the cache, keep the roots and the accepted nodes."""
        longest = max(accepted)
        if path is None and min(accepted) == longest:
            self.cache.length = self.before + 1 + longest
        else:
            steps = torch.arange(1 + longest, device=self.requests.device)
            kept = steps[None] if path is None else torch.cat((steps.new_zeros(len(path), 1), path[:, :longest] + 1), 1)
            mine = steps <= torch.tensor(accepted, device=steps.device)[:, None]
            self.cache.keep(self.before, torch.where(mine, kept, -1))
        # The last token of a row is not in the cache yet, and the one that a step adds does not count here either.
        longest = max(len(tokens) + count for tokens, count in zip(self.requests.tokens, accepted, strict=True))
        if self.cache.length > longest * 5 // 4 + 16:
            self.cache.compact()

    def _append(self, new: list[list[int]]) -> None:
        """Give every row its tokens, up to a stop token; drop the rows that are finished."""
        going = []
        for i, tokens in enumerate(new):
            row, ended, count = self.rows[i], False, 0
            for token in tokens:
                if token < 0:
                    break
                count += 1
                if token in self.stop:
                    ended = True
                    break
                self.outputs[row].append(token)
                if self.on_token is not None:
                    self.on_token(row, token)
            if not count:
                raise ValueError(
                    f"prompt {row}: the model's logits after {len(self.outputs[row])} new tokens hold no finite number"
                )
            self.requests.tokens[i] += tokens[:count]
            self.requests.generated[i] += count
            if not ended and len(self.outputs[row]) < self.max_new_tokens:
                going.append(i)
        if len(going) < len(new):
            self._select(going)
        room = self.longest - max(map(len, self.requests.tokens))
        left = [self.max_new_tokens - len(self.outputs[row]) for row in self.rows]
        self.requests.cap = [max(0, min(count - 1, room)) for count in left]

    def _select(self, going: list[int]) -> None:
        self.rows = [self.rows[i] for i in going]
        if not going:
            return
        kept = torch.tensor(going, device=self.requests.device)
        self.cache.select(kept)
        self.drafter.select(kept)
        if self.batch is not None:
            self.batch.select(kept)
        requests = self.requests
        requests.tokens = [requests.tokens[i] for i in going]
        requests.seeds, requests.generated = requests.seeds[kept], requests.generated[kept]


def _along(features: Tensor, path: Tensor) -> Tensor:
    """Of features (B, 1 + N, F) the root's and the path's (B, 1 + D, F); whatever, where the path (B, D) holds -1."""
    nodes = torch.cat((path.new_zeros(len(path), 1), path.clamp(min=-1) + 1), 1)
    return features.gather(1, nodes[..., None].expand(-1, -1, features.shape[-1]))
