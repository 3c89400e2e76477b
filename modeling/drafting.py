"""The MTP head as drafter, beside the backbone that reads its drafts, on caches that grow.

What a decoding loop asks of a reader: `read_prompt`, `begin`, then in turns `first_draft`, `next_draft` as often as wanted,
`read` and `settle`. `captured_decoding.py` answers the same calls from caches of fixed size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import HybridCache, MTPCache
from .token_layout import describe_tokens

MOST_DEPTHS = 7


class Drafter:
    """The MTP head with its own cache: fed what the backbone has settled, it drafts what may follow.

    All drafts come from the first physical depth, applied repeatedly, as the released models are trained.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
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


class GrowingReader:
    """Backbone and head on caches that grow; what drafts leave behind is taken back with `crop`.

    Rows of a batch keep different numbers of drafts. The Mamba-2 states follow each row; attention keys that only some rows
    keep stay in the cache, masked, which costs nothing but room since positions are not encoded. `finish` takes them out.

    Args:
        cache: where it holds the beginning of the prompt, only the rest is read.
        attention_mask: (batch, seq) with 0 for padding, or None.
    """

    def __init__(self, model, cache: HybridCache, attention_mask: Tensor | None):
        self.model, self.cache, self.mask = model, cache, attention_mask
        self.drafter = Drafter(model, self._head_cache())
        self.recorded = any(getattr(layer, "record_past", False) for layer in cache.layers)

    def _head_cache(self):
        return MTPCache(self.model.config)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(batch, n, hidden) -> (batch, n, vocab) float32."""
        return self.model.get_output_embeddings()(hidden_states).to(torch.float32)

    def _backbone(self, embeds: Tensor) -> Tensor:
        seen = self.cache.get_seq_length() + embeds.shape[1]
        mask = None if self.mask is None else self.mask[:, :seen]
        return self.model.model(
            inputs_embeds=embeds, attention_mask=mask, cache=self.cache, use_cache=True
        ).last_hidden_state

    def read_prompt(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, chunk: int | None) -> Tensor:
        """Read a prompt, or what of it the cache does not hold yet, in chunks if asked.

        Args:
            input_ids: (batch, seq); or `inputs_embeds` (batch, seq, hidden).

        Returns:
            Logits behind the last position, (batch, 1, vocab) float32.
        """
        past = self.cache.get_seq_length()
        embed = self.model.get_input_embeddings()
        prompt = inputs_embeds if inputs_embeds is not None else embed(input_ids)
        real = None if self.mask is None else self.mask[:, past:].bool()
        last = None
        chunk = chunk or prompt.shape[1]
        # The head follows one token behind: it needs the token after each position.
        for start in range(0, prompt.shape[1], chunk):
            end = min(start + chunk, prompt.shape[1])
            hidden = self._backbone(prompt[:, start:end])
            pairs = hidden if last is None else torch.cat([last, hidden], dim=1)
            first = start if last is None else start - 1
            last = hidden[:, -1:]
            if pairs.shape[1] > 1:
                there = None if real is None else real[:, first : end - 1]
                self.drafter.feed(pairs[:, :-1], prompt[:, first + 1 : end], there)
        assert last is not None
        self.last = last
        return self.logits(last)

    def begin(self, token: Tensor) -> None:
        """The prompt is read and `token` (batch,) chosen behind it."""
        self.cache.activate_past_recording()
        self.settled, self.following, self.there = self.last, token.unsqueeze(1), None
        self.batch, self.device = token.shape[0], token.device
        self.prompt_length = self.cache.get_seq_length()

    def first_draft(self) -> Tensor:
        """Logits of the first draft, (batch, 1, vocab) float32, from everything that is settled."""
        embeds = self.model.get_input_embeddings()(self.following)
        hidden = self.drafter.feed(self.settled, embeds, self.there)
        if self.there is None:
            self.draft = hidden[:, -1:]
        else:
            newest = (self.there.long().sum(1) - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
            self.draft = hidden.gather(1, newest)
        return self.logits(self.draft)

    def next_draft(self, token: Tensor) -> Tensor:
        """Logits of one more draft, (batch, 1, vocab), behind the drafted `token` (batch, 1)."""
        self.draft = self.drafter.feed_draft(self.draft, token)
        return self.logits(self.draft)

    def read(self, tokens: Tensor) -> Tensor:
        """The backbone's logits (batch, 1 + k, vocab) float32 at `tokens` (batch, 1 + k): the newest, and k drafts."""
        self.tokens = tokens
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], dim=1)
        self.hidden = self._backbone(self.model.get_input_embeddings()(tokens))
        return self.logits(self.hidden)

    def settle(self, kept: list[int], token: Tensor, open_rows: list[int]) -> None:
        """Each row keeps its first `kept` drafts, and goes on with `token` (batch,); the rest is taken back.

        Args:
            open_rows: rows that are not finished; the others keep nothing, not even the token before the drafts.
        """
        most = max(kept[row] for row in open_rows)
        going = torch.tensor([n if row in open_rows else -1 for row, n in enumerate(kept)])
        length = self.tokens.shape[1]
        back = length - 1 - going
        common = int(back.min())
        ragged = int(back.max()) > common
        self.cache.crop(-back.to(self.device) if ragged else -common)
        self.drafter.take_back_drafts()
        longest = most + 1
        self.there = None
        if ragged:
            self.there = (torch.arange(longest) <= going.unsqueeze(1)).to(self.device)
            if self.mask is None:
                before = self.cache.get_seq_length() - longest
                self.mask = torch.ones(self.batch, before, dtype=torch.long, device=self.device)
            else:
                self.mask = self.mask[:, : self.mask.shape[1] - length]
            self.mask = torch.cat([self.mask, self.there.to(self.mask.dtype)], dim=1)
        elif self.mask is not None:
            self.mask = self.mask[:, : self.mask.shape[1] - common]
        self.settled = self.hidden[:, :longest]
        self.following = tokens_behind(self.tokens, going.clamp(min=0).to(self.device), token)[:, :longest]

    def finish(self) -> None:
        """No more drafts: where all rows have come equally far, leave the cache as plain decoding would."""
        if self.mask is not None:
            there = self.mask != 0
            there[:, : self.prompt_length] = True  # padding stays where it was
            counts = there.sum(1)
            if not bool(there.all()) and bool((counts == counts[0]).all()):
                self.cache.keep_positions(there)
        for block in self.model.model.layers:
            if block.block_type == "linear_attention":
                block.mixer.settle(self.cache)
                self.cache.layers[block.mixer.layer_idx].record_past = self.recorded


def tokens_behind(tokens: Tensor, going: Tensor, token: Tensor) -> Tensor:
    """What follows each of `tokens` (batch, 1 + k): the draft after it, and behind the last one kept `token` (batch,)."""
    following = torch.cat([tokens[:, 1:], token.unsqueeze(1)], dim=1)
    return following.scatter_(1, going.unsqueeze(1), token.unsqueeze(1))
