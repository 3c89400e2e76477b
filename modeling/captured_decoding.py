"""Decoding from a cache of fixed size: each step is one replayed CUDA graph, and the host never waits inside it.

Plain decoding (`sample_captured`) takes transformers' own loop apart: prompt, logits processors, sampling and stopping rules
are transformers', only the forward of a token is ours. The next step is launched before the host looks at whether this one
was the last, so that the device has work while the host runs processors and rules. Where processors look at scores alone, as
those of sampling do, the step chooses the token too, and nothing lies between two steps.

Decoding with MTP (`CapturedReader`) answers the calls of `drafting.GrowingReader` with three kinds of steps: the head on what
was settled, the head on a draft, and the backbone on a token and its drafts; or all of a round as one, where it always drafts as
many tokens, and chooses them by their scores alone: then the device decides what is kept and where each row ends, and the host
reads along. Taking drafts back is a smaller position for attention, and for Mamba-2 a replay of the kept inputs at the beginning of the next step.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from ..kernels_hub.registry import keep_drafts
from .choosing import Choice, draw
from .drafting import GrowingReader, tokens_behind
from .prompt import check_room_for, held_tokens
from .speculative import target_tokens
from .static_cache import LONGEST_STEP, ReadAhead, StaticHybridCache, StaticMamba2Layer, StaticMTPCache, round_up
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


@contextlib.contextmanager
def idle_caches_aside(model) -> Iterator[None]:
    """Inside, no cache of an earlier call is borrowed, and those that are left here are freed."""
    aside = _idle.pop(model, None)
    try:
        yield
    finally:
        forget_idle_caches(model)
        if aside is not None:
            _idle[model] = aside


def _cache_kind(model, batch: int, kv_dtype: torch.dtype | None) -> tuple:
    # Tensors made in inference mode cannot be written to outside of it, and autocast makes keys of another dtype.
    kind = model.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return batch, kv_dtype, model.dtype, model.device, torch.is_inference_mode_enabled(), autocast


def _bind(model, cache: StaticHybridCache, tokens: int) -> None:
    cache.graphs.bind(model, tokens)
    if cache.graphs.reason is not None and model.device.type == "cuda":
        logger.warning_once(f"Decoding steps are not recorded as CUDA graphs: {cache.graphs.reason}.")


class DecodeStep:
    """One token for every row: `step(tokens)` gives the logits of the next, (batch, vocab) float32, in a buffer of its own.

    `follow` goes on by itself, from the tokens (batch, 1) in the buffer `tokens`, which it replaces by those chosen behind them.

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
        _bind(model, cache, batch)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens.unsqueeze(1))
        self._run("token", lambda logits: self.logits.copy_(logits[:, 0]))
        return self.logits

    def follow(self, choice: Choice) -> None:
        """Read the tokens in the buffer, and put those chosen behind them in their place."""
        self._run(("chosen token", choice.key), lambda logits: choice.choose(logits, self.tokens))

    def _run(self, name: Hashable, leave: Callable[[Tensor], object]) -> None:
        slots = self.cache.slots
        reach = slots.reach_for(slots.seen + 1)
        self.cache.graphs.run((name, reach), lambda: self.compute(reach, leave))
        slots.seen += 1

    def compute(self, reach: int, leave: Callable[[Tensor], object]) -> None:
        """What is recorded, without the host: from `tokens` to logits (batch, 1, vocab), which are left to `leave`."""
        slots, model = self.cache.slots, self.model
        with slots.fixed(1, reach) as layout:
            hidden = _backbone(model, self.cache, self.tokens, layout)
        assert slots.positions is not None
        slots.positions.add_(1)
        leave(model.get_output_embeddings()(hidden))


def _backbone(model, cache: StaticHybridCache, tokens: Tensor, layout) -> Tensor:
    embeds = model.get_input_embeddings()(tokens)
    return model.model(inputs_embeds=embeds, cache=cache, use_cache=True, layout=layout).last_hidden_state


class HostCopy:
    """Values on their way from the device; the host waits for them alone, not for what was launched after them."""

    def __init__(self, *values: Tensor):
        # On a CPU too a copy: the next step may write over the values.
        self._copies = [value.to("cpu", non_blocking=True, copy=True) for value in values]
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
    # A length that the caller brings as a stopping rule stands in for the configuration's, as in transformers' loop.
    max_length = stopping_criteria.max_length or config.max_length
    prompt = length if embeds is None else embeds.shape[1]
    prompt += cache.get_seq_length() - held_tokens(
        cache, config, input_ids, model_kwargs.get("attention_mask"), embeds
    )
    check_room_for(cache, prompt, max_length - length)
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

    unfinished = input_ids.new_ones(batch)
    # Who goes on with the cache, or looks at scores, finds behind the end of a row what transformers leaves there.
    seen = returned or keep_scores or keep_logits
    rules = None if seen else UsualRules.of(stopping_criteria)
    ends: list[int | None] = [None] * batch  # of rows that the rules have ended
    # Where nothing but the length and the newest token is asked for, the device need not know the text.
    choice = None if rules is None else Choice.of(config.do_sample, logits_processor)
    ids = input_ids.new_empty(batch, max_length if choice is None else 0)
    ids[:, :length] = input_ids[:, : ids.shape[1]]
    written: list[Tensor] = []  # (batch,) each, on the host

    numbers = _generator(input_ids.device) if config.do_sample else None

    def go_on() -> Tensor | None:
        """Logits behind the newest tokens; None where the step itself chooses the next."""
        if choice is not None:
            step.follow(choice)
            return None
        return step(tokens).to(input_ids.device)

    while True:
        if logits is not None:
            scores = logits_processor(ids[:, :length], logits)
            if all_scores is not None:
                all_scores += (scores.clone(),)
            if all_logits is not None:
                all_logits += (logits.clone(),)
            if config.do_sample:
                tokens = draw(scores.softmax(-1))
            else:
                tokens = scores.argmax(-1)
            if pads and rules is None:
                tokens = tokens * unfinished + pad.to(tokens.device) * (1 - unfinished)
            if choice is not None:
                tokens = step.tokens.copy_(tokens.unsqueeze(1)).squeeze(1)  # from here on they are the step's own
            else:
                ids[:, length] = tokens
        length += 1
        if rules is None:
            unfinished = unfinished & ~stopping_criteria(ids[:, :length], all_scores)
            news = HostCopy(tokens, unfinished.max())
        else:
            news = HostCopy(tokens)
        full = length >= max_length
        # A step too many costs less than waiting, but a cache that somebody goes on with must not have seen it.
        early = not full and not returned
        if early:
            state = numbers.get_state() if numbers is not None else None
            logits = go_on()
        told, *still_open = news.wait()
        if rules is None:
            going = bool(still_open[0])
        else:
            told = _note_ends(ends, told, length, rules, pad)
            going = None in ends
        written.append(told)
        if streamer is not None:
            streamer.put(told)
        if full or not going:
            if early and numbers is not None:
                numbers.set_state(state)  # what a step too many has drawn, the next call draws
            break
        if not early:
            logits = go_on()
    if streamer is not None:
        streamer.end()
    sequences = torch.cat([input_ids, torch.stack(written, 1).to(input_ids.device)], 1)
    if not returned:
        give_back_cache(model, cache, batch)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=all_scores, logits=all_logits, cache=cache)


def _generator(device: torch.device) -> torch.Generator:
    """Where a device takes its random numbers from, unless told otherwise."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


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
        # Of the last step: the newest token and its drafts, what comes behind each, and the backbone's outputs.
        self.tokens = buffer("drafts", (batch, LONGEST_STEP), torch.long, device)
        self.news = buffer("news", (batch, 1 + LONGEST_STEP), torch.long, device)
        self.accepted, self.following = self.news[:, 0], self.news[:, 1:]
        self.hidden = buffer("hidden", (batch, LONGEST_STEP, width), dtype, device)
        # How many of them a row keeps, and the place of the last that it keeps.
        self.kept = buffer("kept", (batch,), torch.long, device)
        self.newest = buffer("newest", (batch,), torch.long, device)
        self.draft = buffer("draft", (batch, 1, width), dtype, device)
        self.draft_logits = buffer("draft logits", (batch, 1, vocab), torch.float32, device)
        self.read_logits = buffer("read logits", (batch, LONGEST_STEP, vocab), torch.float32, device)
        self.shift = buffer("shift", (1,), torch.long, device)
        self.head_slots = self.drafter.cache.slots
        cache.slots.begin(batch, device, self.mask)
        self.head_slots.begin(batch, device, self.drafter.mask)
        self.ahead = ReadAhead(self.kept)
        for layer in cache.layers:
            if isinstance(layer, StaticMamba2Layer):
                inputs = layer.conv_states[0].shape[1] + config.mamba_num_heads
                if layer.drafts.shape[:2] != (batch, LONGEST_STEP):
                    layer.drafts = torch.zeros(batch, LONGEST_STEP, inputs, dtype=dtype, device=device)
                layer.read_ahead = self.ahead
        _bind(self.model, cache, batch * LONGEST_STEP)
        # Of the prompt only the last position waits for the head, and nothing for the states.
        self.kept.zero_()
        self.newest.zero_()
        self.hidden[:, :1] = self.last
        self.tokens[:, 0] = self.following[:, 0] = token
        # The head has no slots for what the cache held before this prompt; else a position has the same slot in both.
        self.head_shift = self.head_slots.seen + 1 - cache.slots.seen
        self.shift.fill_(self.head_shift)
        self.lengths = [cache.slots.seen] * batch  # of each row's settled tokens
        self.last_read = self.drafted = self.under_way = 0

    def _reaches(self, count: int) -> tuple[int, int]:
        """Slots for the head's steps and the backbone's, up to and with one that reads `count` tokens."""
        slots = max(self.lengths) + count
        return self.head_slots.reach_for(slots + self.head_shift), self.cache.slots.reach_for(slots)

    def first_draft(self) -> Tensor:
        # All that was read goes to the head, so that one recording serves however much of it was kept: what was not is written over.
        waiting, (reach, _) = max(self.last_read, 1), self._reaches(LONGEST_STEP)
        self.cache.graphs.run(
            ("first draft", waiting, reach), lambda: self._leave_draft(self._compute_first(waiting, reach))
        )
        self.drafted = 0
        return self.draft_logits

    def _compute_first(self, waiting: int, reach: int) -> Tensor:
        slots = self.head_slots
        embeds = self.model.get_input_embeddings()(self.following[:, :waiting])
        with slots.fixed(waiting, reach) as layout:
            hidden = self.model.mtp.apply_depth(0, self.hidden[:, :waiting], embeds, layout, cache=self.drafter.cache)
        torch.add(self.cache.slots.positions, self.shift, out=slots.positions)
        return hidden.gather(1, self.newest.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1]))

    def next_draft(self, token: Tensor) -> Tensor:
        self.drafted += 1
        made, (reach, _) = self.drafted, self._reaches(LONGEST_STEP)
        self.tokens[:, made : made + 1] = token
        self.cache.graphs.run(
            ("next draft", made, reach), lambda: self._leave_draft(self._compute_next(self.draft, made, reach))
        )
        return self.draft_logits

    def _compute_next(self, hidden: Tensor, made: int, reach: int) -> Tensor:
        embeds = self.model.get_input_embeddings()(self.tokens[:, made : made + 1])
        with self.head_slots.fixed(1, reach, made - 1) as layout:
            return self.model.mtp.apply_depth(0, hidden, embeds, layout, cache=self.drafter.cache)

    def _leave_draft(self, hidden: Tensor) -> None:
        self.draft.copy_(hidden)
        self.draft_logits.copy_(self.model.get_output_embeddings()(hidden))

    def read(self, tokens: Tensor) -> Tensor:
        count, before = tokens.shape[1], self.last_read
        self.tokens[:, :count] = tokens
        _, reach = self._reaches(count)
        logits = self.read_logits[:, :count]
        self.cache.graphs.run(
            ("read", before, count, reach), lambda: logits.copy_(self._compute_read(before, count, reach))
        )
        self.last_read = count
        return logits

    def _compute_read(self, before: int, count: int, reach: int) -> Tensor:
        self.ahead.count = before
        with self.cache.slots.fixed(count, reach) as layout:
            hidden = _backbone(self.model, self.cache, self.tokens[:, :count], layout)
        self.hidden[:, :count] = hidden
        return self.model.get_output_embeddings()(hidden)

    def settle(self, kept: list[int], token: Tensor, open_rows: list[int]) -> None:
        # Finished rows stay where they are.
        going = [n + 1 if row in open_rows else 0 for row, n in enumerate(kept)]
        self.kept.copy_(torch.tensor(going))
        self.newest.copy_((self.kept - 1).clamp(min=0))
        self.cache.slots.positions.add_(self.kept.unsqueeze(1))
        self.lengths = [a + b for a, b in zip(self.lengths, going, strict=True)]
        count = self.last_read
        self.following[:, :count] = tokens_behind(self.tokens[:, :count], self.newest, token)

    def begin_rounds(self, room: list[int], stops: set[int]) -> None:
        """Whole rounds follow. The device alone knows where a row goes on; the host is told, and may be some rounds behind.

        Args:
            room: how many tokens each row may still take; a row that has ended, none.
            stops: tokens that end a row.
        """
        buffer, device = self.cache.graphs.buffer, self.tokens.device
        self.room = buffer("room", (len(room),), torch.long, device)
        self.room.copy_(torch.tensor(room))
        # Of few sizes, since another one is recorded anew.
        self.stops = buffer("stops", (-(-max(len(stops), 1) // 16) * 16,), torch.long, device)
        self.stops.fill_(-1)
        self.stops[: len(stops)] = torch.tensor(sorted(stops), dtype=torch.long)

    def start_round(self, depth: int, choice: Choice) -> HostCopy:
        """Draft tokens, read them, and keep those that the backbone writes too, in one step.

        Returns:
            (batch, 1 + LONGEST_STEP) int64: how many of the `depth` drafts were right, and what the backbone writes behind the
            newest token and behind each of them.
        """
        count = depth + 1
        self.under_way += 1
        reaches = self._reaches(self.under_way * count)
        self.cache.graphs.run(
            ("round", count, *reaches, choice.key), lambda: self._compute_round(count, *reaches, choice)
        )
        self.last_read = count
        return HostCopy(self.news)

    def _compute_round(self, count: int, head_reach: int, reach: int, choice: Choice) -> None:
        logits_of = self.model.get_output_embeddings()
        hidden, chances = self._compute_first(count, head_reach), []
        for made in range(1, count):
            if made > 1:
                hidden = self._compute_next(hidden, made - 1, head_reach)
            chances.append(choice.choose(logits_of(hidden), self.tokens[:, made : made + 1]))
        q = torch.cat(chances, 1) if choice.drawn else None
        own = self.following[:, :count]
        # In the first round too: no row keeps anything of what was read before it.
        scores = choice.scores(self._compute_read(count, count, reach))
        target_tokens(scores, self.tokens[:, 1:count], q, own)
        positions = self.cache.slots.positions
        keep_drafts(
            self.tokens[:, :count], own, self.stops, self.room, self.kept, self.newest, positions, self.accepted
        )

    def note_round(self, going: list[int]) -> None:
        """The host has seen the oldest round that was under way: how many tokens each row has taken."""
        self.under_way -= 1
        self.lengths = [a + b for a, b in zip(self.lengths, going, strict=True)]

    def end_row(self, row: int, taken: int) -> None:
        """A row ends within the newest round, which the host has seen, for a reason that the device does not know.

        Args:
            taken: how many of the round's tokens it takes.
        """
        self.room[row] = 0
        self.kept[row] = taken

    def finish(self) -> None:
        self.cache.slots.seen = max(self.lengths)
        self.ahead.count = self.last_read
        for block in self.model.model.layers:
            if block.block_type == "linear_attention":
                layer = self.cache.layers[block.mixer.layer_idx]
                block.mixer.take_drafts(layer)
                layer.read_ahead = None
