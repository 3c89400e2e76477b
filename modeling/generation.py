"""Decoding with the model's own MTP head as the drafter: `generate(use_mtp=True)`.

One step: the head drafts k tokens, applying its one physical layer k times; the backbone reads them all in one call; the
acceptance rule keeps a beginning of them and adds one token of the backbone's own; the caches take back the rest. Greedy
decoding gives the same tokens as without drafts, sampling the same distribution.

The loop is the same for caches that grow and for those of fixed size; what differs is the reader it works on. From a cache of
fixed size, drafts that are always as many, and chosen by their scores alone, are whole rounds of the device, which the host reads
along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache import ROLLBACK_LIMIT, HybridCache
from .captured_decoding import CapturedReader, HostCopy, give_back_cache
from .choosing import Choice, draw
from .drafting import MOST_DEPTHS, GrowingReader
from .prompt import check_room_for, held_tokens
from .speculative import accept, target_tokens
from .static_cache import LONGEST_STEP, StaticHybridCache
from .stopping_rules import UsualRules

_SCHEDULES = ("constant", "heuristic", "heuristic_transient")
# Ways of decoding, and of judging drafts, that are not this loop's.
_OTHER_WAYS = (
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "assistant_ensemble_weight",
    "speculation_type",
)
# Processors that take a call for one more token of the text, and the options that bring them.
_STATEFUL = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
}


@dataclass
class MTPStatistics:
    """How well the drafts did, over all rows.

    Attributes:
        steps: calls of the backbone after the prompt, times the rows still unfinished in each.
        tokens: tokens that these calls yielded.
        drafted, accepted: for each depth, how many tokens were drafted, and kept.
    """

    steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=lambda: [0] * MOST_DEPTHS)
    accepted: list[int] = field(default_factory=lambda: [0] * MOST_DEPTHS)

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens per backbone call and row; 1 is plain decoding."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> list[float]:
        """For each depth used, the share of its drafts that was kept."""
        return [kept / made for kept, made in zip(self.accepted, self.drafted, strict=True) if made]

    def count(self, drafts: int, kept: int, tokens: int) -> None:
        """Note one row's step."""
        self.steps += 1
        self.tokens += tokens
        for depth in range(drafts):
            self.drafted[depth] += 1
            self.accepted[depth] += depth < kept


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output of `generate`, with the acceptance of the drafts.

    Args:
        mtp_statistics: mean tokens per step and acceptance rate per depth.
    """

    mtp_statistics: MTPStatistics | None = None


class _Rows:
    """What each row has written so far: tokens, scores, and whether it is finished.

    As in plain decoding, a finished row is padded where there is an end-of-sequence token; where there is none, it goes
    on until the last row is finished.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        max_length: int,
        choice: Choice | None,
    ):
        batch, length = input_ids.shape
        self.prompt = input_ids
        self.texts: list[list[int]] = [[] for _ in range(batch)]  # behind the prompt
        self.lengths, self.prompt_length = [length] * batch, length
        self.processors, self.criteria, self.max_length = processors, criteria, max_length
        self.choice = choice  # where the processors look at scores alone
        self.scores: list[list[Tensor]] = [[] for _ in self.lengths]
        self.logits: list[list[Tensor]] = [[] for _ in self.lengths]
        self.ends: list[int | None] = [None] * batch  # length at which a row was finished
        self.pads = batch == 1 or any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.usual = UsualRules.of(criteria)
        # Where somebody looks at it, the text lies on the device too. The last step may offer a row more than there is room for.
        self.written: Tensor | None = None
        if choice is None or self.usual is None:
            self.written = input_ids.new_zeros(batch, max(max_length, length) + LONGEST_STEP)
            self.written[:, :length] = input_ids

    def open_rows(self) -> list[int]:
        """Rows that still need tokens."""
        if self.pads:
            return [row for row, end in enumerate(self.ends) if end is None]
        ends = [end for end in self.ends if end is not None]
        length = max(ends) if len(ends) == len(self.ends) else None
        most = self.max_length if length is None else min(length, self.max_length)
        return [row for row, written in enumerate(self.lengths) if written < most]

    def room(self, rows: list[int]) -> int:
        """How many tokens fit into the one of these rows with the most room."""
        return max(self.max_length - self.lengths[row] for row in rows)

    def process(self, logits: Tensor, drafts: Tensor, behind: int = 0) -> Tensor:
        """Scores for (batch, n, vocab) logits, the i-th of which follows a row's tokens and its first `behind + i` drafts."""
        if self.choice is not None:
            return self.choice.scores(logits)
        assert self.written is not None
        scores: Tensor | None = None
        for length in sorted({self.lengths[row] for row in self.open_rows()}):
            # Processors take a batch of one length, and some know its size: rows of another length are stood in for.
            here = [written == length for written in self.lengths]
            any_row = here.index(True)
            ids = self.written[[row if there else any_row for row, there in enumerate(here)], :length]
            chosen = torch.tensor(here, device=logits.device)
            for i in range(logits.shape[1]):
                seen = torch.cat([ids, drafts[:, : behind + i]], dim=1)
                processed = self.processors(seen, logits[:, i].clone())
                if scores is None:  # a processor may give fewer classes, or another dtype
                    scores = logits.new_zeros(*logits.shape[:2], processed.shape[-1])
                scores[chosen, i] = processed[chosen].to(scores.dtype)
        assert scores is not None
        return scores

    def append(
        self, row: int, values: list[int], scores: Tensor | None, logits: Tensor | None, keep: tuple[bool, bool]
    ) -> int:
        """Add tokens until the row is finished; returns how many were added.

        Args:
            scores, logits: (n, vocab), needed where `keep` asks for them.
        """
        start = self.lengths[row]
        if self.written is not None:
            self.written[row, start : start + len(values)] = torch.tensor(values)
        for i, value in enumerate(values):
            length = self.lengths[row] = start + i + 1
            self.texts[row].append(value)
            if keep[0]:
                assert scores is not None
                self.scores[row].append(scores[i].clone())
            if keep[1]:
                assert logits is not None
                self.logits[row].append(logits[i].clone())
            if self.ends[row] is None and self._is_finished(row, value, self.scores[row][-1] if keep[0] else None):
                self.ends[row] = length
                if self.pads:
                    return i + 1
            if length == self.max_length:
                return i + 1
        return len(values)

    def _is_finished(self, row: int, newest: int, scores: Tensor | None) -> bool:
        length = self.lengths[row]
        if self.usual is not None:
            return self.usual.met(newest, length)
        assert self.written is not None
        ids = self.written[row : row + 1, :length]
        return bool(self.criteria(ids, None if scores is None else (scores.unsqueeze(0),)).all())

    def columns(self, start: int, pad_token: Tensor | None) -> list[list[int]]:
        """Tokens of all rows, place by place behind the prompt, from `start` on as far as every row has come."""
        open_rows = self.open_rows()
        end = min(len(self.texts[row]) for row in open_rows) if open_rows else self._longest()
        pad = 0 if pad_token is None else int(pad_token)
        return [[text[place] if place < len(text) else pad for text in self.texts] for place in range(start, end)]

    def _longest(self) -> int:
        """How many tokens lie behind the prompt, when all rows are finished."""
        return max(end for end in self.ends if end is not None) - self.prompt_length

    def sequences(self, pad_token: Tensor | None) -> Tensor:
        """(batch, longest) token ids; finished rows end in padding."""
        longest = self._longest()
        pad = 0 if pad_token is None else int(pad_token)
        texts = [text[:longest] + [pad] * (longest - len(text)) for text in self.texts]
        return torch.cat([self.prompt, torch.tensor(texts, dtype=torch.long).to(self.prompt.device)], dim=1)

    def stacked(self, what: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """One (batch, vocab) tensor per generated position; zeros for rows that had finished before it."""
        length = self._longest()
        blank = next(row[0] for row in what if row).new_zeros(()) if length else None
        return tuple(
            torch.stack([row[i] if i < len(row) else blank.expand_as(what[0][0]) for row in what])
            for i in range(length)
        )


def refuse_several_gpus(model, option: str) -> None:
    """Refuse what works on tensors of one GPU for a model whose layers lie on several.

    Raises:
        ValueError: naming the option and the devices.
    """
    named = {place for place in getattr(model, "hf_device_map", {}).values() if place not in ("cpu", "disk")}
    devices = sorted({f"cuda:{place}" if isinstance(place, int) else str(place) for place in named})
    if len(devices) > 1:
        raise ValueError(
            f"{option} works on one GPU, and this model is spread over {', '.join(devices)}: leave it out, or load the model "
            "onto one of them (`device_map`), packed if it is too large (`quantization_config`)."
        )


def check_mtp_options(model, config: GenerationConfig, assistant_model) -> None:
    """Refuse what decoding with MTP cannot do.

    Raises:
        ValueError: naming the option, and what to do.
    """
    if model.mtp is None:
        raise ValueError(
            "`use_mtp=True` needs a model with multi-token prediction: this one has `num_nextn_predict_layers=0` and no "
            "`mtp.layers.*` tensors. Load a checkpoint that has them, or leave `use_mtp` out."
        )
    refuse_several_gpus(model, "`use_mtp`")
    others = {
        "assistant_model": assistant_model is not None,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": config.assistant_early_exit is not None,
    }
    named = [name for name, given in others.items() if given]
    if named:
        raise ValueError(f"`use_mtp` and `{named[0]}` both draft tokens: give one of them.")
    if config.num_beams != 1:
        raise ValueError(f"`use_mtp` does not work with beam search: `num_beams` is {config.num_beams}, set it to 1.")
    if not config.use_cache:
        raise ValueError("`use_mtp` needs the cache: leave `use_cache` at True.")
    if config.cache_implementation not in (None, "dynamic", "static", "quantized"):
        raise ValueError(
            "`use_mtp` takes tokens back from a cache of our own: `cache_implementation` is "
            f"{config.cache_implementation!r}, it may be 'dynamic', 'static' or 'quantized'."
        )
    if config.compile_config is not None:
        raise ValueError("`use_mtp` compiles nothing: leave `compile_config` out.")
    for name in _OTHER_WAYS:
        if getattr(config, name, None):
            raise ValueError(
                f"`use_mtp` decodes greedily or by sampling, and knows no `{name}`: leave it out, or decode without `use_mtp`."
            )
    if config.num_assistant_tokens_schedule not in _SCHEDULES:
        raise ValueError(
            f"`num_assistant_tokens_schedule` is {config.num_assistant_tokens_schedule!r}: it may be "
            f"{', '.join(map(repr, _SCHEDULES))}."
        )
    depth = config.num_assistant_tokens
    if not isinstance(depth, int) or not 1 <= depth <= MOST_DEPTHS:
        raise ValueError(
            f"`num_assistant_tokens` is {depth}: with `use_mtp` it must be 1 to {MOST_DEPTHS} drafts a step."
        )
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise ValueError(f"`use_mtp` does not collect `{name}`: leave it out, or decode without `use_mtp`.")


def refuse_stateful_processors(processors: LogitsProcessorList) -> None:
    """Refuse those of transformers' that keep a state of the text between calls: drafts are processed, too, and refused.

    Raises:
        ValueError: naming the processor and the option that brings it.
    """
    for processor in processors:
        for kind, option in _STATEFUL.items():
            if isinstance(processor, kind):
                raise ValueError(
                    f"`{option}` adds a {kind.__name__}, which keeps a state that drafts would spoil: it counts every call as a "
                    "token of the text. Leave it out, or decode without drafts."
                )


def generate_with_mtp(
    model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    cache: HybridCache,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    streamer: BaseStreamer | None = None,
) -> Tensor | MTPGenerateOutput:
    """The decoding loop behind `generate(use_mtp=True)`, called by it with everything prepared.

    Args:
        input_ids: (batch, seq) int64; empty where the prompt came as `inputs_embeds`.
        cache: where it holds the beginning of the prompt, only the rest is read.
        attention_mask: (batch, seq) with 0 for padding, or None.
        inputs_embeds: (batch, seq, hidden).

    Returns:
        Token ids (batch, length), or an `MTPGenerateOutput` with `return_dict_in_generate`. A streamer finds the
        statistics as its attribute `mtp_statistics` when `end()` is called.
    """
    config = generation_config
    batch = input_ids.shape[0]
    keep = (
        bool(config.return_dict_in_generate and config.output_scores),
        bool(config.return_dict_in_generate and config.output_logits),
    )
    # A length that the caller brings as a stopping rule stands in for the configuration's, as in plain decoding.
    max_length = stopping_criteria.max_length or config.max_length
    held = held_tokens(cache, config, input_ids, attention_mask, inputs_embeds)
    reader: GrowingReader
    if isinstance(cache, StaticHybridCache):
        prompt = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
        prompt += cache.get_seq_length() - held
        check_room_for(cache, prompt, max_length - input_ids.shape[1], spare=LONGEST_STEP)
        reader = CapturedReader(model, cache, attention_mask)
    else:
        reader = GrowingReader(model, cache, attention_mask)
    choice = Choice.of(config.do_sample, logits_processor)
    rows = _Rows(input_ids, logits_processor, stopping_criteria, max_length, choice)
    statistics = MTPStatistics()
    streamed = 1  # places behind the prompt that the streamer has been given of all rows; the first is below

    def choose(logits: Tensor, drafts: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scores = rows.process(logits, drafts)
        return *accept(drafts, target_tokens(scores, drafts, q)), scores

    def take(
        row: int, right: int, values: list[int], offered: int, scores: Tensor | None, logits: Tensor | None
    ) -> int:
        """Write what a step yields for a row, `right` drafts and a token; returns how many of them it takes."""
        added = rows.append(row, values, scores, logits, keep)
        statistics.count(offered, min(right, added, offered), added)
        if streamer is not None and batch == 1:
            streamer.put(torch.tensor(values[:added]))
        elif streamer is not None:
            # As in plain decoding, one token of every row: a streamer could not tell whose tokens others are.
            nonlocal streamed
            for tokens in rows.columns(streamed, config._pad_token_tensor):
                streamer.put(torch.tensor(tokens))
                streamed += 1
        return added

    logits = reader.read_prompt(
        input_ids[:, held:] if inputs_embeds is None else None,
        None if inputs_embeds is None else inputs_embeds[:, held:],
        config.prefill_chunk_size,
    )
    no_drafts = input_ids.new_empty(batch, 0)
    _, token, scores = choose(logits, no_drafts, logits[:, :0] if config.do_sample else None)
    values = token.tolist()
    for row in range(batch):
        rows.append(row, values[row : row + 1], scores[row], logits[row], keep)
    if streamer is not None:
        streamer.put(token.cpu())
    reader.begin(token)

    depth, schedule = config.num_assistant_tokens, config.num_assistant_tokens_schedule
    threshold = config.assistant_confidence_threshold
    # Always as many drafts, no processor that wants the text, nobody to show logits to: then a round is one step.
    steady = schedule == "constant" and not (threshold or any(keep))
    if isinstance(reader, CapturedReader) and choice is not None and steady:
        _read_along(reader, rows, depth, choice, UsualRules(stopping_criteria).stops, take)
    while open_rows := rows.open_rows():
        # A step yields one token more than it drafts; none may lie behind `max_length`.
        room = rows.room(open_rows)
        drafts, q = _draft(reader, rows, no_drafts, min(depth, room - 1), config.do_sample, threshold)
        logits = reader.read(torch.cat([token.unsqueeze(1), drafts], dim=1))
        kept, token, scores = choose(logits, drafts, q)
        k = drafts.shape[1]

        # How far each row goes: to its first refused draft, or to where it finishes. The host waits here, once a step.
        found = torch.cat([kept.unsqueeze(1), drafts, token.unsqueeze(1)], dim=1)
        going, everything = [0] * batch, True
        for row, (n, *values) in enumerate(found.tolist()):
            if row in open_rows:
                going[row] = take(row, n, [*values[:n], values[k]], k, scores[row], logits[row]) - 1
                everything &= n == k
        if schedule in ("heuristic", "heuristic_transient"):
            depth = min(MOST_DEPTHS, depth + 2) if everything else max(1, depth - 1)
        reader.settle(going, token, open_rows)

    if schedule == "heuristic":
        model.generation_config.num_assistant_tokens = depth  # where the next call begins, as with an assistant model
    reader.finish()
    sequences = rows.sequences(config._pad_token_tensor)
    # Plain decoding has read all of a text but its newest token, with padding behind rows that ended early; drafts may also lie
    # behind the end of the longest.
    cache.ragged = any(length != sequences.shape[1] for length in rows.lengths)
    if streamer is not None:
        streamer.mtp_statistics = statistics
        streamer.end()
    if not config.return_dict_in_generate:
        if isinstance(cache, StaticHybridCache) and not getattr(cache, "_is_user_defined", False):
            give_back_cache(model, cache, batch)
        return sequences
    return MTPGenerateOutput(
        sequences=sequences,
        scores=rows.stacked(rows.scores) if keep[0] else None,
        logits=rows.stacked(rows.logits) if keep[1] else None,
        cache=cache,
        mtp_statistics=statistics,
    )


def _read_along(
    reader: CapturedReader, rows: _Rows, depth: int, choice: Choice, stops: set[int], take: Callable[..., int]
) -> None:
    """Rounds up to the end. Each is launched before the host has seen the one before it.

    Args:
        take: writes a row's tokens, as in `generate_with_mtp`.
    """
    open_rows = rows.open_rows()
    if not open_rows:
        return
    batch = len(rows.lengths)
    reader.begin_rounds([rows.max_length - n if row in open_rows else 0 for row, n in enumerate(rows.lengths)], stops)
    news: HostCopy | None = reader.start_round(depth, choice)
    while news is not None:
        # A round too many keeps nothing, but takes its time: none is launched where this one may reach the length of all rows.
        # What the device does not know ends a row within a round, which must then be the newest.
        room = rows.room(open_rows)
        early = reader.start_round(depth, choice) if rows.usual is not None and room > depth + 1 else None
        (found,) = news.wait()
        going = [0] * batch
        for row, (right, *values) in enumerate(found.tolist()):
            if row in open_rows:
                # Always as many drafts, so that always the same step is replayed: some may have lain behind the length.
                going[row] = take(row, right, values[: right + 1], min(depth, room - 1), None, None)
        reader.note_round(going)
        before, open_rows = open_rows, rows.open_rows()
        if rows.usual is None:
            for row in set(before).difference(open_rows):
                reader.end_row(row, going[row])
        news = (early or reader.start_round(depth, choice)) if open_rows else None


def _draft(
    reader: GrowingReader, rows: _Rows, drafts: Tensor, depth: int, do_sample: bool, threshold: float | None
) -> tuple[Tensor, Tensor | None]:
    """Draft up to `depth` tokens: ids (batch, k) and, when sampling, their distributions (batch, k, vocab).

    Args:
        drafts: (batch, 0) int64, to which they are added.
    """
    chances = []
    logits = reader.first_draft()
    for made in range(depth):
        # The processors see what they will see when the backbone's scores for this position are processed.
        scores = rows.process(logits, drafts, behind=made)[:, -1]
        if do_sample:
            chance = scores.softmax(-1)
            token = draw(chance).unsqueeze(1)
            chances.append(chance)
        else:
            token = scores.argmax(-1, keepdim=True)
        drafts = torch.cat([drafts, token], dim=1)
        if made + 1 == depth:
            break
        if threshold:
            confidence = scores.softmax(-1).gather(1, token).squeeze(1).tolist()
            if all(confidence[row] < threshold for row in rows.open_rows()):
                break
        logits = reader.next_draft(token)
    if not do_sample:
        return drafts, None
    return drafts, torch.stack(chances, dim=1) if chances else logits[:, :0]


assert MOST_DEPTHS < ROLLBACK_LIMIT
