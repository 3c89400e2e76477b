"""Decoding with the model's own MTP head as the drafter: `generate(use_mtp=True)`.

One step: the head drafts k tokens, applying its one physical layer k times; the backbone reads them all in one call; the
acceptance rule keeps a beginning of them and adds one token of the backbone's own; the caches take back the rest. Greedy
decoding gives the same tokens as without drafts, sampling the same distribution.

Rows of a batch keep different numbers of drafts. The Mamba-2 states follow each row; attention keys that only some rows
keep stay in the cache, masked, which costs nothing but room since positions are not encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache import ROLLBACK_LIMIT, HybridCache, MTPCache
from .speculative import accept_greedy, accept_sampled
from .token_layout import describe_tokens

MOST_DEPTHS = 7


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


class Drafter:
    """The MTP head with its own cache: fed what the backbone has settled, it drafts what may follow.

    All drafts come from the first physical depth, applied repeatedly, as the released models are trained.
    """

    def __init__(self, model):
        self.model, self.cache = model, MTPCache(model.config)
        self.mask: Tensor | None = None  # (batch, positions), where some rows have nothing; None while all have
        self.drafted = 0

    def feed(self, hidden_states: Tensor, next_embeds: Tensor, real: Tensor | None = None) -> Tensor:
        """Apply the head to (batch, seq, hidden) pairs of a position's output and the embedding of the token after it.

        Args:
            real: (batch, seq) bool, which pairs are there; None for all.
        """
        model, past = self.model, self.cache.get_seq_length()
        if self.mask is not None or real is not None:
            batch, length = hidden_states.shape[:2]
            before = hidden_states.new_ones(batch, past, dtype=torch.bool) if self.mask is None else self.mask
            here = hidden_states.new_ones(batch, length, dtype=torch.bool) if real is None else real
            self.mask = torch.cat([before, here], dim=1)
        layout = describe_tokens(model.config, hidden_states, self.mask, None, self.cache, None, None)
        out = model.mtp.apply_depth(0, hidden_states, next_embeds, layout, cache=self.cache)
        self.cache.note_tokens(hidden_states.shape[1])
        return out

    def feed_draft(self, hidden_states: Tensor, token: Tensor) -> Tensor:
        """One more position, from a drafted token (batch, 1): to be taken back."""
        self.drafted += 1
        return self.feed(hidden_states, self.model.get_input_embeddings()(token))

    def take_back_drafts(self) -> None:
        """Forget what `feed_draft` fed: the backbone's own outputs come in its place."""
        if self.drafted:
            self.cache.crop(-self.drafted)
            self.mask = None if self.mask is None else self.mask[:, : -self.drafted]
            self.drafted = 0


class _Rows:
    """What each row has written so far: tokens, scores, and whether it is finished.

    As in plain decoding, a finished row is padded where there is an end-of-sequence token; where there is none, it goes
    on until the last row is finished.
    """

    def __init__(self, input_ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList):
        self.ids = list(input_ids)
        self.prompt_length = input_ids.shape[1]
        self.processors, self.criteria = processors, criteria
        self.scores: list[list[Tensor]] = [[] for _ in self.ids]
        self.logits: list[list[Tensor]] = [[] for _ in self.ids]
        self.ends: list[int | None] = [None] * len(self.ids)  # length at which a row was finished
        self.pads = len(self.ids) == 1 or any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    def open_rows(self) -> list[int]:
        """Rows that still need tokens."""
        if self.pads:
            return [row for row, end in enumerate(self.ends) if end is None]
        ends = [end for end in self.ends if end is not None]
        length = max(ends) if len(ends) == len(self.ends) else None
        return [row for row, ids in enumerate(self.ids) if length is None or len(ids) < length]

    def process(self, logits: Tensor, drafts: Tensor) -> Tensor:
        """Scores for (batch, n, vocab) logits, the i-th of which follows a row's tokens and its first i drafts."""
        if not self.processors:
            return logits
        scores = logits.clone()
        lengths = torch.tensor([len(ids) for ids in self.ids])
        for length in lengths[self.open_rows()].unique().tolist():
            # Processors take a batch of one length, and some know its size: rows of another length are stood in for.
            here = (lengths == length).tolist()
            any_row = here.index(True)
            ids = torch.stack([self.ids[row if there else any_row] for row, there in enumerate(here)])
            chosen = torch.tensor(here, device=logits.device)
            for i in range(logits.shape[1]):
                processed = self.processors(torch.cat([ids, drafts[:, :i]], dim=1), logits[:, i].clone())
                scores[chosen, i] = processed[chosen]
        return scores

    def append(self, row: int, tokens: Tensor, scores: Tensor, logits: Tensor, keep: tuple[bool, bool]) -> int:
        """Add tokens until the row is finished; returns how many were added."""
        for i in range(len(tokens)):
            self.ids[row] = torch.cat([self.ids[row], tokens[i : i + 1]])
            if keep[0]:
                self.scores[row].append(scores[i])
            if keep[1]:
                self.logits[row].append(logits[i])
            if self.ends[row] is None:
                done = self.criteria(self.ids[row].unsqueeze(0), (scores[i].unsqueeze(0),) if keep[0] else None)
                if bool(done.all()):
                    self.ends[row] = len(self.ids[row])
                    if self.pads:
                        return i + 1
        return len(tokens)

    def sequences(self, pad_token: Tensor | None) -> Tensor:
        """(batch, longest) token ids; finished rows end in padding."""
        longest = max(end for end in self.ends if end is not None)
        pad = 0 if pad_token is None else int(pad_token)
        # A negative padding cuts.
        return torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids)), value=pad) for ids in self.ids])

    def stacked(self, what: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """One (batch, vocab) tensor per generated position; zeros for rows that had finished before it."""
        length = max(end for end in self.ends if end is not None) - self.prompt_length
        blank = next(row[0] for row in what if row).new_zeros(()) if length else None
        return tuple(
            torch.stack([row[i] if i < len(row) else blank.expand_as(what[0][0]) for row in what])
            for i in range(length)
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
    if config.cache_implementation not in (None, "dynamic", "quantized"):
        raise ValueError(
            f"`use_mtp` takes tokens back from a dynamic cache: `cache_implementation` is {config.cache_implementation!r}."
        )
    depth = config.num_assistant_tokens
    if not isinstance(depth, int) or not 1 <= depth <= MOST_DEPTHS:
        raise ValueError(
            f"`num_assistant_tokens` is {depth}: with `use_mtp` it must be 1 to {MOST_DEPTHS} drafts a step."
        )
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise ValueError(f"`use_mtp` does not collect `{name}`: leave it out, or decode without `use_mtp`.")


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
    config, mask = generation_config, attention_mask
    if not isinstance(cache, HybridCache):
        raise ValueError(
            f"`use_mtp` works on a `HybridCache`, got {type(cache).__name__}: leave `cache` out or give one."
        )
    batch, device = input_ids.shape[0], input_ids.device
    keep = (
        bool(config.return_dict_in_generate and config.output_scores),
        bool(config.return_dict_in_generate and config.output_logits),
    )
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows, drafter, statistics = _Rows(input_ids, logits_processor, stopping_criteria), Drafter(model), MTPStatistics()

    def backbone(embeds: Tensor) -> Tensor:
        seen = cache.get_seq_length() + embeds.shape[1]
        return model.model(
            inputs_embeds=embeds, attention_mask=None if mask is None else mask[:, :seen], cache=cache, use_cache=True
        ).last_hidden_state

    def float_logits(hidden_states: Tensor) -> Tensor:
        return head(hidden_states).to(torch.float32)

    # The prompt, in chunks if asked. The head follows one token behind: it needs the token after each position.
    past = cache.get_seq_length()
    prompt = inputs_embeds[:, past:] if inputs_embeds is not None else embed(input_ids[:, past:])
    real = None if mask is None else mask[:, past:].bool()
    last = None
    chunk = config.prefill_chunk_size or prompt.shape[1]
    for start in range(0, prompt.shape[1], chunk):
        end = min(start + chunk, prompt.shape[1])
        hidden = backbone(prompt[:, start:end])
        pairs = hidden if last is None else torch.cat([last, hidden], dim=1)
        first = start if last is None else start - 1
        last = hidden[:, -1:]
        if pairs.shape[1] > 1:
            there = None if real is None else real[:, first : end - 1]
            drafter.feed(pairs[:, :-1], prompt[:, first + 1 : end], there)
    cache.activate_past_recording()

    def choose(logits: Tensor, drafts: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scores = rows.process(logits, drafts)
        if config.do_sample:
            return *accept_sampled(drafts, q if q is not None else logits[:, :0], scores), scores
        return *accept_greedy(drafts, scores), scores

    logits = float_logits(last)
    no_drafts = input_ids.new_empty(batch, 0)
    _, token, scores = choose(logits, no_drafts, None)
    for row in range(batch):
        rows.append(row, token[row : row + 1], scores[row], logits[row], keep)
    if streamer is not None:
        streamer.put(token.cpu())
    settled, following, there = last, token.unsqueeze(1), None

    depth, schedule = config.num_assistant_tokens, config.num_assistant_tokens_schedule
    threshold = config.assistant_confidence_threshold
    while open_rows := rows.open_rows():
        # A step yields one token more than it drafts; none may lie behind `max_length`.
        room = max(config.max_length - len(rows.ids[row]) for row in open_rows)
        drafts, q = _draft(drafter, rows, settled, following, there, min(depth, room - 1), config.do_sample, threshold)
        k = drafts.shape[1]

        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(batch, k + 1)], dim=1)
        hidden = backbone(embed(torch.cat([token.unsqueeze(1), drafts], dim=1)))
        logits = float_logits(hidden)
        kept, token, scores = choose(logits, drafts, q)

        # How far each row goes: to its first refused draft, or to where it finishes.
        going = torch.zeros(batch, dtype=torch.long)
        for row in open_rows:
            n = int(kept[row])
            new = torch.cat([drafts[row, :n], token[row : row + 1]])
            added = rows.append(row, new, scores[row], logits[row], keep)
            statistics.count(k, min(n, added), added)
            going[row] = added - 1
            if streamer is not None:
                streamer.put(new[:added].cpu().unsqueeze(0))
        if schedule in ("heuristic", "heuristic_transient"):
            everything = all(int(kept[row]) == k for row in open_rows)
            depth = min(MOST_DEPTHS, depth + 2) if everything else max(1, depth - 1)
        for row in range(batch):  # rows that were finished before hold nobody up
            going[row] = going[row] if row in open_rows else going[open_rows].max()

        back = k - going
        common = int(back.min())
        cache.crop(-back.to(device) if int(back.max()) > common else -common)
        drafter.take_back_drafts()
        longest = int(going.max()) + 1
        there = None
        if int(back.max()) > common:
            there = torch.arange(longest) <= going.unsqueeze(1)
            there = there.to(device)
            if mask is None:
                mask = torch.ones(batch, cache.get_seq_length() - longest, dtype=torch.long, device=device)
                mask = torch.cat([mask, there.to(mask.dtype)], dim=1)
            else:
                mask = torch.cat([mask[:, : mask.shape[1] - (k + 1)], there.to(mask.dtype)], dim=1)
        elif mask is not None:
            mask = mask[:, : mask.shape[1] - common]
        settled = hidden[:, :longest]
        following = torch.cat([drafts, token.unsqueeze(1)], dim=1)[:, :longest].clone()
        following.scatter_(1, going.to(device).clamp(max=longest - 1).unsqueeze(1), token.unsqueeze(1))

    if streamer is not None:
        streamer.mtp_statistics = statistics
        streamer.end()
    sequences = rows.sequences(config._pad_token_tensor)
    if not config.return_dict_in_generate:
        return sequences
    return MTPGenerateOutput(
        sequences=sequences,
        scores=rows.stacked(rows.scores) if keep[0] else None,
        logits=rows.stacked(rows.logits) if keep[1] else None,
        cache=cache,
        mtp_statistics=statistics,
    )


def _draft(
    drafter: Drafter,
    rows: _Rows,
    settled: Tensor,
    following: Tensor,
    there: Tensor | None,
    depth: int,
    do_sample: bool,
    threshold: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Draft up to `depth` tokens: ids (batch, k) and, when sampling, their distributions (batch, k, vocab).

    Args:
        settled: (batch, n, hidden), the backbone's outputs at the positions settled by the last step.
        following: (batch, n) the tokens after those positions.
        there: (batch, n) bool, which of them each row has; always a beginning. None for all.
    """
    model = drafter.model
    drafts, chances = following[:, :0], []
    hidden = drafter.feed(settled, model.get_input_embeddings()(following), there)
    if there is None:
        hidden = hidden[:, -1:]
    else:
        newest = (there.long().sum(1) - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        hidden = hidden.gather(1, newest)
    for made in range(depth):
        logits = model.get_output_embeddings()(hidden).to(torch.float32)
        # The processors see what they will see when the backbone's scores for this position are processed.
        scores = rows.process(logits.expand(-1, made + 1, -1), drafts)[:, -1] if rows.processors else logits[:, -1]
        if do_sample:
            chance = scores.softmax(-1)
            token = torch.multinomial(chance, 1)
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
        hidden = drafter.feed_draft(hidden, token)
    return drafts, torch.stack(chances, dim=1) if chances else None


assert MOST_DEPTHS < ROLLBACK_LIMIT
