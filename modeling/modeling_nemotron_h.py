"""Nemotron-H assembled: backbone, language-model head with multi-token prediction, and the classification heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_nemotron_h import NemotronHConfig
from .attention import NemotronHAttention
from .block import NemotronHBlock
from .cache import HybridCache, accept_old_cache_name, check_cache
from .first_call import first_step_compiled_ahead
from .generation_mixin import NemotronHGenerationMixin
from .latent_moe import NemotronHExperts, NemotronHTopkRouter
from .linear import NemotronHLinear
from .mamba2 import NemotronHMamba2Mixer
from .mtp import NemotronHMTP
from .norms import NemotronHRMSNorm
from .objective import training_objective
from .published_names import register_layout, take_published_names
from .quantization_file import FILE as QUANTIZATION_FILE
from .quantization_file import drop_quantization, find_quantization
from .quantized_layers import QuantizedExperts, QuantizedLinear
from .remote_code import AUTO_MAP, STUB_FILE, write_stub
from .token_layout import TokenLayout, check_token_ids, describe_tokens
from .unmapped_slices import unmapped_slices
from .weight_checks import check_headers, name_truncated_file, refuse_non_finite, refuse_pickled

# Output projections write into the residual stream; their initial scale shrinks with the number of layers.
_OUTPUT_PROJECTIONS = ("out_proj", "o_proj", "down_proj")


class NemotronHPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every Nemotron-H class: loading, initialisation, recording of outputs."""

    config_class = NemotronHConfig
    config: NemotronHConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("NemotronHBlock", "NemotronHMTPBlock")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": NemotronHBlock,
        "attentions": OutputRecorder(NemotronHAttention, index=1),
        "router_logits": OutputRecorder(NemotronHTopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)

    def __init__(self, config: NemotronHConfig, *args, **kwargs):
        register_layout()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers', from safetensors files only, and what is wrong with them is named.

        Raises:
            ValueError: pickled weights; a file that is not a whole safetensors file; experts that are missing or surplus;
                shapes that do not fit the configuration; a weight with NaN or infinity.
            FileNotFoundError: a shard that the index names and that is not there.
        """
        refuse_pickled(pretrained_model_name_or_path, kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True
        find_quantization(cls.config_class, pretrained_model_name_or_path, kwargs)
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(name_truncated_file(pretrained_model_name_or_path, error)) from error
        refuse_non_finite(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # `from_pretrained` and adapters come through here, the latter with keys of their own.
        if state_dict is None and expected_keys is None:
            check_headers(model, checkpoint_files, load_config)
            state_dict = unmapped_slices(checkpoint_files, load_config)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As transformers', always in the published layout, with a stub for `trust_remote_code=True` beside it.

        transformers would write back the layout that was read. Only `save_original_format=False` still asks for
        the modules' own names and stacked experts.

        Raises:
            ValueError: `save_original_format=False` of a quantised model, whose tensors nobody would find by such names; a part of
                a quantised model.
        """
        quantizer = getattr(self, "hf_quantizer", None)
        ours = getattr(quantizer, "headers_as_published", False)
        if ours and not kwargs.get("save_original_format", True):
            raise ValueError(
                "`save_original_format=False` stacks experts, which no reader of quantised checkpoints knows: leave it out, or "
                "call `dequantize()` first."
            )
        if quantizer is None and any(isinstance(m, QuantizedLinear | QuantizedExperts) for m in self.modules()):
            raise ValueError(
                "This is a part of a quantised model, and only the whole knows how its weights are packed: save that one, from which "
                f"`{type(self).__name__}.from_pretrained` then opens this part."
            )
        if quantizer is None and getattr(self.config, "quantization_config", None) is not None:
            # A fresh model of a quantised model's configuration, which that one still needs.
            self.config = copy.deepcopy(self.config)
            del self.config.quantization_config
        if quantizer is None or ours:
            self._weight_conversions = get_model_conversion_mapping(self, hf_quantizer=quantizer, add_legacy=False)
            if self.base_model is self:
                self._weight_conversions.insert(0, PrefixChange(prefix_to_remove="backbone"))
        if not getattr(self, "_hf_peft_config_loaded", False):
            self.config.auto_map = dict(AUTO_MAP)
            if self.should_save_on_this_rank(is_main_process):
                write_stub(save_directory)
                if ours:
                    self.config.quantization_config = quantizer.quantization_config  # the configuration may be a copy
                    quantizer.write_json(save_directory)
                else:
                    drop_quantization(save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir):
        # Uploaded is what changed since; these are already there when transformers begins to save.
        times = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in times.items() if name not in (STUB_FILE, QUANTIZATION_FILE)}

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        take_published_names(self, state_dict, prefix, missing_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Our own experts unless another implementation is asked for by name."""
        return super().get_correct_experts_implementation(requested_experts or "eager")

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers finds out by reading one source file; ours is split over several

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Every write goes through `transformers.initialization`, which leaves tensors from a checkpoint alone.
        config = self.config
        std = config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(config.conv_kernel)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, NemotronHTopkRouter):
            init.normal_(module.weight, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, NemotronHExperts):
            init.normal_(module.up_proj, std=std)
            init.normal_(module.down_proj, std=std * self._output_scale())
        elif isinstance(module, NemotronHMamba2Mixer):
            heads = torch.empty(config.mamba_num_heads)
            init.copy_(module.A_log, heads.uniform_(1, 16).log())
            init.ones_(module.D)
            # dt log-uniform in [time_step_min, time_step_max]; dt_bias is its inverse softplus.
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            dt = heads.uniform_(low, high).exp().clamp(min=config.time_step_floor)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))
        elif "RMSNorm" in type(module).__name__:
            init.ones_(module.weight)
        for name, child in module.named_children():
            if name in _OUTPUT_PROJECTIONS and isinstance(child, nn.Linear) and config.rescale_prenorm_residual:
                init.normal_(child.weight, std=std * self._output_scale())

    def _output_scale(self) -> float:
        return 1 / math.sqrt(self.config.num_hidden_layers) if self.config.rescale_prenorm_residual else 1.0


class NemotronHModel(NemotronHPreTrainedModel):
    """The backbone: embeddings, blocks and the final norm.

    Example:

    ```python
    >>> import torch
    >>> from nemotron_super import NemotronHModel, preset
    >>> model = NemotronHModel(preset("tiny"))
    >>> model(torch.tensor([[1, 5, 9]])).last_hidden_state.shape
    torch.Size([1, 3, 256])
    ```
    """

    _keys_to_ignore_on_load_unexpected = (r"^mtp\.", r"^lm_head\.")

    def __init__(self, config: NemotronHConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            NemotronHBlock(config, kind, index) for index, kind in enumerate(config.layers_block_type)
        )
        self.norm_f = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False  # set by transformers, which then turns `use_cache` off
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    @accept_old_cache_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | Sequence[int] | None = None,
        layout: TokenLayout | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Run the backbone.

        Args:
            input_ids: (batch, seq) int64; or give `inputs_embeds` (batch, seq, hidden) instead.
            attention_mask: (batch, past + seq), 1 for tokens and 0 for padding on either side.
            position_ids: (batch, seq). Used only to find packed documents: they begin where it does not go up by one.
            cache: a `HybridCache`, filled in place.
            seq_idx: (batch, seq) document ids of a packed batch.
            cu_seq_lens_q: (documents + 1,) cumulative lengths of a flattened batch of one row.
            layout: padding and documents, already worked out from the arguments above by a head.

        Returns:
            `last_hidden_state` (batch, seq, hidden) after the final norm, `cache` when `use_cache`, and
            `hidden_states`, `attentions` and `router_logits` when asked for.

        Raises:
            ValueError: inputs that contradict each other, named.
        """
        if layout is None:
            layout, inputs_embeds = self.prepare_inputs(
                input_ids, attention_mask, position_ids, cache, inputs_embeds, seq_idx, cu_seq_lens_q
            )
        if use_cache and cache is None:
            cache = HybridCache(self.config)
        hidden_states = inputs_embeds.float() if self.config.residual_in_fp32 else inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, layout=layout, cache=cache, **kwargs)
        hidden_states = self.norm_f(hidden_states.to(self.norm_f.weight.dtype))
        if isinstance(cache, HybridCache):
            # On a GPU nobody has looked at the mask of a single token, and there is no order.
            padded = layout.padding is not None and layout.padding.order is not None
            # While a graph is traced, positions that are given may be of one document: nobody has looked.
            packed = layout.seq_idx is not None and not torch.compiler.is_compiling()
            cache.note_tokens(inputs_embeds.shape[1], packed=packed, padded=padded)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, cache=cache if use_cache else None)

    def prepare_inputs(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        inputs_embeds: Tensor | None,
        seq_idx: Tensor | None,
        cu_seq_lens_q: Tensor | Sequence[int] | None,
    ) -> tuple[TokenLayout, Tensor]:
        """Check the inputs of `forward` against each other; return their layout and embeddings (batch, seq, hidden)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            check_token_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embeddings(input_ids)
        if cache is not None and not torch.compiler.is_compiling():
            check_cache(cache, self.config, *inputs_embeds.shape[:2])
        layout = describe_tokens(
            self.config, inputs_embeds, attention_mask, position_ids, cache, seq_idx, cu_seq_lens_q
        )
        return layout, inputs_embeds


@dataclass
class NemotronHCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output for mixtures of experts, with the parts of the loss and the MTP logits.

    Args:
        loss: what to minimise: `lm_loss`, plus the scaled `mtp_loss` where MTP ran.
        logits: (batch, seq, vocab); None while training on labels, unless asked for with `output_logits=True`.
        lm_loss: next-token cross entropy, in nats per token, where MTP ran (otherwise it is `loss`); for logs, without a gradient.
        mtp_loss: mean over depths of the MTP cross entropies, before scaling; without a gradient too.
        mtp_logits: one (batch, seq, vocab) tensor per depth; position t of entry k predicts token t + k + 2.
    """

    lm_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    mtp_logits: tuple[Tensor, ...] | None = None


class NemotronHForCausalLM(NemotronHPreTrainedModel, NemotronHGenerationMixin):
    """Backbone, language-model head and, where the configuration has it, the MTP head (`model.mtp`).

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from nemotron_super import NemotronHForCausalLM
    >>> path = "model_card/nemotron-h-tiny"
    >>> model, tokenizer = NemotronHForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    >>> ids = tokenizer("def main():", return_tensors="pt").input_ids
    >>> text = tokenizer.decode(model.generate(ids, max_new_tokens=20)[0])
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: NemotronHConfig):
        super().__init__(config)
        self.model = NemotronHModel(config)
        self.lm_head = NemotronHLinear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = NemotronHMTP(config) if config.num_nextn_predict_layers else None
        self.post_init()

    @can_return_tuple
    @accept_old_cache_name
    @first_step_compiled_ahead
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | Sequence[int] | None = None,
        output_mtp_logits: bool | None = None,
        mtp_num_depths: int | None = None,
        output_logits: bool | None = None,
        loss_weights: Tensor | None = None,
        **kwargs,
    ) -> NemotronHCausalLMOutput:
        """Predict the next token and, when training or asked to, the tokens after it.

        Args:
            labels: (batch, seq) int64, not shifted, -100 to ignore. The loss is next-token cross entropy, plus
                `config.mtp_loss_scaling_factor` times the mean MTP loss while training or with `output_mtp_logits`.
            logits_to_keep: the last so many positions get logits (0: all), or the positions themselves.
            output_mtp_logits: return `mtp_logits`. Needs the whole sequence in one call, without a filled cache.
            mtp_num_depths: how many depths to run instead of `config.mtp_num_depths`.
            output_logits: whether to return `logits`. By default yes, but not while training on `labels`: there they are
                the largest tensor of all, and the loss is computed without holding them.
            loss_weights: (batch, seq), what each label counts in the loss; by default 1.
            num_items_in_batch: what the summed losses are divided by, as transformers' `Trainer` gives it; by default
                each term's sum of weights.
            Others: as in `NemotronHModel`.

        Raises:
            ValueError: labels or weights of another shape than the inputs, MTP asked of a model without it or with a filled cache,
                `logits_to_keep` together with `labels`.
        """
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not keeps_all:
            raise ValueError("`labels` need the logits of every position: leave `logits_to_keep` at 0.")
        depths = self._mtp_depths(labels, cache, output_mtp_logits, mtp_num_depths)
        layout, inputs_embeds = self.model.prepare_inputs(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, seq_idx, cu_seq_lens_q
        )
        for name, given in (("labels", labels), ("loss_weights", loss_weights)):
            if given is not None and given.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"`{name}` has shape {tuple(given.shape)} but the inputs have shape {tuple(inputs_embeds.shape[:2])}."
                )
        items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(inputs_embeds=inputs_embeds, cache=cache, use_cache=use_cache, layout=layout, **kwargs)
        hidden_states = outputs.last_hidden_state
        logits = mtp_logits = None
        if output_logits or (output_logits is None and not (self.training and labels is not None)):
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        ahead = self.mtp(hidden_states, inputs_embeds, layout, depths) if depths else []
        if output_mtp_logits:
            mtp_logits = tuple(self.lm_head(slice_logits_to_keep(h, logits_to_keep)) for h in ahead)

        loss = lm_term = mtp_term = None
        if labels is not None:
            loss, lm_term, mtp_term = training_objective(
                self.lm_head,
                hidden_states,
                ahead,
                labels,
                layout,
                self.config.mtp_loss_scaling_factor,
                items,
                loss_weights,
                logits,
                mtp_logits,
            )

        return NemotronHCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            lm_loss=lm_term if mtp_term is not None else None,
            mtp_loss=mtp_term,
            mtp_logits=mtp_logits,
        )

    def _mtp_depths(
        self, labels: Tensor | None, cache: Cache | None, output_mtp_logits: bool | None, depths: int | None
    ) -> int:
        """How many MTP depths this call runs: those asked for, or the trained ones where a loss wants them."""
        wanted = output_mtp_logits or (self.training and labels is not None and self.mtp is not None)
        if depths is not None and depths < (1 if output_mtp_logits else 0):
            raise ValueError(f"`mtp_num_depths` is {depths}: it must be at least 1.")
        if not wanted:
            return 0
        if self.mtp is None:
            raise ValueError(
                "`output_mtp_logits` was asked of a model without multi-token prediction: its configuration has "
                "`num_nextn_predict_layers=0`, and its checkpoint no `mtp.layers.*` tensors."
            )
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("`mtp_logits` need the whole sequence in one call: pass `cache=None`.")
        return self.config.mtp_num_depths if depths is None else depths


class NemotronHForSequenceClassification(GenericForSequenceClassification, NemotronHPreTrainedModel):
    """transformers' generic sequence classifier on the backbone."""


class NemotronHForTokenClassification(GenericForTokenClassification, NemotronHPreTrainedModel):
    """transformers' generic token classifier on the backbone."""
