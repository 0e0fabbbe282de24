r"""Every list of words that anything about a model is read from: regular expressions over whole words of a name.

The first half is about parameters: one dotted part of a parameter's name, in lower case. The second half is about configs: the
name of an attribute. Words settle only what shapes and the forward pass leave open, so a family with names of its own usually
needs no entry here. A word that is missing for one family only belongs into that family's file (``transformers/families``).
"""

from __future__ import annotations

# ---- parameters: one part of the name ----------------------------------------------------------------------------------

ATTENTION = (
    r"(self_?)?(attn|attention)\w*|\w*_attn|temporal_block|mixer|mamba|mamba_decoder|ssm|conv|short_conv|linear_attn"
)
FEED_FORWARD = r"\w*mlps?|mlp\w*|ffn|feed_?forward|ff(_[it]|_context)?|\w*_moe|moe|block_sparse_moe"
SHARED = r"shared_experts?|shared_mlp|shared_expert_mlp"
ROUTER = r"\w*router\w*"
SHARED_GATE = r"shared_expert_gate"  # one number per token on the shared experts: a router of one
POSITION = r"wpe|\w*position\w*|\w*pos_emb\w*|token_type_embeddings"
HYPER_CONNECTION = r"\w*_hc|hc_\w*|\w*hyper_connection\w*"
QUERY = r"(to_)?q(_t)?|add_q_proj|q_\w*|wq\w*|query|\w*_q_proj"
KEY = r"(to_)?k(_t)?|add_k_proj|k_\w*|wk\w*|key"
VALUE = r"(to_)?v(_t)?|add_v_proj|v_\w*|wv\w*|value"
FUSED_QKV = r"w?qkv\w*|c_attn|query_key_value|in_proj_qkv\w*|fused_qkv\w*"
MIXER_GATE = r"output_gate|g_proj|gate_proj|gate"
KEY_VALUE = r"kv\w*|wkv\w*"
ATTENTION_OUT = r"(to_(add_)?)?out(_t)?|o|o_\w*|wo|out_proj|output|dense|c_proj|linear_out|output_linear|out_linear"
GATE = r"gate|\w*gate_proj|w1|gate_linear"
GATE_UP = r"gate_up\w*|input_linear|wi_fused|up_gate\w*"
UP = r"up|\w*up_proj\w*|w3|fc1|fc_in|c_fc|dense_h_to_4h|fc|wi|v1|linear_1"
DOWN = r"down|\w*down_proj\w*|w2|fc2|fc_out|c_proj|dense_4h_to_h|output_linear|wo|linear_2"
NORM = r"\w*norm\w*|ln|ln_\w*|\w*_ln|\w*layernorm\w*"
NORMED_ATTENTION = "norm_att"  # a part of a block's name (DBRX), not a norm
QK_NORM = r"(q|k|query|key|qk)_?(layer)?_?(norm|ln|layernorm)|ln_[qk]|qk_norm|norm_(added_)?[qk]|[qk]_rms_norm(_t)?"
SELECTION_BIAS = r"e_score_correction_bias|expert_bias|expert_biases|score_bias|routing_bias|correction_bias"
# Vectors that rules treat like gains and biases, but which start as the model's own code starts them.
OWN_START = (
    r"sinks?|a_log|d|a|dt_bias|dt|lambda\w*|\w*_scale|scale|temp|alpha\w*|\w*gain|\w*_residual|residual\w*|recurrent_param"
    r"|\w*_bias|base|hc_base|position_bias|\w*_slope|beta|gamma"
)
# Offsets of something other than a matrix product, so that no weight's fold carries over to them.
OWN_BIAS = r"dt_bias|position_bias|\w*(gate|states|residual)_bias"
BLOCKS = r"layers?|h|(\w*_)?blocks?"
# Of diffusion transformers. A feed-forward of diffusers is net.0.proj and net.2; proj by itself is many models' down projection.
UP_OF_IMAGE = r"(.*\.)?(net\.(0\.)?proj|proj_mlp)"
MODULATION_TABLE = r"scale_shift_table"  # what a block adds to a modulation that all blocks share

# ---- configs: an attribute ---------------------------------------------------------------------------------------------

LAYERS = r"num_hidden_layers|n_layers?|num_(single_)?layers|decoder_layers"
WIDTH = r"hidden_size|n_embd|d_model|model_dim"
VOCABULARY = r"(padded_)?vocab_size"
EXPERTS = r"(num_|n_|moe_)(local_|routed_|num_)?experts"
ACTIVE_EXPERTS = (
    r"num_experts_per_tok(en)?|num_activated_experts|moe_top_?k|moe_k|top_k_experts|top_k|experts_per_token"
)
EXPERT_GROUPS = r"(moe_)?(num_|n_)?expert_groups?|n_group|num_expert_group"
ACTIVE_GROUPS = r"topk_group|limited_groups"
EXPERT_WIDTH = r"(moe|expert)_(intermediate|ffn_hidden)_size|moe_intermediate_dim|moe_ffn_hidden_size"
SHARED_EXPERTS = r"(num_|n_|moe_num_)?shared_experts?"
SHARED_WIDTH = r"(moe_)?shared_experts?_(intermediate|ffn_hidden)_size|shared_intermediate_size"
FFN_WIDTH = r"intermediate_size(_mlp)?|ffn_dim|n_inner|ffn_hidden_size|d_ff"
HEADS = r"(num|n)_attention_heads|num_heads|n_heads?"
KV_HEADS = r"(num|n)_key_value_heads|num_kv_heads|kv_n_heads"
HEAD_SIZE = r"(v_)?head_dim|kv_channels"
SEQUENCE = r"max_position_embeddings|n_positions|max_seq_len|n_ctx"
RENORMALISE = r"norm_topk_prob|norm_top_k_prob|route_norm|normalize_expert_weights|moe_renormalize|norm_topk"

# What a reader knows by one name, whatever a config calls it; observers double each in turn.
DIMENSIONS: dict[str, str] = {
    "width": WIDTH,
    "vocabulary": VOCABULARY,
    "experts": EXPERTS,
    "expert width": EXPERT_WIDTH,
    "shared experts": SHARED_EXPERTS,
    "shared width": SHARED_WIDTH,
    "ffn": FFN_WIDTH,
    "heads": HEADS,
    "head size": HEAD_SIZE,
}

# The first pattern that matches an attribute gives its size in a tiny model; sizes differ so that axes can be told apart.
TINY_SIZES: tuple[tuple[str, int], ...] = (
    (rf"vocab_size_per_layer_input|{VOCABULARY}", 112),
    (EXPERT_GROUPS, 2),
    (ACTIVE_GROUPS, 1),
    (ACTIVE_EXPERTS, 2),
    (SHARED_EXPERTS, 1),
    (EXPERTS, 8),
    (SHARED_WIDTH, 40),
    (rf"{EXPERT_WIDTH}|intermediate_size_moe", 48),
    (rf"{FFN_WIDTH}|d_inner|dff", 80),
    (r"hidden_size|n_embd|d_model|dim|embedding_size|word_embed_proj_dim", 64),
    (rf"{KV_HEADS}|num_global_key_value_heads", 2),
    (rf"{HEADS}|encoder_attention_heads|decoder_attention_heads", 4),
    (r"qk_rope_head_dim|rotary_dim|qk_nope_head_dim", 8),
    (rf"{HEAD_SIZE}|global_head_dim|attention_head_dim", 16),
    (r"q_lora_rank|q_rank", 24),
    (r"kv_lora_rank|o_lora_rank", 20),
    (r"moe_latent_size|.*_lora_rank|.*_rank", 12),
    (r"mamba_d_head", 16),
    (SEQUENCE, 128),
)

# Factors that a model of its own has: attribute, what it multiplies, and the number that switches it off (None: there is none,
# or nothing has to be switched off), or the size of the config that it is divided by, or by whose root.
SCALINGS: tuple[tuple[str, str, float | str | None], ...] = (
    (r"routed_scaling_factor|moe_routed_scaling_factor|router_scaling_factor|route_scale", "routed sum", None),
    (r"embedding_multiplier|scale_emb|embedding_scale|embed_scale", "embedding", 1.0),
    (r"residual_multiplier|residual_scale", "residual branches", 1.0),
    (r"scale_depth", "residual branches (over √layers)", "√layers"),  # MiniCPM
    (r"dim_model_base", "logits (over the width)", "width"),
    (r"attention_multiplier|attention_scaling", "attention logits", None),
    (r"query_pre_attn_scalar", "attention logits (as 1/√x)", None),
    (r"logits_scaling", "logits (as 1/x)", 1.0),
    (r"logit_scale|lm_head_multiplier|logits_multiplier|output_multiplier_scale", "logits", 1.0),
    (r"\w*_multiplier", "other", 1.0),
)
