"""The functions that the course's public test suite calls, in both editions: copy this file into its `tests` folder.

Each only puts the given weights into our modules. BPE and tokenizer are imported with this file, since the suite times
the one and limits the memory of the other; PyTorch is imported inside the functions that need it.
"""
from __future__ import annotations

import os
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from cs336_lm.bpe import train_bpe
from cs336_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import Tensor


def _filled(module: torch.nn.Module, weights: dict[str, Tensor]) -> torch.nn.Module:
    "The module on the weights' device and in their type, holding them; entries that it does not know are left out."
    some = next(iter(weights.values()))
    module = module.to(device=some.device, dtype=some.dtype)
    module.load_state_dict({name: weights[name] for name in module.state_dict()})
    return module


def run_linear(d_in: int, d_out: int, weights: Tensor, in_features: Tensor) -> Tensor:
    "(..., d_in) -> (..., d_out); weights (d_out, d_in)."
    from cs336_lm.layers import Linear
    return _filled(Linear(d_in, d_out), {"weight": weights})(in_features)


def run_embedding(vocab_size: int, d_model: int, weights: Tensor, token_ids: Tensor) -> Tensor:
    "(...) integers -> (..., d_model); weights (vocab_size, d_model)."
    from cs336_lm.layers import Embedding
    return _filled(Embedding(vocab_size, d_model), {"weight": weights})(token_ids)


def run_swiglu(d_model: int, d_ff: int, w1_weight: Tensor, w2_weight: Tensor, w3_weight: Tensor, in_features: Tensor) -> Tensor:
    "(..., d_model) -> the same; w1, w3 (d_ff, d_model), w2 (d_model, d_ff)."
    from cs336_lm.layers import SwiGLU
    weights = {"w1.weight": w1_weight, "w2.weight": w2_weight, "w3.weight": w3_weight}
    return _filled(SwiGLU(d_model, d_ff), weights)(in_features)


def run_scaled_dot_product_attention(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None) -> Tensor:
    "(..., n, d_k), (..., m, d_k), (..., m, d_v) -> (..., n, d_v); mask (..., n, m), True where a query may look."
    from cs336_lm.layers import scaled_dot_product_attention
    return scaled_dot_product_attention(Q, K, V, mask)


def _projections(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> dict[str, Tensor]:
    return {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "output_proj.weight": o}


def run_multihead_self_attention(
    d_model: int, num_heads: int, q_proj_weight: Tensor, k_proj_weight: Tensor, v_proj_weight: Tensor,
    o_proj_weight: Tensor, in_features: Tensor,
) -> Tensor:
    "Causal, without positions: (..., time, d_model) -> the same; heads stacked along the rows of each weight."
    from cs336_lm.layers import CausalMultiHeadSelfAttention
    weights = _projections(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return _filled(CausalMultiHeadSelfAttention(d_model, num_heads), weights)(in_features)


def run_multihead_self_attention_with_rope(
    d_model: int, num_heads: int, max_seq_len: int, theta: float, q_proj_weight: Tensor, k_proj_weight: Tensor,
    v_proj_weight: Tensor, o_proj_weight: Tensor, in_features: Tensor, token_positions: Tensor | None = None,
) -> Tensor:
    "The same with RoPE; token_positions (..., time), by default 0, 1, 2, ..."
    from cs336_lm.layers import CausalMultiHeadSelfAttention, RotaryPositionalEmbedding
    rope = RotaryPositionalEmbedding(theta, d_model // num_heads, max_seq_len)
    weights = _projections(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return _filled(CausalMultiHeadSelfAttention(d_model, num_heads, rope), weights)(in_features, token_positions)


def run_rope(d_k: int, theta: float, max_seq_len: int, in_query_or_key: Tensor, token_positions: Tensor) -> Tensor:
    "(..., time, d_k) -> the same; token_positions (..., time)."
    from cs336_lm.layers import RotaryPositionalEmbedding
    return RotaryPositionalEmbedding(theta, d_k, max_seq_len, device=in_query_or_key.device)(in_query_or_key, token_positions)


def run_transformer_block(
    d_model: int, num_heads: int, d_ff: int, max_seq_len: int, theta: float, weights: dict[str, Tensor], in_features: Tensor,
) -> Tensor:
    "Pre-norm block with RoPE: (batch, time, d_model) -> the same; weights by the handout's names, without `layers.{i}.`."
    from cs336_lm.transformer import ModelConfig, TransformerBlock, make_rope
    config = ModelConfig(context_length=max_seq_len, d_model=d_model, num_heads=num_heads, d_ff=d_ff, rope_theta=theta)
    return _filled(TransformerBlock(config, make_rope(config)), weights)(in_features)


def run_transformer_lm(
    vocab_size: int, context_length: int, d_model: int, num_layers: int, num_heads: int, d_ff: int, rope_theta: float,
    weights: dict[str, Tensor], in_indices: Tensor,
) -> Tensor:
    "(batch, time) integers -> logits (batch, time, vocab_size)."
    from cs336_lm.transformer import ModelConfig, TransformerLM
    config = ModelConfig(vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta)
    return _filled(TransformerLM(config), weights)(in_indices)


def run_rmsnorm(d_model: int, eps: float, weights: Tensor, in_features: Tensor) -> Tensor:
    "(..., d_model) -> the same; weights (d_model,)."
    from cs336_lm.layers import RMSNorm
    return _filled(RMSNorm(d_model, eps), {"weight": weights})(in_features)


def run_silu(in_features: Tensor) -> Tensor:
    from cs336_lm.layers import silu
    return silu(in_features)


def run_get_batch(dataset: npt.NDArray, batch_size: int, context_length: int, device: str) -> tuple[Tensor, Tensor]:
    "Inputs and targets, (batch_size, context_length) each, on the device."
    from cs336_lm.dataset import get_batch
    return get_batch(dataset, batch_size, context_length, device)


def run_softmax(in_features: Tensor, dim: int) -> Tensor:
    from cs336_lm.layers import softmax
    return softmax(in_features, dim)


def run_cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    "Logits (batch, vocab_size) and targets (batch,) -> the mean loss."
    from cs336_lm.optimization import cross_entropy
    return cross_entropy(inputs, targets)


def run_gradient_clipping(parameters: Iterable[torch.nn.Parameter], max_l2_norm: float) -> None:
    "In place; parameters without a gradient are left alone."
    from cs336_lm.optimization import clip_gradients
    clip_gradients(parameters, max_l2_norm)


def get_adamw_cls() -> type[torch.optim.Optimizer]:
    from cs336_lm.optimization import AdamW
    return AdamW


def run_get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int,
) -> float:
    from cs336_lm.optimization import cosine_schedule
    return cosine_schedule(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)


def run_save_checkpoint(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, iteration: int,
    out: str | os.PathLike[str] | BinaryIO | IO[bytes],
) -> None:
    from cs336_lm.training import save_checkpoint
    save_checkpoint(model, optimizer, iteration, out)


def run_load_checkpoint(
    src: str | os.PathLike[str] | BinaryIO | IO[bytes], model: torch.nn.Module, optimizer: torch.optim.Optimizer,
) -> int:
    "The iteration that was saved."
    from cs336_lm.training import load_checkpoint
    return load_checkpoint(src, model, optimizer)


def get_tokenizer(
    vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str] | None = None,
) -> Tokenizer:
    return Tokenizer(vocab, merges, special_tokens)


def run_train_bpe(
    input_path: str | os.PathLike[str], vocab_size: int, special_tokens: list[str], **kwargs: Any,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    return train_bpe(input_path, vocab_size, special_tokens, **kwargs)
