"""Decoding from a cache of fixed size: each step is one replayed CUDA graph, and the host never waits inside it.

Plain decoding (`sample_captured`) takes transformers' own loop apart: prompt, logits processors, sampling and stopping rules
are transformers', only the forward of a token is ours. The next step is launched before the host looks at whether this one
was the last, so that the device has work while the host runs processors and rules.

Decoding with MTP (`CapturedReader`) answers the calls of `drafting.GrowingReader` with three kinds of steps: the head on what
was settled, the head on a draft, and the backbone on a token and its drafts; or all of a round as one, where it always drafts as
many tokens and the likeliest. Taking drafts back is a smaller position for attention, and for Mamba-2 a replay of the kept inputs
at the beginning of the next step.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .drafting import MOST_DEPTHS, GrowingReader, tokens_behind
from .speculative import accept_greedy
from .static_cache import ReadAhead, StaticHybridCache, StaticMamba2Layer, StaticMTPCache, round_up
from .stopping_rules import UsualRules

logger = logging.get_logger(__name__)

# Caches that no call uses, kept with their graphs for the next that fits.
_IDLE_CACHES = 2
_idle: weakref.WeakKeyDictionary[torch.nn.Module, list[tuple[tuple, StaticHybridCache]]] = weakref.WeakKeyDictionary()


def borrow_cache(model, batch: int, tokens: int, kv_dtype: torch.dtype | None = None) -> StaticHybridCache:
    """An empty fixed-size cache for `batch` rows of at least `tokens` tokens: one from an earlier call, or a new one."""
    kind = _cache_kind(model, batch, kv_dtype)
    idle = _idle.setdefault(model, [])
    fitting = [i for i, (made_for, cache) in enumerate(idle) if made_for == kind and cache.max_cache_len >= tokens]
    if fitting:
        cache = idle.pop(fitting[-1])[1]
        cache.reset()
        return cache
    return StaticHybridCache(model.config, round_up(tokens), kv_dtype)


def give_back_cache(model, cache: StaticHybridCache, batch: int) -> None:
    """The call that borrowed a cache is over, and nobody else holds it."""
    idle = _idle.setdefault(model, [])
    idle.append((_cache_kind(model, batch, cache.kv_dtype), cache))
    del idle[:-_IDLE_CACHES]


def forget_idle_caches(model) -> None:
    """Free the fixed-size caches, and the graphs, that earlier calls of `generate` left for later ones."""
    _idle.pop(model, None)


def _cache_kind(model, batch: int, kv_dtype: torch.dtype | None) -> tuple:
    # Tensors made in inference mode cannot be written to outside of it.
    return batch, kv_dtype, model.dtype, model.device, torch.is_inference_mode_enabled()


def check_room_for(cache: StaticHybridCache, prompt: int, new: int, spare: int = 0) -> None:
    """Refuse a prompt that does not fit, or that fits without what shall be written behind it.

    Raises:
        ValueError: naming all three sizes.
    """
    # The last token written is never read.
    if prompt + new - 1 + spare > cache.max_cache_len:
        behind = f" and {spare} drafts" if spare else ""
        raise ValueError(
            f"A prompt of {prompt} tokens with {new} new ones{behind} does not fit into a `cache` of fixed size "
            f"{cache.max_cache_len}: give one with `max_cache_len={prompt + new - 1 + spare}`, ask for fewer tokens, or leave "
            "`cache` out."
        )


def _bind(model, cache: StaticHybridCache) -> None:
    cache.graphs.bind(model)
    if cache.graphs.reason is not None and model.device.type == "cuda":
        logger.warning_once(f"Decoding steps are not recorded as CUDA graphs: {cache.graphs.reason}.")


class DecodeStep:
    """One token for every row: `step(tokens)` gives the logits of the next, (batch, vocab) float32, in a buffer of its own.

    Args:
        cache: holds the prompt.
        attention_mask: (batch, seq) of the prompt with 0 for padding, or None.
    """

    def __init__(self, model, cache: StaticHybridCache, batch: int, attention_mask: Tensor | None):
        self.model, self.cache = model, cache
        device = model.get_input_embeddings().weight.device
        self.tokens = cache.graphs.buffer("tokens", (batch, 1), torch.long, device)
        self.logits = cache.graphs.buffer("logits", (batch, model.config.vocab_size), torch.float32, device)
        cache.slots.begin(batch, device, attention_mask)
        _bind(model, cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        slots = self.cache.slots
        self.tokens.copy_(tokens.unsqueeze(1))
        reach = slots.reach_for(slots.seen + 1)
        self.cache.graphs.run(("token", reach), lambda: self.compute(reach))
        slots.seen += 1
        return self.logits

    def compute(self, reach: int) -> None:
        """What is recorded: from `tokens` to `logits`, without the host."""
        slots, model = self.cache.slots, self.model
        with slots.fixed(1, reach) as layout:
            hidden = _backbone(model, self.cache, self.tokens, layout)
        assert slots.positions is not None
        slots.positions.add_(1)
        self.logits.copy_(model.get_output_embeddings()(hidden)[:, 0])


def _backbone(model, cache: StaticHybridCache, tokens: Tensor, layout) -> Tensor:
    embeds = model.get_input_embeddings()(tokens)
    return model.model(inputs_embeds=embeds, cache=cache, use_cache=True, layout=layout).last_hidden_state


class HostCopy:
    """Values on their way from the device; the host waits for them alone, not for what was launched after them."""

    def __init__(self, *values: Tensor):
        self._copies = [value.to("cpu", non_blocking=True) for value in values]
        self._there = None
        if values and values[0].is_cuda:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(values[0].device))

    def wait(self) -> list[Tensor]:
        if self._there is not None:
            self._there.synchronize()
        return self._copies


def sample_captured(
    model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict,
) -> Tensor | GenerateDecoderOnlyOutput:
    """As `GenerationMixin._sample`, greedy or sampled, with a `StaticHybridCache` in `model_kwargs`."""
    config, cache = generation_config, model_kwargs["cache"]
    batch, length = input_ids.shape
    embeds = model_kwargs.get("inputs_embeds")
    check_room_for(cache, length if embeds is None else embeds.shape[1], config.max_length - length)
    returned = bool(config.return_dict_in_generate or getattr(cache, "_is_user_defined", False))
    keep_scores = bool(config.return_dict_in_generate and config.output_scores)
    keep_logits = bool(config.return_dict_in_generate and config.output_logits)
    all_scores: tuple[Tensor, ...] | None = () if keep_scores else None
    all_logits: tuple[Tensor, ...] | None = () if keep_logits else None
    pad = config._pad_token_tensor
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)

    outputs = model._prefill(input_ids, config, model_kwargs, is_first_iteration=not config.is_assistant)
    logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
    del outputs
    step = DecodeStep(model, cache, batch, model_kwargs.get("attention_mask"))

    ids = input_ids.new_empty(batch, config.max_length)
    ids[:, :length] = input_ids
    unfinished = input_ids.new_ones(batch)
    # Who goes on with the cache, or looks at scores, finds behind the end of a row what transformers leaves there.
    seen = returned or keep_scores or keep_logits
    rules = None if seen else UsualRules.of(stopping_criteria)
    ends: list[int | None] = [None] * batch  # of rows that the rules have ended
    while True:
        scores = logits_processor(ids[:, :length], logits)
        if all_scores is not None:
            all_scores += (scores.clone(),)
        if all_logits is not None:
            all_logits += (logits.clone(),)
        if config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if pads and rules is None:
            tokens = tokens * unfinished + pad.to(tokens.device) * (1 - unfinished)
        ids[:, length] = tokens
        length += 1
        if rules is None:
            unfinished = unfinished & ~stopping_criteria(ids[:, :length], all_scores)
            news = HostCopy(unfinished.max(), *(() if streamer is None else (tokens,)))
        elif rules.stops or streamer is not None:
            news = HostCopy(tokens)
        else:
            news = HostCopy()
        full = length >= config.max_length
        # A step too many costs less than waiting, but a cache that somebody goes on with must not have seen it.
        early = not full and not returned
        if early:
            logits = step(tokens).to(input_ids.device)
        if rules is None:
            going, *told = news.wait()
        else:
            told = [_note_ends(ends, values, length, rules, pad) for values in news.wait()]
            going = None in ends
        if streamer is not None:
            streamer.put(told[0])
        if full or not bool(going):
            break
        if not early:
            logits = step(tokens).to(input_ids.device)
    if streamer is not None:
        streamer.end()
    sequences = ids[:, :length].clone()
    for row, end in enumerate(ends):
        if end is not None and end < length:
            sequences[row, end:] = pad
    if not returned:
        give_back_cache(model, cache, batch)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=all_scores, logits=all_logits, cache=cache)


def _note_ends(ends: list[int | None], tokens: Tensor, length: int, rules: UsualRules, pad: Tensor | None) -> Tensor:
    """Note which rows end with the newest tokens (batch,); returns these with padding for rows that had ended before."""
    values = tokens.tolist()
    for row, token in enumerate(values):
        if ends[row] is not None:
            # Only an end-of-sequence token ends a row before the others, and padding comes with it.
            assert pad is not None
            values[row] = int(pad)
        elif rules.met(token, length):
            ends[row] = length
    return torch.tensor(values)


class CapturedReader(GrowingReader):
    """Backbone and head on caches of fixed size, in fixed steps. Rows of a batch go on from positions of their own."""

    cache: StaticHybridCache

    most = MOST_DEPTHS + 1  # tokens of the longest step

    def _head_cache(self) -> StaticMTPCache:
        cache = self.cache
        if cache.mtp is None:
            cache.mtp = StaticMTPCache(self.model.config, cache.max_cache_len)
        cache.mtp.reset()
        return cache.mtp

    def begin(self, token: Tensor) -> None:
        cache, config = self.cache, self.model.config
        batch, width, vocab = token.shape[0], config.hidden_size, config.vocab_size
        device, dtype = self.last.device, self.last.dtype
        buffer = cache.graphs.buffer
        self.tokens_read = buffer("drafts", (batch, self.most), torch.long, device)
        self.following = buffer("following", (batch, self.most), torch.long, device)
        self.hidden = buffer("hidden", (batch, self.most, width), dtype, device)
        self.draft = buffer("draft", (batch, 1, width), dtype, device)
        self.draft_token = buffer("draft token", (batch, 1), torch.long, device)
        self.draft_logits = buffer("draft logits", (batch, 1, vocab), torch.float32, device)
        self.read_logits = buffer("read logits", (batch, self.most, vocab), torch.float32, device)
        self.kept = buffer("kept", (batch,), torch.long, device)
        self.accepted = buffer("accepted", (batch,), torch.long, device)
        self.own = buffer("own", (batch,), torch.long, device)
        self.head_slots = self.drafter.cache.slots
        cache.slots.begin(batch, device, self.mask)
        self.head_slots.begin(batch, device, self.drafter.mask)
        ahead = ReadAhead(self.kept)
        for layer in cache.layers:
            if isinstance(layer, StaticMamba2Layer):
                inputs = layer.conv_states[0].shape[1] + config.mamba_num_heads
                if layer.drafts.shape[:2] != (batch, self.most):
                    layer.drafts = torch.zeros(batch, self.most, inputs, dtype=dtype, device=device)
                layer.read_ahead = ahead
        self.ahead = ahead
        _bind(self.model, cache)
        self.kept.fill_(1)
        self.hidden[:, :1] = self.last
        self.following[:, :1] = token.unsqueeze(1)
        # Lengths that the host knows: tokens settled in each row, by backbone and head, and pairs that wait for the head.
        self.lengths, self.head_lengths = [cache.slots.seen] * batch, [self.head_slots.seen] * batch
        self.settled_now, self.drafted = [1] * batch, 0
        self.last_read = 0

    def _reach(self) -> int:
        """Slots for the head's steps of one round."""
        return self.head_slots.reach_for(max(self.head_lengths) + 2 * self.most)

    def first_draft(self) -> Tensor:
        waiting, reach = max(self.settled_now), self._reach()
        self.cache.graphs.run(("first draft", waiting, reach), lambda: self._compute_first(waiting, reach))
        self.head_lengths = [a + b for a, b in zip(self.head_lengths, self.settled_now, strict=True)]
        self.drafted = 0
        return self.draft_logits

    def _compute_first(self, waiting: int, reach: int) -> None:
        slots = self.head_slots
        embeds = self.model.get_input_embeddings()(self.following[:, :waiting])
        with slots.fixed(waiting, reach) as layout:
            hidden = self.model.mtp.apply_depth(0, self.hidden[:, :waiting], embeds, layout, cache=self.drafter.cache)
        newest = (self.kept - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        self._leave_draft(hidden.gather(1, newest))
        slots.positions.add_(self.kept)

    def next_draft(self, token: Tensor) -> Tensor:
        self.draft_token.copy_(token)
        ahead, reach = self.drafted, self._reach()
        self.cache.graphs.run(("next draft", ahead, reach), lambda: self._compute_next(ahead, reach))
        self.drafted += 1
        return self.draft_logits

    def _compute_next(self, ahead: int, reach: int) -> None:
        embeds = self.model.get_input_embeddings()(self.draft_token)
        with self.head_slots.fixed(1, reach, ahead) as layout:
            self._leave_draft(self.model.mtp.apply_depth(0, self.draft, embeds, layout, cache=self.drafter.cache))

    def _leave_draft(self, hidden: Tensor) -> None:
        self.draft.copy_(hidden)
        self.draft_logits.copy_(self.model.get_output_embeddings()(hidden))

    def read(self, tokens: Tensor) -> Tensor:
        count, before = tokens.shape[1], self.last_read
        self.tokens_read[:, :count] = tokens
        reach = self.cache.slots.reach_for(max(self.lengths) + count)
        self.cache.graphs.run(("read", before, count, reach), lambda: self._compute_read(before, count, reach))
        self.last_read = count
        return self.read_logits[:, :count]

    def _compute_read(self, before: int, count: int, reach: int) -> None:
        self.ahead.count = before
        with self.cache.slots.fixed(count, reach) as layout:
            hidden = _backbone(self.model, self.cache, self.tokens_read[:, :count], layout)
        self.hidden[:, :count] = hidden
        self.read_logits[:, :count] = self.model.get_output_embeddings()(hidden)

    def greedy_round(self, token: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draft the likeliest tokens, read them and see how many the backbone would have written, in one step.

        Args:
            token: (batch,), the newest.

        Returns:
            Drafts (batch, depth), the backbone's logits (batch, 1 + depth, vocab), and as of `accept_greedy` the drafts that are
            kept (batch,) and the token behind them (batch,).
        """
        before, count = self.last_read, depth + 1
        self.draft_token.copy_(token.unsqueeze(1))
        reaches = self._reach(), self.cache.slots.reach_for(max(self.lengths) + count)
        self.cache.graphs.run(("round", before, count, *reaches), lambda: self._compute_round(before, count, *reaches))
        self.head_lengths = [a + b for a, b in zip(self.head_lengths, self.settled_now, strict=True)]
        self.drafted, self.last_read = 0, count
        return self.tokens_read[:, 1:count], self.read_logits[:, :count], self.accepted, self.own

    def _compute_round(self, before: int, count: int, head_reach: int, reach: int) -> None:
        self.tokens_read[:, :1] = self.draft_token
        # All that was read goes to the head, so that one recording serves however much of it was kept: what was not is written over.
        self._compute_first(max(before, 1), head_reach)
        for drafted in range(1, count):
            self.draft_token.copy_(self.draft_logits[:, -1].argmax(-1, keepdim=True))
            self.tokens_read[:, drafted : drafted + 1] = self.draft_token
            if drafted + 1 < count:
                self._compute_next(drafted - 1, head_reach)
        self._compute_read(before, count, reach)
        kept, own = accept_greedy(self.tokens_read[:, 1:count], self.read_logits[:, :count])
        self.accepted.copy_(kept)
        self.own.copy_(own)

    def settle(self, kept: list[int], token: Tensor, open_rows: list[int]) -> None:
        # Finished rows stay where they are.
        going = [n + 1 if row in open_rows else 0 for row, n in enumerate(kept)]
        self.kept.copy_(torch.tensor(going))
        self.cache.slots.positions.add_(self.kept)
        self.settled_now = going
        self.lengths = [a + b for a, b in zip(self.lengths, going, strict=True)]
        count = self.last_read
        last = (self.kept - 1).clamp(min=0)
        self.following[:, :count] = tokens_behind(self.tokens_read[:, :count], last, token)

    def finish(self) -> None:
        slots = self.cache.slots
        slots.seen, slots.ragged = max(self.lengths), len(set(self.lengths)) > 1
        self.ahead.count = self.last_read
        for block in self.model.model.layers:
            if block.block_type == "linear_attention":
                layer = self.cache.layers[block.mixer.layer_idx]
                block.mixer.take_drafts(layer)
                layer.read_ahead = None
