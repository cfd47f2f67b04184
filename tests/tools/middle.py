"""A model of middling size: large enough that shapes tell parts apart, small enough to run."""

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "top_k_experts": 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 64,
}
