"""How transformers' `generate` comes to this model's caches and decoding loops: its hooks, by the names that it calls.

What the hooks lead to is elsewhere: `generation.py` drafts with MTP, `captured_decoding.py` decodes from caches of fixed size.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask

from .cache import HybridCache, accept_old_cache_name
from .captured_decoding import borrow_cache, sample_captured
from .first_call import compile_first_call
from .fp8_cache import kv_dtype_of
from .generation import check_mtp_options, generate_with_mtp, refuse_several_gpus, refuse_stateful_processors
from .prompt import held_tokens
from .static_cache import LONGEST_STEP, StaticHybridCache
from .stopping_drafts import stopping_at, until_stop
from .token_layout import are_packed, check_token_ids

# Arguments of `forward` that `generate` would hand on without use.
_PACKED = "it continues one text a row; give packed documents as rows of their own, padded on the left"
_NOT_IN_GENERATE = {
    "seq_idx": _PACKED,
    "cu_seq_lens_q": _PACKED,
    "mtp_num_depths": "`num_assistant_tokens` says how many tokens `use_mtp` drafts",
    "output_mtp_logits": "call the model itself for them, without a cache",
    "loss_weights": "it computes no loss",
}


class NemotronHGenerationMixin(GenerationMixin):
    """For a model with `model`, the backbone, and `mtp`, which may be None."""

    def _prepare_generation_config(self, generation_config, **kwargs):
        # transformers' defaults for drafts (20 tokens, a threshold) are made for another model as the drafter.
        given = (
            kwargs,
            vars(generation_config) if generation_config is not None else {},
            vars(self.generation_config),
        )
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if prepared.is_assistant:
            prepared.use_mtp = False  # of its own generation config: here it is the drafter
        if prepared.use_mtp:
            if all(source.get("num_assistant_tokens") is None for source in given):
                prepared.num_assistant_tokens = self.config.mtp_num_depths
            if all(source.get("assistant_confidence_threshold") is None for source in given):
                prepared.assistant_confidence_threshold = 0.0
        return prepared, model_kwargs

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        # Whoever drafts for another model is given the mask of its text, or none since nothing in it is padding: a text that
        # holds the padding token is no reason to look for some.
        if generation_config.is_assistant:
            return inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.long)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, *args):
        if callable(custom_generate) and kwargs.get("use_mtp"):
            raise ValueError("`use_mtp` and `custom_generate` are both a decoding loop: give one of them.")
        return super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args)

    def _validate_model_kwargs(self, model_kwargs):
        super()._validate_model_kwargs(model_kwargs)
        for name, instead in _NOT_IN_GENERATE.items():
            if model_kwargs.get(name) is not None:
                raise ValueError(f"`generate` takes no `{name}`: {instead}.")
        positions, cache = model_kwargs.get("position_ids"), model_kwargs.get("cache")
        begins = cache is None or cache.get_seq_length() == 0
        if begins and positions is not None and are_packed(positions, model_kwargs.get("attention_mask")):
            raise ValueError(
                f"`position_ids` do not go up by one within a row, and `generate` takes no packed documents: {_PACKED}."
            )

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        chunk = generation_config.prefill_chunk_size
        if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
            raise ValueError(
                f"`prefill_chunk_size` is {chunk}: give the number of tokens to read at once, at least 1, or leave it out."
            )
        if generation_config.use_mtp:
            if self._has_learnt_prompt():
                raise ValueError(
                    "`use_mtp` reads token ids alone, and an adapter puts a learnt prompt before them (PEFT's prompt tuning): "
                    "decode without `use_mtp`."
                )
            check_mtp_options(self, generation_config, generation_mode_kwargs.get("assistant_model"))
            if generation_mode_kwargs.get("synced_gpus"):
                raise ValueError(
                    "`use_mtp` does not keep several processes in step (`synced_gpus`): decode without it where parameters are "
                    "sharded by ZeRO-3 or FSDP."
                )
        else:
            super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _has_learnt_prompt(self) -> bool:
        # PEFT's prompt tuning puts it before the tokens by a function of its own in the place of ours.
        return "prepare_inputs_for_generation" in vars(self)

    def _assisted_decoding(
        self, input_ids, logits_processor, stopping_criteria, generation_config, inputs_tensor=None, **kwargs
    ):
        # `generate` looks the decoding loop up by this name, for every kind of drafts.
        refuse_stateful_processors(logits_processor)
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        cache = kwargs.get("cache")
        if generation_config.use_cache and not isinstance(cache, HybridCache):
            raise ValueError(
                f"Drafts are taken back from a `HybridCache`, and `cache` is a {type(cache).__name__}: leave it out or give one, "
                "and leave `cache_implementation` out or at 'dynamic', 'static' or 'quantized'."
            )
        if not generation_config.use_mtp:
            with stopping_at(stopping_criteria), self._prompt_read_once(input_ids, generation_config, kwargs):
                return super()._assisted_decoding(*arguments, inputs_tensor=inputs_tensor, **kwargs)
        if kwargs.get("inputs_embeds") is None:
            check_token_ids(input_ids, self.config.vocab_size)
        compile_first_call(self, input_ids, generation_config, kwargs)
        names = ("streamer", "cache", "attention_mask", "inputs_embeds")
        return generate_with_mtp(self, *arguments, **{name: kwargs.get(name) for name in names})

    @contextlib.contextmanager
    def _prompt_read_once(self, input_ids, config, kwargs):
        # transformers' loop for drafts begins with the whole prompt in one call, whatever a given cache holds and
        # `prefill_chunk_size` says.
        cache, embeds, mask = (kwargs.get(name) for name in ("cache", "inputs_embeds", "attention_mask"))
        if not isinstance(cache, HybridCache):  # with `use_cache=False` there is none
            yield
            return
        held = held_tokens(cache, config, input_ids, mask, embeds)
        length, chunk = (input_ids if embeds is None else embeds).shape[1], config.prefill_chunk_size
        while chunk is not None and length - held > chunk:
            piece = slice(held, held + chunk)
            prompt = {"input_ids": input_ids[:, piece]} if embeds is None else {"inputs_embeds": embeds[:, piece]}
            seen = cache.get_seq_length() + chunk
            self.model(**prompt, attention_mask=None if mask is None else mask[:, :seen], cache=cache, use_cache=True)
            held = piece.stop
        cache.prompt_of_drafts = (held, input_ids.shape[1])
        try:
            yield
        finally:
            del cache.prompt_of_drafts

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, cache=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        """As transformers'; where drafts follow a prompt, without what `cache` holds of it, and with those behind `inputs_embeds`."""
        prompt = getattr(cache, "prompt_of_drafts", None)
        if prompt is not None and next_sequence_length is None:
            held, length = prompt
            if inputs_embeds is not None:
                drafts = self.get_input_embeddings()(input_ids[:, length:])
                inputs_embeds = torch.cat([inputs_embeds, drafts.to(inputs_embeds)], dim=1)
            next_sequence_length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1] - held
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, cache, attention_mask, inputs_embeds, **kwargs
        )

    def _get_candidate_generator(self, *args, **kwargs):
        return until_stop(super()._get_candidate_generator(*args, **kwargs))

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        looks_inside = generation_config.return_dict_in_generate and (
            generation_config.output_attentions or generation_config.output_hidden_states
        )
        # Recorded steps hand out logits only and read token ids alone, and several processes would have to record the same ones.
        elsewhere = looks_inside or synced_gpus or self._has_learnt_prompt()
        if not elsewhere:
            compile_first_call(self, input_ids, generation_config, model_kwargs)
        if elsewhere or not isinstance(model_kwargs.get("cache"), StaticHybridCache):
            return super()._sample(*arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        return sample_captured(self, *arguments, streamer, model_kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        cache = model_kwargs.get("cache")
        if is_first_iteration and isinstance(cache, HybridCache):
            # transformers would read all of a prompt again that the cache holds.
            mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
            held_tokens(cache, generation_config, input_ids, mask, embeds)
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _prepare_generated_length(self, generation_config, *args, input_ids_length, inputs_tensor, **kwargs):
        config = super()._prepare_generated_length(
            generation_config, *args, input_ids_length=input_ids_length, inputs_tensor=inputs_tensor, **kwargs
        )
        # transformers takes a larger cache without a word.
        prompt, new = inputs_tensor.shape[1], config.max_length - input_ids_length
        if config.cache_implementation == "static" and 0 < (config.max_cache_len or 0) < prompt + new - 1:
            raise ValueError(
                f"A prompt of {prompt} tokens with {new} new ones does not fit into `max_cache_len={config.max_cache_len}`: give "
                f"{prompt + new - 1} or more, ask for fewer tokens, or leave `max_cache_len` out for a cache that fits."
            )
        return config

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        # generate() would make a plain DynamicCache, whose Mamba layers cannot select or repeat rows. And no cache of
        # transformers' knows its length without an attention layer.
        given = model_kwargs.get("cache")
        if (generation_config.cache_implementation or "").startswith("offloaded") and self.device.type != "cuda":
            raise ValueError(
                f"`cache_implementation={generation_config.cache_implementation!r}` keeps keys and values in CPU memory while a GPU "
                f"computes: this model is on {self.device}. Leave it out."
            )
        wanted, kv_dtype = generation_config, None
        fixed = wanted.cache_implementation == "static"
        if wanted.cache_implementation == "quantized" or (fixed and "backend" in (wanted.cache_config or {})):
            kv_dtype = kv_dtype_of(wanted.cache_config)
        # With a `compile_config` the fixed-size cache is transformers', and so is what compiles.
        if fixed and kv_dtype is not None and wanted.compile_config is not None:
            raise ValueError(
                "`compile_config` compiles steps on transformers' own fixed-size cache, which knows no FP8: leave it out, or "
                f"leave the backend out of `cache_config`, which is {wanted.cache_config}."
            )
        static = fixed and wanted.compile_config is None
        if wanted.is_assistant:  # whose caches must crop
            static, wanted = False, copy.copy(wanted)
            wanted.cache_implementation = None
        if static or isinstance(given, StaticHybridCache):
            refuse_several_gpus(self, "A cache of fixed size")
        if given is None and wanted.use_cache and static:
            rows = batch_size * max(wanted.num_beams, wanted.num_return_sequences)
            tokens = max(max_cache_length, wanted.max_cache_len or 0)
            tokens += LONGEST_STEP if wanted.use_mtp else 0
            model_kwargs["cache"] = borrow_cache(self, rows, tokens, kv_dtype)
            return
        if given is None and wanted.use_cache and wanted.cache_implementation == "quantized":
            wanted = copy.copy(wanted)
            wanted.cache_implementation = None
        super()._prepare_cache_for_generation(wanted, model_kwargs, generation_mode, batch_size, max_cache_length)
        made = model_kwargs.get("cache")
        attends = "full_attention" in self.config.layers_block_type
        if given is None and made is not None and (type(made) is DynamicCache or not attends):
            model_kwargs["cache"] = HybridCache(self.config, offloading=made.offloading, kv_dtype=kv_dtype)
            if generation_config.is_assistant:
                model_kwargs["cache"].activate_past_recording()

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: transformers' continuous batching pages keys and values, and knows no recurrent state."""
        raise ValueError(
            "Continuous batching (`generate_batch`, `cache_implementation='paged'`, `serve --continuous-batching`) cannot hold "
            "the recurrent state of Mamba-2 layers. Use `generate` with a left-padded batch, or serve without it."
        )

    @staticmethod
    @accept_old_cache_name
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, cache, position_ids=None, **kwargs
    ) -> dict[str, Tensor | None]:
        """Both masks the layers need, for fixed-size caches; transformers' default does not know `moe` and `mlp`."""
        arguments = {
            "config": config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "cache": cache,
        }
        return {
            "full_attention": create_causal_mask(**arguments),
            "linear_attention": create_recurrent_attention_mask(**arguments),
        }
