"""`NemotronHConfig`: every number that defines a Nemotron-H model, checked when it is built.

It reads the published files of Nemotron 3 Super, Nano, Ultra and 3.5 Lightning as they are. Two things differ from
transformers' own class on purpose: `time_step_limit` is kept as published, (0, inf), and what cannot work is refused
with the name of the field and the fix, instead of being corrected in silence.
"""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .layer_pattern import parse_layers, to_pattern

# Fields that may be spelt as a pattern string, with the field that holds the canonical list.
_PATTERN_FIELDS = {
    "hybrid_override_pattern": "layers_block_type",
    "mtp_hybrid_override_pattern": "mtp_layers_block_type",
}

# mamba-ssm's names, found in early exports.
_LEGACY_FIELDS = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}

_POSITIVE_FIELDS = (
    "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "ssm_state_size", "mamba_num_heads", "mamba_head_dim", "n_groups", "chunk_size", "n_routed_experts",
    "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "n_group", "topk_group",
    "mtp_num_depths",
)  # fmt: skip


@strict
class NemotronHConfig(PreTrainedConfig):
    r"""
    Configuration of a Nemotron-H model (Nemotron 3 Super, Nano, Ultra, 3.5 Lightning).

    The layer list is given once, in any published spelling: `hybrid_override_pattern="MEM*E"`, or
    `layers_block_type=[...]` with the names of Lightning or of transformers. `num_hidden_layers` may accompany it and
    must then agree with it.

    Args:
        vocab_size (`int`, defaults to 131072): number of token ids.
        hidden_size (`int`, defaults to 4096): width of the residual stream.
        layers_block_type (`list[str]`): one name per layer: `linear_attention` (Mamba-2), `moe`, `full_attention`, `mlp`.
        num_attention_heads, num_key_value_heads, head_dim (`int`): attention geometry. There is no position encoding.
        mamba_num_heads, mamba_head_dim, ssm_state_size, n_groups (`int`): Mamba-2 geometry. B and C are shared by
            `mamba_num_heads / n_groups` heads, and the gated norm works in `n_groups` groups.
        conv_kernel (`int`, defaults to 4), use_conv_bias (`bool`): the causal convolution over x, B and C.
        chunk_size (`int`, defaults to 128): positions per chunk of the Mamba-2 scan; changes speed, not the function.
        time_step_limit (`tuple[float, float]`, defaults to `(0, inf)`): bounds on the time step after softplus.
        time_step_min, time_step_max, time_step_floor (`float`): initialisation of `dt_bias` only; never a clamp.
        n_routed_experts, num_experts_per_tok, n_shared_experts (`int`): the mixture of experts.
        moe_intermediate_size, moe_shared_expert_intermediate_size (`int`): widths of a routed and of the shared expert.
        moe_latent_size (`int`, *optional*): width in which routed experts work; `None` means `hidden_size`, without
            the two latent projections.
        routed_scaling_factor (`float`), norm_topk_prob (`bool`), n_group, topk_group (`int`): the router.
        num_nextn_predict_layers (`int`, defaults to 0): *physical* multi-token-prediction depths in the checkpoint.
        mtp_layers_block_type (`list[str]`, *optional*): the layers of one physical depth; also accepted as
            `mtp_hybrid_override_pattern="*E"`.
        mtp_num_depths (`int`, defaults to 2): how many tokens ahead MTP is trained; one physical depth is applied
            repeatedly.
        mtp_loss_scaling_factor (`float`, defaults to 0.3): weight of the MTP loss, shared equally among the depths.
        mamba_ssm_cache_dtype (`str`, defaults to `"float32"`): dtype in which the SSM state is cached: `"bfloat16"`
            and `"float16"` halve it and round stochastically, so that even greedy text depends on `torch.manual_seed`.
        residual_in_fp32 (`bool`, defaults to `False`): keep the residual stream in float32.
        rescale_prenorm_residual (`bool`, defaults to `True`): scale the initialisation of output projections by
            `1 / sqrt(number of layers)`.

    Raises:
        ValueError: a field that cannot work, named together with the fix.

    Example:

    ```python
    >>> from nemotron_super import NemotronHConfig
    >>> config = NemotronHConfig(hybrid_override_pattern="ME*E", num_key_value_heads=2)
    >>> config.layers_block_type
    ['linear_attention', 'moe', 'full_attention', 'moe']
    ```
    """

    model_type = "nemotron_h"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 (transformers reads it from the class)
    attribute_map = {"layer_types": "layers_block_type", "num_local_experts": "n_routed_experts"}  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "embeddings": "embedding_rowwise",
        "layers.*.mixer.experts.up_proj": "colwise",
        "layers.*.mixer.experts.down_proj": "rowwise",
        "layers.*.mixer.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {  # noqa: RUF012
        "layers.*.mixer.experts.up_proj": "grouped_gemm",
        "layers.*.mixer.experts.down_proj": "grouped_gemm",
        "layers.*.mixer.experts": "ep_dispatch_experts",
    }
    # The head's weight is read outside its module, so it and the embeddings belong to the root.
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}  # noqa: RUF012

    vocab_size: int = 131072
    hidden_size: int = 4096
    layers_block_type: list[str] | str | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    num_logits_to_keep: int = 1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int = 128
    max_position_embeddings: int = 4096
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    sliding_window: int | None = None
    intermediate_size: int = 21504
    mlp_hidden_act: str = "relu2"
    mlp_bias: bool = False
    ssm_state_size: int = 128
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    mamba_hidden_act: str = "silu"
    n_groups: int = 8
    conv_kernel: int = 4
    expand: int = 2
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_limit: list[float] | tuple[float, ...] = (0.0, float("inf"))
    time_step_floor: float = 1e-4
    use_conv_bias: bool = True
    chunk_size: int = 128
    mamba_proj_bias: bool = False
    mamba_ssm_cache_dtype: str = "float32"
    n_routed_experts: int = 8
    output_router_logits: bool = False
    n_shared_experts: int = 1
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None
    moe_shared_expert_overlap: bool = True
    num_experts_per_tok: int = 2
    routed_scaling_factor: float | int = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    num_nextn_predict_layers: int = 0
    mtp_layers_block_type: list[str] | str | None = None
    mtp_num_depths: int = 2
    mtp_loss_scaling_factor: float = 0.3
    use_bias: bool = False
    initializer_range: float = 0.02
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    hidden_dropout: float | int = 0.0
    rescale_prenorm_residual: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for old, new in _LEGACY_FIELDS.items():
            if old in kwargs:
                setattr(self, new, kwargs.pop(old))
        for pattern_field, list_field in _PATTERN_FIELDS.items():
            self._merge_spellings(list_field, pattern_field, kwargs.pop(pattern_field, None))
        if self.layers_block_type is None:
            self.layers_block_type = parse_layers("ME*-", "layers_block_type")
        if "num_hidden_layers" in kwargs:
            self.num_hidden_layers = kwargs.pop("num_hidden_layers")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        # JSON gives a list; one spelling inside makes equality after a round trip hold.
        if self.time_step_limit is None:
            self.time_step_limit = [0.0, math.inf]
        elif isinstance(self.time_step_limit, list | tuple):
            self.time_step_limit = [float(bound) for bound in self.time_step_limit]
        super().__post_init__(**kwargs)
        self._check()

    def _merge_spellings(self, list_field: str, pattern_field: str, pattern: str | None) -> None:
        listed = getattr(self, list_field)
        layers = None if listed is None else parse_layers(listed, list_field)
        # Files of models without MTP may hold an empty MTP pattern.
        if pattern or (pattern is not None and list_field == "layers_block_type"):
            from_pattern = parse_layers(pattern, pattern_field)
            if layers is not None and layers != from_pattern:
                raise ValueError(
                    f"`{pattern_field}` ({pattern!r}) and `{list_field}` ({to_pattern(layers)!r} as a pattern) disagree. "
                    "Give one of them, or make them equal."
                )
            layers = from_pattern
        setattr(self, list_field, layers)

    def validate_layer_type(self) -> None:
        """Called by transformers on load and on save, in place of its own check (which does not know `mlp` layers)."""
        self._check()

    def _check(self) -> None:
        """Refuse what cannot work. Each message names the field and what to set instead."""

        def refuse_unless(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        for name in _POSITIVE_FIELDS:
            value = getattr(self, name)
            refuse_unless(
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                f"`{name}` is {value!r}: it must be a whole number above 0.",
            )
        refuse_unless(
            self.mamba_num_heads % self.n_groups == 0,
            f"`mamba_num_heads` ({self.mamba_num_heads}) must be divisible by `n_groups` ({self.n_groups}): every group "
            "of B and C serves the same number of heads.",
        )
        refuse_unless(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"`num_attention_heads` ({self.num_attention_heads}) must be divisible by `num_key_value_heads` "
            f"({self.num_key_value_heads}): every key/value head serves the same number of query heads.",
        )
        refuse_unless(
            self.num_experts_per_tok <= self.n_routed_experts,
            f"`num_experts_per_tok` ({self.num_experts_per_tok}) is above `n_routed_experts` ({self.n_routed_experts}): "
            "lower the first or raise the second.",
        )
        refuse_unless(
            self.n_routed_experts % self.n_group == 0 and self.topk_group <= self.n_group,
            f"`n_group` ({self.n_group}) must divide `n_routed_experts` ({self.n_routed_experts}), and `topk_group` "
            f"({self.topk_group}) must not exceed `n_group`.",
        )
        refuse_unless(
            self.num_experts_per_tok <= self.topk_group * (self.n_routed_experts // self.n_group),
            f"`num_experts_per_tok` ({self.num_experts_per_tok}) is more than the {self.topk_group} chosen group(s) hold: "
            "raise `topk_group` or lower `num_experts_per_tok`.",
        )
        refuse_unless(
            self.n_shared_experts == 1,
            f"`n_shared_experts` is {self.n_shared_experts}: this architecture has one shared expert, of width "
            "`moe_shared_expert_intermediate_size`.",
        )
        refuse_unless(
            self.moe_latent_size is None or self.moe_latent_size > 0,
            f"`moe_latent_size` is {self.moe_latent_size}: give a positive width, or None to work in `hidden_size`.",
        )
        refuse_unless(
            self.num_nextn_predict_layers >= 0,
            f"`num_nextn_predict_layers` is {self.num_nextn_predict_layers}: use 0 for a model without MTP.",
        )
        refuse_unless(
            self.num_nextn_predict_layers == 0 or self.mtp_layers_block_type is not None,
            f"`num_nextn_predict_layers` is {self.num_nextn_predict_layers} but `mtp_layers_block_type` is missing: say "
            "which layers one MTP depth has, for example mtp_hybrid_override_pattern='*E'.",
        )
        refuse_unless(
            "linear_attention" not in (self.mtp_layers_block_type or []),
            "`mtp_layers_block_type` holds a Mamba-2 layer: MTP depths are built from attention, moe and mlp layers.",
        )
        refuse_unless(self.conv_kernel >= 2, f"`conv_kernel` is {self.conv_kernel}: it must be at least 2.")
        limit = self.time_step_limit
        refuse_unless(
            isinstance(limit, list | tuple) and len(limit) == 2 and 0 <= limit[0] <= limit[1],
            f"`time_step_limit` is {self.time_step_limit}: give (low, high) with 0 <= low <= high.",
        )
        refuse_unless(
            0 < self.time_step_min <= self.time_step_max,
            f"`time_step_min` ({self.time_step_min}) and `time_step_max` ({self.time_step_max}) bound the initial time "
            "steps: give 0 < time_step_min <= time_step_max.",
        )
        refuse_unless(
            self.mamba_hidden_act in ("silu", "swish"),
            f"`mamba_hidden_act` is {self.mamba_hidden_act!r}: the Mamba-2 layers know 'silu' only.",
        )
        refuse_unless(
            self.mamba_ssm_cache_dtype in ("float32", "bfloat16", "float16"),
            f"`mamba_ssm_cache_dtype` is {self.mamba_ssm_cache_dtype!r}: use 'float32', 'bfloat16' or 'float16'.",
        )
        refuse_unless(
            self.sliding_window is None,
            f"`sliding_window` is {self.sliding_window}: attention layers see the whole sequence; set it to None.",
        )

    @property
    def num_hidden_layers(self) -> int:
        """Number of backbone layers: the length of `layers_block_type`."""
        return len(self.layers_block_type)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int | None) -> None:
        if value is not None and value != len(self.layers_block_type):
            raise ValueError(
                f"`num_hidden_layers` is {value} but `layers_block_type` has {len(self.layers_block_type)} layers "
                f"({self.hybrid_override_pattern!r}): leave `num_hidden_layers` out, or make them equal."
            )

    @property
    def hybrid_override_pattern(self) -> str:
        """The layer list as a pattern string, such as `"MEM*E"`."""
        return to_pattern(self.layers_block_type)

    @property
    def mtp_hybrid_override_pattern(self) -> str | None:
        """The layers of one MTP depth as a pattern string, or None."""
        return None if self.mtp_layers_block_type is None else to_pattern(self.mtp_layers_block_type)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """As transformers', for subclasses: this class is installed, so no checkpoint needs a copy of its file."""
        if cls is not NemotronHConfig:
            super().register_for_auto_class(auto_class)

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with the pattern strings and the count beside the lists, for readers that know only those."""
        output = super().to_dict()
        output["num_hidden_layers"] = self.num_hidden_layers
        output["hybrid_override_pattern"] = self.hybrid_override_pattern
        if self.mtp_layers_block_type is not None:
            output["mtp_hybrid_override_pattern"] = self.mtp_hybrid_override_pattern
        return output
